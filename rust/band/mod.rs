//! The band of a token with old log-probability `logp`: every log-ratio `b` whose divergence
//!
//! ```text
//! D_f(p, r) = p f(r) + (1-p) f((1 - r p)/(1-p)),   p = e^logp, r = e^b
//! ```
//!
//! is at most `delta` (`BandPO`, arXiv 2603.04918). [`Band::log_bounds`] returns its two ends.
//!
//! # One problem for both sides
//!
//! One of the two outcomes {this token, everything else} shrinks by a factor `e^-m`, the other grows
//! to `1 + (w/(1-w)) (1 - e^-m)` times its size. Here `w` is the probability of the outcome that shrinks.
//! For the lower bound the token shrinks (`w = p`, bound `-m`); for the upper bound everything else
//! does (`w = 1-p`, bound `ln` of the growth). Therefore `p upper(p) + (1-p) lower(1-p) = 1` (the mirror
//! identity), and one solver in `m` serves both. `m` is well scaled over the whole range of a
//! double: for KL it runs from 1e-155 to 1e308.
//!
//! # Accuracy, and always inside
//!
//! Double precision evaluates the equation to a few ulp, so `m` is accurate to a few ulp times a condition
//! number. There are three cases:
//!
//! - The condition number is at most [`BENIGN_CONDITION`]. The result moves inwards by [`MARGIN`], which covers the
//!   error, and is inside.
//! - It is larger, mostly near saturation of the lower side. Newton's method corrects the bound on a residual in
//!   double-double arithmetic. The bound then moves inwards by single ulps until the residual is negative.
//! - p or 1 - p is below 1e-300. The bits of the bound are halved on such a residual, evaluated in logarithms. For
//!   radii below 1e-280 or above 1e20 they are halved on one in numbers of any size, which carry their rounding error.
//!
//! In a batch, `vector.rs` solves the ordinary tokens of the first case, and this file the others.

mod exact;
mod jets;
mod laws;
mod limits;
mod membership;
mod polish;
mod powers;
pub mod price;
pub(crate) mod root;
mod side;
mod split;
mod tails;
#[cfg(test)]
mod tests;
mod text;
mod vector;

use rayon::prelude::*;

use crate::band::exact::{is_ordinary, wide_bound};
use crate::band::limits::{BENIGN_CONDITION, CHUNK, MARGIN, MAX_LOG_LOSS};
use crate::band::membership::decide;
use crate::band::polish::{MAX_INWARDS, MAX_POLISHING, polish};
use crate::band::root::{MAX_EVALUATIONS, MAX_HALVINGS};
use crate::band::side::{bracket, check_delta};
use crate::band::split::{Split, log_slope};
use crate::band::tails::{far_bound, is_far, lower_of_certain};
use crate::divergence::Divergence;
use crate::error::{Error, Result};

pub use membership::{contains, divergences};
pub use side::{Bound, Delta, Side, Status};

/// Max evaluations of `D` for one bound, in either precision and for any arguments.
pub const MAX_BOUND_EVALUATIONS: u32 = 196;

// Two decide saturation, Newton's method follows, and one gives the condition number. Polishing takes the residual at
// saturation, Newton's method on it, single ulps inwards, and halving if all of them failed. Far tails and the limit
// p = 1 halve twice and take fewer.
const _: () = assert!(
    MAX_BOUND_EVALUATIONS
        == 2 + MAX_EVALUATIONS + 1 + 1 + MAX_POLISHING + MAX_INWARDS + MAX_HALVINGS
);

/// The region `D_f <= delta`, with its own radius for each side.
///
/// ```
/// use bandpo::band::Band;
/// use bandpo::divergence::Divergence;
///
/// let band = Band::new(Divergence::parse("kl")?, 0.05, 0.05)?;
/// let (log_lower, log_upper) = band.log_bounds(0.1_f64.ln());
/// assert!((log_lower.exp() - 0.312784).abs() < 1e-6);
/// assert!((log_upper.exp() - 2.200786).abs() < 1e-6);
/// # Ok::<(), bandpo::error::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Band {
    divergence: Divergence,
    delta_low: f64,
    delta_high: f64,
}

