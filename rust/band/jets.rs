//! Value and slope of a text on vectors, in double or double-double precision.

// A function of vectors has to become part of one that is compiled for their instructions.
#![allow(clippy::inline_always)]

use std::ops::{Add, Div, Mul, Neg, Sub};

use crate::divergence::{Step, Tape};
use crate::number::{Dd, Real};
use crate::simd::doubles::{Doubles, Truth, Vector};
use crate::simd::pairs::Pair;

/// Max magnitude of an exponent whose power is computed.
pub(super) const MAX_ARGUMENT: f64 = 600.0;

/// Min magnitude of a product with all of its digits, unless a factor is 0.
const MIN_PRODUCT: f64 = 1e-250;

/// Max magnitude of a factor of a 0 that stands for a number below `e^-560`.
const MAX_FACTOR_OF_ZERO: f64 = 1e8;

/// Number of a vector, in one of two precisions.
pub(super) trait Number<L: Doubles>:
    Copy
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
{
    /// The number in every lane.
    fn constant(like: Vector<L>, value: Dd) -> Self;
    /// The nearest doubles.
    fn head(self) -> Vector<L>;
    fn select(truth: Truth<L>, a: Self, b: Self) -> Self;
    /// Root of a number that is not negative.
    fn root(self) -> Self;
    /// Logarithm of a positive normal number.
    fn logarithm(self) -> Self;
    /// Power of e up to [`MAX_ARGUMENT`] on either side.
    fn power(self) -> Self;
}

impl<L: Doubles> Number<L> for Vector<L> {
    #[inline(always)]
    fn constant(like: Vector<L>, value: Dd) -> Self {
        like.constant(value.hi)
    }
    #[inline(always)]
    fn head(self) -> Self {
        self
    }
    #[inline(always)]
    fn select(truth: Truth<L>, a: Self, b: Self) -> Self {
        truth.select(a, b)
    }
    #[inline(always)]
    fn root(self) -> Self {
        self.sqrt()
    }
    #[inline(always)]
    fn logarithm(self) -> Self {
        self.ln()
    }
    #[inline(always)]
    fn power(self) -> Self {
        let max = self.constant(MAX_ARGUMENT);
        self.min(max).max(-max).exponential().u
    }
}

impl<L: Doubles> Number<L> for Pair<L> {
    #[inline(always)]
    fn constant(like: Vector<L>, value: Dd) -> Self {
        Self::constant(like, value)
    }
    #[inline(always)]
    fn head(self) -> Vector<L> {
        self.high
    }
    #[inline(always)]
    fn select(truth: Truth<L>, a: Self, b: Self) -> Self {
        Self::select(truth, a, b)
    }
    #[inline(always)]
    fn root(self) -> Self {
        let root = self.sqrt();
        let positive = self.high.constant(0.0).less(self.high);
        Self::select(positive, root, self)
    }
    #[inline(always)]
    fn logarithm(self) -> Self {
        let one = Pair::of(self.high.constant(1.0));
        self.ln(self - one)
    }
    #[inline(always)]
    fn power(self) -> Self {
        self.exponential().u
    }
}

/// An argument `u` of a text.
#[derive(Clone, Copy)]
pub(super) struct Place<L: Doubles, N> {
    pub(super) u: N,
    /// `ln u`; unused if the tape does not take it.
    pub(super) log: N,
    /// True where `u` is a 0 that stands for a number below `e^-560`.
    pub(super) vanished: Truth<L>,
    /// Change of `ln u` within which no kink may lie.
    pub(super) reach: Vector<L>,
}

/// A number with its derivative in `ln u`.
#[derive(Clone, Copy)]
pub(super) struct Jet<L: Doubles, N> {
    pub(super) value: N,
    pub(super) slope: Vector<L>,
}

/// Results of the steps of a tape. Those of its numbers are written once.
pub(super) struct Results<L: Doubles, N>(Vec<Jet<L, N>>);

impl<L: Doubles, N: Number<L>> Results<L, N> {
    #[inline(always)]
    pub(super) fn new(tape: &Tape, like: Vector<L>) -> Self {
        let slope = like.constant(0.0);
        let mut jets = Vec::with_capacity(tape.steps().len());
        for step in tape.steps() {
            let value = if let Step::Number(number) = *step { number } else { Dd::of(0.0) };
            jets.push(Jet { value: N::constant(like, value), slope });
        }
        Self(jets)
    }

