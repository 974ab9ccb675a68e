//! The tokens of a block, read one vector at a time.

// A function of vectors has to become part of one that is compiled for their instructions.
#![allow(clippy::inline_always)]

use crate::loss::{Float, Tokens};
use crate::simd::Number;
use crate::simd::lanes::{Lanes, MAX_LANES};

/// Columns of a block, equally long.
#[derive(Clone, Copy)]
pub(super) struct Columns<'a, T> {
    pub(super) old_log_prob: &'a [T],
    pub(super) log_prob: &'a [T],
    /// Log-ratios that replace `log_prob - old_log_prob`.
    pub(super) log_ratio: Option<&'a [T]>,
    /// Log-probs that the bounds stand at, in place of `old_log_prob`.
    pub(super) anchor_log_prob: Option<&'a [T]>,
    pub(super) advantages: &'a [T],
    pub(super) mask: &'a [u8],
}

impl<'a, T: Float> Columns<'a, T> {
    /// The tokens from `start` on, as many as `advantages` has room for where rows share one.
    pub(super) fn new(tokens: &'a Tokens<'a, T>, start: usize, advantages: &'a mut [T]) -> Self {
        let block = start..start + advantages.len();
        Self {
            old_log_prob: &tokens.old_log_prob[block.clone()],
            log_prob: &tokens.log_prob[block.clone()],
            log_ratio: tokens.log_ratio.map(|given| &given[block.clone()]),
            anchor_log_prob: tokens.anchor_log_prob.map(|anchor| &anchor[block.clone()]),
            advantages: tokens.advantages.block(start, advantages),
            mask: &tokens.mask[block],
        }
    }

    /// Lanes of tokens that count.
    ///
    /// # Safety
    /// As for [`load`].
    #[inline(always)]
    pub(super) unsafe fn valid<const WHOLE: bool, L: Lanes<Scalar = T>>(
        &self,
        lanes: L,
        index: usize,
    ) -> L::Mask {
        if WHOLE {
            // SAFETY: required of the caller.
            lanes.load_mask(unsafe { self.mask.get_unchecked(index..index + L::COUNT) })
        } else {
            lanes.load_mask(&padded(&self.mask[index..], 0))
        }
    }
}

/// The vector at `index` of a column; unless it is `WHOLE`, the column's end and then zeros.
///
/// # Safety
/// The column has a token at `index`, and if `WHOLE` one for every lane.
#[inline(always)]
pub(super) unsafe fn load<const WHOLE: bool, L: Lanes<Scalar: Float>>(
    lanes: L,
    column: &[L::Scalar],
    index: usize,
) -> L::Float {
    if WHOLE {
        // SAFETY: required of the caller.
        lanes.load(unsafe { column.get_unchecked(index..index + L::COUNT) })
    } else {
        lanes.load(&padded(&column[index..], L::Scalar::ZERO))
    }
}

/// The end of a slice, padded to a vector.
#[cold]
pub(super) fn padded<T: Copy>(rest: &[T], padding: T) -> [T; MAX_LANES] {
    let mut padded = [padding; MAX_LANES];
    padded[..rest.len()].copy_from_slice(rest);
    padded
}

/// The numbers of a vector, then zeros.
#[inline(always)]
pub(super) fn numbers<L: Lanes<Scalar: Float>>(
    lanes: L,
    vector: L::Float,
) -> [L::Scalar; MAX_LANES] {
    let mut numbers = [L::Scalar::ZERO; MAX_LANES];
    lanes.store(vector, &mut numbers);
    numbers
}
