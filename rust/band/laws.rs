//! Laws: solutions of the equation of a bound on vectors, one for each divergence.

// A function of vectors has to become part of one that is compiled for their instructions.
#![allow(clippy::inline_always)]

use crate::band::powers::{self, Alpha, Vajda};
use crate::divergence::Generator;
use crate::simd::doubles::{Doubles, Truth, Vector};

/// Max evaluations of `D`. Lanes that have not converged by then are left to the scalar solver.
const MAX_STEPS: u32 = 6;

/// Step relative to `m` after which the error of Halley's method is below 1e-17.
const LAST_STEP: f64 = 3e-6;

/// Max relative distance of `D` from the radius after a step of at most [`LAST_STEP`].
const MAX_OFF: f64 = 0.01;

/// Max `D` at the end of a side. A larger or infinite one is taken for this.
pub(super) const MAX_DIVERGENCE: f64 = 1e300;

/// Min `ln` of a factor that is not taken as 0. A smaller factor changes no sum, and its square would be denormal, on
/// which arithmetic is slow.
const MIN_LOG: f64 = -300.0;

/// Work under the law of a generator.
pub(super) trait WithLaw {
    /// Result of the work.
    type Output;
    /// Does the work under a law.
    fn run(self, law: impl Law) -> Self::Output;
    /// Handles a generator without a law, which is left to the scalar solver.
    fn scalar(self) -> Self::Output;
}

/// Does the work under the law of a generator, if it has one.
#[deny(clippy::wildcard_enum_match_arm)]
pub(super) fn with_law<W: WithLaw>(generator: &Generator, work: W) -> W::Output {
    match *generator {
        Generator::Kl => work.run(Iterated(Kl)),
        Generator::ReverseKl => work.run(Iterated(ReverseKl)),
        Generator::JensenShannon => work.run(Iterated(JensenShannon)),
        Generator::Jeffreys => work.run(Iterated(Jeffreys)),
        Generator::Tv => work.run(Linear { flat: 0.0, rate: 1.0, grown: 0.5 }),
        Generator::Vajda(1.0) => work.run(Linear { flat: 0.0, rate: 2.0, grown: 0.5 }),
        Generator::HockeyStick(threshold) => {
            work.run(Linear { flat: threshold - 1.0, rate: 1.0, grown: 1.0 })
        }
        Generator::Hellinger => work.run(Hellinger { times: 1.0 }),
        Generator::Alpha(0.5) => work.run(Hellinger { times: 4.0 }),
        Generator::Vajda(2.0) => work.run(ChiSquare { blend: 0.0, scale: 1.0 }),
        Generator::Alpha(2.0) => work.run(ChiSquare { blend: 0.0, scale: 2.0 }),
        Generator::Alpha(-1.0) => work.run(ChiSquare { blend: 1.0, scale: 2.0 }),
        Generator::Bwcs(blend) => work.run(ChiSquare { blend, scale: 1.0 }),
        Generator::LeCam => work.run(ChiSquare { blend: 0.5, scale: 4.0 }),
        Generator::Alpha(order) if !powers::is_vector_order(order) => work.scalar(),
        Generator::Alpha(order) if powers::is_adjoint(order) => {
            work.run(Iterated(Alpha::<true>::new(order)))
        }
        Generator::Alpha(order) => work.run(Iterated(Alpha::<false>::new(order))),
        Generator::Vajda(order) if Vajda::is_vector_order(order) => work.run(Vajda { order }),
        Generator::Vajda(_) | Generator::Expression(_) => work.scalar(),
    }
}

/// The probabilities of the two outcomes, and their odds.
pub(super) struct Split<L: Doubles> {
    pub(super) shrinking: Vector<L>,
    pub(super) growing: Vector<L>,
    pub(super) odds: Vector<L>,
}

/// The point at which `D` is the radius.
pub(super) struct Solution<L: Doubles> {
    /// Remaining factor of the outcome that shrinks.
    pub(super) left: Vector<L>,
    /// `ln left`
    pub(super) log_left: Vector<L>,
    /// Factor by which the other outcome grows.
    pub(super) growth: Vector<L>,
    /// `ln growth`
    pub(super) log_growth: Vector<L>,
    /// Change of `log_left` for a relative change of 1 in `D`.
    pub(super) condition: Vector<L>,
    /// True where the other fields are the solution.
    pub(super) found: Truth<L>,
}

