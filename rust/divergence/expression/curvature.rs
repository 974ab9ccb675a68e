//! f'' of a text, with a bound of its rounding error.
//!
//! A term is differentiated twice in `u` (forward mode), in [`Wide`] numbers. So f'' of a small term is known
//! relative to itself where the slope of the others hides its own: `-1e-9*ln(u)` beside `2*u` at `u = 1e40`.
//!
//! The quotient rule cancels where a quotient approaches a line, and so do roots and logarithms:
//!
//! - `(u-2)^2/(u+2) = u - 6 + 16/(u+2)`
//! - `sqrt((u-1)^2+c) = u - 1 + c/(sqrt((u-1)^2+c) + u - 1)`
//! - `ln(1+exp(u)) = u + ln(1+exp(-u))`
//!
//! f'' of the line on the right is exactly 0. But the left side is more accurate near `u = 1` and 0. So the text is
//! evaluated as it stands, and expanded only where rounding hides the sign.

use super::evaluate::whole_power;
use super::grammar::Node;
use super::judge::DECIMALS;
use crate::number::Real;
use crate::number::wide::Wide;

/// Max degree of a polynomial. Beyond it, a product stays a product.
const MAX_DEGREE: usize = 8;

/// f'' of a text at any `u`.
pub(super) struct Curvature {
    text: Term,
    expanded: Term,
}

impl Curvature {
    pub(super) fn of(node: &Node) -> Self {
        let text = Term::of(node);
        let expanded = Expanded::of(&text).whole();
        Self { text, expanded }
    }

    /// `f''(u)`. It is NaN at a kink, and after an overflow.
    pub(super) fn at(&self, u: Wide) -> Wide {
        let bend = curve(&self.text, u).bend;
        if bend.abs().is_above_error(2.0) || bend.is_zero() {
            return bend;
        }
        let expanded = curve(&self.expanded, u).bend;
        if expanded.is_finite() { expanded } else { bend }
    }
}

/// Coefficients of a polynomial in `u`, the constant first. The last one is not 0.
type Polynomial = Vec<Wide>;

/// A formula.
#[derive(Clone)]
enum Term {
    Polynomial(Polynomial),
    /// An operation on one or two operands.
    Of(Operation, Vec<Term>),
}

#[derive(Clone, Copy, PartialEq)]
enum Operation {
    Sum,
    Product,
    Quotient,
    Power,
    Ln,
    Exp,
    Sqrt,
    Abs,
    Sin,
    Cos,
    /// `max` if the flag is true, otherwise `min`.
    Extreme(bool),
}

impl Term {
    /// The formula of a syntax tree, as it stands.
    fn of(node: &Node) -> Self {
        let (operation, left, right) = match node {
            Node::Variable => return Self::Polynomial(vec![Wide::of(0.0), Wide::of(1.0)]),
            Node::Number(number) => return Self::Polynomial(trimmed(vec![Wide::of(*number)])),
            Node::Negative(inner) => {
                let minus_one = Self::Polynomial(vec![Wide::of(-1.0)]);
                return Self::made(Operation::Product, vec![minus_one, Self::of(inner)]);
            }
            Node::Add(left, right) => (Operation::Sum, left, Some(right)),
            Node::Multiply(left, right) => (Operation::Product, left, Some(right)),
            Node::Divide(left, right) => (Operation::Quotient, left, Some(right)),
            Node::Power(base, exponent) => (Operation::Power, base, Some(exponent)),
            Node::Extreme(greater, left, right) => {
                (Operation::Extreme(*greater), left, Some(right))
            }
            Node::Ln(inner) => (Operation::Ln, inner, None),
            Node::Exp(inner) => (Operation::Exp, inner, None),
            Node::Sqrt(inner) => (Operation::Sqrt, inner, None),
            Node::Abs(inner) => (Operation::Abs, inner, None),
            Node::Sin(inner) => (Operation::Sin, inner, None),
            Node::Cos(inner) => (Operation::Cos, inner, None),
        };
        let operands = std::iter::once(left).chain(right);
        Self::made(operation, operands.map(|node| Self::of(node)).collect())
    }

    /// The operation on its operands, or its value if these are numbers.
    fn made(operation: Operation, operands: Vec<Self>) -> Self {
        let is_number = operands.iter().all(|operand| operand.number().is_some());
        let term = Self::Of(operation, operands);
        if is_number {
            return Self::Polynomial(trimmed(vec![curve(&term, Wide::of(1.0)).value]));
        }
        term
    }

