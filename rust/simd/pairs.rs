//! Vectors of double-doubles, with about 31 digits.
//!
//! The operations are those of [`Dd`], without its care for infinities. Sources are named there.

// A function of vectors has to become part of one that is compiled for their instructions.
#![allow(clippy::inline_always)]

use std::ops::{Add, Div, Mul, Neg, Sub};

use crate::number::{Dd, INVERSE_FACTORIAL, LN_2_PARTS};
use crate::simd::doubles::{Doubles, Truth, Vector};
use crate::simd::exp_log::ROUNDING_F64;

/// The exact sums `high + low`.
#[derive(Clone, Copy)]
pub struct Pair<L: Doubles> {
    pub high: Vector<L>,
    pub low: Vector<L>,
}

/// `e^t` and its companion without cancellation.
#[derive(Clone, Copy)]
pub struct PairExponential<L: Doubles> {
    /// `e^t`
    pub u: Pair<L>,
    /// `e^t - 1`
    pub excess: Pair<L>,
}

impl<L: Doubles> Pair<L> {
    /// The number in every lane.
    #[inline(always)]
    pub fn constant(like: Vector<L>, value: Dd) -> Self {
        Self { high: like.constant(value.hi), low: like.constant(value.lo) }
    }
    #[inline(always)]
    pub fn of(high: Vector<L>) -> Self {
        Self { high, low: high.constant(0.0) }
    }
    /// The exact sum of two doubles.
    #[inline(always)]
    pub fn sum(a: Vector<L>, b: Vector<L>) -> Self {
        let high = a + b;
        let from_b = high - a;
        Self { high, low: (a - (high - from_b)) + (b - from_b) }
    }
    /// The exact product of two doubles.
    #[inline(always)]
    pub fn product(a: Vector<L>, b: Vector<L>) -> Self {
        let high = a * b;
        Self { high, low: a.mul_add(b, -high) }
    }
    /// `high + low`, for `|high| >= |low|`.
    #[inline(always)]
    fn ordered(high: Vector<L>, low: Vector<L>) -> Self {
        let sum = high + low;
        Self { high: sum, low: low - (sum - high) }
    }
    /// `a` where it is true, `b` elsewhere.
    #[inline(always)]
    pub fn select(truth: Truth<L>, a: Self, b: Self) -> Self {
        Self { high: truth.select(a.high, b.high), low: truth.select(a.low, b.low) }
    }
    /// Root of a positive number.
    #[inline(always)]
    pub fn sqrt(self) -> Self {
        let root = self.high.sqrt();
        let rest = self - Self::product(root, root);
        Self::ordered(root, rest.high / (root + root))
    }
    /// The product without its last addition, which leaves `low` as large as an ulp or two of `high`.
    #[inline(always)]
    fn loose_product(self, other: Self) -> Self {
        let high = self.high * other.high;
        let low = self.high.mul_add(other.high, -high);
        let low = self.high.mul_add(other.low, low);
        Self { high, low: self.low.mul_add(other.high, low) }
    }
    /// `self factor + addend` for a product below the addend, as loose as a [`Self::loose_product`].
    #[inline(always)]
    fn horner(self, factor: Self, addend: Dd) -> Self {
        let product = self.loose_product(factor);
        let constant = self.high.constant(addend.hi);
        let high = constant + product.high;
        let low = product.high - (high - constant);
        Self { high, low: low + (product.low + self.high.constant(addend.lo)) }
    }
    /// The power series with these coefficients, the constant first. Those of `tail` follow, from the highest power
    /// down, in double precision.
    #[inline(always)]
    fn series<const N: usize>(self, coefficients: &[Dd; N], tail: &[f64]) -> Self {
        let last = coefficients[N - 1];
        let mut sum =
            Self::ordered(self.high.constant(last.hi), self.high * self.high.polynomial(tail));
        sum.low = sum.low + self.high.constant(last.lo);
        for &coefficient in coefficients.iter().rev().skip(1) {
            sum = sum.horner(self, coefficient);
        }
        sum
    }
    /// Multiplied by powers of two.
    #[inline(always)]
    fn scaled(self, scale: Vector<L>) -> Self {
        Self { high: self.high * scale, low: self.low * scale }
    }

    /// Exponentials of `-700 <= self <= 700`.
    #[inline(always)]
    pub fn exponential(self) -> PairExponential<L> {
        let high = self.high;
        let lanes = high.lanes;
        let one = high.constant(1.0);
        // self = k ln 2 + r
        let shifted =
            high.mul_add(high.constant(std::f64::consts::LOG2_E), high.constant(ROUNDING_F64));
        let k = shifted - high.constant(ROUNDING_F64);
        let [first, second, third] = LN_2_PARTS.map(|part| -part);
        let rest = k.mul_add(high.constant(first), high); // exact
        let product = Self::product(k, high.constant(second));
        let r = Self::sum(rest, product.high);
        let low = k.mul_add(high.constant(third), product.low);
        let r = Self::ordered(r.high, r.low + (low + self.low));
        // e^r - 1 = r + r^2 (1/2! + r/3! + ...), with the powers beyond 12 in double precision.
        let series = r.series(&INVERSE_FACTORIAL, &INVERSE_FACTORIAL_TAIL);
        let square = r.loose_product(r).loose_product(series);
        let e = Self::ordered(r.high, square.high);
        let e = Self::ordered(e.high, e.low + (square.low + r.low));
        // 2^k from the low bits of k. The shift drops the bits above the exponent's.
        let exponent = lanes.add_words(lanes.as_words(shifted.values), lanes.words(1023));
        let scale = high.with(lanes.as_floats(lanes.exponent_up(exponent)));
        let scaled = e.scaled(scale);
        let u = Self::ordered(scale, scaled.high);
        let u = Self::ordered(u.high, u.low + scaled.low);
        PairExponential { u, excess: scaled + Self::sum(scale, -one) }
    }

