//! Bounds of tokens whose p or 1 - p is below 1e-300, and the limit p = 1.

use crate::band::exact::{holds_exactly, is_ordinary, wide_bound};
use crate::band::limits::{FAR_REST, FAR_TAIL, MARGIN};
use crate::band::polish::residual_doubt;
use crate::band::root::{Root, last_inside};
use crate::band::side::{Side, bracket};
use crate::band::split::{gone, value_or_limit, weighted};
use crate::divergence::{Divergence, Generator, Point};
use crate::number::{Dd, Real};

/// Relative error of [`far_divergence`] in double-double arithmetic, rounded up. It adds logarithms of up to 750.
pub(super) const FAR_RESIDUAL_ERROR: f64 = 1e-27;

/// The last log-ratio of a side that is inside, by halving bits.
pub(super) fn far_bound(divergence: &Divergence, logp: f64, delta: f64, side: Side) -> Root {
    /// Relative error of double precision here, rounded up. It brackets most bounds.
    const ROUGH: f64 = 1e-12;
    let generator = &divergence.generator;
    let radius = divergence.generator_radius::<Dd>(delta);
    let doubt = FAR_RESIDUAL_ERROR * radius.hi;
    let is_inside = |b: f64| {
        let d: Dd = far_divergence(generator, logp, b);
        (d - radius).to_f64() <= -doubt
    };
    let (zero, end) = (side.zero(), side.end(logp));
    let rough = last_inside(zero, end, |b| far_divergence::<f64>(generator, logp, b) <= radius.hi);
    let (near, far) = bracket(rough.at, ROUGH);
    let root = if far.abs() < end.abs() && is_inside(near) && !is_inside(far) {
        last_inside(near, far, is_inside)
    } else {
        last_inside(zero, end, is_inside)
    };
    Root { at: root.at, evaluations: rough.evaluations + 2 + root.evaluations }
}

/// The limit of `log_lower` for p -> 1: the root of `f(r) + (1-r) f'(inf) = delta`, or 0 if `f'(inf)` is infinite.
/// Returns the bound and the number of evaluations.
pub(super) fn lower_of_certain(divergence: &Divergence, delta: f64) -> (f64, u32) {
    let generator = &divergence.generator;
    if generator.constants::<f64>().slope_at_infinity == f64::INFINITY {
        return (0.0, 0);
    }
    let side = Side::Lower;
    let (zero, end, last) = (side.zero(), side.end(0.0), side.last_before_end(0.0));
    if holds_exactly(divergence, 0.0, end, delta) {
        return (end, 1);
    }
    let radius = divergence.generator_radius::<Dd>(delta);
    if !is_ordinary(radius.hi) {
        let root = wide_bound(divergence, 0.0, delta, side);
        return (root.at, 1 + root.evaluations);
    }
    let doubt = residual_doubt(generator, radius.hi);
    let residual_at = |b: f64| (certain_divergence(generator, Dd::of(b)) - radius).to_f64();
    let rough = last_inside(zero, last, |b| certain_divergence(generator, b) <= radius.hi);
    let (inner, outer) = bracket(rough.at, MARGIN);
    if residual_at(inner) <= -doubt && residual_at(outer) > -doubt {
        return (inner, 3 + rough.evaluations);
    }
    let root = last_inside(zero, end, |b| residual_at(b) <= -doubt);
    (root.at, 3 + rough.evaluations + root.evaluations)
}

/// `D` in the limit p = 1: `f(r) + (1-r) f'(inf)`.
pub(super) fn certain_divergence<T: Real>(generator: &Generator, log_ratio: T) -> T {
    let at = Point::from_log(log_ratio);
    let value = value_or_limit(generator, at);
    if at.excess.to_f64() == 0.0 {
        value
    } else {
        value - at.excess * generator.constants().slope_at_infinity
    }
}

/// True if p or 1 - p is so small that products such as `p f(r)` leave the range of a double.
pub(super) fn is_far(logp: f64) -> bool {
    !(FAR_TAIL..=-FAR_REST).contains(&logp)
}

/// `D` of a token for which [`is_far`] is true.
pub(super) fn far_divergence<T: Real>(generator: &Generator, logp: f64, log_ratio: f64) -> T {
    let log_token = T::of(logp);
    let log_new = T::of_dd(Dd::sum(logp, log_ratio));
    let (others_p, new_others_p) = (-log_token.exp_m1(), -log_new.exp_m1());
    let token =
        if log_ratio == f64::NEG_INFINITY { gone() } else { Point::from_log(T::of(log_ratio)) };
    let others = if new_others_p.to_f64() <= 0.0 {
        gone()
    } else if logp > FAR_TAIL {
        Point::from_log(new_others_p.ln() - others_p.ln())
    } else if new_others_p.to_f64() < 0.5 {
        Point::from_ratio(new_others_p)
    } else {
        Point::from_excess(log_token.exp() - log_new.exp())
    };
    scaled_value(generator, log_token, token) + scaled_value(generator, others_p.ln(), others)
}

/// `w f(u)`, in logarithms where a factor leaves the range of a double.
fn scaled_value<T: Real>(generator: &Generator, log_weight: T, at: Point<T>) -> T {
    let value = value_or_limit(generator, at);
    if value.to_f64() <= 0.0 {
        T::of(0.0) // the rounding of an expression may give a negative value
    } else if at.log.to_f64() == f64::NEG_INFINITY || log_weight.to_f64() > FAR_TAIL {
        weighted(generator, log_weight.exp(), at)
    } else {
        // The weight takes the factor u first, because both logarithms may be huge and their sum small.
        let log_product = if at.log.to_f64() > 0.0 { log_weight + at.log } else { log_weight };
        (log_product + generator.log_value(at.log)).exp()
    }
}