/// Solver of the equation for a divergence.
pub(super) trait Law: Copy {
    /// `D` where the shrinking outcome vanishes; `None` if it is infinite.
    fn max_divergence<L: Doubles>(self, split: &Split<L>) -> Option<Vector<L>>;
    /// Size of the terms that cancel in [`Self::max_divergence`].
    #[inline(always)]
    fn cancelled<L: Doubles>(self, split: &Split<L>) -> Vector<L> {
        split.growing.constant(0.0)
    }
    /// Solves `D = radius`, for a radius below [`Self::max_divergence`].
    fn solve<L: Doubles>(self, split: &Split<L>, radius: Vector<L>) -> Solution<L>;
}

/// `(1 + |relative change of D by rounding the odds|) D/slope`, where `slope` is that of `D` against `-log_left`.
#[inline(always)]
fn condition<L: Doubles>(
    split: &Split<L>,
    d: Vector<L>,
    slope: Vector<L>,
    gain: Vector<L>,
    slope_of_grown: Vector<L>,
) -> Vector<L> {
    (split.growing * gain).mul_add(slope_of_grown, d) / slope
}

/// A generator without a closed form.
pub(super) trait Curve: Copy {
    /// True if f or its derivatives may overflow at an ordinary token.
    const STEEP: bool = false;
    /// `f(0)`, infinite for some.
    fn at_zero(self) -> f64;
    /// f and its derivatives.
    fn at<L: Doubles>(self, point: Point<L>) -> Values<L>;
    /// Approximate `m`, from which the iteration starts.
    fn start<L: Doubles>(self, split: &Split<L>, radius: Vector<L>) -> Vector<L>;
}

/// An argument `u` of a generator.
#[derive(Clone, Copy)]
pub(super) struct Point<L: Doubles> {
    pub(super) u: Vector<L>,
    /// `ln u`
    pub(super) log: Vector<L>,
    /// What rounding took from `log`.
    pub(super) low: Vector<L>,
    /// `u - 1`
    pub(super) excess: Vector<L>,
    /// `u - 1 - ln u`
    pub(super) gap: Vector<L>,
}

impl<L: Doubles> Point<L> {
    #[inline(always)]
    pub(super) fn from_log(log: Vector<L>) -> Self {
        let clamped = log.max(log.constant(MIN_LOG));
        let power = clamped.exponential();
        let u = log.less(clamped).select(log.constant(0.0), power.u);
        let low = log.constant(0.0);
        Self { u, log, low, excess: power.excess, gap: power.gap + (clamped - log) }
    }
    #[inline(always)]
    fn from_excess(excess: Vector<L>) -> Self {
        let log = excess.log_1p();
        let u = excess + excess.constant(1.0);
        Self { u, log: log.log, low: log.low, excess, gap: log.gap }
    }
}

/// A generator and its derivatives at a point.
pub(super) struct Values<L: Doubles> {
    /// `f(u)`
    pub(super) value: Vector<L>,
    /// `u f'(u)`
    pub(super) slope: Vector<L>,
    /// `u^2 f''(u)`
    pub(super) curvature: Vector<L>,
}

/// Halley's method on `ln D` against `ln m`.
#[derive(Clone, Copy)]
struct Iterated<C>(C);

impl<C: Curve> Law for Iterated<C> {
    #[inline(always)]
    fn max_divergence<L: Doubles>(self, split: &Split<L>) -> Option<Vector<L>> {
        // Not a closure, because one would not be compiled for the instructions of the vectors.
        let at_zero = self.0.at_zero();
        if at_zero == f64::INFINITY {
            return None;
        }
        let grown = self.0.at(Point::from_excess(split.odds)).value;
        let end = split.growing.mul_add(grown, split.shrinking * at_zero);
        Some(if C::STEEP { end.min(end.constant(MAX_DIVERGENCE)) } else { end })
    }

