//! Grammar of a generator's text, and the syntax tree it gives.

use std::sync::LazyLock;

use pest::Parser as _;
use pest::iterators::{Pair, Pairs};
use pest::pratt_parser::{Assoc, Op, PrattParser};

use crate::error::{Error, Result, excerpt};

/// Max characters of a text.
const MAX_CHARACTERS: usize = 1024;
/// Max nesting of parentheses, because the parser is recursive.
const MAX_NESTED: usize = 64;

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

/// A node of the syntax tree.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Node {
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
    /// `max` if the flag is true, otherwise `min`.
    Extreme(bool, Box<Node>, Box<Node>),
}

/// Names of the functions. `min` and `max` take two arguments, the others one.
const FUNCTIONS: [&str; 9] = ["ln", "log", "exp", "sqrt", "abs", "sin", "cos", "min", "max"];

/// Reads a text.
pub(super) fn read(text: &str) -> Result<Node> {
    // Places count bytes, columns characters.
    let refuse = |place: usize, reason: String| Error::Expression {
        text: text.to_owned(),
        column: text[..place].chars().count() + 1,
        reason,
    };
    if let Some((place, _)) = text.char_indices().nth(MAX_CHARACTERS) {
        return Err(refuse(place, format!("longer than {MAX_CHARACTERS} characters")));
    }
    let mut open = Vec::new();
    for (place, character) in text.char_indices() {
        match character {
            '(' => open.push(place),
            ')' => drop(open.pop()),
            _ => {}
        }
        if open.len() > MAX_NESTED {
            let reason = format!("more than {MAX_NESTED} parentheses inside each other");
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

/// The reason why reading stopped between `before` and `rest`; `unclosed` is the column of the last
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

/// Builds the tree of operands and operators; `refuse` makes an error of a place and a reason.
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

/// Builds the node of an operand.
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

/// Builds the node of a function call.
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
