//! f-divergences by name or expression: generator, value, slope, and limits at 0 and infinity.
//!
//! `D_f(old, new) = E_old[f(new/old)]` with `f` convex and `f(1) = 0` (Csiszar 1967). Every built-in
//! generator is normalised so that also `f'(1) = 0`, hence `f >= 0`. It is written as a sum of terms of
//! one sign, because a trust region lies near `u = 1`, where other forms cancel.

mod derivative;
mod expression;
mod generator;
mod point;

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::number::Real;
use crate::number::wide::Wide;

pub(crate) use expression::{Expression, Step, Tape};
pub(crate) use generator::Generator;
pub use point::Point;

/// Conversion of the user's delta to a radius of the generator.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Units {
    /// The radius is the delta.
    Same,
    /// Renyi of order a: the radius of Cressie-Read is `(e^((a-1) delta) - 1) / (a (a-1))`.
    Renyi(f64),
    /// Bhattacharyya: the radius of Hellinger is `1 - e^-delta`.
    Bhattacharyya,
}

/// A divergence with a name.
struct BuiltIn {
    /// The name with the letter of its parameter, such as `alpha:a`.
    name: &'static str,
    make: Make,
}

/// Constructor of a built-in divergence.
#[derive(Clone, Copy)]
enum Make {
    /// Without a parameter.
    Plain(fn() -> (Generator, Units)),
    /// With a parameter.
    With {
        /// Specification that represents the family in [`ALL`].
        example: &'static str,
        /// Range of the parameter, for error messages.
        allowed: &'static str,
        /// `None` for a parameter out of range.
        make: fn(f64) -> Option<(Generator, Units)>,
    },
}

impl BuiltIn {
    const fn plain(name: &'static str, make: fn() -> (Generator, Units)) -> Self {
        Self { name, make: Make::Plain(make) }
    }

    /// The name without the letter of its parameter.
    fn family(&self) -> &'static str {
        self.name.split_once(':').map_or(self.name, |(family, _)| family)
    }
}

const BUILT_IN: [BuiltIn; 15] = [
    BuiltIn::plain("kl", || (Generator::Kl, Units::Same)),
    BuiltIn::plain("reverse-kl", || (Generator::ReverseKl, Units::Same)),
    BuiltIn::plain("tv", || (Generator::Tv, Units::Same)),
    BuiltIn::plain("pearson-chi2", || (Generator::Bwcs(0.0), Units::Same)),
    BuiltIn::plain("neyman-chi2", || (Generator::Bwcs(1.0), Units::Same)),
    BuiltIn::plain("hellinger", || (Generator::Hellinger, Units::Same)),
    BuiltIn::plain("le-cam", || (Generator::LeCam, Units::Same)),
    BuiltIn::plain("jensen-shannon", || (Generator::JensenShannon, Units::Same)),
    BuiltIn::plain("jeffreys", || (Generator::Jeffreys, Units::Same)),
    BuiltIn::plain("bhattacharyya", || (Generator::Hellinger, Units::Bhattacharyya)),
    BuiltIn {
        name: "alpha:a",
        make: Make::With {
            example: "alpha:0.5",
            allowed: "alpha:a takes any finite number a",
            make: |a| Some((cressie_read(a), Units::Same)),
        },
    },
    BuiltIn {
        name: "renyi:a",
        make: Make::With {
            example: "renyi:2",
            allowed: "renyi:a takes a finite number a > 0",
            make: |a| {
                let units = if a == 1.0 { Units::Same } else { Units::Renyi(a) };
                (a > 0.0).then(|| (cressie_read(a), units))
            },
        },
    },
    BuiltIn {
        name: "vajda:k",
        make: Make::With {
            example: "vajda:1.5",
            allowed: "vajda:k takes a finite number k >= 1",
            make: |k| (k >= 1.0).then_some((Generator::Vajda(k), Units::Same)),
        },
    },
    BuiltIn {
        name: "bwcs:l",
        make: Make::With {
            example: "bwcs:0.3",
            allowed: "bwcs:l takes a number 0 <= l <= 1",
            make: |l| (0.0..=1.0).contains(&l).then_some((Generator::Bwcs(l), Units::Same)),
        },
    },
    BuiltIn {
        name: "hockey-stick:g",
        make: Make::With {
            example: "hockey-stick:1.2",
            allowed: "hockey-stick:g takes a finite number g >= 1",
            make: |g| (g >= 1.0).then_some((Generator::HockeyStick(g), Units::Same)),
        },
    },
];

/// Every built-in divergence. A family with a parameter is represented by one example.
pub const ALL: &[&str] = &{
    let mut all = [""; BUILT_IN.len()];
    let mut index = 0;
    while index < all.len() {
        all[index] = match BUILT_IN[index].make {
            Make::Plain(_) => BUILT_IN[index].name,
            Make::With { example, .. } => example,
        };
        index += 1;
    }
    all
};