    /// Logarithm of a positive normal number `u`, given with `excess = u - 1`.
    #[inline(always)]
    pub fn ln(self, excess: Self) -> Self {
        let one = self.high.constant(1.0);
        // u = 2^k (1 + d), |d| at most sqrt(2) - 1
        let parts = self.high.parts();
        let far = Self::sum(parts.mantissa - one, self.low * parts.unscale);
        let near = parts.exponent.abs().less(one);
        let d = Self::select(near, excess, far);
        // ln(1 + d) = 2 atanh s = 2 s + 2 s z (1/3 + z/5 + ...), z = s^2
        let s = d / (d + Self::of(one + one));
        let z = s * s;
        let series = z.series(&INVERSE_ODD, &INVERSE_ODD_TAIL);
        let double = s.scaled(one + one);
        let rest = double.loose_product(z.loose_product(series));
        let log = Self::ordered(double.high, rest.high);
        let log = Self::ordered(log.high, log.low + (rest.low + double.low));
        let [first, second, third] = LN_2_PARTS;
        let k = parts.exponent;
        let product = Self::product(k, one.constant(second));
        let of_exponent = Self::sum(k * one.constant(first), product.high);
        let low = k.mul_add(one.constant(third), product.low);
        log + Self::ordered(of_exponent.high, of_exponent.low + low)
    }
}

impl<L: Doubles> Add for Pair<L> {
    type Output = Self;
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        let high = Self::sum(self.high, other.high);
        let low = Self::sum(self.low, other.low);
        let sum = Self::ordered(high.high, high.low + low.high);
        Self::ordered(sum.high, sum.low + low.low)
    }
}

impl<L: Doubles> Neg for Pair<L> {
    type Output = Self;
    #[inline(always)]
    fn neg(self) -> Self {
        Self { high: -self.high, low: -self.low }
    }
}

impl<L: Doubles> Sub for Pair<L> {
    type Output = Self;
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        self + -other
    }
}

impl<L: Doubles> Mul for Pair<L> {
    type Output = Self;
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        let product = self.loose_product(other);
        Self::ordered(product.high, product.low)
    }
}

impl<L: Doubles> Div for Pair<L> {
    type Output = Self;
    #[inline(always)]
    fn div(self, other: Self) -> Self {
        let inverse = self.high.constant(1.0) / other.high;
        let first = self.high * inverse;
        let rest = self - other * Self::of(first);
        let second = rest.high * inverse;
        let rest = rest - other * Self::of(second);
        let quotient = Self::ordered(first, second);
        Self::ordered(quotient.high, quotient.low + rest.high * inverse)
    }
}

/// `1/n!` for n from 24 down to 13.
const INVERSE_FACTORIAL_TAIL: [f64; 12] = {
    let mut inverse = [0.0; 12];
    let mut factorial = 479_001_600.0; // 12!
    let mut n = 13;
    while n <= 24 {
        factorial *= n as f64;
        inverse[24 - n] = 1.0 / factorial;
        n += 1;
    }
    inverse
};

/// `1/(2 n + 1)` for n from 1 to 10, by `tools/make_constants.py`.
const INVERSE_ODD: [Dd; 10] = [
    Dd { hi: 0.3333333333333333, lo: 1.850371707708594e-17 },
    Dd { hi: 0.2, lo: -1.1102230246251566e-17 },
    Dd { hi: 0.14285714285714285, lo: 7.93016446160826e-18 },
    Dd { hi: 0.1111111111111111, lo: 6.1679056923619804e-18 },
    Dd { hi: 0.09090909090909091, lo: -2.523234146875356e-18 },
    Dd { hi: 0.07692307692307693, lo: -4.270088556250602e-18 },
    Dd { hi: 0.06666666666666667, lo: 9.251858538542971e-19 },
    Dd { hi: 0.058823529411764705, lo: 8.163404592832033e-19 },
    Dd { hi: 0.05263157894736842, lo: 2.921639538487254e-18 },
    Dd { hi: 0.047619047619047616, lo: 2.64338815386942e-18 },
];

/// `1/(2 n + 1)` for n from 20 down to 11.
const INVERSE_ODD_TAIL: [f64; 10] = {
    let mut inverse = [0.0; 10];
    let mut n = 11;
    while n <= 20 {
        inverse[20 - n] = 1.0 / (2 * n + 1) as f64;
        n += 1;
    }
    inverse
};
