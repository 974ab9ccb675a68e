//! f-divergences: which generator, its value and slope, its behaviour at 0 and infinity.
//!
//! `D_f(old, new) = E_old[f(new/old)]` with `f` convex and `f(1) = 0` (Csiszar 1967). Every built-in
//! generator is normalised so that also `f'(1) = 0`, hence `f >= 0`, and is written as a sum of
//! terms of one sign: nothing cancels near `u = 1`, where a trust region lives.

mod expression;
mod generator;
mod point;

use std::sync::Arc;

use crate::divergence::expression::Expression;
use crate::error::{Error, Result};
use crate::number::Real;

pub(crate) use generator::Generator;
pub use point::Point;

/// How the radius that the user gives becomes a radius of the generator.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Radius {
    Same,
    /// Renyi of order a: `(e^((a-1) delta) - 1) / (a (a-1))` of Cressie-Read.
    Renyi(f64),
    /// Bhattacharyya: `1 - e^-delta` of Hellinger.
    Bhattacharyya,
}

/// A divergence between the old and the new policy.
///
/// | name | generator f(u) |
/// |---|---|
/// | `kl`: KL(old, new), the paper's | `-ln u + u - 1` |
/// | `reverse-kl`: KL(new, old) | `u ln u - u + 1` |
/// | `tv` | `abs(u-1)/2` |
/// | `pearson-chi2` | `(u-1)^2` |
/// | `neyman-chi2` | `(u-1)^2/u` |
/// | `hellinger` (squared) | `(sqrt u - 1)^2/2` |
/// | `le-cam` | `(u-1)^2/(2(u+1))` |
/// | `jensen-shannon` | `[u ln u - (u+1) ln((u+1)/2)]/2` |
/// | `jeffreys` | `(u-1) ln u` |
/// | `alpha:a` (Cressie-Read) | `(u^a - 1 - a(u-1))/(a(a-1))`; a = 0 is kl, 1 reverse-kl |
/// | `renyi:a`, of (new, old), a > 0 | as `alpha:a`, the radius converted |
/// | `bhattacharyya` | as `hellinger`, the radius converted |
/// | `vajda:k`, k >= 1 | `abs(u-1)^k` |
/// | `bwcs:l`, 0 <= l <= 1 | `(u-1)^2/(1-l+l u)` |
/// | `hockey-stick:g`, g >= 1 | `max(u-g, 0)` |
///
/// Their f(0), f'(inf), f''(1) and greatest values are listed once, in `python/bandpo/divergence.py`.
#[derive(Debug, Clone, PartialEq)]
pub struct Divergence {
    spec: String,
    pub(crate) generator: Generator,
    radius: Radius,
}

impl Divergence {
    /// Reads a name such as `kl` or a name with its parameter such as `alpha:0.5`.
    ///
    /// # Errors
    /// [`Error::UnknownDivergence`] and [`Error::DivergenceParameter`].
    pub fn parse(spec: &str) -> Result<Self> {
        let (name, parameter) = match spec.split_once(':') {
            Some((name, text)) => (name, Some(text)),
            None => (spec, None),
        };
        let plain = match name {
            "kl" => Some((Generator::Kl, Radius::Same)),
            "reverse-kl" => Some((Generator::ReverseKl, Radius::Same)),
            "tv" => Some((Generator::Tv, Radius::Same)),
            "pearson-chi2" => Some((Generator::Bwcs(0.0), Radius::Same)),
            "neyman-chi2" => Some((Generator::Bwcs(1.0), Radius::Same)),
            "hellinger" => Some((Generator::Hellinger, Radius::Same)),
            "le-cam" => Some((Generator::LeCam, Radius::Same)),
            "jensen-shannon" => Some((Generator::JensenShannon, Radius::Same)),
            "jeffreys" => Some((Generator::Jeffreys, Radius::Same)),
            "bhattacharyya" => Some((Generator::Hellinger, Radius::Bhattacharyya)),
            _ => None,
        };
        let refuse = |allowed| Error::DivergenceParameter { spec: spec.to_owned(), allowed };
        if let Some((generator, radius)) = plain {
            if parameter.is_some() {
                return Err(refuse("this divergence takes no parameter"));
            }
            return Ok(Self { spec: spec.to_owned(), generator, radius });
        }
        let allowed = match name {
            "alpha" => "alpha:a takes any finite number a",
            "renyi" => "renyi:a takes a finite number a > 0",
            "vajda" => "vajda:k takes a finite number k >= 1",
            "bwcs" => "bwcs:l takes a number 0 <= l <= 1",
            "hockey-stick" => "hockey-stick:g takes a finite number g >= 1",
            _ => return Err(Error::UnknownDivergence { spec: spec.to_owned() }),
        };
        let value = parameter
            .and_then(|text| text.parse::<f64>().ok())
            .filter(|value| value.is_finite())
            .ok_or_else(|| refuse(allowed))?;
        let (generator, radius) = match name {
            "alpha" => (cressie_read(value), Radius::Same),
            "renyi" if value > 0.0 => (
                cressie_read(value),
                if value == 1.0 { Radius::Same } else { Radius::Renyi(value) },
            ),
            "vajda" if value >= 1.0 => (Generator::Vajda(value), Radius::Same),
            "bwcs" if (0.0..=1.0).contains(&value) => (Generator::Bwcs(value), Radius::Same),
            "hockey-stick" if value >= 1.0 => (Generator::HockeyStick(value), Radius::Same),
            _ => return Err(refuse(allowed)),
        };
        Ok(Self { spec: spec.to_owned(), generator, radius })
    }

