//! Registers in arrays and scalars, for any processor.

// A function of vectors has to become part of one that is compiled for their instructions.
#![allow(clippy::inline_always)]

use crate::simd::doubles::Doubles;
use crate::simd::interleaved::Interleaved;
use crate::simd::lanes::{FloatBits, Lanes};
use crate::simd::wide::LossDoubles;

#[inline(always)]
fn each<const N: usize, A: Copy, T>(a: [A; N], operation: impl Fn(A) -> T) -> [T; N] {
    a.map(operation)
}

#[inline(always)]
fn pairwise<const N: usize, A: Copy, B: Copy, T>(
    a: [A; N],
    b: [B; N],
    operation: impl Fn(A, B) -> T,
) -> [T; N] {
    std::array::from_fn(|lane| operation(a[lane], b[lane]))
}

/// Eight float32 in an array.
#[derive(Clone, Copy)]
pub struct Portable;

/// Lanes of [`Portable`].
const EIGHT: usize = 8;

/// All bits of a lane, or none.
#[inline(always)]
fn all_bits(truth: bool) -> u32 {
    if truth { u32::MAX } else { 0 }
}

impl Lanes for Portable {
    type Scalar = f32;
    type Float = [f32; EIGHT];
    type Mask = [u32; EIGHT];
    const COUNT: usize = EIGHT;

