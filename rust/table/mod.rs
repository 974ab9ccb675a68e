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

use std::collections::HashMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;

use rayon::prelude::*;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use sha2::{Digest, Sha256};

use crate::LOG_RATIO_LIMIT;
use crate::band::{Band, Side};
use crate::error::{Error, Result};
pub use crate::image::Image;
use crate::image::{
    AT_FAR, AT_ZERO, ENDS, ENTRIES, ENTRY_BASE, FAR, MANTISSA, MAX_BITS, MAX_BYTES, MAX_HALVINGS,
    MAX_PIECES, MIN_BITS, ONE, ORIGIN, REACH_RANGES, ROW, SCALE, START, UPPER_REACH, check_image,
};

/// Interpolation error aimed at, in f64; storing and evaluating in float32 adds its own.
const TARGET: f64 = 1.5e-7;
/// A smooth curve's error falls by 16 with every halving of its cells, next to a jump of the second
/// derivative by 4, of the first by 2.
const SLOWEST_DECAY: f64 = 6.0;
/// How narrow a stretch a kink is narrowed down to, relative to its distance from the origin: wider
/// than the differences that a Python function's slopes are made of, and so narrow that to extrapolate
/// over three of them is exact for float32.
const KINK_WIDTH: f64 = 1.0 / 4096.0;
/// Misfits below this, relative to a bound above 1, are not told from rounding when a kink is narrowed.
const KINK_FLOOR: f64 = 1e-12;
/// The exponent that the far end of a piece is scaled to: the smallest float still has a normal `z`.
const TOP_EXPONENT: i32 = 31;
/// Floats in each cell that are compared with the polynomial at build time, where that is cheap.
const CHECKS_A_CELL: u32 = 32;
/// And in each octave, where cells are few.
const CHECKS_AN_OCTAVE: u32 = 128;
/// And in cells where the ulp of a large bound changes.
const CHECKS_AT_A_POWER_OF_TWO: u32 = 2048;

const FORMAT: &str = "bandpo-table";
const VERSION: &str = "1";
const TENSOR: &str = "words";

/// Largest error found, beyond one float32 ulp of the bound, wherever the log bound is within +-20.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct MaxError {
    /// Of `log_upper`, absolute.
    pub log_upper: f64,
    /// Of `lower`, absolute.
    pub lower: f64,
}

impl MaxError {
    fn merge(self, other: Self) -> Self {
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

/// Where the bound of one side comes from over a stretch of `y`.
pub enum Curve<'a> {
    /// The same ratio for every token.
    Constant(f64),
    /// A band.
    Band(&'a Band),
    /// Anything smooth: from old log-probabilities to log bounds and their slopes in logp.
    Sampled(&'a Sampler<'a>),
}

/// See [`Curve::Sampled`].
pub type Sampler<'a> = dyn Fn(Side, &[f64]) -> Result<Vec<(f64, f64)>> + Sync + 'a;

/// From old log-probabilities to exact `(log_lower, log_upper)`.
pub type Exact<'a> = dyn Fn(&[f64]) -> Result<(Vec<f64>, Vec<f64>)> + 'a;

/// Curves with the `y` where each begins, the first at 0: kinks are where one follows another.
pub type Stretches<'a> = Vec<(f64, Curve<'a>)>;

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
    /// [`Error::Argument`] if a side needs more pieces than a table has, and what the curves raise.
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

    fn errors_at(&self, ys: &[f32], exact: &Exact<'_>) -> Result<MaxError> {
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
    fn error_of_side(&self, side: usize, y: f32, exact: f64) -> MaxError {
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

impl Curve<'_> {
    /// The tabulated values of a side at each `y`, and their derivatives in `y`.
    fn sample(&self, side: Side, ys: &[f64]) -> Result<Vec<(f64, f64)>> {
        let tabulated = |log_bound: f64, log_slope: f64| match side {
            Side::Upper => (log_bound, -log_slope),
            Side::Lower => {
                let lower = log_bound.exp();
                (lower, if lower == 0.0 { 0.0 } else { -lower * log_slope })
            }
        };
        match self {
            Self::Constant(ratio) => {
                let value = if side == Side::Upper { ratio.ln() } else { *ratio };
                Ok(vec![(value, 0.0); ys.len()])
            }
            Self::Band(band) => Ok(ys
                .par_iter()
                .with_min_len(32)
                .map(|&y| {
                    let log_bound = band.bound(-y, side).log_ratio;
                    tabulated(log_bound, band.log_slope(-y, log_bound))
                })
                .collect()),
            Self::Sampled(sampler) => {
                let logp: Vec<f64> = ys.iter().map(|y| -y).collect();
                let sampled = sampler(side, &logp)?;
                if sampled.len() != ys.len() {
                    return Err(Error::Length {
                        argument: "the samples of a curve",
                        actual: sampled.len(),
                        expected: ys.len(),
                    });
                }
                Ok(sampled.into_iter().map(|(bound, slope)| tabulated(bound, slope)).collect())
            }
        }
    }

    /// Where the side stops (upper) or starts (lower) to allow everything, as `y`.
    fn saturation(&self, side: Side) -> Result<Option<f64>> {
        let everything = |y: f64| -> Result<bool> {
            Ok(match (self, side) {
                (Self::Constant(_), _) => false,
                (Self::Band(band), Side::Upper) => band.bound(-y, side).log_ratio >= y,
                (Self::Band(band), Side::Lower) => {
                    band.bound(-y, side).log_ratio == f64::NEG_INFINITY
                }
                (Self::Sampled(sampler), _) => {
                    let bound = sampler(side, &[-y])?.first().map_or(f64::NAN, |bound| bound.0);
                    if side == Side::Upper { bound >= y } else { bound == f64::NEG_INFINITY }
                }
            })
        };
        let smallest = f64::from(f32::from_bits(1));
        // Everything is allowed next to p = 1 on the upper side, next to p = 0 on the lower.
        let (near, far) = (everything(smallest)?, everything(FAR)?);
        Ok(match side {
            Side::Upper if !near => None,
            Side::Upper if far => Some(FAR),
            Side::Lower if near => Some(0.0),
            Side::Lower if !far => None,
            _ => {
                let mut failure = None;
                let edge = crate::band::root::last_inside(smallest, FAR, |y| match everything(y) {
                    Ok(all) => all == near,
                    Err(error) => {
                        failure.get_or_insert(error);
                        false
                    }
                });
                if let Some(error) = failure {
                    return Err(error);
                }
                Some(edge.at)
            }
        })
    }
}

/// What a side has over a stretch of `y`.
struct Piece<'a> {
    start: f32,
    content: Content<'a>,
}

enum Content<'a> {
    /// The same value all over.
    Constant(f32),
    /// A curve.
    Graded(Grid<'a>),
}

/// A value and its derivative in `z`.
#[derive(Debug, Clone, Copy)]
struct Sample {
    z: f64,
    value: f64,
    slope: f64,
}

impl Sample {
    /// The cubic through two samples, at any `z`.
    fn cubic(self, other: Self, z: f64) -> Self {
        let width = other.z - self.z;
        let t = (z - self.z) / width;
        let (m0, m1) = (self.slope * width, other.slope * width);
        let rise = other.value - self.value;
        let (bend, twist) = (3.0 * rise - 2.0 * m0 - m1, m0 + m1 - 2.0 * rise);
        Self {
            z,
            value: self.value + t * (m0 + t * (bend + t * twist)),
            slope: (m0 + t * (2.0 * bend + 3.0 * t * twist)) / width,
        }
    }

