//! Middle steps: the bounds of the candidates, and their clipped ratios.
//!
//! Two loops, because each is a long chain of operations, and a processor overlaps more turns of a short loop.

// A function of vectors has to become part of one that is compiled for their instructions.
#![allow(clippy::inline_always)]

use crate::loss::Float;
use crate::loss::bounds::Bounds;
use crate::loss::scratch::Candidates;
use crate::simd::{LossLanes, WithLanes};

/// Replaces the keys of the candidates by their bounds.
pub(super) struct FindBounds<'a, T, B> {
    pub(super) bounds: &'a B,
    pub(super) candidates: &'a mut Candidates<T>,
}

impl<T: Float, B: Bounds<T>> WithLanes<T> for FindBounds<'_, T, B> {
    type Output = ();

    #[inline(always)]
    fn run<L: LossLanes<Scalar = T>>(self, lanes: L) {
        let Candidates { scratch, log_ratio, count, .. } = self.candidates;
        // The last vector may hold keys of earlier blocks, whose bounds nothing reads.
        for index in (0..*count).step_by(L::COUNT) {
            let lower = lanes.less(lanes.load(&log_ratio[index..]), lanes.splat(0.0));
            let keys = lanes.load(&scratch[index..]);
            lanes.store(self.bounds.find(lanes, keys, lower), &mut scratch[index..]);
        }
    }
}

/// Replaces the bounds of the candidates by their clipped ratios: the bound as a ratio where the token is beyond
/// it, otherwise 0. No token can be beyond a bound of 0, so that 0 is free to mean "not beyond".
pub(super) struct ClipRatios<'a, T, const LOWER_IS_RATIO: bool> {
    pub(super) candidates: &'a mut Candidates<T>,
}

impl<T: Float, const LOWER_IS_RATIO: bool> WithLanes<T> for ClipRatios<'_, T, LOWER_IS_RATIO> {
    type Output = ();

    #[inline(always)]
    fn run<L: LossLanes<Scalar = T>>(self, lanes: L) {
        let Candidates { scratch, log_ratio, count, .. } = self.candidates;
        let zero = lanes.splat(0.0);
        for index in (0..*count).step_by(L::COUNT) {
            let (log_ratio, bound) =
                (lanes.load(&log_ratio[index..]), lanes.load(&scratch[index..]));
            let lower = lanes.less(log_ratio, zero);
            let above = lanes.and_not(lanes.less(bound, log_ratio), lower);
            let (below, clipped) = if LOWER_IS_RATIO {
                let exp = lanes.exp_and_gap(lanes.select(lower, log_ratio, bound)).exp;
                (lanes.less(exp, bound), lanes.select(lower, bound, exp))
            } else {
                (lanes.less(log_ratio, bound), lanes.exp_and_gap(bound).exp)
            };
            let beyond = lanes.or(above, lanes.and(lower, below));
            lanes.store(lanes.select(beyond, clipped, zero), &mut scratch[index..]);
        }
    }
}
