//! The error of an image against exact bounds.

use std::ops::Range;

use rayon::prelude::*;

use super::curve::Exact;
use crate::LOG_RATIO_LIMIT;
use crate::error::Result;
use crate::image::{FAR, Image, LOWER, MANTISSA_BITS, ORIGIN, SCALE, START, UPPER};

/// Tokens a thread takes at a time.
const MIN_PART: usize = 1024;

/// Max errors of a table, less one float32 ulp of the bound, where the log bound is within ±20.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct MaxError {
    /// Absolute error of `log_upper`.
    pub log_upper: f64,
    /// Absolute error of `lower`, the ratio.
    pub lower: f64,
}

impl MaxError {
    pub(super) fn merge(self, other: Self) -> Self {
        Self { log_upper: self.log_upper.max(other.log_upper), lower: self.lower.max(other.lower) }
    }
}

/// The floats numbered `indices` of `count` that are evenly spaced by their bits over `[0, max]`.
pub(super) fn evenly_spaced(indices: Range<u64>, count: u64, max: f32) -> Vec<f32> {
    let last = u128::from(max.to_bits());
    let float = |index: u64| {
        let bits = u128::from(index) * last / u128::from(count.max(2) - 1);
        f32::from_bits(bits as u32)
    };
    indices.map(float).collect()
}

/// So many `y` in each cell of an image, and both ends of each piece.
pub(super) fn in_each_cell(image: Image<'_>, count: u32) -> Vec<f32> {
    let mut ys = vec![0.0, f32::from_bits(1), (FAR as f32).next_down()];
    for lane in image.pieces() {
        let start = image.float(START + lane);
        let last = image.end(lane).next_down();
        ys.extend([start, start.next_up(), last]);
        let origin = f64::from(image.float(ORIGIN + lane));
        let scale = f64::from(image.float(SCALE + lane));
        for exponent in image.exponents(lane) {
            let bottom = f64::from(f32::from_bits(exponent << MANTISSA_BITS));
            let places = count << image.entry(lane, exponent).halvings;
            for place in 0..places {
                // Not at the middle of a cell, where the build has measured the error.
                let share = (f64::from(place) + 0.5) / f64::from(places);
                let distance = bottom * (1.0 + share) / scale;
                let y =
                    if origin > f64::from(start) { origin - distance } else { origin + distance };
                if (f64::from(start)..=f64::from(last)).contains(&y) {
                    ys.push(y as f32);
                }
            }
        }
    }
    ys
}

/// Max errors of both sides at each `y`.
pub(super) fn errors_at(image: Image<'_>, ys: &[f32], exact: &Exact<'_>) -> Result<MaxError> {
    let logp: Vec<f64> = ys.iter().map(|&y| -f64::from(y)).collect();
    let (log_lower, log_upper) = exact(&logp)?;
    Ok(ys
        .par_iter()
        .with_min_len(MIN_PART)
        .zip(&log_lower)
        .zip(&log_upper)
        .map(|((&y, &log_lower), &log_upper)| {
            let upper = error_of_side(image, UPPER, y, log_upper);
            upper.merge(error_of_side(image, LOWER, y, log_lower.exp()))
        })
        .reduce(MaxError::default, MaxError::merge))
}

/// Max error of one side at each `y`, given with its exact value.
pub(super) fn errors_of_side(image: Image<'_>, side: usize, exact: &[(f32, f64)]) -> MaxError {
    exact
        .par_iter()
        .with_min_len(MIN_PART)
        .map(|&(y, value)| error_of_side(image, side, y, value))
        .reduce(MaxError::default, MaxError::merge)
}

/// The error of `log_upper` or `lower` at `y`.
fn error_of_side(image: Image<'_>, side: usize, y: f32, exact: f64) -> MaxError {
    if side == LOWER {
        return MaxError { log_upper: 0.0, lower: beyond_one_ulp(image.lower(y), exact) };
    }
    // A table stays in the simplex even if its region does not.
    let log_upper = if exact > f64::from(y) { f64::from(y) } else { exact };
    let actual = image.log_upper(y);
    let error = if log_upper <= LOG_RATIO_LIMIT {
        beyond_one_ulp(actual, log_upper)
    } else if actual >= LOG_RATIO_LIMIT as f32 {
        0.0 // the loss clamps both to the same log-ratio
    } else {
        beyond_one_ulp(actual, LOG_RATIO_LIMIT)
    };
    MaxError { log_upper: error, lower: 0.0 }
}

/// The error of a value, less one float32 ulp. It is infinite if the value is NaN.
fn beyond_one_ulp(actual: f32, exact: f64) -> f64 {
    let bound = exact.abs() as f32;
    let ulp = f64::from(bound.next_up()) - f64::from(bound);
    let error = (f64::from(actual) - exact).abs() - ulp;
    if error.is_nan() { f64::INFINITY } else { error.max(0.0) }
}
