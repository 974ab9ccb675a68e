//! Vector registers of the solver, of any width.
//!
//! [`Doubles`] is the register, [`Vector`] a vector that formulas are written with. `mul_add` rounds once on every
//! register, so all registers give the same bits.

// A function of vectors has to become part of one that is compiled for their instructions.
#![allow(clippy::inline_always)]

use std::ops::{Add, BitAnd, BitOr, Div, Mul, Neg, Not, Sub};

/// Max lanes of a vector: four registers of AVX-512.
pub const MAX_DOUBLES: usize = 32;

/// Operations on vectors of [`Self::COUNT`] doubles.
pub trait Doubles: Copy {
    /// Vector of numbers.
    type Float: Copy;
    /// Vector of truth values.
    type Mask: Copy;
    /// Vector of 64-bit words.
    type Words: Copy;
    /// Lanes of a vector.
    const COUNT: usize;

    fn splat(self, value: f64) -> Self::Float;
    /// Loads the first [`Self::COUNT`] elements.
    fn load(self, from: &[f64]) -> Self::Float;
    /// Stores to the first [`Self::COUNT`] elements.
    fn store(self, values: Self::Float, to: &mut [f64]);

    fn add(self, a: Self::Float, b: Self::Float) -> Self::Float;
    fn sub(self, a: Self::Float, b: Self::Float) -> Self::Float;
    fn mul(self, a: Self::Float, b: Self::Float) -> Self::Float;
    fn div(self, a: Self::Float, b: Self::Float) -> Self::Float;
    fn sqrt(self, a: Self::Float) -> Self::Float;
    /// `a b + c`, rounded once.
    fn mul_add(self, a: Self::Float, b: Self::Float, c: Self::Float) -> Self::Float;

    fn less(self, a: Self::Float, b: Self::Float) -> Self::Mask;
    fn and(self, a: Self::Mask, b: Self::Mask) -> Self::Mask;
    fn or(self, a: Self::Mask, b: Self::Mask) -> Self::Mask;
    fn not(self, a: Self::Mask) -> Self::Mask;
    /// `a` where `mask` is true, `b` elsewhere.
    fn select(self, mask: Self::Mask, a: Self::Float, b: Self::Float) -> Self::Float;
    /// Bit `k` is lane `k`.
    fn bits(self, mask: Self::Mask) -> u32;

    fn words(self, value: u64) -> Self::Words;
    fn as_words(self, a: Self::Float) -> Self::Words;
    fn as_floats(self, a: Self::Words) -> Self::Float;
    /// Wraps around.
    fn add_words(self, a: Self::Words, b: Self::Words) -> Self::Words;
    /// Wraps around.
    fn sub_words(self, a: Self::Words, b: Self::Words) -> Self::Words;
    fn and_words(self, a: Self::Words, b: Self::Words) -> Self::Words;
    /// Shifts left by 52 bits, to the exponent of a double.
    fn exponent_up(self, a: Self::Words) -> Self::Words;
    /// Shifts right by 52 bits. The sign stays above the exponent.
    fn exponent_down(self, a: Self::Words) -> Self::Words;
}

/// Vector with the operators of a number.
#[derive(Clone, Copy)]
pub struct Vector<L: Doubles> {
    pub lanes: L,
    pub values: L::Float,
}

/// Vector of truth values.
#[derive(Clone, Copy)]
pub struct Truth<L: Doubles> {
    lanes: L,
    mask: L::Mask,
}

impl<L: Doubles> Truth<L> {
    /// `a` where it is true, `b` elsewhere.
    #[inline(always)]
    pub fn select(self, a: Vector<L>, b: Vector<L>) -> Vector<L> {
        a.with(self.lanes.select(self.mask, a.values, b.values))
    }
    /// Bit `k` is lane `k`.
    #[inline(always)]
    pub fn bits(self) -> u32 {
        self.lanes.bits(self.mask)
    }
    #[inline(always)]
    pub fn any(self) -> bool {
        self.bits() != 0
    }
}

impl<L: Doubles> BitAnd for Truth<L> {
    type Output = Self;
    #[inline(always)]
    fn bitand(self, other: Self) -> Self {
        Self { mask: self.lanes.and(self.mask, other.mask), ..self }
    }
}

