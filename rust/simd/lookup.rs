//! Table lookup on vectors.

// A function of vectors has to become part of one that is compiled for their instructions.
#![allow(clippy::inline_always)]

use crate::image::{
    AT_FAR, AT_ZERO, ENDS, ENTRY_BASE, FAR, FIRST_REACH_RANGE, HALVINGS_BITS, HALVINGS_MASK, Image,
    LOWER_REACH, MANTISSA, MANTISSA_BITS, MAX_BITS, MAX_PIECES, MIN_BITS, ONE, ORIGIN,
    REACH_RANGES, SCALE, START, UPPER_REACH,
};
use crate::simd::lanes::{FloatBits, Lanes};
use crate::simd::wide::{LossDoubles, Wide};

/// Bits of infinity.
const INFINITY: u32 = f32::INFINITY.to_bits();

/// [`Image::y`] of a vector. NaN gives NaN, and -0 gives 0.
#[inline(always)]
fn minus_log_prob<L: Lanes>(lanes: L, old_log_prob: L::Float) -> L::Float {
    let zero = lanes.splat(0.0);
    lanes.select(lanes.less(zero, old_log_prob), zero, lanes.sub(zero, old_log_prob))
}

/// Vectors that a table is looked up in.
pub trait LookUp: Lanes {
    /// Safe distance of each token: a log-ratio between 0 and this is not beyond the tabulated bound.
    fn reach(self, image: Image<'_>, old_log_prob: Self::Float, lower: Self::Mask) -> Self::Float;
    /// The tabulated side of each token: `lower`, a ratio, where the mask is true, else `log_upper`. The result of a
    /// NaN is arbitrary, because no ratio is beyond its bound.
    fn look_up(self, image: Image<'_>, old_log_prob: Self::Float, lower: Self::Mask)
    -> Self::Float;
}

impl<L: FloatBits> LookUp for L {
    #[inline(always)]
    fn reach(self, image: Image<'_>, old_log_prob: Self::Float, lower: Self::Mask) -> Self::Float {
        let y = minus_log_prob(self, old_log_prob);
        let first_range = self.words(FIRST_REACH_RANGE);
        let last_range = self.words(FIRST_REACH_RANGE + REACH_RANGES.len() as u32 - 1);
        let high_bits = self.shift_right(self.as_words(y), self.words(24));
        let range = self.min_words(self.max_words(high_bits, first_range), last_range);
        let first = self.select_words(
            lower,
            self.words((LOWER_REACH - ENDS) as u32),
            self.words((UPPER_REACH - ENDS) as u32),
        );
        let index = self.add_words(self.sub_words(range, first_range), first);
        let limit = self.as_floats(self.pick(image.row(ENDS), index, lower));
        // From here on a bound is the same. Without the limit, that of an infinite y would seem infinite.
        let nearer = self.clamp_max(FAR, y);
        self.select(lower, limit, self.mul(limit, nearer))
    }

    /// Has the steps of [`Image::log_upper`] and [`Image::lower`], in the same order.
    #[inline(always)]
    fn look_up(
        self,
        image: Image<'_>,
        old_log_prob: Self::Float,
        lower: Self::Mask,
    ) -> Self::Float {
        let zero = self.splat(0.0);
        let words = image.words();
        let y = minus_log_prob(self, old_log_prob);
        let starts = image.row(START);
        let mut index = self.select_words(lower, self.words(MAX_PIECES as u32), self.words(0));
        for k in 1..MAX_PIECES {
            if starts[k].min(starts[MAX_PIECES + k]) == INFINITY {
                break; // neither side has more pieces
            }
            let start =
                self.select_words(lower, self.words(starts[MAX_PIECES + k]), self.words(starts[k]));
            let reached = self.less_or_equal(self.as_floats(start), y);
            index = self.add_words(index, self.select_words(reached, self.words(1), self.words(0)));
        }
        let origin = self.pick(image.row(ORIGIN), index, lower);
        let scale = self.pick(image.row(SCALE), index, lower);
        let base = self.pick(image.row(ENTRY_BASE), index, lower);
        let min_bits = self.pick(image.row(MIN_BITS), index, lower);
        let max_bits = self.pick(image.row(MAX_BITS), index, lower);
        let distance = self.abs(self.sub(y, self.as_floats(origin)));
        let z = self.as_words(self.mul(distance, self.as_floats(scale)));
        // NaN has bits above all numbers, so that it is clamped into the grid as well.
        let bits = self.min_words(self.max_words(z, min_bits), max_bits);
        let exponent = self.shift_right(bits, self.words(MANTISSA_BITS));
        let (entry, halvings, cell);
        // SAFETY: an image is checked when it is made: bits in the grid of any piece lead to an entry inside the
        // image, and any entry with any mantissa to a cell inside it.
        unsafe {
            entry = self.gather(words, self.add_words(base, exponent));
            halvings = self.and_words(entry, self.words(HALVINGS_MASK));
            let mantissa = self.and_words(bits, self.words(MANTISSA));
            let fraction_bits = self.sub_words(self.words(MANTISSA_BITS), halvings);
            let node = self.add_words(
                self.shift_right(entry, self.words(HALVINGS_BITS)),
                self.shift_right(mantissa, fraction_bits),
            );
            cell = self.gather_four(words, self.add_words(node, node));
        }
        let [v0, s0, v1, s1] = cell;
        let mantissa = self.and_words(self.shift_left(bits, halvings), self.words(MANTISSA));
        let one_to_two = self.or_words(mantissa, self.words(ONE));
        let t = self.sub(self.as_floats(one_to_two), self.splat(1.0));
        let width = self.sub_words(exponent, halvings);
        let width = self.as_floats(self.shift_left(width, self.words(MANTISSA_BITS)));
        let (m0, m1) = (self.mul(s0, width), self.mul(s1, width));
        let rise = self.sub(v1, v0);
        let (two, three) = (self.splat(2.0), self.splat(3.0));
        let bend = self.sub(self.sub(self.mul(three, rise), self.mul(two, m0)), m1);
        let twist = self.sub(self.add(m0, m1), self.mul(two, rise));
        let mut value = self.add(bend, self.mul(t, twist));
        value = self.add(m0, self.mul(t, value));
        value = self.add(v0, self.mul(t, value));

        let ends = image.row(ENDS);
        let end = |first: usize| {
            let (upper_end, lower_end) = (self.words(ends[first]), self.words(ends[first + 1]));
            self.as_floats(self.select_words(lower, lower_end, upper_end))
        };
        let (at_zero, far) = (end(AT_ZERO - ENDS), end(AT_FAR - ENDS));
        value = self.select(self.less(zero, y), value, at_zero);
        value = self.select(self.less_or_equal(self.splat(FAR), y), far, value);
        // log_upper stays in [0, y], lower stays at least 0.
        let limit = self.select(lower, value, y);
        self.clamp_min(0.0, self.min(value, limit))
    }
}

/// The lookup in float32.
impl<D: LossDoubles> LookUp for Wide<D> {
    #[inline(always)]
    fn reach(self, image: Image<'_>, old_log_prob: D::Float, lower: D::Mask) -> D::Float {
        let (doubles, narrow) = (self.0, self.0.narrow());
        let narrow_lower = narrow.mask_of(self.bits(lower));
        let reach = narrow.reach(image, doubles.rounded(old_log_prob), narrow_lower);
        // The slack of a reach covers the rounding of y to a normal float32 alone.
        let tiny = self.less(self.abs(old_log_prob), self.splat(f64::from(f32::MIN_POSITIVE)));
        self.select(tiny, self.splat(0.0), doubles.widened(reach))
    }

    #[inline(always)]
    fn look_up(self, image: Image<'_>, old_log_prob: D::Float, lower: D::Mask) -> D::Float {
        let (doubles, narrow) = (self.0, self.0.narrow());
        let logp = doubles.rounded(old_log_prob);
        let found = narrow.look_up(image, logp, narrow.mask_of(self.bits(lower)));
        let (found, y) = (doubles.widened(found), minus_log_prob(narrow, logp));
        // y in float32 may be below -old_log_prob, which would forbid a new probability of 1.
        let at_end = self.less_or_equal(doubles.widened(y), found);
        let at_end = self.and(at_end, self.less_or_equal(old_log_prob, self.splat(0.0)));
        let end = self.sub(self.splat(0.0), old_log_prob);
        self.select(self.and_not(at_end, lower), end, found)
    }
}
