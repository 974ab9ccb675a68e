//! Doubles side by side, and their elementary functions: what the bounds of many tokens need of a vector
//! register, whatever its width.
//!
//! [`Doubles`] is the register, [`Vector`] a number of it that formulas are written with. Multiplication and
//! addition may be fused, and every kind of vector does so at the same places; so all kinds give the same
//! bits.

// A function of vectors has to become part of one that is compiled for their instructions.
#![allow(clippy::inline_always)]

use std::ops::{Add, BitAnd, BitOr, Div, Mul, Neg, Not, Sub};

/// Numbers in the widest vector: four registers of AVX-512.
pub const MOST_DOUBLES: usize = 32;

/// Vectors of [`Self::COUNT`] doubles, and what can be done with all of them at a time.
pub trait Doubles: Copy {
    /// A vector of numbers.
    type Float: Copy;
    /// A vector of truths.
    type Mask: Copy;
    /// A vector of 64-bit words.
    type Words: Copy;
    /// Numbers in a vector.
    const COUNT: usize;

    fn splat(self, value: f64) -> Self::Float;
    /// The first [`Self::COUNT`] elements.
    fn load(self, from: &[f64]) -> Self::Float;
    /// To the first [`Self::COUNT`] elements.
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
    /// One bit a lane, the first lane's lowest.
    fn bits(self, mask: Self::Mask) -> u32;

    fn words(self, value: u64) -> Self::Words;
    fn as_words(self, a: Self::Float) -> Self::Words;
    fn as_floats(self, a: Self::Words) -> Self::Float;
    /// Wraps around.
    fn add_words(self, a: Self::Words, b: Self::Words) -> Self::Words;
    /// Wraps around.
    fn sub_words(self, a: Self::Words, b: Self::Words) -> Self::Words;
    fn and_words(self, a: Self::Words, b: Self::Words) -> Self::Words;
    /// Shifts up to the place of an exponent, by 52 bits.
    fn exponent_up(self, a: Self::Words) -> Self::Words;
    /// Shifts down from there; the sign bit comes along.
    fn exponent_down(self, a: Self::Words) -> Self::Words;
}

/// Work to be done with whatever vectors of doubles the processor has.
pub trait Work {
    fn run<L: Doubles>(self, lanes: L);
}

/// A vector as a number.
#[derive(Clone, Copy)]
pub struct Vector<L: Doubles> {
    pub lanes: L,
    pub values: L::Float,
}