    /// How far the cubic through two samples is off between them, seen from this one near their middle.
    ///
    /// An error of fourth order is greatest in the middle; one of fifth order vanishes there and is seen
    /// in the slope: `t^2 (1-t)^2 (t-1/2)` is at most 0.143 of its slope at `t = 1/2`.
    fn misfit(self, left: Self, right: Self) -> f64 {
        let cubic = left.cubic(right, self.z);
        let tilt = (cubic.slope - self.slope) * (right.z - left.z);
        let error = (cubic.value - self.value).abs() + 0.143 * tilt.abs();
        // A NaN is an error without measure, not none.
        if error.is_nan() { f64::INFINITY } else { error }
    }
}

/// The ends of a cell so that its cubic is the one through the ends of a part of it.
fn extended(part: [Sample; 2], cell: [Sample; 2]) -> [Sample; 2] {
    let [a, b] = part;
    let width = b.z - a.z;
    // In the cubic of a small part the noise of its slopes would be magnified by the ratio squared, and
    // nodes far from the bound are rounded accordingly.
    let small = width < (cell[1].z - cell[0].z) / 1024.0;
    let bend = (b.slope - a.slope) / width;
    let at = |z: f64| {
        if small {
            let step = z - a.z;
            let value = a.value + step * (a.slope + 0.5 * bend * step);
            Sample { z, value, slope: a.slope + bend * step }
        } else {
            a.cubic(b, z)
        }
    };
    let [left, right] = cell;
    [if left.z == a.z { a } else { at(left.z) }, if right.z == b.z { b } else { at(right.z) }]
}

/// About what float32 adds to the error of a cell beyond an ulp of the bound: it computes the rise, which
/// may exceed the bound at its start. Nothing where the loss clamps.
fn rounding(left: f64, right: f64) -> f64 {
    if left.min(right) > LOG_RATIO_LIMIT {
        0.0
    } else {
        f64::from(f32::EPSILON) / 2.0 * (right - left).abs()
    }
}

/// The samples of a curve at the two ends of a piece, where its grid goes on beyond them.
#[derive(Clone, Copy, Default)]
struct Ends {
    low: Option<Sample>,
    high: Option<Sample>,
}

impl Ends {
    /// The part of a cell that lies in the piece.
    fn clip(&self, cell: [Sample; 2]) -> Option<[Sample; 2]> {
        let [mut left, mut right] = cell;
        if let Some(low) = self.low {
            if right.z <= low.z {
                return None;
            }
            if left.z < low.z {
                left = low;
            }
        }
        if let Some(high) = self.high {
            if left.z >= high.z {
                return None;
            }
            if right.z > high.z {
                right = high;
            }
        }
        Some([left, right])
    }

    fn holds(&self, z: f64) -> bool {
        self.low.is_none_or(|low| z >= low.z) && self.high.is_none_or(|high| z <= high.z)
    }
}

/// A piece of a curve, in octaves of the distance from an origin.
struct Grid<'a> {
    curve: &'a Curve<'a>,
    origin: f64,
    /// A power of two: the product with it is exact.
    scale: f64,
    /// The piece, in `z`.
    within: (f64, f64),
    /// The origin is the greatest `y`.
    towards_zero: bool,
    ends: Ends,
    /// From the smallest up.
    octaves: Vec<Octave>,
}

/// An octave of `z` with samples at its nodes.
struct Octave {
    /// The octave is `[2^exponent, 2^(exponent+1))` in `z`.
    exponent: i32,
    /// `2^n + 1` samples after `n` levels were looked at, ends included. Outside the piece they mean
    /// nothing but their `z`.
    samples: Vec<Sample>,
    /// `errors[b]`: interpolation error in the middle of the worst of `2^b` cells.
    errors: Vec<f64>,
    /// The cell that the last of these errors is from.
    worst: [f64; 2],
}

impl Octave {
    fn new(exponent: i32) -> Self {
        Self { exponent, samples: Vec::new(), errors: Vec::new(), worst: [0.0; 2] }
    }

    fn bottom(&self) -> f64 {
        2f64.powi(self.exponent)
    }

    /// How often to halve it for a tolerance, as far as was sampled.
    fn halvings(&self, tolerance: f64) -> u32 {
        let enough = self.errors.iter().position(|&error| error <= tolerance);
        enough.map_or(MAX_HALVINGS, |b| b as u32)
    }

