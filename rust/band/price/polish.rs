//! Bounds of a price that double precision leaves open, by a residual in double-double arithmetic.

use super::equation::{Equation, Excess, Places};
use crate::band::polish::{
    LAST_POLISHING_STEP, MAX_INWARDS, MAX_POLISHING, SHORT_STEP, SHORT_STEP_ERROR, last_before,
};
use crate::band::root::{Root, last_inside};
use crate::band::side::Side;
use crate::divergence::Generator;
use crate::number::Dd;

/// Error of a price in double-double arithmetic, relative to the terms it is the sum of, rounded up.
const PRICE_ERROR: f64 = 2e-29;

/// The error of a few terms below the smallest double.
const LOST: f64 = 64.0 * 5e-324;

/// The price less the given one with about 30 digits, rounded once, and the error that it may have.
pub(super) fn exact_residual(
    generator: &Generator,
    equation: &Equation,
    places: &Places<Dd>,
    side: Side,
    log_ratio: f64,
) -> (f64, f64) {
    let (token, others) = places.outcomes(log_ratio);
    let Excess { value, size } = equation.excess(generator, side, token, others);
    let doubt = if size.is_finite() { PRICE_ERROR * size + LOST } else { 0.0 };
    (value.hi + value.lo, doubt)
}

/// True if a log-ratio is inside for sure.
fn is_inside(
    generator: &Generator,
    equation: &Equation,
    places: &Places<Dd>,
    side: Side,
    b: f64,
) -> bool {
    let (residual, doubt) = exact_residual(generator, equation, places, side, b);
    residual <= -doubt
}

/// Corrects a rough bound on the exact residual and moves it inwards by single ulps until it is inside; see
/// [`crate::band::polish::polish`].
pub(super) fn polish(
    generator: &Generator,
    equation: &Equation,
    logp: f64,
    side: Side,
    rough: f64,
) -> (f64, u32) {
    let places = Places::new(logp);
    let residual_at = |b: f64| exact_residual(generator, equation, &places, side, b);
    let last = side.last_before_end(logp);
    let valid = |b: f64| side.spans(last, b);
    // Next to saturation of the lower side, the price stays just below its value at r = 0, and Newton's method
    // converges on the logarithm of what is missing.
    let end = if side == Side::Lower && equation.at_zero.hi.is_finite() {
        Some(residual_at(f64::NEG_INFINITY).0)
    } else {
        None
    };
    // Next to the end of the upper side, what is left of the others changes over the distance to it.
    let span = |b: f64| match side {
        Side::Upper => b.min(-logp - b),
        Side::Lower => -b,
    };
    let mut evaluations = u32::from(end.is_some());
    let mut log_ratio = rough;
    let mut converged = false;
    for _ in 0..MAX_POLISHING {
        if !valid(log_ratio) {
            break;
        }
        evaluations += 1;
        let (residual, doubt) = residual_at(log_ratio);
        let slope = slope_at(generator, logp, side, log_ratio);
        let newton = -residual / slope;
        if newton.abs() <= SHORT_STEP * span(log_ratio) {
            let doubt = SHORT_STEP_ERROR * newton.abs() + 2.0 * doubt / slope.abs();
            if let Some(inside) = last_before(log_ratio, newton, doubt, side).filter(|&b| valid(b))
            {
                return (inside, evaluations);
            }
        }
        let step = match end {
            Some(missing) => (missing - residual) * (-residual / missing).ln_1p() / slope,
            None => newton,
        };
        log_ratio += step;
        if step.abs() <= LAST_POLISHING_STEP * span(log_ratio) {
            converged = valid(log_ratio);
            break;
        }
    }
    let inside = |b: f64| is_inside(generator, equation, &places, side, b);
    let mut inwards = 0;
    while converged && inwards < MAX_INWARDS {
        evaluations += 1;
        if inside(log_ratio) {
            return (log_ratio, evaluations);
        }
        log_ratio = side.inwards(log_ratio);
        inwards += 1;
    }
    let root = last_inside(side.zero(), side.end(logp), inside);
    (root.at, evaluations + root.evaluations)
}

/// The last log-ratio that is inside, by halving bits; for tails and limits.
pub(super) fn last_inside_exactly(
    generator: &Generator,
    equation: &Equation,
    logp: f64,
    side: Side,
) -> Root {
    let places = Places::new(logp);
    last_inside(side.zero(), side.end(logp), |b| is_inside(generator, equation, &places, side, b))
}

/// The slope of the price of a side in the log-ratio.
fn slope_at(generator: &Generator, logp: f64, side: Side, log_ratio: f64) -> f64 {
    let places = Places::<f64>::new(logp);
    let (token, others) = places.outcomes(log_ratio);
    let slope = generator.bend(token) + generator.bend(others) / others.u * (places.odds * token.u);
    side.outward(slope)
}
