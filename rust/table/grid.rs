//! The grid of a piece: octaves of the distance from an origin, divided until a cubic meets the target.

use super::curve::Curve;
use super::node::{Ends, Sample};
use super::octave::Octave;
use crate::band::Side;
use crate::error::Result;

/// How narrow a stretch a kink is narrowed down to, relative to its distance from the origin: wider
/// than the differences that a Python function's slopes are made of, and so narrow that to extrapolate
/// over three of them is exact for float32.
const KINK_WIDTH: f64 = 1.0 / 4096.0;
/// Misfits below this, relative to a bound above 1, are not told from rounding when a kink is narrowed.
const KINK_FLOOR: f64 = 1e-12;
/// The exponent that the far end of a piece is scaled to: the smallest float still has a normal `z`.
const TOP_EXPONENT: i32 = 31;

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
