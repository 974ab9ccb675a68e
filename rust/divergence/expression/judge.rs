//! Judgement of a function: the conditions of a generator, and its limits.

use super::curvature::Curvature;
use super::evaluate::{Expression, FARTHEST, evaluate};
use super::grammar::Node;
use crate::divergence::point::Point;
use crate::number::wide::{ROUNDING, Wide};
use crate::number::{Dd, Real};

/// Max `|ln u|` at which convexity is judged.
const REACH: f64 = 700.0;
/// Min `|ln u|` at which it is judged.
const NEAREST: f64 = 1e-6;

/// Points on each side of 1 where convexity is judged.
const POINTS: u32 = 1100;
/// Points on each side, from [`REACH`] to [`FARTHEST`], where f'' alone is judged.
const FAR_POINTS: u32 = 60;
/// Factor from the `ln u` of a point to that of its neighbour. The difference of their slopes replaces an f'' that
/// is not known.
const NEIGHBOUR: f64 = 1.0 + 1e-8;

/// Rounding errors of a double, in units of those of a `Wide`. Decimals such as 0.1 may miss `f(1) = 0`, or the
/// join of two pieces, by so much.
pub(super) const DECIMALS: f64 = 4.0 * f64::EPSILON / ROUNDING;

/// Distance in `ln u` from a change of sign to the slopes beside it. Rounding moves the change by less.
const BESIDE: f64 = 1e-24;

/// Max operations of a judgement, in units of a sum in [`Wide`] numbers; about 0.1 s.
const MAX_WORK: u64 = 1_200_000;

/// Min value next to an overflow. Beside a smaller value, f is not finite.
const HUGE: f64 = 1e300;

/// f and f' at a point.
struct Sample {
    log: f64,
    value: Wide,
    slope: Wide,
}

/// Samples from 1 towards 0 or infinity.
struct Way {
    samples: Vec<Sample>,
    /// True if f overflows after the last sample.
    overflows: bool,
    /// True if the slope surely rises somewhere.
    is_curved: bool,
}

impl Expression {
    /// Determines `f'(1)`, the limits and `f''(1)`. The error names the condition that f breaks.
    pub(super) fn judge(
        &mut self,
        at_zero: Option<f64>,
        slope_at_infinity: Option<f64>,
    ) -> std::result::Result<(), String> {
        let mut work = Work { left: MAX_WORK };
        // Before any evaluation, because a text of many terms takes a second. f'' takes as long as f.
        work.take(4 * u64::from(POINTS), work_of(&self.node))?;
        let one = evaluate(&self.node, Point::from_excess(Wide::of(0.0)));
        if !one.value.is_finite() || one.value.abs().is_above_error(DECIMALS) {
            return Err(format!("f(1) must be 0, it is {}", shown(one.value)));
        }
        let tangent = if one.slope.is_finite() {
            one.slope
        } else {
            let [below, above] = [-BESIDE, BESIDE].map(|t| self.slope_at(Dd::of(t)).1);
            (below + above) * Wide::of(0.5)
        };
        if !tangent.is_finite() {
            return Err("f'(1) must be finite".to_owned());
        }
        self.slope_at_one = tangent.to_dd();
        let curvature = Curvature::of(&self.node);
        judge_sign(curvature.at(Wide::of(1.0)), 0.0)?;
        let [to_zero, to_infinity] = [self.way(-1.0, &curvature)?, self.way(1.0, &curvature)?];
        if !to_zero.is_curved && !to_infinity.is_curved {
            return Err("f is linear: its divergence is 0 everywhere".to_owned());
        }
        self.judge_sign_changes(&[&to_zero, &to_infinity], &curvature, &mut work)?;
        judge_far(&curvature)?;

        let tangent = Wide::of_dd(self.slope_at_one);
        let far = [0.25, 0.5, 1.0].map(|share| share * FARTHEST);
        let values = far.map(|t| self.wide(Point::from_log(Wide::of(-t))).value);
        self.at_zero = limit("f(0)", "at_zero", &to_zero, values, at_zero, tangent)?.to_dd();
        let ratios = far.map(|t| {
            let at = Point::from_log(Wide::of(t));
            self.wide(at).value / at.u
        });
        let symbol = "f'(inf)";
        let name = "slope_at_infinity";
        let slope = limit(symbol, name, &to_infinity, ratios, slope_at_infinity, -tangent)?;
        self.slope_at_infinity = slope.to_dd();
        self.curvature = self.measured_curvature();
        (self.size, self.relative_size) = self.measured_sizes();
        Ok(())
    }