    /// Its cells after so many halvings.
    fn cells(&self, halvings: u32) -> impl Iterator<Item = [Sample; 2]> + '_ {
        let stride = (self.samples.len() - 1) >> halvings;
        (0..1 << halvings).map(move |k| [self.samples[k * stride], self.samples[(k + 1) * stride]])
    }

    fn finest(&self) -> u32 {
        (self.samples.len() - 1).ilog2()
    }

    /// Where the next level needs samples: at the middle of each cell, then of each part of a cell.
    fn places(&self, ends: &Ends) -> Vec<f64> {
        let middles = self.cells(self.finest()).map(|[a, b]| 0.5 * (a.z + b.z));
        let parts = self.cells(self.finest()).filter_map(|cell| {
            let [a, b] = ends.clip(cell)?;
            (b.z - a.z < cell[1].z - cell[0].z).then_some(0.5 * (a.z + b.z))
        });
        middles.chain(parts).collect()
    }

    /// Takes the samples at its [`Self::places`]; returns whether cells have to be halved again.
    fn refine(&mut self, sampled: &[Sample], ends: &Ends) -> bool {
        let (middles, parts) = sampled.split_at(self.samples.len() - 1);
        let mut parts = parts.iter();
        let (mut greatest, mut worst) = (0.0, self.worst);
        let mut finer = Vec::with_capacity(2 * self.samples.len() - 1);
        for (cell, middle) in self.cells(self.finest()).zip(middles) {
            finer.extend([cell[0], *middle]);
            let Some([a, b]) = ends.clip(cell) else { continue };
            let whole = b.z - a.z >= cell[1].z - cell[0].z;
            let Some(checked) = (if whole { Some(middle) } else { parts.next() }) else { continue };
            let [left, right] = extended([a, b], cell);
            let error = checked.misfit(a, b) + rounding(left.value, right.value);
            if error > greatest {
                greatest = error;
                worst = [a.z, b.z];
            }
        }
        finer.extend(self.samples.last());
        self.worst = worst;
        self.samples = finer;
        self.errors.push(greatest);
        greatest > TARGET && self.errors.len() <= MAX_HALVINGS as usize
    }

    /// Whether its error does not fall as that of a smooth curve does, by 16 with every halving.
    fn stalls(&self) -> bool {
        match self.errors[..] {
            [.., before, last] => {
                self.errors.len() > 4 && last > TARGET && last > before / SLOWEST_DECAY
            }
            _ => false,
        }
    }

    /// The nodes `(value, slope)` after so many halvings; those outside the piece are extrapolated
    /// from the part of their cell that is inside.
    fn nodes(&self, halvings: u32, ends: &Ends) -> Vec<Sample> {
        let mut nodes: Vec<Sample> = self.cells(halvings).map(|[a, _]| a).collect();
        nodes.extend(self.samples.last());
        for (k, cell) in self.cells(halvings).enumerate() {
            let Some([a, b]) = ends.clip(cell) else { continue };
            let [left, right] = extended([a, b], cell);
            if !ends.holds(left.z) {
                nodes[k] = left;
            }
            if !ends.holds(right.z) {
                nodes[k + 1] = right;
            }
        }
        // Cells outside the piece are never read; their samples are of another curve.
        let outside = |cell: [Sample; 2]| ends.clip(cell).is_none();
        let unread: Vec<bool> = self.cells(halvings).map(outside).collect();
        for (k, node) in nodes.iter_mut().enumerate() {
            if (k == 0 || unread[k - 1]) && unread.get(k).is_none_or(|&unread| unread) {
                *node = Sample { z: node.z, value: 0.0, slope: 0.0 };
            }
        }
        nodes
    }
}

impl<'a> Grid<'a> {
    /// A grid over `from <= y < to`, graded from one of the two or from 0; not sampled yet.
    fn new(curve: &'a Curve<'a>, origin: f64, from: f64, to: f64) -> Self {
        let towards_zero = origin >= to;
        let (a, b) = ((from - origin).abs(), (to - origin).abs());
        let (nearest, farthest) = (a.min(b), a.max(b));
        let reach = farthest.log2().ceil() as i32;
        let top = TOP_EXPONENT.min(127 + reach);
        let scale = 2f64.powi(top - reach);
        let within = (nearest * scale, farthest * scale);
        let lowest = nearest.max(nearest_distance(origin)) * scale;
        let lowest = (lowest.log2().floor() as i32).clamp(-125, top - 1);
        let octaves = (lowest..top).map(Octave::new).collect();
        Self { curve, origin, scale, within, towards_zero, ends: Ends::default(), octaves }
    }

    fn y(&self, z: f64) -> f64 {
        let distance = z / self.scale;
        if self.towards_zero { self.origin - distance } else { self.origin + distance }
    }

    fn z(&self, y: f64) -> f64 {
        (y - self.origin).abs() * self.scale
    }

    /// Samples the curve at places in the piece; elsewhere what it returns means nothing but its `z`.
    fn sample_at(&self, side: Side, zs: &[f64]) -> Result<Vec<Sample>> {
        let slope_in_z = if self.towards_zero { -1.0 } else { 1.0 } / self.scale;
        let ys: Vec<f64> =
            zs.iter().map(|z| self.y(z.clamp(self.within.0, self.within.1))).collect();
        let sampled = self.curve.sample(side, &ys)?;
        Ok(zs
            .iter()
            .zip(sampled)
            .map(|(&z, (value, slope))| Sample { z, value, slope: slope * slope_in_z })
            .collect())
    }

    /// Samples its curve, halving cells until the cubic meets the target. If it comes upon a kink and
    /// was told to mind them, it stops and returns it.
    fn fill(&mut self, side: Side, mind_kinks: bool) -> Result<Option<Kink>> {
        let (Some(first), Some(last)) = (self.octaves.first(), self.octaves.last()) else {
            return Ok(None);
        };
        let (bottom, top) = (first.bottom(), 2.0 * last.bottom());
        let (low, high) = self.within;
        let limits = self.sample_at(side, &[low, high])?;
        self.ends = Ends {
            low: (low > bottom).then_some(limits[0]),
            high: (high < top).then_some(limits[1]),
        };
        let powers: Vec<f64> = self.octaves.iter().map(Octave::bottom).chain([top]).collect();
        let sampled = self.sample_at(side, &powers)?;
        for (octave, ends) in self.octaves.iter_mut().zip(sampled.windows(2)) {
            octave.samples = ends.to_vec();
        }
        if low == 0.0 && self.origin == 0.0 {
            drop_settled_octaves(&mut self.octaves);
        }
        let mut pending: Vec<usize> = (0..self.octaves.len()).collect();
        while !pending.is_empty() {
            let mut places = Vec::new();
            let mut counts = Vec::with_capacity(pending.len());
            for &index in &pending {
                let own = self.octaves[index].places(&self.ends);
                counts.push(own.len());
                places.extend(own);
            }
            let sampled = self.sample_at(side, &places)?;
            let mut rest = &sampled[..];
            let mut unfinished = Vec::new();
            for (&index, &count) in pending.iter().zip(&counts) {
                let (own, others) = rest.split_at(count);
                rest = others;
                if self.octaves[index].refine(own, &self.ends) {
                    unfinished.push(index);
                }
            }
            if mind_kinks {
                for &index in unfinished.iter().filter(|&&index| self.octaves[index].stalls()) {
                    if let Some(kink) = self.kink_in(side, self.octaves[index].worst)? {
                        return Ok(Some(kink));
                    }
                }
            }
            pending = unfinished;
        }
        Ok(None)
    }

    /// Narrows a cell down to a kink inside it. None if it is smooth after all.
    fn kink_in(&self, side: Side, cell: [f64; 2]) -> Result<Option<Kink>> {
        /// Points a round, one call of the curve: each round narrows by half as much.
        const POINTS: usize = 33;
        let [mut low, mut high] = cell;
        while high - low > KINK_WIDTH * high {
            let step = (high - low) / (POINTS - 1) as f64;
            let places: Vec<f64> = (0..POINTS).map(|i| low + step * i as f64).collect();
            let samples = self.sample_at(side, &places)?;
            let (mut greatest, mut at) = (0.0, 0);
            for i in 1..POINTS - 1 {
                let misfit = samples[i].misfit(samples[i - 1], samples[i + 1]);
                if misfit > greatest {
                    (greatest, at) = (misfit, i);
                }
            }
            if at == 0 || greatest <= KINK_FLOOR * samples[at].value.abs().max(1.0) {
                return Ok(None);
            }
            (low, high) = (places[at - 1], places[at + 1]);
        }
        let width = high - low;
        (low, high) = (low - width, high + width);
        // Singular ends of a piece are not kinks inside it: another piece would have the same one.
        if low - width <= self.within.0 || high + width >= self.within.1 {
            return Ok(None);
        }
        // The kink is where the cubics of its two sides meet: slopes next to it may be of either.
        let around = self.sample_at(side, &[low - width, low, high, high + width])?;
        let gap =
            |z: f64| around[0].cubic(around[1], z).value - around[2].cubic(around[3], z).value;
        let at = if gap(low) * gap(high) < 0.0 {
            let above = gap(low) > 0.0;
            crate::band::root::last_inside(low, high, |z| (gap(z) > 0.0) == above).at
        } else {
            0.5 * (low + high) // of the second derivative only: the sides differ by less than counts
        };
        let ends = [self.y(low), self.y(high)];
        Ok(Some(Kink { before: ends[0].min(ends[1]), at: self.y(at), after: ends[0].max(ends[1]) }))
    }
}

