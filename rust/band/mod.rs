//! The band: for a token of old log-probability `logp`, every log-ratio `b` whose divergence
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
//! to `1 + (w/(1-w)) (1 - e^-m)` times its size, `w` being the probability of the one that shrinks.
//! For the lower bound the token shrinks (`w = p`, bound `-m`); for the upper bound everything else
//! does (`w = 1-p`, bound `ln` of the growth). So `p upper(p) + (1-p) lower(1-p) = 1` (the mirror
//! identity) and one solver in `m` serves both. `m` stays well scaled over the whole range of a
//! double: for KL it runs from 1e-155 to 1e308.
//!
//! # Accuracy, and always inside
//!
//! In double precision the equation is evaluated to a few units in the last place, so `m` is good to
//! a few ulp times a condition number. Where that is at most
//! [`BENIGN_CONDITION`], the result is moved inwards by [`MARGIN`], which covers that error, and is
//! inside. Elsewhere (near saturation of the lower side, mostly) the residual is evaluated in
//! double-double arithmetic, Newton's method corrects the bound, and it is moved inwards by single
//! ulps until the residual says that it is inside. In the far tails, where p or 1 - p is below 1e-300,
//! the bits of the bound are halved on such a residual, evaluated in logarithms.
//!
//! Of many tokens, `bulk.rs` settles those that need none of this by vectors; the rest comes here.

pub(crate) mod root;
mod vector;

use rayon::prelude::*;

use crate::band::root::{MOST_EVALUATIONS, MOST_HALVINGS, Root, last_inside, newton_log_log};
use crate::divergence::{Divergence, Generator, Point};
use crate::error::{Error, Result};
use crate::number::{Dd, Real};

/// Condition number of a log bound up to which double precision suffices.
pub(crate) const BENIGN_CONDITION: f64 = 3.0;

/// Largest `m` for which the factor `e^-m` is a normal double.
pub(crate) const MOST_LOG_LOSS: f64 = 708.0;

/// Relative move inwards that covers the error of double precision: 16 eps, 3.6e-15.
pub(crate) const MARGIN: f64 = 16.0 * f64::EPSILON;

/// `ln` of the smallest p that the fast formulas take; below it products such as `p f(r)` leave the
/// range of a double, and the bits of the bound are halved instead.
pub(crate) const FAR_TAIL: f64 = -690.9;

/// The smallest `1 - p` that they take, likewise.
pub(crate) const FAR_REST: f64 = 1e-300;

/// Most evaluations of `D`, in either precision, that one bound takes, whatever its arguments.
pub const MOST_BOUND_EVALUATIONS: u32 = 196;

// Twice to see whether the side is saturated, Newton's method and once more for the condition number;
// then the residual at saturation, Newton's method on it, ulps inwards, and halving if all of that failed.
// Far tails and the limit p = 1 halve twice, and take fewer.
const _: () = assert!(
    MOST_BOUND_EVALUATIONS
        == 2 + MOST_EVALUATIONS + 1 + 1 + MOST_POLISHING + MOST_INWARDS + MOST_HALVINGS
);

/// Elements a thread takes at a time.
const CHUNK: usize = 1024;

/// Which end of the band.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// `log_lower <= 0`
    Lower,
    /// `log_upper >= 0`
    Upper,
}

/// How a bound came about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// The equation `D = delta` was solved.
    Converged = 0,
    /// The whole side is allowed: exactly `-inf` or `-logp`.
    Saturated = 1,
    /// `logp` is 0 or `-inf`: the limit.
    Limit = 2,
    /// `logp` is above 0 and was read as 0.
    ReadAsCertain = 3,
    /// `logp` is NaN, and so is the bound.
    NotANumber = 4,
}

/// One end of the band, and how it was found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bound {
    /// The log bound: inside the region, next to its edge.
    pub log_ratio: f64,
    /// A log-ratio on the other side of the edge (or the bound itself where there is no edge).
    pub outside: f64,
    /// How it came about.
    pub status: Status,
    /// Evaluations of the divergence `D`, two of the generator each, that the scalar solver makes.
    pub evaluations: u32,
}

/// A radius, or one for every element.
#[derive(Debug, Clone, Copy)]
pub enum Delta<'a> {
    /// The same for all.
    Same(f64),
    /// One an element.
    Each(&'a [f64]),
}

impl Delta<'_> {
    fn part(self, first: usize, count: usize) -> Self {
        match self {
            Self::Same(_) => self,
            Self::Each(values) => Self::Each(&values[first..first + count]),
        }
    }

    fn at(&self, index: usize) -> f64 {
        match self {
            Self::Same(value) => *value,
            Self::Each(values) => values[index],
        }
    }

    fn check(&self, argument: &'static str, expected: usize) -> Result<()> {
        match self {
            Self::Same(value) => check_delta(*value, None),
            Self::Each(values) => {
                if values.len() != expected {
                    return Err(Error::Length { argument, actual: values.len(), expected });
                }
                values
                    .iter()
                    .enumerate()
                    .try_for_each(|(index, value)| check_delta(*value, Some(index)))
            }
        }
    }
}

fn check_delta(value: f64, index: Option<usize>) -> Result<()> {
    if value > 0.0 && value.is_finite() { Ok(()) } else { Err(Error::Delta { value, index }) }
}

/// The region `D_f <= delta`, with its own radius for each side.
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
        match side {
            Side::Lower => self.delta_low,
            Side::Upper => self.delta_high,
        }
    }

    /// `(log_lower, log_upper)` of one token.
    #[must_use]
    pub fn log_bounds(&self, logp: f64) -> (f64, f64) {
        (self.bound(logp, Side::Lower).log_ratio, self.bound(logp, Side::Upper).log_ratio)
    }

    /// The same of many tokens, on all threads.
    #[must_use]
    pub fn log_bounds_of_many(&self, logp: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let (mut lower, mut upper) = (vec![0.0; logp.len()], vec![0.0; logp.len()]);
        let deltas = [Delta::Same(self.delta_low), Delta::Same(self.delta_high)];
        fill(&self.divergence, deltas, logp, &mut lower, &mut upper);
        (lower, upper)
    }

    /// One end of the band, with how it was found.
    #[must_use]
    pub fn bound(&self, logp: f64, side: Side) -> Bound {
        bound(&self.divergence, logp, self.delta(side), side)
    }

    /// `d log bound / d logp`, from the implicit function theorem: between -1 and 0 above, at least 0
    /// below. 0 where the bound is saturated below, -1 where it is above.
    #[must_use]
    pub fn log_slope(&self, logp: f64, log_bound: f64) -> f64 {
        log_slope(&self.divergence.generator, logp, log_bound)
    }
}

/// Fills `log_lower` and `log_upper` for every element of `logp`, on all threads.
///
/// # Errors
/// [`Error::Delta`] and [`Error::Length`]; nothing is written then.
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
    for (argument, actual) in [("log_lower", log_lower.len()), ("log_upper", log_upper.len())] {
        if actual != logp.len() {
            return Err(Error::Length { argument, actual, expected: logp.len() });
        }
    }
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
    // Many tokens were certain, and with the same radius they have the same bound.
    let mut of_certain = None;
    for (index, side, rough) in rest {
        let logp = logp[index];
        let (delta, bounds) = match side {
            Side::Lower => (deltas[0], &mut *lower),
            Side::Upper => (deltas[1], &mut *upper),
        };
        bounds[index] = match (delta, rough) {
            (Delta::Same(delta), None) if logp >= 0.0 && side == Side::Lower => {
                *of_certain.get_or_insert_with(|| lower_of_certain(divergence, delta).0)
            }
            (delta, Some(rough)) => {
                polish(divergence, logp, delta.at(index), side, rough, farthest(logp, side)).0
            }
            (delta, None) => bound(divergence, logp, delta.at(index), side).log_ratio,
        };
    }
}

