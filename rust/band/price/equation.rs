//! The equation of a price: the two outcomes at a log-ratio, and the price there.

use crate::band::limits::FAR_REST;
use crate::band::root::{Root, newton_log_log};
use crate::band::side::Side;
use crate::band::split::{Split, gone};
use crate::band::tails::is_far;
use crate::divergence::{Generator, Point};
use crate::number::{Dd, Real};

/// Relative step at which Newton's method stops: the error after it is of the order of its square, 1e-17.
const LAST_STEP: f64 = 3e-9;

/// A given price, and the limits of f'.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Equation {
    pub(super) price: f64,
    /// `f'(0)`
    pub(super) at_zero: Dd,
    /// `f'(inf)`
    pub(super) at_infinity: Dd,
}

/// By how much a price exceeds the given one, and the size of the terms that it is the sum of.
#[derive(Debug, Clone, Copy)]
pub(super) struct Excess<T> {
    pub(super) value: T,
    pub(super) size: f64,
}

impl Equation {
    pub(super) fn new(generator: &Generator, price: f64) -> Self {
        Self {
            price,
            at_zero: generator.derivative_at_zero(),
            at_infinity: generator.derivative_at_infinity(),
        }
    }

    /// `f'(grown) - f'(shrunk) - price`.
    ///
    /// Next to a finite limit of f' the distance from it takes the place of f'. A price that equals a limit, such
    /// as 1 for kl, then leaves terms that are as small as they are.
    pub(super) fn excess<T: Real>(
        &self,
        generator: &Generator,
        side: Side,
        token: Point<T>,
        others: Point<T>,
    ) -> Excess<T> {
        let (shrunk, grown) = side.shrinking_and_growing(token, others);
        let is_text = generator.cancels();
        let mut known = T::of(-self.price);
        let mut rounding = 0.0;
        let of_grown = if grown.u.to_f64() > 2.0 && self.at_infinity.hi.is_finite() && !is_text {
            known = known + T::of_dd(self.at_infinity);
            rounding += self.at_infinity.lo.abs();
            -generator.derivative_below_infinity(grown)
        } else {
            generator.derivative(grown)
        };
        let of_shrunk = if shrunk.u.to_f64() < 0.5 && self.at_zero.hi.is_finite() && !is_text {
            known = known - T::of_dd(self.at_zero);
            rounding += self.at_zero.lo.abs();
            -generator.derivative_above_zero(shrunk)
        } else {
            -generator.derivative(shrunk)
        };
        let mut size = known.to_f64().abs() + of_grown.to_f64().abs() + of_shrunk.to_f64().abs();
        if rounding > 0.0 || is_text {
            size += 1.0 + self.price; // a limit that was rounded, or terms that are not known
        }
        Excess { value: known + of_grown + of_shrunk, size }
    }

    /// `m` to a few ulp times its condition number. The side is known not to be saturated.
    pub(super) fn magnitude(&self, generator: &Generator, split: &Split) -> Root {
        let curvature = generator.constants::<f64>().curvature.unwrap_or(1.0);
        // To first order both outcomes are as far from 1 as their weights say; and where the one that grows is
        // improbable, f' of the other one alone reaches the price.
        let start = (self.price * split.growing / curvature).min(1.0 + self.price.ln_1p());
        newton_log_log(self.price, start, LAST_STEP, |m| price_at(generator, split, m))
    }

    /// The bound that `m` stands for, and its condition number; see [`Split::log_ratio`].
    pub(super) fn log_ratio(
        &self,
        generator: &Generator,
        split: &Split,
        m: f64,
        side: Side,
    ) -> (f64, f64) {
        let (price, slope) = price_at(generator, split, m);
        let lost = -(-m).exp_m1();
        let growth = split.shrinking / split.growing * lost;
        let grown = Point::from_excess(growth);
        let odds_error = generator.bend(grown) / grown.u * growth / price;
        let mut condition = (1.0 + odds_error.abs()) / slope;
        if (price - self.price).abs() > 16.0 * f64::EPSILON * self.price {
            condition = f64::INFINITY; // a kink, or a root that was not found
        }
        match side {
            Side::Lower => (-m, condition),
            Side::Upper => {
                let log_growth = growth.ln_1p();
                let chain = m * (-m).exp() / lost * growth / ((1.0 + growth) * log_growth);
                (log_growth, if chain == 0.0 { 0.0 } else { chain * condition })
            }
        }
    }
}

/// The price and its order in `m`, where the shrinking outcome shrinks by `e^-m`.
fn price_at(generator: &Generator, split: &Split, m: f64) -> (f64, f64) {
    let shrunk = Point::from_log(-m);
    let odds = split.shrinking / split.growing;
    let grown = Point::from_excess(-odds * shrunk.excess);
    let price = generator.derivative(grown) - generator.derivative(shrunk);
    let slope = generator.bend(shrunk) + generator.bend(grown) / grown.u * (odds * shrunk.u);
    (price, m * slope / price)
}

/// The probabilities of the token and of everything else, for any `logp <= 0`.
pub(super) struct Places<T> {
    logp: f64,
    token: T,
    pub(super) others: T,
    pub(super) odds: T,
}

impl<T: Real> Places<T> {
    pub(super) fn new(logp: f64) -> Self {
        let minus = T::of(logp).exp_m1();
        // A small p is not what 1 - p leaves of 1.
        let token = if logp < -0.7 { T::of(logp).exp() } else { minus + T::of(1.0) };
        Self { logp, token, others: -minus, odds: token / -minus }
    }

    /// The arguments of f at a log-ratio inside the simplex: of the token and of everything else.
    pub(super) fn outcomes(&self, log_ratio: f64) -> (Point<T>, Point<T>) {
        let token =
            if log_ratio == f64::NEG_INFINITY { gone() } else { Point::from_log(T::of(log_ratio)) };
        (token, self.of_others(log_ratio, token.excess))
    }

    fn of_others(&self, log_ratio: f64, excess: T) -> Point<T> {
        if self.logp == 0.0 {
            // Nothing was left to the others, and their ratio is infinite.
            let infinite = T::of(f64::INFINITY);
            return Point { log: infinite, excess: infinite, u: infinite };
        }
        if self.logp == f64::NEG_INFINITY {
            return Point::from_excess(T::of(0.0));
        }
        let left = || T::of_dd(-Dd::sum(self.logp, log_ratio).exp_m1());
        if !is_far(self.logp) {
            let lost = self.odds * excess;
            if lost.to_f64() <= 0.5 {
                return Point::from_excess(-lost);
            }
            // Next to the end: what is left of the others, without cancellation.
            let left = left() / self.others;
            return if left.to_f64() <= 0.0 { gone() } else { Point::from_ratio(left) };
        }
        let left = left();
        if left.to_f64() <= 0.0 {
            gone()
        } else if self.logp > -FAR_REST {
            // A quotient of numbers next to the smallest double would lose digits.
            let scale = T::of(2f64.powi(900));
            let (left, others) = (left * scale, self.others * scale);
            let gain = -(self.token * (excess * scale) / others);
            if gain.to_f64().abs() < 0.5 {
                Point::from_excess(gain)
            } else {
                Point::from_ratio(left / others)
            }
        } else if left.to_f64() < 0.5 {
            Point::from_ratio(left)
        } else {
            let log_new = T::of_dd(Dd::sum(self.logp, log_ratio));
            Point::from_excess(self.token - log_new.exp())
        }
    }
}