    #[inline(always)]
    fn splat(self, value: f64) -> Self::Float {
        [value as f32; EIGHT]
    }
    #[inline(always)]
    fn load(self, from: &[f32]) -> Self::Float {
        std::array::from_fn(|lane| from[lane])
    }
    #[inline(always)]
    fn store(self, values: Self::Float, to: &mut [f32]) {
        to[..EIGHT].copy_from_slice(&values);
    }
    #[inline(always)]
    fn load_mask(self, from: &[u8]) -> Self::Mask {
        std::array::from_fn(|lane| all_bits(from[lane] != 0))
    }
    #[inline(always)]
    fn add(self, a: Self::Float, b: Self::Float) -> Self::Float {
        pairwise(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: Self::Float, b: Self::Float) -> Self::Float {
        pairwise(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: Self::Float, b: Self::Float) -> Self::Float {
        pairwise(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: Self::Float, b: Self::Float) -> Self::Float {
        pairwise(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn abs(self, a: Self::Float) -> Self::Float {
        each(a, f32::abs)
    }
    #[inline(always)]
    fn min(self, a: Self::Float, b: Self::Float) -> Self::Float {
        pairwise(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn max(self, a: Self::Float, b: Self::Float) -> Self::Float {
        pairwise(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn clamp_max(self, limit: f64, a: Self::Float) -> Self::Float {
        each(a, |a| if a > limit as f32 { limit as f32 } else { a })
    }
    #[inline(always)]
    fn clamp_min(self, limit: f64, a: Self::Float) -> Self::Float {
        each(a, |a| if a < limit as f32 { limit as f32 } else { a })
    }
    #[inline(always)]
    fn less(self, a: Self::Float, b: Self::Float) -> Self::Mask {
        pairwise(a, b, |a, b| all_bits(a < b))
    }
    #[inline(always)]
    fn less_or_equal(self, a: Self::Float, b: Self::Float) -> Self::Mask {
        pairwise(a, b, |a, b| all_bits(a <= b))
    }
    #[inline(always)]
    fn is_nan(self, a: Self::Float) -> Self::Mask {
        each(a, |a| all_bits(a.is_nan()))
    }
    #[inline(always)]
    fn and(self, a: Self::Mask, b: Self::Mask) -> Self::Mask {
        pairwise(a, b, |a, b| a & b)
    }
    #[inline(always)]
    fn or(self, a: Self::Mask, b: Self::Mask) -> Self::Mask {
        pairwise(a, b, |a, b| a | b)
    }
    #[inline(always)]
    fn and_not(self, a: Self::Mask, b: Self::Mask) -> Self::Mask {
        pairwise(a, b, |a, b| a & !b)
    }
    #[inline(always)]
    fn select(self, mask: Self::Mask, a: Self::Float, b: Self::Float) -> Self::Float {
        self.as_floats(self.select_words(mask, self.as_words(a), self.as_words(b)))
    }
    #[inline(always)]
    fn bits(self, mask: Self::Mask) -> u32 {
        (0..EIGHT).fold(0, |bits, lane| bits | (mask[lane] & 1) << lane)
    }
    #[inline(always)]
    fn mask_of(self, bits: u32) -> Self::Mask {
        std::array::from_fn(|lane| all_bits(bits >> lane & 1 != 0))
    }
    #[inline(always)]
    fn compress(self, mask: Self::Mask, a: Self::Float, to: &mut [f32]) {
        let mut place = 0;
        for lane in 0..EIGHT {
            to[place] = a[lane];
            place += (mask[lane] & 1) as usize;
        }
    }
    #[inline(always)]
    fn expand(self, mask: Self::Mask, from: &[f32]) -> Self::Float {
        let mut place = 0;
        std::array::from_fn(|lane| {
            let here = mask[lane] != 0;
            place += usize::from(here);
            if here { from[place - 1] } else { 0.0 }
        })
    }
}

impl FloatBits for Portable {
    type Words = [u32; EIGHT];

    #[inline(always)]
    fn words(self, value: u32) -> Self::Words {
        [value; EIGHT]
    }
    #[inline(always)]
    fn as_words(self, a: Self::Float) -> Self::Words {
        each(a, f32::to_bits)
    }
    #[inline(always)]
    fn as_floats(self, a: Self::Words) -> Self::Float {
        each(a, f32::from_bits)
    }
    #[inline(always)]
    fn add_words(self, a: Self::Words, b: Self::Words) -> Self::Words {
        pairwise(a, b, u32::wrapping_add)
    }
    #[inline(always)]
    fn sub_words(self, a: Self::Words, b: Self::Words) -> Self::Words {
        pairwise(a, b, u32::wrapping_sub)
    }
    #[inline(always)]
    fn and_words(self, a: Self::Words, b: Self::Words) -> Self::Words {
        pairwise(a, b, |a, b| a & b)
    }
    #[inline(always)]
    fn or_words(self, a: Self::Words, b: Self::Words) -> Self::Words {
        pairwise(a, b, |a, b| a | b)
    }
    #[inline(always)]
    fn shift_left(self, a: Self::Words, by: Self::Words) -> Self::Words {
        pairwise(a, by, |a, by| a << (by & 31))
    }
    #[inline(always)]
    fn shift_right(self, a: Self::Words, by: Self::Words) -> Self::Words {
        pairwise(a, by, |a, by| a >> (by & 31))
    }
    #[inline(always)]
    fn min_words(self, a: Self::Words, b: Self::Words) -> Self::Words {
        pairwise(a, b, u32::min)
    }
    #[inline(always)]
    fn max_words(self, a: Self::Words, b: Self::Words) -> Self::Words {
        pairwise(a, b, u32::max)
    }
    #[inline(always)]
    fn select_words(self, mask: Self::Mask, a: Self::Words, b: Self::Words) -> Self::Words {
        std::array::from_fn(|lane| mask[lane] & a[lane] | !mask[lane] & b[lane])
    }
    #[inline(always)]
    fn pick(self, row: &[u32; 16], index: Self::Words, _: Self::Mask) -> Self::Words {
        each(index, |index| row[index as usize & 15])
    }
    #[inline(always)]
    unsafe fn gather(self, words: &[u32], index: Self::Words) -> Self::Words {
        // SAFETY: the caller keeps the indices inside.
        each(index, |index| unsafe { *words.get_unchecked(index as usize) })
    }
    #[inline(always)]
    unsafe fn gather_four(self, words: &[u32], index: Self::Words) -> [Self::Float; 4] {
        // SAFETY: the caller keeps the indices inside.
        [0, 1, 2, 3].map(|offset| {
            each(index, |index| unsafe {
                f32::from_bits(*words.get_unchecked(index as usize + offset))
            })
        })
    }
}

/// Four float64 in an array, for the solver.
#[derive(Clone, Copy)]
pub struct PortableDoubles;

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

impl LossDoubles for Interleaved<PortableDoubles> {
    type Narrow = Portable;

    #[inline(always)]
    fn narrow(self) -> Portable {
        Portable
    }
    #[inline(always)]
    fn rounded(self, a: Self::Float) -> [f32; EIGHT] {
        std::array::from_fn(|lane| if lane < 4 { a.0[lane] as f32 } else { a.1[lane - 4] as f32 })
    }
    #[inline(always)]
    fn widened(self, a: [f32; EIGHT]) -> Self::Float {
        let half = |first: usize| std::array::from_fn(|lane| f64::from(a[first + lane]));
        (half(0), half(4))
    }
    #[inline(always)]
    fn less_or_equal(self, a: Self::Float, b: Self::Float) -> Self::Mask {
        (pairwise(a.0, b.0, |a, b| a <= b), pairwise(a.1, b.1, |a, b| a <= b))
    }
    #[inline(always)]
    fn load_mask(self, from: &[u8]) -> Self::Mask {
        let half = |first: usize| std::array::from_fn(|lane| from[first + lane] != 0);
        (half(0), half(4))
    }
    #[inline(always)]
    fn mask_of(self, bits: u32) -> Self::Mask {
        let half = |first: usize| std::array::from_fn(|lane| bits >> (first + lane) & 1 != 0);
        (half(0), half(4))
    }
    #[inline(always)]
    fn compress(self, mask: Self::Mask, a: Self::Float, to: &mut [f64]) {
        let mut place = 0;
        for (mask, a) in [(mask.0, a.0), (mask.1, a.1)] {
            for lane in 0..4 {
                to[place] = a[lane];
                place += usize::from(mask[lane]);
            }
        }
    }
    #[inline(always)]
    fn expand(self, mask: Self::Mask, from: &[f64]) -> Self::Float {
        let mut place = 0;
        let mut half = |mask: [bool; 4]| {
            std::array::from_fn(|lane| {
                place += usize::from(mask[lane]);
                if mask[lane] { from[place - 1] } else { 0.0 }
            })
        };
        (half(mask.0), half(mask.1))
    }
}
