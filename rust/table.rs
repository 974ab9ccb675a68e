//! The band as a lookup table: one dimension, indexed straight from the bits of a float.
//!
//! # The image
//!
//! A table is one flat array of 32-bit words, the same on a disk, in a tensor and on a GPU. With
//! `y = max(-logp, 0)` in float32 there are two *sides*: 0 holds `log_upper`, 1 holds `lower` (the
//! ratio, which stays smooth and bounded where its logarithm does not). Side `s` has its header at
//! word `48 s`, six pieces wide:
//!
//! | words | type | meaning |
//! |---|---|---|
//! | 0..6 | f32 | `start` of each piece, the first 0, unused ones +inf |
//! | 6..12 | f32 | `origin` that the piece's grid is graded from |
//! | 12..18 | f32 | `scale`: `z = abs(y - origin) * scale` |
//! | 18..24 | i32 | word index of the entry of the octave with biased exponent 0 |
//! | 24..30 | u32 | bits of the smallest `z` of the grid |
//! | 30..36 | u32 | bits of the greatest `z` of the grid |
//! | 36 | f32 | the value at `y = 0` |
//! | 37 | f32 | the value for `y >= 128` |
//!
//! From word 96 on come octave entries, `node << 4 | b`: the octave is divided into `2^b` cells, and
//! its first node is at words `2 node` (value) and `2 node + 1` (slope in `z`). Each cell holds a
//! cubic Hermite polynomial. A lookup picks the piece by comparisons; the exponent of `z` picks the
//! octave, the top `b` bits of its mantissa the cell, the remaining bits are the fraction. There is no
//! exponential, logarithm, division or search in it. The result is kept in the simplex: `log_upper` at
//! most `y`, `lower` at least 0.
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

use crate::band::{Band, Side};
use crate::error::{Error, Result};

/// Pieces a side may have.
const PIECES: usize = 6;
/// Words of a side's header.
const SIDE_WORDS: usize = 48;
/// Where the octave entries begin.
const ENTRIES: usize = 2 * SIDE_WORDS;
/// `y` from which the limit holds.
const FAR: f64 = 128.0;
/// Most bytes of an image.
const MOST_BYTES: usize = 32 * 1024;
/// Most halvings of an octave.
const MOST_HALVINGS: u32 = 8;
/// Interpolation error aimed at, in f64; storing and evaluating in float32 adds its own.
const TARGET: f64 = 1.5e-7;
/// Log bounds beyond this are not held to the target: a loss clamps log-ratios there anyway.
const CLAMP: f64 = 20.0;
/// The exponent that the far end of every piece is scaled to.
const TOP_EXPONENT: i32 = 31;

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
    /// From samples: three in every cell at build time, or as many as [`BandTable::verify`] was given.
    Sampled,
    /// From every float32 there is.
    Exhaustive,
}

/// The words of a table, to look bounds up in.
#[derive(Debug, Clone, Copy)]
pub struct Image<'a>(pub &'a [u32]);

