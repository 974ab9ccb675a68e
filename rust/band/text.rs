//! Vector solver of divergences given as text.
//!
//! Newton's method in double precision leads next to the bound. One or two evaluations of D in double-double
//! arithmetic correct it there, and give the last double inside, as `polish.rs` does.

// A function of vectors has to become part of one that is compiled for their instructions.
#![allow(clippy::inline_always)]

use crate::band::jets::{Jet, MAX_ARGUMENT, Place, Results};
use crate::band::laws;
use crate::band::polish::{CHANGE_ERROR, MAX_CHANGE, RESIDUAL_ERROR, SHORT_STEP, SHORT_STEP_ERROR};
use crate::band::split::TEXT_ERROR;
use crate::band::vector::{Arguments, Both, CLEAR_OF_SATURATION, Found, is_ordinary};
use crate::divergence::{Expression, Tape};
use crate::simd::WithDoubles;
use crate::simd::doubles::{Doubles, Truth, Vector};
use crate::simd::pairs::Pair;

/// Max evaluations of `D` in double precision.
const MAX_ROUGH_STEPS: u32 = 12;

/// Step relative to `m` after which Newton's method ends in double precision.
const LAST_ROUGH_STEP: f64 = 3e-7;

/// Ratio of the ends of a bracket of `m` that has one end.
const OPEN_BRACKET: f64 = 256.0;

/// Max evaluations of `D` in double-double arithmetic.
const MAX_EXACT: u32 = 4;

/// Max magnitude of `ln p` and min of `ln u`, with which no low part of a double-double is denormal.
const FAR_TEXT: f64 = 560.0;

/// Min `1 - p`, for the same reason.
const MIN_REST: f64 = 1e-240;

/// Min slope of `D` for each relative change of the token. A smaller one has lost digits.
const MIN_SLOPE: f64 = 1e-7;

/// A call of `vector::log_bounds` for a text.
pub(super) struct TextSweep<'a, 'b> {
    pub(super) arguments: Arguments<'a>,
    pub(super) text: Text<'b>,
}

/// A text that has a tape.
#[derive(Clone, Copy)]
pub(super) struct Text<'a> {
    expression: &'a Expression,
    tape: &'a Tape,
}

impl<'a> Text<'a> {
    /// `None` if the text has an operation that vectors lack.
    pub(super) fn of(expression: &'a Expression) -> Option<Self> {
        Some(Self { expression, tape: expression.tape.as_ref()? })
    }
}

impl WithDoubles for TextSweep<'_, '_> {
    // Double-doubles take twice the registers.
    const NARROW: bool = true;

    #[inline(always)]
    fn run<L: Doubles>(self, lanes: L) {
        let Self { mut arguments, text } = self;
        let zero = Vector::splat(lanes, 0.0);
        let mut solver = Solver {
            text,
            takes_log: text.tape.takes_log(),
            rough: Results::new(text.tape, zero),
            exact: Results::new(text.tape, zero),
        };
        let mut start = 0;
        while start < arguments.count() {
            let token = Token::new(arguments.tokens(lanes, start));
            for upper in [false, true] {
                let found = solver.bound(&token, arguments.radii(lanes, start, upper), upper);
                arguments.take(start, upper, &found);
            }
            start += L::COUNT;
        }
    }
}

/// A vector of tokens, in both precisions.
struct Token<L: Doubles> {
    both: Both<L>,
    /// True where no number leaves the range of a double-double.
    ordinary: Truth<L>,
    /// `p`, `1 - p` and their ratio.
    own: Pair<L>,
    others: Pair<L>,
    odds: Pair<L>,
}

impl<L: Doubles> Token<L> {
    #[inline(always)]
    fn new(logp: Vector<L>) -> Self {
        let both = Both::new(logp);
        let logp = both.logp;
        let ordinary = both.ordinary
            & logp.constant(-FAR_TEXT).less(logp)
            & logp.less(logp.constant(-MIN_REST));
        let power = Pair::of(logp).exponential();
        let others = -power.excess;
        Self { both, ordinary, own: power.u, others, odds: power.u / others }
    }
}