/// The bounds of one side, those of [`log_bounds`], with how the scalar solver finds each; on all threads.
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
    let log_ratios = match side {
        Side::Lower => lower,
        Side::Upper => upper,
    };
    Ok(logp
        .par_iter()
        .with_min_len(CHUNK)
        .zip(log_ratios)
        .enumerate()
        .map(|(index, (&logp, log_ratio))| Bound {
            log_ratio,
            ..bound(divergence, logp, delta.at(index), side)
        })
        .collect())
}

/// Whether each log-ratio lies in the band, decided on the exact divergence; NaN lies in none.
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
    if log_ratio.len() != logp.len() {
        return Err(Error::Length {
            argument: "log_ratio",
            actual: log_ratio.len(),
            expected: logp.len(),
        });
    }
    Ok(logp
        .par_iter()
        .with_min_len(CHUNK)
        .zip(log_ratio)
        .enumerate()
        .map(|(index, (&logp, &log_ratio))| {
            let delta = if log_ratio < 0.0 { delta_low } else { delta_high }.at(index);
            is_inside(divergence, logp, log_ratio, delta)
        })
        .collect())
}

/// `D` of the split {this token, everything else} at each log-ratio, in double precision; inf outside the
/// simplex, NaN where an argument is NaN.
///
/// # Errors
/// [`Error::Length`].
pub fn divergences(divergence: &Divergence, logp: &[f64], log_ratio: &[f64]) -> Result<Vec<f64>> {
    if log_ratio.len() != logp.len() {
        return Err(Error::Length {
            argument: "log_ratio",
            actual: log_ratio.len(),
            expected: logp.len(),
        });
    }
    let generator = &divergence.generator;
    let of_generator = |logp: f64, log_ratio: f64| {
        if logp.is_nan() || log_ratio.is_nan() {
            f64::NAN
        } else if logp == f64::NEG_INFINITY {
            0.0
        } else if log_ratio > -logp.min(0.0) {
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
        .map(|(&logp, &log_ratio)| divergence.radius_of_generator(of_generator(logp, log_ratio)))
        .collect())
}

/// One end of `{D <= delta}`; `delta` has been checked.
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
    if logp == f64::NEG_INFINITY {
        let log_ratio = match side {
            Side::Upper => f64::INFINITY,
            Side::Lower => f64::NEG_INFINITY,
        };
        return exactly(log_ratio, Status::Limit);
    }
    let saturation = match side {
        Side::Upper => -logp,
        Side::Lower => f64::NEG_INFINITY,
    };
    let mut evaluations = 0;
    if generator.at_zero::<f64>().is_finite() {
        let (saturated, made) = decide(divergence, logp, saturation, delta);
        evaluations += made;
        if saturated {
            return Bound { evaluations, ..exactly(saturation, Status::Saturated) };
        }
    }
    let split = Split::new(logp, side);
    let farthest = farthest(logp, side);
    if is_far(logp) {
        let (zero, outside) = match side {
            Side::Upper => (0.0, saturation),
            Side::Lower => (-0.0, f64::NEG_INFINITY),
        };
        let root = far_bound(divergence, logp, delta, zero, outside);
        return Bound {
            log_ratio: root.at,
            outside: match side {
                Side::Upper => root.at.next_up(),
                Side::Lower => root.at.next_down(),
            },
            status: Status::Converged,
            evaluations: evaluations + root.evaluations,
        };
    }

    let root = split.magnitude(divergence, delta, &mut evaluations);
    let (rough, condition) = split.log_ratio(generator, root, side);
    evaluations += 1;
    // The factor that is left was the unknown next to saturation, and is no good as a denormal.
    let lost_digits = root > MOST_LOG_LOSS && generator.at_zero::<f64>().is_finite();
    if condition <= BENIGN_CONDITION && !generator.cancels() && !lost_digits {
        let log_ratio = match side {
            Side::Upper => (rough * (1.0 - MARGIN)).min(farthest),
            Side::Lower => (rough * (1.0 - MARGIN)).max(farthest),
        };
        return Bound {
            log_ratio,
            outside: rough * (1.0 + MARGIN),
            status: Status::Converged,
            evaluations,
        };
    }
    let (log_ratio, more) = polish(divergence, logp, delta, side, rough, farthest);
    let outside = match side {
        Side::Upper => log_ratio.next_up(),
        Side::Lower => log_ratio.next_down(),
    };
    Bound { log_ratio, outside, status: Status::Converged, evaluations: evaluations + more }
}

/// The last log-ratio before everything of a side is allowed.
fn farthest(logp: f64, side: Side) -> f64 {
    match side {
        Side::Upper => (-logp).next_down(),
        Side::Lower => -f64::MAX,
    }
}

/// Corrects a rough bound on the exact residual and moves it inwards by single ulps until it is inside.
/// Returns it with the evaluations made.
fn polish(
    divergence: &Divergence,
    logp: f64,
    delta: f64,
    side: Side,
    rough: f64,
    farthest: f64,
) -> (f64, u32) {
    let generator = &divergence.generator;
    let radius = divergence.generator_radius::<Dd>(delta);
    let exact = ExactSplit::new(logp);
    let residual_at = |b: f64| (exact.divergence(generator, b) - radius).to_f64();
    let valid = |b: f64| match side {
        Side::Upper => b > 0.0 && b <= farthest,
        Side::Lower => b < 0.0 && b >= farthest,
    };
    let doubt = residual_doubt(generator, radius.hi);
    let mut evaluations = 0;
    // Next to saturation of the lower side, D stays just below its value at r = 0. Newton's method
    // on the logarithm of what is missing converges there; elsewhere it is Newton's method on D.
    let saturates = side == Side::Lower && generator.at_zero::<f64>().is_finite();
    let mut missing = None;
    let mut log_ratio = if valid(rough) && rough > -1e3 {
        rough
    } else if saturates {
        evaluations += 1;
        let missing = *missing.insert(residual_at(f64::NEG_INFINITY));
        (missing / delta).min(0.5).ln()
    } else {
        0.5_f64.ln()
    };
    let mut converged = false;
    for _ in 0..MOST_POLISHING {
        if !valid(log_ratio) {
            break;
        }
        evaluations += 1;
        let residual = residual_at(log_ratio);
        let slope = residual_slope(generator, logp, log_ratio);
        let newton = -residual / slope;
        if newton.abs() <= SHORT_STEP * log_ratio.abs() {
            let doubt = SHORT_STEP_ERROR * newton.abs() + 2.0 * doubt / slope.abs();
            if let Some(inside) = last_before(log_ratio, newton, doubt, side).filter(|&b| valid(b))
            {
                return (inside, evaluations);
            }
        }
        let step = if saturates {
            let missing = *missing.get_or_insert_with(|| {
                evaluations += 1;
                residual_at(f64::NEG_INFINITY)
            });
            (missing - residual) * (-residual / missing).ln_1p() / slope
        } else {
            newton
        };
        log_ratio += step;
        if step.abs() <= 1e-9 * log_ratio.abs() {
            converged = valid(log_ratio);
            break;
        }
    }
    let mut inwards = 0;
    while converged && inwards < MOST_INWARDS {
        evaluations += 1;
        if residual_at(log_ratio) <= -doubt {
            return (log_ratio, evaluations);
        }
        log_ratio = match side {
            Side::Upper => log_ratio.next_down(),
            Side::Lower => log_ratio.next_up(),
        };
        inwards += 1;
    }
    let beyond = match side {
        Side::Upper => farthest.next_up(),
        Side::Lower => f64::NEG_INFINITY,
    };
    let root = last_inside(0.0_f64.copysign(farthest), beyond, |b| residual_at(b) <= -doubt);
    (root.at, evaluations + root.evaluations)
}

