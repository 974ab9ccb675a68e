//! Vector registers of the loss, of any width.
//!
//! The loss is written once, over [`Lanes`]. Comparisons with NaN are false, and a selection keeps the NaN that it
//! selects. No operation is fused with another. A token's result is therefore the same bit for bit on every
//! processor and at every place of a batch.

/// Max lanes of a register.
pub const MAX_LANES: usize = 16;

/// Operations on vectors of [`Self::COUNT`] numbers.
pub trait Lanes: Copy {
    /// Number in a lane.
    type Scalar: Copy;
    /// Vector of numbers.
    type Float: Copy;
    /// Vector of truth values.
    type Mask: Copy;
    /// Lanes of a vector.
    const COUNT: usize;

    fn splat(self, value: f64) -> Self::Float;
    /// Loads the first [`Self::COUNT`] elements.
    fn load(self, from: &[Self::Scalar]) -> Self::Float;
    /// Stores to the first [`Self::COUNT`] elements.
    fn store(self, values: Self::Float, to: &mut [Self::Scalar]);
    /// True where one of the first [`Self::COUNT`] bytes is not 0.
    fn load_mask(self, from: &[u8]) -> Self::Mask;

    fn add(self, a: Self::Float, b: Self::Float) -> Self::Float;
    fn sub(self, a: Self::Float, b: Self::Float) -> Self::Float;
    fn mul(self, a: Self::Float, b: Self::Float) -> Self::Float;
    fn div(self, a: Self::Float, b: Self::Float) -> Self::Float;
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
    /// Bit `k` is lane `k`.
    fn bits(self, mask: Self::Mask) -> u32;
    /// Inverse of [`Self::bits`].
    fn mask_of(self, bits: u32) -> Self::Mask;
    /// Stores the lanes where the mask is true side by side. May overwrite the rest of the first [`Self::COUNT`]
    /// elements.
    fn compress(self, mask: Self::Mask, a: Self::Float, to: &mut [Self::Scalar]);
    /// Inverse of [`Self::compress`]: the first elements in the lanes where the mask is true, 0 in the others. May
    /// read all of the first [`Self::COUNT`] elements.
    fn expand(self, mask: Self::Mask, from: &[Self::Scalar]) -> Self::Float;
}

/// Operations on the bits of float32 vectors.
pub trait FloatBits: Lanes<Scalar = f32> {
    /// Vector of 32-bit words.
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
    /// Shifts each lane by less than 32.
    fn shift_left(self, a: Self::Words, by: Self::Words) -> Self::Words;
    /// Shifts zeros into each lane, by less than 32.
    fn shift_right(self, a: Self::Words, by: Self::Words) -> Self::Words;
    fn min_words(self, a: Self::Words, b: Self::Words) -> Self::Words;
    fn max_words(self, a: Self::Words, b: Self::Words) -> Self::Words;
    fn select_words(self, mask: Self::Mask, a: Self::Words, b: Self::Words) -> Self::Words;
    /// The word `row[index]` of each lane. `lower` is true where the index is above 7.
    fn pick(self, row: &[u32; 16], index: Self::Words, lower: Self::Mask) -> Self::Words;
    /// The word `words[index]` of each lane.
    ///
    /// # Safety
    /// Every index lies inside `words`.
    unsafe fn gather(self, words: &[u32], index: Self::Words) -> Self::Words;
    /// The words at `index`, `index + 1`, `index + 2` and `index + 3` of each lane, as floats.
    ///
    /// # Safety
    /// Every index and the three after it lie inside `words`.
    unsafe fn gather_four(self, words: &[u32], index: Self::Words) -> [Self::Float; 4];
}