impl Image<'_> {
    /// `-logp`, 0 where `logp` is above 0, NaN where it is.
    #[must_use]
    pub fn y(logp: f32) -> f32 {
        // Not f32::max, which would turn a NaN into 0.
        if logp > 0.0 { 0.0 } else { -logp }
    }

    /// `log_upper` at `y = -logp >= 0`.
    #[must_use]
    pub fn log_upper(self, y: f32) -> f32 {
        let value = self.value_at(0, y);
        // Never outside the simplex; a NaN must not be lost in a minimum.
        if value > y { y } else { value }
    }

    /// `lower`, the ratio, at `y = -logp >= 0`.
    #[must_use]
    pub fn lower(self, y: f32) -> f32 {
        let value = self.value_at(SIDE_WORDS, y);
        // A cubic may dip below 0 by its error where the bound dies away.
        if value < 0.0 { 0.0 } else { value }
    }

    fn value_at(self, header: usize, y: f32) -> f32 {
        let words = self.0;
        let float = |index: usize| f32::from_bits(words[index]);
        if y.is_nan() {
            return y;
        }
        if y == 0.0 {
            return float(header + 36);
        }
        if y >= FAR as f32 {
            return float(header + 37);
        }
        let piece = (1..PIECES).map(|k| usize::from(y >= float(header + k))).sum::<usize>();
        let at = header + piece;
        let z = (y - float(at + 6)).abs() * float(at + 12);
        let bits = z.to_bits().clamp(words[at + 24], words[at + 30]);
        let exponent = bits >> 23;
        let entry = words[words[at + 18].wrapping_add(exponent) as usize];
        let halvings = entry & 15;
        let shift = 23 - halvings;
        let node = 2 * ((entry >> 4) + ((bits & 0x7f_ffff) >> shift)) as usize;
        let power_of_two = |exponent: u32| f32::from_bits(exponent << 23);
        let t = (bits & ((1 << shift) - 1)) as f32 * power_of_two(127 - shift);
        let width = power_of_two(exponent - halvings);
        let (v0, v1) = (float(node), float(node + 2));
        let (m0, m1) = (float(node + 1) * width, float(node + 3) * width);
        let rise = v1 - v0;
        v0 + t * (m0 + t * ((3.0 * rise - 2.0 * m0 - m1) + t * (m0 + m1 - 2.0 * rise)))
    }
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
        Self::build(&whole(), &whole(), region.to_string(), &|logp| Ok(exact_bounds(band, logp)))
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
            if 4 * words.len() <= MOST_BYTES {
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
        for side in &sides {
            let ys = side.samples_in_every_cell(tolerance);
            table.max_error = table.max_error.merge(table.errors_at(&ys, exact)?);
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

    fn errors_at(&self, ys: &[f32], exact: &Exact<'_>) -> Result<MaxError> {
        let logp: Vec<f64> = ys.iter().map(|&y| -f64::from(y)).collect();
        let (log_lower, log_upper) = exact(&logp)?;
        Ok(ys
            .par_iter()
            .with_min_len(1024)
            .zip(&log_lower)
            .zip(&log_upper)
            .map(|((&y, &log_lower), &log_upper)| self.error_at(y, log_lower, log_upper))
            .reduce(MaxError::default, MaxError::merge))
    }

    fn error_at(&self, y: f32, log_lower: f64, log_upper: f64) -> MaxError {
        // A table keeps to the simplex, whether its region does or not.
        let log_upper = if log_upper > f64::from(y) { f64::from(y) } else { log_upper };
        let beyond_one_ulp = |actual: f32, exact: f64| {
            let bound = exact.abs() as f32;
            let ulp = f64::from(bound.next_up()) - f64::from(bound);
            let error = (f64::from(actual) - exact).abs() - ulp;
            // A NaN is an error without measure, not none.
            if error.is_nan() { f64::INFINITY } else { error.max(0.0) }
        };
        MaxError {
            log_upper: if log_upper > CLAMP {
                // Clamped in use; it only has to lie beyond the clamp as well.
                if self.image().log_upper(y) >= CLAMP as f32 { 0.0 } else { f64::INFINITY }
            } else {
                beyond_one_ulp(self.image().log_upper(y), log_upper)
            },
            lower: beyond_one_ulp(self.image().lower(y), log_lower.exp()),
        }
    }
}

/// `(log_lower, log_upper)` of a band, on all threads.
pub(crate) fn exact_bounds(band: &Band, logp: &[f64]) -> (Vec<f64>, Vec<f64>) {
    logp.par_iter().with_min_len(256).map(|&logp| band.log_bounds(logp)).unzip()
}

/// A stretch of `y` over which the bound is smooth, and the end its grid is graded from.
struct Piece<'a> {
    start: f32,
    origin: f32,
    scale: f32,
    content: Content<'a>,
}

enum Content<'a> {
    /// The same value all over.
    Constant(f32),
    /// Octaves from the smallest up, of a curve.
    Graded(&'a Curve<'a>, Vec<Octave>),
}

/// An octave of `z` with samples at its nodes and at all midpoints that were looked at.
struct Octave {
    /// The octave is `[2^exponent, 2^(exponent+1))` in `z`.
    exponent: i32,
    /// `2^depth + 1` samples `(value, slope in z)`, ends included.
    samples: Vec<(f64, f64)>,
    /// `errors[b]`: interpolation error at the midpoints of `2^b` cells.
    errors: Vec<f64>,
}

impl Octave {
    fn depth(&self) -> u32 {
        (self.samples.len() - 1).ilog2()
    }

    /// How often to halve it for a tolerance, as far as was sampled.
    fn halvings(&self, tolerance: f64) -> u32 {
        let enough = self.errors.iter().position(|&error| error <= tolerance);
        enough.map_or(self.errors.len() as u32, |b| b as u32).min(MOST_HALVINGS)
    }