/// Relative error of `D` in double-double arithmetic, rounded up: what is inside by more is inside.
const RESIDUAL_ERROR: f64 = 2e-30;

/// The error of a `D` next to a radius; where terms of the generator cancel it does not shrink with `D`.
fn residual_doubt(generator: &Generator, radius: f64) -> f64 {
    RESIDUAL_ERROR * (radius + generator.cancelled())
}

/// Most Newton steps on the exact residual.
const MOST_POLISHING: u32 = 12;

/// A relative step of Newton's method that is known to [`SHORT_STEP_ERROR`] of itself: the slope is good to
/// `|log_ratio|` eps and changes by no more than a few times that over the step.
const SHORT_STEP: f64 = 1e-12;

/// See [`SHORT_STEP`].
const SHORT_STEP_ERROR: f64 = 1e-8;

/// The last double on the inner side of the root `at + step`, which is known to within `doubt`; `None` where
/// that is too much to tell.
fn last_before(at: f64, step: f64, doubt: f64, side: Side) -> Option<f64> {
    let root = Dd::sum(at, step);
    let inwards = match side {
        Side::Upper => root.hi.next_down(),
        Side::Lower => root.hi.next_up(),
    };
    // What is left of the root beyond its nearest double, counted outwards.
    let beyond = if side == Side::Upper { root.lo } else { -root.lo };
    if beyond > doubt {
        Some(root.hi)
    } else if (root.hi - inwards).abs() + beyond > doubt {
        Some(inwards)
    } else {
        None
    }
}

/// Most single ulps inwards after them.
const MOST_INWARDS: u32 = 16;

/// The same of [`far_divergence`], which adds logarithms of up to 750.
const FAR_RESIDUAL_ERROR: f64 = 1e-27;

/// The last log-ratio between `zero` and `outside` that is inside, by halving bits.
fn far_bound(divergence: &Divergence, logp: f64, delta: f64, zero: f64, outside: f64) -> Root {
    /// Relative error of double precision here, rounded up; it brackets the bound in most cases.
    const ROUGH: f64 = 1e-12;
    let generator = &divergence.generator;
    let radius = divergence.generator_radius::<Dd>(delta);
    let doubt = FAR_RESIDUAL_ERROR * radius.hi;
    let is_inside = |b: f64| {
        let d: Dd = far_divergence(generator, logp, b);
        (d - radius).to_f64() <= -doubt
    };
    let rough =
        last_inside(zero, outside, |b| far_divergence::<f64>(generator, logp, b) <= radius.hi);
    let (near, far) = (rough.at * (1.0 - ROUGH), rough.at * (1.0 + ROUGH));
    let root = if far.abs() < outside.abs() && is_inside(near) && !is_inside(far) {
        last_inside(near, far, is_inside)
    } else {
        last_inside(zero, outside, is_inside)
    };
    Root { at: root.at, evaluations: rough.evaluations + 2 + root.evaluations }
}

/// The limit of `log_lower` for p -> 1: `f(r) + (1-r) f'(inf) = delta`, 0 where `f'(inf)` is infinite.
/// Returns it with the evaluations made.
fn lower_of_certain(divergence: &Divergence, delta: f64) -> (f64, u32) {
    let generator = &divergence.generator;
    if generator.slope_at_infinity::<f64>() == f64::INFINITY {
        return (0.0, 0);
    }
    let radius = divergence.generator_radius::<Dd>(delta);
    let doubt = residual_doubt(generator, radius.hi);
    let residual_at = |b: f64| (certain_divergence(generator, Dd::of(b)) - radius).to_f64();
    if residual_at(f64::NEG_INFINITY) <= doubt {
        return (f64::NEG_INFINITY, 1);
    }
    let rough = last_inside(-0.0, -f64::MAX, |b| certain_divergence(generator, b) <= radius.hi);
    let (inner, outer) = (rough.at * (1.0 - MARGIN), rough.at * (1.0 + MARGIN));
    if residual_at(inner) <= -doubt && residual_at(outer) > -doubt {
        return (inner, 3 + rough.evaluations);
    }
    let root = last_inside(-0.0, f64::NEG_INFINITY, |b| residual_at(b) <= -doubt);
    (root.at, 3 + rough.evaluations + root.evaluations)
}

/// `D` for p = 1: `f(r) + (1-r) f'(inf)`.
fn certain_divergence<T: Real>(generator: &Generator, log_ratio: T) -> T {
    let at = Point::from_log(log_ratio);
    let value = value_or_limit(generator, at);
    if at.excess.to_f64() == 0.0 {
        value
    } else {
        value - at.excess * generator.slope_at_infinity()
    }
}

fn value_or_limit<T: Real>(generator: &Generator, at: Point<T>) -> T {
    if at.u.to_f64() == 0.0 && at.log.to_f64() == f64::NEG_INFINITY {
        generator.at_zero()
    } else {
        generator.value(at)
    }
}

/// The probabilities of the two outcomes.
struct Split {
    shrinking: f64,
    growing: f64,
}

impl Split {
    fn new(logp: f64, side: Side) -> Self {
        let (token, others) = (logp.exp(), -logp.exp_m1());
        match side {
            Side::Lower => Self { shrinking: token, growing: others },
            Side::Upper => Self { shrinking: others, growing: token },
        }
    }

    /// `D` and `d ln D / d ln m` where the shrinking outcome shrinks by `e^-m`.
    fn divergence(&self, generator: &Generator, m: f64) -> (f64, f64) {
        let shrunk = Point::from_log(-m);
        let odds = self.shrinking / self.growing;
        let grown = Point::from_excess(-odds * shrunk.excess);
        let d = self.shrinking * value_or_limit(generator, shrunk)
            + weighted(generator, self.growing, grown);
        let slope =
            self.shrinking * (shrunk.u * generator.slope(grown) - generator.log_slope(shrunk));
        (d, m * slope / d)
    }

    /// `m` to a few ulp times its condition number. The side is known not to be saturated.
    fn magnitude(&self, divergence: &Divergence, delta: f64, evaluations: &mut u32) -> f64 {
        let generator = &divergence.generator;
        let radius = divergence.generator_radius::<f64>(delta);
        if let Some(m) = self.closed_form(generator, radius) {
            return m;
        }
        self.iterated(generator, radius, evaluations)
    }

    /// The same by iteration, for any generator.
    fn iterated(&self, generator: &Generator, radius: f64, evaluations: &mut u32) -> f64 {
        let at_zero = generator.at_zero::<f64>();
        if at_zero.is_finite() {
            let greatest = self.shrinking * at_zero
                + self.growing * generator.value(Point::from_ratio(1.0 / self.growing));
            if radius > 0.5 * greatest {
                return self.magnitude_near_saturation(generator, radius, greatest, evaluations);
            }
        }
        // Local quadratic; for f that explodes at 0 as u^a it starts far too high, hence the tail.
        let curvature = generator.curvature().unwrap_or(1.0);
        let mut start = (2.0 * radius * self.growing / (curvature * self.shrinking)).sqrt();
        if let Generator::Alpha(order) = *generator
            && order < 0.0
        {
            let tail = (order * (order - 1.0) * radius / self.shrinking).ln_1p() / -order;
            start = start.min(1.0 + tail);
        }
        let root = newton_log_log(radius, start, last_step(generator, radius), |m| {
            self.divergence(generator, m)
        });
        *evaluations += root.evaluations;
        root.at
    }