/// A kink at `at`, and the nearest `y` on both sides where slopes are surely of that side.
struct Kink {
    before: f64,
    at: f64,
    after: f64,
}

/// Below this distance from its origin a bound differs from its value there by less than counts.
fn nearest_distance(origin: f64) -> f64 {
    if origin == 0.0 {
        // Where f grows faster than linearly, `lower` still moves at the smallest floats.
        f64::from(f32::from_bits(1))
    } else {
        origin * f64::from(f32::EPSILON) * 0.25
    }
}

/// The float32 at or above a value.
fn round_up(value: f64) -> f64 {
    let near = value as f32;
    f64::from(if f64::from(near) < value { near.next_up() } else { near })
}

/// Near `y = 0` most bounds reach their limit long before the smallest float: the octaves below that
/// are left out, and the lookup clamps into the first one that is kept.
fn drop_settled_octaves(octaves: &mut Vec<Octave>) {
    let limit = octaves[0].samples[0].value;
    let settled =
        octaves.iter().take_while(|octave| (octave.samples[1].value - limit).abs() < 1e-10).count();
    octaves.drain(..settled.min(octaves.len() - 1));
}

/// What a natural piece holds: a constant, or the curve graded from an origin.
enum Part {
    Constant(f64),
    From(f64),
}

impl<'a> Piece<'a> {
    fn constant(start: f64, value: f64) -> Self {
        Self { start: start as f32, content: Content::Constant(value as f32) }
    }

    fn graded(curve: &'a Curve<'a>, origin: f64, from: f64, to: f64) -> Self {
        Self { start: from as f32, content: Content::Graded(Grid::new(curve, origin, from, to)) }
    }

    /// The natural pieces of a curve over `from <= y < to`.
    fn of_curve(curve: &'a Curve<'a>, side: Side, from: f64, to: f64) -> Result<Vec<Self>> {
        if let Curve::Constant(ratio) = curve {
            // The minimum with y makes any value from FAR on say that everything is allowed.
            let value = if side == Side::Upper { ratio.ln().min(FAR) } else { *ratio };
            return Ok(vec![Self::constant(from, value)]);
        }
        let edge = curve.saturation(side)?;
        // Where they begin.
        let parts = match (side, edge) {
            (_, None) => vec![(0.0, Part::From(0.0))],
            // The minimum with y makes a constant say that everything is allowed.
            (Side::Upper, Some(edge)) => {
                let edge = round_up(edge);
                vec![
                    (0.0, Part::Constant(FAR)),
                    (edge, Part::From(edge)),
                    (2.0 * edge, Part::From(0.0)),
                ]
            }
            (Side::Lower, Some(edge)) => {
                let edge = round_up(edge);
                // The power of two in (3/8, 3/4] of the edge: neither part ends next to it.
                let middle = 2f64.powi((0.75 * edge).log2().floor() as i32);
                vec![
                    (0.0, Part::From(0.0)),
                    (middle, Part::From(edge)),
                    (edge, Part::Constant(0.0)),
                ]
            }
        };
        let mut pieces = Vec::new();
        for (k, (begin, part)) in parts.iter().enumerate() {
            let end = parts.get(k + 1).map_or(FAR, |next| next.0).min(to).min(FAR);
            let begin = begin.max(from);
            if (begin as f32) < end as f32 {
                pieces.push(match part {
                    Part::Constant(value) => Self::constant(begin, *value),
                    Part::From(origin) => Self::graded(curve, *origin, begin, end),
                });
            }
        }
        Ok(pieces)
    }
}

/// All pieces of a side, sampled.
struct SidePlan<'a> {
    at_zero: f32,
    far: f32,
    pieces: Vec<Piece<'a>>,
}

impl<'a> SidePlan<'a> {
    fn sampled(side: Side, stretches: &'a Stretches<'a>, exact: &Exact<'_>) -> Result<Self> {
        let mut waiting = Vec::new();
        for (i, (start, curve)) in stretches.iter().enumerate() {
            let start = f64::from(*start as f32);
            let end = stretches.get(i + 1).map_or(FAR, |next| f64::from(next.0 as f32));
            if start < end && start < FAR {
                waiting.extend(Piece::of_curve(curve, side, start, end)?);
            }
        }
        if waiting.len() > MAX_PIECES {
            return Err(Error::Argument {
                argument: "region",
                value: format!("one with {} smooth pieces", waiting.len()),
                allowed: "of at most 8 smooth pieces a side to be tabulated",
            });
        }
        waiting.reverse();
        let mut pieces = Vec::new();
        while let Some(mut piece) = waiting.pop() {
            let room = pieces.len() + waiting.len() + 1 < MAX_PIECES;
            if let Content::Graded(grid) = &mut piece.content
                && let Some(kink) = grid.fill(side, room)?
            {
                let (a, b) = (grid.y(grid.within.0), grid.y(grid.within.1));
                let (curve, origin) = (grid.curve, grid.origin);
                let (from, to) = (a.min(b), a.max(b));
                let middle = round_up(kink.at) as f32;
                // Between the last float of a piece and its end there is no place for another.
                if middle < to as f32 {
                    let mut right = Piece::graded(curve, origin, kink.after, to);
                    right.start = middle.max(piece.start);
                    waiting.push(right);
                }
                if piece.start < middle {
                    let mut left = Piece::graded(curve, origin, from, kink.before);
                    left.start = piece.start;
                    waiting.push(left);
                }
                continue;
            }
            pieces.push(piece);
        }
        let (lower, upper) = exact(&[0.0, f64::NEG_INFINITY])?;
        let (at_zero, far) = match side {
            Side::Upper => (0.0, upper[1]),
            Side::Lower => (lower[0].exp(), lower[1].exp()),
        };
        Ok(Self { at_zero: at_zero as f32, far: far as f32, pieces })
    }

