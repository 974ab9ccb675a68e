//! Eight float64 of the loss, in the registers of the solver.

// A function of vectors has to become part of one that is compiled for their instructions.
#![allow(clippy::inline_always)]

use crate::simd::doubles::Doubles;
use crate::simd::lanes::{FloatBits, Lanes};

/// Registers of doubles with what the loss needs beyond the solver.
pub trait LossDoubles: Doubles {
    /// Registers of as many float32.
    type Narrow: FloatBits;

    fn narrow(self) -> Self::Narrow;
    /// Rounds to float32.
    fn rounded(self, a: Self::Float) -> <Self::Narrow as Lanes>::Float;
    fn widened(self, a: <Self::Narrow as Lanes>::Float) -> Self::Float;

    fn less_or_equal(self, a: Self::Float, b: Self::Float) -> Self::Mask;
    /// As [`Lanes::load_mask`].
    fn load_mask(self, from: &[u8]) -> Self::Mask;
    /// As [`Lanes::mask_of`].
    fn mask_of(self, bits: u32) -> Self::Mask;
    /// As [`Lanes::compress`].
    fn compress(self, mask: Self::Mask, a: Self::Float, to: &mut [f64]);
    /// As [`Lanes::expand`].
    fn expand(self, mask: Self::Mask, from: &[f64]) -> Self::Float;
}

/// Registers of doubles as those of the loss. No operation of [`Lanes`] is fused.
#[derive(Debug, Clone, Copy)]
pub struct Wide<D>(pub D);

impl<D: LossDoubles> Lanes for Wide<D> {
    type Scalar = f64;
    type Float = D::Float;
    type Mask = D::Mask;
    const COUNT: usize = D::COUNT;

    #[inline(always)]
    fn splat(self, value: f64) -> D::Float {
        self.0.splat(value)
    }
    #[inline(always)]
    fn load(self, from: &[f64]) -> D::Float {
        self.0.load(from)
    }
    #[inline(always)]
    fn store(self, values: D::Float, to: &mut [f64]) {
        self.0.store(values, to);
    }
    #[inline(always)]
    fn load_mask(self, from: &[u8]) -> D::Mask {
        self.0.load_mask(from)
    }
    #[inline(always)]
    fn add(self, a: D::Float, b: D::Float) -> D::Float {
        self.0.add(a, b)
    }
    #[inline(always)]
    fn sub(self, a: D::Float, b: D::Float) -> D::Float {
        self.0.sub(a, b)
    }
    #[inline(always)]
    fn mul(self, a: D::Float, b: D::Float) -> D::Float {
        self.0.mul(a, b)
    }
    #[inline(always)]
    fn div(self, a: D::Float, b: D::Float) -> D::Float {
        self.0.div(a, b)
    }
    #[inline(always)]
    fn abs(self, a: D::Float) -> D::Float {
        self.0.as_floats(self.0.and_words(self.0.as_words(a), self.0.words(u64::MAX >> 1)))
    }
    #[inline(always)]
    fn min(self, a: D::Float, b: D::Float) -> D::Float {
        self.0.select(self.0.less(a, b), a, b)
    }
    #[inline(always)]
    fn max(self, a: D::Float, b: D::Float) -> D::Float {
        self.0.select(self.0.less(b, a), a, b)
    }
    #[inline(always)]
    fn clamp_max(self, limit: f64, a: D::Float) -> D::Float {
        let limit = self.0.splat(limit);
        self.0.select(self.0.less(limit, a), limit, a)
    }
    #[inline(always)]
    fn clamp_min(self, limit: f64, a: D::Float) -> D::Float {
        let limit = self.0.splat(limit);
        self.0.select(self.0.less(a, limit), limit, a)
    }
    #[inline(always)]
    fn less(self, a: D::Float, b: D::Float) -> D::Mask {
        self.0.less(a, b)
    }
    #[inline(always)]
    fn less_or_equal(self, a: D::Float, b: D::Float) -> D::Mask {
        self.0.less_or_equal(a, b)
    }
    #[inline(always)]
    fn is_nan(self, a: D::Float) -> D::Mask {
        self.0.not(self.0.less_or_equal(a, a))
    }
    #[inline(always)]
    fn and(self, a: D::Mask, b: D::Mask) -> D::Mask {
        self.0.and(a, b)
    }
    #[inline(always)]
    fn or(self, a: D::Mask, b: D::Mask) -> D::Mask {
        self.0.or(a, b)
    }
    #[inline(always)]
    fn and_not(self, a: D::Mask, b: D::Mask) -> D::Mask {
        self.0.and(a, self.0.not(b))
    }
    #[inline(always)]
    fn select(self, mask: D::Mask, a: D::Float, b: D::Float) -> D::Float {
        self.0.select(mask, a, b)
    }
    #[inline(always)]
    fn bits(self, mask: D::Mask) -> u32 {
        self.0.bits(mask)
    }
    #[inline(always)]
    fn mask_of(self, bits: u32) -> D::Mask {
        self.0.mask_of(bits)
    }
    #[inline(always)]
    fn compress(self, mask: D::Mask, a: D::Float, to: &mut [f64]) {
        self.0.compress(mask, a, to);
    }
    #[inline(always)]
    fn expand(self, mask: D::Mask, from: &[f64]) -> D::Float {
        self.0.expand(mask, from)
    }
}
