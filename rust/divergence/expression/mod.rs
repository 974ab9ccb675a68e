//! A generator given as text, such as `u*ln(u) - u + 1`: read, judged, evaluated, differentiated.
//!
//! The grammar: the variable `u`, numbers, `+ - * /`, `^` or `**` (right-associative, tighter than a
//! sign), parentheses, and the functions `ln` (`log`), `exp`, `sqrt`, `abs`, `min`, `max`, `sin`, `cos`.
//! Evaluation carries the logarithm of every product of powers of `u`, so that `ln(u)` is exact where
//! `u` itself underflows; derivatives are carried along (forward mode).

use std::sync::LazyLock;

use pest::Parser as _;
use pest::iterators::{Pair, Pairs};
use pest::pratt_parser::{Assoc, Op, PrattParser};

use crate::divergence::Point;
use crate::error::{Error, Result, excerpt};
use crate::number::wide::{ROUNDING, Wide};
use crate::number::{Dd, Real};

/// Longest text that is read.
const MOST_CHARACTERS: usize = 1024;
/// Deepest nesting of parentheses that is read: the parser is recursive.
const MOST_NESTED: usize = 64;

#[derive(pest_derive::Parser)]
#[grammar_inline = r#"
WHITESPACE = _{ " " | "\t" | "\r" | "\n" | "\u{0B}" | "\u{0C}" }
whole = _{ SOI ~ expression ~ EOI }
expression = { sign* ~ primary ~ (infix ~ sign* ~ primary)* }
primary = _{ number | call | variable | "(" ~ expression ~ ")" }
sign = _{ negative | positive }
negative = { "-" }
positive = { "+" }
infix = _{ power | add | subtract | multiply | divide }
power = { "^" | "**" }
add = { "+" }
subtract = { "-" }
multiply = { "*" }
divide = { "/" }
number = @{ (ASCII_DIGIT+ ~ ("." ~ ASCII_DIGIT*)? | "." ~ ASCII_DIGIT+) ~ (^"e" ~ ("+" | "-")? ~ ASCII_DIGIT+)? }
name = @{ ASCII_ALPHA ~ (ASCII_ALPHANUMERIC | "_")* }
variable = { name }
call = { name ~ "(" ~ expression ~ ("," ~ expression)* ~ ")" }
"#]
struct Grammar;

static PRECEDENCE: LazyLock<PrattParser<Rule>> = LazyLock::new(|| {
    PrattParser::new()
        .op(Op::infix(Rule::add, Assoc::Left) | Op::infix(Rule::subtract, Assoc::Left))
        .op(Op::infix(Rule::multiply, Assoc::Left) | Op::infix(Rule::divide, Assoc::Left))
        .op(Op::prefix(Rule::negative) | Op::prefix(Rule::positive))
        .op(Op::infix(Rule::power, Assoc::Right))
});

#[derive(Debug, Clone, PartialEq)]
enum Node {
    Variable,
    Number(f64),
    Negative(Box<Node>),
    Add(Box<Node>, Box<Node>),
    Multiply(Box<Node>, Box<Node>),
    Divide(Box<Node>, Box<Node>),
    Power(Box<Node>, Box<Node>),
    Ln(Box<Node>),
    Exp(Box<Node>),
    Sqrt(Box<Node>),
    Abs(Box<Node>),
    Sin(Box<Node>),
    Cos(Box<Node>),
    /// The lesser where the flag is false, the greater where it is true.
    Extreme(bool, Box<Node>, Box<Node>),
}

/// A number and its derivative in `ln u`; and the same of its logarithm, where that is known better than
/// from it.
#[derive(Clone, Copy)]
struct Jet<T> {
    value: T,
    slope: T,
    log: Option<(T, T)>,
}

/// A convex generator read from text, with what was found out about it when it was judged.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Expression {
    node: Node,
    /// A subgradient at 1: `f - slope_at_one (u-1)` is what is evaluated. It is at least 0.
    slope_at_one: Dd,
    pub(crate) at_zero: Dd,
    pub(crate) slope_at_infinity: f64,
    pub(crate) curvature: Option<f64>,
}