    /// `f` and `f'` of the normalised f.
    fn slope_at(&self, log: Dd) -> (Wide, Wide) {
        let at = Point::from_log(Wide::of_dd(log));
        let jet = self.wide(at);
        (jet.value, jet.slope / at.u)
    }

    /// Samples f from 1 towards 0 (`sign` -1) or infinity (1). Refuses a slope that falls and values that are not
    /// finite.
    fn way(&self, sign: f64, curvature: &Curvature) -> std::result::Result<Way, String> {
        let tangent = Wide::of_dd(self.slope_at_one);
        let (value, slope) = (Wide::of(0.0), Wide::of(0.0));
        let mut samples = vec![Sample { log: 0.0, value, slope }];
        let mut is_curved = false;
        for step in 0..POINTS {
            let share = f64::from(step) / f64::from(POINTS - 1);
            let log = sign * NEAREST * (REACH / NEAREST).powf(share);
            let at = Point::from_log(Wide::of(log));
            let jet = evaluate(&self.node, at);
            let value = jet.value - tangent * at.excess;
            let slope = jet.slope / at.u - tangent;
            if !value.is_finite() || !slope.is_finite() {
                if samples.last().is_some_and(|last| last.value.to_f64() >= HUGE) {
                    return Ok(Way { samples, overflows: true, is_curved });
                }
                return Err(format!(
                    "f must be finite on (0, inf), it is {} at u = {}",
                    shown(value),
                    shown_exp(log)
                ));
            }
            let outer = Sample { log, value, slope };
            // From 1 and from the point before.
            for inner in samples.first().into_iter().chain(samples.last()) {
                let (left, right) = if sign < 0.0 { (&outer, inner) } else { (inner, &outer) };
                let fall = left.slope - right.slope;
                // The slope may fall by the rounding of decimals where pieces join, but not within a piece.
                if fall.is_above_error(DECIMALS) {
                    return Err(falls(fall, left.log, right.log));
                }
                is_curved |= (-fall).is_above_error(2.0);
            }
            self.judge_bend(curvature, Dd::of(log), sign, Wide::of(0.0))?;
            samples.push(outer);
        }
        Ok(Way { samples, overflows: false, is_curved })
    }

    /// Refuses a negative f''. If it is not known, the slope may fall by `slack` at most towards `side`.
    fn judge_bend(
        &self,
        curvature: &Curvature,
        log: Dd,
        side: f64,
        slack: Wide,
    ) -> std::result::Result<(), String> {
        let at = |log: Dd| Point::from_log(Wide::of_dd(log));
        let bend = curvature.at(at(log).u);
        if bend.is_finite() {
            return judge_sign(bend, log.hi);
        }
        let far = log + Dd::of(side * (NEIGHBOUR - 1.0) * log.hi.abs().max(NEAREST));
        let [near_slope, far_slope] = [log, far].map(|log| {
            let at = at(log);
            evaluate(&self.node, at).slope / at.u
        });
        let fall = (near_slope - far_slope) * Wide::of(side);
        if (fall - slack).is_above_error(2.0) {
            return Err(falls(fall, log.hi.min(far.hi), log.hi.max(far.hi)));
        }
        Ok(())
    }

