//! Value and slope of a syntax tree, in any number type.

use super::grammar::Node;
use super::tape::Tape;
use crate::divergence::point::Point;
use crate::number::wide::Wide;
use crate::number::{Dd, Real};

/// A number with its derivative in `ln u`.
#[derive(Clone, Copy)]
pub(super) struct Jet<T> {
    pub(super) value: T,
    pub(super) slope: T,
    /// The logarithm and its derivative, where they are more accurate than those of `value`.
    log: Option<(T, T)>,
}

/// A convex generator read from text, with the constants that judging it determined.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Expression {
    pub(super) node: Node,
    /// The node for vectors, if they have all of its operations.
    pub(crate) tape: Option<Tape>,
    /// A subgradient at 1. The normalised `f - slope_at_one (u-1)`, which is at least 0, is evaluated.
    pub(crate) slope_at_one: Dd,
    pub(crate) at_zero: Dd,
    pub(crate) slope_at_infinity: Dd,
    pub(crate) curvature: Option<f64>,
    /// Size of the terms that cancel around u = 1, at least 1. `f` has that many times the rounding errors of 1.
    pub(crate) size: f64,
    /// Max size of the terms that cancel elsewhere, relative to `f`; at least 1.
    pub(crate) relative_size: f64,
}

impl Expression {
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

    /// `u f'(u)` of the normalised function.
    pub(crate) fn log_slope(&self, at: Point<f64>) -> f64 {
        let slope = evaluate(&self.node, at).slope - self.slope_at_one.to_f64() * at.u;
        if slope.is_finite() { slope } else { self.wide(widened(at)).slope.to_dd().to_f64() }
    }

    /// `ln f(u)` for any `ln u`. `f(u)` itself may leave the range of a double.
    pub(crate) fn log_value<T: Real>(&self, log: T) -> T {
        // Beyond the farthest point of evaluation f is extended as a power of u.
        let t = log.to_f64();
        let far = t.clamp(-FARTHEST, FARTHEST);
        let at = if t == far { Wide::of_dd(log.to_dd()) } else { Wide::of(far) };
        let Jet { value, slope, .. } = self.wide(Point::from_log(at));
        if value.is_finite() && !value.is_above_error(1.0) {
            return T::of(f64::NEG_INFINITY); // only rounding error remains
        }
        let beyond = if t == far { 0.0 } else { (slope / value).to_f64() * (t - far) };
        T::of_dd(value.ln().to_dd()) + T::of(beyond)
    }

    /// `f(u) - f'(1) (u-1)` with a bound of its rounding error. Nothing overflows.
    pub(super) fn wide(&self, at: Point<Wide>) -> Jet<Wide> {
        let Jet { value, slope, .. } = evaluate(&self.node, at);
        let tangent = Wide::of_dd(self.slope_at_one);
        Jet { value: value - tangent * at.excess, slope: slope - tangent * at.u, log: None }
    }
}

/// Max `|ln u|` at which an expression is evaluated. Its limits are determined there.
pub(super) const FARTHEST: f64 = 1e10;

/// The point in [`Wide`] numbers.
pub(super) fn widened<T: Real>(at: Point<T>) -> Point<Wide> {
    let log = Wide::of_dd(at.log.to_dd());
    if at.log.to_f64().abs() < 600.0 {
        let wide = |number: T| Wide::of_dd(number.to_dd()).rounded();
        Point { log, excess: wide(at.excess), u: wide(at.u) }
    } else {
        Point::from_log(log)
    }
}

