//! The grid of a piece: octaves of the distance from an origin, divided until a cubic meets the target.

use super::curve::Curve;
use crate::LOG_RATIO_LIMIT;
use crate::band::Side;
use crate::error::Result;
use crate::image::MAX_HALVINGS;

/// Interpolation error aimed at, in f64; storing and evaluating in float32 adds its own.
pub(super) const TARGET: f64 = 1.5e-7;
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

/// A value and its derivative in `z`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sample {
    pub(super) z: f64,
    pub(super) value: f64,
    pub(super) slope: f64,
}

impl Sample {
    /// The cubic through two samples, at any `z`.
    pub(super) fn cubic(self, other: Self, z: f64) -> Self {
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
pub(super) struct Ends {
    pub(super) low: Option<Sample>,
    pub(super) high: Option<Sample>,
}

impl Ends {
    /// The part of a cell that lies in the piece.
    pub(super) fn clip(&self, cell: [Sample; 2]) -> Option<[Sample; 2]> {
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
pub(super) struct Grid<'a> {
    pub(super) curve: &'a Curve<'a>,
    pub(super) origin: f64,
    /// A power of two: the product with it is exact.
    pub(super) scale: f64,
    /// The piece, in `z`.
    pub(super) within: (f64, f64),
    /// The origin is the greatest `y`.
    pub(super) towards_zero: bool,
    pub(super) ends: Ends,
    /// From the smallest up.
    pub(super) octaves: Vec<Octave>,
}

/// An octave of `z` with samples at its nodes.
pub(super) struct Octave {
    /// The octave is `[2^exponent, 2^(exponent+1))` in `z`.
    pub(super) exponent: i32,
    /// `2^n + 1` samples after `n` levels were looked at, ends included. Outside the piece they mean
    /// nothing but their `z`.
    pub(super) samples: Vec<Sample>,
    /// `errors[b]`: interpolation error in the middle of the worst of `2^b` cells.
    pub(super) errors: Vec<f64>,
    /// The cell that the last of these errors is from.
    pub(super) worst: [f64; 2],
}

impl Octave {
    pub(super) fn new(exponent: i32) -> Self {
        Self { exponent, samples: Vec::new(), errors: Vec::new(), worst: [0.0; 2] }
    }

    fn bottom(&self) -> f64 {
        2f64.powi(self.exponent)
    }

    /// The exponent in the bits of a float32.
    pub(super) fn biased_exponent(&self) -> u32 {
        (self.exponent + 127) as u32
    }

    /// How often to halve it for a tolerance, as far as was sampled.
    pub(super) fn halvings(&self, tolerance: f64) -> u32 {
        let enough = self.errors.iter().position(|&error| error <= tolerance);
        enough.map_or(MAX_HALVINGS, |b| b as u32)
    }

    /// Its cells after so many halvings.
    pub(super) fn cells(&self, halvings: u32) -> impl Iterator<Item = [Sample; 2]> + '_ {
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
    pub(super) fn nodes(&self, halvings: u32, ends: &Ends) -> Vec<Sample> {
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
    pub(super) fn new(curve: &'a Curve<'a>, origin: f64, from: f64, to: f64) -> Self {
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

    pub(super) fn y(&self, z: f64) -> f64 {
        let distance = z / self.scale;
        if self.towards_zero { self.origin - distance } else { self.origin + distance }
    }

    pub(super) fn z(&self, y: f64) -> f64 {
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
    pub(super) fn fill(&mut self, side: Side, mind_kinks: bool) -> Result<Option<Kink>> {
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
pub(super) struct Kink {
    pub(super) before: f64,
    pub(super) at: f64,
    pub(super) after: f64,
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

/// Near `y = 0` most bounds reach their limit long before the smallest float: the octaves below that
/// are left out, and the lookup clamps into the first one that is kept.
fn drop_settled_octaves(octaves: &mut Vec<Octave>) {
    let limit = octaves[0].samples[0].value;
    let settled =
        octaves.iter().take_while(|octave| (octave.samples[1].value - limit).abs() < 1e-10).count();
    octaves.drain(..settled.min(octaves.len() - 1));
}
