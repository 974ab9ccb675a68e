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
use crate::divergence::Divergence;
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

/// The bounds of a [`Band`] with fixed radii, tabulated.
#[derive(Debug, Clone, PartialEq)]
pub struct BandTable {
    words: Vec<u32>,
    band: Band,
    max_error: MaxError,
    verification: Verification,
}

impl BandTable {
    /// Tabulates a band.
    #[must_use]
    pub fn build(band: &Band) -> Self {
        let mut tolerance = TARGET;
        let mut sides = [plan_upper(band), plan_lower(band)].map(|plan| plan.sampled(band));
        let words = loop {
            let words = image(&sides, tolerance);
            if 4 * words.len() <= MOST_BYTES {
                break words;
            }
            tolerance *= 1.5;
        };
        let mut table = Self {
            words,
            band: band.clone(),
            max_error: MaxError::default(),
            verification: Verification::Sampled,
        };
        table.max_error = sides
            .iter_mut()
            .map(|side| table.check(&side.samples_in_every_cell(tolerance)))
            .fold(MaxError::default(), MaxError::merge);
        table
    }

    /// `log_upper` at `y = -logp >= 0`.
    #[must_use]
    pub fn log_upper(&self, y: f32) -> f32 {
        let value = self.value_at(0, y);
        // Never outside the simplex; a NaN must not be lost in a minimum.
        if value > y { y } else { value }
    }

    /// `lower`, the ratio, at `y = -logp >= 0`.
    #[must_use]
    pub fn lower(&self, y: f32) -> f32 {
        let value = self.value_at(SIDE_WORDS, y);
        // A cubic may dip below 0 by its error where the bound dies away.
        if value < 0.0 { 0.0 } else { value }
    }

