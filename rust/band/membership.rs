//! Membership of log-ratios in the band, and the divergence at a log-ratio.

use rayon::prelude::*;

use crate::band::exact::{holds_exactly, is_ordinary};
use crate::band::limits::CHUNK;
use crate::band::side::{Delta, Side};
use crate::band::split::{Split, weighted};
use crate::band::tails::{certain_divergence, far_divergence, is_far};
use crate::divergence::{Divergence, Generator};
use crate::error::{Error, Result};

/// True for each log-ratio in the band, decided on the exact divergence. False for NaN.
///
/// ```
/// use bandpo::band::{Delta, contains};
/// use bandpo::divergence::Divergence;
///
/// let kl = Divergence::parse("kl")?;
/// let delta = Delta::Same(0.05);
/// assert_eq!(contains(&kl, delta, delta, &[-2.0, -2.0], &[0.5, 1.0])?, [true, false]);
/// # Ok::<(), bandpo::error::Error>(())
/// ```
///
/// # Errors
/// [`Error::Delta`] and [`Error::Length`].
pub fn contains(
    divergence: &Divergence,
    delta_low: Delta<'_>,
    delta_high: Delta<'_>,
    logp: &[f64],
    log_ratio: &[f64],
) -> Result<Vec<bool>> {
    delta_low.check("delta_low", logp.len())?;
    delta_high.check("delta_high", logp.len())?;
    Error::check_length("log_ratio", log_ratio.len(), logp.len())?;
    Ok(logp
        .par_iter()
        .with_min_len(CHUNK)
        .zip(log_ratio)
        .enumerate()
        .map(|(index, (&logp, &log_ratio))| {
            let delta = Side::of(log_ratio).pick(delta_low, delta_high).at(index);
            is_inside(divergence, logp, log_ratio, delta)
        })
        .collect())
}

/// `D` of the split {this token, everything else} at each log-ratio, in double precision. It is infinite outside the
/// simplex, and NaN if an argument is NaN.
///
/// # Errors
/// [`Error::Length`].
pub fn divergences(divergence: &Divergence, logp: &[f64], log_ratio: &[f64]) -> Result<Vec<f64>> {
    Error::check_length("log_ratio", log_ratio.len(), logp.len())?;
    let generator = &divergence.generator;
    let of_generator = |logp: f64, log_ratio: f64| {
        if logp.is_nan() || log_ratio.is_nan() {
            f64::NAN
        } else if logp == f64::NEG_INFINITY {
            0.0
        } else if log_ratio > Side::Upper.end(logp.min(0.0)) {
            f64::INFINITY
        } else if logp >= 0.0 {
            certain_divergence(generator, log_ratio)
        } else {
            divergence_at(generator, logp, log_ratio).0
        }
    };
    Ok(logp
        .par_iter()
        .with_min_len(CHUNK)
        .zip(log_ratio)
        .map(|(&logp, &log_ratio)| divergence.delta_of_radius(of_generator(logp, log_ratio)))
        .collect())
}

/// Min distance of `D` from a radius, relative to the terms of `D`, at which double precision decides membership.
/// Nearer, numbers with more digits decide.
const CLEAR_OF_EDGE: f64 = 64.0 * f64::EPSILON;

/// True if the exact `D` at a log-ratio is at most `delta` and the ratio is inside the simplex.
pub(super) fn is_inside(divergence: &Divergence, logp: f64, log_ratio: f64, delta: f64) -> bool {
    decide(divergence, logp, log_ratio, delta).0
}

/// Decision of [`is_inside`], and the number of evaluations of `D`.
pub(super) fn decide(
    divergence: &Divergence,
    logp: f64,
    log_ratio: f64,
    delta: f64,
) -> (bool, u32) {
    let generator = &divergence.generator;
    if logp.is_nan() || log_ratio.is_nan() {
        return (false, 0);
    }
    if logp == f64::NEG_INFINITY {
        return (true, 0); // p = 0: no finite ratio gives the token any probability
    }
    let logp = logp.min(0.0);
    if log_ratio > Side::Upper.end(logp) {
        return (false, 0);
    }
    let exactly = || holds_exactly(divergence, logp, log_ratio, delta);
    let radius = divergence.generator_radius::<f64>(delta);
    if !is_ordinary(radius) || logp < 0.0 && is_far(logp) {
        return (exactly(), 1);
    }
    let (d, sensitivity) = if logp >= 0.0 {
        (certain_divergence(generator, log_ratio), 0.0)
    } else {
        divergence_at(generator, logp, log_ratio)
    };
    if d == f64::INFINITY {
        return (false, 1);
    }
    let rounded = match *generator {
        // An expression is accurate to a few ulp of its terms, a power to the ulps of its base.
        Generator::Expression(_) => generator.cancelled(d.abs()) + d.abs(),
        Generator::Vajda(order) => order * d,
        _ => 0.0,
    };
    let scale = radius + sensitivity + rounded;
    if (d - radius).abs() > CLEAR_OF_EDGE * scale { (d < radius, 1) } else { (exactly(), 2) }
}

/// `D` in double precision at a log-ratio inside the simplex, for `logp < 0`, and its sensitivity: the change of `D`
/// for a relative change of 1 in the gain or the remainder of each outcome, which carry the rounding errors.
fn divergence_at(generator: &Generator, logp: f64, log_ratio: f64) -> (f64, f64) {
    if is_far(logp) {
        return (far_divergence(generator, logp, log_ratio), 0.0);
    }
    let split = Split::new(logp, Side::Lower);
    let (token, others) = split.outcomes(logp, log_ratio);
    let (mut d, mut sensitivity) = (0.0, 0.0);
    for (weight, outcome) in [(split.shrinking, token), (split.growing, others)] {
        d += weighted(generator, weight, outcome);
        let change = if outcome.excess > 0.0 {
            weight * outcome.excess * generator.slope(outcome)
        } else if outcome.u == 0.0 {
            0.0
        } else {
            weight * generator.log_slope(outcome) * (outcome.excess / outcome.u).clamp(-1.0, 0.0)
        };
        sensitivity += change.abs();
    }
    (d, sensitivity)
}