    #[inline(always)]
    fn solve<L: Doubles>(self, split: &Split<L>, radius: Vector<L>) -> Solution<L> {
        let per_radius = radius.constant(1.0) / radius;
        let mut m = self.0.start(split, radius);
        let mut steps = 0;
        loop {
            let shrunk = Point::from_log(-m);
            let gain = -(split.odds * shrunk.excess);
            let grown = Point::from_excess(gain);
            let (low, high) = (self.0.at(shrunk), self.0.at(grown));
            let d = split.growing.mul_add(high.value, split.shrinking * low.value);
            let per_growth = radius.constant(1.0) / grown.u;
            let slope_of_grown = high.slope * per_growth;
            let slope = split.shrinking * (shrunk.u * slope_of_grown - low.slope);
            let ratio = shrunk.u * per_growth;
            let bend = split.odds * ratio * ratio;
            let bend = split.shrinking * bend.mul_add(high.curvature, low.curvature);
            // With rho = D/radius, its order s = sigma/rho in m changes with ln m by
            // s - s^2 + m^2 D''/D = change/rho^2. A step takes one division, because divisions are slow.
            let off = (d - radius) * per_radius;
            let rho = off + radius.constant(1.0);
            let sigma = slope * m * per_radius;
            let more = (bend - slope) * m * (m * per_radius);
            let change = sigma.mul_add(rho - sigma, rho * more);
            // log_off/scale is ln(rho) to fifth order. Far from 1 it has at least the sign of ln(rho).
            let log_off = off * 3.0 * (off + radius.constant(2.0));
            let scale = off.mul_add(off + radius.constant(6.0), radius.constant(6.0));
            // The step is rise/run.
            let square = sigma * sigma * scale;
            let run = (square * 2.0 - log_off * change).max(square);
            let rise = -(log_off * sigma * rho * 2.0);
            let mut converged = rise.abs().less(run * LAST_STEP);
            if C::STEEP {
                // Far below the radius rho rounds to 0, and with it the step. An infinite run, of a curvature that
                // overflowed, would seem to have converged too.
                let near = off.abs().less(radius.constant(MAX_OFF));
                converged = converged & near & run.less(radius.constant(f64::MAX));
            }
            steps += 1;
            if steps == MAX_STEPS || !(!converged).any() {
                let step = rise / run;
                let more = m * (step * step).mul_add(radius.constant(0.5), step);
                let lost_more = (more * more).mul_add(radius.constant(-0.5), more);
                let growth_more = split.odds * ratio * lost_more;
                let series = growth_more.mul_add(radius.constant(1.0 / 3.0), radius.constant(-0.5));
                let log_growth =
                    (growth_more * growth_more).mul_add(series, growth_more) + grown.log;
                return Solution {
                    left: shrunk.u,
                    log_left: -(m + more),
                    growth: grown.u,
                    log_growth,
                    condition: condition(split, d, slope, gain, slope_of_grown),
                    found: converged,
                };
            }
            // e^step to fourth order, with the step clamped to 2.
            let max_rise = run * 2.0;
            let rise = rise.min(max_rise).max(-max_rise);
            let even = rise.mul_add(rise, run * run * 12.0);
            let odd = rise * run * 6.0;
            m = converged.select(m, m * (even + odd) / (even - odd));
        }
    }
}

#[derive(Clone, Copy)]
struct Kl;

/// Fit of the start of [`Kl`], by `tools/make_constants.py`.
const KL_START: [f64; 3] = [0.424, 0.409, 0.235];

impl Curve for Kl {
    fn at_zero(self) -> f64 {
        f64::INFINITY
    }

    #[inline(always)]
    fn at<L: Doubles>(self, point: Point<L>) -> Values<L> {
        Values { value: point.gap, slope: point.excess, curvature: point.u.constant(1.0) }
    }

