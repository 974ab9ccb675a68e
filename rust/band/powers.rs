//! Laws of the divergences whose generator is a power of any order: alpha and vajda.

// A function of vectors has to become part of one that is compiled for their instructions.
#![allow(clippy::inline_always)]

use crate::band::laws::{Curve, Law, MAX_DIVERGENCE, Point, ReverseKl, Solution, Split, Values};
use crate::simd::doubles::{Doubles, Truth, Vector};
use crate::simd::exp_log::Exponential;

/// Max magnitude of an exponent whose power is computed. A larger power is taken as infinite, a smaller one as 0.
const MAX_EXPONENT: f64 = 700.0;

/// Logarithm of `u`, and what rounding took from it.
#[derive(Clone, Copy)]
struct Log<L: Doubles> {
    high: Vector<L>,
    low: Vector<L>,
}

impl<L: Doubles> Log<L> {
    /// Logarithm of a positive normal number.
    #[inline(always)]
    fn of(u: Vector<L>) -> Self {
        let log = u.ln_and_low();
        Self { high: log.log, low: log.low }
    }

    /// Rounds the sum of two parts of any size.
    #[inline(always)]
    fn sum(a: Vector<L>, b: Vector<L>, low: Vector<L>) -> Self {
        let high = a + b;
        let from_a = high - b;
        Self { high, low: (a - from_a) + (b - (high - from_a)) + low }
    }

    #[inline(always)]
    fn minus(self, other: Self) -> Self {
        Self::sum(self.high, -other.high, self.low - other.low)
    }

    #[inline(always)]
    fn times(self, factor: f64) -> Self {
        let factor = self.high.constant(factor);
        let high = self.high * factor;
        Self { high, low: self.low.mul_add(factor, self.high.mul_add(factor, -high)) }
    }

    /// `u`, `u - 1` and `u - 1 - ln u`. All are infinite from [`MAX_EXPONENT`] on.
    #[inline(always)]
    fn exponential(self) -> Exponential<L> {
        let Self { high, low } = self;
        let max = high.constant(MAX_EXPONENT);
        let clamped = high.max(-max);
        let power = clamped.min(max).exponential();
        let in_range = high.less(max);
        let infinite = high.constant(f64::INFINITY);
        Exponential {
            u: in_range.select(power.u.mul_add(low, power.u), infinite),
            excess: in_range.select(power.u.mul_add(low, power.excess), infinite),
            gap: in_range.select(power.excess.mul_add(low, power.gap + (clamped - high)), infinite),
        }
    }
}

/// Alpha of any order but 0 and 1, where no term of its generator is below the rounding error of another.
#[derive(Clone, Copy)]
pub(super) struct Alpha<const ADJOINT: bool> {
    order: f64,
    /// `1 / (a (a-1))`
    per_scale: f64,
}

/// Orders up to which f is a difference of powers of its own order. Those above take the adjoint's, `1 - a`.
const LAST_DIRECT: f64 = 0.5;

/// Range of orders, and their min distance from 0 and 1.
const ORDERS: f64 = 64.0;
const APART: f64 = 1e-6;

/// `abs(ln u)` from which the terms of an order between 0 and 1 are powers instead of their gaps, on the side where
/// the gaps cancel.
const FAR: f64 = 2.0;

/// True for an order that has a law.
pub(super) fn is_vector_order(order: f64) -> bool {
    order.abs() < ORDERS && order.abs() > APART && (order - 1.0).abs() > APART
}

/// True for an order that takes the adjoint's powers.
pub(super) fn is_adjoint(order: f64) -> bool {
    order > LAST_DIRECT
}

impl<const ADJOINT: bool> Alpha<ADJOINT> {
    pub(super) fn new(order: f64) -> Self {
        Self { order, per_scale: 1.0 / (order * (order - 1.0)) }
    }
}

impl<const ADJOINT: bool> Curve for Alpha<ADJOINT> {
    const STEEP: bool = true;

    fn at_zero(self) -> f64 {
        if self.order > 0.0 { 1.0 / self.order } else { f64::INFINITY }
    }

    /// The formulas of `alpha` in `divergence/generator.rs`. Between the orders 0 and 1 the terms differ in sign.
    #[inline(always)]
    fn at<L: Doubles>(self, point: Point<L>) -> Values<L> {
        let Point { u, log, low, excess, gap } = point;
        let cancels = self.order > 0.0 && self.order < 1.0;
        let log_u = Log { high: log, low };
        if ADJOINT {
            let rate = u.constant(self.order - 1.0);
            let power = log_u.times(self.order - 1.0).exponential();
            let entropy = ReverseKl.at(point).value;
            let mut value = u.mul_add(power.gap, rate * entropy);
            if cancels {
                let far = u.mul_add(power.excess, -(rate * excess));
                value = log.less(log.constant(FAR)).select(value, far);
            }
            Values {
                value: value * self.per_scale,
                slope: u * power.excess * (1.0 / (self.order - 1.0)),
                curvature: u * power.u,
            }
        } else {
            let order = u.constant(-self.order);
            let power = log_u.times(self.order).exponential();
            let mut value = order.mul_add(gap, power.gap);
            if cancels {
                let far = order.mul_add(excess, power.excess);
                value = log.constant(-FAR).less(log).select(value, far);
            }
            Values {
                value: value * self.per_scale,
                slope: (power.excess - excess) * (1.0 / (self.order - 1.0)),
                curvature: power.u,
            }
        }
    }

