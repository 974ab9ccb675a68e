//! Columns of tokens, vector by vector.

// A function of vectors has to become part of one that is compiled for their instructions.
#![allow(clippy::inline_always)]

use crate::loss::Float;
use crate::simd::Number;
use crate::simd::lanes::{Lanes, MAX_LANES};

/// The tokens of a block: all columns are equally long.
#[derive(Clone, Copy)]
pub(super) struct Columns<'a, T> {
    pub(super) old_log_prob: &'a [T],
    pub(super) log_prob: &'a [T],
    /// Log-ratios, if they are given.
    pub(super) given: Option<&'a [T]>,
    pub(super) advantages: &'a [T],
    pub(super) mask: &'a [u8],
}

impl<T: Float> Columns<'_, T> {
    /// # Safety
    /// As of [`load`].
    #[inline(always)]
    pub(super) unsafe fn valid<const WHOLE: bool, L: Lanes<Scalar = T>>(
        &self,
        lanes: L,
        index: usize,
    ) -> L::Mask {
        if WHOLE {
            // SAFETY: as the caller says.
            lanes.load_mask(unsafe { self.mask.get_unchecked(index..index + L::COUNT) })
        } else {
            lanes.load_mask(&padded(&self.mask[index..], 0))
        }
    }
}

/// The vector that begins at `index` of a column; if it is not `WHOLE`, the column's end and then zeros.
///
/// # Safety
/// The column has a token at `index`, and all of the vector's if it is `WHOLE`.
#[inline(always)]
pub(super) unsafe fn load<const WHOLE: bool, L: Lanes<Scalar: Float>>(
    lanes: L,
    column: &[L::Scalar],
    index: usize,
) -> L::Float {
    if WHOLE {
        // SAFETY: as the caller says.
        lanes.load(unsafe { column.get_unchecked(index..index + L::COUNT) })
    } else {
        lanes.load(&padded(&column[index..], L::Scalar::ZERO))
    }
}

/// The end of a slice, with what is missing for a vector.
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
