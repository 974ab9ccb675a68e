//! Octaves of a grid, halved until a cubic meets the target in each cell.

use super::node::{Ends, Sample, extended, rounding};
use crate::image::MAX_HALVINGS;

/// Interpolation error aimed at, in f64; storing and evaluating in float32 adds its own.
pub(super) const TARGET: f64 = 1.5e-7;

/// A smooth curve's error falls by 16 with every halving of its cells, next to a jump of the second
/// derivative by 4, of the first by 2.
const SLOWEST_DECAY: f64 = 6.0;

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

    pub(super) fn bottom(&self) -> f64 {
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
    pub(super) fn places(&self, ends: &Ends) -> Vec<f64> {
        let middles = self.cells(self.finest()).map(|[a, b]| 0.5 * (a.z + b.z));
        let parts = self.cells(self.finest()).filter_map(|cell| {
            let [a, b] = ends.clip(cell)?;
            (b.z - a.z < cell[1].z - cell[0].z).then_some(0.5 * (a.z + b.z))
        });
        middles.chain(parts).collect()
    }

    /// Takes the samples at its [`Self::places`]; returns whether cells have to be halved again.
    pub(super) fn refine(&mut self, sampled: &[Sample], ends: &Ends) -> bool {
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
    pub(super) fn stalls(&self) -> bool {
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
