//! f-divergences: which generator, its value and slope, its behaviour at 0 and infinity.
//!
//! `D_f(old, new) = E_old[f(new/old)]` with `f` convex and `f(1) = 0` (Csiszar 1967). Every built-in
//! generator is normalised so that also `f'(1) = 0`, hence `f >= 0`, and is written as a sum of
//! terms of one sign: nothing cancels near `u = 1`, where a trust region lives.

mod expression;

use std::sync::Arc;

use crate::divergence::expression::Expression;
use crate::error::{Error, Result};
use crate::number::Real;

/// An argument of a generator: `u > 0` given by both `ln u` and `u - 1`.
///
/// Near `u = 1` neither can be recovered from `u` itself; far from it `u` over- or underflows first.
#[derive(Debug, Clone, Copy)]
pub struct Point<T> {
    /// `ln u`
    pub log: T,
    /// `u - 1`
    pub excess: T,
    /// `u`
    pub u: T,
}

impl<T: Real> Point<T> {
    /// The point with the given `ln u`.
    #[must_use]
    pub fn from_log(log: T) -> Self {
        if log.to_f64() < -0.7 {
            let u = log.exp(); // below 1/2, so u - 1 is as good as it gets
            return Self { log, excess: u - T::of(1.0), u };
        }
        let excess = log.exp_m1();
        Self { log, excess, u: excess + T::of(1.0) }
    }

    /// The point with the given `u - 1 > -1`.
    #[must_use]
    pub fn from_excess(excess: T) -> Self {
        Self { log: excess.ln_1p(), excess, u: excess + T::of(1.0) }
    }

    /// The point with the given `u`, which is so far from 1 that `u - 1` loses nothing.
    #[must_use]
    pub fn from_ratio(u: T) -> Self {
        Self { log: u.ln(), excess: u - T::of(1.0), u }
    }
}

/// The generators with a formula of their own, and those read from text.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Generator {
    Kl,
    ReverseKl,
    Tv,
    Hellinger,
    JensenShannon,
    Jeffreys,
    /// Cressie-Read of any order but 0 and 1.
    Alpha(f64),
    Vajda(f64),
    /// Blended weight chi-square; 0 is Pearson, 1/2 four times Le Cam, 1 Neyman.
    Bwcs(f64),
    LeCam,
    HockeyStick(f64),
    Expression(Arc<Expression>),
}

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

impl Generator {
    /// `f(u)`.
    pub(crate) fn value<T: Real>(&self, at: Point<T>) -> T {
        let Point { log, excess, u } = at;
        match *self {
            Self::Kl => {
                if excess.to_f64().abs() < 0.5 {
                    excess.excess_over_ln_1p()
                } else {
                    excess - log
                }
            }
            Self::ReverseKl => {
                if log.to_f64().abs() < 0.7 {
                    u * (-log).exp_excess()
                } else {
                    scaled_log(u, log) - excess
                }
            }
            Self::Tv => excess.abs() * T::of(0.5),
            Self::Hellinger => {
                // Half of a large ln u would lose digits of e^(ln(u)/2).
                let m = if log.to_f64().abs() < 1.0 {
                    (log * T::of(0.5)).exp_m1()
                } else {
                    u.sqrt() - T::of(1.0)
                };
                m * m * T::of(0.5)
            }
            Self::JensenShannon => jensen_shannon(at),
            Self::Jeffreys => excess * log,
            Self::Alpha(order) => alpha(T::of(order), at),
            Self::Vajda(order) => {
                if order == 1.0 {
                    excess.abs()
                } else {
                    excess.abs().powf(T::of(order))
                }
            }
            Self::Bwcs(blend) => {
                // Not 1 + l (u-1), which cancels for l near 1 and small u.
                let denominator = (T::of(1.0) - T::of(blend)) + u * T::of(blend);
                excess * (excess / denominator)
            }
            Self::LeCam => excess * (excess / (excess + T::of(2.0))) * T::of(0.5),
            Self::Expression(ref expression) => expression.value(at),
            Self::HockeyStick(threshold) => {
                let over = excess - (T::of(threshold) - T::of(1.0));
                if over.to_f64() > 0.0 { over } else { T::of(0.0) }
            }
        }
    }

    /// `f(u)/u`, which stays in the range of a double where `f(u)` does not.
    pub(crate) fn value_per_u<T: Real>(&self, at: Point<T>) -> T {
        let Point { excess, u, .. } = at;
        match *self {
            Self::Alpha(order) if order > 1.0 => {
                let rate = T::of(order - 1.0);
                (power_minus_one(rate, at) - rate * (excess / u)) / (T::of(order) * rate)
            }
            Self::Vajda(order) if excess.to_f64() > 0.0 => {
                excess / u * excess.powf(T::of(order - 1.0))
            }
            Self::Bwcs(blend) => excess / u * (excess / (excess * T::of(blend) + T::of(1.0))),
            _ => self.value(at) / u,
        }
    }