/// The power divergence of an order, with its limits at 0 and 1.
fn cressie_read(order: f64) -> Generator {
    if order == 0.0 {
        Generator::Kl
    } else if order == 1.0 {
        Generator::ReverseKl
    } else {
        Generator::Alpha(order)
    }
}

/// The radius of Cressie-Read for a delta of Renyi.
fn renyi_radius<T: Real>(order: f64, delta: f64) -> T {
    let rate = T::of(order) - T::of(1.0);
    // The rounding of an exponent of 100 would cost 50 ulps.
    rate.product_exp_m1(T::of(delta)) / (T::of(order) * rate)
}

/// A divergence between the old and the new policy.
///
/// ```
/// use bandpo::divergence::Divergence;
///
/// assert_eq!(Divergence::parse("alpha:0.5")?.curvature(), Some(1.0));
///
/// let squared = Divergence::from_expression("(u-1)^2", None, None)?;
/// assert!((squared.curvature().unwrap() - 2.0).abs() < 1e-9);
/// assert!(Divergence::from_expression("(u-1)^3", None, None).is_err(), "not convex");
/// # Ok::<(), bandpo::error::Error>(())
/// ```
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
/// Their f(0), f'(inf), f''(1) and max values are listed once, in `python/bandpo/divergence.py`.
#[derive(Debug, Clone, PartialEq)]
pub struct Divergence {
    spec: String,
    pub(crate) generator: Generator,
    units: Units,
}

impl Divergence {
    /// Reads a name such as `kl` or a name with its parameter such as `alpha:0.5`.
    ///
    /// # Errors
    /// [`Error::UnknownDivergence`] and [`Error::DivergenceParameter`].
    pub fn parse(spec: &str) -> Result<Self> {
        let (family, parameter) = match spec.split_once(':') {
            Some((family, text)) => (family, Some(text)),
            None => (spec, None),
        };
        let Some(built_in) = BUILT_IN.iter().find(|built_in| built_in.family() == family) else {
            let known = BUILT_IN.map(|built_in| built_in.name).join(", ");
            return Err(Error::UnknownDivergence { spec: spec.to_owned(), known });
        };
        let refuse = |allowed| Error::DivergenceParameter { spec: spec.to_owned(), allowed };
        let (generator, units) = match (built_in.make, parameter) {
            (Make::Plain(make), None) => make(),
            (Make::Plain(_), Some(_)) => {
                return Err(refuse("this divergence takes no parameter"));
            }
            (Make::With { allowed, make, .. }, parameter) => parameter
                .and_then(|text| text.parse::<f64>().ok())
                .filter(|value| value.is_finite())
                .and_then(make)
                .ok_or_else(|| refuse(allowed))?,
        };
        Ok(Self { spec: spec.to_owned(), generator, units })
    }

    /// The divergence of a convex function of `u`, given as text such as `u*ln(u) - u + 1`.
    ///
    /// `f(0)` and `f'(inf)` may be given; they have to be where the text does not determine them.
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
            units: Units::Same,
        })
    }

    /// `f''(1)`; `None` where the generator has a kink or is flat at 1.
    #[must_use]
    pub fn curvature(&self) -> Option<f64> {
        let curvature = self.generator.constants::<f64>().curvature?;
        // A small Renyi divergence of order a is a times the divergence of its generator.
        Some(if let Units::Renyi(order) = self.units { curvature * order } else { curvature })
    }

    /// The delta of this divergence for a radius of its generator.
    #[must_use]
    pub fn delta_of_radius(&self, value: f64) -> f64 {
        match self.units {
            Units::Same => value,
            Units::Renyi(order) => (order * (order - 1.0) * value).ln_1p() / (order - 1.0),
            Units::Bhattacharyya => -(-value).ln_1p(),
        }
    }

    /// Number and parameter of the generator in `cuda/generator.cuh`; `None` for an expression.
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

    /// The radius of the generator for a delta of this divergence.
    #[must_use]
    pub fn generator_radius<T: Real>(&self, delta: f64) -> T {
        match self.units {
            Units::Same => T::of(delta),
            Units::Renyi(order) => {
                let radius: T = renyi_radius(order, delta);
                // Infinite radii are capped: max double allows every ratio that differs from 0.
                if radius.to_f64() < f64::MAX { radius } else { T::of(f64::MAX) }
            }
            Units::Bhattacharyya => -T::of(-delta).exp_m1(),
        }
    }

    /// [`Self::generator_radius`] of any size.
    pub(crate) fn wide_radius(&self, delta: f64) -> Wide {
        match self.units {
            Units::Renyi(order) => renyi_radius(order, delta),
            _ => self.generator_radius(delta),
        }
    }

    /// `c` if the delta at each end of a band is `-c` times the logarithm of the probability that is left, which the
    /// token or the others had before.
    pub(crate) fn times_log_loss(&self) -> Option<f64> {
        match (self.units, &self.generator) {
            (Units::Renyi(_), _) | (_, Generator::ReverseKl) => Some(1.0),
            (Units::Bhattacharyya, _) => Some(0.5),
            _ => None,
        }
    }
}