    /// `m` within 0.5 %, see docs/numerics.md. Its square is `y^2 + 2 g y` at both ends, where the radius is
    /// `w (m - 1)` or `w m^2 / 2g`. The remainder is of third order next to 0, and fitted in between.
    #[inline(always)]
    fn start<L: Doubles>(self, split: &Split<L>, radius: Vector<L>) -> Vector<L> {
        let fit = KL_START;
        let y = radius / split.shrinking;
        let square = y * split.growing * 2.0;
        let third = y.constant(2.0 / 3.0).mul_add(split.shrinking, y.constant(2.0 / 3.0));
        let rate = y.mul_add(y.constant(fit[0]), y.constant(fit[1]));
        let fall = square.mul_add(rate, y.mul_add(y.constant(fit[2]), square.sqrt()));
        (third * y).mul_add(square / fall, y.mul_add(y, square)).sqrt()
    }
}

#[derive(Clone, Copy)]
pub(super) struct ReverseKl;

/// Fits of the start of [`ReverseKl`], by `tools/make_constants.py`.
const REVERSE_KL_NUMERATOR: [f64; 4] = [5.2662e-5, 0.0163546, 0.326014, 1.0];
const REVERSE_KL_DENOMINATOR: [f64; 3] = [0.00117282, 0.160436, 1.0];
const REVERSE_KL_FALL: [f64; 2] = [0.0647, 0.0722];

impl Curve for ReverseKl {
    fn at_zero(self) -> f64 {
        1.0
    }

    #[inline(always)]
    fn at<L: Doubles>(self, point: Point<L>) -> Values<L> {
        let Point { u, log, excess, gap, .. } = point;
        let near = gap.less(u.constant(0.125));
        // Around 1, u ln u and u - 1 cancel.
        let value = near.select(excess.mul_add(excess, -(u * gap)), u.mul_add(log, -excess));
        Values { value, slope: u * log, curvature: u }
    }

    /// `m` within 2.2 % up to half of saturation. The lost share is `q` for small radii. For larger ones it follows
    /// from the gain `v` of the other outcome, where `(1+v) ln(1+v) - v` is about the radius times the odds. The fits
    /// are rational.
    #[inline(always)]
    fn start<L: Doubles>(self, split: &Split<L>, radius: Vector<L>) -> Vector<L> {
        let fit = REVERSE_KL_FALL;
        let q = (radius * 2.0 / split.odds).sqrt();
        let s = q * split.odds;
        let numerator = s.polynomial(&REVERSE_KL_NUMERATOR);
        let denominator = s.polynomial(&REVERSE_KL_DENOMINATOR);
        let one = s.constant(1.0);
        let rate = s.constant(fit[0]).mul_add(s / (s + one), s.constant(fit[1]));
        let fall = q.mul_add(q.mul_add(rate, s.constant(1.0 / 6.0)), one);
        log_loss(q * numerator / (denominator * fall))
    }
}

/// `-ln(1 - x)` for a lost share `x`, which is clamped to 0.99.
#[inline(always)]
fn log_loss<L: Doubles>(lost: Vector<L>) -> Vector<L> {
    -(-lost.min(lost.constant(0.99))).log_1p().log
}

#[derive(Clone, Copy)]
struct Jeffreys;

impl Curve for Jeffreys {
    fn at_zero(self) -> f64 {
        f64::INFINITY
    }

    #[inline(always)]
    fn at<L: Doubles>(self, point: Point<L>) -> Values<L> {
        let Point { u, log, excess, .. } = point;
        Values {
            value: excess * log,
            slope: u.mul_add(log, excess),
            curvature: u + u.constant(1.0),
        }
    }

    #[inline(always)]
    fn start<L: Doubles>(self, split: &Split<L>, radius: Vector<L>) -> Vector<L> {
        let y = radius / split.shrinking;
        (y * (y + split.growing)).sqrt()
    }
}

#[derive(Clone, Copy)]
struct JensenShannon;

/// Fit of the start of [`JensenShannon`], by `tools/make_constants.py`.
const JENSEN_SHANNON_START: [f64; 7] = [0.883, 3.145, 0.584, 0.269, 1.386, 0.208, 0.1093];

/// `((1+s) ln(1+s) + (1-s) ln(1-s))/z` for `z = s^2` up to 0.2501, within 2e-17. A Chebyshev fit by
/// `tools/make_constants.py`.
const ENTROPY: [f64; 13] = [
    0.014378630255707502,
    -0.006753648250995665,
    0.009226438214281544,
    0.0038422872789129208,
    0.006807498926083822,
    0.00829821979756979,
    0.010992089113475658,
    0.015151335556995028,
    0.022222228914247757,
    0.03571428556647828,
    0.06666666666835723,
    0.16666666666665908,
    1.0,
];

