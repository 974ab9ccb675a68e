//! The derivatives f' and f'' of the generators, which the price of a move is made of.
//!
//! Like the values, each f' is written without cancellation next to `u = 1`. Its distance
//! from a finite limit is a formula of its own, because the difference of the two would lose it.

use crate::divergence::generator::{Generator, power_minus_one};
use crate::divergence::point::Point;
use crate::number::{Dd, Real};

/// Half of the step in `ln u` over which f'' of a text is a difference: the error is of the order of its square.
const HALF_STEP: f64 = 1e-8;

impl Generator {
    /// `f'(u)` for any `u` from 0 to infinity, both included.
    pub(crate) fn derivative<T: Real>(&self, at: Point<T>) -> T {
        let Point { log, excess, u } = at;
        let one = T::of(1.0);
        if u.to_f64() == f64::INFINITY {
            let limit = self.derivative_at_infinity::<T>();
            if limit.to_f64().is_finite() {
                return limit;
            }
        }
        match *self {
            Self::Kl => excess / u,
            Self::ReverseKl => log,
            Self::Tv => half_sign(excess),
            Self::Hellinger => (log * T::of(-0.5)).exp_m1() * T::of(-0.5),
            Self::JensenShannon => {
                let half = T::of(0.5);
                if u.to_f64() < 1e-3 {
                    (log - (excess * half).ln_1p()) * half
                } else {
                    -((-excess / (u + u)).ln_1p() * half)
                }
            }
            Self::Jeffreys => log + excess / u,
            Self::Alpha(order) => {
                let rate = T::of(order) - one;
                power_minus_one(rate, at) / rate
            }
            Self::Vajda(1.0) => half_sign(excess) * T::of(2.0),
            Self::Vajda(order) => {
                let size = T::of(order) * excess.abs().powf(T::of(order) - one);
                if excess.to_f64() < 0.0 { -size } else { size }
            }
            Self::Bwcs(blend) => {
                let denominator = blended(blend, u);
                excess / denominator * ((T::of(blend) * excess + T::of(2.0)) / denominator)
            }
            Self::LeCam => {
                let plus = excess + T::of(2.0);
                excess / plus * ((excess + T::of(4.0)) / plus) * T::of(0.5)
            }
            Self::HockeyStick(threshold) => {
                let over = excess - (T::of(threshold) - one);
                if over.to_f64() > 0.0 { one } else { T::of(0.0) }
            }
            Self::Expression(ref expression) => {
                // A rounded u has lost the digits of u - 1, and text cancels.
                let at = if excess.to_f64().abs() < 0.5 {
                    Point::from_excess(excess.to_dd())
                } else {
                    Point { log: log.to_dd(), excess: excess.to_dd(), u: u.to_dd() }
                };
                T::of_dd(expression.derivative(at))
            }
        }
    }

    /// `f'(u) - f'(0)`, where `f'(0)` is finite; for `u < 1`, and not for text.
    pub(crate) fn derivative_above_zero<T: Real>(&self, at: Point<T>) -> T {
        let Point { log, u, .. } = at;
        let (one, two) = (T::of(1.0), T::of(2.0));
        match *self {
            Self::Alpha(order) => {
                let rate = T::of(order) - one;
                (rate * log).exp() / rate
            }
            Self::Vajda(order) if order > 1.0 => {
                let rate = T::of(order) - one;
                -(T::of(order) * (rate * (-u).ln_1p()).exp_m1())
            }
            Self::Bwcs(blend) => {
                let (rest, denominator) = (one - T::of(blend), blended(blend, u));
                u / (rest * rest) * ((denominator + rest) / (denominator * denominator))
            }
            Self::LeCam => {
                let plus = u + one;
                two * u * ((u + two) / (plus * plus))
            }
            _ => T::of(0.0), // constant below 1
        }
    }