impl Expression {
    /// Reads and judges `text`; `at_zero` and `slope_at_infinity` are `f(0)` and `f'(inf)` where the
    /// user knows them.
    ///
    /// # Errors
    /// [`Error::Expression`] with the column, [`Error::Generator`] with what is wrong with the function.
    pub(crate) fn parse(
        text: &str,
        at_zero: Option<f64>,
        slope_at_infinity: Option<f64>,
    ) -> Result<Self> {
        let mut expression = Self {
            node: read(text)?,
            slope_at_one: Dd::of(0.0),
            at_zero: Dd::of(0.0),
            slope_at_infinity: 0.0,
            curvature: None,
        };
        expression
            .judge(at_zero, slope_at_infinity)
            .map_err(|reason| Error::Generator { text: text.to_owned(), reason })?;
        Ok(expression)
    }

    /// `f(u) - f'(1) (u-1)`, at least 0.
    pub(crate) fn value<T: Real>(&self, at: Point<T>) -> T {
        if at.u.to_f64() == 0.0 && at.log.to_f64() == f64::NEG_INFINITY {
            return T::of_dd(self.at_zero);
        }
        let value = evaluate(&self.node, at).value - T::of_dd(self.slope_at_one) * at.excess;
        if value.to_f64().is_finite() {
            value
        } else {
            T::of_dd(self.wide(widened(at)).value.to_dd())
        }
    }

    /// `u f'(u)`, of the same function.
    pub(crate) fn log_slope(&self, at: Point<f64>) -> f64 {
        let slope = evaluate(&self.node, at).slope - self.slope_at_one.to_f64() * at.u;
        if slope.is_finite() { slope } else { self.wide(widened(at)).slope.to_dd().to_f64() }
    }

    /// `ln f(u)` for any `ln u`, where `f(u)` itself leaves the range of a double.
    pub(crate) fn log_value<T: Real>(&self, log: T) -> T {
        // As a power of u beyond the farthest point where the text can be evaluated.
        let t = log.to_f64();
        let far = t.clamp(-FARTHEST, FARTHEST);
        let at = if t == far { Wide::of_dd(log.to_dd()) } else { Wide::of(far) };
        let Jet { value, slope, .. } = self.wide(Point::from_log(at));
        if value.is_finite() && !value.is_above_error(1.0) {
            return T::of(f64::NEG_INFINITY); // all that is left is rounding error
        }
        let beyond = if t == far { 0.0 } else { (slope / value).to_f64() * (t - far) };
        T::of_dd(value.ln().to_dd()) + T::of(beyond)
    }

    /// `f(u) - f'(1) (u-1)` where nothing overflows, and with what is rounding error in it.
    fn wide(&self, at: Point<Wide>) -> Jet<Wide> {
        let Jet { value, slope, .. } = evaluate(&self.node, at);
        let tangent = Wide::of_dd(self.slope_at_one);
        Jet { value: value - tangent * at.excess, slope: slope - tangent * at.u, log: None }
    }
}

/// How far from 1, in `|ln u|`, text is evaluated at all; limits are looked for there.
const FARTHEST: f64 = 1e10;

/// How far from 1, in `|ln u|`, convexity is judged, and the nearest point to 1 for that.
const REACH: f64 = 700.0;
const NEAREST: f64 = 1e-6;

/// Points on each side of 1 where convexity is judged. Each has a neighbour this much farther out, between
/// which f' falls wherever f'' < 0.
const POINTS: u32 = 1100;
const NEIGHBOUR: f64 = 1.0 + 1e-8;

/// Rounding errors of a double in those of a `Wide`: what decimals such as 0.1 may miss in `f(1) = 0`, or in
/// pieces that join, is no violation.
const DECIMALS: f64 = 4.0 * f64::EPSILON / ROUNDING;

/// How far from a change of sign the slopes beside it are taken, in `ln u`; rounding moves it by less.
const BESIDE: f64 = 1e-24;

/// A value next to an overflow is at least this large; else f ends there.
const HUGE: f64 = 1e300;

/// f and f' at a point of the grid.
struct Sample {
    log: f64,
    value: Wide,
    slope: Wide,
}

/// What is found on the way from 1 to 0 or to infinity: samples, and whether f overflows at last.
struct Way {
    samples: Vec<Sample>,
    overflows: bool,
}

impl Expression {
    /// Finds out `f'(1)`, the limits and `f''(1)`; the error says which condition f breaks.
    fn judge(
        &mut self,
        at_zero: Option<f64>,
        slope_at_infinity: Option<f64>,
    ) -> std::result::Result<(), String> {
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
        let [to_zero, to_infinity] = [self.way(-1.0)?, self.way(1.0)?];
        if let (Some(first), Some(last)) = (to_zero.samples.last(), to_infinity.samples.last())
            && !(last.slope - first.slope).is_above_error(2.0)
        {
            return Err("f is linear: its divergence is 0 everywhere".to_owned());
        }
        self.judge_sign_changes(&[&to_zero, &to_infinity])?;

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
        self.slope_at_infinity = slope.to_dd().to_f64();
        self.curvature = self.measured_curvature();
        Ok(())
    }