    fn value_at(&self, header: usize, y: f32) -> f32 {
        let words = &self.words;
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

    /// `(log_lower, log_upper)`; `logp` above 0 is read as 0.
    #[must_use]
    pub fn log_bounds(&self, logp: f64) -> (f64, f64) {
        // Not f32::max, which would turn a NaN into 0.
        let y = if logp > 0.0 { 0.0 } else { -logp as f32 };
        (f64::from(self.lower(y)).ln(), f64::from(self.log_upper(y)))
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

    /// The band that was tabulated.
    #[must_use]
    pub fn band(&self) -> &Band {
        &self.band
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

    /// Compares with the solver at `count` float32 values of `-logp`, evenly spaced in their bit
    /// patterns over [0, 104], both ends included, and stores what was found. Calls `progress` with
    /// the number of values done; a `false` from it stops, and then nothing is stored.
    pub fn verify(
        &mut self,
        count: u64,
        mut progress: impl FnMut(u64) -> bool,
    ) -> Option<MaxError> {
        const BLOCK: u64 = 1 << 18;
        let last = u64::from(Self::GREATEST_CHECKED.to_bits());
        let count = count.clamp(2, last + 1);
        let mut worst = MaxError::default();
        let mut done = 0;
        while done < count {
            let end = (done + BLOCK).min(count);
            let found = (0..(end - done) as u32)
                .into_par_iter()
                .with_min_len(1024)
                .map(|i| {
                    let index = u128::from(done) + u128::from(i);
                    let bits = index * u128::from(last) / u128::from(count - 1);
                    self.error_at(f32::from_bits(bits as u32))
                })
                .reduce(MaxError::default, MaxError::merge);
            worst = worst.merge(found);
            done = end;
            if !progress(done) {
                return None;
            }
        }
        self.max_error = worst;
        self.verification =
            if count == last + 1 { Verification::Exhaustive } else { Verification::Sampled };
        Some(worst)
    }

    /// The greatest `-logp` that verification looks at: e^-104 is below the smallest float32.
    pub const GREATEST_CHECKED: f32 = 104.0;

    fn check(&self, ys: &[f32]) -> MaxError {
        ys.par_iter()
            .with_min_len(256)
            .map(|&y| self.error_at(y))
            .reduce(MaxError::default, MaxError::merge)
    }

    fn error_at(&self, y: f32) -> MaxError {
        let (log_lower, log_upper) = self.band.log_bounds(-f64::from(y));
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
                if self.log_upper(y) >= CLAMP as f32 { 0.0 } else { f64::INFINITY }
            } else {
                beyond_one_ulp(self.log_upper(y), log_upper)
            },
            lower: beyond_one_ulp(self.lower(y), log_lower.exp()),
        }
    }
}

/// A stretch of `y` over which the bound is smooth, and the end its grid is graded from.
struct Piece {
    start: f32,
    origin: f32,
    scale: f32,
    content: Content,
}

enum Content {
    /// The same value all over.
    Constant(f32),
    /// Octaves from the smallest up.
    Graded(Vec<Octave>),
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
}

struct SidePlan {
    side: Side,
    at_zero: f32,
    far: f32,
    pieces: Vec<Piece>,
}

/// A grid over distances from `nearest` to `farthest`, a power of two, from `origin`; not sampled yet.
fn graded(start: f64, origin: f64, farthest: f64, nearest: f64) -> Piece {
    // A power of two as well: the product with it is exact.
    let scale = (2f64.powi(TOP_EXPONENT) / farthest) as f32;
    let lowest = (nearest * f64::from(scale)).log2().floor() as i32;
    let octaves = (lowest.max(-125)..TOP_EXPONENT)
        .map(|exponent| Octave { exponent, samples: Vec::new(), errors: Vec::new() })
        .collect();
    Piece { start: start as f32, origin: origin as f32, scale, content: Content::Graded(octaves) }
}

fn constant(start: f64, value: f64) -> Piece {
    Piece { start: start as f32, origin: 0.0, scale: 1.0, content: Content::Constant(value as f32) }
}

/// Below this distance from its origin a bound differs from its value there by less than counts.
fn nearest_distance(origin: f64) -> f64 {
    (origin * f64::from(f32::EPSILON) * 0.25).max(2f64.powi(-40))
}

fn plan_upper(band: &Band) -> SidePlan {
    let everything = |y: f64| band.log_bounds(-y).1 >= y;
    let pieces = match edge(everything) {
        None => vec![graded(0.0, 0.0, FAR, nearest_distance(0.0))],
        Some(edge) if edge >= FAR => vec![constant(0.0, FAR)],
        Some(edge) => {
            // Everything is allowed up to the edge; the minimum with y makes a constant say so.
            let edge = round_up(edge);
            vec![constant(0.0, FAR), graded(edge, edge, FAR, nearest_distance(edge))]
        }
    };
    SidePlan {
        side: Side::Upper,
        at_zero: 0.0,
        far: band.log_bounds(f64::NEG_INFINITY).1 as f32,
        pieces,
    }
}

fn plan_lower(band: &Band) -> SidePlan {
    let at_zero = band.log_bounds(0.0).0.exp();
    let everything = |y: f64| band.log_bounds(-y).0 == f64::NEG_INFINITY;
    // Where f grows faster than linearly, `lower` still moves at the smallest floats.
    let nearest = f64::from(f32::from_bits(1));
    let pieces = if everything(f64::from(f32::from_bits(1))) {
        vec![constant(0.0, 0.0)]
    } else {
        match edge(|y| !everything(y)) {
            Some(edge) if edge < FAR => {
                let edge = round_up(edge);
                // Of this power of two, both the left part and the right part, lengthened to a power of
                // two, lie in (0, edge].
                let middle = 2f64.powi((0.75 * edge).log2().floor() as i32);
                let farthest = 2f64.powi((edge - middle).log2().ceil() as i32);
                vec![
                    graded(0.0, 0.0, middle, nearest),
                    graded(middle, edge, farthest, nearest_distance(edge)),
                    constant(edge, 0.0),
                ]
            }
            _ => vec![graded(0.0, 0.0, FAR, nearest)],
        }
    };
    SidePlan {
        side: Side::Lower,
        at_zero: at_zero as f32,
        far: band.log_bounds(f64::NEG_INFINITY).0.exp() as f32,
        pieces,
    }
}

/// Where a property that holds for small `y` ends; `None` if it does not hold for the smallest.
fn edge(holds: impl Fn(f64) -> bool) -> Option<f64> {
    let smallest = f64::from(f32::from_bits(1));
    if !holds(smallest) {
        return None;
    }
    if holds(FAR) {
        return Some(FAR);
    }
    Some(crate::root::last_inside(smallest, FAR, holds).at)
}

/// The float32 at or above a value.
fn round_up(value: f64) -> f64 {
    let near = value as f32;
    f64::from(if f64::from(near) < value { near.next_up() } else { near })
}

impl SidePlan {
    /// Samples the band on all grids, halving cells until the cubic meets the target.
    fn sampled(mut self, band: &Band) -> Self {
        let side = self.side;
        for piece in &mut self.pieces {
            let (origin, scale) = (f64::from(piece.origin), f64::from(piece.scale));
            let towards_zero = piece.origin > piece.start;
            let Content::Graded(octaves) = &mut piece.content else { continue };
            let sample = |z: f64| {
                let distance = z / scale;
                let y = if towards_zero { origin - distance } else { origin + distance };
                let (value, slope) = sample_band(band, side, y);
                (value, if towards_zero { -slope } else { slope } / scale)
            };
            let ends: Vec<_> = (octaves[0].exponent..=TOP_EXPONENT)
                .into_par_iter()
                .map(|exponent| sample(2f64.powi(exponent)))
                .collect();
            for (octave, ends) in octaves.iter_mut().zip(ends.windows(2)) {
                octave.samples = ends.to_vec();
            }
            if piece.origin == 0.0 {
                drop_settled_octaves(octaves);
            }
            octaves.par_iter_mut().for_each(|octave| octave.refine(&sample));
        }
        self
    }

