//! A text as a list of steps, for evaluation on vectors, which cannot recurse.

use super::evaluate::evaluate;
use super::grammar::Node;
use crate::divergence::point::Point;
use crate::number::{Dd, Real};

/// An operation on the results of earlier steps, which are given by their places.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Step {
    /// `u`
    Variable,
    /// `ln u`
    LogVariable,
    Number(Dd),
    Negative(usize),
    Add(usize, usize),
    Subtract(usize, usize),
    Multiply(usize, usize),
    Divide(usize, usize),
    Ln(usize),
    Exp(usize),
    Sqrt(usize),
    Abs(usize),
    /// `max` if the flag is true, otherwise `min`.
    Extreme(bool, usize, usize),
}

/// The steps of a text. The result is that of the last step.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Tape {
    steps: Vec<Step>,
}

/// Max magnitude of a whole exponent, as in [`evaluate`].
const MAX_WHOLE: f64 = 1e6;

impl Tape {
    /// `None` if the text has an operation that vectors lack.
    pub(super) fn of(node: &Node) -> Option<Self> {
        let mut tape = Self::default();
        let root = tape.compile(node)?;
        // A text that repeats its own result is longer than itself, so the root is the last step.
        (root + 1 == tape.steps.len()).then_some(tape)
    }

    /// The steps in order.
    pub(crate) fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// True if a step takes `ln u`.
    pub(crate) fn takes_log(&self) -> bool {
        self.steps.contains(&Step::LogVariable)
    }

    /// The place of a step, which is added unless it exists.
    fn place(&mut self, step: Step) -> usize {
        self.steps.iter().position(|known| *known == step).unwrap_or_else(|| {
            self.steps.push(step);
            self.steps.len() - 1
        })
    }

    /// The number at a place, if it does not depend on `u`.
    fn number(&self, place: usize) -> Option<Dd> {
        match self.steps.get(place) {
            Some(Step::Number(number)) => Some(*number),
            _ => None,
        }
    }

    fn compile(&mut self, node: &Node) -> Option<usize> {
        if let Some(number) = constant(node) {
            return number.hi.is_finite().then(|| self.place(Step::Number(number)));
        }
        let step = match node {
            Node::Variable => Step::Variable,
            Node::Negative(inner) => Step::Negative(self.compile(inner)?),
            Node::Add(left, right) => {
                let left = self.compile(left)?;
                match &**right {
                    Node::Negative(right) => Step::Subtract(left, self.compile(right)?),
                    right => Step::Add(left, self.compile(right)?),
                }
            }
            Node::Multiply(left, right) => {
                Step::Multiply(self.compile(left)?, self.compile(right)?)
            }
            Node::Divide(left, right) => Step::Divide(self.compile(left)?, self.compile(right)?),
            Node::Power(base, exponent) => {
                let base = self.compile(base)?;
                let exponent = self.compile(exponent)?;
                return Some(self.power(base, exponent));
            }
            Node::Ln(inner) => {
                let inner = self.compile(inner)?;
                return Some(self.logarithm(inner));
            }
            Node::Exp(inner) => Step::Exp(self.compile(inner)?),
            Node::Sqrt(inner) => Step::Sqrt(self.compile(inner)?),
            Node::Abs(inner) => Step::Abs(self.compile(inner)?),
            Node::Extreme(greater, left, right) => {
                Step::Extreme(*greater, self.compile(left)?, self.compile(right)?)
            }
            // A number is a constant.
            Node::Number(_) | Node::Sin(_) | Node::Cos(_) => return None,
        };
        Some(self.place(step))
    }

    fn logarithm(&mut self, of: usize) -> usize {
        let step = match self.steps.get(of) {
            Some(Step::Variable) => Step::LogVariable,
            _ => Step::Ln(of),
        };
        self.place(step)
    }

    /// Whole powers and those of roots by products, others by their logarithm.
    fn power(&mut self, base: usize, exponent: usize) -> usize {
        let whole = |order: f64| order.fract() == 0.0 && order.abs() <= MAX_WHOLE;
        match self.number(exponent) {
            Some(Dd { hi, lo: 0.0 }) if whole(hi) => self.whole_power(base, hi as i32),
            Some(Dd { hi, lo: 0.0 }) if whole(2.0 * hi) => {
                let root = self.place(Step::Sqrt(base));
                self.whole_power(root, (2.0 * hi) as i32)
            }
            _ => {
                let log = self.logarithm(base);
                let product = self.place(Step::Multiply(exponent, log));
                self.place(Step::Exp(product))
            }
        }
    }

    /// A power by repeated squaring.
    fn whole_power(&mut self, base: usize, order: i32) -> usize {
        let (mut square, mut rest) = (base, order.unsigned_abs());
        let mut product = None;
        while rest > 0 {
            if rest & 1 == 1 {
                product = Some(match product {
                    Some(product) => self.place(Step::Multiply(product, square)),
                    None => square,
                });
            }
            rest >>= 1;
            if rest > 0 {
                square = self.place(Step::Multiply(square, square));
            }
        }
        let one = Step::Number(Dd::of(1.0));
        match product {
            Some(product) if order < 0 => {
                let one = self.place(one);
                self.place(Step::Divide(one, product))
            }
            Some(product) => product,
            None => self.place(one),
        }
    }
}

/// The value of a part without `u`.
fn constant(node: &Node) -> Option<Dd> {
    is_constant(node).then(|| evaluate(node, Point::from_excess(Dd::of(0.0))).value)
}

fn is_constant(node: &Node) -> bool {
    match node {
        Node::Variable => false,
        Node::Number(_) => true,
        Node::Negative(inner)
        | Node::Ln(inner)
        | Node::Exp(inner)
        | Node::Sqrt(inner)
        | Node::Abs(inner)
        | Node::Sin(inner)
        | Node::Cos(inner) => is_constant(inner),
        Node::Add(left, right)
        | Node::Multiply(left, right)
        | Node::Divide(left, right)
        | Node::Power(left, right)
        | Node::Extreme(_, left, right) => is_constant(left) && is_constant(right),
    }
}