    /// The pieces with the float that follows the last one of each.
    fn with_ends(&self) -> impl Iterator<Item = (&Piece<'a>, f32)> {
        let ends = self.pieces[1..].iter().map(|piece| piece.start).chain([FAR as f32]);
        self.pieces.iter().zip(ends)
    }

    /// Floats in every cell with the bound there, for a table of this tolerance.
    ///
    /// Between the samples of a cell the bound is known better than any table holds it, from the cubic
    /// and its error in the middle, of value and slope; so what float32 does to it can be seen at many places for little.
    fn known_values(&self, tolerance: f64) -> Vec<(f32, f64)> {
        /// Multiples of it spread evenly over [0, 1).
        const GOLDEN: f64 = 0.618_033_988_749_894_9;
        let mut known = Vec::new();
        for (piece, end) in self.with_ends() {
            let Content::Graded(grid) = &piece.content else { continue };
            for octave in &grid.octaves {
                let halvings = octave.halvings(tolerance);
                let half = (octave.samples.len() - 1) >> (halvings + 1);
                for (k, cell) in octave.cells(halvings).enumerate() {
                    let Some([a, b]) = grid.ends.clip(cell) else { continue };
                    // Just below a power of two the ulp is half that of the node above it.
                    let binade = |value: f64| (value as f32).to_bits() >> 23;
                    let crosses = a.value.max(b.value) > 2.0 && binade(a.value) != binade(b.value);
                    let checks = if crosses {
                        CHECKS_AT_A_POWER_OF_TWO
                    } else {
                        CHECKS_A_CELL.max(CHECKS_AN_OCTAVE >> halvings)
                    };
                    // The terms of fourth and fifth order, which vanish twice at both ends.
                    let middle = octave.samples[(2 * k + 1) * half];
                    let quartic = |z: f64| ((z - a.z) * (b.z - z)).powi(2);
                    // Where the end of the piece cuts a cell next to its middle, they would be noise.
                    let inner = (middle.z - a.z).min(b.z - middle.z);
                    let (fourth, fifth) = if inner > 0.25 * (b.z - a.z) {
                        let cubic = a.cubic(b, middle.z);
                        let fourth = (middle.value - cubic.value) / quartic(middle.z);
                        let growth = 2.0 * (a.z + b.z - 2.0 * middle.z)
                            / ((middle.z - a.z) * (b.z - middle.z));
                        let tilt = (middle.slope - cubic.slope) / quartic(middle.z);
                        (fourth, tilt - growth * fourth)
                    } else {
                        (0.0, 0.0)
                    };
                    for i in 0..checks {
                        let share = (GOLDEN * f64::from(i + 1)).fract();
                        let y = grid.y(a.z + (b.z - a.z) * share) as f32;
                        let z = grid.z(f64::from(y));
                        if y >= piece.start && y < end && z >= a.z && z <= b.z {
                            let more = quartic(z) * (fourth + fifth * (z - middle.z));
                            known.push((y, a.cubic(b, z).value + more));
                        }
                    }
                }
            }
        }
        known
    }
}

