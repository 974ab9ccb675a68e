//! Writes the words of an image from the plans of both sides.

use super::plan::{Content, Piece, SidePlan};
use super::reach::{near, reaches};
use crate::image::{
    AT_FAR, AT_ZERO, ENDS, ENTRIES, ENTRY_BASE, Entry, Image, MANTISSA, MANTISSA_BITS, MAX_BITS,
    MAX_PIECES, MIN_BITS, NEAR, ONE, ORIGIN, ROW, SCALE, START, UPPER_REACH,
};

/// The words of an image whose cells meet a tolerance.
pub(super) fn image_words(plans: &[SidePlan<'_>; 2], tolerance: f64) -> Vec<u32> {
    let pieces = plans.iter().flat_map(|plan| &plan.pieces);
    let entry_count: usize = pieces.map(entries_of).sum();
    let mut words = vec![0_u32; (ENTRIES + entry_count).next_multiple_of(2)];
    let mut entry = ENTRIES;
    for (side, plan) in plans.iter().enumerate() {
        words[AT_ZERO + side] = plan.at_zero.to_bits();
        words[AT_FAR + side] = plan.far.to_bits();
        for (k, (piece, end)) in plan.with_ends().enumerate() {
            push_piece(&mut words, MAX_PIECES * side + k, entry, piece, end, tolerance);
            entry += entries_of(piece);
        }
        repeat_last_piece(&mut words, MAX_PIECES * side, plan.pieces.len());
    }
    let reaches = reaches(Image::trusted(&words)).map(f32::to_bits);
    words[UPPER_REACH..UPPER_REACH + reaches.len()].copy_from_slice(&reaches);
    write_near(&mut words);
    words
}

/// Writes the row of [`NEAR`], which images of format version 1 lack.
pub(super) fn write_near(words: &mut [u32]) {
    let numbers = near(Image::trusted(words)).map(f32::to_bits);
    words[NEAR..NEAR + numbers.len()].copy_from_slice(&numbers);
}

fn entries_of(piece: &Piece<'_>) -> usize {
    match &piece.content {
        Content::Constant(_) => 1,
        Content::Graded(grid) => grid.octaves.len(),
    }
}

/// Writes the header of a piece and its entries from `entry` on, and appends its nodes.
fn push_piece(
    words: &mut Vec<u32>,
    lane: usize,
    mut entry: usize,
    piece: &Piece<'_>,
    end: f32,
    tolerance: f64,
) {
    words[START + lane] = piece.start.to_bits();
    match &piece.content {
        Content::Constant(value) => {
            words[SCALE + lane] = ONE;
            words[ENTRY_BASE + lane] = (entry as u32).wrapping_sub(ONE >> MANTISSA_BITS);
            words[MIN_BITS + lane] = ONE;
            words[MAX_BITS + lane] = ONE;
            words[entry] = Entry { node: words.len() / 2, halvings: 0 }.to_word();
            for _ in 0..2 {
                push_node(words, f64::from(*value), 0.0);
            }
        }
        Content::Graded(grid) => {
            let (origin, scale) = (grid.origin as f32, grid.scale as f32);
            let ends =
                [piece.start, end.next_down()].map(|y| ((y - origin).abs() * scale).to_bits());
            let first_exponent = grid.octaves[0].biased_exponent();
            let min_bits = ends[0].min(ends[1]).max(first_exponent << MANTISSA_BITS);
            let max_bits = ends[0].max(ends[1]).max(min_bits);
            words[ORIGIN + lane] = origin.to_bits();
            words[SCALE + lane] = scale.to_bits();
            words[ENTRY_BASE + lane] = (entry as u32).wrapping_sub(first_exponent);
            words[MIN_BITS + lane] = min_bits;
            words[MAX_BITS + lane] = max_bits;
            for octave in &grid.octaves {
                let halvings = octave.halvings(tolerance);
                let nodes = octave.nodes_of(halvings, &grid.ends);
                words[entry] = Entry { node: words.len() / 2, halvings }.to_word();
                entry += 1;
                let kept = if octave.biased_exponent() == max_bits >> MANTISSA_BITS {
                    // No lookup reads beyond the cell of the max bits.
                    ((max_bits & MANTISSA) >> (MANTISSA_BITS - halvings)) as usize + 2
                } else {
                    // The last node is the first of the next octave.
                    nodes.len() - 1
                };
                for node in &nodes[..kept] {
                    push_node(words, node.value, node.slope);
                }
            }
        }
    }
}

fn push_node(words: &mut Vec<u32>, value: f64, slope: f64) {
    words.extend([(value as f32).to_bits(), (slope as f32).to_bits()]);
}

/// Fills the unused lanes of a side.
fn repeat_last_piece(words: &mut [u32], first: usize, used: usize) {
    for row in (0..ENDS).step_by(ROW) {
        let lanes = &mut words[row + first..row + first + MAX_PIECES];
        let filler = if row == START { f32::INFINITY.to_bits() } else { lanes[used - 1] };
        lanes[used..].fill(filler);
    }
}
