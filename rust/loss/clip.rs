//! The middle steps: the bounds of those who have moved far, and who is beyond.

// A function of vectors has to become part of one that is compiled for their instructions.
#![allow(clippy::inline_always)]

use crate::loss::Float;
use crate::loss::block::Moved;
use crate::loss::bounds::Bounds;
use crate::simd::{LossLanes, WithLanes};

/// The second step: the bounds of those who have.
pub(super) struct Find<'a, T, B> {
    pub(super) bounds: &'a B,
    pub(super) moved: &'a mut Moved<T>,
}

impl<T: Float, B: Bounds<T>> WithLanes<T> for Find<'_, T, B> {
    type Output = ();

    #[inline(always)]
    fn run<L: LossLanes<Scalar = T>>(self, lanes: L) {
        let Moved { bounds, log_ratio, count, .. } = self.moved;
        // Behind the last token are others, to which it does no harm.
        for index in (0..*count).step_by(L::COUNT) {
            let lower = lanes.less(lanes.load(&log_ratio[index..]), lanes.splat(0.0));
            let found = self.bounds.find(lanes, lanes.load(&bounds[index..]), lower);
            lanes.store(found, &mut bounds[index..]);
        }
    }
}

/// The third step: who is beyond. Apart from the second, because both are long chains of operations of
/// which a processor sees more at a time if they are short.
pub(super) struct Stop<'a, T, const LOWER_IS_RATIO: bool> {
    pub(super) moved: &'a mut Moved<T>,
}

impl<T: Float, const LOWER_IS_RATIO: bool> WithLanes<T> for Stop<'_, T, LOWER_IS_RATIO> {
    type Output = ();

    #[inline(always)]
    fn run<L: LossLanes<Scalar = T>>(self, lanes: L) {
        let Moved { bounds, log_ratio, count, .. } = self.moved;
        let zero = lanes.splat(0.0);
        for index in (0..*count).step_by(L::COUNT) {
            let (log_ratio, bound) =
                (lanes.load(&log_ratio[index..]), lanes.load(&bounds[index..]));
            let lower = lanes.less(log_ratio, zero);
            let above = lanes.and_not(lanes.less(bound, log_ratio), lower);
            let (below, edge) = if LOWER_IS_RATIO {
                let exp = lanes.exp_and_gap(lanes.select(lower, log_ratio, bound)).exp;
                (lanes.less(exp, bound), lanes.select(lower, bound, exp))
            } else {
                (lanes.less(log_ratio, bound), lanes.exp_and_gap(bound).exp)
            };
            let beyond = lanes.or(above, lanes.and(lower, below));
            lanes.store(lanes.select(beyond, edge, zero), &mut bounds[index..]);
        }
    }
}
