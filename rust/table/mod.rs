//! The band as a lookup table: one dimension, indexed straight from the bits of a float.
//!
//! # Where it gets its accuracy from
//!
//! A bound of size 8 to 16 has an ulp of 1e-6 itself, so a lookup may round once or twice and no more.
//! The distance from the origin is therefore exact: pieces are graded from 0 (any `y` is its own
//! distance), or, next to a saturation point, reach no further from it than a factor 2, where
//! subtraction is exact; scales are powers of two; the fraction is cut out of the bits.
//!
//! Bounds are smooth between *kinks*: where curves meet, where they saturate, and where a generator
//! has a kink. A piece ends at each, and the cells that such an end cuts interpolate between the end
//! and their inner node, so that a node beyond the end is an extrapolation and no cell sees both sides
//! of a kink. Kinks that nobody announced show as an octave whose error does not fall under halving.
//!
//! Grading by octaves follows the bounds where they bend: towards `p = 1` and towards saturation.
//! How finely each octave is divided is found by halving cells until the cubic meets the target, so
//! kinks of the second derivative, steep stretches and flat ones all get what they need and no more.

mod curve;
mod file;
mod grid;
mod plan;
mod reach;
#[cfg(test)]
mod tests;
mod verify;
mod write;

use rayon::prelude::*;

pub use self::curve::{Curve, Exact, Sampler, Stretches};
use self::grid::TARGET;
use self::plan::SidePlan;
pub use self::verify::{MaxError, Verification};
use self::write::image;
use crate::band::{Band, Side};
use crate::error::Result;
pub use crate::image::Image;
use crate::image::MAX_BYTES;

/// The bounds of a region that does not depend on anything but logp, tabulated.
#[derive(Debug, Clone, PartialEq)]
pub struct BandTable {
    words: Vec<u32>,
    /// What was tabulated, as JSON.
    region: String,
    max_error: MaxError,
    verification: Verification,
}

impl BandTable {
    /// Tabulates a band.
    ///
    /// # Errors
    /// None that a band can cause.
    pub fn of_band(band: &Band) -> Result<Self> {
        let region = serde_json::json!({"band": {
            "divergence": band.divergence().spec(),
            "delta": [band.delta(Side::Lower), band.delta(Side::Upper)],
        }});
        let whole = || vec![(0.0, Curve::Band(band))];
        Self::build(&whole(), &whole(), region.to_string(), &|logp| {
            Ok(band.log_bounds_of_many(logp))
        })
    }

    /// Tabulates a region that is made of curves; `exact` is what its error is measured against, and
    /// `region` describes it, as JSON.
    ///
    /// # Errors
    /// [`Error::Argument`](crate::error::Error::Argument) if a side needs more pieces than a table has, and what the curves raise.
    pub fn build(
        lower: &Stretches<'_>,
        upper: &Stretches<'_>,
        region: String,
        exact: &Exact<'_>,
    ) -> Result<Self> {
        let sides = [
            SidePlan::sampled(Side::Upper, upper, exact)?,
            SidePlan::sampled(Side::Lower, lower, exact)?,
        ];
        let mut tolerance = TARGET;
        let words = loop {
            let words = image(&sides, tolerance);
            if 4 * words.len() <= MAX_BYTES {
                break words;
            }
            tolerance *= 1.5;
        };
        let mut table = Self {
            words,
            region,
            max_error: MaxError::default(),
            verification: Verification::Sampled,
        };
        table.max_error = table.errors_in_cells(2, exact)?;
        for (side, plan) in sides.iter().enumerate() {
            let known = plan.known_values(tolerance);
            let found = known
                .par_iter()
                .with_min_len(1024)
                .map(|&(y, value)| table.error_of_side(side, y, value))
                .reduce(MaxError::default, MaxError::merge);
            table.max_error = table.max_error.merge(found);
        }
        Ok(table)
    }

    /// What bounds are looked up in.
    #[must_use]
    pub fn image(&self) -> Image<'_> {
        Image(&self.words)
    }

    /// `(log_lower, log_upper)`; `logp` above 0 is read as 0.
    #[must_use]
    pub fn log_bounds(&self, logp: f64) -> (f64, f64) {
        let y = Image::y(logp as f32);
        (f64::from(self.image().lower(y)).ln(), f64::from(self.image().log_upper(y)))
    }

    /// The image that every backend reads.
    #[must_use]
    pub fn words(&self) -> &[u32] {
        &self.words
    }

    /// Size of the image.
    #[must_use]
    pub fn nbytes(&self) -> usize {
        4 * self.words.len()
    }

    /// What was tabulated, as JSON.
    #[must_use]
    pub fn region(&self) -> &str {
        &self.region
    }

    /// Largest error found so far by build or verification.
    #[must_use]
    pub fn max_error(&self) -> MaxError {
        self.max_error
    }

    /// How [`Self::max_error`] was found.
    #[must_use]
    pub fn verification(&self) -> Verification {
        self.verification
    }
}