    fn number(&self) -> Option<Wide> {
        match self {
            Self::Polynomial(coefficients) => number(coefficients),
            Self::Of(..) => None,
        }
    }
}

/// A function with its first and its second derivative in `u`.
#[derive(Clone, Copy)]
struct Curve {
    value: Wide,
    slope: Wide,
    bend: Wide,
}

impl Curve {
    fn times(self, factor: Wide) -> Self {
        Self { value: self.value * factor, slope: self.slope * factor, bend: self.bend * factor }
    }

    /// The value at a kink.
    fn without_derivatives(self) -> Self {
        let unknown = Wide::of(f64::NAN);
        Self { value: self.value, slope: unknown, bend: unknown }
    }

    fn is_number(self) -> bool {
        self.slope.is_zero() && self.bend.is_zero()
    }
}

/// A term with its derivatives. The operations are in [`combined`], because a thousand nested ones have to fit on the
/// stack of a thread.
fn curve(term: &Term, u: Wide) -> Curve {
    match term {
        Term::Polynomial(coefficients) => polynomial(coefficients, u),
        Term::Of(operation, operands) => {
            let left = curve(&operands[0], u);
            let right = operands.get(1).map_or(left, |operand| curve(operand, u));
            combined(*operation, left, right)
        }
    }
}

/// A polynomial, by Horner's scheme.
#[inline(never)]
fn polynomial(coefficients: &[Wide], u: Wide) -> Curve {
    let zero = Wide::of(0.0);
    match *coefficients {
        [] => return Curve { value: zero, slope: zero, bend: zero },
        [value] => return Curve { value, slope: zero, bend: zero },
        [value, slope] => return Curve { value: value + slope * u, slope, bend: zero },
        _ => {}
    }
    let mut sum = Curve { value: zero, slope: zero, bend: zero };
    for &coefficient in coefficients.iter().rev() {
        sum.bend = sum.bend * u + sum.slope;
        sum.slope = sum.slope * u + sum.value;
        sum.value = sum.value * u + coefficient;
    }
    sum.bend = sum.bend + sum.bend;
    sum
}

/// The operation on its operands. A single operand is `left`.
#[inline(never)]
fn combined(operation: Operation, left: Curve, right: Curve) -> Curve {
    match operation {
        Operation::Sum => Curve {
            value: left.value + right.value,
            slope: left.slope + right.slope,
            bend: left.bend + right.bend,
        },
        Operation::Product if left.is_number() => right.times(left.value),
        Operation::Product if right.is_number() => left.times(right.value),
        Operation::Product => {
            let cross = left.slope * right.slope;
            Curve {
                value: left.value * right.value,
                slope: left.slope * right.value + left.value * right.slope,
                bend: left.bend * right.value + (cross + cross) + left.value * right.bend,
            }
        }
        Operation::Quotient => {
            let value = left.value / right.value;
            let slope = (left.slope - value * right.slope) / right.value;
            let cross = slope * right.slope;
            let bend = (left.bend - (cross + cross) - value * right.bend) / right.value;
            Curve { value, slope, bend }
        }
        Operation::Power => power(left, right),
        Operation::Ln => {
            let relative = left.slope / left.value;
            let bend = left.bend / left.value - relative * relative;
            Curve { value: left.value.ln(), slope: relative, bend }
        }
        Operation::Exp => exponential(left),
        Operation::Sqrt => {
            let (value, half) = (left.value.sqrt(), Wide::of(0.5));
            let slope = half * left.slope / value;
            Curve { value, slope, bend: (half * left.bend - slope * slope) / value }
        }
        Operation::Abs => {
            let size = left.value.to_f64();
            if size == 0.0 && !left.is_number() {
                return left.without_derivatives();
            }
            if size < 0.0 { left.times(Wide::of(-1.0)) } else { left }
        }
        Operation::Sin | Operation::Cos => {
            let (sin, cos) = (left.value.sin(), left.value.cos());
            let (value, rate) = if operation == Operation::Sin { (sin, cos) } else { (cos, -sin) };
            let slope = rate * left.slope;
            Curve { value, slope, bend: rate * left.bend - value * left.slope * left.slope }
        }
        Operation::Extreme(greater) => {
            let difference = (left.value - right.value).to_f64();
            if difference == 0.0 {
                // Two pieces may be the same but for decimals.
                let differs = |a: Wide, b: Wide| (a - b).abs().is_above_error(DECIMALS);
                let is_kink = differs(left.slope, right.slope) || differs(left.bend, right.bend);
                return if is_kink { left.without_derivatives() } else { left };
            }
            if (difference > 0.0) == greater { left } else { right }
        }
    }
}

