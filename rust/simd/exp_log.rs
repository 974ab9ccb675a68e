//! Exponentials and logarithms on vectors, without cancellation near 0.
//!
//! Unfused they serve the loss, with fused multiply-adds the solver.

// A function of vectors has to become part of one that is compiled for their instructions.
#![allow(clippy::inline_always)]

use crate::simd::doubles::{Doubles, Vector};
use crate::simd::lanes::{FloatBits, Lanes};
use crate::simd::wide::{LossDoubles, Wide};

/// `e^x`, and `e^x - 1 - x` without cancellation.
#[derive(Clone, Copy)]
pub struct ExpAndGap<F> {
    pub exp: F,
    pub gap: F,
}

/// Vectors that have exponentials.
pub trait Exponentials: Lanes {
    /// Exponentials of `-80 <= x <= 20`. NaN gives NaN.
    fn exp_and_gap(self, x: Self::Float) -> ExpAndGap<Self::Float>;
}

/// Float32: the error of `e^x` is at most 1.2 ulp, the relative error of the gap 1e-6.
impl<L: FloatBits> Exponentials for L {
    #[inline(always)]
    fn exp_and_gap(self, x: Self::Float) -> ExpAndGap<Self::Float> {
        let rounding = self.splat(ROUNDING_F32);
        // x = k ln 2 + t
        let shifted = self.add(self.mul(x, self.splat(std::f64::consts::LOG2_E)), rounding);
        let k = self.sub(shifted, rounding);
        let (high, low) =
            (self.mul(k, self.splat(LN_2_F32[0])), self.mul(k, self.splat(LN_2_F32[1])));
        let t = self.sub(self.sub(x, high), low);
        let mut series = self.splat(GAP[0]);
        for coefficient in &GAP[1..] {
            series = self.add(self.mul(series, t), self.splat(*coefficient));
        }
        let gap = self.mul(self.mul(t, t), series);
        let minus_one = self.add(gap, t);
        // 2^k from the bits of k. The shift drops the bits above the exponent's.
        let exponent = self.add_words(self.as_words(shifted), self.words(127));
        let scale = self.as_floats(self.shift_left(exponent, self.words(23)));
        let scaled = self.mul(scale, minus_one);
        let far = self.sub(self.add(scaled, self.sub(scale, self.splat(1.0))), x);
        let near = self.less(self.abs(k), self.splat(0.5));
        ExpAndGap { exp: self.add(scaled, scale), gap: self.select(near, gap, far) }
    }
}

/// Float64: the error of `e^x` is at most 1 ulp, the relative error of the gap 2e-15.
impl<D: LossDoubles> Exponentials for Wide<D> {
    #[inline(always)]
    fn exp_and_gap(self, x: D::Float) -> ExpAndGap<D::Float> {
        let doubles = self.0;
        let rounding = self.splat(ROUNDING_F64);
        // x = k ln 2 + t
        let shifted = self.add(self.mul(x, self.splat(std::f64::consts::LOG2_E)), rounding);
        let k = self.sub(shifted, rounding);
        let (high, low) = (
            self.mul(k, self.splat(LN_2_SHORT_F64[0])),
            self.mul(k, self.splat(LN_2_SHORT_F64[1])),
        );
        let t = self.sub(self.sub(x, high), low);
        // Pairs of terms, then pairs of pairs. A Horner scheme, in which each step waits for the one before, makes a loss
        // take a quarter longer.
        let square = self.mul(t, t);
        let fourth = self.mul(square, square);
        let join = |high, power, low| self.add(self.mul(high, power), low);
        let pair =
            |place: usize| join(self.splat(GAP_F64[place]), t, self.splat(GAP_F64[place + 1]));
        let high = join(self.splat(GAP_F64[0]), square, pair(1));
        let middle = join(pair(3), square, pair(5));
        let low = join(pair(7), square, pair(9));
        let series = join(join(high, fourth, middle), fourth, low);
        let gap = self.mul(square, series);
        let minus_one = self.add(gap, t);
        // 2^k from the low bits of k. The shift drops the bits above the exponent's.
        let exponent = doubles.add_words(doubles.as_words(shifted), doubles.words(1023));
        let scale = doubles.as_floats(doubles.exponent_up(exponent));
        let scaled = self.mul(scale, minus_one);
        let far = self.sub(self.add(scaled, self.sub(scale, self.splat(1.0))), x);
        let near = self.less(self.abs(k), self.splat(0.5));
        ExpAndGap { exp: self.add(scaled, scale), gap: self.select(near, gap, far) }
    }
}

