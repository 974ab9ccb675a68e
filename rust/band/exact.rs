//! `D` in numbers with more digits than a double has: [`Dd`], or [`Wide`] where the range of doubles ends.

use crate::band::limits::{MAX_RADIUS, MIN_RADIUS};
use crate::band::polish::residual_doubt;
use crate::band::root::{Root, last_inside};
use crate::band::side::Side;
use crate::band::split::{gone, weighted};
use crate::band::tails::{FAR_RESIDUAL_ERROR, certain_divergence, far_divergence, is_far};
use crate::divergence::{Divergence, Generator, Point};
use crate::number::wide::Wide;
use crate::number::{Dd, Real};

/// `D` of a token for which [`is_far`] is false, or of any token in [`Wide`] numbers. `logp` is at most 0.
pub(super) fn exact_divergence<T: Real>(generator: &Generator, logp: f64, log_ratio: f64) -> T {
    if logp == 0.0 {
        certain_divergence(generator, T::of(log_ratio))
    } else {
        ExactSplit::<T>::new(logp).divergence(generator, log_ratio)
    }
}

/// The probabilities of the token and of everything else, and their odds.
pub(super) struct ExactSplit<T> {
    logp: f64,
    token: T,
    others: T,
    odds: T,
}

impl<T: Real> ExactSplit<T> {
    pub(super) fn new(logp: f64) -> Self {
        let minus = T::of(logp).exp_m1();
        // A small p would cancel as 1 - (1 - p).
        let token = if minus.to_f64() < -0.5 { T::of(logp).exp() } else { minus + T::of(1.0) };
        Self { logp, token, others: -minus, odds: token / -minus }
    }

    /// `D` at a log-ratio of the simplex.
    pub(super) fn divergence(&self, generator: &Generator, log_ratio: f64) -> T {
        let (token, others) = if log_ratio == f64::NEG_INFINITY {
            (gone(), Point::from_excess(self.odds))
        } else {
            let token = Point::from_log(T::of(log_ratio));
            let lost = self.odds * token.excess;
            let others = if lost.to_f64() > 0.5 {
                // Next to saturation the ratio of the others is computed without cancellation.
                let left = -T::of_dd(Dd::sum(self.logp, log_ratio)).exp_m1() / self.others;
                if left.to_f64() <= 0.0 { gone() } else { Point::from_ratio(left) }
            } else {
                Point::from_excess(-lost)
            };
            (token, others)
        };
        weighted(generator, self.token, token) + weighted(generator, self.others, others)
    }
}

/// True for radii whose `D` keeps its digits in doubles and double-doubles. Factors of `D` are the odds, up to
/// 1e300, and `(u-1)^2`.
pub(super) fn is_ordinary(radius: f64) -> bool {
    (MIN_RADIUS..=MAX_RADIUS).contains(&radius)
}

/// The last log-ratio of a side that is inside for sure, by halving bits, for any radius.
pub(super) fn wide_bound(divergence: &Divergence, logp: f64, delta: f64, side: Side) -> Root {
    last_inside(side.zero(), side.end(logp), |b| {
        is_negative(wide_residual(divergence, logp, b, delta))
    })
}

/// True if a residual is negative for sure.
fn is_negative(residual: Wide) -> bool {
    (-residual).is_above_error(1.0)
}

/// `D - radius` at a log-ratio of the simplex, for any finite `logp <= 0` and any radius.
fn wide_residual(divergence: &Divergence, logp: f64, log_ratio: f64, delta: f64) -> Wide {
    let d: Wide = exact_divergence(&divergence.generator, logp, log_ratio);
    d - divergence.wide_radius(delta)
}

/// True if `D` is at most the radius at a log-ratio of the simplex, as far as 30 digits show. At the end of a side it
/// has to be so for sure.
pub(super) fn holds_exactly(
    divergence: &Divergence,
    logp: f64,
    log_ratio: f64,
    delta: f64,
) -> bool {
    let end = Side::BOTH.into_iter().find(|side| log_ratio == side.end(logp));
    if let Some(known) = end.and_then(|side| known_at_end(divergence, logp, side, delta)) {
        return known;
    }
    let generator = &divergence.generator;
    let radius = divergence.generator_radius::<Dd>(delta);
    let ordinary = is_ordinary(radius.hi);
    let is_far = logp < 0.0 && is_far(logp);
    if !ordinary || !is_far {
        let residual = wide_residual(divergence, logp, log_ratio, delta);
        // A power of a difference next to 0 has no known error.
        if !ordinary || residual.is_finite() {
            let is_at_most = end.is_none() && residual.to_f64() <= 0.0;
            return is_at_most || is_negative(residual);
        }
    }
    let (d, doubt): (Dd, f64) = if is_far {
        (far_divergence(generator, logp, log_ratio), FAR_RESIDUAL_ERROR * radius.hi)
    } else {
        (exact_divergence(generator, logp, log_ratio), residual_doubt(generator, radius.hi))
    };
    (d - radius).to_f64() <= if end.is_none() { 0.0 } else { -doubt }
}

/// True if a radius allows a whole side, and false if it does not; `None` if `D` has to be evaluated.
///
/// No `D` reaches `f(0) + f'(inf)`. A `D` that is a logarithm at the end may equal delta.
fn known_at_end(divergence: &Divergence, logp: f64, side: Side, delta: f64) -> Option<bool> {
    if let Some(times) = divergence.times_log_loss() {
        return Some(match side {
            Side::Upper => -logp <= delta / times,
            Side::Lower => {
                let log_token = Wide::of(logp);
                let log_others = if logp < -0.7 {
                    (-log_token.exp()).ln_1p()
                } else {
                    (-log_token.exp_m1()).ln()
                };
                is_negative(-log_others * Wide::of(times) - Wide::of(delta))
            }
        });
    }
    let limits = divergence.generator.constants::<Dd>();
    let sup = limits.at_zero + limits.slope_at_infinity;
    let reaches = (sup - divergence.generator_radius::<Dd>(delta)).to_f64() <= 0.0;
    reaches.then_some(true)
}