    /// `f` and `f'`, of the normalised f.
    fn slope_at(&self, log: Dd) -> (Wide, Wide) {
        let at = Point::from_log(Wide::of_dd(log));
        let jet = self.wide(at);
        (jet.value, jet.slope / at.u)
    }

    /// Goes from 1 to 0 (`sign` -1) or to infinity (1), looking for a slope that falls and for values that are
    /// not finite.
    fn way(&self, sign: f64) -> std::result::Result<Way, String> {
        let mut samples = vec![Sample { log: 0.0, value: Wide::of(0.0), slope: Wide::of(0.0) }];
        for step in 0..POINTS {
            let share = f64::from(step) / f64::from(POINTS - 1);
            let t = sign * NEAREST * (REACH / NEAREST).powf(share);
            // Pieces that decimals join may fall by their rounding error, but not within a piece.
            for (log, times) in [(t, DECIMALS), (t * NEIGHBOUR, 2.0)] {
                let (value, slope) = self.slope_at(Dd::of(log));
                if !value.is_finite() || !slope.is_finite() {
                    if samples.last().is_some_and(|last| last.value.to_f64() >= HUGE) {
                        return Ok(Way { samples, overflows: true });
                    }
                    return Err(format!(
                        "f must be finite on (0, inf), it is {} at u = {}",
                        shown(value),
                        shown_exp(log)
                    ));
                }
                let outer = Sample { log, value, slope };
                if let Some(inner) = samples.last() {
                    let (left, right) = if sign < 0.0 { (&outer, inner) } else { (inner, &outer) };
                    let fall = left.slope - right.slope;
                    if fall.is_above_error(times) {
                        return Err(falls(fall, left.log, right.log));
                    }
                }
                samples.push(outer);
            }
        }
        Ok(Way { samples, overflows: false })
    }

    /// Looks at both sides of every kink and pole: of each place where the argument of an `abs`, a divisor,
    /// the base of a power, or the difference of the arguments of a `min` or `max` changes sign. However near
    /// one is to a point of the grid, and however curved f is around it, nothing hides its slopes.
    fn judge_sign_changes(&self, ways: &[&Way; 2]) -> std::result::Result<(), String> {
        let mut parts = Vec::new();
        sign_changing(&self.node, &mut parts);
        let mut grid: Vec<&Sample> =
            ways.iter().flat_map(|way| way.samples.iter().step_by(2)).collect();
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
            let signs: Vec<i8> = grid.iter().map(|sample| sign(Dd::of(sample.log))).collect();
            for (ends, signs) in grid.windows(2).zip(signs.windows(2)) {
                let (mut left, right) = (Dd::of(ends[0].log), Dd::of(ends[1].log));
                let mut sign_left = signs[0];
                while sign_left != signs[1] {
                    // The last place with the sign of the left end, and the first one without.
                    let mut beyond = right;
                    for _ in 0..MOST_HALVINGS {
                        let middle = (left + beyond) * Dd::of(0.5);
                        if sign(middle) == sign_left {
                            left = middle;
                        } else {
                            beyond = middle;
                        }
                    }
                    self.judge_beside(left, beyond, ends)?;
                    (left, sign_left) = (beyond, sign(beyond));
                }
            }
        }
        Ok(())
    }

    /// Whether f is continuous and its slope does not fall between two places that are next to each other,
    /// and f is not far above both `ends` of the piece of the grid that they lie in.
    fn judge_beside(
        &self,
        left: Dd,
        right: Dd,
        ends: &[&Sample],
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
        // Beside a pole the error says nothing of decimals: the ends do.
        let decimals = (ends[1].slope - ends[0].slope).error_times(DECIMALS);
        if (fall - decimals).is_above_error(2.0) {
            return Err(falls(fall, left.hi, right.hi));
        }
        Ok(())
    }

    /// `f''(1)`, if the slope changes at the same rate near 1 and nearer, on both sides.
    fn measured_curvature(&self) -> Option<f64> {
        let rates = [-1e-11, 1e-11, -1e-13, 1e-13].map(|x| {
            let at = Point::from_excess(Wide::of(x));
            (self.wide(at).slope / at.u / Wide::of(x)).to_f64()
        });
        let same = rates.iter().all(|rate| (rate / rates[3] - 1.0).abs() < 1e-6);
        (same && rates[3] > 0.0).then_some(0.5 * (rates[2] + rates[3]))
    }
}