impl Band {
    /// A band with radius `delta_low` below and `delta_high` above a ratio of 1.
    ///
    /// # Errors
    /// [`Error::Delta`] if a radius is not a finite number above 0.
    pub fn new(divergence: Divergence, delta_low: f64, delta_high: f64) -> Result<Self> {
        check_delta(delta_low, None)?;
        check_delta(delta_high, None)?;
        Ok(Self { divergence, delta_low, delta_high })
    }

    /// The divergence.
    #[must_use]
    pub fn divergence(&self) -> &Divergence {
        &self.divergence
    }

    /// The radius of a side.
    #[must_use]
    pub fn delta(&self, side: Side) -> f64 {
        side.pick(self.delta_low, self.delta_high)
    }

    /// `(log_lower, log_upper)` of one token.
    #[must_use]
    pub fn log_bounds(&self, logp: f64) -> (f64, f64) {
        (self.bound(logp, Side::Lower).log_ratio, self.bound(logp, Side::Upper).log_ratio)
    }

    /// The bounds of many tokens, all lower and all upper ones, on all threads.
    #[must_use]
    pub fn log_bounds_of_many(&self, logp: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let (mut lower, mut upper) = (vec![0.0; logp.len()], vec![0.0; logp.len()]);
        let deltas = [Delta::Same(self.delta_low), Delta::Same(self.delta_high)];
        fill(&self.divergence, deltas, logp, &mut lower, &mut upper);
        (lower, upper)
    }

    /// One end of the band with its status, bracket and evaluation count.
    #[must_use]
    pub fn bound(&self, logp: f64, side: Side) -> Bound {
        bound(&self.divergence, logp, self.delta(side), side)
    }

    /// `d log bound / d logp`, by the implicit function theorem. It is in [-1, 0] for the upper bound and at least 0
    /// for the lower one. At saturation it is -1 for the upper bound and 0 for the lower one.
    #[must_use]
    pub fn log_slope(&self, logp: f64, log_bound: f64) -> f64 {
        log_slope(&self.divergence.generator, logp, log_bound)
    }
}

/// Fills `log_lower` and `log_upper` for every element of `logp`, on all threads.
///
/// # Errors
/// [`Error::Delta`] and [`Error::Length`], before anything is written.
pub fn log_bounds(
    divergence: &Divergence,
    delta_low: Delta<'_>,
    delta_high: Delta<'_>,
    logp: &[f64],
    log_lower: &mut [f64],
    log_upper: &mut [f64],
) -> Result<()> {
    delta_low.check("delta_low", logp.len())?;
    delta_high.check("delta_high", logp.len())?;
    Error::check_length("log_lower", log_lower.len(), logp.len())?;
    Error::check_length("log_upper", log_upper.len(), logp.len())?;
    fill(divergence, [delta_low, delta_high], logp, log_lower, log_upper);
    Ok(())
}