impl Curve for JensenShannon {
    fn at_zero(self) -> f64 {
        0.5 * std::f64::consts::LN_2
    }

    #[inline(always)]
    fn at<L: Doubles>(self, point: Point<L>) -> Values<L> {
        let Point { u, log, excess, .. } = point;
        let plus = u + u.constant(1.0);
        let s = excess / plus;
        let square = s * s;
        // ln((1+u)/2) and ln(2u/(1+u)) add up to ln u. The smaller is computed, the larger is the difference.
        let shrinks = u.less(u.constant(1.0));
        let small = shrinks.select(excess * 0.5, s).log_1p().log;
        let large = log - small;
        let (to_mean, from_mean) = (shrinks.select(small, large), shrinks.select(large, small));
        // With s = (u-1)/(u+1), f(u) = (u+1)/4 ((1+s) ln(1+s) + (1-s) ln(1-s)).
        let near = excess * s * 0.25 * square.polynomial(&ENTROPY);
        let far = u.mul_add(from_mean, -to_mean) * 0.5;
        Values {
            value: square.less(u.constant(0.25)).select(near, far),
            slope: u * from_mean * 0.5,
            curvature: (s + u.constant(1.0)) * 0.25,
        }
    }

    /// `m` within 3.2 % up to half of saturation. The square of the lost share is `q^2` for small radii. It is `far^2`
    /// where the other outcome is improbable, with `f'(inf) far + far^2/8` about the radius. The remainder is fitted.
    #[inline(always)]
    fn start<L: Doubles>(self, split: &Split<L>, radius: Vector<L>) -> Vector<L> {
        let fit = JENSEN_SHANNON_START;
        let constant = radius.constant(0.5 * std::f64::consts::LN_2);
        let bend = radius * radius.mul_add(radius.constant(fit[0]), radius.constant(0.5));
        let far = radius * 2.0 / (constant.mul_add(constant, bend).sqrt() + constant);
        let square = radius * 8.0 / split.odds;
        let q = square.sqrt();
        let rate = far.mul_add(far.constant(fit[1]), far.constant(fit[2]));
        let between = square.mul_add(rate, far.mul_add(far.constant(fit[3]), q));
        let lost = (far * fit[4]).mul_add(square / between, far.mul_add(far, square)).sqrt();
        let fall =
            square.mul_add(q.constant(fit[6]), q.mul_add(q.constant(fit[5]), q.constant(1.0)));
        log_loss(lost / fall)
    }
}

/// Piecewise linear generators: `D = rate (moved - growing flat)`, where `moved` is the probability that moves.
#[derive(Clone, Copy)]
struct Linear {
    flat: f64,
    rate: f64,
    /// Share of `D` from the outcome that grows.
    grown: f64,
}

impl Law for Linear {
    #[inline(always)]
    fn max_divergence<L: Doubles>(self, split: &Split<L>) -> Option<Vector<L>> {
        Some((split.shrinking - split.growing * self.flat) * self.rate)
    }

    #[inline(always)]
    fn cancelled<L: Doubles>(self, split: &Split<L>) -> Vector<L> {
        split.growing * (self.flat * self.rate)
    }

    #[inline(always)]
    fn solve<L: Doubles>(self, split: &Split<L>, radius: Vector<L>) -> Solution<L> {
        let one = radius.constant(1.0);
        let moved = radius * (1.0 / self.rate) + split.growing * self.flat;
        let lost = moved / split.shrinking;
        let gain = split.odds * lost;
        let left = one - lost;
        let slope = split.shrinking * left * self.rate;
        let slope_of_grown = one.constant(self.rate * self.grown);
        Solution {
            left,
            log_left: (-lost).log_1p().log,
            growth: one + gain,
            log_growth: gain.log_1p().log,
            condition: condition(split, radius, slope, gain, slope_of_grown),
            found: radius.constant(0.0).less(left),
        }
    }
}

/// `times (sqrt u - 1)^2/2`.
#[derive(Clone, Copy)]
struct Hellinger {
    times: f64,
}

