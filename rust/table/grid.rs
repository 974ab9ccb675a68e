//! The grid of a piece: octaves of the distance from an origin, cut at kinks.

use super::curve::Curve;
use super::node::{Ends, Node};
use super::octave::Octave;
use crate::band::Side;
use crate::band::root::last_inside;
use crate::error::Result;

/// Width of the interval that a kink is narrowed down to, relative to its distance from the origin. It is
/// wider than the differences that give a Python function its slopes. It is so narrow that extrapolation over
/// three such intervals is exact in float32.
const KINK_WIDTH: f64 = 1.0 / 4096.0;
/// Error below which the search for a kink sees rounding alone, relative to a bound above 1.
const KINK_FLOOR: f64 = 1e-12;
/// Places at which each round of the search for a kink samples the curve, in one call.
const KINK_PLACES: usize = 33;
/// Exponent of a piece's max `z`. It is so large that the min float32 has a normal `z`.
const MAX_EXPONENT: i32 = 31;

/// A piece of a curve, in octaves of the distance from an origin.
pub(super) struct Grid<'a> {
    pub(super) curve: &'a Curve<'a>,
    pub(super) origin: f64,
    /// A power of two, so that products with it are exact.
    pub(super) scale: f64,
    /// Min and max `z` of the piece.
    range: (f64, f64),
    /// True if `y` falls as `z` rises, because the origin is the end of the piece.
    descending: bool,
    pub(super) ends: Ends,
    /// In ascending order.
    pub(super) octaves: Vec<Octave>,
}

impl<'a> Grid<'a> {
    /// A grid over `from <= y < to`, graded from `from`, from `to` or from 0, and still without nodes.
    pub(super) fn new(curve: &'a Curve<'a>, origin: f64, from: f64, to: f64) -> Self {
        let descending = origin >= to;
        let (a, b) = ((from - origin).abs(), (to - origin).abs());
        let (min, max) = (a.min(b), a.max(b));
        let max_exponent = max.log2().ceil() as i32;
        let end = MAX_EXPONENT.min(127 + max_exponent);
        let scale = 2f64.powi(end - max_exponent);
        let range = (min * scale, max * scale);
        let first = min.max(min_distance(origin)) * scale;
        let first = (first.log2().floor() as i32).clamp(-125, end - 1);
        let octaves = (first..end).map(Octave::new).collect();
        Self { curve, origin, scale, range, descending, ends: Ends::default(), octaves }
    }

    pub(super) fn y(&self, z: f64) -> f64 {
        let distance = z / self.scale;
        if self.descending { self.origin - distance } else { self.origin + distance }
    }

    pub(super) fn z(&self, y: f64) -> f64 {
        (y - self.origin).abs() * self.scale
    }

    /// Min and max `y` of the piece.
    pub(super) fn y_range(&self) -> (f64, f64) {
        let (a, b) = (self.y(self.range.0), self.y(self.range.1));
        (a.min(b), a.max(b))
    }

    /// Nodes of the curve. Outside the piece only their `z` is valid.
    fn nodes_at(&self, side: Side, zs: &[f64]) -> Result<Vec<Node>> {
        let slope_in_z = if self.descending { -1.0 } else { 1.0 } / self.scale;
        let ys: Vec<f64> = zs.iter().map(|z| self.y(z.clamp(self.range.0, self.range.1))).collect();
        let sampled = self.curve.sample(side, &ys)?;
        Ok(zs
            .iter()
            .zip(sampled)
            .map(|(&z, (value, slope))| Node { z, value, slope: slope * slope_in_z })
            .collect())
    }