/// Halvings that bring two places together to all digits.
const MOST_HALVINGS: u32 = 110;

/// The parts of a formula at whose changes of sign it may have a kink, a jump or a pole; of two, their
/// difference.
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

fn sign_of(number: f64) -> i8 {
    i8::from(number > 0.0) - i8::from(number < 0.0)
}

/// The limit of the normalised f, given for f itself or found from three values on the way, each twice as far
/// as the one before; `tangent` is what normalising adds.
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
                "{symbol} could not be found out, f reaches {}; give it as {argument}, inf if it is infinite",
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
    // What was found has more digits.
    Ok(found.unwrap_or(normalised))
}

/// Infinite if the values grow like `ln u` or faster, finite if they no longer change, and `None` if that
/// does not tell.
fn settled([a, b, c]: [Wide; 3]) -> Option<Wide> {
    let (before, step) = (b - a, c - b);
    if !step.abs().is_above_error(DECIMALS) {
        return Some(c);
    }
    let grows = (step - before * Wide::of(2.0 * (1.0 - 1e-9))).is_above_error(0.0);
    (c.to_f64() == f64::INFINITY || grows && before.is_above_error(0.0))
        .then(|| Wide::of(f64::INFINITY))
}

fn falls(fall: Wide, left: f64, right: f64) -> String {
    let (from, to) = (shown_exp(left), shown_exp(right));
    let place =
        if from == to { format!("at u = {from}") } else { format!("from u = {from} to {to}") };
    format!("f must be convex, its slope falls by {} {place}", shown(fall))
}

/// Six digits.
fn shown(number: Wide) -> String {
    shown_double(number.to_f64())
}

fn shown_exp(log: f64) -> String {
    shown_double(log.exp())
}

fn shown_double(number: f64) -> String {
    let rounded = format!("{number:.5e}").parse().unwrap_or(number);
    if rounded == 0.0 || (1e-4..1e6).contains(&rounded.abs()) {
        format!("{rounded}")
    } else {
        format!("{rounded:e}")
    }
}

fn widened<T: Real>(at: Point<T>) -> Point<Wide> {
    let log = Wide::of_dd(at.log.to_dd());
    if at.log.to_f64().abs() < 600.0 {
        let wide = |number: T| Wide::of_dd(number.to_dd()).rounded();
        Point { log, excess: wide(at.excess), u: wide(at.u) }
    } else {
        Point::from_log(log)
    }
}

/// The number and the slope of a formula; what a node does with its parts is in [`combined`], so that text
/// of a thousand operations inside each other fits on the stack of a thread.
fn evaluate<T: Real>(node: &Node, at: Point<T>) -> Jet<T> {
    match node {
        Node::Variable => Jet { value: at.u, slope: at.u, log: Some((at.log, T::of(1.0))) },
        Node::Number(number) => Jet {
            value: T::of(*number),
            slope: T::of(0.0),
            log: (*number > 0.0).then(|| (T::of(*number).ln(), T::of(0.0))),
        },
        Node::Negative(inner)
        | Node::Ln(inner)
        | Node::Exp(inner)
        | Node::Sqrt(inner)
        | Node::Abs(inner)
        | Node::Sin(inner)
        | Node::Cos(inner) => {
            let inner = evaluate(inner, at);
            combined(node, inner, inner)
        }
        Node::Add(left, right)
        | Node::Multiply(left, right)
        | Node::Divide(left, right)
        | Node::Power(left, right)
        | Node::Extreme(_, left, right) => combined(node, evaluate(left, at), evaluate(right, at)),
    }
}