/// A vector of truths.
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
    /// One bit a lane, the first lane's lowest.
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
    fn with(self, values: L::Float) -> Self {
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
    /// `other` where it is less.
    #[inline(always)]
    pub fn at_most(self, other: Self) -> Self {
        other.less(self).select(other, self)
    }
    /// `other` where it is greater.
    #[inline(always)]
    pub fn at_least(self, other: Self) -> Self {
        self.less(other).select(other, self)
    }
    #[inline(always)]
    pub fn abs(self) -> Self {
        let words =
            self.lanes.and_words(self.lanes.as_words(self.values), self.lanes.words(u64::MAX >> 1));
        self.with(self.lanes.as_floats(words))
    }
    /// The neighbouring double next to 0 of a number that is not 0.
    #[inline(always)]
    pub fn next_inwards(self) -> Self {
        let words = self.lanes.sub_words(self.lanes.as_words(self.values), self.lanes.words(1));
        self.with(self.lanes.as_floats(words))
    }
    /// The polynomial in this number with these coefficients, that of the highest power first.
    #[inline(always)]
    pub fn polynomial(self, coefficients: &[f64]) -> Self {
        let mut sum = self.constant(coefficients[0]);
        for coefficient in &coefficients[1..] {
            sum = sum.mul_add(self, self.constant(*coefficient));
        }
        sum
    }

    /// For a number within plus and minus 708: see [`Exponential`].
    #[inline(always)]
    pub fn exponential(self) -> Exponential<L> {
        let lanes = self.lanes;
        let one = self.constant(1.0);
        // self = k ln 2 + r; k = 0 up to 0.7, so that the gap comes from its series there.
        let shifted =
            self.mul_add(self.constant(std::f64::consts::LOG2_E), self.constant(ROUNDING));
        let near = self.abs().less(self.constant(NEAR_ZERO));
        let shifted = near.select(self.constant(ROUNDING), shifted);
        let k = shifted - self.constant(ROUNDING);
        let r = k.mul_add(self.constant(-LN_2[0]), self);
        let r = k.mul_add(self.constant(-LN_2[1]), r);
        let gap = r * r * r.polynomial(&EXP_GAP);
        let excess = r + gap;
        // 2^k, from the low bits of k: those above the exponent's are shifted out.
        let exponent = lanes.add_words(lanes.as_words(shifted.values), lanes.words(1023));
        let scale = self.with(lanes.as_floats(lanes.exponent_up(exponent)));
        let scaled = scale.mul_add(excess, scale - one);
        Exponential {
            u: scale.mul_add(excess, scale),
            excess: near.select(excess, scaled),
            gap: near.select(gap, scaled - self),
        }
    }

    /// Of `1 + self`, for a number above -1: see [`Logarithm`].
    #[inline(always)]
    pub fn log_1p(self) -> Logarithm<L> {
        let one = self.constant(1.0);
        let u = self + one;
        // What rounding u lost.
        let from_self = u - one;
        let lost = (self - from_self) + (one - (u - from_self));
        self.log_of(u, lost)
    }

    /// Of this positive normal number.
    #[inline(always)]
    pub fn ln(self) -> Self {
        (self - self.constant(1.0)).log_of(self, self.constant(0.0)).log
    }

    /// Of `u + lost`, which is 1 more than this number; `lost` is less than an ulp of `u`.
    #[inline(always)]
    fn log_of(self, u: Self, lost: Self) -> Logarithm<L> {
        let lanes = self.lanes;
        // u = 2^k (1 + d); k = 0 around 1, where the gap would cancel.
        let shifted = lanes.add_words(lanes.as_words(u.values), lanes.words(ONE - ROOT_HALF));
        let biased = lanes.exponent_down(shifted);
        let mantissa = lanes.add_words(
            lanes.and_words(shifted, lanes.words((1 << 52) - 1)),
            lanes.words(ROOT_HALF),
        );
        let k = self.with(lanes.as_floats(lanes.add_words(biased, lanes.words(TWO_52))))
            - self.constant(f64::from_bits(TWO_52) + 1023.0);
        let unscale = self
            .with(lanes.as_floats(lanes.exponent_up(lanes.sub_words(lanes.words(2046), biased))));
        let d = lost.mul_add(unscale, self.with(lanes.as_floats(mantissa)) - self.constant(1.0));
        let near = self.constant(NEAR_ONE[0]).less(u) & u.less(self.constant(NEAR_ONE[1]));
        let d = near.select(self, d);
        let k = near.select(self.constant(0.0), k);
        // ln(1 + d) = 2 atanh s = d - s (d - R)
        let s = d / (d + self.constant(2.0));
        let square = s * s;
        let gap = s * (d - square * square.polynomial(&LOG_TAIL));
        let fraction = d - k.mul_add(self.constant(-LN_2[1]), gap);
        let log = k.mul_add(self.constant(LN_2[0]), fraction);
        Logarithm { log, gap: near.select(gap, self - log) }
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

/// Of a number t.
#[derive(Clone, Copy)]
pub struct Exponential<L: Doubles> {
    /// `e^t`
    pub u: Vector<L>,
    /// `e^t - 1`
    pub excess: Vector<L>,
    /// `e^t - 1 - t`, which does not cancel around 0.
    pub gap: Vector<L>,
}

/// Of a number x.
#[derive(Clone, Copy)]
pub struct Logarithm<L: Doubles> {
    /// `ln(1 + x)`
    pub log: Vector<L>,
    /// `x - ln(1 + x)`, which does not cancel around 0.
    pub gap: Vector<L>,
}

/// `1.5 * 2^52`: added to a double and taken away again, it rounds it to a whole number, which the low bits
/// hold in between.
const ROUNDING: f64 = 6_755_399_441_055_744.0;

/// `2^52`, whose low bits are those of a whole number added to it.
const TWO_52: u64 = 1075 << 52;

/// The bits of 1.
const ONE: u64 = 1023 << 52;

/// The bits of the square root of 1/2, from which on a mantissa is taken.
const ROOT_HALF: u64 = 0x3fe6_a09e_667f_3bcd;

/// `ln 2` and what a double lacks of it.
const LN_2: [f64; 2] = [std::f64::consts::LN_2, 2.319_046_813_846_299_6e-17];

/// Up to here an exponential is not reduced.
const NEAR_ZERO: f64 = 0.7;

/// Between these a logarithm is not reduced.
const NEAR_ONE: [f64; 2] = [0.6, 1.6];

/// `(e^r - 1 - r)/r^2` up to 0.7 on either side, within 1e-17 (a Chebyshev fit).
const EXP_GAP: [f64; 13] = [
    1.1547103037097898e-11,
    1.6181264692868738e-10,
    2.087628881183229e-09,
    2.505135890630596e-08,
    2.7557320601102605e-07,
    2.7557321428677544e-06,
    2.4801587299618648e-05,
    0.00019841269838118025,
    0.0013888888888890095,
    0.008333333333335264,
    0.041666666666666664,
    0.16666666666666663,
    0.5,
];

/// `(2 atanh(s)/s - 2)/z` for `z = s^2` up to 1/16, within 6e-17 (a Chebyshev fit).
const LOG_TAIL: [f64; 10] = [
    0.12759672564548277,
    0.10071836415430044,
    0.11799077862303027,
    0.13331779728642187,
    0.15384658601910198,
    0.18181817452386903,
    0.22222222229277946,
    0.2857142857139397,
    0.40000000000000063,
    0.6666666666666666,
];

/// Four numbers at a time in whatever instructions the compiler finds for arrays.
#[derive(Clone, Copy)]
pub struct PortableDoubles;

#[inline(always)]
fn each<A: Copy, T>(a: [A; 4], operation: impl Fn(A) -> T) -> [T; 4] {
    a.map(operation)
}

#[inline(always)]
fn pairwise<A: Copy, B: Copy, T>(a: [A; 4], b: [B; 4], operation: impl Fn(A, B) -> T) -> [T; 4] {
    std::array::from_fn(|lane| operation(a[lane], b[lane]))
}

impl Doubles for PortableDoubles {
    type Float = [f64; 4];
    type Mask = [bool; 4];
    type Words = [u64; 4];
    const COUNT: usize = 4;

    #[inline(always)]
    fn splat(self, value: f64) -> [f64; 4] {
        [value; 4]
    }
    #[inline(always)]
    fn load(self, from: &[f64]) -> [f64; 4] {
        std::array::from_fn(|lane| from[lane])
    }
    #[inline(always)]
    fn store(self, values: [f64; 4], to: &mut [f64]) {
        to[..4].copy_from_slice(&values);
    }
    #[inline(always)]
    fn add(self, a: [f64; 4], b: [f64; 4]) -> [f64; 4] {
        pairwise(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: [f64; 4], b: [f64; 4]) -> [f64; 4] {
        pairwise(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: [f64; 4], b: [f64; 4]) -> [f64; 4] {
        pairwise(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: [f64; 4], b: [f64; 4]) -> [f64; 4] {
        pairwise(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn sqrt(self, a: [f64; 4]) -> [f64; 4] {
        each(a, f64::sqrt)
    }
    #[inline(always)]
    fn mul_add(self, a: [f64; 4], b: [f64; 4], c: [f64; 4]) -> [f64; 4] {
        std::array::from_fn(|lane| a[lane].mul_add(b[lane], c[lane]))
    }
    #[inline(always)]
    fn less(self, a: [f64; 4], b: [f64; 4]) -> [bool; 4] {
        pairwise(a, b, |a, b| a < b)
    }
    #[inline(always)]
    fn and(self, a: [bool; 4], b: [bool; 4]) -> [bool; 4] {
        pairwise(a, b, |a, b| a & b)
    }
    #[inline(always)]
    fn or(self, a: [bool; 4], b: [bool; 4]) -> [bool; 4] {
        pairwise(a, b, |a, b| a | b)
    }
    #[inline(always)]
    fn not(self, a: [bool; 4]) -> [bool; 4] {
        each(a, |a| !a)
    }
    #[inline(always)]
    fn select(self, mask: [bool; 4], a: [f64; 4], b: [f64; 4]) -> [f64; 4] {
        std::array::from_fn(|lane| if mask[lane] { a[lane] } else { b[lane] })
    }
    #[inline(always)]
    fn bits(self, mask: [bool; 4]) -> u32 {
        (0..4).fold(0, |bits, lane| bits | u32::from(mask[lane]) << lane)
    }
    #[inline(always)]
    fn words(self, value: u64) -> [u64; 4] {
        [value; 4]
    }
    #[inline(always)]
    fn as_words(self, a: [f64; 4]) -> [u64; 4] {
        each(a, f64::to_bits)
    }
    #[inline(always)]
    fn as_floats(self, a: [u64; 4]) -> [f64; 4] {
        each(a, f64::from_bits)
    }
    #[inline(always)]
    fn add_words(self, a: [u64; 4], b: [u64; 4]) -> [u64; 4] {
        pairwise(a, b, u64::wrapping_add)
    }
    #[inline(always)]
    fn sub_words(self, a: [u64; 4], b: [u64; 4]) -> [u64; 4] {
        pairwise(a, b, u64::wrapping_sub)
    }
    #[inline(always)]
    fn and_words(self, a: [u64; 4], b: [u64; 4]) -> [u64; 4] {
        pairwise(a, b, |a, b| a & b)
    }
    #[inline(always)]
    fn exponent_up(self, a: [u64; 4]) -> [u64; 4] {
        each(a, |a| a << 52)
    }
    #[inline(always)]
    fn exponent_down(self, a: [u64; 4]) -> [u64; 4] {
        each(a, |a| a >> 52)
    }
}

/// Two vectors as one. The formulas are chains in which every operation needs the one before it; the processor
/// works on another chain while it waits. Four of AVX-512 take half the time of one by one.
#[derive(Clone, Copy)]
pub struct Twice<L>(pub L);

impl<L: Doubles> Doubles for Twice<L> {
    type Float = (L::Float, L::Float);
    type Mask = (L::Mask, L::Mask);
    type Words = (L::Words, L::Words);
    const COUNT: usize = 2 * L::COUNT;

    #[inline(always)]
    fn splat(self, value: f64) -> Self::Float {
        (self.0.splat(value), self.0.splat(value))
    }
    #[inline(always)]
    fn load(self, from: &[f64]) -> Self::Float {
        (self.0.load(from), self.0.load(&from[L::COUNT..]))
    }
    #[inline(always)]
    fn store(self, values: Self::Float, to: &mut [f64]) {
        self.0.store(values.0, to);
        self.0.store(values.1, &mut to[L::COUNT..]);
    }
    #[inline(always)]
    fn bits(self, mask: Self::Mask) -> u32 {
        self.0.bits(mask.0) | self.0.bits(mask.1) << L::COUNT
    }
    #[inline(always)]
    fn words(self, value: u64) -> Self::Words {
        (self.0.words(value), self.0.words(value))
    }
    #[inline(always)]
    fn add(self, a: Self::Float, b: Self::Float) -> Self::Float {
        (self.0.add(a.0, b.0), self.0.add(a.1, b.1))
    }
    #[inline(always)]
    fn sub(self, a: Self::Float, b: Self::Float) -> Self::Float {
        (self.0.sub(a.0, b.0), self.0.sub(a.1, b.1))
    }
    #[inline(always)]
    fn mul(self, a: Self::Float, b: Self::Float) -> Self::Float {
        (self.0.mul(a.0, b.0), self.0.mul(a.1, b.1))
    }
    #[inline(always)]
    fn div(self, a: Self::Float, b: Self::Float) -> Self::Float {
        (self.0.div(a.0, b.0), self.0.div(a.1, b.1))
    }
    #[inline(always)]
    fn sqrt(self, a: Self::Float) -> Self::Float {
        (self.0.sqrt(a.0), self.0.sqrt(a.1))
    }
    #[inline(always)]
    fn mul_add(self, a: Self::Float, b: Self::Float, c: Self::Float) -> Self::Float {
        (self.0.mul_add(a.0, b.0, c.0), self.0.mul_add(a.1, b.1, c.1))
    }
    #[inline(always)]
    fn less(self, a: Self::Float, b: Self::Float) -> Self::Mask {
        (self.0.less(a.0, b.0), self.0.less(a.1, b.1))
    }
    #[inline(always)]
    fn and(self, a: Self::Mask, b: Self::Mask) -> Self::Mask {
        (self.0.and(a.0, b.0), self.0.and(a.1, b.1))
    }
    #[inline(always)]
    fn or(self, a: Self::Mask, b: Self::Mask) -> Self::Mask {
        (self.0.or(a.0, b.0), self.0.or(a.1, b.1))
    }
    #[inline(always)]
    fn not(self, a: Self::Mask) -> Self::Mask {
        (self.0.not(a.0), self.0.not(a.1))
    }
    #[inline(always)]
    fn select(self, mask: Self::Mask, a: Self::Float, b: Self::Float) -> Self::Float {
        (self.0.select(mask.0, a.0, b.0), self.0.select(mask.1, a.1, b.1))
    }
    #[inline(always)]
    fn as_words(self, a: Self::Float) -> Self::Words {
        (self.0.as_words(a.0), self.0.as_words(a.1))
    }
    #[inline(always)]
    fn as_floats(self, a: Self::Words) -> Self::Float {
        (self.0.as_floats(a.0), self.0.as_floats(a.1))
    }
    #[inline(always)]
    fn add_words(self, a: Self::Words, b: Self::Words) -> Self::Words {
        (self.0.add_words(a.0, b.0), self.0.add_words(a.1, b.1))
    }
    #[inline(always)]
    fn sub_words(self, a: Self::Words, b: Self::Words) -> Self::Words {
        (self.0.sub_words(a.0, b.0), self.0.sub_words(a.1, b.1))
    }
    #[inline(always)]
    fn and_words(self, a: Self::Words, b: Self::Words) -> Self::Words {
        (self.0.and_words(a.0, b.0), self.0.and_words(a.1, b.1))
    }
    #[inline(always)]
    fn exponent_up(self, a: Self::Words) -> Self::Words {
        (self.0.exponent_up(a.0), self.0.exponent_up(a.1))
    }
    #[inline(always)]
    fn exponent_down(self, a: Self::Words) -> Self::Words {
        (self.0.exponent_down(a.0), self.0.exponent_down(a.1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::number::{Dd, Real};

    /// `[u, excess, gap]` of the exponential and `[log, gap]` of the logarithm of each number.
    struct Each<'a> {
        x: &'a [f64],
        found: &'a mut Vec<[f64; 5]>,
    }

    impl Work for Each<'_> {
        #[inline(always)]
        fn run<L: Doubles>(self, lanes: L) {
            for part in self.x.chunks_exact(L::COUNT) {
                let x = Vector::load(lanes, part);
                let (power, log) = (x.exponential(), x.log_1p());
                let mut columns = [[0.0; MOST_DOUBLES]; 5];
                power.u.store(&mut columns[0]);
                power.excess.store(&mut columns[1]);
                power.gap.store(&mut columns[2]);
                log.log.store(&mut columns[3]);
                log.gap.store(&mut columns[4]);
                for lane in 0..L::COUNT {
                    self.found.push(columns.map(|column| column[lane]));
                }
            }
        }
    }

    fn kinds(x: &[f64]) -> Vec<(&'static str, Vec<[f64; 5]>)> {
        let mut found = Vec::new();
        Each { x, found: &mut found }.run(PortableDoubles);
        let mut kinds = vec![("portable", found)];
        #[cfg(target_arch = "x86_64")]
        {
            if let Some(lanes) = crate::simd::avx2::Avx2Fused::new() {
                let mut found = Vec::new();
                lanes.run_doubles(Each { x, found: &mut found });
                kinds.push(("AVX2", found));
            }
            if let Some(lanes) = crate::simd::avx512::Avx512::new() {
                let mut found = Vec::new();
                lanes.run_doubles(Each { x, found: &mut found });
                kinds.push(("AVX-512", found));
            }
        }
        kinds
    }

    /// Numbers of every size up to `most`, of both signs, and densely up to 3.
    fn numbers(most: f64) -> Vec<f64> {
        let sizes =
            (0..1 << 13).map(|i| (f64::from(i) * 0.173 - 700.0).exp()).filter(|x| *x < most);
        let dense = (1..1 << 14).map(|i| f64::from(i) * (3.0 / f64::from(1 << 14)));
        let mut numbers: Vec<f64> = sizes.chain(dense).flat_map(|x| [x, -x]).collect();
        numbers.resize(numbers.len().next_multiple_of(MOST_DOUBLES), 1.0);
        numbers
    }

    /// What docs/numerics.md states, in units of 2^-53.
    #[test]
    fn elementary_functions_are_as_good_as_they_say() {
        let mut worst = [0.0_f64; 5];
        let mut compare = |column: usize, found: f64, exact: Dd| {
            let error = ((Dd::of(found) - exact) / exact).abs().to_f64();
            worst[column] = worst[column].max(error / (0.5 * f64::EPSILON));
        };
        let x = numbers(708.0);
        for (&x, found) in x.iter().zip(&kinds(&x)[0].1) {
            let wide = Dd::of(x);
            compare(0, found[0], wide.exp());
            compare(1, found[1], wide.exp_m1());
            // Where 31 digits cancel, too, they still have 16.
            if x.abs() > 1e-12 {
                compare(2, found[2], wide.exp_m1() - wide);
            }
        }
        let x = numbers(1e300);
        for (&x, found) in x.iter().zip(&kinds(&x)[0].1).filter(|(x, _)| **x > -1.0) {
            let wide = Dd::of(x);
            compare(3, found[3], wide.ln_1p());
            if x.abs() > 1e-12 {
                compare(4, found[4], wide - wide.ln_1p());
            }
        }
        for (column, stated) in [2.0, 2.0, 4.0, 2.0, 6.0].into_iter().enumerate() {
            assert!(worst[column] <= stated, "{worst:?}");
        }
    }

    #[test]
    fn every_kind_of_vector_gives_the_same_bits() {
        let x = numbers(708.0);
        let kinds = kinds(&x);
        for (name, found) in &kinds {
            for ((x, found), portable) in x.iter().zip(found).zip(&kinds[0].1) {
                let same = found.map(f64::to_bits) == portable.map(f64::to_bits);
                assert!(same || *x <= -1.0, "{name} {x:e}: {found:?} {portable:?}");
            }
        }
    }
}