    /// The divergence of a convex function of `u` given as text, such as `u*ln(u) - u + 1`.
    ///
    /// `f(0)` and `f'(inf)` may be given where they cannot be found out from the text.
    ///
    /// # Errors
    /// [`Error::Expression`] if the text cannot be read, [`Error::Generator`] if the function is not
    /// convex, not finite on (0, inf), or not 0 at 1.
    pub fn from_expression(
        text: &str,
        at_zero: Option<f64>,
        slope_at_infinity: Option<f64>,
    ) -> Result<Self> {
        let expression = Expression::parse(text, at_zero, slope_at_infinity)?;
        Ok(Self {
            spec: text.to_owned(),
            generator: Generator::Expression(Arc::new(expression)),
            radius: Radius::Same,
        })
    }

    /// `f''(1)`; `None` where the generator has a kink or is flat at 1.
    #[must_use]
    pub fn curvature(&self) -> Option<f64> {
        let curvature = self.generator.curvature()?;
        // Of a small divergence of the generator, Renyi's of order a is a times as much.
        Some(if let Radius::Renyi(order) = self.radius { curvature * order } else { curvature })
    }

    /// The radius for this divergence that a radius for its generator stands for.
    #[must_use]
    pub fn radius_of_generator(&self, value: f64) -> f64 {
        match self.radius {
            Radius::Same => value,
            Radius::Renyi(order) => (order * (order - 1.0) * value).ln_1p() / (order - 1.0),
            Radius::Bhattacharyya => -(-value).ln_1p(),
        }
    }

    /// Number and parameter of its generator in `cuda/generator.cuh`; `None` for a text.
    #[must_use]
    pub fn kernel_generator(&self) -> Option<(i32, f64)> {
        Some(match self.generator {
            Generator::Kl => (0, 0.0),
            Generator::ReverseKl => (1, 0.0),
            Generator::Tv => (2, 0.0),
            Generator::Hellinger => (3, 0.0),
            Generator::JensenShannon => (4, 0.0),
            Generator::Jeffreys => (5, 0.0),
            Generator::Alpha(order) => (6, order),
            Generator::Vajda(order) => (7, order),
            Generator::Bwcs(blend) => (8, blend),
            Generator::LeCam => (9, 0.0),
            Generator::HockeyStick(threshold) => (10, threshold),
            Generator::Expression(_) => return None,
        })
    }

    /// The specification this divergence was made from.
    #[must_use]
    pub fn spec(&self) -> &str {
        &self.spec
    }

    /// The radius for the generator that a radius for this divergence stands for.
    #[must_use]
    pub fn generator_radius<T: Real>(&self, delta: f64) -> T {
        match self.radius {
            Radius::Same => T::of(delta),
            Radius::Renyi(order) => {
                let rate = T::of(order) - T::of(1.0);
                let radius = (rate * T::of(delta)).exp_m1() / (T::of(order) * rate);
                // Beyond the range of a double every ratio that can be told from 0 is allowed.
                if radius.to_f64() < f64::MAX { radius } else { T::of(f64::MAX) }
            }
            Radius::Bhattacharyya => -T::of(-delta).exp_m1(),
        }
    }
}

fn cressie_read(order: f64) -> Generator {
    if order == 0.0 {
        Generator::Kl
    } else if order == 1.0 {
        Generator::ReverseKl
    } else {
        Generator::Alpha(order)
    }
}
