//! Middle steps: the bounds of the candidates, and their clipped ratios or their widths.
//!
//! Two loops, because each is a long chain of operations, and a processor overlaps more turns of a short loop.

// A function of vectors has to become part of one that is compiled for their instructions.
#![allow(clippy::inline_always)]

use crate::loss::Float;
use crate::loss::LOG_RATIO_LIMIT;
use crate::loss::bounds::Bounds;
use crate::loss::collect::clamp;
use crate::loss::columns::numbers;
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
///
/// Log-ratios are compared as they are. Clipped ratios end where the clamp of ratios does.
///
/// With an anchor the bounds limit new/anchor. Those of new/old are further by the shift, anchor/old. The clipped
/// ratio is then negative on the lower side, which spares the last step the log-ratio to the anchor.
pub(super) struct ClipRatios<'a, T, const LOWER_IS_RATIO: bool, const ANCHORED: bool> {
    pub(super) candidates: &'a mut Candidates<T>,
}

impl<T: Float, const LOWER_IS_RATIO: bool, const ANCHORED: bool> WithLanes<T>
    for ClipRatios<'_, T, LOWER_IS_RATIO, ANCHORED>
{
    type Output = ();

    #[inline(always)]
    fn run<L: LossLanes<Scalar = T>>(self, lanes: L) {
        let Candidates { scratch, log_ratio, shift, count, .. } = self.candidates;
        let zero = lanes.splat(0.0);
        for index in (0..*count).step_by(L::COUNT) {
            let (log_ratio, bound) =
                (lanes.load(&log_ratio[index..]), lanes.load(&scratch[index..]));
            let lower = lanes.less(log_ratio, zero);
            let above = lanes.and_not(lanes.less(bound, log_ratio), lower);
            let (below, clipped) = if LOWER_IS_RATIO {
                let exponent = lanes.select(lower, log_ratio, bound);
                let exponent = lanes.clamp_max(LOG_RATIO_LIMIT, exponent);
                let exp = lanes.exp_and_gap(lanes.clamp_min(MIN_EXPONENT, exponent)).exp;
                let kept = lanes.clamp_min(MIN_RATIO, bound);
                (lanes.less(exp, bound), lanes.select(lower, kept, exp))
            } else {
                (lanes.less(log_ratio, bound), lanes.exp_and_gap(clamp(lanes, bound)).exp)
            };
            let clipped = if ANCHORED {
                let shift = clamp(lanes, lanes.load(&shift[index..]));
                let shifted = clamp(lanes, lanes.add(bound, shift));
                if LOWER_IS_RATIO {
                    let exp = lanes.exp_and_gap(lanes.select(lower, shift, shifted)).exp;
                    lanes.select(lower, lanes.mul(clipped, exp), exp)
                } else {
                    lanes.exp_and_gap(shifted).exp
                }
            } else {
                clipped
            };
            let beyond = lanes.or(above, lanes.and(lower, below));
            let clipped = if ANCHORED {
                lanes.select(lower, lanes.sub(zero, clipped), clipped)
            } else {
                clipped
            };
            lanes.store(lanes.select(beyond, clipped, zero), &mut scratch[index..]);
        }
    }
}

/// Replaces the bounds of the candidates by the region's width on that side: the distance from 1 to the bound as a
/// ratio. Bounds count up to the ratios that the clamp leaves.
pub(super) struct FindWidths<'a, T, const LOWER_IS_RATIO: bool> {
    pub(super) candidates: &'a mut Candidates<T>,
}

impl<T: Float, const LOWER_IS_RATIO: bool> WithLanes<T> for FindWidths<'_, T, LOWER_IS_RATIO> {
    type Output = ();

    #[inline(always)]
    fn run<L: LossLanes<Scalar = T>>(self, lanes: L) {
        let Candidates { scratch, log_ratio, count, .. } = self.candidates;
        let zero = lanes.splat(0.0);
        for index in (0..*count).step_by(L::COUNT) {
            let lower = lanes.less(lanes.load(&log_ratio[index..]), zero);
            let bound = lanes.load(&scratch[index..]);
            let rise = excess(lanes, bound);
            let fall = if LOWER_IS_RATIO {
                lanes.sub(lanes.splat(1.0), bound)
            } else {
                lanes.sub(zero, rise)
            };
            lanes.store(lanes.select(lower, fall, rise), &mut scratch[index..]);
        }
    }
}

/// The distance from 1 to a bound as a ratio, negative below 1.
#[inline(always)]
fn excess<L: LossLanes>(lanes: L, bound: L::Float) -> L::Float {
    let limited = lanes.clamp_min(NO_RATIO, lanes.clamp_max(LOG_RATIO_LIMIT, bound));
    lanes.add(lanes.exp_and_gap(limited).gap, limited)
}

/// Widths as those of [`FindWidths`], below and above, of bounds that all tokens share.
pub(super) struct SharedWidths {
    pub(super) log_lower: f64,
    pub(super) log_upper: f64,
}

impl<T: Float> WithLanes<T> for SharedWidths {
    type Output = [f64; 2];

    #[inline(always)]
    fn run<L: LossLanes<Scalar = T>>(self, lanes: L) -> [f64; 2] {
        let [below, above] = [self.log_lower, self.log_upper]
            .map(|bound| numbers(lanes, excess(lanes, lanes.splat(bound)))[0].to_f64());
        [0.0 - below, above]
    }
}

/// `e^-20`, the min of the ratios that the clamp leaves.
const MIN_RATIO: f64 = 2.061_153_622_438_558e-9;

/// Log-ratio below which a ratio is below every lower bound that is not 0, in every float type.
const MIN_EXPONENT: f64 = -80.0;

/// Log of a ratio that is 0 beside 1 in every float type.
const NO_RATIO: f64 = -40.0;
