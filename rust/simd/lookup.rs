//! A table's lookup on vectors of float32.

// A function of vectors has to become part of one that is compiled for their instructions.
#![allow(clippy::inline_always)]

use crate::image::{
    AT_FAR, AT_ZERO, ENDS, ENTRY_BASE, FAR, FIRST_REACH_RANGE, HALVINGS_BITS, HALVINGS_MASK, Image,
    LOWER_REACH, MANTISSA, MANTISSA_BITS, MAX_BITS, MAX_PIECES, MIN_BITS, ONE, ORIGIN,
    REACH_RANGES, SCALE, START, UPPER_REACH,
};
use crate::simd::lanes::{FloatBits, Lanes};

/// The bits of infinity.
const INFINITY: u32 = 0x7f80_0000;

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