    /// Value and slope of the text, and true where they have all of their digits and no kink is within reach.
    #[inline(always)]
    pub(super) fn evaluate(&mut self, tape: &Tape, at: Place<L, N>) -> (Jet<L, N>, Truth<L>) {
        let jets = self.0.as_mut_slice();
        let one = at.reach.constant(1.0);
        let zero = one.constant(0.0);
        let mut jet = Jet { value: at.u, slope: zero };
        let mut exact = zero.less(one);
        for (place, step) in tape.steps().iter().enumerate() {
            jet = match *step {
                Step::Number(_) => continue,
                Step::Variable => Jet { value: at.u, slope: at.u.head() },
                Step::LogVariable => Jet { value: at.log, slope: one },
                Step::Negative(of) => {
                    let Jet { value, slope } = jets[of];
                    Jet { value: -value, slope: -slope }
                }
                Step::Add(left, right) => {
                    let (left, right) = (jets[left], jets[right]);
                    Jet { value: left.value + right.value, slope: left.slope + right.slope }
                }
                Step::Subtract(left, right) => {
                    let (left, right) = (jets[left], jets[right]);
                    Jet { value: left.value - right.value, slope: left.slope - right.slope }
                }
                Step::Multiply(left, right) => {
                    let (left, right) = (jets[left], jets[right]);
                    let value = left.value * right.value;
                    let (l, r) = (left.value.head(), right.value.head());
                    let (size, other) = (l.abs(), r.abs());
                    let normal = one.constant(MIN_PRODUCT).less(value.head().abs());
                    let nonzero = zero.less(size) & zero.less(other);
                    let max = one.constant(MAX_FACTOR_OF_ZERO);
                    let negligible = !at.vanished | size.less(max) & other.less(max);
                    exact = exact & (normal & nonzero | !nonzero & negligible);
                    Jet { value, slope: left.slope.mul_add(r, l * right.slope) }
                }
                Step::Divide(left, right) => {
                    let (left, right) = (jets[left], jets[right]);
                    let value = left.value / right.value;
                    let (l, r) = (left.value.head(), right.value.head());
                    let normal = one.constant(MIN_PRODUCT).less(value.head().abs());
                    let nonzero = zero.less(l.abs());
                    let min = one.constant(1.0 / MAX_FACTOR_OF_ZERO);
                    let negligible = !at.vanished | min.less(r.abs());
                    exact = exact & (normal & nonzero | !nonzero & negligible);
                    Jet { value, slope: (left.slope - value.head() * right.slope) / r }
                }
                Step::Ln(of) => {
                    let Jet { value, slope } = jets[of];
                    exact = exact & one.constant(MIN_PRODUCT).less(value.head());
                    Jet { value: value.logarithm(), slope: slope / value.head() }
                }
                Step::Exp(of) => {
                    let Jet { value, slope } = jets[of];
                    exact = exact & value.head().abs().less(one.constant(MAX_ARGUMENT));
                    let power = value.power();
                    Jet { value: power, slope: power.head() * slope }
                }
                Step::Sqrt(of) => {
                    let Jet { value, slope } = jets[of];
                    exact = exact & (zero.less(value.head()) | !at.vanished);
                    let root = value.root();
                    Jet { value: root, slope: slope * 0.5 / root.head() }
                }
                Step::Abs(of) => {
                    let Jet { value, slope } = jets[of];
                    let head = value.head();
                    exact = exact & (slope * at.reach).abs().less(head.abs());
                    let negative = head.less(zero);
                    Jet {
                        value: N::select(negative, -value, value),
                        slope: negative.select(-slope, slope),
                    }
                }
                Step::Extreme(greater, left, right) => {
                    let (left, right) = (jets[left], jets[right]);
                    let over = (left.value - right.value).head();
                    let change = (left.slope - right.slope) * at.reach;
                    exact = exact & change.abs().less(over.abs());
                    let takes_left = if greater { zero.less(over) } else { over.less(zero) };
                    Jet {
                        value: N::select(takes_left, left.value, right.value),
                        slope: takes_left.select(left.slope, right.slope),
                    }
                }
            };
            jets[place] = jet;
        }
        (jet, exact)
    }
}