    fn cell_width(&self) -> f64 {
        2f64.powi(self.exponent) / (self.samples.len() - 1) as f64
    }

    fn middles(&self) -> impl Iterator<Item = f64> + use<> {
        let (start, width) = (2f64.powi(self.exponent), self.cell_width());
        (0..self.samples.len() - 1).map(move |cell| start + width * (cell as f64 + 0.5))
    }

    /// Takes the samples at the midpoints of its cells; returns whether they have to be halved again.
    fn refine(&mut self, middles: &[(f64, f64)]) -> bool {
        let width = self.cell_width();
        let error = self
            .samples
            .windows(2)
            .zip(middles)
            .map(|(ends, middle)| {
                let interpolated =
                    0.5 * (ends[0].0 + ends[1].0) + 0.125 * width * (ends[0].1 - ends[1].1);
                (interpolated - middle.0).abs()
            })
            .fold(0.0, f64::max);
        self.errors.push(error);
        if error <= TARGET || self.depth() == MOST_HALVINGS {
            return false;
        }
        let mut finer = Vec::with_capacity(2 * self.samples.len() - 1);
        for (node, middle) in self.samples.iter().zip(middles) {
            finer.extend([*node, *middle]);
        }
        finer.extend(self.samples.last());
        self.samples = finer;
        true
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
                let edge = crate::root::last_inside(smallest, FAR, |y| match everything(y) {
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

struct SidePlan<'a> {
    at_zero: f32,
    far: f32,
    pieces: Vec<Piece<'a>>,
}

/// A grid over distances from `nearest` to `farthest`, a power of two, from `origin`; not sampled yet.
fn graded<'a>(
    curve: &'a Curve<'a>,
    start: f64,
    origin: f64,
    farthest: f64,
    nearest: f64,
) -> Piece<'a> {
    // A power of two as well: the product with it is exact.
    let scale = (2f64.powi(TOP_EXPONENT) / farthest) as f32;
    let lowest = (nearest * f64::from(scale)).log2().floor() as i32;
    let octaves = (lowest.max(-125)..TOP_EXPONENT)
        .map(|exponent| Octave { exponent, samples: Vec::new(), errors: Vec::new() })
        .collect();
    Piece {
        start: start as f32,
        origin: origin as f32,
        scale,
        content: Content::Graded(curve, octaves),
    }
}

fn constant<'a>(start: f64, value: f64) -> Piece<'a> {
    Piece { start: start as f32, origin: 0.0, scale: 1.0, content: Content::Constant(value as f32) }
}

/// Below this distance from its origin a bound differs from its value there by less than counts.
fn nearest_distance(origin: f64) -> f64 {
    (origin * f64::from(f32::EPSILON) * 0.25).max(2f64.powi(-40))
}

/// The natural pieces of a curve over all `y`.
fn pieces_of<'a>(curve: &'a Curve<'a>, side: Side) -> Result<Vec<Piece<'a>>> {
    if let Curve::Constant(ratio) = curve {
        // The minimum with y makes any value from FAR on say that everything is allowed.
        let value = if side == Side::Upper { ratio.ln().min(FAR) } else { *ratio };
        return Ok(vec![constant(0.0, value)]);
    }
    // Where f grows faster than linearly, `lower` still moves at the smallest floats.
    let smallest = f64::from(f32::from_bits(1));
    let edge = curve.saturation(side)?;
    Ok(match (side, edge) {
        (Side::Upper, None) => vec![graded(curve, 0.0, 0.0, FAR, nearest_distance(0.0))],
        // The minimum with y makes a constant say that everything is allowed.
        (Side::Upper, Some(edge)) if edge >= FAR => vec![constant(0.0, FAR)],
        (Side::Upper, Some(edge)) => {
            let edge = round_up(edge);
            vec![constant(0.0, FAR), graded(curve, edge, edge, FAR, nearest_distance(edge))]
        }
        (Side::Lower, None) => vec![graded(curve, 0.0, 0.0, FAR, smallest)],
        (Side::Lower, Some(0.0)) => vec![constant(0.0, 0.0)],
        (Side::Lower, Some(edge)) => {
            let edge = round_up(edge);
            // Of this power of two, both the left part and the right part, lengthened to a power of
            // two, lie in (0, edge].
            let middle = 2f64.powi((0.75 * edge).log2().floor() as i32);
            let farthest = 2f64.powi((edge - middle).log2().ceil() as i32);
            vec![
                graded(curve, 0.0, 0.0, middle, smallest),
                graded(curve, middle, edge, farthest, nearest_distance(edge)),
                constant(edge, 0.0),
            ]
        }
    })
}

/// The float32 at or above a value.
fn round_up(value: f64) -> f64 {
    let near = value as f32;
    f64::from(if f64::from(near) < value { near.next_up() } else { near })
}

impl Piece<'_> {
    /// Restricts it to `start <= y < end`: octaves that no such `y` falls in are left out.
    fn restrict(&mut self, start: f32, end: f32) {
        self.start = self.start.max(start);
        let (origin, scale) = (f64::from(self.origin), f64::from(self.scale));
        let distances =
            [f64::from(self.start), f64::from(end).min(FAR)].map(|y| (y - origin).abs() * scale);
        let (low, high) = (distances[0].min(distances[1]), distances[0].max(distances[1]));
        if let Content::Graded(_, octaves) = &mut self.content {
            let top = octaves.len() - 1;
            let mut index = 0;
            octaves.retain(|octave| {
                let (bottom, ceiling) =
                    (2f64.powi(octave.exponent), 2f64.powi(octave.exponent + 1));
                let reached = ceiling > low && bottom <= high;
                // The ends are clamped to, so one octave always stays.
                let keep = reached || (index == top && high < 2f64.powi(-125));
                index += 1;
                keep
            });
        }
    }