    /// `f'(u)` for `u > 1`.
    pub(crate) fn slope(&self, at: Point<f64>) -> f64 {
        match *self {
            Self::Alpha(order) => ((order - 1.0) * at.log).exp_m1() / (order - 1.0),
            Self::Vajda(order) => order * at.excess.powf(order - 1.0),
            Self::Bwcs(0.0) => 2.0 * at.excess,
            _ => self.log_slope(at) / at.u,
        }
    }

    /// `df/d ln u = u f'(u)`.
    pub(crate) fn log_slope(&self, at: Point<f64>) -> f64 {
        let Point { log, excess, u } = at;
        match *self {
            Self::Kl => excess,
            Self::ReverseKl => scaled_log(u, log),
            Self::Tv => 0.5 * u * excess.signum(),
            Self::Hellinger => 0.5 * (0.5 * log).exp() * (0.5 * log).exp_m1(),
            Self::JensenShannon => {
                if u == 0.0 {
                    0.0
                } else {
                    0.5 * u * (log - (0.5 * excess).ln_1p())
                }
            }
            Self::Jeffreys => scaled_log(u, log) + excess,
            Self::Alpha(order) => {
                let power = (order - 1.0) * log;
                if power.abs() < 1.0 {
                    u * power.exp_m1() / (order - 1.0)
                } else {
                    ((order * log).exp() - u) / (order - 1.0)
                }
            }
            Self::Vajda(order) => order * excess.abs().powf(order - 1.0) * excess.signum() * u,
            Self::Bwcs(blend) => {
                if blend == 1.0 {
                    excess * (1.0 + 1.0 / u)
                } else {
                    let denominator = 1.0 + blend * excess;
                    u * (excess / denominator) * ((2.0 + blend * excess) / denominator)
                }
            }
            Self::LeCam => {
                let plus = 2.0 + excess;
                0.5 * u * (excess / plus) * ((4.0 + excess) / plus)
            }
            Self::Expression(ref expression) => expression.log_slope(at),
            Self::HockeyStick(threshold) => {
                if excess > threshold - 1.0 {
                    u
                } else {
                    0.0
                }
            }
        }
    }

    /// `ln(f(u)/u)` for `log = ln u > 0`, and `ln f(u)` for `log < 0`, also where `f(u)` leaves the range of a
    /// double.
    pub(crate) fn log_value<T: Real>(&self, log: T) -> T {
        let t = log.to_f64();
        let per_u = if t > 0.0 { log } else { T::of(0.0) };
        let plain = self.value(Point::from_log(log));
        if plain.to_f64().is_finite() && plain.to_f64() > 0.0 {
            return plain.ln() - per_u;
        }
        if let Self::Expression(expression) = self {
            return expression.log_value(log) - per_u;
        }
        // What is left out is smaller by a factor e^-300 or more.
        if t > 0.0 {
            match *self {
                Self::ReverseKl => (log - T::of(1.0)).ln(),
                Self::Jeffreys => log.ln(),
                Self::Alpha(order) => {
                    let order = T::of(order);
                    let rate = order - T::of(1.0);
                    let exponent = rate * log;
                    if exponent.to_f64() < 700.0 {
                        ((exponent.exp_m1() - rate) / (order * rate)).ln()
                    } else {
                        exponent - (order * rate).ln()
                    }
                }
                Self::Vajda(order) if order > 1.0 => (T::of(order) - T::of(1.0)) * log,
                Self::Bwcs(0.0) => log,
                _ => self.slope_at_infinity::<T>().ln(),
            }
        } else {
            match *self {
                Self::Alpha(order) => {
                    let order = T::of(order);
                    order * log - (order * (order - T::of(1.0))).ln()
                }
                Self::Bwcs(_) => -log,
                _ => plain.ln(),
            }
        }
    }

    /// `f(0)`, infinite for some.
    pub(crate) fn at_zero<T: Real>(&self) -> T {
        match *self {
            Self::Kl | Self::Jeffreys => T::of(f64::INFINITY),
            Self::ReverseKl | Self::Vajda(_) => T::of(1.0),
            Self::Tv | Self::Hellinger | Self::LeCam => T::of(0.5),
            Self::JensenShannon => T::of(2.0).ln() * T::of(0.5),
            Self::Alpha(order) => {
                if order > 0.0 {
                    T::of(1.0) / T::of(order)
                } else {
                    T::of(f64::INFINITY)
                }
            }
            Self::Bwcs(blend) => {
                if blend == 1.0 {
                    T::of(f64::INFINITY)
                } else {
                    T::of(1.0) / (T::of(1.0) - T::of(blend))
                }
            }
            Self::HockeyStick(_) => T::of(0.0),
            Self::Expression(ref expression) => T::of_dd(expression.at_zero),
        }
    }