/// A power. Its base may be negative if the exponent is a whole number.
fn power(base: Curve, exponent: Curve) -> Curve {
    let (zero, one) = (Wide::of(0.0), Wide::of(1.0));
    let order = exponent.value.to_f64();
    if !exponent.is_number() {
        let relative = base.slope / base.value;
        let log = base.value.ln();
        let cross = exponent.slope * relative;
        return exponential(Curve {
            value: log * exponent.value,
            slope: exponent.slope * log + exponent.value * relative,
            bend: exponent.bend * log
                + (cross + cross)
                + exponent.value * (base.bend / base.value - relative * relative),
        });
    }
    if base.is_number() && base.value.is_one() || order == 0.0 {
        return Curve { value: one, slope: zero, bend: zero };
    }
    if order == 1.0 {
        return base;
    }
    let less = exponent.value - one;
    if order.fract() == 0.0 && order.abs() <= 1e6 {
        let second = whole_power(base.value, order as i32 - 2);
        let first = second * base.value;
        return Curve {
            value: first * base.value,
            slope: exponent.value * first * base.slope,
            bend: exponent.value
                * second
                * (less * base.slope * base.slope + base.value * base.bend),
        };
    }
    if order > 2.0 && base.value.to_f64() == 0.0 {
        return Curve { value: zero, slope: zero, bend: zero };
    }
    let value = base.value.powf(exponent.value);
    let relative = base.slope / base.value;
    Curve {
        value,
        slope: value * exponent.value * relative,
        bend: value * exponent.value * (less * relative * relative + base.bend / base.value),
    }
}

fn exponential(of: Curve) -> Curve {
    let value = of.value.exp();
    Curve { value, slope: value * of.slope, bend: value * (of.bend + of.slope * of.slope) }
}

/// A polynomial and the rest of a formula.
struct Expanded {
    polynomial: Polynomial,
    rest: Option<Term>,
}

impl Expanded {
    /// The term, with its polynomial apart.
    fn of(term: &Term) -> Self {
        let (operation, operands) = match term {
            Term::Polynomial(coefficients) => return Self::pure(coefficients.clone()),
            Term::Of(operation, operands) => (*operation, operands),
        };
        if operation == Operation::Ln {
            return Self::logarithm(&operands[0]);
        }
        let mut operands = operands.iter().map(Self::of);
        match (operation, operands.next(), operands.next()) {
            (Operation::Sum, Some(left), Some(right)) => left.plus(right),
            (Operation::Product, Some(left), Some(right)) => left.times(right),
            (Operation::Quotient, Some(left), Some(right)) => left.over(right),
            (Operation::Power, Some(base), Some(exponent)) => base.raised(exponent),
            (Operation::Sqrt, Some(inner), _) => inner.root(),
            (_, left, right) => {
                let operands = left.into_iter().chain(right);
                Self::rest(Term::made(operation, operands.map(Self::whole).collect()))
            }
        }
    }

    fn pure(polynomial: Polynomial) -> Self {
        Self { polynomial: trimmed(polynomial), rest: None }
    }

    fn rest(term: Term) -> Self {
        match term {
            Term::Polynomial(coefficients) => Self::pure(coefficients),
            term @ Term::Of(..) => Self { polynomial: Vec::new(), rest: Some(term) },
        }
    }

    fn is_pure(&self) -> bool {
        self.rest.is_none()
    }

    fn number(&self) -> Option<Wide> {
        if self.is_pure() { number(&self.polynomial) } else { None }
    }

    /// The sum of both.
    fn whole(self) -> Term {
        let polynomial = Term::Polynomial(self.polynomial);
        match self.rest {
            None => polynomial,
            Some(rest) if polynomial.number().is_some_and(Wide::is_zero) => rest,
            Some(rest) => Term::made(Operation::Sum, vec![polynomial, rest]),
        }
    }

