//! Reaches: how far a ratio can be from 1 without being beyond its bound.
//!
//! A token within its reach needs no lookup. Each side has one reach for each of [`REACH_RANGES`]. [`near`] is a curve
//! for both sides at once.

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
    /// Slope of the polynomial, if that is a line through the origin and exact in float32.
    line: Option<f64>,
}

/// The reaches of both sides, `log_upper` first: in each range, `log_upper` is at least its reach times `y`,
/// and `ln lower` is at most its reach.
pub(super) fn reaches(image: Image<'_>) -> [f32; 2 * RANGES] {
    let (mut min_share, mut max_lower) = ([1.0_f64; RANGES], [0.0_f64; RANGES]);
    for lane in image.pieces() {
        let (origin, scale) =
            (f64::from(image.float(ORIGIN + lane)), f64::from(image.float(SCALE + lane)));
        let (start, end) = (f64::from(image.float(START + lane)), f64::from(image.end(lane)));
        for Cell { left, right, min, max, .. } in cells(image, lane) {
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

/// Log-ratios of up to this size are near: a little less than `ln(2) / 2`, up to which an exponential needs no power
/// of 2.
const MAX_NEAR: f64 = 0.3465;
/// `y` from which the curve of [`near`] is constant.
const NEAR_END: f64 = 1.5;
/// Half of the distance from 1 to the float below. The exponential of a log-ratio of up to this size is 1 in float32.
const HALF_ULP: f64 = 1.0 / 33_554_432.0;
/// Choices of the curvature.
const BENDS: u32 = 20;

/// Values of a side over a range of `y`.
struct Stretch {
    side: usize,
    low: f64,
    high: f64,
    min: f64,
    max: f64,
    /// True if the value is `y` itself, to the bit, or above it.
    is_y: bool,
}

impl Stretch {
    /// A log-ratio of either sign and up to this size is inside the bound.
    fn room(&self) -> f64 {
        if self.side == UPPER {
            let slack = SLACK * self.max.abs().max(self.min.abs());
            return if slack.is_finite() { self.min - slack } else { self.min };
        }
        let log = (self.max * (1.0 + SLACK)).ln();
        let room = if log.is_finite() { -log - SLACK * (1.0 + log.abs()) } else { -log };
        // Between two nodes that are 1 a control point may be above 1 by less than a lookup sees.
        if self.max <= 1.0 + 0.5 * HALF_ULP { room.max(0.99 * HALF_ULP) } else { 0.0 }
    }
}

/// Slope, bend, floor and end of saturation. With `c = min(y, 1.5)`, a log-ratio of up to `c (slope - bend c)` on either
/// side is near and inside both bounds. So is one from `-floor` to `y`, for `y` below the end.
pub(super) fn near(image: Image<'_>) -> [f32; 4] {
    let mut stretches = stretches(image);
    let ends = |first: usize, low: f64, high: f64| {
        [UPPER, LOWER].map(|side| {
            let value = f64::from(image.float(first + side));
            Stretch { side, low, high, min: value, max: value, is_y: false }
        })
    };
    stretches.extend(ends(AT_FAR, FAR, f64::INFINITY));
    let (slope, bend) = curve(&stretches);
    let not_y = stretches.iter().filter(|stretch| stretch.side == UPPER && !stretch.is_y);
    let saturated = not_y.map(|stretch| stretch.low).fold(MAX_NEAR, f64::min);
    stretches.extend(ends(AT_ZERO, 0.0, 0.0));
    let next_to_zero =
        stretches.iter().filter(|stretch| stretch.side == LOWER && stretch.low < saturated);
    let floor = next_to_zero.map(Stretch::room).fold(MAX_NEAR, f64::min);
    let shorter = 1.0 - SLACK;
    // Whole floats below the end are left out, otherwise its rounding could include one beyond.
    [
        (shorter * slope) as f32,
        bend as f32,
        if floor > 2.0 * HALF_ULP && saturated > 0.0 { (shorter * floor) as f32 } else { 0.0 },
        (shorter * saturated) as f32,
    ]
}

/// Slope and bend of the curve that is highest beside `1 - e^-y`, by which steps of a logit move a log-prob, on average
/// over octaves of `y`.
fn curve(stretches: &[Stretch]) -> (f64, f64) {
    let mut best = (0.0, 0.0, 0.0);
    for share in 0..=BENDS {
        let bend = f64::from(share) / f64::from(2 * BENDS) / NEAR_END;
        let shape = |y: f64| y.min(NEAR_END) * (1.0 - bend * y.min(NEAR_END));
        let limits = stretches.iter().filter(|stretch| stretch.high > 0.0);
        let slope = limits
            .map(|stretch| stretch.room().max(0.0) / shape(stretch.high))
            .fold((MAX_NEAR / shape(NEAR_END)).min(1.0 - SLACK), f64::min);
        let height = (-40..=12)
            .map(|k| f64::from(k) / 4.0)
            .map(f64::exp2)
            .map(|y| slope * shape(y) / -(-y).exp_m1())
            .sum::<f64>();
        if height > best.0 {
            best = (height, slope, slope * bend);
        }
    }
    (best.1, best.2)
}

/// All cells, over the `y` of their pieces.
fn stretches(image: Image<'_>) -> Vec<Stretch> {
    let mut found = Vec::new();
    for lane in image.pieces() {
        let (origin, scale) =
            (f64::from(image.float(ORIGIN + lane)), f64::from(image.float(SCALE + lane)));
        let (start, end) = (f64::from(image.float(START + lane)), f64::from(image.end(lane)));
        let side = lane / MAX_PIECES;
        for Cell { left, right, min, max, line } in cells(image, lane) {
            // Both sides of the origin take the cell.
            for direction in [1.0, -1.0] {
                let y = |z: f64| origin + direction * z / scale;
                let low = y(left).min(y(right)).max(start);
                let high = y(left).max(y(right)).min(end);
                if low > high || high == 0.0 {
                    continue;
                }
                let above_y = min - SLACK * min.abs() >= high;
                let is_y = above_y || (line == Some(1.0 / scale) && origin == 0.0);
                found.push(Stretch { side, low, high, min, max, is_y });
            }
        }
    }
    found
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
            let (z0, slope) = (f64::from(f32::from_bits(bits)), value(1));
            // A slope that is a power of 2 makes every operation of the lookup exact.
            let is_exact = slope > 0.0 && (slope as f32).to_bits() & MANTISSA == 0;
            let is_line = value(3) == slope && v0 == slope * z0 && v1 == slope * (z0 + width);
            Cell {
                left,
                right,
                min: v0.min(v1).min(c0).min(c1),
                max: v0.max(v1).max(c0).max(c1),
                line: (is_exact && is_line).then_some(slope),
            }
        })
    })
}
