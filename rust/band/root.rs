//! Bracketed roots of an increasing function of one positive variable.
//!
//! Both methods are total:
//!
//! - [`newton_log_log`] is Newton's method on `ln g` against `ln m`, where the functions of this crate are nearly
//!   straight lines. Each evaluation shrinks the bracket that contains it.
//! - [`last_inside`] halves the *bits* of a double, in at most 64 evaluations of any function. It serves the far tails.
//!
//! Python functions and CUDA have finders of their own, in `generator/solve.py` and `cuda/solve.cuh`.

/// A root and the cost of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Root {
    /// The root.
    pub at: f64,
    /// Evaluations of the function.
    pub evaluations: u32,
}

/// Max evaluations of [`newton_log_log`].
pub(crate) const MAX_EVALUATIONS: u32 = 100;

/// Max evaluations of [`last_inside`], one for each bit.
pub(crate) const MAX_HALVINGS: u32 = 64;

/// Max steps by more than a factor `e^0.5`. After them the bracket is halved instead (in `ln m`), because Newton's
/// method makes too little progress.
const MAX_LONG_STEPS: u32 = 5;

/// The `m > 0` with `g(m) = target > 0`, for an increasing `g` with `g(0) = 0`.
///
/// Ends after a step of at most `last_step`, relative to `m`. `evaluate(m)` returns `g(m)` and `d ln g / d ln m`.
/// An infinite or NaN `g` counts as too large.
pub(crate) fn newton_log_log(
    target: f64,
    start: f64,
    last_step: f64,
    mut evaluate: impl FnMut(f64) -> (f64, f64),
) -> Root {
    let (mut below, mut above) = (0.0_f64, f64::INFINITY);
    let mut m = start.clamp(f64::MIN_POSITIVE, f64::MAX);
    let (mut long_steps, mut expansion) = (0, 2.0_f64);
    for evaluations in 1..=MAX_EVALUATIONS {
        let (g, slope) = evaluate(m);
        if g <= target {
            below = below.max(m);
        } else {
            above = above.min(m);
        }
        // A slope that overflowed gives no step. Otherwise the step would be 0 and count as converged.
        let step = if slope.is_finite() { -(g / target).ln() / slope } else { f64::NAN };
        let candidate = m * step.exp();
        if step.abs() <= last_step {
            return Root { at: candidate, evaluations };
        }
        let previous = m;
        long_steps += u32::from(step.abs() > 0.5);
        m = if candidate > below && candidate < above && long_steps <= MAX_LONG_STEPS {
            candidate
        } else if below == 0.0 || above == f64::INFINITY {
            // Newton's method left the bracket or makes too little progress, and one end is unknown.
            expansion *= expansion;
            let factor = expansion.min(1e60);
            if g <= target { (m * factor).min(f64::MAX) } else { m / factor }
        } else {
            long_steps = long_steps.min(MAX_LONG_STEPS - 1); // after halving, one more Newton step
            below.sqrt() * above.sqrt()
        };
        if m == previous || m == below || m == above || m == 0.0 {
            return Root { at: m, evaluations };
        }
    }
    Root { at: m, evaluations: MAX_EVALUATIONS }
}

/// The last double on the way from `inside` to `outside` for which `holds` is true.
///
/// `holds(inside)` is taken as true and `holds(outside)` as false. Both have the same sign. The interval of bit
/// patterns is halved, in at most 64 evaluations.
pub(crate) fn last_inside(inside: f64, outside: f64, mut holds: impl FnMut(f64) -> bool) -> Root {
    let sign = f64::min(inside, outside).signum();
    let (mut good, mut bad) = (inside.abs().to_bits(), outside.abs().to_bits());
    let mut evaluations = 0;
    while good.abs_diff(bad) > 1 {
        let middle = good.midpoint(bad);
        evaluations += 1;
        if holds(sign * f64::from_bits(middle)) {
            good = middle;
        } else {
            bad = middle;
        }
    }
    Root { at: sign * f64::from_bits(good), evaluations }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newton_solves_powers_in_one_step_and_exponentials_in_few() {
        let root = newton_log_log(8.0, 1e-3, 3e-9, |m| (m * m * m, 3.0));
        assert!((root.at - 2.0).abs() < 1e-15 && root.evaluations <= 2, "{root:?}");
        let root = newton_log_log(1e100, 1e150, 3e-9, |m| (m.exp_m1(), m * m.exp() / m.exp_m1()));
        assert!((root.at - 1e100_f64.ln()).abs() < 1e-12, "{root:?}");
        assert!(root.evaluations < 40, "{root:?}");
    }

    #[test]
    fn newton_converges_past_a_kink_and_a_flat_bottom() {
        // g is 0 up to 1, m - 1 up to 4, and 3 beyond.
        let root = newton_log_log(0.5, 1e-8, 3e-9, |m| {
            let g = (m - 1.0).clamp(0.0, 3.0);
            (g, if g > 0.0 && g < 3.0 { m / g } else { 0.0 })
        });
        assert!((root.at - 1.5).abs() < 1e-12, "{root:?}");
    }

    #[test]
    fn halving_bits_ends_at_neighbouring_doubles() {
        let root = last_inside(0.0, f64::MAX, |x| x * x <= 2.0);
        assert!(root.at * root.at <= 2.0 && root.at.next_up() * root.at.next_up() > 2.0);
        assert!(root.evaluations <= 64);
        let root = last_inside(-1.0, -1e300, |x| x >= -3.5);
        assert_eq!(root.at, -3.5);
    }
}
