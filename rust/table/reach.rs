//! Reaches: how far a ratio can be from 1 without being beyond its bound.
//!
//! A token within its reach needs no lookup. Each side has one reach for each of [`REACH_RANGES`].

use crate::LOG_RATIO_LIMIT;
use crate::image::{
    AT_FAR, AT_ZERO, Entry, FAR, Image, LOWER, MANTISSA, MANTISSA_BITS, MAX_BITS, MAX_PIECES,
    MIN_BITS, ORIGIN, REACH_RANGES, SCALE, START, UPPER,
};

/// Number of ranges.
const RANGES: usize = REACH_RANGES.len();

/// Relative margin: much more than the rounding of a cubic in float32 and of an exponential.
const SLACK: f64 = 1e-6;

/// A cell of an image and the range of its polynomial.
struct Cell {
    /// First `z` that takes the cell.
    left: f64,
    /// First `z` beyond the cell.
    right: f64,
    min: f64,
    max: f64,
}

/// The reaches of both sides, `log_upper` first: in each range, `log_upper` is at least its reach times `y`,
/// and `ln lower` is at most its reach.
pub(super) fn reaches(image: Image<'_>) -> [f32; 2 * RANGES] {
    let (mut min_share, mut max_lower) = ([1.0_f64; RANGES], [0.0_f64; RANGES]);
    for lane in image.pieces() {
        let (origin, scale) =
            (f64::from(image.float(ORIGIN + lane)), f64::from(image.float(SCALE + lane)));
        let (start, end) = (f64::from(image.float(START + lane)), f64::from(image.end(lane)));
        for Cell { left, right, min, max } in cells(image, lane) {
            let slack = SLACK * max.abs().max(min.abs());
            // Both sides of the origin take the cell.
            for direction in [1.0, -1.0] {
                let y = |z: f64| origin + direction * z / scale;
                let (low, high) = (y(left).min(y(right)), y(left).max(y(right)));
                for range in 0..RANGES {
                    let range_end = REACH_RANGES.get(range + 1).map_or(FAR, |&end| f64::from(end));
                    let low = low.max(start).max(f64::from(REACH_RANGES[range]));
                    let high = high.min(end).min(range_end);
                    if low > high || high == 0.0 {
                        continue;
                    }
                    if lane / MAX_PIECES == UPPER {
                        min_share[range] = min_share[range].min((min - slack) / high);
                    } else {
                        max_lower[range] = max_lower[range].max(max + slack);
                    }
                }
            }
        }
    }
    let (first, last) = (0, RANGES - 1);
    // From `FAR` on the bound is constant while `y` grows, but log-ratios are clamped.
    if f64::from(image.float(AT_FAR + UPPER)) < LOG_RATIO_LIMIT {
        min_share[last] = 0.0;
    }
    max_lower[first] = max_lower[first].max(f64::from(image.float(AT_ZERO + LOWER)));
    max_lower[last] = max_lower[last].max(f64::from(image.float(AT_FAR + LOWER)));
    std::array::from_fn(|index| {
        if index < RANGES {
            return ((1.0 - SLACK) * min_share[index].max(0.0)) as f32;
        }
        let log = max_lower[index - RANGES].ln();
        if log.is_finite() { (log + SLACK * (1.0 + log.abs())).min(0.0) as f32 } else { log as f32 }
    })
}

/// The cells of a piece that a lookup can take.
fn cells(image: Image<'_>, lane: usize) -> impl Iterator<Item = Cell> {
    let words = image.words();
    let (min_bits, max_bits) = (words[MIN_BITS + lane], words[MAX_BITS + lane]);
    image.exponents(lane).flat_map(move |exponent| {
        let Entry { node, halvings } = image.entry(lane, exponent);
        let size = 1 << (MANTISSA_BITS - halvings);
        let width = f64::from(f32::from_bits((exponent - halvings) << MANTISSA_BITS));
        let first = min_bits.max(exponent << MANTISSA_BITS) / size * size;
        let last = max_bits.min(exponent << MANTISSA_BITS | MANTISSA);
        (first..=last).step_by(size as usize).map(move |bits| {
            // The first and the last cell also take what lies outside the grid.
            let left = if bits <= min_bits { 0.0 } else { f64::from(f32::from_bits(bits)) };
            let right = if bits + size > max_bits {
                f64::INFINITY
            } else {
                f64::from(f32::from_bits(bits + size))
            };
            let cell = 2 * (node + ((bits & MANTISSA) / size) as usize);
            let value = |at: usize| f64::from(image.float(cell + at));
            let (v0, v1) = (value(0), value(2));
            // A cubic lies between its control points.
            let (c0, c1) = (v0 + width * value(1) / 3.0, v1 - width * value(3) / 3.0);
            Cell { left, right, min: v0.min(v1).min(c0).min(c1), max: v0.max(v1).max(c0).max(c1) }
        })
    })
}