/// [`log_bounds`] of arguments that have been checked.
fn fill(
    divergence: &Divergence,
    [delta_low, delta_high]: [Delta<'_>; 2],
    logp: &[f64],
    log_lower: &mut [f64],
    log_upper: &mut [f64],
) {
    logp.par_chunks(CHUNK)
        .zip(log_lower.par_chunks_mut(CHUNK))
        .zip(log_upper.par_chunks_mut(CHUNK))
        .enumerate()
        .for_each(|(chunk, ((logp, lower), upper))| {
            let first = chunk * CHUNK;
            let deltas = [delta_low.part(first, logp.len()), delta_high.part(first, logp.len())];
            chunk_bounds(divergence, deltas, logp, lower, upper);
        });
}

/// Fills the bounds of at most [`CHUNK`] elements.
fn chunk_bounds(
    divergence: &Divergence,
    deltas: [Delta<'_>; 2],
    logp: &[f64],
    lower: &mut [f64],
    upper: &mut [f64],
) {
    let mut radii = [[0.0; CHUNK]; 2];
    for (radii, delta) in radii.iter_mut().zip(deltas) {
        match delta {
            Delta::Same(delta) => radii[..logp.len()].fill(divergence.generator_radius(delta)),
            Delta::Each(deltas) => {
                for (radius, &delta) in radii.iter_mut().zip(deltas) {
                    *radius = divergence.generator_radius(delta);
                }
            }
        }
    }
    let mut rest = Vec::new();
    vector::log_bounds(
        &divergence.generator,
        [&radii[0][..logp.len()], &radii[1][..logp.len()]],
        logp,
        [&mut *lower, &mut *upper],
        &mut |index, side, rough| rest.push((index, side, rough)),
    );
    // Cached, because many tokens were certain, and with the same radius they have the same bound.
    let mut certain_lower = None;
    for (index, side, rough) in rest {
        let logp = logp[index];
        let (delta, bounds) = match side {
            Side::Lower => (deltas[0], &mut *lower),
            Side::Upper => (deltas[1], &mut *upper),
        };
        bounds[index] = match (delta, rough) {
            (Delta::Same(delta), None) if logp >= 0.0 && side == Side::Lower => {
                *certain_lower.get_or_insert_with(|| lower_of_certain(divergence, delta).0)
            }
            (delta, Some(rough)) => polish(divergence, logp, delta.at(index), side, rough).0,
            (delta, None) => bound(divergence, logp, delta.at(index), side).log_ratio,
        };
    }
}

/// One side's bounds, bit-identical to [`log_bounds`], with the scalar solver's status, bracket and evaluation count
/// for each. Runs on all threads.
///
/// # Errors
/// [`Error::Delta`] and [`Error::Length`].
pub fn diagnose(
    divergence: &Divergence,
    delta: Delta<'_>,
    logp: &[f64],
    side: Side,
) -> Result<Vec<Bound>> {
    delta.check("delta", logp.len())?;
    let (mut lower, mut upper) = (vec![0.0; logp.len()], vec![0.0; logp.len()]);
    log_bounds(divergence, delta, delta, logp, &mut lower, &mut upper)?;
    Ok(logp
        .par_iter()
        .with_min_len(CHUNK)
        .zip(side.pick(lower, upper))
        .enumerate()
        .map(|(index, (&logp, log_ratio))| Bound {
            log_ratio,
            ..bound(divergence, logp, delta.at(index), side)
        })
        .collect())
}

/// One end of `{D <= delta}`, by the scalar solver. `delta` has been checked.
fn bound(divergence: &Divergence, logp: f64, delta: f64, side: Side) -> Bound {
    let exactly =
        |log_ratio: f64, status| Bound { log_ratio, outside: log_ratio, status, evaluations: 0 };
    let generator = &divergence.generator;
    if logp.is_nan() {
        return exactly(f64::NAN, Status::NotANumber);
    }
    if logp >= 0.0 {
        let status = if logp > 0.0 { Status::ReadAsCertain } else { Status::Limit };
        let (log_ratio, evaluations) = match side {
            Side::Upper => (0.0, 0),
            Side::Lower => lower_of_certain(divergence, delta),
        };
        return Bound { evaluations, ..exactly(log_ratio, status) };
    }
    let end = side.end(logp);
    if logp == f64::NEG_INFINITY {
        return exactly(end, Status::Limit);
    }
    let mut evaluations = 0;
    if generator.saturates() {
        let (saturated, made) = decide(divergence, logp, end, delta);
        evaluations += made;
        if saturated {
            return Bound { evaluations, ..exactly(end, Status::Saturated) };
        }
    }
    let ordinary = is_ordinary(divergence.generator_radius(delta));
    if !ordinary || is_far(logp) {
        let solve = if ordinary { far_bound } else { wide_bound };
        let root = solve(divergence, logp, delta, side);
        return Bound {
            log_ratio: root.at,
            outside: side.outwards(root.at),
            status: Status::Converged,
            evaluations: evaluations + root.evaluations,
        };
    }

    let split = Split::new(logp, side);
    let root = split.magnitude(divergence, delta, &mut evaluations);
    let (rough, condition) = split.log_ratio(generator, root, side);
    evaluations += 1;
    // Next to saturation the remaining factor was the unknown. As a denormal it lacks digits.
    let lost_digits = root > MAX_LOG_LOSS && generator.saturates();
    if condition <= BENIGN_CONDITION && !generator.cancels() && !lost_digits {
        let (inside, outside) = bracket(rough, MARGIN);
        return Bound {
            log_ratio: side.nearer(inside, side.last_before_end(logp)),
            outside,
            status: Status::Converged,
            evaluations,
        };
    }
    let (log_ratio, more) = polish(divergence, logp, delta, side, rough);
    Bound {
        log_ratio,
        outside: side.outwards(log_ratio),
        status: Status::Converged,
        evaluations: evaluations + more,
    }
}
