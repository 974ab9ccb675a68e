//! Bounds as a lookup table over old log-probabilities, indexed by the bits of a float32.
//!
//! A table is built from the curves of `curve.rs`. `plan.rs` cuts each side into pieces and samples their
//! grids (`grid.rs`). `write.rs` lays them out as words, with the safe distances of `reach.rs`. `verify.rs`
//! measures the error, and `file.rs` stores a table. The layout and the lookup are in `image.rs`.
//!
//! # Accuracy
//!
//! A bound between 8 and 16 has an ulp of 1e-6, so a lookup can afford one or two roundings. The distance
//! from the origin is therefore exact. A piece is graded from 0, where `y` is the distance; or from a
//! saturation point at most a factor 2 away, where subtraction is exact. Scales are powers of two, and the
//! fraction of a cell is cut out of the bits.
//!
//! Bounds are smooth between *kinks*: where two curves meet, where one saturates, and where a generator has a
//! kink. A piece ends at each kink. A cell that is cut by the end of its piece interpolates its inner part
//! only: its outer node is extrapolated, so no cell mixes both sides of a kink. An unannounced kink shows
//! as an octave whose error falls too slowly when its cells are halved.
//!
//! Octaves are fine near an origin, where bounds bend: towards `p = 1` and towards saturation. Each octave's
//! cells are halved until the cubic meets the target.

mod curve;
mod file;
mod grid;
mod node;
mod octave;
mod plan;
mod reach;
#[cfg(test)]
mod tests;
mod verify;
mod write;

pub use self::curve::{Curve, Exact, Sampler, Solved, Stretches};
use self::octave::TARGET;
use self::plan::SidePlan;
pub use self::verify::MaxError;
use self::write::image_words;
use crate::band::{Band, Side};
use crate::error::Result;
pub use crate::image::Image;
use crate::image::MAX_BYTES;

/// Values at which [`BandTable::max_error`] was measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verification {
    /// Some float32 values.
    Sampled,
    /// Every float32.
    Exhaustive,
}

/// Tabulated bounds of a region. They depend on the old log-probability alone.
///
/// ```
/// use bandpo::band::Band;
/// use bandpo::divergence::Divergence;
/// use bandpo::table::BandTable;
///
/// let band = Band::new(Divergence::parse("kl")?, 0.05, 0.05)?;
/// let table = BandTable::of_band(&band)?;
/// assert!(table.max_error().log_upper < 1e-6);
///
/// let (log_lower, log_upper) = table.log_bounds(-3.0);
/// assert!((log_lower - band.log_bounds(-3.0).0).abs() < 1e-6);
/// assert!((log_upper - band.log_bounds(-3.0).1).abs() < 1e-6);
/// # Ok::<(), bandpo::error::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct BandTable {
    words: Vec<u32>,
    /// The tabulated region, as JSON.
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

    /// Tabulates a region that is made of curves.
    ///
    /// `region` describes it as JSON. `exact` returns its bounds, which the error is measured against.
    ///
    /// ```
    /// use bandpo::table::{BandTable, Curve};
    ///
    /// // Clip(0.2): 0.8 <= ratio <= 1.2 for every token.
    /// let lower = vec![(0.0, Curve::Constant(0.8))];
    /// let upper = vec![(0.0, Curve::Constant(1.2))];
    /// let exact = |logp: &[f64]| {
    ///     let upper = logp.iter().map(|logp| 1.2_f64.ln().min(-logp)).collect();
    ///     Ok((vec![0.8_f64.ln(); logp.len()], upper))
    /// };
    /// let region = r#"{"clip": ["0.2", "0.2"]}"#.to_owned();
    /// let table = BandTable::build(&lower, &upper, region, &exact)?;
    ///
    /// assert_eq!(table.image().log_upper(3.0), 1.2_f64.ln() as f32);
    /// assert_eq!(table.image().lower(3.0), 0.8);
    /// # Ok::<(), bandpo::error::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Argument`](crate::error::Error::Argument) if a side needs more pieces than a table has, and
    /// the errors of the curves and of `exact`.
    pub fn build(
        lower: &Stretches<'_>,
        upper: &Stretches<'_>,
        region: String,
        exact: &Exact<'_>,
    ) -> Result<Self> {
        let plans =
            [SidePlan::new(Side::Upper, upper, exact)?, SidePlan::new(Side::Lower, lower, exact)?];
        let mut tolerance = TARGET;
        let words = loop {
            let words = image_words(&plans, tolerance);
            if 4 * words.len() <= MAX_BYTES {
                break words;
            }
            tolerance *= 1.5;
        };
        let image = Image::trusted(&words);
        let mut max_error = verify::errors_at(image, &verify::in_each_cell(image, 2), exact)?;
        for (side, plan) in plans.iter().enumerate() {
            let known = plan.known_values(tolerance);
            max_error = max_error.merge(verify::errors_of_side(image, side, &known));
        }
        Ok(Self { words, region, max_error, verification: Verification::Sampled })
    }

    /// The words as an image that bounds are looked up in.
    #[must_use]
    pub fn image(&self) -> Image<'_> {
        Image::trusted(&self.words)
    }

    /// `(log_lower, log_upper)`. A `logp` above 0 counts as 0.
    #[must_use]
    pub fn log_bounds(&self, logp: f64) -> (f64, f64) {
        let y = Image::y(logp as f32);
        (f64::from(self.image().lower(y)).ln(), f64::from(self.image().log_upper(y)))
    }

    /// The words that every backend reads.
    #[must_use]
    pub fn words(&self) -> &[u32] {
        &self.words
    }

    /// Size of the words in bytes.
    #[must_use]
    pub fn nbytes(&self) -> usize {
        4 * self.words.len()
    }

    /// The tabulated region, as JSON.
    #[must_use]
    pub fn region(&self) -> &str {
        &self.region
    }

    /// Max errors found by the build or, if there was one, by the verification.
    #[must_use]
    pub fn max_error(&self) -> MaxError {
        self.max_error
    }

    /// Values at which [`Self::max_error`] was measured.
    #[must_use]
    pub fn verification(&self) -> Verification {
        self.verification
    }

    /// Max `-logp` that a verification covers, because e^-104 is below the smallest float32.
    pub const MAX_CHECKED: f32 = 104.0;

    /// Values of `-logp` that a sampled verification measures in each cell.
    pub const SAMPLES_A_CELL: u32 = 16;

    /// Number of float32 values in [0, 104].
    #[must_use]
    pub fn checkable() -> u64 {
        u64::from(Self::MAX_CHECKED.to_bits()) + 1
    }

    /// Max errors at the values numbered `from..to` of `count` float32 values of `-logp`, evenly spaced by
    /// their bits over [0, 104] with both ends included.
    ///
    /// # Errors
    /// The errors of `exact`.
    pub fn errors_between(
        &self,
        from: u64,
        to: u64,
        count: u64,
        exact: &Exact<'_>,
    ) -> Result<MaxError> {
        let ys = verify::evenly_spaced(from..to, count, Self::MAX_CHECKED);
        verify::errors_at(self.image(), &ys, exact)
    }

    /// Max errors at `samples` float32 values of `-logp` in each cell, and at both ends of each piece.
    ///
    /// # Errors
    /// The errors of `exact`.
    pub fn errors_in_cells(&self, samples: u32, exact: &Exact<'_>) -> Result<MaxError> {
        verify::errors_at(self.image(), &verify::in_each_cell(self.image(), samples), exact)
    }

    /// The same table with the result of a verification at `count` values.
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
}
