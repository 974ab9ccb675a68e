//! How far a ratio may be from 1 and yet surely not reach its bound.

use crate::LOG_RATIO_LIMIT;
use crate::image::{
    AT_FAR, AT_ZERO, ENTRY_BASE, FAR, Image, MANTISSA, MAX_BITS, MAX_PIECES, MIN_BITS, ORIGIN,
    REACH_RANGES, ROW, SCALE, START,
};

/// How far a ratio may be from 1 and yet surely not reach its bound: `log_upper` is at least `y` times the
/// first four, `ln lower` at most the other four. So most bounds need not be looked up.
pub(super) fn reaches(image: Image<'_>) -> [f32; 8] {
    /// Far more than what float32 makes of a cubic, as a part of its coefficients, and of an exponential.
    const SLACK: f64 = 1e-6;
    let words = image.words();
    let float = |at: usize| f64::from(f32::from_bits(words[at]));
    let (mut shares, mut greatest) = ([1.0_f64; 4], [0.0_f64; 4]);
    for lane in 0..ROW {
        let (start, side) = (float(START + lane), lane / MAX_PIECES);
        if start == f64::INFINITY {
            continue;
        }
        let next = if lane % MAX_PIECES + 1 == MAX_PIECES {
            FAR
        } else {
            float(START + lane + 1).min(FAR)
        };
        let (lowest, highest) = (words[MIN_BITS + lane], words[MAX_BITS + lane]);
        for exponent in lowest >> 23..=highest >> 23 {
            let entry = words[words[ENTRY_BASE + lane].wrapping_add(exponent) as usize];
            let (node, halvings) = ((entry >> 4) as usize, entry & 15);
            let size = 1 << (23 - halvings);
            // What lies outside the grid takes the cell that is next to it.
            let mut bits = lowest.max(exponent << 23) / size * size;
            while bits <= highest && bits >> 23 == exponent {
                let left = if bits <= lowest { 0.0 } else { f64::from(f32::from_bits(bits)) };
                let right = if bits + size > highest {
                    f64::INFINITY
                } else {
                    f64::from(f32::from_bits(bits + size))
                };
                let cell = 2 * (node + ((bits & MANTISSA) / size) as usize);
                let width = f64::from(f32::from_bits((exponent - halvings) << 23));
                let (v0, v1) = (float(cell), float(cell + 2));
                // Between the control points lies the cubic.
                let (c0, c1) =
                    (v0 + width * float(cell + 1) / 3.0, v1 - width * float(cell + 3) / 3.0);
                let least = v0.min(v1).min(c0).min(c1);
                let most = v0.max(v1).max(c0).max(c1);
                let slack = SLACK * most.abs().max(least.abs());
                for direction in [1.0, -1.0] {
                    let y = |z: f64| float(ORIGIN + lane) + direction * z / float(SCALE + lane);
                    let (low, high) = (y(left).min(y(right)), y(left).max(y(right)));
                    for band in 0..REACH_RANGES.len() {
                        let band_end =
                            REACH_RANGES.get(band + 1).map_or(FAR, |&end| f64::from(end));
                        let low = low.max(start).max(f64::from(REACH_RANGES[band]));
                        let high = high.min(next).min(band_end);
                        if low > high || high == 0.0 {
                            continue;
                        }
                        if side == 0 {
                            shares[band] = shares[band].min((least - slack) / high);
                        } else {
                            greatest[band] = greatest[band].max(most + slack);
                        }
                    }
                }
                bits += size;
            }
        }
    }
    // From `FAR` on the bound is the same, for any y; but log-ratios are not, beyond a limit.
    if float(AT_FAR) < LOG_RATIO_LIMIT {
        shares[3] = 0.0;
    }
    greatest[0] = greatest[0].max(float(AT_ZERO + 1));
    greatest[3] = greatest[3].max(float(AT_FAR + 1));
    std::array::from_fn(|index| {
        if index < 4 {
            ((1.0 - SLACK) * shares[index].max(0.0)) as f32
        } else {
            let log = greatest[index - 4].ln();
            if log.is_finite() {
                (log + SLACK * (1.0 + log.abs())).min(0.0) as f32
            } else {
                log as f32
            }
        }
    })
}