    /// The same from the other end: the factor `r` that is left, by `D(0) - D(r) = D(0) - delta`.
    fn magnitude_near_saturation(
        &self,
        generator: &Generator,
        radius: f64,
        greatest: f64,
        evaluations: &mut u32,
    ) -> f64 {
        let gap = (greatest - radius).max(f64::EPSILON * greatest);
        let start = (gap / (greatest * (2.0 + (greatest / gap).ln()))).min(0.5);
        let root = newton_log_log(gap, start, last_step(generator, gap), |r| {
            if r >= 1.0 {
                return (f64::INFINITY, 1.0);
            }
            let (d, log_slope) = self.divergence(generator, -r.ln());
            let left = greatest - d;
            // d ln left / d ln r, with d m = -d ln r.
            (left, log_slope * d / (-r.ln() * left))
        });
        *evaluations += root.evaluations;
        -root.at.min(1.0).ln()
    }

    /// The bound that `m` stands for, and its condition number: by how much more than a rounding error
    /// evaluating the equation in double precision may move it.
    fn log_ratio(&self, generator: &Generator, m: f64, side: Side) -> (f64, f64) {
        let (d, slope) = self.divergence(generator, m);
        let lost = -(-m).exp_m1();
        let growth = self.shrinking / self.growing * lost;
        // A rounding error of the odds moves D by so much of itself.
        let grown = Point::from_excess(growth);
        let odds_error = self.growing * growth * generator.slope(grown) / d;
        let condition = (1.0 + odds_error.abs()) / slope;
        match side {
            Side::Lower => (-m, condition),
            Side::Upper => {
                let log_growth = growth.ln_1p();
                let chain = m * (-m).exp() / lost * growth / ((1.0 + growth) * log_growth);
                (log_growth, if chain == 0.0 { 0.0 } else { chain * condition })
            }
        }
    }

    /// `m` where the equation has an elementary solution, arranged so that nothing cancels except
    /// next to saturation.
    fn closed_form(&self, generator: &Generator, radius: f64) -> Option<f64> {
        let (w, g) = (self.shrinking, self.growing);
        match *generator {
            Generator::Tv => Some(-(-radius / w).ln_1p()),
            Generator::Hellinger => {
                // Bhattacharyya's coefficient is the cosine of an angle: sqrt(r) = 1 - e.
                let e = radius + (radius * (2.0 - radius)).sqrt() * (g / w).sqrt();
                Some(-2.0 * (-e).ln_1p())
            }
            Generator::Bwcs(blend) => Some(blended_chi_square(w, g, blend, radius)),
            Generator::LeCam => Some(blended_chi_square(w, g, 0.5, 4.0 * radius)),
            Generator::Vajda(order) => {
                let odds = w / g;
                let lost = if odds <= 1.0 {
                    root_of_order(radius / (w * (1.0 + odds.powf(order - 1.0))), order)
                } else {
                    root_of_order(radius / (w * (1.0 + odds.powf(1.0 - order))), order)
                        * (root_of_order(odds, order) / odds)
                };
                Some(-(-lost).ln_1p())
            }
            Generator::HockeyStick(threshold) => {
                let lost = (g * (threshold - 1.0) + radius) / w;
                Some(-(-lost).ln_1p())
            }
            _ => None,
        }
    }
}

/// The relative step at which Newton's method stops: below it, the error after it is of the order of its
/// square, 1e-17. Text is evaluated with an absolute error of a rounding, and polished afterwards.
fn last_step(generator: &Generator, target: f64) -> f64 {
    if generator.cancels() { (100.0 * f64::EPSILON / target).max(1e-5) } else { 3e-9 }
}

/// `x^(1/k)`. Rounding 1/k alone would cost `ln x` ulps, hence a Newton step.
fn root_of_order(x: f64, order: f64) -> f64 {
    let root = x.powf(1.0 / order);
    let correction = (root.powf(order) / x - 1.0) / order;
    // Of a saturated or denormal x there is nothing to correct.
    if correction.abs() < 1e-10 { root - root * correction } else { root }
}

/// `m` for `(u-1)^2/(1-l+l u)`: with `x` the fraction lost, a quadratic; see docs of [`Divergence`].
fn blended_chi_square(w: f64, g: f64, blend: f64, radius: f64) -> f64 {
    let spread = radius * blend * blend;
    // Factor by factor: a product of a small radius and a small g would be denormal.
    let root = radius.sqrt() * (spread + 4.0 * w * g).sqrt();
    let tilt = radius * blend * (g - w);
    // The two roots are -x (this one) and the fraction that the same outcome may gain.
    let (lost, gained) = if tilt >= 0.0 {
        (2.0 * radius * (g / (root + tilt)), (root + tilt) / (2.0 * w * (1.0 + spread)))
    } else {
        ((root - tilt) / (2.0 * w * (1.0 + spread)), 2.0 * radius * (g / (root - tilt)))
    };
    if lost < 0.5 {
        return -(-lost).ln_1p();
    }
    // What is left, by the product of the roots: 1 - x would cancel.
    let product = (w - radius * (1.0 - blend) * (g + w * blend)) / (w * (1.0 + spread));
    -(product / (1.0 + gained)).ln()
}

/// Whether the exact `D` at a log-ratio is at most `delta`, and the ratio inside the simplex.
fn is_inside(divergence: &Divergence, logp: f64, log_ratio: f64, delta: f64) -> bool {
    decide(divergence, logp, log_ratio, delta).0
}

/// The same with the evaluations of `D` that it took.
fn decide(divergence: &Divergence, logp: f64, log_ratio: f64, delta: f64) -> (bool, u32) {
    let generator = &divergence.generator;
    if logp.is_nan() || log_ratio.is_nan() {
        return (false, 0);
    }
    if logp == f64::NEG_INFINITY {
        return (true, 0); // p = 0: no finite ratio gives the token any probability
    }
    if log_ratio > -logp.min(0.0) {
        return (false, 0);
    }
    let radius = divergence.generator_radius::<f64>(delta);
    // Radii that make D at the end of a side equal to delta exactly do occur, and count; so does what
    // these digits cannot tell from them.
    let at_the_end = log_ratio == f64::NEG_INFINITY || log_ratio == -logp;
    let holds = |exact: Dd, doubt: f64| {
        let residual = exact - divergence.generator_radius::<Dd>(delta);
        residual.to_f64() <= if at_the_end { doubt } else { 0.0 }
    };
    if logp < 0.0 && is_far(logp) {
        return (holds(far_divergence(generator, logp, log_ratio), FAR_RESIDUAL_ERROR * radius), 1);
    }
    let (d, sensitivity) = if logp >= 0.0 {
        (certain_divergence(generator, log_ratio), 0.0)
    } else {
        divergence_at(generator, logp, log_ratio)
    };
    if d == f64::INFINITY {
        return (false, 1);
    }
    // A double evaluates D to a few ulp (text, to a few ulp of 1); nearer to the edge than that, more
    // digits decide.
    let scale = radius + sensitivity + if generator.cancels() { 1.0 + d.abs() } else { 0.0 };
    if (d - radius).abs() > 64.0 * f64::EPSILON * scale {
        return (d < radius, 1);
    }
    let exact = if logp >= 0.0 {
        certain_divergence(generator, Dd::of(log_ratio))
    } else {
        exact_divergence(generator, logp, log_ratio)
    };
    (holds(exact, residual_doubt(generator, radius)), 2)
}

