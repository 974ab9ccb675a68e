//! The generators: value, slope, and limits at 0, 1 and infinity.
//!
//! Each is written as a sum of terms of one sign, because a trust region lies near `u = 1`, where other forms cancel.

use std::sync::Arc;

use crate::divergence::expression::Expression;
use crate::divergence::point::Point;
use crate::number::Real;

/// A generator with its own formula, or one read from text.
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

/// Constants that decide saturation and the shape of narrow bands.
pub(crate) struct Constants<T> {
    /// `f(0)`, infinite for some.
    pub(crate) at_zero: T,
    /// `f'(inf) = lim f(u)/u`, infinite for some.
    pub(crate) slope_at_infinity: T,
    /// `f''(1)`; `None` where `f` has a kink or is flat at 1.
    pub(crate) curvature: Option<f64>,
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

    /// `f(u)/u`, which remains in the range of a double where `f(u)` leaves it.
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

    /// `ln(f(u)/u)` for `log = ln u > 0`, and `ln f(u)` for `log < 0`. `f(u)` itself may leave the range of a
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
        // The omitted terms are smaller by a factor of e^-300 or more.
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
                _ => self.constants::<T>().slope_at_infinity.ln(),
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

    /// True if digits may cancel near 1 in double precision, as in a user's expression.
    pub(crate) fn cancels(&self) -> bool {
        matches!(self, Self::Expression(_))
    }

    /// Size of the terms that cancel in a `D`, times the weight of their outcome. Those of a formula of this crate are
    /// as large as `D` itself, and 0 is returned for them.
    pub(crate) fn cancelled(&self, d: f64) -> f64 {
        match *self {
            Self::Expression(ref expression) => {
                expression.size + (expression.relative_size - 1.0) * d
            }
            // At the kink u = g. An outcome that grew g times had at most the weight 1/g.
            Self::HockeyStick(threshold) => (threshold - 1.0) / threshold,
            _ => 0.0,
        }
    }

    /// `f(0)`, `f'(inf)` and `f''(1)`.
    pub(crate) fn constants<T: Real>(&self) -> Constants<T> {
        let (one, half, infinite) = (T::of(1.0), T::of(0.5), T::of(f64::INFINITY));
        let (at_zero, slope_at_infinity, curvature) = match *self {
            Self::Kl => (infinite, one, Some(1.0)),
            Self::ReverseKl => (one, infinite, Some(1.0)),
            Self::Tv => (half, half, None),
            Self::Hellinger => (half, half, Some(0.25)),
            Self::JensenShannon => {
                let both = T::of(2.0).ln() * half;
                (both, both, Some(0.25))
            }
            Self::Jeffreys => (infinite, infinite, Some(2.0)),
            Self::Alpha(order) => (
                if order > 0.0 { one / T::of(order) } else { infinite },
                if order < 1.0 { one / (one - T::of(order)) } else { infinite },
                Some(1.0),
            ),
            Self::Vajda(1.0) => (one, one, None),
            Self::Vajda(order) => (one, infinite, (order == 2.0).then_some(2.0)),
            Self::Bwcs(blend) => (
                if blend == 1.0 { infinite } else { one / (one - T::of(blend)) },
                if blend == 0.0 { infinite } else { one / T::of(blend) },
                Some(2.0),
            ),
            Self::LeCam => (half, half, Some(0.5)),
            Self::HockeyStick(_) => (T::of(0.0), one, None),
            Self::Expression(ref expression) => (
                T::of_dd(expression.at_zero),
                T::of_dd(expression.slope_at_infinity),
                expression.curvature,
            ),
        };
        Constants { at_zero, slope_at_infinity, curvature }
    }

    /// True if a radius can allow a whole side, because `f(0)` is finite.
    pub(crate) fn saturates(&self) -> bool {
        self.constants::<f64>().at_zero.is_finite()
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
/// Near u = 1 it is `[E(a t) - a E(t)] / (a(a-1))` with `t = ln u` and `E(x) = e^x - 1 - x`. That cancels for a
/// near 1 only; for those, the adjoint `f_a(u) = u f_(1-a)(1/u)` replaces it. Far from u = 1, powers of u are
/// more accurate than exponentials of t.
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
        one / order // f(0) to all digits; a power of 1/u would overflow
    } else {
        (u * power_minus_one(order - one, at) - (order - one) * excess) / scale
    }
}

/// `u^a - 1`.
pub(super) fn power_minus_one<T: Real>(order: T, at: Point<T>) -> T {
    let exponent = order * at.log;
    if exponent.to_f64().abs() < 1.0 {
        exponent.exp_m1()
    } else if at.u.to_f64() < 1e-290 {
        exponent.exp() - T::of(1.0) // u may have lost digits to underflow
    } else {
        at.u.powf(order) - T::of(1.0)
    }
}
