//! The two outcomes {this token, everything else} in double precision, and the equation of a bound.

use crate::band::root::newton_log_log;
use crate::band::side::Side;
use crate::divergence::{Divergence, Generator, Point};
use crate::number::Real;

/// The probabilities of the two outcomes.
pub(super) struct Split {
    pub(super) shrinking: f64,
    pub(super) growing: f64,
}

impl Split {
    pub(super) fn new(logp: f64, side: Side) -> Self {
        let (shrinking, growing) = side.shrinking_and_growing(logp.exp(), -logp.exp_m1());
        Self { shrinking, growing }
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

    /// `m` to a few ulp times its condition number. The side must not be saturated.
    pub(super) fn magnitude(
        &self,
        divergence: &Divergence,
        delta: f64,
        evaluations: &mut u32,
    ) -> f64 {
        let generator = &divergence.generator;
        let radius = divergence.generator_radius::<f64>(delta);
        if let Some(m) = self.closed_form(generator, radius) {
            return m;
        }
        self.iterated(generator, radius, evaluations)
    }

    /// `m` by iteration, for any generator.
    pub(super) fn iterated(
        &self,
        generator: &Generator,
        radius: f64,
        evaluations: &mut u32,
    ) -> f64 {
        let at_zero = generator.constants::<f64>().at_zero;
        if at_zero.is_finite() {
            let max_divergence = self.shrinking * at_zero
                + self.growing * generator.value(Point::from_ratio(1.0 / self.growing));
            if radius > 0.5 * max_divergence {
                return self.magnitude_near_saturation(
                    generator,
                    radius,
                    max_divergence,
                    evaluations,
                );
            }
        }
        // The local quadratic starts far too high for an f that grows at 0 as u^a. Its tail limits the start.
        let curvature = generator.constants::<f64>().curvature.unwrap_or(1.0);
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

    /// `m = -ln r` from the other end, by `D(0) - D(r) = D(0) - delta` for the remaining factor `r`.
    fn magnitude_near_saturation(
        &self,
        generator: &Generator,
        radius: f64,
        max_divergence: f64,
        evaluations: &mut u32,
    ) -> f64 {
        let gap = (max_divergence - radius).max(f64::EPSILON * max_divergence);
        let start = (gap / (max_divergence * (2.0 + (max_divergence / gap).ln()))).min(0.5);
        let root = newton_log_log(gap, start, last_step(generator, gap), |r| {
            if r >= 1.0 {
                return (f64::INFINITY, 1.0);
            }
            let (d, log_slope) = self.divergence(generator, -r.ln());
            let left = max_divergence - d;
            // d ln left / d ln r, with d m = -d ln r.
            (left, log_slope * d / (-r.ln() * left))
        });
        *evaluations += root.evaluations;
        -root.at.min(1.0).ln()
    }

    /// The bound at `m`, and its condition number: the factor by which the equation amplifies rounding errors in
    /// double precision.
    pub(super) fn log_ratio(&self, generator: &Generator, m: f64, side: Side) -> (f64, f64) {
        let (d, slope) = self.divergence(generator, m);
        let lost = -(-m).exp_m1();
        let growth = self.shrinking / self.growing * lost;
        // Relative change of D for a relative error of 1 in the odds.
        let grown = Point::from_excess(growth);
        let odds_error = self.growing * growth * generator.slope(grown) / d;
        let mut condition = (1.0 + odds_error.abs()) / slope;
        if let Generator::Vajda(order) = *generator {
            condition *= order; // an ulp of the lost share, which is a root, is that many of D
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

    /// `m` in closed form, where there is one. Its terms cancel only next to saturation.
    pub(super) fn closed_form(&self, generator: &Generator, radius: f64) -> Option<f64> {
        let (w, g) = (self.shrinking, self.growing);
        match *generator {
            Generator::Tv => Some(-(-radius / w).ln_1p()),
            Generator::Hellinger => {
                // The Bhattacharyya coefficient is the cosine of an angle, which gives sqrt(r) = 1 - e.
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

/// Relative step at which Newton's method stops. The error after it is of the order of its square, 1e-17.
const LAST_NEWTON_STEP: f64 = 3e-9;

/// Relative step at which it stops for an expression, whose bounds are polished afterwards.
const LAST_TEXT_STEP: f64 = 1e-5;

/// Error of `D` for an expression, relative to the size of its terms and rounded up. Smaller relative steps than its
/// share of `D` are noise.
pub(super) const TEXT_ERROR: f64 = 100.0 * f64::EPSILON;

/// The relative step at which Newton's method on `D = target` stops.
fn last_step(generator: &Generator, target: f64) -> f64 {
    if generator.cancels() {
        (TEXT_ERROR * generator.cancelled(target) / target).max(LAST_TEXT_STEP)
    } else {
        LAST_NEWTON_STEP
    }
}

/// `x^(1/k)`. A Newton step follows, because rounding 1/k alone costs `ln x` ulps.
fn root_of_order(x: f64, order: f64) -> f64 {
    let root = x.powf(1.0 / order);
    let correction = (root.powf(order) / x - 1.0) / order;
    // A saturated or denormal x gives no correction.
    if correction.abs() < 1e-10 { root - root * correction } else { root }
}

/// `m` for `(u-1)^2/(1-l+l u)`, by a quadratic equation for the lost fraction.
fn blended_chi_square(w: f64, g: f64, blend: f64, radius: f64) -> f64 {
    let spread = radius * blend * blend;
    // Factor by factor, because the product of a small radius and a small g would be denormal.
    let root = radius.sqrt() * (spread + 4.0 * w * g).sqrt();
    let tilt = radius * blend * (g - w);
    // The roots are minus the fraction that the outcome loses, and the fraction that it may gain.
    let (lost, gained) = if tilt >= 0.0 {
        (2.0 * radius * (g / (root + tilt)), (root + tilt) / (2.0 * w * (1.0 + spread)))
    } else {
        ((root - tilt) / (2.0 * w * (1.0 + spread)), 2.0 * radius * (g / (root - tilt)))
    };
    if lost < 0.5 {
        return -(-lost).ln_1p();
    }
    // The remainder, by the product of the roots, because 1 - lost would cancel.
    let product = (w - radius * (1.0 - blend) * (g + w * blend)) / (w * (1.0 + spread));
    -(product / (1.0 + gained)).ln()
}

/// `f(u)`, or `f(0)` for an outcome that is [`gone`].
pub(super) fn value_or_limit<T: Real>(generator: &Generator, at: Point<T>) -> T {
    if at.u.to_f64() == 0.0 && at.log.to_f64() == f64::NEG_INFINITY {
        generator.constants().at_zero
    } else {
        generator.value(at)
    }
}

/// `w f(u)`, evaluated as `(w u) (f(u)/u)` where `f(u)` might overflow.
pub(super) fn weighted<T: Real>(generator: &Generator, weight: T, at: Point<T>) -> T {
    if at.u.to_f64() > 1e60 {
        weight * at.u * generator.value_per_u(at)
    } else {
        weight * value_or_limit(generator, at)
    }
}

/// An outcome that has lost all of its probability.
pub(super) fn gone<T: Real>() -> Point<T> {
    Point { log: T::of(f64::NEG_INFINITY), excess: T::of(-1.0), u: T::of(0.0) }
}

/// `d log bound / d logp = -B(r, c) / (r (f'(r) - f'(c)))` with the Bregman divergence
/// `B(r, c) = f(r) - f(c) - f'(c)(r - c)`.
pub(super) fn log_slope(generator: &Generator, logp: f64, log_bound: f64) -> f64 {
    if logp >= 0.0 || log_bound == Side::Lower.end(logp) || log_bound == 0.0 {
        return 0.0;
    }
    if log_bound >= Side::Upper.end(logp) {
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
    pub(super) fn outcomes(&self, logp: f64, log_ratio: f64) -> (Point<f64>, Point<f64>) {
        let token = Point::from_log(log_ratio);
        let lost = self.shrinking / self.growing * token.excess;
        let others = if lost > 0.5 {
            // Next to saturation the ratio of the others is computed without cancellation.
            Point::from_ratio(-(logp + log_ratio).exp_m1() / self.growing)
        } else {
            Point::from_excess(-lost)
        };
        (token, others)
    }
}