    fn plus(self, other: Self) -> Self {
        let rest = match (self.rest, other.rest) {
            (Some(left), Some(right)) => Some(Term::made(Operation::Sum, vec![left, right])),
            (left, right) => left.or(right),
        };
        Self { polynomial: sum(&self.polynomial, &other.polynomial), rest }
    }

    fn times(self, other: Self) -> Self {
        let degree = self.polynomial.len() + other.polynomial.len();
        match (self.rest, other.rest) {
            (None, None) if degree <= MAX_DEGREE + 2 => {
                Self::pure(product(&self.polynomial, &other.polynomial))
            }
            (None, Some(rest)) if degree <= MAX_DEGREE + 2 => {
                Self::scaled(self.polynomial, &other.polynomial, rest)
            }
            (Some(rest), None) if degree <= MAX_DEGREE + 2 => {
                Self::scaled(other.polynomial, &self.polynomial, rest)
            }
            (left, right) => {
                let left = Self { polynomial: self.polynomial, rest: left };
                let right = Self { polynomial: other.polynomial, rest: right };
                Self::rest(Term::made(Operation::Product, vec![left.whole(), right.whole()]))
            }
        }
    }

    /// `factor * (polynomial + rest)`
    fn scaled(factor: Polynomial, polynomial: &[Wide], rest: Term) -> Self {
        let first = Self::pure(product(&factor, polynomial));
        if let Term::Of(Operation::Quotient, parts) = &rest
            && let [Term::Polynomial(above), Term::Polynomial(below)] = &parts[..]
            && factor.len() + above.len() <= MAX_DEGREE + 2
        {
            let quotient = Self::pure(product(&factor, above)).over(Self::pure(below.clone()));
            return first.plus(quotient);
        }
        let operands = vec![Term::Polynomial(factor), rest];
        first.plus(Self::rest(Term::made(Operation::Product, operands)))
    }

    /// The quotient. That by a polynomial is divided.
    fn over(self, mut other: Self) -> Self {
        if !other.is_pure() || !other.polynomial.last().is_some_and(|last| is_certain(*last)) {
            let operands = vec![self.whole(), other.whole()];
            return Self::rest(Term::made(Operation::Quotient, operands));
        }
        let Self { polynomial: mut above, rest } = self;
        while rest.is_none()
            && let (Some(first), Some(second)) = (above.first(), other.polynomial.first())
            && first.is_zero()
            && second.is_zero()
        {
            above.remove(0);
            other.polynomial.remove(0);
        }
        let below = Term::Polynomial(other.polynomial.clone());
        let (quotient, remainder) = divided(above, &other.polynomial);
        let mut result = Self::pure(quotient);
        for part in [Some(Term::Polynomial(remainder)), rest].into_iter().flatten() {
            if !part.number().is_some_and(Wide::is_zero) {
                let part = Term::made(Operation::Quotient, vec![part, below.clone()]);
                result = result.plus(Self::rest(part));
            }
        }
        result
    }

    /// The power.
    fn raised(self, exponent: Self) -> Self {
        let order = exponent.number().map_or(f64::NAN, Wide::to_f64);
        let size = order.abs();
        if order == 0.5 {
            return self.root();
        }
        if order == 1.0 {
            return self;
        }
        let degree = self.polynomial.len().saturating_sub(1) as f64 * size;
        if self.is_pure() && size.fract() == 0.0 && size >= 1.0 && degree <= MAX_DEGREE as f64 {
            let one = vec![Wide::of(1.0)];
            // A number to a large power is no polynomial of a large degree.
            if degree > 0.0 {
                let power = (0..size as u32)
                    .fold(one.clone(), |power, _| product(&power, &self.polynomial));
                let power = Self::pure(power);
                return if order > 0.0 { power } else { Self::pure(one).over(power) };
            }
        }
        Self::rest(Term::made(Operation::Power, vec![self.whole(), exponent.whole()]))
    }

