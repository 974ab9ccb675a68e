//! From the plans of both sides to the words of an image.

use super::plan::{Content, SidePlan};
use super::reach::reaches;
use crate::image::{
    AT_FAR, AT_ZERO, ENDS, ENTRIES, ENTRY_BASE, Image, MANTISSA, MAX_BITS, MAX_PIECES, MIN_BITS,
    ONE, ORIGIN, ROW, SCALE, START, UPPER_REACH,
};

/// Writes the image of both sides.
pub(super) fn image(sides: &[SidePlan<'_>; 2], tolerance: f64) -> Vec<u32> {
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
