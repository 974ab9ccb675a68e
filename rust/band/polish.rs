//! Correction of ill-conditioned bounds, on a residual in double-double arithmetic.

use crate::band::exact::ExactSplit;
use crate::band::root::last_inside;
use crate::band::side::Side;
use crate::band::split::Split;
use crate::divergence::{Divergence, Generator};
use crate::number::{Dd, Real};

/// Corrects a rough bound on the exact residual, and moves it inwards by single ulps until it is inside.
/// Returns the bound and the number of evaluations.
pub(super) fn polish(
    divergence: &Divergence,
    logp: f64,
    delta: f64,
    side: Side,
    rough: f64,
) -> (f64, u32) {
    let generator = &divergence.generator;
    let radius = divergence.generator_radius::<Dd>(delta);
    let exact = ExactSplit::<Dd>::new(logp);
    let residual_at = |b: f64| (exact.divergence(generator, b) - radius).to_f64();
    let last = side.last_before_end(logp);
    let valid = |b: f64| side.spans(last, b);
    let doubt = residual_doubt(generator, radius.hi);
    let mut evaluations = 0;
    // Next to saturation of the lower side, D is just below its value at r = 0. There Newton's method converges on
    // the logarithm of the difference; elsewhere it runs on D.
    let saturates = side == Side::Lower && generator.saturates();
    let mut missing = None;
    let mut log_ratio = if valid(rough) && rough > -1e3 {
        rough
    } else if saturates {
        evaluations += 1;
        let missing = *missing.insert(residual_at(Side::Lower.end(logp)));
        (missing / delta).min(0.5).ln()
    } else {
        0.5_f64.ln()
    };
    let mut converged = false;
    for _ in 0..MAX_POLISHING {
        if !valid(log_ratio) {
            break;
        }
        evaluations += 1;
        let residual = residual_at(log_ratio);
        let (slope, leverage) = residual_slope(generator, logp, log_ratio);
        if !slope.is_finite() {
            break; // any bound would seem to be a root
        }
        let newton = -residual / slope;
        let change = (newton * leverage).abs();
        if newton.abs() <= SHORT_STEP * log_ratio.abs() && change < MAX_CHANGE {
            let relative = SHORT_STEP_ERROR + CHANGE_ERROR * change;
            let error = relative * newton.abs() + 2.0 * doubt / slope.abs();
            if let Some(inside) = last_before(log_ratio, newton, error, side).filter(|&b| valid(b))
            {
                // A text may have a kink within the step.
                let is_smooth = !matches!(generator, Generator::Expression(_));
                if is_smooth || residual_at(inside) <= doubt {
                    return (inside, evaluations + u32::from(!is_smooth));
                }
                break;
            }
        }
        let step = if saturates {
            let missing = *missing.get_or_insert_with(|| {
                evaluations += 1;
                residual_at(Side::Lower.end(logp))
            });
            (missing - residual) * (-residual / missing).ln_1p() / slope
        } else {
            newton
        };
        log_ratio += step;
        if step.abs() <= LAST_POLISHING_STEP * log_ratio.abs() {
            converged = valid(log_ratio);
            break;
        }
    }
    let mut inwards = 0;
    while converged && inwards < MAX_INWARDS {
        evaluations += 1;
        if residual_at(log_ratio) <= -doubt {
            return (log_ratio, evaluations);
        }
        log_ratio = side.inwards(log_ratio);
        inwards += 1;
    }
    let root = last_inside(side.zero(), side.end(logp), |b| residual_at(b) <= -doubt);
    (root.at, evaluations + root.evaluations)
}

/// Relative error of `D` in double-double arithmetic, rounded up. A residual below its negative is inside.
pub(super) const RESIDUAL_ERROR: f64 = 1e-29;

/// The error of a `D` next to a radius. The error of terms that cancel does not shrink with `D`.
pub(super) fn residual_doubt(generator: &Generator, radius: f64) -> f64 {
    RESIDUAL_ERROR * (radius + generator.cancelled(radius))
}

/// Max Newton steps on the exact residual.
pub(super) const MAX_POLISHING: u32 = 12;

/// Relative step after which Newton's method on the exact residual has converged.
pub(super) const LAST_POLISHING_STEP: f64 = 1e-9;

/// Max relative step of Newton's method whose relative error is [`SHORT_STEP_ERROR`]. The slope is accurate to
/// `|log_ratio|` eps, and changes by at most a few times that over the step.
pub(super) const SHORT_STEP: f64 = 1e-12;

/// Relative error of a step of [`SHORT_STEP`], rounded up.
pub(super) const SHORT_STEP_ERROR: f64 = 1e-8;

/// Max relative change of the others' ratio by such a step. Next to the end of the upper side it changes much more than
/// the bound.
pub(super) const MAX_CHANGE: f64 = 1e-2;

/// Relative error of the step for a relative change of 1 in the others, rounded up. It is half of the order of f where
/// f is a power.
pub(super) const CHANGE_ERROR: f64 = 32.0;

/// The last double on the inner side of the root `at + step`, whose error is `doubt`. `None` if the error leaves
/// it undecided.
pub(super) fn last_before(at: f64, step: f64, doubt: f64, side: Side) -> Option<f64> {
    let root = Dd::sum(at, step);
    let inwards = side.inwards(root.hi);
    // Distance of the root beyond its nearest double, positive outwards.
    let beyond = side.outward(root.lo);
    if beyond > doubt {
        Some(root.hi)
    } else if (root.hi - inwards).abs() + beyond > doubt {
        Some(inwards)
    } else {
        None
    }
}

/// Max single ulps inwards after the Newton steps.
pub(super) const MAX_INWARDS: u32 = 16;

/// `dD/d log_ratio` in double precision, and the relative change of the others' ratio for a change of `log_ratio`.
fn residual_slope(generator: &Generator, logp: f64, log_ratio: f64) -> (f64, f64) {
    let split = Split::new(logp, Side::Lower);
    let (token, others) = split.outcomes(logp, log_ratio);
    let own = if token.u > 1.0 {
        split.shrinking * token.u * generator.slope(token)
    } else {
        split.shrinking * generator.log_slope(token)
    };
    let slope = own - split.shrinking * token.u * (generator.log_slope(others) / others.u);
    (slope, split.shrinking / split.growing * token.u / others.u)
}