    /// `f'(inf) - f'(u)`, where `f'(inf)` is finite; for `u > 1`, and not for text.
    pub(crate) fn derivative_below_infinity<T: Real>(&self, at: Point<T>) -> T {
        let Point { log, u, .. } = at;
        let one = T::of(1.0);
        match *self {
            Self::Kl => (-log).exp(),
            Self::Hellinger => (log * T::of(-0.5)).exp() * T::of(0.5),
            Self::JensenShannon => (one / u).ln_1p() * T::of(0.5),
            Self::Alpha(order) => {
                let rate = T::of(order) - one;
                -((rate * log).exp() / rate)
            }
            Self::Bwcs(blend) => {
                let denominator = blended(blend, u);
                one / denominator / (denominator * T::of(blend))
            }
            Self::LeCam => {
                let plus = u + one;
                T::of(2.0) / plus / plus
            }
            Self::HockeyStick(_) => self.derivative_at_infinity::<T>() - self.derivative(at),
            _ => T::of(0.0), // constant above 1
        }
    }

    /// `f'(0)`, `-inf` for some.
    pub(crate) fn derivative_at_zero<T: Real>(&self) -> T {
        let one = T::of(1.0);
        match *self {
            Self::Kl | Self::ReverseKl | Self::Hellinger | Self::JensenShannon | Self::Jeffreys => {
                T::of(f64::NEG_INFINITY)
            }
            Self::Tv => T::of(-0.5),
            Self::Alpha(order) if order > 1.0 => -(one / (T::of(order) - one)),
            Self::Alpha(_) | Self::Bwcs(1.0) => T::of(f64::NEG_INFINITY),
            Self::Vajda(order) => T::of(-order),
            Self::Bwcs(blend) => {
                let rest = one - T::of(blend);
                -((rest + one) / (rest * rest))
            }
            Self::LeCam => T::of(-1.5),
            Self::HockeyStick(_) => T::of(0.0),
            Self::Expression(ref expression) => T::of_dd(expression.derivative_at_zero()),
        }
    }

    /// `f'(inf)`, infinite for some.
    pub(crate) fn derivative_at_infinity<T: Real>(&self) -> T {
        self.constants::<T>().slope_at_infinity
    }

    /// `df'/d ln u = u f''(u)`.
    pub(crate) fn bend(&self, at: Point<f64>) -> f64 {
        let Point { log, excess, u } = at;
        match *self {
            Self::Kl => (-log).exp(),
            Self::ReverseKl => 1.0,
            Self::Tv | Self::HockeyStick(_) | Self::Vajda(1.0) => 0.0,
            Self::Hellinger => 0.25 * (-0.5 * log).exp(),
            Self::JensenShannon => 0.5 / (1.0 + u),
            Self::Jeffreys => 1.0 + (-log).exp(),
            Self::Alpha(order) => ((order - 1.0) * log).exp(),
            Self::Vajda(order) => order * (order - 1.0) * excess.abs().powf(order - 2.0) * u,
            Self::Bwcs(blend) => 2.0 * (u / blended(blend, u)) / blended(blend, u).powi(2),
            Self::LeCam => 4.0 * (u / (1.0 + u)) / (1.0 + u).powi(2),
            Self::Expression(ref expression) => {
                let value = |step| {
                    let log = Dd::sum(log, step);
                    expression.derivative(Point::from_log(log))
                };
                (value(HALF_STEP) - value(-HALF_STEP)).to_f64() / (2.0 * HALF_STEP)
            }
        }
    }

    /// The jump of f' at 1 of a generator that is linear on both sides.
    pub(crate) fn jump(&self) -> Option<f64> {
        match *self {
            Self::Tv => Some(1.0),
            Self::Vajda(1.0) => Some(2.0),
            _ => None,
        }
    }
}

/// Half the sign.
fn half_sign<T: Real>(excess: T) -> T {
    let excess = excess.to_f64();
    T::of(if excess == 0.0 { 0.0 } else { 0.5_f64.copysign(excess) })
}

/// `1 - l + l u`, which `1 + l (u-1)` loses for l near 1 and small u.
fn blended<T: Real>(blend: f64, u: T) -> T {
    (T::of(1.0) - T::of(blend)) + u * T::of(blend)
}