/// `1.5 * 2^23`. A float plus this is rounded to a whole number, which is in the low bits of the sum.
const ROUNDING_F32: f64 = 12_582_912.0;

/// `ln 2` in two parts. The first is short, so that its product with a small whole number is exact.
const LN_2_F32: [f64; 2] = [0.693_359_375, -2.121_944_400_546_905_8e-4];

/// `(e^t - 1 - t)/t^2` for `t` up to 0.3469 on either side, within 4.5e-9. A Chebyshev fit, rounded to float32, by
/// `tools/make_constants.py`.
const GAP: [f64; 6] = [
    0.000_198_910_740_436_987_4,
    0.001_393_372_542_224_824_4,
    0.008_333_310_484_886_17,
    0.041_666_463_017_463_684,
    0.166_666_671_633_720_4,
    0.5,
];

/// `ln 2` as [`LN_2_F32`], in double precision.
const LN_2_SHORT_F64: [f64; 2] = [0.6931471805599472, -1.8641886737243033e-15];

/// `(e^t - 1 - t)/t^2` for `t` up to 0.3469 on either side, within 3e-18. A Chebyshev fit by
/// `tools/make_constants.py`.
const GAP_F64: [f64; 11] = [
    2.0914750905027345e-09,
    2.5105306538858238e-08,
    2.755727348935914e-07,
    2.755725518490137e-06,
    2.4801587325669058e-05,
    0.0001984126987499051,
    0.0013888888888883713,
    0.008333333333326087,
    0.04166666666666667,
    0.1666666666666667,
    0.5,
];

/// `e^t` and its two companions without cancellation.
#[derive(Clone, Copy)]
pub struct Exponential<L: Doubles> {
    /// `e^t`
    pub u: Vector<L>,
    /// `e^t - 1`
    pub excess: Vector<L>,
    /// `e^t - 1 - t`
    pub gap: Vector<L>,
}

/// `ln(1 + x)` and its companion without cancellation.
#[derive(Clone, Copy)]
pub struct Logarithm<L: Doubles> {
    /// `ln(1 + x)`
    pub log: Vector<L>,
    /// What rounding took from `log`. Both together have the absolute error of a logarithm below 1/2.
    pub low: Vector<L>,
    /// `x - ln(1 + x)`
    pub gap: Vector<L>,
}

/// `mantissa 2^exponent`, with the mantissa between the roots of 1/2 and of 2.
pub(super) struct Parts<L: Doubles> {
    pub(super) mantissa: Vector<L>,
    pub(super) exponent: Vector<L>,
    /// `2^-exponent`
    pub(super) unscale: Vector<L>,
}

impl<L: Doubles> Vector<L> {
    /// Exponentials of `-708 <= self <= 708`.
    #[inline(always)]
    pub fn exponential(self) -> Exponential<L> {
        let lanes = self.lanes;
        let one = self.constant(1.0);
        // self = k ln 2 + r. Up to 0.7, k = 0, so that the gap is its series.
        let shifted =
            self.mul_add(self.constant(std::f64::consts::LOG2_E), self.constant(ROUNDING_F64));
        let near = self.abs().less(self.constant(NEAR_ZERO));
        let shifted = near.select(self.constant(ROUNDING_F64), shifted);
        let k = shifted - self.constant(ROUNDING_F64);
        let r = k.mul_add(self.constant(-LN_2_F64[0]), self);
        let r = k.mul_add(self.constant(-LN_2_F64[1]), r);
        let gap = r * r * r.polynomial(&EXP_GAP);
        let excess = r + gap;
        // 2^k from the low bits of k. The shift drops the bits above the exponent's.
        let exponent = lanes.add_words(lanes.as_words(shifted.values), lanes.words(1023));
        let scale = self.with(lanes.as_floats(lanes.exponent_up(exponent)));
        let scaled = scale.mul_add(excess, scale - one);
        Exponential {
            u: scale.mul_add(excess, scale),
            excess: near.select(excess, scaled),
            gap: near.select(gap, scaled - self),
        }
    }