    /// Three `y` in every cell, and the ends of the pieces.
    fn samples_in_every_cell(&self, tolerance: f64) -> Vec<f32> {
        let mut ys = vec![0.0, f32::from_bits(1), (FAR as f32).next_down()];
        for piece in &self.pieces {
            ys.extend([piece.start, piece.start.next_up(), piece.start.next_down().max(0.0)]);
            let Content::Graded(octaves) = &piece.content else { continue };
            let towards_zero = piece.origin > piece.start;
            for octave in octaves {
                let cells = 1_u32 << octave.halvings(tolerance);
                for quarter in (0..4 * cells).filter(|quarter| quarter % 4 != 0) {
                    let z = 2f64.powi(octave.exponent)
                        * (1.0 + f64::from(quarter) / f64::from(4 * cells));
                    let distance = z / f64::from(piece.scale);
                    let origin = f64::from(piece.origin);
                    let y = if towards_zero { origin - distance } else { origin + distance };
                    if y < FAR {
                        ys.push(y as f32);
                    }
                }
            }
        }
        ys
    }
}

impl Octave {
    fn refine(&mut self, sample: &impl Fn(f64) -> (f64, f64)) {
        loop {
            let cells = self.samples.len() - 1;
            let width = 2f64.powi(self.exponent) / cells as f64;
            let middles: Vec<_> = (0..cells)
                .map(|cell| sample(2f64.powi(self.exponent) + width * (cell as f64 + 0.5)))
                .collect();
            let error = self
                .samples
                .windows(2)
                .zip(&middles)
                .map(|(ends, middle)| {
                    let interpolated =
                        0.5 * (ends[0].0 + ends[1].0) + 0.125 * width * (ends[0].1 - ends[1].1);
                    (interpolated - middle.0).abs()
                })
                .fold(0.0, f64::max);
            self.errors.push(error);
            if error <= TARGET || self.depth() == MOST_HALVINGS {
                return;
            }
            let mut finer = Vec::with_capacity(2 * cells + 1);
            for (node, middle) in self.samples.iter().zip(&middles) {
                finer.extend([*node, *middle]);
            }
            finer.extend(self.samples.last());
            self.samples = finer;
        }
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

/// The tabulated value of a side and its derivative in `y`.
fn sample_band(band: &Band, side: Side, y: f64) -> (f64, f64) {
    let log_bound = band.bound(-y, side).log_ratio;
    let slope = -band.log_slope(-y, log_bound);
    match side {
        Side::Upper => (log_bound, slope),
        Side::Lower => {
            let lower = log_bound.exp();
            (lower, if lower == 0.0 { 0.0 } else { lower * slope })
        }
    }
}

/// Writes the image of both sides.
fn image(sides: &[SidePlan; 2], tolerance: f64) -> Vec<u32> {
    let entry_count: usize = sides
        .iter()
        .flat_map(|side| &side.pieces)
        .map(|piece| match &piece.content {
            Content::Constant(_) => 1,
            Content::Graded(octaves) => octaves.len(),
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
                Content::Graded(octaves) => {
                    let biased = (octaves[0].exponent + 127) as u32;
                    words[at + 18] = (entry as u32).wrapping_sub(biased);
                    words[at + 24] = biased << 23;
                    words[at + 30] = (((TOP_EXPONENT + 127) as u32) << 23) - 1;
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
            ("divergence", self.band.divergence().spec().to_owned()),
            ("delta_low", format!("{:?}", self.band.delta(Side::Lower))),
            ("delta_high", format!("{:?}", self.band.delta(Side::Upper))),
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
        let band = Band::new(
            Divergence::parse(text("divergence")?).map_err(|error| refuse(&error.to_string()))?,
            number("delta_low")?,
            number("delta_high")?,
        )
        .map_err(|error| refuse(&error.to_string()))?;
        let table = Self {
            words: tensor
                .data()
                .chunks_exact(4)
                .map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]))
                .collect(),
            band,
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
            reason: error.to_string(),
        };
        let folder = match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        if path.is_dir() {
            return Err(fail(std::io::ErrorKind::IsADirectory.into()));
        }
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
        file.persist(path).map_err(|error| fail(error.error))?;
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
        Self::from_bytes(&bytes)
    }

    /// Every index that a lookup can form must stay inside the image, whatever wrote it.
    fn check_image(&self) -> Result<()> {
        let refuse = |reason: &str| Error::TableFile { reason: reason.to_owned() };
        let words = &self.words;
        if words.len() < ENTRIES {
            return Err(refuse("its image has no room for the header"));
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

    fn table(spec: &str, low: f64, high: f64) -> BandTable {
        BandTable::build(&Band::new(Divergence::parse(spec).unwrap(), low, high).unwrap())
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
                let mut table = table(spec, delta, delta);
                assert!(table.nbytes() <= MOST_BYTES, "{spec} {delta}: {}", table.nbytes());
                let sampled = table.max_error();
                let found = table.verify(20_000, |_| true).unwrap();
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
        assert_eq!(table.log_upper(0.0), 0.0);
        assert!((table.lower(0.0) - (-0.05_f32).exp()).abs() < 1e-7, "the limit for p -> 1");
        assert_eq!(table.log_upper(f32::INFINITY), f32::INFINITY);
        assert_eq!(table.lower(f32::INFINITY), 0.0);
        assert!(table.log_upper(f32::NAN).is_nan() && table.lower(f32::NAN).is_nan());
        assert_eq!(table.log_bounds(0.5), table.log_bounds(0.0), "above 0 is read as 0");
        assert!(table.log_bounds(f64::NAN).0.is_nan());
    }

    #[test]
    fn each_side_has_its_own_radius() {
        let (low, high) = (table("kl", 0.01, 0.2), table("kl", 0.2, 0.01));
        for y in [0.01_f32, 0.7, 3.0] {
            assert!(low.log_upper(y) > high.log_upper(y) && low.lower(y) > high.lower(y), "{y}");
        }
    }

    #[test]
    fn a_file_gives_back_the_same_table_and_the_same_bytes() {
        let mut table = table("alpha:0.5", 0.01, 0.2);
        table.verify(5000, |_| true).unwrap();
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
    fn a_verification_that_is_stopped_changes_nothing() {
        let mut table = table("kl", 0.05, 0.05);
        let before = table.clone();
        assert_eq!(table.verify(10_000, |_| false), None);
        assert_eq!(table, before);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        /// Random radii: the table stays within the target at random tokens.
        #[test]
        fn any_radius(log_delta in -9.2..0.0_f64, y in prop::collection::vec(0.0..104.0_f32, 50)) {
            let table = table("reverse-kl", log_delta.exp(), log_delta.exp());
            for y in y {
                let error = table.error_at(y);
                prop_assert!(error.log_upper <= TARGET && error.lower <= TARGET, "{} {:?}", y, error);
            }
        }
    }
}