    /// Judges both sides of every kink and pole. These lie where the argument of an `abs`, a divisor, the base of
    /// a power, or the difference of the arguments of a `min` or `max` changes sign. Bisection finds each place to
    /// all digits, because a grid would miss a kink in a curved f.
    fn judge_sign_changes(
        &self,
        ways: &[&Way; 2],
        curvature: &Curvature,
        work: &mut Work,
    ) -> std::result::Result<(), String> {
        let mut parts = Vec::new();
        sign_changing(&self.node, &mut parts);
        let mut grid: Vec<&Sample> = ways.iter().flat_map(|way| &way.samples).collect();
        grid.sort_by(|left, right| left.log.total_cmp(&right.log));
        for (part, other) in parts {
            let sign = |log: Dd| {
                let at = Point::from_log(Wide::of_dd(log));
                let difference = match other {
                    Some(other) => evaluate(part, at).value - evaluate(other, at).value,
                    None => evaluate(part, at).value,
                };
                sign_of(difference.to_f64())
            };
            let once = work_of(part) + other.map_or(0, work_of);
            work.take(grid.len() as u64, once)?;
            let signs: Vec<i8> = grid.iter().map(|sample| sign(Dd::of(sample.log))).collect();
            for (ends, signs) in grid.windows(2).zip(signs.windows(2)) {
                let (mut left, right) = (Dd::of(ends[0].log), Dd::of(ends[1].log));
                let mut sign_left = signs[0];
                while sign_left != signs[1] {
                    work.take(u64::from(MAX_BISECTIONS), once)?;
                    work.take(4, work_of(&self.node))?;
                    // The last place with the sign of the left end, and the first without.
                    let mut beyond = right;
                    for _ in 0..MAX_BISECTIONS {
                        let middle = (left + beyond) * Dd::of(0.5);
                        if sign(middle) == sign_left {
                            left = middle;
                        } else {
                            beyond = middle;
                        }
                    }
                    self.judge_beside(left, beyond, ends, curvature)?;
                    (left, sign_left) = (beyond, sign(beyond));
                }
            }
        }
        Ok(())
    }

    /// Refuses a jump, a pole or a falling slope between two adjacent places. At a pole, f is far above both `ends`
    /// of the piece of the grid.
    fn judge_beside(
        &self,
        left: Dd,
        right: Dd,
        ends: &[&Sample],
        curvature: &Curvature,
    ) -> std::result::Result<(), String> {
        let away = Dd::of(BESIDE * left.hi.abs().max(1.0));
        let (left, right) = (left - away, right + away);
        let [(f_left, slope_left), (f_right, slope_right)] =
            [left, right].map(|log| self.slope_at(log));
        let width = (Wide::of_dd(right - left) * Wide::of_dd(left).exp()).rounded();
        let rise = (slope_left.abs() + slope_right.abs()) * width;
        let jump = (f_right - f_left).abs() - rise - rise;
        let is_pole = |log: Dd, f: Wide| {
            let between = ends[0].log < log.hi && log.hi < ends[1].log;
            let above = |end: &&Sample| (f - end.value - end.value).is_above_error(2.0);
            !f.is_finite() || between && ends.iter().all(above)
        };
        if is_pole(left, f_left) || is_pole(right, f_right) || jump.is_above_error(2.0) {
            return Err(format!(
                "f must be convex and finite on (0, inf), it goes from {} to {} at u = {}",
                shown(f_left),
                shown(f_right),
                shown_exp(left.hi)
            ));
        }
        let fall = slope_left - slope_right;
        // Decimals are measured at the ends, because the error beside a pole is unrelated to them.
        let decimals = (ends[1].slope - ends[0].slope).error_times(DECIMALS);
        if (fall - decimals).is_above_error(2.0) {
            return Err(falls(fall, left.hi, right.hi));
        }
        // A dent may begin here and end before the next sample.
        self.judge_bend(curvature, left, -1.0, decimals)?;
        self.judge_bend(curvature, right, 1.0, decimals)
    }

    /// `f''(1)`, if the slope changes at the same rate at two distances from 1, on both sides.
    fn measured_curvature(&self) -> Option<f64> {
        let rates = [-1e-11, 1e-11, -1e-13, 1e-13].map(|x| {
            let at = Point::from_excess(Wide::of(x));
            (self.wide(at).slope / at.u / Wide::of(x)).to_f64()
        });
        let same = rates.iter().all(|rate| (rate / rates[3] - 1.0).abs() < 1e-6);
        (same && rates[3] > 0.0).then_some(0.5 * (rates[2] + rates[3]))
    }