    /// The square root. That of a polynomial of even degree approaches a polynomial.
    fn root(self) -> Self {
        let degree = self.polynomial.len().saturating_sub(1);
        let leading = self.polynomial.last().copied();
        let Some(leading) = leading.filter(|leading| {
            self.is_pure() && degree > 0 && degree.is_multiple_of(2) && leading.is_above_error(1e9)
        }) else {
            return Self::rest(Term::made(Operation::Sqrt, vec![self.whole()]));
        };
        let half = degree / 2;
        let mut root = vec![Wide::of(0.0); half + 1];
        root[half] = if leading.is_one() { leading } else { leading.sqrt() };
        let twice = root[half].plus_exact(root[half]);
        let without = |root: &[Wide], power: usize| {
            let square = product(root, root).get(power).copied().unwrap_or(Wide::of(0.0));
            self.polynomial[power].plus_exact(-square)
        };
        for place in (0..half).rev() {
            root[place] = without(&root, half + place).over_exact(twice);
        }
        let remainder = trimmed((0..half).map(|power| without(&root, power)).collect());
        let approached = Term::Polynomial(root.clone());
        if remainder.is_empty() {
            return Self::rest(Term::made(Operation::Abs, vec![approached]));
        }
        let whole = Term::made(Operation::Sqrt, vec![Term::Polynomial(self.polynomial)]);
        let below = Term::made(Operation::Sum, vec![whole, approached]);
        let rest = Term::made(Operation::Quotient, vec![Term::Polynomial(remainder), below]);
        Self { polynomial: root, rest: Some(rest) }
    }

    /// The logarithm. That of a sum with `e^p` approaches the polynomial p.
    fn logarithm(of: &Term) -> Self {
        let inner = Self::of(of);
        if let Some(Term::Of(Operation::Exp, exponent)) = &inner.rest
            && let [Term::Polynomial(exponent)] = &exponent[..]
        {
            let minus = product(&[Wide::of(-1.0)], exponent);
            let falling = Term::made(Operation::Exp, vec![Term::Polynomial(minus)]);
            let small =
                Term::made(Operation::Product, vec![Term::Polynomial(inner.polynomial), falling]);
            let one = Term::Polynomial(vec![Wide::of(1.0)]);
            let sum = Term::made(Operation::Sum, vec![one, small]);
            let rest = Self::rest(Term::made(Operation::Ln, vec![sum]));
            return Self::pure(exponent.clone()).plus(rest);
        }
        Self::rest(Term::made(Operation::Ln, vec![inner.whole()]))
    }
}

/// The polynomial if it is a number.
fn number(coefficients: &[Wide]) -> Option<Wide> {
    match coefficients {
        [] => Some(Wide::of(0.0)),
        [number] => Some(*number),
        _ => None,
    }
}

/// True if the number is known to some digits.
fn is_certain(number: Wide) -> bool {
    number.abs().is_above_error(1e9)
}

/// The coefficients without zeros at the end.
fn trimmed(mut coefficients: Polynomial) -> Polynomial {
    while coefficients.last().is_some_and(|last| last.is_zero()) {
        coefficients.pop();
    }
    coefficients
}

fn sum(left: &[Wide], right: &[Wide]) -> Polynomial {
    let (long, short) = if left.len() >= right.len() { (left, right) } else { (right, left) };
    let mut sum = long.to_vec();
    for (place, other) in sum.iter_mut().zip(short) {
        *place = place.plus_exact(*other);
    }
    trimmed(sum)
}

fn product(left: &[Wide], right: &[Wide]) -> Polynomial {
    let mut product = vec![Wide::of(0.0); (left.len() + right.len()).saturating_sub(1)];
    for (i, a) in left.iter().enumerate() {
        for (j, b) in right.iter().enumerate() {
            product[i + j] = product[i + j].plus_exact(a.times_exact(*b));
        }
    }
    trimmed(product)
}

/// Quotient and remainder of two polynomials.
fn divided(mut above: Polynomial, below: &[Wide]) -> (Polynomial, Polynomial) {
    let Some((leading, lower)) = below.split_last() else { return (Vec::new(), above) };
    let mut quotient = vec![Wide::of(0.0); (above.len() + 1).saturating_sub(below.len())];
    for place in (0..quotient.len()).rev() {
        let Some(last) = above.pop() else { break };
        quotient[place] = last.over_exact(*leading);
        for (offset, coefficient) in lower.iter().enumerate() {
            let less = -quotient[place].times_exact(*coefficient);
            above[place + offset] = above[place + offset].plus_exact(less);
        }
    }
    (trimmed(quotient), trimmed(above))
}