/// What a node makes of its parts; of one part, it is the left one.
#[inline(never)]
#[allow(clippy::too_many_lines)] // one arm a kind of node
fn combined<T: Real>(node: &Node, left: Jet<T>, right: Jet<T>) -> Jet<T> {
    let zero = T::of(0.0);
    let plain = |value: T, slope: T| Jet { value, slope, log: None };
    let logarithm = |of: Jet<T>| of.log.unwrap_or_else(|| (of.value.ln(), of.slope / of.value));
    match node {
        Node::Variable | Node::Number(_) => left,
        Node::Negative(_) => plain(-left.value, -left.slope),
        Node::Add(..) => {
            let log = dominant(left, right).or_else(|| dominant(right, left));
            Jet { value: left.value + right.value, slope: left.slope + right.slope, log }
        }
        Node::Multiply(..) => {
            let log = left.log.zip(right.log).map(|(a, b)| (a.0 + b.0, a.1 + b.1));
            let (l, r) = (left.value.to_f64().abs(), right.value.to_f64().abs());
            if has_overflowed(l)
                || has_overflowed(r)
                || is_underflow(left, r)
                || is_underflow(right, l)
            {
                return from_log(log);
            }
            Jet {
                value: left.value * right.value,
                slope: left.slope * right.value + left.value * right.slope,
                log,
            }
        }
        Node::Divide(..) => {
            let log = left.log.zip(right.log).map(|(a, b)| (a.0 - b.0, a.1 - b.1));
            let (l, r) = (left.value.to_f64().abs(), right.value.to_f64().abs());
            if has_overflowed(l)
                || has_overflowed(r)
                || is_underflow(left, 1.0 / r)
                || is_underflow(right, f64::INFINITY)
            {
                return from_log(log);
            }
            let value = left.value / right.value;
            Jet { value, slope: (left.slope - value * right.slope) / right.value, log }
        }
        Node::Power(..) => {
            let (base, exponent) = (left, right);
            let order = exponent.value.to_f64();
            let constant = exponent.slope.to_f64() == 0.0;
            if constant && order.fract() == 0.0 && order.abs() <= 1e6 {
                // Whole powers, of negative numbers too.
                let lower = whole_power(base.value, order as i32 - 1);
                let value = lower * base.value;
                let log = if in_range(value) { base.log } else { Some(logarithm(base)) };
                return Jet {
                    value,
                    slope: exponent.value * lower * base.slope,
                    log: log.map(|log| (log.0 * exponent.value, log.1 * exponent.value)),
                };
            }
            if constant && order > 1.0 && base.value.to_f64() == 0.0 && base.log.is_none() {
                return plain(zero, zero);
            }
            let log = logarithm(base);
            from_log(Some((
                log.0 * exponent.value,
                exponent.slope * log.0 + exponent.value * log.1,
            )))
        }
        Node::Ln(_) => {
            let (value, slope) = logarithm(left);
            plain(value, slope)
        }
        Node::Exp(_) => from_log(Some((left.value, left.slope))),
        Node::Sqrt(_) => {
            let half = T::of(0.5);
            if let Some(log) = left.log {
                return from_log(Some((log.0 * half, log.1 * half)));
            }
            let value = left.value.sqrt();
            plain(value, half * left.slope / value)
        }
        Node::Abs(_) => {
            match left.value.to_f64() {
                value if value > 0.0 => left,
                value if value < 0.0 => plain(-left.value, -left.slope),
                _ => plain(left.value.abs(), zero), // at a kink, the middle of its slopes
            }
        }
        Node::Sin(_) => plain(left.value.sin(), left.slope * left.value.cos()),
        Node::Cos(_) => plain(left.value.cos(), -(left.slope * left.value.sin())),
        Node::Extreme(greater, ..) => {
            let difference = (left.value - right.value).to_f64();
            if difference == 0.0 {
                plain(left.value, (left.slope + right.slope) * T::of(0.5))
            } else if (difference > 0.0) == *greater {
                left
            } else {
                right
            }
        }
    }
}

/// Whether a number is neither 0 nor infinite.
fn in_range<T: Real>(value: T) -> bool {
    value.to_f64().is_finite() && value.to_f64() != 0.0
}

/// The logarithm of a sum in which one term has overflowed and the other is nothing beside it.
fn dominant<T: Real>(term: Jet<T>, other: Jet<T>) -> Option<(T, T)> {
    let alone = other.value.to_f64().is_finite();
    term.log.filter(|log| alone && term.value.to_f64().is_infinite() && log.0.to_f64().is_finite())
}

fn has_overflowed(size: f64) -> bool {
    !size.is_finite()
}

/// Whether a number is 0 only because its type ends there, and its product with `factor` might not be.
fn is_underflow<T: Real>(number: Jet<T>, factor: f64) -> bool {
    number.value.to_f64() == 0.0
        && number.log.is_some_and(|(log, _)| {
            log.to_f64().is_finite() && log.to_f64() + factor.ln() > LOG_OF_NOTHING
        })
}