/// Where the exact residual is evaluated first.
struct Start<L: Doubles> {
    m: Vector<L>,
    /// True where the whole side is allowed.
    saturated: Truth<L>,
    /// True where it surely is not, and the token is ordinary.
    clear: Truth<L>,
    /// True where it may or may not be: the text has lost its digits at the end. A bound decides.
    unknown: Truth<L>,
}

/// A text with the results of its steps.
struct Solver<'a, L: Doubles> {
    text: Text<'a>,
    takes_log: bool,
    rough: Results<L, Vector<L>>,
    exact: Results<L, Pair<L>>,
}

impl<L: Doubles> Solver<'_, L> {
    /// One end of the band.
    #[inline(always)]
    fn bound(&mut self, token: &Token<L>, radius: Vector<L>, upper: bool) -> Found<L> {
        let split = token.both.split(upper);
        let ordinary = token.ordinary & is_ordinary(radius);
        let Start { m, saturated, clear, unknown } = self.magnitude(&split, radius, ordinary);
        let rough = if upper {
            let both = &token.both;
            let one = m.constant(1.0);
            let power = (-m.min(m.constant(MAX_ARGUMENT))).exponential();
            let near = (-(split.odds * power.excess)).log_1p().log;
            // Next to the end the distance from it has more digits than the bound.
            let late = (-(both.others * power.u)).log_1p().log - both.logp;
            one.less(m).select(late, near).min((-both.logp).next_inwards())
        } else {
            -m
        };
        let (log_ratio, found) = self.polished(token, radius, rough, clear, upper);
        let infinite = m.constant(f64::INFINITY);
        let edge = if upper { -token.both.logp } else { -infinite };
        Found {
            log_ratio: saturated.select(edge, log_ratio),
            settled: token.both.ordinary & is_ordinary(radius) & saturated
                | (clear | unknown) & found,
            rough: clear & log_ratio.abs().less(infinite),
        }
    }

    /// `m` by Newton's method: on `ln D` against `ln m`, or next to saturation on `ln(D(0) - D)` against `-m`.
    #[inline(always)]
    fn magnitude(
        &mut self,
        split: &laws::Split<L>,
        radius: Vector<L>,
        ordinary: Truth<L>,
    ) -> Start<L> {
        let zero = radius.constant(0.0);
        let one = radius.constant(1.0);
        let two = radius.constant(2.0);
        let infinite = radius.constant(f64::INFINITY);
        let expression = self.text.expression;
        let at_zero = expression.at_zero.hi;
        let tangent = radius.constant(-expression.slope_at_one.hi);
        let size = radius.constant(expression.size);
        let relative_size = expression.relative_size;
        let curvature = expression.curvature.unwrap_or(1.0);
        let never = one.less(one);
        let (mut saturated, mut clear, mut unknown) = (never, ordinary, never);
        // Largest m known to be inside, smallest known not to be.
        let (mut inner, mut outer) = (zero, infinite);
        // The first turn of a text that saturates evaluates D at the end of the side.
        let mut ends = at_zero.is_finite();
        let mut max_divergence = infinite;
        let mut nearly = never;
        let mut target = radius;
        let mut m = (radius * split.growing * (2.0 / curvature) / split.shrinking).sqrt();
        let mut open = clear;
        let mut steps = 0;
        loop {
            let shrunk = laws::Point::from_log(-m);
            let gain = if ends { split.odds } else { -(split.odds * shrunk.excess) };
            let growth = gain + one;
            let mut jets = [Jet { value: zero, slope: zero }; 2];
            let mut holds = never;
            for (jet, grows) in jets.iter_mut().zip([false, true]) {
                let (u, log, excess) = if grows {
                    let log = if self.takes_log { gain.log_1p().log } else { gain };
                    (growth, log, gain)
                } else {
                    (shrunk.u, shrunk.log, shrunk.excess)
                };
                let place = Place { u, log, vanished: never, reach: zero };
                let of_text;
                (of_text, holds) = self.rough.evaluate(self.text.tape, place);
                *jet = Jet {
                    value: tangent.mul_add(excess, of_text.value),
                    slope: tangent.mul_add(u, of_text.slope),
                };
            }
            let [low, high] = jets;
            if ends {
                ends = false;
                max_divergence = split.growing.mul_add(high.value, split.shrinking * at_zero);
                let doubt = ((max_divergence + radius) * relative_size + size) * TEXT_ERROR;
                let doubt = max_divergence.mul_add(one.constant(CLEAR_OF_SATURATION), doubt);
                // The last outcome, which grows, may have left the range of a double.
                saturated = holds & (max_divergence + doubt).less(radius);
                unknown = clear & !holds;
                clear = clear & holds & radius.less(max_divergence - doubt);
                open = clear | unknown;
                nearly = (max_divergence * 0.5).less(radius) & clear;
                target = nearly.select(max_divergence - radius, radius);
                let share = max_divergence / target;
                let left = (share * (share.ln() + two)).max(two).ln();
                m = nearly.select(left, m);
                continue;
            }
            let d = split.growing.mul_add(high.value, split.shrinking * low.value);
            let slope = split.shrinking * (shrunk.u * (high.slope / growth) - low.slope);
            let side = nearly.select(max_divergence - d, d);
            let ratio = (side / target).max(one.constant(1e-30)).min(one.constant(1e30));
            let step = ratio.ln() * nearly.select(side, -d) / slope;
            let last_step = (size * TEXT_ERROR / target).max(one.constant(LAST_ROUGH_STEP));
            let converged = step.abs().less(m * last_step);
            // The exponential of the relative step to fourth order, with the step clamped to 2.
            let relative = (step / m).min(two).max(-two);
            let even = relative.mul_add(relative, one.constant(12.0));
            let odd = relative * 6.0;
            let scaled = m * (even + odd) / (even - odd);
            let moved = nearly.select((m + step).max(m * 0.25), scaled);
            // Steep texts overflow, and flat ones have no slope, far from their bound.
            let inside = d.less(radius);
            inner = inside.select(inner.max(m), inner);
            outer = inside.select(outer, outer.min(m));
            let low = zero.less(inner).select(inner, outer * (1.0 / OPEN_BRACKET));
            let middle = low.sqrt() * outer.min(m * OPEN_BRACKET).sqrt();
            let sound = converged | inner.less(moved) & moved.less(outer);
            m = open.select(sound.select(moved, middle), m);
            open = open & !converged;
            steps += 1;
            if steps == MAX_ROUGH_STEPS || !open.any() {
                return Start { m: zero.less(m).select(m, one), saturated, clear, unknown };
            }
        }
    }

    /// Corrects bounds on the exact residual. True where the result is the last double inside.
    #[inline(always)]
    fn polished(
        &mut self,
        token: &Token<L>,
        radius: Vector<L>,
        rough: Vector<L>,
        clear: Truth<L>,
        upper: bool,
    ) -> (Vector<L>, Truth<L>) {
        let zero = radius.constant(0.0);
        let one = radius.constant(1.0);
        let half = one.constant(0.5);
        let far = one.constant(-FAR_TEXT);
        let tangent = self.text.expression.slope_at_one;
        let expression = self.text.expression;
        let size = one.constant(expression.size);
        let doubt = (radius * expression.relative_size + size) * RESIDUAL_ERROR;
        let mut b = rough;
        let mut done = one.less(one);
        // Sizes of the last bound inside and of the first one outside.
        let mut inner = zero;
        let edge = if upper { -token.both.logp } else { one.constant(f64::INFINITY) };
        let mut outer = edge;
        let mut steps = 0;
        loop {
            let vanished = b.less(far);
            let power = Pair::of(b.max(far).min(-far)).exponential();
            let nothing = Pair::of(zero);
            let own = Pair::select(vanished, nothing, power.u);
            let own_excess = Pair::select(vanished, Pair::of(-one), power.excess);
            let lost = token.odds * own_excess;
            let mut excess = -lost;
            let mut others = excess + Pair::of(one);
            if upper {
                // Next to saturation the ratio of the others is computed without cancellation.
                let late = half.less(lost.high);
                if late.any() {
                    let sum = Pair::sum(token.both.logp, b.min(-token.both.logp));
                    let left = -sum.exponential().excess / token.others;
                    others = Pair::select(late, left, others);
                    excess = Pair::select(late, left - Pair::of(one), excess);
                }
            }
            let log = if self.takes_log { others.ln(excess) } else { excess };
            // Relative change of the others for a change of the log-ratio.
            let leverage = token.odds.high * own.high / others.high;
            let reach = b.abs() * (4.0 * SHORT_STEP);
            let mut sum = Pair::of(-radius);
            let mut slopes = [zero; 2];
            let mut exact = one.constant(MIN_REST).less(others.high);
            for outcome in [0, 1] {
                let (place, excess, weight) = if outcome == 0 {
                    let log = Pair::of(b);
                    (Place { u: own, log, vanished, reach }, own_excess, token.own)
                } else {
                    let reach = reach * leverage;
                    let vanished = one.less(one);
                    (Place { u: others, log, vanished, reach }, excess, token.others)
                };
                let (jet, holds) = self.exact.evaluate(self.text.tape, place);
                exact = exact & holds;
                let rise = Pair::constant(one, tangent) * excess;
                sum = sum + (jet.value - rise) * weight;
                slopes[outcome] = one.constant(-tangent.hi).mul_add(place.u.high, jet.slope);
            }
            let slope = token.own.high * slopes[0] - token.others.high * leverage * slopes[1];
            // A slope that overflows would make of any bound a root.
            exact = exact & slope.abs().less(one.constant(f64::INFINITY));
            let step = -sum.high / slope;
            let change = (step * leverage).abs();
            let relative =
                change.mul_add(one.constant(CHANGE_ERROR), one.constant(SHORT_STEP_ERROR));
            let error = step.abs().mul_add(relative, doubt * 2.0 / slope.abs());
            let root = Pair::sum(b, step);
            let inwards = root.high.next_inwards();
            let beyond = if upper { root.low } else { -root.low };
            let nearest = error.less(beyond);
            let next = error.less((root.high - inwards).abs() + beyond);
            let last = nearest.select(root.high, inwards).abs();
            let size = b.abs();
            let short = step.abs().less(size * SHORT_STEP)
                & change.less(one.constant(MAX_CHANGE))
                & (token.own.high * own.high * MIN_SLOPE).less(slope.abs());
            inner = (exact & sum.high.less(-doubt)).select(size, inner);
            outer = (exact & doubt.less(sum.high)).select(size, outer);
            let (first, final_one) = (inner.next_outwards(), outer.next_inwards());
            // The edge is outside only if the side is known not to be saturated.
            let adjacent = final_one.less(first) & (clear | outer.less(edge));
            let valid = zero.less(last) & last.less(outer);
            let by_step = exact & short & valid & (nearest | next);
            let found = adjacent.select(inner, last);
            let decided = (adjacent | by_step) & !done;
            let tried = root.high.abs().max(first).min(final_one);
            let moved = decided.select(found, tried);
            b = done.select(b, if upper { moved } else { -moved });
            done = done | decided;
            steps += 1;
            if steps == MAX_EXACT || !(!done).any() {
                return (b, done);
            }
        }
    }
}