    /// Samples the curve and halves cells until the cubic meets the target.
    ///
    /// Returns early with the first kink found if the piece may be cut there.
    pub(super) fn fill(&mut self, side: Side, cut_at_kinks: bool) -> Result<Option<Kink>> {
        let (Some(first), Some(last)) = (self.octaves.first(), self.octaves.last()) else {
            return Ok(None);
        };
        let (start, end) = (first.start(), 2.0 * last.start());
        let (low, high) = self.range;
        let ends = self.nodes_at(side, &[low, high])?;
        self.ends =
            Ends { low: (low > start).then_some(ends[0]), high: (high < end).then_some(ends[1]) };
        let powers: Vec<f64> = self.octaves.iter().map(Octave::start).chain([end]).collect();
        let nodes = self.nodes_at(side, &powers)?;
        for (octave, ends) in self.octaves.iter_mut().zip(nodes.windows(2)) {
            octave.nodes = ends.to_vec();
        }
        if low == 0.0 && self.origin == 0.0 {
            drop_settled_octaves(&mut self.octaves);
        }
        let mut pending: Vec<usize> = (0..self.octaves.len()).collect();
        while !pending.is_empty() {
            // All octaves share a call of the curve, because a call may run Python.
            let mut zs = Vec::new();
            let mut counts = Vec::with_capacity(pending.len());
            for &index in &pending {
                let own = self.octaves[index].next_z(&self.ends);
                counts.push(own.len());
                zs.extend(own);
            }
            let nodes = self.nodes_at(side, &zs)?;
            let mut rest = &nodes[..];
            let mut unfinished = Vec::new();
            for (&index, &count) in pending.iter().zip(&counts) {
                let (own, others) = rest.split_at(count);
                rest = others;
                if self.octaves[index].halve(own, &self.ends) {
                    unfinished.push(index);
                }
            }
            if cut_at_kinks {
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

    /// The kink inside a cell, or None if the curve is smooth there.
    fn kink_in(&self, side: Side, cell: [f64; 2]) -> Result<Option<Kink>> {
        let [mut low, mut high] = cell;
        while high - low > KINK_WIDTH * high {
            let step = (high - low) / (KINK_PLACES - 1) as f64;
            let zs: Vec<f64> = (0..KINK_PLACES).map(|i| low + step * i as f64).collect();
            let nodes = self.nodes_at(side, &zs)?;
            let (mut max_error, mut at) = (0.0, 0);
            for i in 1..KINK_PLACES - 1 {
                let error = nodes[i].cubic_error(nodes[i - 1], nodes[i + 1]);
                if error > max_error {
                    (max_error, at) = (error, i);
                }
            }
            if at == 0 || max_error <= KINK_FLOOR * nodes[at].value.abs().max(1.0) {
                return Ok(None);
            }
            (low, high) = (zs[at - 1], zs[at + 1]);
        }
        let width = high - low;
        (low, high) = (low - width, high + width);
        // A singular end is no kink to cut at, because the next piece would have the same end.
        if low - width <= self.range.0 || high + width >= self.range.1 {
            return Ok(None);
        }
        // The kink is where the cubics of its two sides meet. Nodes next to it may have either slope.
        let around = self.nodes_at(side, &[low - width, low, high, high + width])?;
        let gap =
            |z: f64| around[0].cubic(around[1], z).value - around[2].cubic(around[3], z).value;
        let at = if gap(low) * gap(high) < 0.0 {
            let above = gap(low) > 0.0;
            last_inside(low, high, |z| (gap(z) > 0.0) == above).at
        } else {
            0.5 * (low + high) // a jump of the second derivative: both sides agree within the target
        };
        let ends = [self.y(low), self.y(high)];
        Ok(Some(Kink { before: ends[0].min(ends[1]), at: self.y(at), after: ends[0].max(ends[1]) }))
    }
}

/// The `y` of a kink, and the nearest `y` on both sides whose slope is that of their side.
pub(super) struct Kink {
    pub(super) before: f64,
    pub(super) at: f64,
    pub(super) after: f64,
}

/// Distance from an origin below which a bound equals its value there within the target.
fn min_distance(origin: f64) -> f64 {
    if origin == 0.0 {
        // `lower` still changes at the min float32 if f grows faster than linearly.
        f64::from(f32::from_bits(1))
    } else {
        origin * f64::from(f32::EPSILON) * 0.25
    }
}

/// Drops the octaves next to `y = 0` over which the bound is at its limit. A lookup clamps to the first
/// octave that is kept.
fn drop_settled_octaves(octaves: &mut Vec<Octave>) {
    let limit = octaves[0].nodes[0].value;
    let settled =
        octaves.iter().take_while(|octave| (octave.nodes[1].value - limit).abs() < 1e-10).count();
    octaves.drain(..settled.min(octaves.len() - 1));
}