/// Writes the image of both sides.
fn image(sides: &[SidePlan<'_>; 2], tolerance: f64) -> Vec<u32> {
    let entry_count: usize = sides
        .iter()
        .flat_map(|side| &side.pieces)
        .map(|piece| match &piece.content {
            Content::Constant(_) => 1,
            Content::Graded(grid) => grid.octaves.len(),
        })
        .sum();
    let nodes_start = (ENTRIES + entry_count).next_multiple_of(2);
    let mut words = vec![0_u32; nodes_start];
    let mut entry = ENTRIES;
    let push_node = |words: &mut Vec<u32>, value: f64, slope: f64| {
        words.extend([(value as f32).to_bits(), (slope as f32).to_bits()]);
    };
    for (side, plan) in sides.iter().enumerate() {
        words[AT_ZERO + side] = plan.at_zero.to_bits();
        words[AT_FAR + side] = plan.far.to_bits();
        for (k, (piece, end)) in plan.with_ends().enumerate() {
            let lane = MAX_PIECES * side + k;
            words[START + lane] = piece.start.to_bits();
            match &piece.content {
                Content::Constant(value) => {
                    words[SCALE + lane] = ONE;
                    words[ENTRY_BASE + lane] = (entry as u32).wrapping_sub(ONE >> 23);
                    words[MIN_BITS + lane] = ONE;
                    words[MAX_BITS + lane] = ONE;
                    words[entry] = (words.len() as u32 / 2) << 4;
                    entry += 1;
                    for _ in 0..2 {
                        push_node(&mut words, f64::from(*value), 0.0);
                    }
                }
                Content::Graded(grid) => {
                    let (origin, scale) = (grid.origin as f32, grid.scale as f32);
                    let reached = [piece.start, end.next_down()]
                        .map(|y| ((y - origin).abs() * scale).to_bits());
                    let biased = (grid.octaves[0].exponent + 127) as u32;
                    let lowest = reached[0].min(reached[1]).max(biased << 23);
                    let highest = reached[0].max(reached[1]).max(lowest);
                    words[ORIGIN + lane] = origin.to_bits();
                    words[SCALE + lane] = scale.to_bits();
                    words[ENTRY_BASE + lane] = (entry as u32).wrapping_sub(biased);
                    words[MIN_BITS + lane] = lowest;
                    words[MAX_BITS + lane] = highest;
                    for octave in &grid.octaves {
                        let halvings = octave.halvings(tolerance);
                        let nodes = octave.nodes(halvings, &grid.ends);
                        words[entry] = (words.len() as u32 / 2) << 4 | halvings;
                        entry += 1;
                        let kept = if (octave.exponent + 127) as u32 == highest >> 23 {
                            // Nodes beyond the last cell that is read are left out.
                            ((highest & MANTISSA) >> (23 - halvings)) as usize + 2
                        } else {
                            // The last node of an octave is the first of the next.
                            nodes.len() - 1
                        };
                        for node in &nodes[..kept] {
                            push_node(&mut words, node.value, node.slope);
                        }
                    }
                }
            }
        }
        let (first, used) = (MAX_PIECES * side, plan.pieces.len());
        for row in (0..ENDS).step_by(ROW) {
            for unused in used..MAX_PIECES {
                words[row + first + unused] = if row == START {
                    f32::INFINITY.to_bits()
                } else {
                    words[row + first + used - 1]
                };
            }
        }
    }
    let reaches = reaches(Image(&words)).map(f32::to_bits);
    words[UPPER_REACH..UPPER_REACH + reaches.len()].copy_from_slice(&reaches);
    words
}

/// How far a ratio may be from 1 and yet surely not reach its bound: `log_upper` is at least `y` times the
/// first four, `ln lower` at most the other four. So most bounds need not be looked up.
fn reaches(image: Image<'_>) -> [f32; 8] {
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

// ---------------------------------------------------------------------------------------------------
// The file: safetensors, one tensor of words, and metadata under a checksum.

impl BandTable {
    /// The file's content. The same table always gives the same bytes.
    ///
    /// # Errors
    /// [`Error::TableFile`] if the serializer refuses, which it has no reason to.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let data: Vec<u8> = self.words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let mut metadata = self.metadata();
        let digest = checksum(&metadata, &data);
        metadata.push(("checksum", digest));
        let metadata: HashMap<String, String> =
            metadata.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
        let view = TensorView::new(Dtype::U32, vec![self.words.len()], &data)
            .map_err(|error| Error::TableFile { reason: error.to_string() })?;
        canonical(
            &safetensors::serialize([(TENSOR, view)], Some(metadata))
                .map_err(|error| Error::TableFile { reason: error.to_string() })?,
        )
    }

    /// Everything but the words, in the order that the checksum covers it.
    #[must_use]
    pub fn metadata(&self) -> Vec<(&'static str, String)> {
        vec![
            ("format", FORMAT.to_owned()),
            ("format_version", VERSION.to_owned()),
            ("region", self.region.clone()),
            ("grid", "cubic Hermite, octaves of float32 -log p".to_owned()),
            ("max_error_log_upper", format!("{:?}", self.max_error.log_upper)),
            ("max_error_lower", format!("{:?}", self.max_error.lower)),
            (
                "verification",
                match self.verification {
                    Verification::Sampled => "sampled",
                    Verification::Exhaustive => "exhaustive",
                }
                .to_owned(),
            ),
        ]
    }

    /// Reads a file's content; refuses whatever [`Self::to_bytes`] would not have written.
    ///
    /// # Errors
    /// [`Error::TableFile`] says what is wrong. Nothing of a refused file is used.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let refuse = |reason: &str| Error::TableFile { reason: reason.to_owned() };
        let (_, header) = SafeTensors::read_metadata(bytes)
            .map_err(|error| refuse(&format!("not a whole safetensors file ({error})")))?;
        let metadata = header
            .metadata()
            .as_ref()
            .filter(|metadata| metadata.get("format").is_some_and(|format| format == FORMAT))
            .ok_or_else(|| refuse("a safetensors file, but not of a bandpo table"))?;
        let text =
            |key: &str| metadata.get(key).ok_or_else(|| refuse(&format!("metadata has no {key}")));
        let version = text("format_version")?;
        if version != VERSION {
            return Err(refuse(&format!(
                "format version {version:?}, this version of bandpo reads {VERSION:?}"
            )));
        }
        let tensors =
            SafeTensors::deserialize(bytes).map_err(|error| refuse(&error.to_string()))?;
        let tensor =
            tensors.tensor(TENSOR).map_err(|_| refuse(&format!("no tensor named {TENSOR:?}")))?;
        if tensor.dtype() != Dtype::U32 || tensor.shape().len() != 1 {
            return Err(refuse("its tensor is not one-dimensional U32"));
        }
        let number = |key: &str| {
            text(key)?
                .parse::<f64>()
                .map_err(|_| refuse(&format!("metadata {key} is not a number")))
        };
        let table = Self {
            words: tensor
                .data()
                .chunks_exact(4)
                .map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]))
                .collect(),
            region: text("region")?.clone(),
            max_error: MaxError {
                log_upper: number("max_error_log_upper")?,
                lower: number("max_error_lower")?,
            },
            verification: match text("verification")?.as_str() {
                "sampled" => Verification::Sampled,
                "exhaustive" => Verification::Exhaustive,
                _ => return Err(refuse("metadata verification is unknown")),
            },
        };
        if text("checksum")? != &checksum(&table.metadata(), tensor.data()) {
            return Err(refuse("its checksum does not match: the file was altered"));
        }
        // Bytes outside what the checksum covers (padding, order, spacing) must be ours as well.
        if table.to_bytes()? != bytes {
            return Err(refuse("it is not byte for byte as this version writes it"));
        }
        check_image(&table.words)?;
        Ok(table)
    }

    /// Writes the table; the file appears whole or not at all.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn save(&self, path: &Path) -> Result<()> {
        let bytes = self.to_bytes()?;
        let fail = |error: std::io::Error| Error::File {
            path: path.display().to_string(),
            action: "write",
            // The kind alone: the rest would name the temporary file.
            reason: match error.kind() {
                std::io::ErrorKind::Other => error.to_string(),
                kind => kind.to_string(),
            },
        };
        // Through links to the file itself; and a device or a pipe is not to be replaced by a file.
        let target = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        if target.is_dir() {
            return Err(fail(std::io::ErrorKind::IsADirectory.into()));
        }
        if target.exists() && !target.is_file() {
            return Err(fail(std::io::Error::other("it is not a regular file")));
        }
        let folder = match target.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        let mut builder = tempfile::Builder::new();
        builder.prefix(".bandpo-table-");
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            // As any new file: what the umask leaves of rw-rw-rw-.
            builder.permissions(std::fs::Permissions::from_mode(0o666));
        }
        let mut file = builder.tempfile_in(folder).map_err(fail)?;
        file.write_all(&bytes).map_err(fail)?;
        file.as_file().sync_all().map_err(fail)?;
        file.persist(&target).map_err(|error| fail(error.error))?;
        Ok(())
    }

    /// Reads a table that [`Self::save`] wrote.
    ///
    /// # Errors
    /// [`Error::File`] and [`Error::TableFile`].
    pub fn load(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|error| Error::File {
            path: path.display().to_string(),
            action: "read",
            reason: error.to_string(),
        })?;
        Self::from_bytes(&bytes).map_err(|error| match error {
            Error::TableFile { reason } => {
                Error::TableFile { reason: format!("{}: {reason}", path.display()) }
            }
            other => other,
        })
    }
}

fn checksum(metadata: &[(&'static str, String)], data: &[u8]) -> String {
    let mut digest = Sha256::new();
    for (key, value) in metadata {
        for text in [*key, value.as_str()] {
            digest.update((text.len() as u64).to_le_bytes());
            digest.update(text.as_bytes());
        }
    }
    digest.update(data);
    digest.finalize().iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}"); // writing to a String cannot fail
        text
    })
}