    /// Sizes of the terms that cancel: near 1, and relative to `f` elsewhere.
    fn measured_sizes(&self) -> (f64, f64) {
        let max = |places: &[f64], min: f64| {
            let both = places.iter().flat_map(|&log| [-log, log]);
            let values = both.map(|log| self.slope_at(Dd::of(log)).0);
            let sizes = values.map(|value| value.roundings() / value.to_f64().abs().max(min));
            sizes.filter(|size| size.is_finite()).fold(1.0, f64::max)
        };
        // A text may be flat up to any of them.
        let near = (-30..=-1).map(|half| 10_f64.powf(0.5 * f64::from(half)));
        let near: Vec<f64> = near.chain([BESIDE]).collect();
        (max(&near, 1.0), max(&[0.3, 1.0, 3.0, 10.0, 30.0], 0.0))
    }
}

/// Refuses a negative f'' beyond the samples. f itself may overflow there.
fn judge_far(curvature: &Curvature) -> std::result::Result<(), String> {
    for step in 1..=FAR_POINTS {
        let log = REACH * (FARTHEST / REACH).powf(f64::from(step) / f64::from(FAR_POINTS));
        for log in [-log, log] {
            judge_sign(curvature.at(Wide::of(log).exp()), log)?;
        }
    }
    Ok(())
}

/// Refuses an f'' that is below 0 by more than its rounding error.
fn judge_sign(bend: Wide, log: f64) -> std::result::Result<(), String> {
    if (-bend).is_above_error(2.0) {
        return Err(format!(
            "f must be convex, its slope falls at the rate {} at u = {}",
            shown(-bend),
            shown_exp(log)
        ));
    }
    Ok(())
}

/// Halvings after which two places agree to all digits.
const MAX_BISECTIONS: u32 = 110;

/// Operations that a judgement may still take.
struct Work {
    left: u64,
}

impl Work {
    /// Takes a number of evaluations of so much work each, or refuses the text.
    fn take(&mut self, evaluations: u64, each: u64) -> std::result::Result<(), String> {
        match self.left.checked_sub(evaluations * each) {
            Some(left) => {
                self.left = left;
                Ok(())
            }
            None => {
                Err("it takes too long to judge; write f with fewer terms and kinks".to_owned())
            }
        }
    }
}

/// Operations of an evaluation, in units of a sum.
fn work_of(node: &Node) -> u64 {
    // Of a number alone no logarithm is taken.
    let operand = |node: &Node| if matches!(node, Node::Number(_)) { 1 } else { work_of(node) };
    match node {
        Node::Variable => 1,
        Node::Number(number) => {
            if *number > 0.0 {
                WORK_OF_FUNCTION
            } else {
                1
            }
        }
        Node::Negative(inner) => 1 + operand(inner),
        Node::Abs(inner) => 1 + work_of(inner),
        Node::Ln(inner) | Node::Sqrt(inner) => WORK_OF_FUNCTION + work_of(inner),
        Node::Exp(inner) => WORK_OF_FUNCTION + operand(inner),
        Node::Sin(inner) | Node::Cos(inner) => 6 * WORK_OF_FUNCTION + operand(inner),
        Node::Power(base, exponent) => {
            // A whole power is a product for each of its bits.
            let power = match **exponent {
                Node::Number(order) if order.fract() == 0.0 && order <= 1e6 => {
                    6 + 3 * (order.max(1.0).log2() as u64)
                }
                _ => 2 * WORK_OF_FUNCTION,
            };
            power + work_of(base) + operand(exponent)
        }
        Node::Add(left, right) => 1 + operand(left) + operand(right),
        Node::Multiply(left, right) | Node::Divide(left, right) | Node::Extreme(_, left, right) => {
            3 + work_of(left) + work_of(right)
        }
    }
}

/// Work of an exponential, logarithm or root.
const WORK_OF_FUNCTION: u64 = 10;

