//! Octaves of a grid, whose cells are halved until the cubic meets the target.

use super::node::{Ends, Node, extrapolated, rounding_error};
use crate::image::MAX_HALVINGS;

/// Target for the interpolation error in f64. Storing and evaluating in float32 add to it.
pub(super) const TARGET: f64 = 1.5e-7;
/// Ratio of a cell's errors before and after halving that separates smooth curves (16) from jumps of the
/// second (4) and the first derivative (2).
const MIN_DECAY: f64 = 6.0;

/// An octave `[2^exponent, 2^(exponent+1))` of `z`.
pub(super) struct Octave {
    exponent: i32,
    /// `2^n + 1` nodes after `n` halvings, both ends included. Outside the piece only their `z` is valid.
    pub(super) nodes: Vec<Node>,
    /// `errors[b]`: max interpolation error of `2^b` cells.
    errors: Vec<f64>,
    /// Ends of the cell with the last of [`Self::errors`].
    pub(super) worst: [f64; 2],
}

impl Octave {
    pub(super) fn new(exponent: i32) -> Self {
        Self { exponent, nodes: Vec::new(), errors: Vec::new(), worst: [0.0; 2] }
    }

    pub(super) fn start(&self) -> f64 {
        2f64.powi(self.exponent)
    }

    /// Exponent in the bits of a float32.
    pub(super) fn biased_exponent(&self) -> u32 {
        (self.exponent + 127) as u32
    }

    /// Halvings that meet a tolerance, or else the max.
    pub(super) fn halvings(&self, tolerance: f64) -> u32 {
        let enough = self.errors.iter().position(|&error| error <= tolerance);
        enough.map_or(MAX_HALVINGS, |b| b as u32)
    }

    /// The cells after so many halvings.
    pub(super) fn cells(&self, halvings: u32) -> impl Iterator<Item = [Node; 2]> + '_ {
        let stride = (self.nodes.len() - 1) >> halvings;
        (0..1 << halvings).map(move |k| [self.nodes[k * stride], self.nodes[(k + 1) * stride]])
    }

    /// The cells after all halvings so far.
    fn finest_cells(&self) -> impl Iterator<Item = [Node; 2]> + '_ {
        self.cells((self.nodes.len() - 1).ilog2())
    }

    /// The `z` that the next halving needs nodes at: the middle of each cell, then the middle of each part of
    /// a cell that an end of the piece cuts.
    pub(super) fn next_z(&self, ends: &Ends) -> Vec<f64> {
        let middles = self.finest_cells().map(|[a, b]| 0.5 * (a.z + b.z));
        let parts = self.finest_cells().filter_map(|cell| {
            let [a, b] = ends.clip(cell)?;
            (b.z - a.z < cell[1].z - cell[0].z).then_some(0.5 * (a.z + b.z))
        });
        middles.chain(parts).collect()
    }

    /// Halves the cells by nodes at [`Self::next_z`]. Returns true if they have to be halved again.
    pub(super) fn halve(&mut self, nodes: &[Node], ends: &Ends) -> bool {
        let (middles, parts) = nodes.split_at(self.nodes.len() - 1);
        let mut parts = parts.iter();
        let (mut max_error, mut worst) = (0.0, self.worst);
        let mut finer = Vec::with_capacity(2 * self.nodes.len() - 1);
        for (cell, middle) in self.finest_cells().zip(middles) {
            finer.extend([cell[0], *middle]);
            let Some([a, b]) = ends.clip(cell) else { continue };
            let whole = b.z - a.z >= cell[1].z - cell[0].z;
            let Some(checked) = (if whole { Some(middle) } else { parts.next() }) else { continue };
            let [left, right] = extrapolated([a, b], cell);
            let error = checked.cubic_error(a, b) + rounding_error(left.value, right.value);
            if error > max_error {
                max_error = error;
                worst = [a.z, b.z];
            }
        }
        finer.extend(self.nodes.last());
        self.worst = worst;
        self.nodes = finer;
        self.errors.push(max_error);
        max_error > TARGET && self.errors.len() <= MAX_HALVINGS as usize
    }

    /// True if the error falls too slowly for a smooth curve.
    pub(super) fn stalls(&self) -> bool {
        match self.errors[..] {
            [.., before, last] => {
                self.errors.len() > 4 && last > TARGET && last > before / MIN_DECAY
            }
            _ => false,
        }
    }

    /// The nodes of a table after so many halvings. Nodes outside the piece are extrapolated from the inner
    /// part of their cell.
    pub(super) fn nodes_of(&self, halvings: u32, ends: &Ends) -> Vec<Node> {
        let mut nodes: Vec<Node> = self.cells(halvings).map(|[a, _]| a).collect();
        nodes.extend(self.nodes.last());
        for (k, cell) in self.cells(halvings).enumerate() {
            let Some([a, b]) = ends.clip(cell) else { continue };
            let [left, right] = extrapolated([a, b], cell);
            if !ends.contain(left.z) {
                nodes[k] = left;
            }
            if !ends.contain(right.z) {
                nodes[k + 1] = right;
            }
        }
        // No lookup reads a cell outside the piece, and its nodes belong to another curve.
        let unread: Vec<bool> =
            self.cells(halvings).map(|cell| ends.clip(cell).is_none()).collect();
        for (k, node) in nodes.iter_mut().enumerate() {
            if (k == 0 || unread[k - 1]) && unread.get(k).is_none_or(|&unread| unread) {
                *node = Node { z: node.z, value: 0.0, slope: 0.0 };
            }
        }
        nodes
    }
}