    fn y(&self, z: f64) -> f64 {
        let distance = z / f64::from(self.scale);
        let origin = f64::from(self.origin);
        if self.towards_zero() { origin - distance } else { origin + distance }
    }

    fn towards_zero(&self) -> bool {
        self.origin > self.start
    }

    /// Samples its curve, halving cells until the cubic meets the target.
    fn sample(&mut self, side: Side) -> Result<()> {
        let (scale, sign) = (f64::from(self.scale), if self.towards_zero() { -1.0 } else { 1.0 });
        let places: Vec<f64> = match &self.content {
            Content::Constant(_) => return Ok(()),
            Content::Graded(_, octaves) => octaves
                .iter()
                .map(|octave| octave.exponent)
                .chain(octaves.last().map(|octave| octave.exponent + 1))
                .map(|exponent| 2f64.powi(exponent))
                .collect(),
        };
        let sample = |curve: &Curve<'_>, ys: &[f64]| -> Result<Vec<(f64, f64)>> {
            let sampled = curve.sample(side, ys)?;
            Ok(sampled.into_iter().map(|(value, slope)| (value, sign * slope / scale)).collect())
        };
        let ys: Vec<f64> = places.iter().map(|&z| self.y(z)).collect();
        let (origin, towards_zero) = (f64::from(self.origin), self.towards_zero());
        let y_of = |z: f64| {
            let distance = z / scale;
            if towards_zero { origin - distance } else { origin + distance }
        };
        let Content::Graded(curve, octaves) = &mut self.content else { return Ok(()) };
        let ends = sample(curve, &ys)?;
        for (octave, ends) in octaves.iter_mut().zip(ends.windows(2)) {
            octave.samples = ends.to_vec();
        }
        if origin == 0.0 && self.start == 0.0 {
            drop_settled_octaves(octaves);
        }
        let mut pending: Vec<&mut Octave> = octaves.iter_mut().collect();
        while !pending.is_empty() {
            let ys: Vec<f64> =
                pending.iter().flat_map(|octave| octave.middles()).map(y_of).collect();
            let mut middles = sample(curve, &ys)?.into_iter();
            pending.retain_mut(|octave| {
                let own: Vec<_> = middles.by_ref().take(octave.samples.len() - 1).collect();
                octave.refine(&own)
            });
        }
        Ok(())
    }
}