/// Collects the parts of a formula at whose changes of sign it may have a kink, a jump or a pole. Two parts
/// stand for their difference.
fn sign_changing<'a>(node: &'a Node, parts: &mut Vec<(&'a Node, Option<&'a Node>)>) {
    match node {
        Node::Variable | Node::Number(_) => {}
        Node::Negative(inner)
        | Node::Ln(inner)
        | Node::Exp(inner)
        | Node::Sqrt(inner)
        | Node::Sin(inner)
        | Node::Cos(inner) => sign_changing(inner, parts),
        Node::Abs(inner) => {
            parts.push((inner, None));
            sign_changing(inner, parts);
        }
        Node::Extreme(_, left, right) => {
            parts.push((left, Some(right)));
            sign_changing(left, parts);
            sign_changing(right, parts);
        }
        Node::Divide(left, right) => {
            parts.push((right, None));
            sign_changing(left, parts);
            sign_changing(right, parts);
        }
        Node::Power(left, right) => {
            parts.push((left, None));
            sign_changing(left, parts);
            sign_changing(right, parts);
        }
        Node::Add(left, right) | Node::Multiply(left, right) => {
            sign_changing(left, parts);
            sign_changing(right, parts);
        }
    }
}

/// -1, 0 or 1.
fn sign_of(number: f64) -> i8 {
    i8::from(number > 0.0) - i8::from(number < 0.0)
}

/// The limit of the normalised f: `given` for f itself, or determined from three values, each twice as far out as the
/// one before. Normalising adds `tangent`.
fn limit(
    symbol: &str,
    argument: &str,
    way: &Way,
    values: [Wide; 3],
    given: Option<f64>,
    tangent: Wide,
) -> std::result::Result<Wide, String> {
    let found = if way.overflows { Some(Wide::of(f64::INFINITY)) } else { settled(values) };
    let farthest = values[2];
    let Some(given) = given else {
        return found.ok_or_else(|| {
            format!(
                "{symbol} cannot be determined, f reaches {}; give it as {argument}, inf if it is infinite",
                shown(farthest - tangent)
            )
        });
    };
    let normalised = Wide::of(given) + tangent;
    let slack = Wide::of(1e-9) * found.unwrap_or(farthest).abs() + Wide::of(1e-15) * tangent.abs();
    let agrees = match found {
        _ if given.is_nan() => false,
        Some(found) if found.is_finite() => {
            !((found - normalised).abs() - slack).is_above_error(0.0)
        }
        Some(_) => given == f64::INFINITY,
        None => !(farthest - slack - normalised).is_above_error(0.0),
    };
    if !agrees {
        let reached = shown(found.unwrap_or(farthest) - tangent);
        return Err(format!(
            "{argument} is {given}, and f contradicts it: {symbol} reaches {reached}"
        ));
    }
    // The measured limit has more digits.
    Ok(found.unwrap_or(normalised))
}

/// The limit of three values: the last one if they no longer change, infinity if they grow like `ln u` or faster,
/// otherwise `None`.
fn settled([a, b, c]: [Wide; 3]) -> Option<Wide> {
    let (before, step) = (b - a, c - b);
    if !step.abs().is_above_error(DECIMALS) {
        return Some(c);
    }
    let grows = (step - before * Wide::of(2.0 * (1.0 - 1e-9))).is_above_error(0.0);
    (c.to_f64() == f64::INFINITY || grows && before.is_above_error(0.0))
        .then(|| Wide::of(f64::INFINITY))
}

/// Message for a slope that falls between two `ln u`.
fn falls(fall: Wide, left: f64, right: f64) -> String {
    let (from, to) = (shown_exp(left), shown_exp(right));
    let place =
        if from == to { format!("at u = {from}") } else { format!("from u = {from} to {to}") };
    format!("f must be convex, its slope falls by {} {place}", shown(fall))
}

/// The number with six digits.
fn shown(number: Wide) -> String {
    shown_double(number.to_f64())
}

fn shown_exp(log: f64) -> String {
    if log.abs() <= REACH { shown_double(log.exp()) } else { format!("e^{}", shown_double(log)) }
}

fn shown_double(number: f64) -> String {
    let rounded = format!("{number:.5e}").parse().unwrap_or(number);
    if rounded == 0.0 || (1e-4..1e6).contains(&rounded.abs()) {
        format!("{rounded}")
    } else {
        format!("{rounded:e}")
    }
}
