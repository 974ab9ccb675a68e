//! Numbers side by side: what the loss needs of a vector register, whatever its width.
//!
//! The rules of `loss.rs` are written once, over [`Lanes`], and know neither the width nor the
//! instructions. Comparisons with NaN are false, and a selection keeps the NaN that it selects. No
//! operation is fused with another, so that a token's result is the same bit for bit on every
//! processor and at every place of a batch.

// A function of vectors has to become part of one that is compiled for their instructions.
#![allow(clippy::inline_always)]

use crate::image::{
    AT_FAR, AT_ZERO, ENDS, ENTRY_BASE, FAR, FIRST_REACH_RANGE, HALVINGS_BITS, HALVINGS_MASK, Image,
    LOWER_REACH, MANTISSA, MANTISSA_BITS, MAX_BITS, MAX_PIECES, MIN_BITS, ONE, ORIGIN,
    REACH_RANGES, SCALE, START, UPPER_REACH,
};

/// Numbers in the widest vector.
pub const MOST_LANES: usize = 16;

/// `e^x`, and `e^x - 1 - x` without cancellation.
#[derive(Clone, Copy)]
pub struct Exponentials<F> {
    pub exp: F,
    pub excess: F,
}

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

    /// The lesser of both; `b` if either is NaN.
    fn lesser(self, a: Self::Float, b: Self::Float) -> Self::Float;
    /// The greater of both; `b` if either is NaN.
    fn greater(self, a: Self::Float, b: Self::Float) -> Self::Float;
    /// The lesser of both; a NaN in `a` stays.
    fn at_most(self, limit: f64, a: Self::Float) -> Self::Float;
    /// The greater of both; a NaN in `a` stays.
    fn at_least(self, limit: f64, a: Self::Float) -> Self::Float;

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

    /// For `x` within plus and minus 20; NaN gives NaN.
    fn exponentials(self, x: Self::Float) -> Exponentials<Self::Float>;
    /// The log-ratio up to which a token does not reach the tabulated bound of its side, or 0.
    fn reach(self, image: Image<'_>, old_log_prob: Self::Float, lower: Self::Mask) -> Self::Float;
    /// The tabulated side of each token: `lower`, a ratio, where the mask is true, else `log_upper`. What a
    /// NaN gives does not count: no ratio can be beyond its bound.
    fn look_up(self, image: Image<'_>, old_log_prob: Self::Float, lower: Self::Mask)
    -> Self::Float;
}

/// Work to be done with whatever vectors the processor has.
pub trait Work<T> {
    type Output;
    fn run<L: Lanes<Scalar = T>>(self, lanes: L) -> Self::Output;
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
    fn least(self, a: Self::Words, b: Self::Words) -> Self::Words;
    fn greatest(self, a: Self::Words, b: Self::Words) -> Self::Words;
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

/// The bits of infinity.
const INFINITY: u32 = 0x7f80_0000;

/// `1.5 * 2^23`: added to a float and taken away again, it rounds it to a whole number, which the low
/// bits hold in between.
const ROUNDING: f64 = 12_582_912.0;

/// `ln 2` in two parts, the first so short that its product with a small whole number is exact.
const LN_2: [f64; 2] = [0.693_359_375, -2.121_944_400_546_905_8e-4];

/// `(e^t - 1 - t)/t^2` for `t` up to `ln(2)/2` on either side, within 1.4e-9 (a Chebyshev fit).
const EXCESS: [f64; 6] = [
    0.000_198_910_740_436_987_4,
    0.001_393_372_542_224_824_4,
    0.008_333_310_484_886_17,
    0.041_666_463_017_463_684,
    0.166_666_671_633_720_4,
    0.5,
];

/// [`Lanes::exponentials`] in float32: `e^x` within 1.2 ulp, the excess within 1e-6 of itself.
#[inline(always)]
pub fn exponentials<L: FloatBits>(lanes: L, x: L::Float) -> Exponentials<L::Float> {
    let rounding = lanes.splat(ROUNDING);
    // x = k ln 2 + t
    let shifted = lanes.add(lanes.mul(x, lanes.splat(std::f64::consts::LOG2_E)), rounding);
    let k = lanes.sub(shifted, rounding);
    let (high, low) = (lanes.mul(k, lanes.splat(LN_2[0])), lanes.mul(k, lanes.splat(LN_2[1])));
    let t = lanes.sub(lanes.sub(x, high), low);
    let mut series = lanes.splat(EXCESS[0]);
    for coefficient in &EXCESS[1..] {
        series = lanes.add(lanes.mul(series, t), lanes.splat(*coefficient));
    }
    let excess = lanes.mul(lanes.mul(t, t), series);
    let minus_one = lanes.add(excess, t);
    // 2^k, from the bits of k: those above the exponent's are shifted out.
    let exponent = lanes.add_words(lanes.as_words(shifted), lanes.words(127));
    let scale = lanes.as_floats(lanes.shift_left(exponent, lanes.words(23)));
    let scaled = lanes.mul(scale, minus_one);
    let far = lanes.sub(lanes.add(scaled, lanes.sub(scale, lanes.splat(1.0))), x);
    let near = lanes.less(lanes.abs(k), lanes.splat(0.5));
    Exponentials { exp: lanes.add(scaled, scale), excess: lanes.select(near, excess, far) }
}

/// [`Image::y`] of a vector. Also turns -0 into 0; a NaN stays.
#[inline(always)]
fn minus_log_prob<L: Lanes>(lanes: L, old_log_prob: L::Float) -> L::Float {
    let zero = lanes.splat(0.0);
    lanes.select(lanes.less(zero, old_log_prob), zero, lanes.sub(zero, old_log_prob))
}

/// [`Lanes::reach`] in float32.
#[inline(always)]
pub fn reach<L: FloatBits>(
    lanes: L,
    image: Image<'_>,
    old_log_prob: L::Float,
    lower: L::Mask,
) -> L::Float {
    let y = minus_log_prob(lanes, old_log_prob);
    let first_range = lanes.words(FIRST_REACH_RANGE);
    let last_range = lanes.words(FIRST_REACH_RANGE + REACH_RANGES.len() as u32 - 1);
    let high_bits = lanes.shift_right(lanes.as_words(y), lanes.words(24));
    let range = lanes.least(lanes.greatest(high_bits, first_range), last_range);
    let first = lanes.select_words(
        lower,
        lanes.words((LOWER_REACH - ENDS) as u32),
        lanes.words((UPPER_REACH - ENDS) as u32),
    );
    let index = lanes.add_words(lanes.sub_words(range, first_range), first);
    let limit = lanes.as_floats(lanes.of_row(image.row(ENDS), index, lower));
    lanes.select(lower, limit, lanes.mul(limit, y))
}

/// [`Lanes::look_up`] in float32: the steps of [`Image`], in the same order, on a vector.
#[inline(always)]
pub fn look_up<L: FloatBits>(
    lanes: L,
    image: Image<'_>,
    old_log_prob: L::Float,
    lower: L::Mask,
) -> L::Float {
    let zero = lanes.splat(0.0);
    let words = image.words();
    let y = minus_log_prob(lanes, old_log_prob);
    let starts = image.row(START);
    let mut index = lanes.select_words(lower, lanes.words(MAX_PIECES as u32), lanes.words(0));
    for k in 1..MAX_PIECES {
        if starts[k].min(starts[MAX_PIECES + k]) == INFINITY {
            break; // neither side has more pieces
        }
        let start =
            lanes.select_words(lower, lanes.words(starts[MAX_PIECES + k]), lanes.words(starts[k]));
        let reached = lanes.less_or_equal(lanes.as_floats(start), y);
        index = lanes.add_words(index, lanes.select_words(reached, lanes.words(1), lanes.words(0)));
    }
    let origin = lanes.of_row(image.row(ORIGIN), index, lower);
    let scale = lanes.of_row(image.row(SCALE), index, lower);
    let base = lanes.of_row(image.row(ENTRY_BASE), index, lower);
    let lowest = lanes.of_row(image.row(MIN_BITS), index, lower);
    let highest = lanes.of_row(image.row(MAX_BITS), index, lower);
    let distance = lanes.abs(lanes.sub(y, lanes.as_floats(origin)));
    let z = lanes.as_words(lanes.mul(distance, lanes.as_floats(scale)));
    // A NaN is above all other bits, and is brought into the grid like them.
    let bits = lanes.least(lanes.greatest(z, lowest), highest);
    let exponent = lanes.shift_right(bits, lanes.words(MANTISSA_BITS));
    // SAFETY: an image has been checked: it has shown that bits within the grid of any piece lead to an entry
    // inside the image, and any entry with any mantissa to a cell inside it.
    let (entry, halvings, cell);
    unsafe {
        entry = lanes.gather(words, lanes.add_words(base, exponent));
        halvings = lanes.and_words(entry, lanes.words(HALVINGS_MASK));
        let mantissa = lanes.and_words(bits, lanes.words(MANTISSA));
        let fraction_bits = lanes.sub_words(lanes.words(MANTISSA_BITS), halvings);
        let node = lanes.add_words(
            lanes.shift_right(entry, lanes.words(HALVINGS_BITS)),
            lanes.shift_right(mantissa, fraction_bits),
        );
        cell = lanes.gather_four(words, lanes.add_words(node, node));
    }
    let [v0, s0, v1, s1] = cell;
    let mantissa = lanes.and_words(lanes.shift_left(bits, halvings), lanes.words(MANTISSA));
    let one_to_two = lanes.or_words(mantissa, lanes.words(ONE));
    let t = lanes.sub(lanes.as_floats(one_to_two), lanes.splat(1.0));
    let width = lanes.sub_words(exponent, halvings);
    let width = lanes.as_floats(lanes.shift_left(width, lanes.words(MANTISSA_BITS)));
    let (m0, m1) = (lanes.mul(s0, width), lanes.mul(s1, width));
    let rise = lanes.sub(v1, v0);
    let (two, three) = (lanes.splat(2.0), lanes.splat(3.0));
    let bend = lanes.sub(lanes.sub(lanes.mul(three, rise), lanes.mul(two, m0)), m1);
    let twist = lanes.sub(lanes.add(m0, m1), lanes.mul(two, rise));
    let mut value = lanes.add(bend, lanes.mul(t, twist));
    value = lanes.add(m0, lanes.mul(t, value));
    value = lanes.add(v0, lanes.mul(t, value));

    let ends = image.row(ENDS);
    let end = |first: usize| {
        let (upper_end, lower_end) = (lanes.words(ends[first]), lanes.words(ends[first + 1]));
        lanes.as_floats(lanes.select_words(lower, lower_end, upper_end))
    };
    let (at_zero, far) = (end(AT_ZERO - ENDS), end(AT_FAR - ENDS));
    value = lanes.select(lanes.less(zero, y), value, at_zero);
    value = lanes.select(lanes.less_or_equal(lanes.splat(FAR), y), far, value);
    // Above, never outside the simplex; below, never under 0.
    let greatest = lanes.select(lower, value, y);
    lanes.at_least(0.0, lanes.lesser(value, greatest))
}

/// Eight numbers at a time in whatever instructions the compiler finds for arrays.
#[derive(Clone, Copy)]
pub struct Portable;

/// Lanes of [`Portable`].
const EIGHT: usize = 8;

#[inline(always)]
fn each<A: Copy, T>(a: [A; EIGHT], operation: impl Fn(A) -> T) -> [T; EIGHT] {
    a.map(operation)
}

#[inline(always)]
fn pairwise<A: Copy, B: Copy, T>(
    a: [A; EIGHT],
    b: [B; EIGHT],
    operation: impl Fn(A, B) -> T,
) -> [T; EIGHT] {
    std::array::from_fn(|lane| operation(a[lane], b[lane]))
}

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
    fn abs(self, a: Self::Float) -> Self::Float {
        each(a, f32::abs)
    }
    #[inline(always)]
    fn lesser(self, a: Self::Float, b: Self::Float) -> Self::Float {
        pairwise(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn greater(self, a: Self::Float, b: Self::Float) -> Self::Float {
        pairwise(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn at_most(self, limit: f64, a: Self::Float) -> Self::Float {
        each(a, |a| if a > limit as f32 { limit as f32 } else { a })
    }
    #[inline(always)]
    fn at_least(self, limit: f64, a: Self::Float) -> Self::Float {
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
    #[inline(always)]
    fn exponentials(self, x: Self::Float) -> Exponentials<Self::Float> {
        exponentials(self, x)
    }
    #[inline(always)]
    fn reach(self, image: Image<'_>, old_log_prob: Self::Float, lower: Self::Mask) -> Self::Float {
        reach(self, image, old_log_prob, lower)
    }
    #[inline(always)]
    fn look_up(
        self,
        image: Image<'_>,
        old_log_prob: Self::Float,
        lower: Self::Mask,
    ) -> Self::Float {
        look_up(self, image, old_log_prob, lower)
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
    fn least(self, a: Self::Words, b: Self::Words) -> Self::Words {
        pairwise(a, b, u32::min)
    }
    #[inline(always)]
    fn greatest(self, a: Self::Words, b: Self::Words) -> Self::Words {
        pairwise(a, b, u32::max)
    }
    #[inline(always)]
    fn select_words(self, mask: Self::Mask, a: Self::Words, b: Self::Words) -> Self::Words {
        std::array::from_fn(|lane| mask[lane] & a[lane] | !mask[lane] & b[lane])
    }
    #[inline(always)]
    fn of_row(self, row: &[u32; 16], index: Self::Words, _: Self::Mask) -> Self::Words {
        each(index, |index| row[index as usize & 15])
    }
    #[inline(always)]
    unsafe fn gather(self, words: &[u32], index: Self::Words) -> Self::Words {
        // SAFETY: the caller says that they lie inside.
        each(index, |index| unsafe { *words.get_unchecked(index as usize) })
    }
    #[inline(always)]
    unsafe fn gather_four(self, words: &[u32], index: Self::Words) -> [Self::Float; 4] {
        // SAFETY: the caller says that they lie inside.
        [0, 1, 2, 3].map(|offset| {
            each(index, |index| unsafe {
                f32::from_bits(*words.get_unchecked(index as usize + offset))
            })
        })
    }
}

/// One f64 at a time.
#[derive(Clone, Copy)]
pub struct Double;

impl Lanes for Double {
    type Scalar = f64;
    type Float = f64;
    type Mask = bool;
    const COUNT: usize = 1;

    fn splat(self, value: f64) -> f64 {
        value
    }
    fn load(self, from: &[f64]) -> f64 {
        from[0]
    }
    fn store(self, value: f64, to: &mut [f64]) {
        to[0] = value;
    }
    fn load_mask(self, from: &[u8]) -> bool {
        from[0] != 0
    }
    fn add(self, a: f64, b: f64) -> f64 {
        a + b
    }
    fn sub(self, a: f64, b: f64) -> f64 {
        a - b
    }
    fn mul(self, a: f64, b: f64) -> f64 {
        a * b
    }
    fn abs(self, a: f64) -> f64 {
        a.abs()
    }
    fn lesser(self, a: f64, b: f64) -> f64 {
        if a < b { a } else { b }
    }
    fn greater(self, a: f64, b: f64) -> f64 {
        if a > b { a } else { b }
    }
    fn at_most(self, limit: f64, a: f64) -> f64 {
        if a > limit { limit } else { a }
    }
    fn at_least(self, limit: f64, a: f64) -> f64 {
        if a < limit { limit } else { a }
    }
    fn less(self, a: f64, b: f64) -> bool {
        a < b
    }
    fn less_or_equal(self, a: f64, b: f64) -> bool {
        a <= b
    }
    fn is_nan(self, a: f64) -> bool {
        a.is_nan()
    }
    fn and(self, a: bool, b: bool) -> bool {
        a && b
    }
    fn or(self, a: bool, b: bool) -> bool {
        a || b
    }
    fn and_not(self, a: bool, b: bool) -> bool {
        a && !b
    }
    fn select(self, mask: bool, a: f64, b: f64) -> f64 {
        if mask { a } else { b }
    }
    fn bits(self, mask: bool) -> u32 {
        u32::from(mask)
    }
    fn mask_of(self, bits: u32) -> bool {
        bits != 0
    }
    fn compress(self, _: bool, a: f64, to: &mut [f64]) {
        to[0] = a;
    }
    fn expand(self, mask: bool, from: &[f64]) -> f64 {
        if mask { from[0] } else { 0.0 }
    }
    fn exponentials(self, x: f64) -> Exponentials<f64> {
        // By its series where the difference has lost digits; the next term is 3e-15 of it.
        let excess = if x.abs() < 1e-3 {
            x * x * (0.5 + x * (1.0 / 6.0 + x * (1.0 / 24.0 + x * (1.0 / 120.0))))
        } else {
            x.exp_m1() - x
        };
        Exponentials { exp: x.exp(), excess }
    }
    fn reach(self, _: Image<'_>, _: f64, _: bool) -> f64 {
        0.0 // it is in float32
    }
    fn look_up(self, image: Image<'_>, old_log_prob: f64, lower: bool) -> f64 {
        let y = Image::y(old_log_prob as f32);
        if lower {
            return f64::from(image.lower(y));
        }
        let tabulated = image.log_upper(y);
        // Where everything is allowed, y in f32 could fall short of a new probability of 1.
        if tabulated >= y && old_log_prob <= 0.0 { -old_log_prob } else { f64::from(tabulated) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::band::Band;
    use crate::divergence::Divergence;
    use crate::table::BandTable;

    /// Runs vectors of every kind over the same numbers and returns what each kind made of them.
    struct Each<'a> {
        x: &'a [f32],
        image: Image<'a>,
    }

    impl Work<f32> for Each<'_> {
        type Output = Vec<[u32; 4]>;

        fn run<L: Lanes<Scalar = f32>>(self, lanes: L) -> Self::Output {
            let mut out = Vec::new();
            for chunk in self.x.chunks_exact(MOST_LANES) {
                for part in chunk.chunks_exact(L::COUNT) {
                    let x = lanes.load(part);
                    let within = lanes.select(lanes.less(lanes.abs(x), lanes.splat(20.0)), x, {
                        lanes.splat(20.0)
                    });
                    let Exponentials { exp, excess } = lanes.exponentials(within);
                    let upper = lanes.look_up(self.image, x, lanes.less(x, x));
                    let lower = lanes.look_up(self.image, x, lanes.less_or_equal(x, x));
                    let mut columns = [[0.0; MOST_LANES]; 4];
                    for (column, values) in columns.iter_mut().zip([exp, excess, upper, lower]) {
                        lanes.store(values, column);
                    }
                    out.extend(
                        (0..L::COUNT).map(|lane| columns.map(|column| column[lane].to_bits())),
                    );
                }
            }
            out
        }
    }

    fn kinds(x: &[f32], image: Image<'_>) -> Vec<(&'static str, Vec<[u32; 4]>)> {
        let mut kinds = vec![("portable", Each { x, image }.run(Portable))];
        #[cfg(target_arch = "x86_64")]
        {
            if let Some(lanes) = crate::simd::avx2::Avx2::new() {
                kinds.push(("AVX2", lanes.run(Each { x, image })));
            }
            if let Some(lanes) = crate::simd::avx512::Avx512::new() {
                kinds.push(("AVX-512", lanes.run(Each { x, image })));
            }
        }
        kinds
    }

    /// Log-probs of every size and sign, and what is none.
    fn numbers() -> Vec<f32> {
        let mut numbers: Vec<f32> = (0..1 << 16)
            .map(|i: u32| f32::from_bits(i << 16 | i.wrapping_mul(40503) & 0xffff))
            .collect();
        numbers.extend((0..1 << 16).map(|i| -(i as f32) * 1e-3));
        numbers
    }

    #[test]
    fn every_kind_of_vector_gives_the_bits_of_the_scalar_table_and_of_each_other() {
        let numbers = numbers();
        for (spec, delta) in [("kl", 0.05), ("reverse-kl", 0.3), ("tv", 0.1), ("jeffreys", 1e-4)] {
            let band = Band::new(Divergence::parse(spec).unwrap(), delta, delta).unwrap();
            let table = BandTable::of_band(&band).unwrap();
            let kinds = kinds(&numbers, table.image());
            for (name, found) in &kinds {
                assert_eq!(found.len(), numbers.len());
                for ((&x, found), portable) in numbers.iter().zip(found).zip(&kinds[0].1) {
                    let y = Image::y(x);
                    let scalar = [table.image().log_upper(y), table.image().lower(y)];
                    for (vector, scalar) in found[2..].iter().zip(scalar) {
                        let vector = f32::from_bits(*vector);
                        assert!(
                            vector == scalar || x.is_nan(),
                            "{spec} {name} {x:e}: {vector:e} {scalar:e}"
                        );
                    }
                    if !x.is_nan() {
                        assert_eq!(found[..2], portable[..2], "{name} {x:e}");
                    }
                }
            }
        }
    }

    /// No token within its reach may be beyond its bound, whatever the table.
    struct Reaches<'a> {
        logp: &'a [f32],
        image: Image<'a>,
    }

    impl Work<f32> for Reaches<'_> {
        /// How many tokens have a reach that is not 0, of each side.
        type Output = [usize; 2];

        fn run<L: Lanes<Scalar = f32>>(self, lanes: L) -> [usize; 2] {
            let mut useful = [0; 2];
            for part in
                self.logp.chunks_exact(MOST_LANES).flat_map(|part| part.chunks_exact(L::COUNT))
            {
                let logp = lanes.load(part);
                for (side, lower) in [lanes.less(logp, logp), lanes.less_or_equal(logp, logp)]
                    .into_iter()
                    .enumerate()
                {
                    let (mut reach, mut bound, mut ratio) =
                        ([0.0; MOST_LANES], [0.0; MOST_LANES], [0.0; MOST_LANES]);
                    let reached = lanes.reach(self.image, logp, lower);
                    lanes.store(reached, &mut reach);
                    lanes.store(lanes.look_up(self.image, logp, lower), &mut bound);
                    let within = lanes.at_most(20.0, lanes.at_least(-20.0, reached));
                    lanes.store(lanes.exponentials(within).exp, &mut ratio);
                    for lane in 0..L::COUNT {
                        let (logp, reach) = (part[lane], reach[lane]);
                        let holds = if side == 0 {
                            (0.0..=bound[lane]).contains(&reach.min(20.0))
                        } else {
                            reach <= 0.0 && (reach <= -20.0 || ratio[lane] >= bound[lane])
                        };
                        assert!(holds, "side {side} logp {logp:e} {reach:e} {:e}", bound[lane]);
                        useful[side] += usize::from(reach != 0.0);
                    }
                }
            }
            useful
        }
    }

    #[test]
    fn what_is_within_reach_is_within_bounds() {
        let logp: Vec<f32> = numbers().into_iter().filter(|logp| *logp <= 0.0).collect();
        for delta in [1e-4, 0.05, 1.0] {
            for spec in ["kl", "reverse-kl", "tv", "jeffreys", "hockey-stick:1.2", "renyi:3.5"] {
                let band = Band::new(Divergence::parse(spec).unwrap(), delta, delta).unwrap();
                let table = BandTable::of_band(&band).unwrap();
                let work = || Reaches { logp: &logp, image: table.image() };
                let useful = work().run(Portable);
                assert!(useful[0] > logp.len() / 2 && useful[1] > 0, "{spec} {useful:?}");
                #[cfg(target_arch = "x86_64")]
                {
                    if let Some(lanes) = crate::simd::avx2::Avx2::new() {
                        assert_eq!(lanes.run(work()), useful);
                    }
                    if let Some(lanes) = crate::simd::avx512::Avx512::new() {
                        assert_eq!(lanes.run(work()), useful);
                    }
                }
            }
        }
    }

    /// Packs and spreads the lanes of every mask of eight neighbours.
    struct Packed;

    impl Work<f32> for Packed {
        type Output = ();

        fn run<L: Lanes<Scalar = f32>>(self, lanes: L) {
            for pattern in 0..256_u32 {
                let bytes: [u8; MOST_LANES] =
                    std::array::from_fn(|lane| (pattern >> (lane % 8) & 1) as u8 * 3);
                let numbers: [f32; MOST_LANES] = std::array::from_fn(|lane| 1.0 + lane as f32);
                let mask = lanes.load_mask(&bytes);
                assert_eq!(lanes.bits(lanes.mask_of(lanes.bits(mask))), lanes.bits(mask));
                let chosen: Vec<f32> = (0..L::COUNT)
                    .filter(|&lane| bytes[lane] > 0)
                    .map(|lane| numbers[lane])
                    .collect();
                let mut packed = [-1.0; MOST_LANES];
                lanes.compress(mask, lanes.load(&numbers), &mut packed);
                assert_eq!(packed[..chosen.len()], chosen[..], "{pattern:b}");
                let mut spread = [-1.0; MOST_LANES];
                lanes.store(lanes.expand(mask, &packed), &mut spread);
                for lane in 0..L::COUNT {
                    let expected = if bytes[lane] > 0 { numbers[lane] } else { 0.0 };
                    assert_eq!(spread[lane], expected, "{pattern:b} {lane}");
                }
            }
        }
    }

    #[test]
    fn every_kind_of_vector_packs_and_spreads_what_a_mask_says() {
        Packed.run(Portable);
        #[cfg(target_arch = "x86_64")]
        {
            if let Some(lanes) = crate::simd::avx2::Avx2::new() {
                lanes.run(Packed);
            }
            if let Some(lanes) = crate::simd::avx512::Avx512::new() {
                lanes.run(Packed);
            }
        }
    }

    /// What docs/numerics.md states.
    #[test]
    fn exponentials_are_as_good_as_they_say() {
        let x: Vec<f32> =
            (0..1 << 20).map(|i| (i - (1 << 19)) as f32 * (20.0 / (1 << 19) as f32)).collect();
        let small: Vec<f32> = (0..1 << 16)
            .flat_map(|i| [1.0, -1.0].map(|s| s * f32::from_bits((70 << 23) + (i << 12))))
            .collect();
        let band = Band::new(Divergence::parse("kl").unwrap(), 0.05, 0.05).unwrap();
        let table = BandTable::of_band(&band).unwrap();
        let (mut worst_exp, mut worst_excess) = (0.0_f64, 0.0_f64);
        for x in [x, small] {
            for (&x, found) in x.iter().zip(Each { x: &x, image: table.image() }.run(Portable)) {
                if x.abs() >= 20.0 {
                    continue;
                }
                let [exp, excess] =
                    [found[0], found[1]].map(|bits| f64::from(f32::from_bits(bits)));
                let exact = Double.exponentials(f64::from(x));
                let ulp = f64::from((exact.exp as f32).next_up()) - f64::from(exact.exp as f32);
                worst_exp = worst_exp.max((exp - exact.exp).abs() / ulp);
                // Below 2^-126 float32 has no digits left.
                if exact.excess > f64::from(f32::MIN_POSITIVE) {
                    worst_excess = worst_excess.max((excess - exact.excess).abs() / exact.excess);
                }
            }
        }
        assert!(worst_exp <= 1.2, "{worst_exp}");
        assert!(worst_excess <= 1e-6, "{worst_excess}");
    }
}