    /// Whether evaluating it in double precision cancels near 1, as text does that was written by hand.
    pub(crate) fn cancels(&self) -> bool {
        matches!(self, Self::Expression(_))
    }

    /// The size of terms, times the weight of an outcome, that cancel where `D` is small: those of text are
    /// not known, and taken for 1.
    pub(crate) fn cancelled(&self) -> f64 {
        match *self {
            Self::Expression(_) => 1.0,
            // At its kink u = g, and an outcome that grew g times had at most the weight 1/g.
            Self::HockeyStick(threshold) => (threshold - 1.0) / threshold,
            _ => 0.0,
        }
    }

    /// `f'(inf) = lim f(u)/u`, infinite for some.
    pub(crate) fn slope_at_infinity<T: Real>(&self) -> T {
        let one = T::of(1.0);
        match *self {
            Self::Kl | Self::HockeyStick(_) | Self::Vajda(1.0) => one,
            Self::Tv | Self::Hellinger | Self::LeCam => T::of(0.5),
            Self::JensenShannon => T::of(0.5) * T::of(2.0).ln(),
            Self::Alpha(order) if order < 1.0 => one / (one - T::of(order)),
            Self::ReverseKl
            | Self::Jeffreys
            | Self::Alpha(_)
            | Self::Vajda(_)
            | Self::Bwcs(0.0) => T::of(f64::INFINITY),
            Self::Bwcs(blend) => one / T::of(blend),
            Self::Expression(ref expression) => T::of(expression.slope_at_infinity),
        }
    }

    /// `f''(1)`; `None` where `f` has a kink or is flat at 1.
    pub(crate) fn curvature(&self) -> Option<f64> {
        match *self {
            Self::Kl | Self::ReverseKl | Self::Alpha(_) => Some(1.0),
            Self::Bwcs(_) | Self::Jeffreys | Self::Vajda(2.0) => Some(2.0),
            Self::Hellinger | Self::JensenShannon => Some(0.25),
            Self::LeCam => Some(0.5),
            Self::Tv | Self::Vajda(_) | Self::HockeyStick(_) => None,
            Self::Expression(ref expression) => expression.curvature,
        }
    }
}

/// `u ln u`, 0 at `u = 0`.
fn scaled_log<T: Real>(u: T, log: T) -> T {
    if u.to_f64() == 0.0 { T::of(0.0) } else { u * log }
}

/// With `m = (1+u)/2` and `K(z) = z - ln(1+z)`: `[K(m - 1) + u K(m/u - 1)]/2`, two terms `>= 0`.
fn jensen_shannon<T: Real>(at: Point<T>) -> T {
    let half = T::of(0.5);
    let Point { log, excess, u } = at;
    let to_mean = excess * half;
    let from_mean = if u.to_f64() < 1e-3 {
        // u K(m/u - 1) = -(u-1)/2 - u ln(m/u), where m/u itself may overflow.
        -to_mean - scaled_log(u, to_mean.ln_1p() - log)
    } else {
        u * (-(to_mean / u)).excess_over_ln_1p()
    };
    (to_mean.excess_over_ln_1p() + from_mean) * half
}

/// Cressie-Read, `(u^a - 1 - a(u-1)) / (a(a-1))`.
///
/// With `t = ln u` and `E(x) = e^x - 1 - x` it is `[E(a t) - a E(t)] / (a(a-1))` near u = 1, where that
/// cancels only for a near 1; there the adjoint `f_a(u) = u f_(1-a)(1/u)` takes its place. Far from 1
/// powers of u itself are more accurate than exponentials of t.
fn alpha<T: Real>(order: T, at: Point<T>) -> T {
    let Point { log, excess, u } = at;
    let one = T::of(1.0);
    let near_one = log.to_f64().abs() < 1.0;
    let scale = order * (order - one);
    if order.to_f64() <= 0.5 {
        if near_one {
            ((order * log).exp_excess() - order * log.exp_excess()) / scale
        } else {
            (power_minus_one(order, at) - order * excess) / scale
        }
    } else if near_one {
        let rest = one - order;
        u * ((-(rest * log)).exp_excess() - rest * (-log).exp_excess()) / (-rest * order)
    } else if log.to_f64() < -600.0 {
        one / order // f(0) to all digits, and a power of 1/u would overflow
    } else {
        (u * power_minus_one(order - one, at) - (order - one) * excess) / scale
    }
}

/// `u^a - 1`.
fn power_minus_one<T: Real>(order: T, at: Point<T>) -> T {
    let exponent = order * at.log;
    if exponent.to_f64().abs() < 1.0 {
        exponent.exp_m1()
    } else if at.u.to_f64() < 1e-290 {
        exponent.exp() - T::of(1.0) // u itself is about to underflow
    } else {
        at.u.powf(order) - T::of(1.0)
    }
}