impl<L: Doubles> BitOr for Truth<L> {
    type Output = Self;
    #[inline(always)]
    fn bitor(self, other: Self) -> Self {
        Self { mask: self.lanes.or(self.mask, other.mask), ..self }
    }
}

impl<L: Doubles> Not for Truth<L> {
    type Output = Self;
    #[inline(always)]
    fn not(self) -> Self {
        Self { mask: self.lanes.not(self.mask), ..self }
    }
}

impl<L: Doubles> Vector<L> {
    #[inline(always)]
    pub fn splat(lanes: L, value: f64) -> Self {
        Self { lanes, values: lanes.splat(value) }
    }
    #[inline(always)]
    pub fn load(lanes: L, from: &[f64]) -> Self {
        Self { lanes, values: lanes.load(from) }
    }
    #[inline(always)]
    pub fn store(self, to: &mut [f64]) {
        self.lanes.store(self.values, to);
    }
    #[inline(always)]
    pub(super) fn with(self, values: L::Float) -> Self {
        Self { values, ..self }
    }
    /// The same number in every lane.
    #[inline(always)]
    pub fn constant(self, value: f64) -> Self {
        Self::splat(self.lanes, value)
    }
    #[inline(always)]
    pub fn sqrt(self) -> Self {
        self.with(self.lanes.sqrt(self.values))
    }
    /// `self factor + addend`, rounded once.
    #[inline(always)]
    pub fn mul_add(self, factor: Self, addend: Self) -> Self {
        self.with(self.lanes.mul_add(self.values, factor.values, addend.values))
    }
    #[inline(always)]
    pub fn less(self, other: Self) -> Truth<L> {
        Truth { lanes: self.lanes, mask: self.lanes.less(self.values, other.values) }
    }
    /// The smaller of both; `self` if either is NaN.
    #[inline(always)]
    pub fn min(self, other: Self) -> Self {
        other.less(self).select(other, self)
    }
    /// The larger of both; `self` if either is NaN.
    #[inline(always)]
    pub fn max(self, other: Self) -> Self {
        self.less(other).select(other, self)
    }
    #[inline(always)]
    pub fn abs(self) -> Self {
        let words =
            self.lanes.and_words(self.lanes.as_words(self.values), self.lanes.words(u64::MAX >> 1));
        self.with(self.lanes.as_floats(words))
    }
    /// The next double towards 0. Takes no 0.
    #[inline(always)]
    pub fn next_inwards(self) -> Self {
        let words = self.lanes.sub_words(self.lanes.as_words(self.values), self.lanes.words(1));
        self.with(self.lanes.as_floats(words))
    }
    /// The next double away from 0. Takes no infinity.
    #[inline(always)]
    pub fn next_outwards(self) -> Self {
        let words = self.lanes.add_words(self.lanes.as_words(self.values), self.lanes.words(1));
        self.with(self.lanes.as_floats(words))
    }
    /// A polynomial in this number, by its coefficients from the highest power down.
    #[inline(always)]
    pub fn polynomial(self, coefficients: &[f64]) -> Self {
        let mut sum = self.constant(coefficients[0]);
        for coefficient in &coefficients[1..] {
            sum = sum.mul_add(self, self.constant(*coefficient));
        }
        sum
    }
}

impl<L: Doubles> Add for Vector<L> {
    type Output = Self;
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self.with(self.lanes.add(self.values, other.values))
    }
}

impl<L: Doubles> Sub for Vector<L> {
    type Output = Self;
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        self.with(self.lanes.sub(self.values, other.values))
    }
}

impl<L: Doubles> Mul for Vector<L> {
    type Output = Self;
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        self.with(self.lanes.mul(self.values, other.values))
    }
}

impl<L: Doubles> Mul<f64> for Vector<L> {
    type Output = Self;
    #[inline(always)]
    fn mul(self, factor: f64) -> Self {
        self * self.constant(factor)
    }
}

impl<L: Doubles> Div for Vector<L> {
    type Output = Self;
    #[inline(always)]
    fn div(self, other: Self) -> Self {
        self.with(self.lanes.div(self.values, other.values))
    }
}

impl<L: Doubles> Neg for Vector<L> {
    type Output = Self;
    #[inline(always)]
    fn neg(self) -> Self {
        self.constant(-0.0) - self
    }
}