/// `D` in double precision at any log-ratio inside the simplex, for any `logp < 0`, and by how much it
/// moves for a relative change of 1 in what each outcome gains or keeps, which is where rounding enters.
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

/// `w f(u)`, with the factor `u` drawn to the weight where `f(u)` might overflow.
fn weighted<T: Real>(generator: &Generator, weight: T, at: Point<T>) -> T {
    if at.u.to_f64() > 1e60 {
        weight * at.u * generator.value_per_u(at)
    } else {
        weight * value_or_limit(generator, at)
    }
}

/// Whether p or 1 - p is so small that products such as `p f(r)` leave the range of a double.
fn is_far(logp: f64) -> bool {
    !(FAR_TAIL..=-FAR_REST).contains(&logp)
}

/// `D` where p or 1 - p leaves the range of a double, and with it products such as `p f(r)`.
fn far_divergence<T: Real>(generator: &Generator, logp: f64, log_ratio: f64) -> T {
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

/// An outcome that has lost all of its probability.
fn gone<T: Real>() -> Point<T> {
    Point { log: T::of(f64::NEG_INFINITY), excess: T::of(-1.0), u: T::of(0.0) }
}

/// `w f(u)`, in logarithms where a factor leaves the range of a double.
fn scaled_value<T: Real>(generator: &Generator, log_weight: T, at: Point<T>) -> T {
    let value = value_or_limit(generator, at);
    if value.to_f64() <= 0.0 {
        T::of(0.0) // below 0 by rounding, in a text
    } else if at.log.to_f64() == f64::NEG_INFINITY || log_weight.to_f64() > FAR_TAIL {
        weighted(generator, log_weight.exp(), at)
    } else {
        // The weight takes the factor u first: both may be huge, and their sum exact.
        let log_product = if at.log.to_f64() > 0.0 { log_weight + at.log } else { log_weight };
        (log_product + generator.log_value(at.log)).exp()
    }
}

/// `D` with about 30 digits.
fn exact_divergence(generator: &Generator, logp: f64, log_ratio: f64) -> Dd {
    ExactSplit::new(logp).divergence(generator, log_ratio)
}

/// The probabilities of the token and of everything else with about 30 digits, and their ratio.
struct ExactSplit {
    logp: f64,
    token: Dd,
    others: Dd,
    odds: Dd,
}

impl ExactSplit {
    fn new(logp: f64) -> Self {
        let minus = Dd::of(logp).exp_m1();
        // Where p is small, it is not what 1 - p leaves of 1.
        let token = if minus.hi < -0.5 { Dd::of(logp).exp() } else { minus + Dd::of(1.0) };
        Self { logp, token, others: -minus, odds: token / -minus }
    }

    /// `D` with about 30 digits.
    fn divergence(&self, generator: &Generator, log_ratio: f64) -> Dd {
        let (token, others) = if log_ratio == f64::NEG_INFINITY {
            (gone(), Point::from_ratio(Dd::of(1.0) / self.others))
        } else {
            let token = Point::from_log(Dd::of(log_ratio));
            let lost = self.odds * token.excess;
            let others = if lost.hi > 0.5 {
                // Next to saturation: what is left of the others, without cancellation.
                let left = -Dd::sum(self.logp, log_ratio).exp_m1() / self.others;
                if left.hi <= 0.0 { gone() } else { Point::from_ratio(left) }
            } else {
                Point::from_excess(-lost)
            };
            (token, others)
        };
        weighted(generator, self.token, token) + weighted(generator, self.others, others)
    }
}

/// `dD/d log_ratio`.
fn residual_slope(generator: &Generator, logp: f64, log_ratio: f64) -> f64 {
    let split = Split::new(logp, Side::Lower);
    let (token, others) = split.outcomes(logp, log_ratio);
    let own = if token.u > 1.0 {
        split.shrinking * token.u * generator.slope(token)
    } else {
        split.shrinking * generator.log_slope(token)
    };
    own - split.shrinking * token.u * (generator.log_slope(others) / others.u)
}

/// `d log bound / d logp = -B(r, c) / (r (f'(r) - f'(c)))` with the Bregman divergence
/// `B(r, c) = f(r) - f(c) - f'(c)(r - c)`.
fn log_slope(generator: &Generator, logp: f64, log_bound: f64) -> f64 {
    if logp >= 0.0 || log_bound == f64::NEG_INFINITY || log_bound == 0.0 {
        return 0.0;
    }
    if log_bound >= -logp {
        return -1.0;
    }
    let split = Split::new(logp, Side::Lower);
    let (token, others) = split.outcomes(logp, log_bound);
    let slope_others = generator.log_slope(others) / others.u;
    let difference = token.excess - others.excess;
    let bregman = generator.value(token) - generator.value(others) - slope_others * difference;
    -bregman / (generator.log_slope(token) - token.u * slope_others)
}

impl Split {
    /// The two arguments of the generator at a log-ratio of the token; `self` is the token's split.
    fn outcomes(&self, logp: f64, log_ratio: f64) -> (Point<f64>, Point<f64>) {
        let token = Point::from_log(log_ratio);
        let lost = self.shrinking / self.growing * token.excess;
        let others = if lost > 0.5 {
            // Next to saturation: what is left of the others, without cancellation.
            Point::from_ratio(-(logp + log_ratio).exp_m1() / self.growing)
        } else {
            Point::from_excess(-lost)
        };
        (token, others)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use proptest::prelude::*;

    use super::*;
    use crate::number::tests::hex_float;

    /// `D - delta` with about 30 digits, rounded once.
    fn exact_residual(generator: &Generator, logp: f64, log_ratio: f64, radius: Dd) -> f64 {
        (exact_divergence(generator, logp, log_ratio) - radius).to_f64()
    }

    /// `tests/data/band_*.csv.gz`: 60-digit references, see the header of each.
    struct Reference {
        spec: String,
        logp: f64,
        delta: f64,
        /// The nearest double, what is left, and the condition number, `[lower, upper]`.
        bounds: [(f64, f64, f64); 2],
    }

    fn references() -> Vec<Reference> {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data");
        let mut references = Vec::new();
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            let stem = name.strip_prefix("band_").and_then(|name| name.strip_suffix(".csv.gz"));
            let Some(spec) = stem.map(|spec| spec.replacen('_', ":", 1)) else {
                continue;
            };
            let mut text = String::new();
            let file = std::fs::File::open(&path).unwrap();
            flate2::read::GzDecoder::new(file).read_to_string(&mut text).unwrap();
            let rows = text.lines().filter(|line| !line.starts_with('#')).skip(1);
            for row in rows {
                let columns: Vec<&str> = row.split(',').collect();
                let number = |i: usize| hex_float(columns[i]);
                let kappa = |i: usize| columns[i].parse::<f64>().unwrap();
                references.push(Reference {
                    spec: spec.clone(),
                    logp: number(0),
                    delta: number(1),
                    bounds: [(number(2), number(4), kappa(6)), (number(3), number(5), kappa(7))],
                });
            }
        }
        assert!(references.len() > 25_000, "{}", references.len());
        references
    }

    /// The contract: never outside the exact bound, and within 1e-14 of it or one ulp (of a denormal
    /// bound) or, where its condition number exceeds 20, with D within 2 ulp of delta.
    fn assert_accurate(reference: &Reference, side: Side, bound: f64) {
        let Reference { spec, logp, delta, bounds } = reference;
        let (exact, rest, kappa) = bounds[usize::from(side == Side::Upper)];
        let place = format!("{spec} logp={logp:e} delta={delta:e} {side:?} {bound:e}");
        if exact.is_infinite() || exact == 0.0 {
            assert_eq!(bound, exact, "{place}");
            return;
        }
        let error = (bound - exact) - rest; // the difference of neighbours is exact
        let relative = error / exact;
        // The references have 60 digits.
        assert!(relative <= 1e-60, "{place} is outside by {relative:e}");
        let ulp = exact.abs() - exact.abs().next_down();
        if relative >= -1e-14 || error.abs() <= ulp {
            return;
        }
        assert!(kappa > 20.0, "{place} is off by {relative:e}");
        let divergence = Divergence::parse(spec).unwrap();
        let radius = divergence.generator_radius::<Dd>(*delta);
        let missing = exact_residual(&divergence.generator, *logp, bound, radius).abs();
        // One ulp of delta moves the radius of the generator by so much.
        let next = divergence.generator_radius::<Dd>(delta.next_up());
        assert!(missing <= 2.0 * (next - radius).to_f64(), "{place}: {missing:e}");
    }

    #[test]
    fn bounds_hold_their_accuracy_and_are_inside() {
        for reference in references() {
            let band = band(&reference.spec, reference.delta);
            for side in [Side::Lower, Side::Upper] {
                assert_accurate(&reference, side, band.bound(reference.logp, side).log_ratio);
            }
        }
    }

    #[test]
    fn so_do_and_are_the_bounds_of_many_tokens() {
        for references in references().chunk_by(|a, b| a.spec == b.spec) {
            let divergence = Divergence::parse(&references[0].spec).unwrap();
            let logp: Vec<f64> = references.iter().map(|reference| reference.logp).collect();
            let deltas: Vec<f64> = references.iter().map(|reference| reference.delta).collect();
            let (lower, upper) = many(&divergence, Delta::Each(&deltas), &logp);
            for ((reference, lower), upper) in references.iter().zip(lower).zip(upper) {
                assert_accurate(reference, Side::Lower, lower);
                assert_accurate(reference, Side::Upper, upper);
            }
        }
    }

    fn many(divergence: &Divergence, delta: Delta<'_>, logp: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let (mut lower, mut upper) = (vec![0.0; logp.len()], vec![0.0; logp.len()]);
        log_bounds(divergence, delta, delta, logp, &mut lower, &mut upper).unwrap();
        (lower, upper)
    }

    /// 10^5 points of each divergence: a bound is the same, but for what the contract leaves open, whether it is
    /// asked for alone or among others, and it is inside.
    #[test]
    fn many_tokens_have_the_bounds_that_each_has() {
        const COUNT: usize = 100_003; // not a whole number of vectors
        let mut state = 0_u64;
        let mut uniform = |low: f64, high: f64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            low + (high - low) * (state >> 11) as f64 / (1_u64 << 53) as f64
        };
        let logp: Vec<f64> = (0..COUNT)
            .map(|index| match index % 8 {
                0 => uniform(-750.0, 0.0),
                1 => -uniform(-750.0, 0.0).exp(),
                2 if index % 64 == 2 => [0.0, 1.0, f64::NAN, f64::NEG_INFINITY][index / 64 % 4],
                _ => -(-uniform(-30.0, 30.0)).exp().ln_1p(),
            })
            .collect();
        let each: Vec<f64> = (0..COUNT).map(|_| uniform(-18.4, 2.3).exp()).collect();
        for spec in SPECS.into_iter().chain(["alpha:-1", "vajda:2"]) {
            let divergence = Divergence::parse(spec).unwrap();
            let few = &logp[..COUNT / 20];
            for (delta, logp) in [(Delta::Each(&each), &logp[..]), (Delta::Same(0.05), few)] {
                let (lower, upper) = many(&divergence, delta, logp);
                let diagnosed =
                    diagnose(&divergence, delta.part(0, few.len()), few, Side::Upper).unwrap();
                for (diagnosed, upper) in diagnosed.iter().zip(&upper) {
                    assert_eq!(diagnosed.log_ratio.to_bits(), upper.to_bits(), "{spec}");
                }
                logp.par_iter().enumerate().for_each(|(index, &logp)| {
                    let radius = delta.at(index);
                    for (side, found) in [(Side::Lower, lower[index]), (Side::Upper, upper[index])]
                    {
                        let alone = bound(&divergence, logp, radius, side).log_ratio;
                        let place = format!("{spec} {logp:e} {radius:e} {side:?}");
                        if logp.is_nan() {
                            assert!(found.is_nan(), "{place}: {found:e}");
                            continue;
                        }
                        let same = found == alone || (found - alone).abs() <= 1e-14 * alone.abs();
                        assert!(same, "{place}: {found:e} {alone:e}");
                        assert!(is_inside(&divergence, logp, found, radius), "{place}: {found:e}");
                    }
                });
            }
        }
    }

    const SPECS: [&str; 24] = [
        "kl",
        "reverse-kl",
        "tv",
        "pearson-chi2",
        "neyman-chi2",
        "hellinger",
        "le-cam",
        "jensen-shannon",
        "jeffreys",
        "bhattacharyya",
        "alpha:-3",
        "alpha:-0.5",
        "alpha:0.5",
        "alpha:0.999",
        "alpha:1.5",
        "alpha:4",
        "renyi:0.5",
        "renyi:2",
        "vajda:1",
        "vajda:1.5",
        "vajda:4",
        "bwcs:0.3",
        "hockey-stick:1",
        "hockey-stick:1.2",
    ];

    fn band(spec: &str, delta: f64) -> Band {
        Band::new(Divergence::parse(spec).unwrap(), delta, delta).unwrap()
    }

    /// Any probability that is not 0 or 1, by its logarithm: both ends get their share.
    fn log_probability() -> impl Strategy<Value = f64> {
        prop_oneof![
            (-690.0..-0.7_f64),
            (-36.0..-0.7_f64).prop_map(|log_rest: f64| (-log_rest.exp()).ln_1p()),
            (1e-6..0.999_f64).prop_map(f64::ln),
        ]
    }

    fn radius() -> impl Strategy<Value = f64> {
        (-18.4..2.3_f64).prop_map(f64::exp)
    }

    fn any_spec() -> impl Strategy<Value = &'static str> {
        prop::sample::select(SPECS.as_slice())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4000))]

        /// p upper(p) + (1-p) lower(1-p) = 1, for probabilities whose complement is exact.
        #[test]
        fn mirror(spec in any_spec(), delta in radius(), p in 1e-3..0.999_f64) {
            let p = (p * 1048576.0).round() / 1048576.0;
            let band = band(spec, delta);
            // ln p is rounded: the identity holds to the effect of that on both bounds.
            let (_, log_upper) = band.log_bounds(p.ln());
            let (log_lower, _) = band.log_bounds((-p).ln_1p());
            let (up, down) = (p * log_upper.exp(), (1.0 - p) * log_lower.exp());
            let inwards = if down == 0.0 { 0.0 } else { -log_lower * down } + log_upper * up;
            let slack = MARGIN * inwards + 2e-15;
            prop_assert!((up + down - 1.0).abs() <= slack, "{:e}", up + down - 1.0);
        }

        #[test]
        fn around_one_and_inside_the_simplex(
            spec in any_spec(), delta in radius(), logp in log_probability()
        ) {
            let (lower, upper) = band(spec, delta).log_bounds(logp);
            prop_assert!(lower <= 0.0 && 0.0 <= upper && upper <= -logp, "{lower} {upper}");
        }

        /// upper does not rise and lower does not fall in p.
        #[test]
        fn monotone_in_p(
            spec in any_spec(), delta in radius(), a in log_probability(), b in log_probability()
        ) {
            let (small, large) = (a.min(b), a.max(b));
            let band = band(spec, delta);
            let ((low_small, up_small), (low_large, up_large)) =
                (band.log_bounds(small), band.log_bounds(large));
            // Bounds are within 1e-14 of a monotone function, not monotone in their last bits.
            prop_assert!(up_large <= up_small * (1.0 + 2e-14), "{up_small} {up_large}");
            prop_assert!(low_large >= low_small * (1.0 + 2e-14), "{low_small} {low_large}");
        }

        #[test]
        fn nested_in_delta(
            spec in any_spec(), delta in radius(), more in 1.0..100.0_f64, logp in log_probability()
        ) {
            let (lower, upper) = band(spec, delta).log_bounds(logp);
            let (wider_lower, wider_upper) = band(spec, delta * more).log_bounds(logp);
            prop_assert!(wider_upper >= upper * (1.0 - 2e-14), "{upper} {wider_upper}");
            prop_assert!(wider_lower <= lower * (1.0 - 2e-14), "{lower} {wider_lower}");
        }

        /// The bound is in, and a log-ratio 3e-14 beyond it is out.
        #[test]
        fn contains_the_bounds_and_nothing_beyond(
            spec in any_spec(), delta in radius(), logp in log_probability()
        ) {
            let divergence = Divergence::parse(spec).unwrap();
            let (lower, upper) = band(spec, delta).log_bounds(logp);
            for bound in [lower, upper] {
                prop_assert!(is_inside(&divergence, logp, bound, delta), "{bound}");
            }
            if lower > f64::NEG_INFINITY {
                prop_assert!(!is_inside(&divergence, logp, lower * (1.0 + 3e-14), delta), "{lower}");
            }
            prop_assert!(!is_inside(&divergence, logp, upper * (1.0 + 3e-14), delta), "{upper}");
        }

        /// Closed forms agree with the general solver, which polishes what it found by iteration, where
        /// nothing saturates.
        #[test]
        fn closed_forms_agree_with_iteration(
            spec in prop::sample::select(CLOSED_FORMS.as_slice()),
            delta in radius(), logp in log_probability(), upper in any::<bool>()
        ) {
            let divergence = Divergence::parse(spec).unwrap();
            let generator = &divergence.generator;
            let side = if upper { Side::Upper } else { Side::Lower };
            let split = Split::new(logp, side);
            let edge = if upper { -logp } else { f64::NEG_INFINITY };
            if is_inside(&divergence, logp, edge, delta * 1.01) {
                return Ok(());
            }
            let radius = divergence.generator_radius::<f64>(delta);
            let bound_of = |m| split.log_ratio(generator, m, side).0;
            let closed = bound_of(split.closed_form(generator, radius).unwrap());
            let rough = bound_of(split.iterated(generator, radius, &mut 0));
            let farthest = if upper { edge.next_down() } else { -f64::MAX };
            let (general, _) = polish(&divergence, logp, delta, side, rough, farthest);
            prop_assert!((closed / general - 1.0).abs() < 1e-12, "{closed:e} {general:e}");
        }
    }

    /// Divergences whose bounds have a closed form.
    const CLOSED_FORMS: [&str; 14] = [
        "tv",
        "pearson-chi2",
        "neyman-chi2",
        "hellinger",
        "bhattacharyya",
        "le-cam",
        "vajda:1",
        "vajda:1.5",
        "vajda:4",
        "bwcs:0.3",
        "bwcs:0.99",
        "hockey-stick:1",
        "hockey-stick:1.2",
        "hockey-stick:4",
    ];

    #[test]
    fn every_closed_form_is_among_those_that_are_compared() {
        let family = |spec: &str| spec.split(':').next().unwrap().to_owned();
        for spec in SPECS {
            let generator = Divergence::parse(spec).unwrap().generator;
            let has_one = Split::new(-1.0, Side::Lower).closed_form(&generator, 0.05).is_some();
            let compared = CLOSED_FORMS.iter().any(|other| family(other) == family(spec));
            assert_eq!(has_one, compared, "{spec}");
        }
    }

    #[test]
    fn known_values_of_the_paper() {
        let anchors = [
            (0.01, 0.002497386, 7.809846),
            (0.1, 0.3127840, 2.200786),
            (0.5, 0.6915157, 1.308484),
            (0.99, 0.9312137, 1.010076),
        ];
        for (p, lower, upper) in anchors {
            let (log_lower, log_upper) = band("kl", 0.05).log_bounds(f64::ln(p));
            assert!((log_lower.exp() / lower - 1.0).abs() < 4e-7, "{p}");
            assert!((log_upper.exp() / upper - 1.0).abs() < 4e-7, "{p}");
        }
    }

    #[test]
    fn total_at_the_ends_of_the_line() {
        for spec in SPECS {
            let certain = Divergence::parse(spec).unwrap().generator.at_zero::<f64>().is_finite();
            for delta in [1e-12, 1e-4, 0.05, 3.0, 1e6] {
                let band = band(spec, delta);
                let (lower, upper) = band.log_bounds(f64::NAN);
                assert!(lower.is_nan() && upper.is_nan());
                assert_eq!(
                    band.log_bounds(7.5),
                    band.log_bounds(0.0),
                    "{spec}: above 0 is read as 0"
                );
                assert_eq!(band.bound(7.5, Side::Lower).status, Status::ReadAsCertain);
                assert_eq!(band.log_bounds(0.0).1, 0.0, "{spec}");
                let (lower, upper) = band.log_bounds(f64::NEG_INFINITY);
                assert_eq!((lower, upper), (f64::NEG_INFINITY, f64::INFINITY), "{spec}");
                for logp in [-5e-324, -1e-310, -1e-30, -300.0, -700.0, -740.0, -1e4, -1e300] {
                    let (lower, upper) = band.log_bounds(logp);
                    assert!(
                        lower <= 0.0 && upper >= 0.0 && upper <= -logp,
                        "{spec} {delta} {logp}"
                    );
                    if !certain {
                        assert!(upper < -logp && lower >= -f64::MAX, "{spec} {delta} {logp}");
                    }
                }
            }
        }
    }

    /// Text that says the same as a built-in agrees with it, everywhere.
    #[test]
    fn expressions_agree_with_built_ins() {
        let pairs = [
            ("kl", "-ln(u) + u - 1"),
            ("reverse-kl", "u*ln(u) - u + 1"),
            ("reverse-kl", "u*log(u)"),
            ("tv", "abs(u-1)/2"),
            ("pearson-chi2", "u^2 - 1"),
            ("neyman-chi2", "(u-1)**2/u"),
            ("hellinger", "1 - sqrt(u)"),
            ("le-cam", "(u-1)^2/(2*(u+1))"),
            ("jensen-shannon", "(u*ln(u) - (u+1)*ln((u+1)/2))/2"),
            ("jeffreys", "(u-1)*ln(u)"),
            ("alpha:3", "(u^3 - 1)/6"),
            ("alpha:-3", "(u^-3 - 1)/12"),
            ("hockey-stick:1.25", "max(u-1.25, 0)"),
        ];
        for (spec, text) in pairs {
            let divergence = Divergence::from_expression(text, None, None).unwrap();
            for delta in [1e-8, 1e-5, 1e-3, 0.05, 0.7, 5.0] {
                let custom = Band::new(divergence.clone(), delta, delta).unwrap();
                let built_in = band(spec, delta);
                for step in 0..150 {
                    let logp = -1e-16 * 1.33_f64.powi(step);
                    for side in [Side::Lower, Side::Upper] {
                        let (a, b) = (custom.bound(logp, side), built_in.bound(logp, side));
                        let (a, b) = (a.log_ratio, b.log_ratio);
                        assert!(
                            a == b || (a / b - 1.0).abs() <= 2e-14,
                            "{text} {delta:e} {logp:e} {side:?}: {a:e} {b:e}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn kinked_and_flat_bottomed_expressions() {
        // max of two convex functions: the band is the intersection of theirs, side by side where one
        // of the two is active all over; against halving of bits otherwise.
        for text in ["max((u-1)^2, abs(u-1))", "max(abs(u-1) - 0.1, 0)", "max(u-1.3, 0)"] {
            let divergence = Divergence::from_expression(text, None, None).unwrap();
            for delta in [1e-4, 0.05, 0.4] {
                let band = Band::new(divergence.clone(), delta, delta).unwrap();
                for p in [1e-6, 1e-3, 0.1, 0.4, 0.8, 0.99] {
                    let logp = f64::ln(p);
                    let radius = Dd::of(delta);
                    let generator = &divergence.generator;
                    for (side, outside) in [(Side::Lower, -1e3), (Side::Upper, -logp)] {
                        let actual = band.bound(logp, side).log_ratio;
                        let inside = |b| exact_residual(generator, logp, b, radius) <= 0.0;
                        if inside(outside) {
                            assert!(actual.abs() >= outside.abs(), "{text} {delta} {p} {side:?}");
                            continue;
                        }
                        let expected = last_inside(0.0_f64.copysign(outside), outside, inside).at;
                        assert!(
                            (actual / expected - 1.0).abs() < 1e-14,
                            "{text} {delta} {p} {side:?}: {actual:e} {expected:e}"
                        );
                    }
                }
            }
        }
    }

    /// The limits for p -> 1 and p -> 0 in closed form.
    #[test]
    fn limits() {
        let delta = 0.05_f64;
        let lower_of_certain = [
            ("kl", (-delta).exp()),
            ("tv", 1.0 - delta),
            ("hellinger", (1.0 - delta).powi(2)),
            ("le-cam", (1.0 - delta) / (1.0 + delta)),
            ("neyman-chi2", 1.0 / (1.0 + delta)),
            ("jensen-shannon", 0.863003923),
            ("pearson-chi2", 1.0),
            ("reverse-kl", 1.0),
            ("jeffreys", 1.0),
        ];
        for (spec, limit) in lower_of_certain {
            let band = band(spec, delta);
            let lower = band.log_bounds(0.0).0.exp();
            assert!((lower - limit).abs() < 1e-9, "{spec}: {lower} {limit}");
            // p upper(p) -> 1 - limit for p -> 0
            let new_p = (band.log_bounds(-600.0).1 - 600.0).exp();
            let slow = limit == 1.0; // as sqrt(p) or delta/ln(1/p)
            assert!(
                (new_p - (1.0 - limit)).abs() < if slow { 1e-3 } else { 1e-9 },
                "{spec}: {new_p}"
            );
        }
    }

    #[test]
    fn saturation_is_exact() {
        for (spec, p, delta) in
            [("tv", 0.3, 0.8), ("reverse-kl", 0.02, 0.05), ("hellinger", 0.5, 1.5)]
        {
            let (lower, _) = band(spec, delta).log_bounds(f64::ln(p));
            assert_eq!(lower, f64::NEG_INFINITY, "{spec}");
            let logp = f64::ln(1.0 - p);
            assert_eq!(band(spec, delta).log_bounds(logp).1, -logp, "{spec}");
            assert_eq!(band(spec, delta).bound(logp, Side::Upper).status, Status::Saturated);
        }
        // tv at delta = p exactly, in exact binary: D at r = 0 is p, so delta = p is in, less is not.
        let logp = -1.0_f64;
        let p = Dd::of(logp).exp();
        let (below, above) =
            if p.lo > 0.0 { (p.hi, p.hi.next_up()) } else { (p.hi.next_down(), p.hi) };
        assert!(band("tv", below).log_bounds(logp).0 > f64::NEG_INFINITY);
        assert_eq!(band("tv", above).log_bounds(logp).0, f64::NEG_INFINITY);
    }

    #[test]
    fn slopes_are_those_of_the_bounds() {
        for spec in SPECS {
            let band = band(spec, 0.05);
            for p in [1e-6, 1e-3, 0.03, 0.3, 0.6, 0.9] {
                let logp = f64::ln(p);
                for side in [Side::Lower, Side::Upper] {
                    let at = |logp: f64| band.bound(logp, side).log_ratio;
                    let slope = band.log_slope(logp, at(logp));
                    let (left, right) = (at(logp - 1e-6), at(logp + 1e-6));
                    if left == f64::NEG_INFINITY
                        || band.bound(logp, side).status == Status::Saturated
                    {
                        continue;
                    }
                    let measured = (right - left) / 2e-6;
                    assert!(
                        (slope - measured).abs() <= 1e-6 * (1.0 + measured.abs()) * 10.0,
                        "{spec} {p} {side:?}: {slope} {measured}"
                    );
                }
            }
        }
    }

    #[test]
    fn work_is_bounded() {
        let mut worst = 0;
        for spec in SPECS {
            for delta in [1e-12, 1e-8, 1e-3, 0.05, 0.7, 10.0, 1e3] {
                let band = band(spec, delta);
                for step in 1..400 {
                    let logp = -1e-17 * 1.11_f64.powi(step);
                    for side in [Side::Lower, Side::Upper] {
                        let bound = band.bound(logp, side);
                        worst = worst.max(bound.evaluations);
                    }
                }
            }
        }
        assert!(worst <= MOST_BOUND_EVALUATIONS, "{worst}");
    }

    /// Far outside the range of probabilities the bounds still are what 60 digits say.
    #[test]
    fn far_tails() {
        let le_cam = band("le-cam", 1.83e-10).log_bounds(-1.85e-313).0;
        assert!((le_cam / -3.66e-10 - 1.0).abs() < 1e-2, "{le_cam:e}");
        let le_cam = band("le-cam", 4.4457e-12).log_bounds(-725.62).1;
        assert!((le_cam - 700.18).abs() < 0.01, "{le_cam}");
        for spec in ["tv", "hellinger", "le-cam", "jensen-shannon", "alpha:0.5"] {
            for logp in [-1.44e30, -1e6, -800.0] {
                // Beyond the greatest value of the divergence everything is allowed.
                assert_eq!(band(spec, 4.1).log_bounds(logp), (f64::NEG_INFINITY, -logp), "{spec}");
            }
        }
    }

    #[test]
    fn bad_radii_are_refused_by_value_and_place() {
        let kl = Divergence::parse("kl").unwrap();
        for delta in [0.0, -1.0, f64::INFINITY, f64::NAN] {
            assert!(matches!(Band::new(kl.clone(), delta, 0.1), Err(Error::Delta { .. })));
        }
        let radii = [0.1, -2.0];
        let (mut lower, mut upper) = ([7.0; 2], [7.0; 2]);
        let each = Delta::Each(&radii);
        let refused = log_bounds(&kl, each, each, &[-1.0, -2.0], &mut lower, &mut upper);
        assert_eq!(refused, Err(Error::Delta { value: -2.0, index: Some(1) }));
        assert_eq!(lower, [7.0; 2], "nothing is written");
        let refused = log_bounds(&kl, each, each, &[-1.0], &mut lower[..1], &mut upper[..1]);
        assert!(matches!(refused, Err(Error::Length { argument: "delta_low", .. })));
    }
}