    /// Logarithm of `1 + self`, for a number above -1.
    #[inline(always)]
    pub fn log_1p(self) -> Logarithm<L> {
        let one = self.constant(1.0);
        let u = self + one;
        // Rounding error of u.
        let from_self = u - one;
        let lost = (self - from_self) + (one - (u - from_self));
        self.log_of(u, lost)
    }

    /// Logarithm of a positive normal number.
    #[inline(always)]
    pub fn ln(self) -> Self {
        self.ln_and_low().log
    }

    /// Logarithm of a positive normal number, with what rounding took from it.
    #[inline(always)]
    pub fn ln_and_low(self) -> Logarithm<L> {
        (self - self.constant(1.0)).log_of(self, self.constant(0.0))
    }

    /// Splits a positive normal number.
    #[inline(always)]
    pub(super) fn parts(self) -> Parts<L> {
        let lanes = self.lanes;
        let shifted = lanes.add_words(lanes.as_words(self.values), lanes.words(ONE - ROOT_HALF));
        let biased = lanes.exponent_down(shifted);
        let mantissa = lanes.add_words(
            lanes.and_words(shifted, lanes.words((1 << 52) - 1)),
            lanes.words(ROOT_HALF),
        );
        let exponent = self.with(lanes.as_floats(lanes.add_words(biased, lanes.words(TWO_52))))
            - self.constant(f64::from_bits(TWO_52) + 1023.0);
        let unscale = lanes.exponent_up(lanes.sub_words(lanes.words(2046), biased));
        Parts {
            mantissa: self.with(lanes.as_floats(mantissa)),
            exponent,
            unscale: self.with(lanes.as_floats(unscale)),
        }
    }

    /// Logarithm of `u + lost = 1 + self`, where `lost` is less than an ulp of `u`.
    #[inline(always)]
    fn log_of(self, u: Self, lost: Self) -> Logarithm<L> {
        // u = 2^k (1 + d). Around 1, where the gap would cancel, k = 0.
        let Parts { mantissa, exponent: k, unscale } = u.parts();
        let d = lost.mul_add(unscale, mantissa - self.constant(1.0));
        let near = self.constant(NEAR_ONE[0]).less(u) & u.less(self.constant(NEAR_ONE[1]));
        let d = near.select(self, d);
        let k = near.select(self.constant(0.0), k);
        // ln(1 + d) = 2 atanh s = d - s (d - R)
        let s = d / (d + self.constant(2.0));
        let square = s * s;
        let gap = s * (d - square * square.polynomial(&LOG_TAIL));
        let fraction = d - k.mul_add(self.constant(-LN_2_F64[1]), gap);
        let log = k.mul_add(self.constant(LN_2_F64[0]), fraction);
        let low = fraction - k.mul_add(self.constant(-LN_2_F64[0]), log);
        Logarithm { log, low, gap: near.select(gap, self - log) }
    }
}

/// `1.5 * 2^52`. A double plus this is rounded to a whole number, which is in the low bits of the sum.
pub(super) const ROUNDING_F64: f64 = 6_755_399_441_055_744.0;

/// Bits of `2^52`. A whole number is in the low bits of its sum with that.
const TWO_52: u64 = 1075 << 52;

/// Bits of 1.
const ONE: u64 = 1023 << 52;

/// Bits of the square root of 1/2, the smallest mantissa of a reduced number.
const ROOT_HALF: u64 = 0x3fe6_a09e_667f_3bcd;

/// `ln 2` and its rounding error.
const LN_2_F64: [f64; 2] = [std::f64::consts::LN_2, 2.319_046_813_846_299_6e-17];

/// Magnitude up to which an exponential is not reduced.
const NEAR_ZERO: f64 = 0.7;

/// Range in which a logarithm is not reduced.
const NEAR_ONE: [f64; 2] = [0.6, 1.6];

/// `(e^r - 1 - r)/r^2` up to 0.7 on either side, within 1e-17. A Chebyshev fit by `tools/make_constants.py`.
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

/// `(2 atanh(s)/s - 2)/z` for `z = s^2` up to 0.0626, within 6e-17. A Chebyshev fit by `tools/make_constants.py`.
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