/// `ln` of a number that is 0 in every product that matters.
const LOG_OF_NOTHING: f64 = -800.0;

/// A positive number by its logarithm; NaN where that is not known, to be evaluated again with a wider range.
fn from_log<T: Real>(log: Option<(T, T)>) -> Jet<T> {
    let Some((exponent, relative)) = log else {
        return Jet { value: T::of(f64::NAN), slope: T::of(f64::NAN), log };
    };
    let value = exponent.exp();
    Jet { value, slope: value * relative, log }
}

fn whole_power<T: Real>(base: T, exponent: i32) -> T {
    let mut result = T::of(1.0);
    let mut square = base;
    let mut rest = exponent.unsigned_abs();
    while rest > 0 {
        if rest & 1 == 1 {
            result = result * square;
        }
        square = square * square;
        rest >>= 1;
    }
    if exponent < 0 { T::of(1.0) / result } else { result }
}

/// The functions; `min` and `max` take two arguments.
const FUNCTIONS: [&str; 9] = ["ln", "log", "exp", "sqrt", "abs", "sin", "cos", "min", "max"];

fn read(text: &str) -> Result<Node> {
    // Places are bytes; columns count characters.
    let refuse = |place: usize, reason: String| Error::Expression {
        text: text.to_owned(),
        column: text[..place].chars().count() + 1,
        reason,
    };
    if let Some((place, _)) = text.char_indices().nth(MOST_CHARACTERS) {
        return Err(refuse(place, format!("longer than {MOST_CHARACTERS} characters")));
    }
    let mut open = Vec::new();
    for (place, character) in text.char_indices() {
        match character {
            '(' => open.push(place),
            ')' => drop(open.pop()),
            _ => {}
        }
        if open.len() > MOST_NESTED {
            let reason = format!("more than {MOST_NESTED} parentheses inside each other");
            return Err(refuse(place, reason));
        }
    }
    let mut pairs =
        Grammar::parse(Rule::whole, text).map_err(|error| {
            let (pest::error::InputLocation::Pos(place)
            | pest::error::InputLocation::Span((place, _))) = error.location;
            let rest = text[place..].trim_start();
            let place = text.len() - rest.len();
            let unclosed = open.last().map(|&place| text[..place].chars().count() + 1);
            refuse(place, unreadable(&text[..place], rest, unclosed))
        })?;
    match pairs.next() {
        Some(expression) => build(expression.into_inner(), &refuse),
        None => Err(refuse(0, "empty".to_owned())),
    }
}

/// What is wrong between `before` and `rest`, where reading stopped; `unclosed` is the column of the last
/// parenthesis that is never closed.
fn unreadable(before: &str, rest: &str, unclosed: Option<usize>) -> String {
    let before = before.trim_end();
    let in_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let after_operand = before.ends_with(|c: char| in_name(c) || c == '.' || c == ')');
    let Some(found) = rest.chars().next() else {
        return match unclosed {
            _ if before.is_empty() => "empty; write a function of u, as in u*ln(u)".to_owned(),
            Some(column) if after_operand => format!("the ( at column {column} is not closed"),
            _ => "u, a number, a function or ( is missing at the end".to_owned(),
        };
    };
    let instead = match found {
        '|' => "write abs(...)",
        '\u{b2}' => "write ^2",
        '\u{b3}' => "write ^3",
        '\u{d7}' | '\u{b7}' => "write *",
        '\u{f7}' => "write /",
        '\u{2212}' | '\u{2013}' => "write -",
        _ if in_name(found) || "+-*/^().,".contains(found) => "",
        _ => "there are u, numbers, + - * / ^, parentheses and functions",
    };
    let name = before.rsplit(|c| !in_name(c)).next().unwrap_or_default();
    if !instead.is_empty() {
        format!("{found:?} is not known; {instead}")
    } else if !after_operand {
        format!("u, a number, a function or ( is missing before {found:?}")
    } else if found == ')' {
        "there is no ( for this )".to_owned()
    } else if found == ',' {
        "a comma may only stand between the two arguments of min or max".to_owned()
    } else if FUNCTIONS.contains(&name) {
        format!("{name} needs parentheses, as in {name}(u)")
    } else {
        format!("an operator is missing before {found:?}; a product needs its *, as in 2*u")
    }
}

