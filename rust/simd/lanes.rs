//! Numbers side by side: what the loss needs of a vector register, whatever its width.
//!
//! The rules of `loss.rs` are written once, over [`Lanes`], and know neither the width nor the
//! instructions. Comparisons with NaN are false, and a selection keeps the NaN that it selects. No
//! operation is fused with another, so that a token's result is the same bit for bit on every
//! processor and at every place of a batch.

// A function of vectors has to become part of one that is compiled for their instructions.
#![allow(clippy::inline_always)]

/// Numbers in the widest vector.
pub const MAX_LANES: usize = 16;

/// Vectors of [`Self::COUNT`] numbers, and what can be done with all of them at a time.
pub trait Lanes: Copy {
    /// One number.
    type Scalar: Copy;
    /// A vector of numbers.
    type Float: Copy;
    /// A vector of truths.
    type Mask: Copy;
    /// Numbers in a vector.
    const COUNT: usize;

    fn splat(self, value: f64) -> Self::Float;
    /// The first [`Self::COUNT`] elements.
    fn load(self, from: &[Self::Scalar]) -> Self::Float;
    /// To the first [`Self::COUNT`] elements.
    fn store(self, values: Self::Float, to: &mut [Self::Scalar]);
    /// Which of the first [`Self::COUNT`] bytes are not 0.
    fn load_mask(self, from: &[u8]) -> Self::Mask;

    fn add(self, a: Self::Float, b: Self::Float) -> Self::Float;
    fn sub(self, a: Self::Float, b: Self::Float) -> Self::Float;
    fn mul(self, a: Self::Float, b: Self::Float) -> Self::Float;
    fn abs(self, a: Self::Float) -> Self::Float;

    /// The smaller of both; `b` if either is NaN.
    fn min(self, a: Self::Float, b: Self::Float) -> Self::Float;
    /// The larger of both; `b` if either is NaN.
    fn max(self, a: Self::Float, b: Self::Float) -> Self::Float;
    /// `a`, or `limit` where that is smaller; a NaN in `a` stays.
    fn clamp_max(self, limit: f64, a: Self::Float) -> Self::Float;
    /// `a`, or `limit` where that is larger; a NaN in `a` stays.
    fn clamp_min(self, limit: f64, a: Self::Float) -> Self::Float;

    fn less(self, a: Self::Float, b: Self::Float) -> Self::Mask;
    fn less_or_equal(self, a: Self::Float, b: Self::Float) -> Self::Mask;
    fn is_nan(self, a: Self::Float) -> Self::Mask;
    fn and(self, a: Self::Mask, b: Self::Mask) -> Self::Mask;
    fn or(self, a: Self::Mask, b: Self::Mask) -> Self::Mask;
    /// `a` and not `b`.
    fn and_not(self, a: Self::Mask, b: Self::Mask) -> Self::Mask;
    /// `a` where `mask` is true, `b` elsewhere.
    fn select(self, mask: Self::Mask, a: Self::Float, b: Self::Float) -> Self::Float;
    /// One bit a lane, the first lane's lowest.
    fn bits(self, mask: Self::Mask) -> u32;
    /// The inverse.
    fn mask_of(self, bits: u32) -> Self::Mask;
    /// Stores the lanes where the mask is true, one after the other; the rest of the first [`Self::COUNT`]
    /// elements may be overwritten.
    fn compress(self, mask: Self::Mask, a: Self::Float, to: &mut [Self::Scalar]);
    /// The inverse: the first elements in the lanes where the mask is true, 0 in the others. All of
    /// [`Self::COUNT`] elements may be read.
    fn expand(self, mask: Self::Mask, from: &[Self::Scalar]) -> Self::Float;
}

/// Vectors of f32 that can be taken for their bits.
pub trait FloatBits: Lanes<Scalar = f32> {
    /// A vector of 32-bit words.
    type Words: Copy;

    fn words(self, value: u32) -> Self::Words;
    fn as_words(self, a: Self::Float) -> Self::Words;
    fn as_floats(self, a: Self::Words) -> Self::Float;
    /// Wraps around.
    fn add_words(self, a: Self::Words, b: Self::Words) -> Self::Words;
    /// Wraps around.
    fn sub_words(self, a: Self::Words, b: Self::Words) -> Self::Words;
    fn and_words(self, a: Self::Words, b: Self::Words) -> Self::Words;
    fn or_words(self, a: Self::Words, b: Self::Words) -> Self::Words;
    /// Shifts by less than 32 each.
    fn shift_left(self, a: Self::Words, by: Self::Words) -> Self::Words;
    /// Shifts zeros in, by less than 32 each.
    fn shift_right(self, a: Self::Words, by: Self::Words) -> Self::Words;
    fn min_words(self, a: Self::Words, b: Self::Words) -> Self::Words;
    fn max_words(self, a: Self::Words, b: Self::Words) -> Self::Words;
    fn select_words(self, mask: Self::Mask, a: Self::Words, b: Self::Words) -> Self::Words;
    /// The word of a row that each lane names, `lower` being whether its number is above 7.
    fn of_row(self, row: &[u32; 16], index: Self::Words, lower: Self::Mask) -> Self::Words;
    /// The words at these places.
    ///
    /// # Safety
    /// Every index lies inside `words`.
    unsafe fn gather(self, words: &[u32], index: Self::Words) -> Self::Words;
    /// Four neighbouring words at each of these places, the first of all, the second of all, and so on.
    ///
    /// # Safety
    /// Every index, and the three after it, lie inside `words`.
    unsafe fn gather_four(self, words: &[u32], index: Self::Words) -> [Self::Float; 4];
}