impl<'a> SidePlan<'a> {
    fn sampled(side: Side, stretches: &'a Stretches<'a>, exact: &Exact<'_>) -> Result<Self> {
        let mut pieces = Vec::new();
        for (i, (start, curve)) in stretches.iter().enumerate() {
            let start = *start as f32;
            let end = stretches.get(i + 1).map_or(f32::INFINITY, |next| next.0 as f32);
            let natural = pieces_of(curve, side)?;
            let starts: Vec<f32> = natural.iter().map(|piece| piece.start).collect();
            for (k, mut piece) in natural.into_iter().enumerate() {
                let piece_end = starts.get(k + 1).copied().unwrap_or(f32::INFINITY).min(end);
                if piece.start.max(start) < piece_end {
                    piece.restrict(start, piece_end);
                    pieces.push(piece);
                }
            }
        }
        if pieces.len() > PIECES {
            return Err(Error::Argument {
                argument: "region",
                value: format!("one with {} smooth pieces", pieces.len()),
                allowed: "of at most 6 smooth pieces a side to be tabulated",
            });
        }
        for piece in &mut pieces {
            piece.sample(side)?;
        }
        let (lower, upper) = exact(&[0.0, f64::NEG_INFINITY])?;
        let (at_zero, far) = match side {
            Side::Upper => (0.0, upper[1]),
            Side::Lower => (lower[0].exp(), lower[1].exp()),
        };
        Ok(Self { at_zero: at_zero as f32, far: far as f32, pieces })
    }

    /// Three `y` in every cell, and the ends of the pieces.
    fn samples_in_every_cell(&self, tolerance: f64) -> Vec<f32> {
        let mut ys = vec![0.0, f32::from_bits(1), (FAR as f32).next_down()];
        for (k, piece) in self.pieces.iter().enumerate() {
            let end = self.pieces.get(k + 1).map_or(FAR, |next| f64::from(next.start));
            ys.extend([piece.start, piece.start.next_up(), piece.start.next_down().max(0.0)]);
            let Content::Graded(_, octaves) = &piece.content else { continue };
            for octave in octaves {
                let cells = 1_u32 << octave.halvings(tolerance);
                for quarter in (0..4 * cells).filter(|quarter| quarter % 4 != 0) {
                    let share = f64::from(quarter) / f64::from(4 * cells);
                    let y = piece.y(2f64.powi(octave.exponent) * (1.0 + share));
                    if (f64::from(piece.start)..end).contains(&y) {
                        ys.push(y as f32);
                    }
                }
            }
        }
        ys
    }
}

/// Near `y = 0` most bounds reach their limit long before the smallest float: the octaves below that
/// are left out, and the lookup clamps into the first one that is kept.
fn drop_settled_octaves(octaves: &mut Vec<Octave>) {
    let limit = octaves[0].samples[0].0;
    let settled =
        octaves.iter().take_while(|octave| (octave.samples[1].0 - limit).abs() < 1e-10).count();
    octaves.drain(..settled.min(octaves.len() - 1));
}

