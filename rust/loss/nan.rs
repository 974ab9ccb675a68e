//! Where a NaN of a token is kept: it reaches the loss and the extremes, and no comparison drops it.
//!
//! A comparison with a NaN is false. So a NaN advantage is on neither side of 0, its token is beyond no bound, and its
//! loss `-A r` is NaN.

// A function of vectors has to become part of one that is compiled for their instructions.
#![allow(clippy::inline_always)]

use crate::loss::Float;
use crate::simd::LossLanes;

/// The tokens that the upper bound holds for, `A > 0`, and those of the lower one, `A < 0`. A NaN is among neither.
#[inline(always)]
pub(super) fn sides<L: LossLanes>(lanes: L, neg_advantage: L::Float) -> (L::Mask, L::Mask) {
    let zero = lanes.splat(0.0);
    (lanes.less(neg_advantage, zero), lanes.less(zero, neg_advantage))
}

/// The negated advantages, with the NaNs of a number that only comparisons see.
#[inline(always)]
pub(super) fn with_nan_of<L: LossLanes>(
    lanes: L,
    compared: L::Float,
    neg_advantage: L::Float,
) -> L::Float {
    lanes.select(lanes.is_nan(compared), compared, neg_advantage)
}

/// The tokens to drop, without those whose advantage is NaN.
#[inline(always)]
pub(super) fn dropped<L: LossLanes>(lanes: L, beyond: L::Mask, neg_advantage: L::Float) -> L::Mask {
    lanes.and_not(beyond, lanes.is_nan(neg_advantage))
}

/// The smaller of both, NaN if either is. `f64::min` would lose the NaN.
pub(super) fn min_or_nan(a: f64, b: f64) -> f64 {
    if b < a || b.is_nan() { b } else { a }
}

/// The number of losses that are infinite or NaN.
#[cold]
pub(super) fn count_nonfinite<T: Float>(losses: &[T]) -> u64 {
    losses.iter().filter(|loss| !loss.to_f64().is_finite()).count() as u64
}
