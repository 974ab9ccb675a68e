//! Two vectors of doubles as one.

// A function of vectors has to become part of one that is compiled for their instructions.
#![allow(clippy::inline_always)]

use crate::simd::doubles::Doubles;

/// Two vectors as one.
///
/// Formulas are chains in which every operation waits for the one before it. The processor overlaps independent
/// chains: four registers of AVX-512 together take half the time of one after the other.
#[derive(Clone, Copy)]
pub struct Interleaved<L>(pub L);

impl<L: Doubles> Doubles for Interleaved<L> {
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