/// The tree of an expression's operands and operators; `refuse` makes an error of a column and a reason.
fn build(pairs: Pairs<'_, Rule>, refuse: &impl Fn(usize, String) -> Error) -> Result<Node> {
    PRECEDENCE
        .map_primary(|pair| primary(pair, refuse))
        .map_prefix(|sign, operand| {
            let operand = operand?;
            Ok(match sign.as_rule() {
                Rule::negative => Node::Negative(Box::new(operand)),
                _ => operand,
            })
        })
        .map_infix(|left, operator, right| {
            let (left, right) = (Box::new(left?), Box::new(right?));
            Ok(match operator.as_rule() {
                Rule::add => Node::Add(left, right),
                Rule::subtract => Node::Add(left, Box::new(Node::Negative(right))),
                Rule::multiply => Node::Multiply(left, right),
                Rule::divide => Node::Divide(left, right),
                _ => Node::Power(left, right),
            })
        })
        .parse(pairs)
}

fn primary(pair: Pair<'_, Rule>, refuse: &impl Fn(usize, String) -> Error) -> Result<Node> {
    let (place, text) = (pair.as_span().start(), pair.as_str());
    let shown = excerpt(text, 1);
    match pair.as_rule() {
        Rule::number => match text.parse::<f64>() {
            Ok(number) if number.is_finite() => Ok(Node::Number(number)),
            _ => Err(refuse(place, format!("{shown} is not a finite number"))),
        },
        Rule::variable if text == "u" => Ok(Node::Variable),
        Rule::variable if FUNCTIONS.contains(&text) => {
            Err(refuse(place, format!("{text} is a function, as in {text}(u)")))
        }
        Rule::variable => Err(refuse(place, format!("{shown:?} is not known; the variable is u"))),
        Rule::call => call(pair, place, refuse),
        _ => build(pair.into_inner(), refuse),
    }
}