    /// The approximation `f(e^t) = (e^(c t) - 1)^2/(2 c^2)`, exact for the orders 1/2 and 2, of the rarer outcome with
    /// its share of the radius. `c` follows from the third derivative of D at small radii, and from the growth of f at
    /// large ones. An outcome that almost vanishes has its first term instead, `tail`.
    #[inline(always)]
    fn start<L: Doubles>(self, split: &Split<L>, radius: Vector<L>) -> Vector<L> {
        let (order, odds) = (self.order, split.odds);
        let one = radius.constant(1.0);
        let grows = one.less(odds);
        let inverse = one / odds;
        let (rarer, other) = (grows.select(odds, inverse), grows.select(inverse, odds));
        let share = radius * rarer;
        let s = (share * 2.0).sqrt();
        let near = (one - other).mul_add(one.constant((order - 2.0) / 3.0), one);
        let growth = one.constant(0.5 * order.max(1.0));
        let shrinkage = one.constant(if order > 0.0 { (0.5 * order).sqrt() } else { 0.5 * order });
        let far = grows.select(growth, shrinkage);
        let c = s.mul_add(far, near) / (s + one);
        // Not 0, by which it is divided.
        let small = one.constant(1e-3);
        let c = c.abs().less(small).select(small, c);
        let z = grows.select(c * s, -(c * s));
        let t = z.max(one.constant(-0.99)).log_1p().log / c;
        let t = t.min(one.constant(MAX_EXPONENT));
        let lost = (t.exponential().excess * inverse).min(one.constant(0.99));
        let of_growth = -(-lost).log_1p().log;
        let mut of_shrinkage = -t;
        if order < LAST_DIRECT {
            let tail = (share * (order * (order - 1.0))).max(one.constant(-0.99)).log_1p().log;
            let tail = tail * (-1.0 / order);
            let weight = one.constant((1.0 - 2.0 * order.abs()).max(0.0));
            of_shrinkage = (tail * tail).mul_add(weight, t * t).sqrt().min(tail + one);
        }
        grows.select(of_growth, of_shrinkage).max(one.constant(1e-300))
    }
}

/// `abs(u-1)^k`, whose terms are powers of the same lost share.
#[derive(Clone, Copy)]
pub(super) struct Vajda {
    pub(super) order: f64,
}

impl Vajda {
    /// True for an order whose powers have all of their digits.
    pub(super) fn is_vector_order(order: f64) -> bool {
        order < ORDERS
    }

    /// `1 + (ratio of the terms, the smaller one above)`, and the log of the larger term over that of the shrinking
    /// outcome.
    #[inline(always)]
    fn terms<L: Doubles>(self, split: &Split<L>) -> Terms<L> {
        let one = split.odds.constant(1.0);
        let zero = one.constant(0.0);
        let ratio = Log::of(split.odds).times(self.order - 1.0);
        let grown_leads = zero.less(ratio.high);
        let sign = grown_leads.select(one.constant(-1.0), one);
        let smaller = Log { high: ratio.high * sign, low: ratio.low * sign }.exponential().u;
        let lead = Log {
            high: grown_leads.select(ratio.high, zero),
            low: grown_leads.select(ratio.low, zero),
        };
        let sum = one + smaller;
        Terms { sum, lead, share: grown_leads.select(one, smaller) / sum }
    }
}

/// Terms of D in [`Vajda`].
struct Terms<L: Doubles> {
    /// The sum of both terms over the larger.
    sum: Vector<L>,
    /// Logarithm of the larger term over that of the shrinking outcome.
    lead: Log<L>,
    /// Share of the growing outcome.
    share: Vector<L>,
}

impl Law for Vajda {
    #[inline(always)]
    fn max_divergence<L: Doubles>(self, split: &Split<L>) -> Option<Vector<L>> {
        let Terms { sum, lead, .. } = self.terms(split);
        Some((split.shrinking * sum * lead.exponential().u).min(sum.constant(MAX_DIVERGENCE)))
    }

    #[inline(always)]
    fn solve<L: Doubles>(self, split: &Split<L>, radius: Vector<L>) -> Solution<L> {
        let one = radius.constant(1.0);
        let zero = one.constant(0.0);
        let Terms { sum, lead, share } = self.terms(split);
        // lost^k = radius / (w sum e^lead)
        let share_of_lead = radius / (split.shrinking * sum);
        let power = Log::of(share_of_lead).minus(lead);
        let per_order = 1.0 / self.order;
        let rest = (-per_order).mul_add(self.order, 1.0) * per_order;
        let log_lost = power.times(per_order);
        let log_lost =
            Log { low: power.high.mul_add(one.constant(rest), log_lost.low), ..log_lost };
        let lost = log_lost.exponential().u;
        let left = one - lost;
        let gain = split.odds * lost;
        // Rounding changes the lost share by itself, not only by D.
        let of_divergence = share + one.constant(per_order);
        let normal = one.constant(f64::MIN_POSITIVE).less(share_of_lead);
        let found: Truth<L> = zero.less(left) & normal;
        Solution {
            left,
            log_left: (-lost).log_1p().log,
            growth: one + gain,
            log_growth: gain.log_1p().log,
            condition: lost / left * of_divergence.max(one),
            found,
        }
    }
}