/// Writes the image of both sides.
fn image(sides: &[SidePlan<'_>; 2], tolerance: f64) -> Vec<u32> {
    let entry_count: usize = sides
        .iter()
        .flat_map(|side| &side.pieces)
        .map(|piece| match &piece.content {
            Content::Constant(_) => 1,
            Content::Graded(_, octaves) => octaves.len(),
        })
        .sum();
    let nodes_start = (ENTRIES + entry_count).next_multiple_of(2);
    let mut words = vec![0_u32; nodes_start];
    let mut entry = ENTRIES;
    for (side, plan) in sides.iter().enumerate() {
        let header = SIDE_WORDS * side;
        words[header + 36] = plan.at_zero.to_bits();
        words[header + 37] = plan.far.to_bits();
        words[header..header + PIECES].fill(f32::INFINITY.to_bits());
        for (k, piece) in plan.pieces.iter().enumerate() {
            let at = header + k;
            words[at] = piece.start.to_bits();
            words[at + 6] = piece.origin.to_bits();
            words[at + 12] = piece.scale.to_bits();
            let push_node = |words: &mut Vec<u32>, value: f64, slope: f64| {
                words.extend([(value as f32).to_bits(), (slope as f32).to_bits()]);
            };
            match &piece.content {
                Content::Constant(value) => {
                    words[at + 18] = (entry as u32).wrapping_sub(127);
                    words[at + 24] = 1f32.to_bits();
                    words[at + 30] = 1f32.to_bits();
                    words[entry] = (words.len() as u32 / 2) << 4;
                    entry += 1;
                    for _ in 0..2 {
                        push_node(&mut words, f64::from(*value), 0.0);
                    }
                }
                Content::Graded(_, octaves) => {
                    let biased = (octaves[0].exponent + 127) as u32;
                    words[at + 18] = (entry as u32).wrapping_sub(biased);
                    words[at + 24] = biased << 23;
                    words[at + 30] = (biased + octaves.len() as u32) * (1 << 23) - 1;
                    for octave in octaves {
                        let halvings = octave.halvings(tolerance);
                        words[entry] = (words.len() as u32 / 2) << 4 | halvings;
                        entry += 1;
                        let stride = 1 << (octave.depth() - halvings.min(octave.depth()));
                        // The last node of an octave is the first of the next.
                        for (value, slope) in
                            octave.samples[..octave.samples.len() - 1].iter().step_by(stride)
                        {
                            push_node(&mut words, *value, *slope);
                        }
                    }
                    if let Some((value, slope)) = octaves.last().and_then(|o| o.samples.last()) {
                        push_node(&mut words, *value, *slope);
                    }
                }
            }
        }
    }
    words
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
        table.check_image()?;
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

    /// Every index that a lookup can form must stay inside the image, whatever wrote it.
    fn check_image(&self) -> Result<()> {
        let refuse = |reason: &str| Error::TableFile { reason: reason.to_owned() };
        let words = &self.words;
        if words.len() < ENTRIES {
            return Err(refuse("its image has no room for the header"));
        }
        for header in [0, SIDE_WORDS] {
            // The lookup counts the starts at or below y, so they have to ascend.
            let starts = words[header..header + PIECES].iter().map(|&word| f32::from_bits(word));
            let ascending = starts
                .clone()
                .zip(starts.clone().skip(1))
                .all(|(a, b)| a < b || (a == f32::INFINITY && b == f32::INFINITY));
            if words[header] != 0 || !ascending {
                return Err(refuse("the pieces of its image do not follow each other"));
            }
        }
        for at in (0..PIECES).chain(SIDE_WORDS..SIDE_WORDS + PIECES) {
            if words[at] == f32::INFINITY.to_bits() {
                continue;
            }
            let (first, last) = (words[at + 24], words[at + 30]);
            if first > last || last > f32::MAX.to_bits() {
                return Err(refuse("its image has a piece without a grid"));
            }
            for exponent in first >> 23..=last >> 23 {
                let entry = words[at + 18].wrapping_add(exponent) as usize;
                let inside = (ENTRIES..words.len()).contains(&entry)
                    && words[entry] & 15 <= 15.min(exponent)
                    && words[entry] & 15 <= MOST_HALVINGS
                    && 2 * ((words[entry] >> 4) as usize + (1 << (words[entry] & 15))) + 1
                        < words.len();
                if !inside {
                    return Err(refuse("its image points outside itself"));
                }
            }
        }
        Ok(())
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
        table.errors_between(0, count, count, &|logp| Ok(exact_bounds(band, logp))).unwrap()
    }

    /// The promise of a table, and what a cell-wise sample may not see of it.
    const TARGET: f64 = 1e-6;

    #[test]
    fn tables_hold_the_target_for_every_built_in() {
        for spec in [
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
            "alpha:0.5",
            "alpha:4",
            "renyi:0.5",
            "renyi:2",
            "vajda:1",
            "vajda:1.5",
            "vajda:4",
            "bwcs:0.3",
            "hockey-stick:1",
            "hockey-stick:1.2",
            "hockey-stick:4",
        ] {
            for delta in [1e-4, 1e-3, 0.01, 0.05, 0.3, 1.0] {
                let band = band(spec, delta, delta);
                let table = BandTable::of_band(&band).unwrap();
                assert!(table.nbytes() <= MOST_BYTES, "{spec} {delta}: {}", table.nbytes());
                let sampled = table.max_error();
                let found = found(&table, &band, 20_000);
                for error in [sampled, found] {
                    let worst = error.log_upper.max(error.lower);
                    assert!(worst <= TARGET, "{spec} {delta}: {error:?}");
                }
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
        for (place, word) in [(18, 1 << 20), (24, u32::MAX), (ENTRIES, u32::MAX), (30, u32::MAX)] {
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
            crate::root::last_inside(1e-9, FAR, |y| kl.log_bounds(-y).1 <= ratio.ln()).at
        };
        let (low, high) = (crosses(1.28), crosses(10.0));
        let exact = |logp: &[f64]| {
            let (lower, upper) = exact_bounds(&kl, logp);
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
            let error = table.errors_at(&y, &|logp| Ok(exact_bounds(&band, logp))).unwrap();
            prop_assert!(error.log_upper <= TARGET && error.lower <= TARGET, "{:?}", error);
        }
    }
}