fn call(
    pair: Pair<'_, Rule>,
    place: usize,
    refuse: &impl Fn(usize, String) -> Error,
) -> Result<Node> {
    let mut parts = pair.into_inner();
    let name = parts.next().map_or("", |name| name.as_str());
    if name == "u" {
        let reason = "u is no function; a product needs its *, as in u*(u-1)".to_owned();
        return Err(refuse(place, reason));
    }
    if !FUNCTIONS.contains(&name) {
        let known = FUNCTIONS.join(", ");
        let name = excerpt(name, 1);
        return Err(refuse(place, format!("function {name:?} is not known; known are {known}")));
    }
    let mut arguments = parts
        .map(|argument| build(argument.into_inner(), refuse).map(Box::new))
        .collect::<Result<Vec<_>>>()?;
    let expected = if matches!(name, "min" | "max") { 2 } else { 1 };
    if arguments.len() != expected {
        let plural = if expected == 1 { "" } else { "s" };
        let reason = format!("{name} takes {expected} argument{plural}, got {}", arguments.len());
        return Err(refuse(place, reason));
    }
    let last = arguments.remove(expected - 1);
    Ok(match name {
        "ln" | "log" => Node::Ln(last),
        "exp" => Node::Exp(last),
        "sqrt" => Node::Sqrt(last),
        "abs" => Node::Abs(last),
        "sin" => Node::Sin(last),
        "cos" => Node::Cos(last),
        _ => Node::Extreme(name == "max", arguments.remove(0), last),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(text: &str) -> String {
        match Expression::parse(text, None, None) {
            Err(error) => error.to_string(),
            Ok(_) => panic!("{text} was accepted"),
        }
    }

    fn value(text: &str, u: f64) -> f64 {
        evaluate(&read(text).unwrap(), Point::from_ratio(u)).value
    }

    #[test]
    fn precedence_is_that_of_mathematics() {
        assert_eq!(value("-u^2", 3.0), -9.0);
        assert_eq!(value("2^3^2", 1.0), 512.0);
        assert_eq!(value("u^-2", 2.0), 0.25);
        assert_eq!(value("2*u**2 - 6/3*u - -1", 3.0), 13.0);
        assert_eq!(value("1e-3*u + .5 + 2.", 1000.0), 3.5);
        assert_eq!(value("min(u, 2) + max(u, 2) - abs(-u)", 3.0), 2.0);
        assert!((value("sin(u)^2 + cos(u)^2", 3.0) - 1.0).abs() < 1e-15);
    }

    #[test]
    fn the_logarithm_of_u_does_not_underflow() {
        let at = Point::from_log(-1e6);
        let of = |text: &str| evaluate(&read(text).unwrap(), at).value;
        assert_eq!(of("ln(u)"), -1e6);
        assert_eq!(of("u*ln(u)"), 0.0);
        assert_eq!(of("ln(3*u^2/u)"), -1e6 + 3f64.ln());
        assert_eq!(of("u^2*u^-2"), 1.0);
        assert!(of("(u-u^2)/u").is_nan(), "what is out of range says so");
        let wide = evaluate(&read("(u-u^2)/u").unwrap(), widened(at));
        assert_eq!(wide.value.to_f64(), 1.0);
    }

    #[test]
    fn slopes_agree_with_differences() {
        for text in
            ["u*ln(u)", "u^2.5", "sqrt(u)*exp(-u)", "u^u", "1/(1+u)", "sin(u)*cos(u)", "2^u"]
        {
            let node = read(text).unwrap();
            for t in [-2.0, -0.3, 0.4, 1.7] {
                let at = |t: f64| evaluate(&node, Point::from_log(t));
                let measured = (at(t + 1e-6).value - at(t - 1e-6).value) / 2e-6;
                assert!(
                    (at(t).slope - measured).abs() < 1e-7 * (1.0 + measured.abs()),
                    "{text} {t}"
                );
            }
        }
    }

    #[test]
    fn errors_point_at_the_column() {
        assert!(refused("u*ln(v)").contains("column 6: \"v\" is not known"));
        assert!(refused("u*lnn(u)").contains("column 3: function \"lnn\" is not known"));
        assert!(refused("u*(u-1").contains("column 7"));
        assert!(refused("u**").contains("column 4"));
        assert!(refused("max(u)").contains("column 1: max takes 2 arguments, got 1"));
        assert!(refused("2 u").contains("column 3"));
        assert!(refused("").contains("column 1"));
        assert!(refused("1e999*u").contains("not a finite number"));
        assert!(refused(&"(".repeat(100)).contains("parentheses inside each other"));
        assert!(refused(&"u+".repeat(5000)).contains("longer than"));
    }

    #[test]
    fn functions_that_are_no_generators_are_refused() {
        assert!(refused("u^2").contains("f(1) must be 0, it is 1"));
        assert!(refused("(u-1)^3").contains("f must be convex"));
        assert!(refused("-abs(u-1)").contains("f must be convex"));
        assert!(refused("sin(u-1)").contains("f must be convex"));
        assert!(refused("3*(u-1)").contains("linear"));
        assert!(refused("1/(u-2)^2 - 1").contains("convex"));
        assert!(
            refused("ln(0.5) - ln(u-0.5)").contains("finite on (0, inf), it is NaN at u = 0.49")
        );
    }

    #[test]
    fn limits_are_found_or_asked_for() {
        let found = |text: &str| {
            let f = Expression::parse(text, None, None).unwrap();
            (f.at_zero.to_f64(), f.slope_at_infinity, f.curvature)
        };
        let (zero, slope, curvature) = found("u*ln(u)");
        assert!((zero - 1.0).abs() < 1e-15 && slope == f64::INFINITY);
        assert!((curvature.unwrap() - 1.0).abs() < 1e-9);
        let (zero, slope, _) = found("-ln(u)");
        assert!(zero == f64::INFINITY && (slope - 1.0).abs() < 1e-15);
        assert_eq!(found("abs(u-1)/2"), (0.5, 0.5, None));
        assert_eq!(found("max(u-1.3, 0)"), (0.0, 1.0, None));
        let slow = "1 - u^1e-14";
        assert!(refused(slow).contains("f(0) could not be found out"));
        assert!(Expression::parse(slow, Some(1.0), Some(0.0)).is_ok());
    }

    /// Random text is read or refused, never a panic, and what is read evaluates.
    #[test]
    fn random_text_is_read_or_refused() {
        use proptest::prelude::*;
        use proptest::test_runner::{Config, TestRunner};
        let token = prop::sample::select(
            [
                "u", "1", "2.5", "1e3", "+", "-", "*", "/", "^", "**", "(", ")", ",", "ln", "exp(",
                "max(", "sqrt(", "abs(", " ", "v", "\u{e9}", ".",
            ]
            .as_slice(),
        );
        let mut runner = TestRunner::new(Config { cases: 20_000, ..Config::default() });
        runner
            .run(&prop::collection::vec(token, 0..40), |tokens| {
                if let Ok(node) = read(&tokens.concat()) {
                    let _ = evaluate(&node, Point::from_log(Dd::of(0.3)));
                }
                Ok(())
            })
            .unwrap();
    }
}
