//! Columns that one step leaves for the next.

use crate::loss::{BLOCK, Float};
use crate::simd::lanes::MAX_LANES;

/// A column of a block. The last vector may reach beyond the last token.
pub(super) type Column<T> = [T; BLOCK + MAX_LANES];

/// Columns that one step leaves for the next.
#[repr(align(64))] // otherwise a vector may lie across two cache lines
pub(super) struct Scratch<T> {
    /// Log-ratios, not clamped; 0 for tokens that do not count.
    pub(super) log_ratio: Column<T>,
    /// Minus the advantages; 0 for tokens that do not count.
    pub(super) neg_advantage: Column<T>,
    pub(super) candidates: Candidates<T>,
    /// Advantages of each token where rows share one.
    pub(super) advantages: [T; BLOCK],
    /// Losses that no output takes.
    pub(super) losses: [T; BLOCK],
}

/// Tokens of a block that may be beyond their bound, side by side.
///
/// They are few, and bounds of neighbours are found much faster than bounds of scattered tokens.
#[repr(align(64))]
pub(super) struct Candidates<T> {
    /// Scratch column, reused by each step: lookup keys after `Collect`, bounds after `FindBounds`, and after
    /// `ClipRatios` the clipped ratio, or 0 for tokens that are not clipped, or after `FindWidths` the width. Shared
    /// widths are the keys.
    pub(super) scratch: Column<T>,
    /// Clamped log-ratios that the bounds are compared with, negative where the lower bound holds.
    pub(super) log_ratio: Column<T>,
    /// Log-probs of the anchor less the old ones. Unused without an anchor.
    pub(super) shift: Column<T>,
    pub(super) count: usize,
    /// A bit for each token of a vector, set if it is a candidate.
    pub(super) bits: [u32; BLOCK],
}

impl<T: Float> Scratch<T> {
    pub(super) fn new() -> Self {
        let zeros = [T::ZERO; BLOCK + MAX_LANES];
        Self {
            log_ratio: zeros,
            neg_advantage: zeros,
            candidates: Candidates {
                scratch: zeros,
                log_ratio: zeros,
                shift: zeros,
                count: 0,
                bits: [0; BLOCK],
            },
            advantages: [T::ZERO; BLOCK],
            losses: [T::ZERO; BLOCK],
        }
    }
}