/// Value and slope of a formula. The operations are in [`combined`], because a thousand nested ones have to fit
/// on the stack of a thread.
pub(super) fn evaluate<T: Real>(node: &Node, at: Point<T>) -> Jet<T> {
    match node {
        Node::Variable => Jet { value: at.u, slope: at.u, log: Some((at.log, T::of(1.0))) },
        Node::Number(number) => Jet {
            value: T::of(*number),
            slope: T::of(0.0),
            log: (*number > 0.0).then(|| (T::of(*number).ln(), T::of(0.0))),
        },
        Node::Negative(inner) | Node::Exp(inner) | Node::Sin(inner) | Node::Cos(inner) => {
            let inner = without_log(inner, at);
            combined(node, inner, inner)
        }
        Node::Ln(inner) | Node::Sqrt(inner) | Node::Abs(inner) => {
            let inner = evaluate(inner, at);
            combined(node, inner, inner)
        }
        Node::Add(left, right) => combined(node, without_log(left, at), without_log(right, at)),
        Node::Power(base, exponent) => {
            combined(node, evaluate(base, at), without_log(exponent, at))
        }
        Node::Multiply(left, right) | Node::Divide(left, right) | Node::Extreme(_, left, right) => {
            combined(node, evaluate(left, at), evaluate(right, at))
        }
    }
}

/// Value and slope of an operand whose logarithm is used only if it overflowed, which no number did.
fn without_log<T: Real>(node: &Node, at: Point<T>) -> Jet<T> {
    match node {
        Node::Number(number) => Jet { value: T::of(*number), slope: T::of(0.0), log: None },
        _ => evaluate(node, at),
    }
}

/// The operation of a node on its operands. A single operand is `left`.
#[inline(never)]
#[allow(clippy::too_many_lines)] // one arm for each kind of node
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
                // A whole power, whose base may be negative.
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
                _ => plain(left.value.abs(), zero), // the mean of the slopes at a kink
            }
        }
        Node::Sin(_) => plain(left.value.sin(), left.slope * left.value.cos()),
        Node::Cos(_) => plain(left.value.cos(), -(left.slope * left.value.sin())),
        Node::Extreme(greater, ..) => {
            let difference = (left.value - right.value).to_f64();
            if difference.is_nan() {
                from_log(None) // of overflows, where either may be the extreme
            } else if difference == 0.0 {
                plain(left.value, (left.slope + right.slope) * T::of(0.5))
            } else if (difference > 0.0) == *greater {
                left
            } else {
                right
            }
        }
    }
}

/// True if a number is neither 0 nor infinite.
fn in_range<T: Real>(value: T) -> bool {
    value.to_f64().is_finite() && value.to_f64() != 0.0
}

/// The logarithm of a sum in which `term` has overflowed, so that `other` is negligible.
fn dominant<T: Real>(term: Jet<T>, other: Jet<T>) -> Option<(T, T)> {
    let alone = other.value.to_f64().is_finite();
    term.log.filter(|log| alone && term.value.to_f64().is_infinite() && log.0.to_f64().is_finite())
}

/// True for the infinity of an overflow, and for NaN.
fn has_overflowed(size: f64) -> bool {
    !size.is_finite()
}

/// True if a number underflowed to 0 but its product with `factor` may not be 0.
fn is_underflow<T: Real>(number: Jet<T>, factor: f64) -> bool {
    number.value.to_f64() == 0.0
        && number.log.is_some_and(|(log, _)| {
            log.to_f64().is_finite() && log.to_f64() + factor.ln() > NEGLIGIBLE_LOG
        })
}

/// `ln` of a product below which it is taken as 0.
const NEGLIGIBLE_LOG: f64 = -800.0;

/// A positive number by its logarithm. An unknown one gives NaN, for which the caller evaluates again in [`Wide`].
fn from_log<T: Real>(log: Option<(T, T)>) -> Jet<T> {
    let Some((exponent, relative)) = log else {
        return Jet { value: T::of(f64::NAN), slope: T::of(f64::NAN), log };
    };
    let value = exponent.exp();
    Jet { value, slope: value * relative, log }
}

/// `base^exponent`, by repeated squaring.
pub(super) fn whole_power<T: Real>(base: T, exponent: i32) -> T {
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
