//! The plan of a side: its pieces, and the curve or constant of each.

use super::curve::{Curve, Exact, Stretches};
use super::grid::Grid;
use super::node::Node;
use crate::band::Side;
use crate::error::{Error, Result};
use crate::image::{FAR, MANTISSA_BITS, MAX_PIECES};

/// Floats that the build checks in each cell.
const CHECKS_A_CELL: u32 = 32;
/// Min floats that the build checks in each octave, for octaves of few cells.
const CHECKS_AN_OCTAVE: u32 = 128;
/// Floats that the build checks in a cell where the ulp of a large bound changes.
const CHECKS_AT_A_POWER_OF_TWO: u32 = 2048;
/// Golden ratio less 1. The fractions of its multiples spread evenly over [0, 1).
const GOLDEN: f64 = 0.618_033_988_749_894_9;

/// A range of `y` from `start` on.
pub(super) struct Piece<'a> {
    pub(super) start: f32,
    pub(super) content: Content<'a>,
}

pub(super) enum Content<'a> {
    Constant(f32),
    Graded(Grid<'a>),
}

/// A part of a curve: a constant, or graded from an origin.
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

    /// The pieces of a curve over `from <= y < to`, without its kinks.
    fn of_curve(curve: &'a Curve<'a>, side: Side, from: f64, to: f64) -> Result<Vec<Self>> {
        if let Curve::Constant(ratio) = curve {
            // A lookup returns at most y, so FAR allows everything.
            let value = if side == Side::Upper { ratio.ln().min(FAR) } else { *ratio };
            return Ok(vec![Self::constant(from, value)]);
        }
        let parts = match (side, curve.saturation(side)?) {
            (_, None) => vec![(0.0, Part::From(0.0))],
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
                // The power of two in (3/8, 3/4] of the edge, so that both parts end far from it.
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

/// The pieces of a side with their nodes.
pub(super) struct SidePlan<'a> {
    pub(super) at_zero: f32,
    pub(super) far: f32,
    pub(super) pieces: Vec<Piece<'a>>,
}

impl<'a> SidePlan<'a> {
    pub(super) fn new(side: Side, stretches: &'a Stretches<'a>, exact: &Exact<'_>) -> Result<Self> {
        let mut pending = Vec::new();
        for (i, (start, curve)) in stretches.iter().enumerate() {
            let start = f64::from(*start as f32);
            let end = stretches.get(i + 1).map_or(FAR, |next| f64::from(next.0 as f32));
            if start < end && start < FAR {
                pending.extend(Piece::of_curve(curve, side, start, end)?);
            }
        }
        if pending.len() > MAX_PIECES {
            return Err(Error::Argument {
                argument: "region",
                value: format!("one with {} smooth pieces", pending.len()),
                allowed: "of at most 8 smooth pieces a side to be tabulated",
            });
        }
        pending.reverse();
        let mut pieces = Vec::new();
        while let Some(mut piece) = pending.pop() {
            let has_room = pieces.len() + pending.len() + 1 < MAX_PIECES;
            if let Content::Graded(grid) = &mut piece.content
                && let Some(kink) = grid.fill(side, has_room)?
            {
                let (curve, origin) = (grid.curve, grid.origin);
                let (from, to) = grid.y_range();
                let cut = round_up(kink.at) as f32;
                // No float32 may be left on one side of the cut.
                if cut < to as f32 {
                    let mut right = Piece::graded(curve, origin, kink.after, to);
                    right.start = cut.max(piece.start);
                    pending.push(right);
                }
                if piece.start < cut {
                    let mut left = Piece::graded(curve, origin, from, kink.before);
                    left.start = piece.start;
                    pending.push(left);
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

    /// Each piece with the first float beyond it.
    pub(super) fn with_ends(&self) -> impl Iterator<Item = (&Piece<'a>, f32)> {
        let ends = self.pieces[1..].iter().map(|piece| piece.start).chain([FAR as f32]);
        self.pieces.iter().zip(ends)
    }

    /// Floats in each cell with their bounds, for a table of this tolerance.
    ///
    /// The ends and the middle of a cell, with their slopes, give its bounds far more precisely than float32.
    /// So the rounding of a table is measured at many floats without solving for their bounds.
    pub(super) fn known_values(&self, tolerance: f64) -> Vec<(f32, f64)> {
        let mut known = Vec::new();
        for (piece, end) in self.with_ends() {
            let Content::Graded(grid) = &piece.content else { continue };
            for octave in &grid.octaves {
                let halvings = octave.halvings(tolerance);
                let half = (octave.nodes.len() - 1) >> (halvings + 1);
                for (k, cell) in octave.cells(halvings).enumerate() {
                    let Some([a, b]) = grid.ends.clip(cell) else { continue };
                    let value = quintic(a, octave.nodes[(2 * k + 1) * half], b);
                    // Just below a power of two, the ulp is half that of the node above it.
                    let binade = |value: f64| (value as f32).to_bits() >> MANTISSA_BITS;
                    let crosses = a.value.max(b.value) > 2.0 && binade(a.value) != binade(b.value);
                    let checks = if crosses {
                        CHECKS_AT_A_POWER_OF_TWO
                    } else {
                        CHECKS_A_CELL.max(CHECKS_AN_OCTAVE >> halvings)
                    };
                    for i in 0..checks {
                        let share = (GOLDEN * f64::from(i + 1)).fract();
                        let y = grid.y(a.z + (b.z - a.z) * share) as f32;
                        let z = grid.z(f64::from(y));
                        if y >= piece.start && y < end && z >= a.z && z <= b.z {
                            known.push((y, value(z)));
                        }
                    }
                }
            }
        }
        known
    }
}

/// The cubic through two nodes, with the terms of fourth and fifth order that a node between them gives.
fn quintic(a: Node, middle: Node, b: Node) -> impl Fn(f64) -> f64 {
    let quartic = move |z: f64| ((z - a.z) * (b.z - z)).powi(2);
    // Next to an end of the piece, the middle would give noise.
    let distance = (middle.z - a.z).min(b.z - middle.z);
    let (fourth, fifth) = if distance > 0.25 * (b.z - a.z) {
        let cubic = a.cubic(b, middle.z);
        let fourth = (middle.value - cubic.value) / quartic(middle.z);
        let growth = 2.0 * (a.z + b.z - 2.0 * middle.z) / ((middle.z - a.z) * (b.z - middle.z));
        let tilt = (middle.slope - cubic.slope) / quartic(middle.z);
        (fourth, tilt - growth * fourth)
    } else {
        (0.0, 0.0)
    };
    move |z| a.cubic(b, z).value + quartic(z) * (fourth + fifth * (z - middle.z))
}

/// The min float32 at or above a value.
fn round_up(value: f64) -> f64 {
    let near = value as f32;
    f64::from(if f64::from(near) < value { near.next_up() } else { near })
}