impl Law for Hellinger {
    #[inline(always)]
    fn max_divergence<L: Doubles>(self, split: &Split<L>) -> Option<Vector<L>> {
        let root = split.growing.sqrt();
        Some(split.shrinking * self.times / (root + root.constant(1.0)))
    }

    #[inline(always)]
    fn solve<L: Doubles>(self, split: &Split<L>, radius: Vector<L>) -> Solution<L> {
        let one = radius.constant(1.0);
        let two = radius.constant(2.0);
        let radius = radius * (1.0 / self.times);
        // sqrt(left) = 1 - e
        // Factor by factor, because the quotient of a small radius and large odds would be denormal.
        let e = (radius * (two - radius)).sqrt() / split.odds.sqrt() + radius;
        let root = one - e;
        let left = root * root;
        let gain = split.odds * (e * (two - e));
        let growth = one + gain;
        let slope_of_grown = (one - one / growth.sqrt()) * 0.5;
        let slope = split.shrinking * (left * slope_of_grown + root * e * 0.5);
        Solution {
            left,
            log_left: (-e).log_1p().log * 2.0,
            growth,
            log_growth: gain.log_1p().log,
            condition: condition(split, radius, slope, gain, slope_of_grown),
            found: radius.constant(0.0).less(root),
        }
    }
}

/// `(u-1)^2/(1-l+l u)/scale`, with `l` the blend.
#[derive(Clone, Copy)]
struct ChiSquare {
    blend: f64,
    scale: f64,
}

impl ChiSquare {
    /// `f'(u)` times the scale.
    #[inline(always)]
    fn slope<L: Doubles>(self, u: Vector<L>, excess: Vector<L>) -> Vector<L> {
        let blend = u.constant(self.blend);
        let denominator = u.mul_add(blend, u.constant(1.0 - self.blend));
        excess / denominator * (excess.mul_add(blend, u.constant(2.0)) / denominator)
    }
}

impl Law for ChiSquare {
    #[inline(always)]
    fn max_divergence<L: Doubles>(self, split: &Split<L>) -> Option<Vector<L>> {
        let one = split.odds.constant(1.0);
        let weight = split.shrinking.mul_add(one.constant(self.blend), split.growing);
        if self.blend == 1.0 {
            return None;
        }
        let sum = one.constant(1.0 / (1.0 - self.blend)) + split.shrinking / weight;
        Some(split.shrinking * sum * (1.0 / self.scale))
    }

    /// Solves the quadratic of `blended_chi_square` in `split.rs`.
    #[inline(always)]
    fn solve<L: Doubles>(self, split: &Split<L>, radius: Vector<L>) -> Solution<L> {
        let Split { shrinking: w, growing: g, odds } = *split;
        let one = radius.constant(1.0);
        let blend = radius.constant(self.blend);
        let radius = radius * self.scale;
        let spread = radius * (self.blend * self.blend);
        let root = radius.sqrt() * (w * g).mul_add(one.constant(4.0), spread).sqrt();
        let tilt = radius * blend * (g - w);
        let sum = root + tilt.abs();
        let scale = w * (one + spread);
        let (direct, inverse) = (sum / (scale * 2.0), radius * 2.0 * (g / sum));
        let falls = tilt.less(one.constant(0.0));
        let (lost, gained) = (falls.select(direct, inverse), falls.select(inverse, direct));
        // The remainder, by the product of the roots where 1 - lost would cancel.
        let product = (w - radius * (1.0 - self.blend) * w.mul_add(blend, g)) / scale;
        let mostly = !lost.less(one.constant(0.5));
        let left = mostly.select(product / (one + gained), one - lost);
        let gain = odds * lost;
        let growth = one + gain;
        let slope_of_grown = self.slope(growth, gain);
        let slope = w * left * (slope_of_grown - self.slope(left, -lost));
        Solution {
            left,
            log_left: mostly.select(left.ln(), (-lost).log_1p().log),
            growth,
            log_growth: gain.log_1p().log,
            condition: condition(split, radius, slope, gain, slope_of_grown),
            found: one.constant(0.0).less(left),
        }
    }
}
