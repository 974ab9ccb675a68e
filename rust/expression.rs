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
use crate::error::{Error, Result};
use crate::real::{Dd, Real};

/// Longest text that is read.
const MOST_CHARACTERS: usize = 1024;
/// Deepest nesting of parentheses that is read: the parser is recursive.
const MOST_NESTED: usize = 64;

#[derive(pest_derive::Parser)]
#[grammar_inline = r#"
WHITESPACE = _{ " " | "\t" }
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

/// A number, its derivative in `ln u`, and its logarithm where that is known better than from it.
#[derive(Clone, Copy)]
struct Jet<T> {
    value: T,
    slope: T,
    log: Option<T>,
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
        let refuse = |reason: String| Error::Generator { text: text.to_owned(), reason };
        let one = expression.evaluate(Point::from_excess(Dd::of(0.0)));
        let at_one = one.value.to_f64();
        if at_one.is_nan() || at_one.abs() > f64::EPSILON {
            return Err(refuse(format!("f(1) must be 0, it is {at_one}")));
        }
        if !one.slope.to_f64().is_finite() {
            return Err(refuse("f'(1) must be finite".to_owned()));
        }
        expression.slope_at_one = one.slope;
        expression.judge_convexity().map_err(refuse)?;

        let limit = |name: &str, given: Option<f64>, far: [Dd; 3]| match (given, limit_of(far)) {
            (Some(given), found) => {
                // Both rise towards their limit.
                let least = far[2].to_f64();
                let slack = 1e-9 * least.abs().max(1e-3);
                let agrees = found.is_none_or(|found| {
                    let found = found.to_f64();
                    given == found || (given - found).abs() <= slack
                });
                if given >= least - slack && agrees {
                    Ok(Dd::of(given))
                } else {
                    Err(refuse(format!("{name} was given, and f contradicts it")))
                }
            }
            (None, Some(found)) => Ok(found),
            (None, None) => Err(refuse(format!(
                "{name} could not be found out; give it, inf if it is infinite"
            ))),
        };
        let c = expression.slope_at_one.to_f64();
        let value_at = |log: f64| expression.raw(Point::from_log(Dd::of(log)));
        let ratio_at = |log: f64| value_at(log) / Dd::of(log).exp();
        let zero = limit("f(0)", at_zero.map(|f0| f0 + c), [-150.0, -300.0, -600.0].map(value_at))?;
        let slope = limit(
            "f'(inf)",
            slope_at_infinity.map(|s| s - c),
            [150.0, 300.0, 600.0].map(ratio_at),
        )?;
        expression.at_zero = zero;
        expression.slope_at_infinity = slope.to_f64();
        expression.curvature = expression.measured_curvature();
        Ok(expression)
    }

    /// `f(u) - f'(1) (u-1)`, at least 0.
    pub(crate) fn value<T: Real>(&self, at: Point<T>) -> T {
        if at.u.to_f64() == 0.0 && at.log.to_f64() == f64::NEG_INFINITY {
            return T::of_dd(self.at_zero);
        }
        self.raw(at)
    }

    fn raw<T: Real>(&self, at: Point<T>) -> T {
        self.evaluate(at).value - T::of_dd(self.slope_at_one) * at.excess
    }

    /// `u f'(u)`, of the same function.
    pub(crate) fn log_slope(&self, at: Point<f64>) -> f64 {
        self.evaluate(at).slope - self.slope_at_one.to_f64() * at.u
    }

    fn evaluate<T: Real>(&self, at: Point<T>) -> Jet<T> {
        evaluate(&self.node, at)
    }

    /// Looks for a chord that lies below the function, and for values that are not finite.
    fn judge_convexity(&self) -> std::result::Result<(), String> {
        let sample = |t: f64| {
            let at = Point::from_log(Dd::of(t));
            (at.u, self.raw(at))
        };
        // Outwards from 1 on both sides, finely where trust regions live.
        let steps: Vec<f64> = (1..=2200).map(|i| grid(f64::from(i) / 2200.0)).collect();
        for sign in [-1.0, 1.0] {
            let mut points = vec![sample(-sign * steps[0]), (Dd::of(1.0), Dd::of(0.0))];
            for &step in &steps {
                let (u, value) = sample(sign * step);
                let shown = u.to_f64();
                if value.to_f64() == f64::INFINITY && step > 1.0 {
                    break; // beyond the range of a double
                }
                if !value.to_f64().is_finite() {
                    return Err(format!(
                        "f must be finite on (0, inf), it is {} at u = {shown}",
                        self.evaluate(Point::from_log(sign * step)).value
                    ));
                }
                points.push((u, value));
            }
            let mut linear = true;
            for triple in points.windows(3) {
                let [(u0, f0), (u1, f1), (u2, f2)] = [triple[0], triple[1], triple[2]];
                let share = (u1 - u0) / (u2 - u0);
                let chord = f0 + share * (f2 - f0);
                let above = (f1 - chord).to_f64();
                let scale = f0.abs().to_f64() + f1.abs().to_f64() + f2.abs().to_f64() + u1.to_f64();
                if above > 1e-25 * scale {
                    return Err(format!(
                        "f must be convex, at u = {} it lies {above:e} above a chord",
                        u1.to_f64()
                    ));
                }
                linear &= above > -1e-25 * scale;
            }
            if linear && points.iter().all(|(_, value)| value.to_f64().abs() < 1e-25) && sign > 0.0
            {
                let left = steps.iter().all(|&step| sample(-step).1.to_f64().abs() < 1e-25);
                if left {
                    return Err("f is linear: its divergence is 0 everywhere".to_owned());
                }
            }
        }
        Ok(())
    }

    fn measured_curvature(&self) -> Option<f64> {
        let second_difference = |h: f64| {
            let beside = |x: f64| self.raw(Point::from_excess(Dd::of(x)));
            ((beside(h) + beside(-h)) / Dd::product(h, h)).to_f64()
        };
        let (fine, coarse) = (second_difference(1e-7), second_difference(1e-5));
        // A kink makes it grow as 1/h, a flat bottom makes it 0.
        (fine > 0.0 && (fine / coarse - 1.0).abs() < 1e-3).then_some(fine)
    }
}