/// The same safetensors content with the keys of its header sorted: the serializer writes metadata in
/// the order of a hash map, which differs from run to run.
fn canonical(bytes: &[u8]) -> Result<Vec<u8>> {
    let refuse = |error: serde_json::Error| Error::TableFile { reason: error.to_string() };
    let (header_len, _) = SafeTensors::read_metadata(bytes)
        .map_err(|error| Error::TableFile { reason: error.to_string() })?;
    // serde_json's own map is sorted by key.
    let header: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(&bytes[8..8 + header_len]).map_err(refuse)?;
    let mut text = serde_json::to_vec(&header).map_err(refuse)?;
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut out = Vec::with_capacity(8 + text.len() + bytes.len());
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text);
    out.extend(&bytes[8 + header_len..]);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::divergence::Divergence;

    fn band(spec: &str, low: f64, high: f64) -> Band {
        Band::new(Divergence::parse(spec).unwrap(), low, high).unwrap()
    }

    fn table(spec: &str, low: f64, high: f64) -> BandTable {
        BandTable::of_band(&band(spec, low, high)).unwrap()
    }

    fn found(table: &BandTable, band: &Band, count: u64) -> MaxError {
        table.errors_between(0, count, count, &|logp| Ok(band.log_bounds_of_many(logp))).unwrap()
    }

    /// The promise of a table, and what a cell-wise sample may not see of it.
    const TARGET: f64 = 1e-6;

    /// Of every family: the named members, the ends of its range and something in between.
    const BUILT_INS: [&str; 37] = [
        "kl",
        "reverse-kl",
        "tv",
        "pearson-chi2",
        "neyman-chi2",
        "hellinger",
        "le-cam",
        "jensen-shannon",
        "jeffreys",
        "bhattacharyya",
        "alpha:-3",
        "alpha:-1",
        "alpha:-0.5",
        "alpha:0.01",
        "alpha:0.5",
        "alpha:0.99",
        "alpha:1.01",
        "alpha:1.5",
        "alpha:3",
        "alpha:4",
        "renyi:0.1",
        "renyi:0.5",
        "renyi:0.99",
        "renyi:2",
        "renyi:3.5",
        "vajda:1",
        "vajda:1.2",
        "vajda:1.5",
        "vajda:3",
        "vajda:4",
        "bwcs:0",
        "bwcs:0.3",
        "bwcs:0.99",
        "bwcs:1",
        "hockey-stick:1",
        "hockey-stick:1.2",
        "hockey-stick:4",
    ];

    /// In every cell and evenly over all floats.
    fn found_everywhere(table: &BandTable, band: &Band, count: u64) -> MaxError {
        let exact = |logp: &[f64]| Ok(band.log_bounds_of_many(logp));
        let in_cells = table.errors_in_cells(4, &exact).unwrap();
        found(table, band, count).merge(in_cells)
    }

    #[test]
    fn tables_hold_the_target_for_every_built_in() {
        // Evenly spaced logarithms from 1e-4 to 1, then some that are not.
        let deltas = (0..9).map(|i| 10f64.powf(f64::from(i) / 2.0 - 4.0));
        let deltas: Vec<f64> = deltas.chain([2.347e-4, 0.0513, 0.69]).collect();
        let grid =
            BUILT_INS.iter().flat_map(|&spec| deltas.iter().map(move |&delta| (spec, delta)));
        // Twice the saturation point lies in the last 2e-6 and in the last tenths of an octave.
        let cut =
            [("bhattacharyya", 0.999_998_893_475_190_2), ("hellinger", 0.973_145_335_136_083_3)];
        for (spec, delta) in grid.chain(cut) {
            let band = band(spec, delta, delta);
            let table = BandTable::of_band(&band).unwrap();
            assert!(table.nbytes() <= MAX_BYTES, "{spec} {delta}: {}", table.nbytes());
            let error = found_everywhere(&table, &band, 5_000).merge(table.max_error());
            let worst = error.log_upper.max(error.lower);
            assert!(worst <= TARGET, "{spec} {delta}: {error:?}");
        }
    }

    /// What a dense run may find beyond the samples of a build: a tenth, and half an ulp of a ratio
    /// near 1, as rounding hits a few floats in millions harder than any that was looked at.
    #[test]
    fn the_error_that_a_table_states_is_about_what_a_dense_run_finds() {
        for (spec, delta) in [
            ("kl", 0.05),
            ("jeffreys", 0.07),
            ("renyi:3.5", 1e-4),
            ("alpha:0.5", 6.8e-4),
            ("vajda:1.5", 0.0147),
            ("hellinger", 0.68),
        ] {
            let band = band(spec, delta, delta);
            let table = BandTable::of_band(&band).unwrap();
            let (stated, found) = (table.max_error(), found_everywhere(&table, &band, 1_000_000));
            for (stated, found) in
                [(stated.log_upper, found.log_upper), (stated.lower, found.lower)]
            {
                assert!(
                    found <= 1.1 * stated + f64::from(f32::EPSILON) / 4.0,
                    "{spec} {delta}: stated {stated:e}, found {found:e}"
                );
            }
        }
    }

    #[test]
    fn tables_of_any_convex_f_hold_the_target() {
        for (text, what) in [
            ("u*ln(u) - u + 1 + (u-1)^2/3", "smooth"),
            ("(u-1)^4 + (u-1)^2", "smooth"),
            ("abs(u-1) + max(u-1.3, 0)", "a kink above 1"),
            ("(u-1)^2 + max(0.8-u, 0) + max(u-1.5, 0)", "kinks on both sides of 1"),
            (
                "max((u-1)^2, 2*abs(u-1) - 0.5)",
                "two convex functions, equal slopes where they meet",
            ),
            ("max(-ln(u) + u - 1, 3*(u-1))", "two convex functions"),
            ("max(u - 1.2, 0)", "a hockey stick"),
            ("max(abs(u-1) - 0.2, 0)", "a flat bottom"),
            ("max(u - 1.1, 0)^2 + max(0.9 - u, 0)^2", "a flat bottom without a kink"),
        ] {
            for delta in [1e-3, 0.05, 0.4] {
                let divergence = Divergence::from_expression(text, None, None).unwrap();
                let band = Band::new(divergence, delta, delta).unwrap();
                let table = BandTable::of_band(&band).unwrap();
                assert!(table.nbytes() <= MAX_BYTES, "{text} {delta}: {}", table.nbytes());
                let error = found_everywhere(&table, &band, 5_000).merge(table.max_error());
                let worst = error.log_upper.max(error.lower);
                assert!(worst <= TARGET, "{text} ({what}), {delta}: {error:?}");
            }
        }
    }

    #[test]
    fn ends_and_special_values() {
        let table = table("kl", 0.05, 0.05);
        assert_eq!(table.image().log_upper(0.0), 0.0);
        assert!(
            (table.image().lower(0.0) - (-0.05_f32).exp()).abs() < 1e-7,
            "the limit for p -> 1"
        );
        assert_eq!(table.image().log_upper(f32::INFINITY), f32::INFINITY);
        assert_eq!(table.image().lower(f32::INFINITY), 0.0);
        assert!(
            table.image().log_upper(f32::NAN).is_nan() && table.image().lower(f32::NAN).is_nan()
        );
        assert_eq!(table.log_bounds(0.5), table.log_bounds(0.0), "above 0 is read as 0");
        assert!(table.log_bounds(f64::NAN).0.is_nan());
    }

    #[test]
    fn each_side_has_its_own_radius() {
        let (low, high) = (table("kl", 0.01, 0.2), table("kl", 0.2, 0.01));
        for y in [0.01_f32, 0.7, 3.0] {
            assert!(
                low.image().log_upper(y) > high.image().log_upper(y)
                    && low.image().lower(y) > high.image().lower(y),
                "{y}"
            );
        }
    }

    #[test]
    fn a_file_gives_back_the_same_table_and_the_same_bytes() {
        let table = table("alpha:0.5", 0.01, 0.2);
        let error = found(&table, &band("alpha:0.5", 0.01, 0.2), 5000);
        let table = table.verified(5000, error);
        let bytes = table.to_bytes().unwrap();
        let again = BandTable::from_bytes(&bytes).unwrap();
        assert_eq!(again, table);
        assert_eq!(again.to_bytes().unwrap(), bytes);
    }

    #[test]
    fn every_flipped_bit_and_every_truncation_is_refused() {
        let bytes = table("tv", 0.05, 0.05).to_bytes().unwrap();
        for place in 0..bytes.len() {
            let mut altered = bytes.clone();
            altered[place] ^= 1 << (place % 8);
            assert!(
                matches!(BandTable::from_bytes(&altered), Err(Error::TableFile { .. })),
                "byte {place}"
            );
        }
        for length in (0..bytes.len()).step_by(7) {
            assert!(BandTable::from_bytes(&bytes[..length]).is_err(), "{length}");
        }
        let mut longer = bytes.clone();
        longer.push(0);
        assert!(BandTable::from_bytes(&longer).is_err());
    }

    #[test]
    fn foreign_and_newer_files_are_told_apart() {
        let refused = |bytes: &[u8]| match BandTable::from_bytes(bytes) {
            Err(Error::TableFile { reason }) => reason,
            other => panic!("{other:?}"),
        };
        assert!(refused(b"GIF89a").contains("not a whole safetensors file"));
        let data = [0_u8; 4];
        let view = || TensorView::new(Dtype::F32, vec![1], &data).unwrap();
        let foreign = safetensors::serialize([("weight", view())], None).unwrap();
        assert!(refused(&foreign).contains("not of a bandpo table"));
        let metadata = HashMap::from([
            ("format".to_owned(), FORMAT.to_owned()),
            ("format_version".to_owned(), "2".to_owned()),
        ]);
        let newer = safetensors::serialize([(TENSOR, view())], Some(metadata)).unwrap();
        assert!(refused(&newer).contains("format version \"2\""));
    }

    /// A forged file with a right checksum but indices that lead outside.
    #[test]
    fn an_image_that_points_outside_itself_is_refused() {
        let good = table("kl", 0.05, 0.05);
        let unused = MAX_PIECES - 1;
        for (place, word) in [
            (ENTRY_BASE, 1 << 20),
            (ENTRY_BASE + unused, 1 << 20),
            (MIN_BITS, u32::MAX),
            (MAX_BITS, u32::MAX),
            (MAX_BITS + unused, f32::INFINITY.to_bits()),
            (ENTRIES, u32::MAX),
        ] {
            let mut forged = good.clone();
            forged.words[place] = word;
            let bytes = forged.to_bytes().unwrap();
            assert!(BandTable::from_bytes(&bytes).is_err(), "word {place}");
        }
    }

    #[test]
    fn saving_where_one_cannot_write_leaves_nothing() {
        let table = table("kl", 0.05, 0.05);
        let folder = tempfile::tempdir().unwrap();
        let missing = folder.path().join("missing").join("table.safetensors");
        assert!(matches!(table.save(&missing), Err(Error::File { action: "write", .. })));
        assert!(matches!(table.save(folder.path()), Err(Error::File { action: "write", .. })));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        let path = folder.path().join("table.safetensors");
        table.save(&path).unwrap();
        table.save(&path).unwrap();
        assert_eq!(BandTable::load(&path).unwrap(), table);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "no temporary file stays");
        assert!(matches!(BandTable::load(&missing), Err(Error::File { action: "read", .. })));
    }

    #[test]
    fn a_verification_of_every_value_says_so() {
        let table = table("kl", 0.05, 0.05);
        assert_eq!(table.verification(), Verification::Sampled);
        let error = MaxError { log_upper: 1e-7, lower: 2e-7 };
        let verified = table.clone().verified(BandTable::checkable(), error);
        assert_eq!(
            (verified.verification(), verified.max_error()),
            (Verification::Exhaustive, error)
        );
        let sampled = table.verified(BandTable::checkable() - 1, error);
        assert_eq!(sampled.verification(), Verification::Sampled);
    }

    /// Kinks in the middle: a band that a constant cuts off at both ends, and a sampled curve.
    #[test]
    fn pieces_of_several_curves_meet_at_their_kinks() {
        let kl = band("kl", 0.05, 0.05);
        let sampler = |side: Side, logp: &[f64]| {
            Ok(logp
                .iter()
                .map(|&logp| {
                    let bound = kl.bound(logp, side).log_ratio;
                    (bound, kl.log_slope(logp, bound))
                })
                .collect())
        };
        // upper = max(1.28, min(band, 10)): the band crosses 1.28 and 10 at these y.
        let crosses = |ratio: f64| {
            crate::band::root::last_inside(1e-9, FAR, |y| kl.log_bounds(-y).1 <= ratio.ln()).at
        };
        let (low, high) = (crosses(1.28), crosses(10.0));
        let exact = |logp: &[f64]| {
            let (lower, upper) = kl.log_bounds_of_many(logp);
            let upper = upper.iter().map(|u| u.clamp(1.28_f64.ln(), 10_f64.ln())).collect();
            Ok((lower, upper))
        };
        for curve in [Curve::Band(&kl), Curve::Sampled(&sampler)] {
            let upper =
                vec![(0.0, Curve::Constant(1.28)), (low, curve), (high, Curve::Constant(10.0))];
            let lower = vec![(0.0, Curve::Sampled(&sampler))];
            let table = BandTable::build(&lower, &upper, "{}".to_owned(), &exact).unwrap();
            assert!(table.nbytes() < 6000, "{}", table.nbytes());
            let error = table.errors_between(0, 100_000, 100_000, &exact).unwrap();
            for error in [error, table.max_error()] {
                assert!(error.log_upper <= TARGET && error.lower <= TARGET, "{error:?}");
            }
            assert_eq!(table.image().log_upper(50.0), 10_f32.ln());
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        /// Random radii: the table stays within the target at random tokens.
        #[test]
        fn any_radius(log_delta in -9.2..0.0_f64, y in prop::collection::vec(0.0..104.0_f32, 50)) {
            let band = band("reverse-kl", log_delta.exp(), log_delta.exp());
            let table = BandTable::of_band(&band).unwrap();
            let error = table.errors_at(&y, &|logp| Ok(band.log_bounds_of_many(logp))).unwrap();
            prop_assert!(error.log_upper <= TARGET && error.lower <= TARGET, "{:?}", error);
        }
    }
}
