//! How far a table is off.

use rayon::prelude::*;

use super::BandTable;
use super::curve::Exact;
use crate::LOG_RATIO_LIMIT;
use crate::error::Result;
use crate::image::{ENTRY_BASE, FAR, MAX_BITS, MAX_PIECES, MIN_BITS, ORIGIN, ROW, SCALE, START};

/// Largest error found, beyond one float32 ulp of the bound, wherever the log bound is within +-20.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct MaxError {
    /// Of `log_upper`, absolute.
    pub log_upper: f64,
    /// Of `lower`, absolute.
    pub lower: f64,
}

impl MaxError {
    pub(super) fn merge(self, other: Self) -> Self {
        Self { log_upper: self.log_upper.max(other.log_upper), lower: self.lower.max(other.lower) }
    }
}

/// How [`BandTable::max_error`] was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verification {
    /// From samples in every cell.
    Sampled,
    /// From every float32 there is.
    Exhaustive,
}

impl BandTable {
    /// The greatest `-logp` that verification looks at: e^-104 is below the smallest float32.
    pub const GREATEST_CHECKED: f32 = 104.0;

    /// How many float32 there are in [0, 104].
    #[must_use]
    pub fn checkable() -> u64 {
        u64::from(Self::GREATEST_CHECKED.to_bits()) + 1
    }

    /// The largest error at the values number `from..to` out of `count` float32 values of `-logp`, evenly
    /// spaced in their bit patterns over [0, 104], both ends included.
    ///
    /// # Errors
    /// What `exact` raises.
    pub fn errors_between(
        &self,
        from: u64,
        to: u64,
        count: u64,
        exact: &Exact<'_>,
    ) -> Result<MaxError> {
        let last = u128::from(Self::checkable() - 1);
        let ys: Vec<f32> = (from..to)
            .map(|index| {
                let bits = u128::from(index) * last / u128::from(count.max(2) - 1);
                f32::from_bits(bits as u32)
            })
            .collect();
        self.errors_at(&ys, exact)
    }

    /// The same table with what a verification of `count` values found.
    #[must_use]
    pub fn verified(mut self, count: u64, found: MaxError) -> Self {
        self.max_error = found;
        self.verification = if count >= Self::checkable() {
            Verification::Exhaustive
        } else {
            Verification::Sampled
        };
        self
    }

    /// Floats in each cell that a verification by samples looks at.
    pub const SAMPLES_A_CELL: u32 = 16;

    /// The largest error at so many float32 values of `-logp` in every cell of the table, and at both ends
    /// of every piece.
    ///
    /// # Errors
    /// What `exact` raises.
    pub fn errors_in_cells(&self, samples: u32, exact: &Exact<'_>) -> Result<MaxError> {
        let float = |index: usize| f32::from_bits(self.words[index]);
        let mut ys = vec![0.0, f32::from_bits(1), (FAR as f32).next_down()];
        for lane in (0..ROW).filter(|lane| float(START + lane) < FAR as f32) {
            let start = float(START + lane);
            let next = if lane % MAX_PIECES == MAX_PIECES - 1 {
                FAR as f32
            } else {
                float(START + lane + 1)
            };
            let last = next.min(FAR as f32).next_down();
            ys.extend([start, start.next_up(), last]);
            let (origin, scale) = (f64::from(float(ORIGIN + lane)), f64::from(float(SCALE + lane)));
            let (lowest, highest) = (self.words[MIN_BITS + lane], self.words[MAX_BITS + lane]);
            for exponent in lowest >> 23..=highest >> 23 {
                let entry =
                    self.words[self.words[ENTRY_BASE + lane].wrapping_add(exponent) as usize];
                let bottom = f64::from(f32::from_bits(exponent << 23));
                let places = samples << (entry & 15);
                for place in 0..places {
                    // Off the middle of a cell, where its own error was measured.
                    let share = (f64::from(place) + 0.5) / f64::from(places);
                    let distance = bottom * (1.0 + share) / scale;
                    let y = if origin > f64::from(start) {
                        origin - distance
                    } else {
                        origin + distance
                    };
                    if (f64::from(start)..=f64::from(last)).contains(&y) {
                        ys.push(y as f32);
                    }
                }
            }
        }
        self.errors_at(&ys, exact)
    }

    pub(super) fn errors_at(&self, ys: &[f32], exact: &Exact<'_>) -> Result<MaxError> {
        let logp: Vec<f64> = ys.iter().map(|&y| -f64::from(y)).collect();
        let (log_lower, log_upper) = exact(&logp)?;
        Ok(ys
            .par_iter()
            .with_min_len(1024)
            .zip(&log_lower)
            .zip(&log_upper)
            .map(|((&y, &log_lower), &log_upper)| {
                self.error_of_side(0, y, log_upper).merge(self.error_of_side(1, y, log_lower.exp()))
            })
            .reduce(MaxError::default, MaxError::merge))
    }

    /// How far one side is off at `y`: `log_upper` (side 0) or `lower` (side 1).
    pub(super) fn error_of_side(&self, side: usize, y: f32, exact: f64) -> MaxError {
        let beyond_one_ulp = |actual: f32, exact: f64| {
            let bound = exact.abs() as f32;
            let ulp = f64::from(bound.next_up()) - f64::from(bound);
            let error = (f64::from(actual) - exact).abs() - ulp;
            // A NaN is an error without measure, not none.
            if error.is_nan() { f64::INFINITY } else { error.max(0.0) }
        };
        if side == 1 {
            return MaxError {
                log_upper: 0.0,
                lower: beyond_one_ulp(self.image().lower(y), exact),
            };
        }
        // A table keeps to the simplex, whether its region does or not.
        let log_upper = if exact > f64::from(y) { f64::from(y) } else { exact };
        let actual = self.image().log_upper(y);
        let error = if log_upper <= LOG_RATIO_LIMIT {
            beyond_one_ulp(actual, log_upper)
        } else if actual >= LOG_RATIO_LIMIT as f32 {
            0.0 // clamped in use
        } else {
            beyond_one_ulp(actual, LOG_RATIO_LIMIT)
        };
        MaxError { log_upper: error, lower: 0.0 }
    }
}