/// From 0 to 1 to distances `t = abs(ln u)` from 1e-6 to 300.
fn grid(share: f64) -> f64 {
    1e-6 * 3e8_f64.powf(share)
}

/// The limit of a function of which the values at t, 2t and 4t are known, `t = abs(ln u)` large: infinite if
/// it grows like t or faster, finite if it has settled, and `None` if that does not tell.
fn limit_of(values: [Dd; 3]) -> Option<Dd> {
    let [a, b, c] = values.map(Real::to_f64);
    if c.is_nan() || c == f64::INFINITY || (b > a && c - b >= (2.0 - 1e-9) * (b - a)) && c > b + 1.0
    {
        return Some(Dd::of(f64::INFINITY));
    }
    ((c - b).abs() <= 1e-12 * c.abs().max(1e-3)).then_some(values[2])
}

#[allow(clippy::too_many_lines)] // one arm a kind of node
fn evaluate<T: Real>(node: &Node, at: Point<T>) -> Jet<T> {
    let zero = T::of(0.0);
    let plain = |value: T, slope: T| Jet { value, slope, log: None };
    let logarithm = |of: Jet<T>| of.log.unwrap_or_else(|| of.value.ln());
    match node {
        Node::Variable => Jet { value: at.u, slope: at.u, log: Some(at.log) },
        Node::Number(number) => Jet {
            value: T::of(*number),
            slope: zero,
            log: (*number > 0.0).then(|| T::of(*number).ln()),
        },
        Node::Negative(inner) => {
            let inner = evaluate(inner, at);
            plain(-inner.value, -inner.slope)
        }
        Node::Add(left, right) => {
            let (left, right) = (evaluate(left, at), evaluate(right, at));
            plain(left.value + right.value, left.slope + right.slope)
        }
        Node::Multiply(left, right) => {
            let (left, right) = (evaluate(left, at), evaluate(right, at));
            product_of_logs(left, right, T::of(1.0)).unwrap_or(Jet {
                value: left.value * right.value,
                slope: left.slope * right.value + left.value * right.slope,
                log: left.log.zip(right.log).map(|(a, b)| a + b),
            })
        }
        Node::Divide(left, right) => {
            let (left, right) = (evaluate(left, at), evaluate(right, at));
            let value = left.value / right.value;
            product_of_logs(left, right, T::of(-1.0)).unwrap_or(Jet {
                value,
                slope: (left.slope - value * right.slope) / right.value,
                log: left.log.zip(right.log).map(|(a, b)| a - b),
            })
        }
        Node::Power(base, exponent) => {
            let (base, exponent) = (evaluate(base, at), evaluate(exponent, at));
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
                    log: log.map(|log| log * exponent.value),
                };
            }
            if constant && order > 1.0 && base.value.to_f64() == 0.0 {
                return plain(zero, zero);
            }
            let log = logarithm(base);
            let value = (log * exponent.value).exp();
            let relative = exponent.slope * log + exponent.value * (base.slope / base.value);
            Jet { value, slope: value * relative, log: Some(log * exponent.value) }
        }
        Node::Ln(inner) => {
            let inner = evaluate(inner, at);
            // Of u itself the derivative in ln u is 1, also where u underflows.
            let relative = if inner.value.to_f64() == inner.slope.to_f64() {
                T::of(1.0)
            } else {
                inner.slope / inner.value
            };
            plain(logarithm(inner), relative)
        }
        Node::Exp(inner) => {
            let inner = evaluate(inner, at);
            let value = inner.value.exp();
            Jet { value, slope: value * inner.slope, log: Some(inner.value) }
        }
        Node::Sqrt(inner) => {
            let inner = evaluate(inner, at);
            let half = T::of(0.5);
            let value = match inner.log {
                Some(log) => (log * half).exp(),
                None => inner.value.sqrt(),
            };
            Jet { value, slope: half * inner.slope / value, log: inner.log.map(|log| log * half) }
        }
        Node::Abs(inner) => {
            let inner = evaluate(inner, at);
            match inner.value.to_f64() {
                value if value > 0.0 => inner,
                value if value < 0.0 => plain(-inner.value, -inner.slope),
                _ => plain(inner.value.abs(), zero), // at a kink, the middle of its slopes
            }
        }
        Node::Sin(inner) => {
            let inner = evaluate(inner, at);
            plain(inner.value.sin(), inner.slope * inner.value.cos())
        }
        Node::Cos(inner) => {
            let inner = evaluate(inner, at);
            plain(inner.value.cos(), -(inner.slope * inner.value.sin()))
        }
        Node::Extreme(greater, left, right) => {
            let (left, right) = (evaluate(left, at), evaluate(right, at));
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

/// `left * right^sign` by logarithms, where a factor is out of the range of a double and its logarithm
/// is known. The slope is NaN then: the solver does without.
fn product_of_logs<T: Real>(left: Jet<T>, right: Jet<T>, sign: T) -> Option<Jet<T>> {
    if in_range(left.value) && in_range(right.value) {
        return None;
    }
    let known = |of: Jet<T>| {
        let log = of.log.or_else(|| in_range(of.value).then(|| of.value.abs().ln()));
        log.filter(|log| log.to_f64().is_finite()) // the logarithm of a true 0 says nothing
    };
    let negative = (left.value.to_f64() < 0.0) != (right.value.to_f64() < 0.0);
    let log = known(left)? + sign * known(right)?;
    let value = log.exp();
    Some(Jet {
        value: if negative { -value } else { value },
        slope: T::of(f64::NAN),
        log: (!negative).then_some(log),
    })
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

fn read(text: &str) -> Result<Node> {
    let refuse =
        |column: usize, reason: String| Error::Expression { text: text.to_owned(), column, reason };
    if text.chars().count() > MOST_CHARACTERS {
        let reason = format!("longer than {MOST_CHARACTERS} characters");
        return Err(refuse(MOST_CHARACTERS + 1, reason));
    }
    let mut nested = 0_usize;
    for (place, character) in text.chars().enumerate() {
        match character {
            '(' => nested += 1,
            ')' => nested = nested.saturating_sub(1),
            _ => {}
        }
        if nested > MOST_NESTED {
            let reason = format!("more than {MOST_NESTED} parentheses inside each other");
            return Err(refuse(place + 1, reason));
        }
    }
    let mut pairs = Grammar::parse(Rule::whole, text).map_err(|error| {
        let column = match error.line_col {
            pest::error::LineColLocation::Pos((_, column))
            | pest::error::LineColLocation::Span((_, column), _) => column,
        };
        refuse(column, error.variant.message().into_owned())
    })?;
    match pairs.next() {
        Some(expression) => build(expression.into_inner(), &refuse),
        None => Err(refuse(1, "empty".to_owned())),
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
    let (_, column) = pair.line_col();
    match pair.as_rule() {
        Rule::number => match pair.as_str().parse::<f64>() {
            Ok(number) if number.is_finite() => Ok(Node::Number(number)),
            _ => Err(refuse(column, format!("{} is not a finite number", pair.as_str()))),
        },
        Rule::variable if pair.as_str() == "u" => Ok(Node::Variable),
        Rule::variable => {
            Err(refuse(column, format!("{:?} is not known; the variable is u", pair.as_str())))
        }
        Rule::call => call(pair, column, refuse),
        _ => build(pair.into_inner(), refuse),
    }
}

fn call(
    pair: Pair<'_, Rule>,
    column: usize,
    refuse: &impl Fn(usize, String) -> Error,
) -> Result<Node> {
    let mut parts = pair.into_inner();
    let name = parts.next().map_or("", |name| name.as_str());
    let mut arguments = parts
        .map(|argument| build(argument.into_inner(), refuse).map(Box::new))
        .collect::<Result<Vec<_>>>()?;
    let expected = match name {
        "ln" | "log" | "exp" | "sqrt" | "abs" | "sin" | "cos" => 1,
        "min" | "max" => 2,
        _ => {
            let known = "ln, log, exp, sqrt, abs, min, max, sin, cos";
            return Err(refuse(
                column,
                format!("function {name:?} is not known; known are {known}"),
            ));
        }
    };
    if arguments.len() != expected {
        let reason = format!("{name} takes {expected} arguments, got {}", arguments.len());
        return Err(refuse(column, reason));
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
        assert_eq!(of("ln(3*u^2/u)"), -1e6 + 3f64.ln());
        assert_eq!(of("u*ln(u)"), 0.0);
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
        assert!(refused("ln(u-0.5) - ln(0.5)").contains("finite on (0, inf)"));
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
        let slow = "1 - u^0.001";
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
