//! First step: log-ratios, their sums, and which tokens may be beyond their bound.

// A function of vectors has to become part of one that is compiled for their instructions.
#![allow(clippy::inline_always)]

use std::marker::PhantomData;

use crate::loss::bounds::Bounds;
use crate::loss::columns::{Columns, load, padded};
use crate::loss::nan::{min_or_nan, sides, with_nan_of};
use crate::loss::scratch::{Candidates, Column};
use crate::loss::surrogate::Selection;
use crate::loss::totals::{reduce, sum};
use crate::loss::{Float, LOG_RATIO_LIMIT, MAX_LOG_PROB, Totals};
use crate::simd::lanes::Lanes;
use crate::simd::{LossLanes, WithLanes};

/// Writes log-ratios and negated advantages, and packs the candidates side by side.
pub(super) struct Collect<'a, T, S, B, const ANCHORED: bool> {
    pub(super) selection: PhantomData<S>,
    pub(super) bounds: &'a B,
    pub(super) start: usize,
    pub(super) columns: Columns<'a, T>,
    pub(super) log_ratio: &'a mut Column<T>,
    pub(super) neg_advantage: &'a mut Column<T>,
    pub(super) candidates: &'a mut Candidates<T>,
    pub(super) totals: &'a mut Totals,
}

#[inline(always)]
pub(super) fn clamp<L: Lanes>(lanes: L, log_ratio: L::Float) -> L::Float {
    lanes.clamp_min(-LOG_RATIO_LIMIT, lanes.clamp_max(LOG_RATIO_LIMIT, log_ratio))
}

impl<T: Float, S: Selection, B: Bounds<T>, const ANCHORED: bool> WithLanes<T>
    for Collect<'_, T, S, B, ANCHORED>
{
    type Output = ();

    #[inline(always)]
    fn run<L: LossLanes<Scalar = T>>(mut self, lanes: L) {
        let zero = lanes.splat(0.0);
        let mut sums = Sums {
            valid: 0,
            log_ratio: zero,
            old_log_prob: zero,
            min: lanes.splat(f64::INFINITY),
            max: lanes.splat(f64::NEG_INFINITY),
            max_log_prob: zero,
        };
        let count = self.columns.mask.len();
        let (mut index, mut candidates) = (0, 0);
        while index + L::COUNT <= count {
            // SAFETY: all columns have tokens up to `count`.
            unsafe { self.step::<true, L>(lanes, index, &mut candidates, &mut sums) };
            index += L::COUNT;
        }
        if index < count {
            // SAFETY: likewise.
            unsafe { self.step::<false, L>(lanes, index, &mut candidates, &mut sums) };
        }
        self.candidates.count = candidates;
        sums.add_to(lanes, self.totals);
        if sums.has_positive(lanes) {
            self.totals.positive += self.count_positive(lanes);
        }
    }
}

impl<T: Float, S: Selection, B: Bounds<T>, const ANCHORED: bool> Collect<'_, T, S, B, ANCHORED> {
    /// The number of tokens that count and have a log-prob above [`MAX_LOG_PROB`].
    #[inline(always)]
    fn count_positive<L: LossLanes<Scalar = T>>(&self, lanes: L) -> u64 {
        let Columns { old_log_prob, log_prob, mask, .. } = self.columns;
        let limit = lanes.splat(MAX_LOG_PROB);
        let is_above = |part: &[T]| lanes.less(limit, lanes.load(&padded(part, T::ZERO)));
        let vectors = old_log_prob.chunks(L::COUNT).zip(log_prob.chunks(L::COUNT));
        let counts = vectors.zip(mask.chunks(L::COUNT)).map(|((old, new), mask)| {
            let valid = lanes.load_mask(&padded(mask, 0));
            let above = lanes.and(valid, lanes.or(is_above(old), is_above(new)));
            u64::from(lanes.bits(above).count_ones())
        });
        counts.sum()
    }

    /// # Safety
    /// Every column meets the condition of [`load`].
    #[inline(always)]
    unsafe fn step<const WHOLE: bool, L: LossLanes<Scalar = T>>(
        &mut self,
        lanes: L,
        index: usize,
        candidates: &mut usize,
        sums: &mut Sums<L>,
    ) {
        let columns = self.columns;
        let zero = lanes.splat(0.0);
        // SAFETY: required of the caller.
        let valid = unsafe { columns.valid::<WHOLE, L>(lanes, index) };
        // SAFETY: required of the caller.
        let column = |column: &[T]| unsafe {
            lanes.select(valid, load::<WHOLE, L>(lanes, column, index), zero)
        };
        let old_log_prob = column(columns.old_log_prob);
        let log_prob = column(columns.log_prob);
        let log_ratio = match columns.log_ratio {
            Some(given) => column(given),
            None => lanes.sub(log_prob, old_log_prob),
        };
        let neg_advantage = lanes.sub(zero, column(columns.advantages));
        let clamped = clamp(lanes, log_ratio);
        let (log_prob_of_bounds, compared, neg_advantage) = match columns.anchor_log_prob {
            Some(anchor) if ANCHORED => {
                let anchor = column(anchor);
                let compared = match columns.log_ratio {
                    Some(_) => lanes.sub(log_ratio, lanes.sub(anchor, old_log_prob)),
                    None => lanes.sub(log_prob, anchor),
                };
                let kept = with_nan_of(lanes, compared, neg_advantage);
                (anchor, compared, with_nan_of(lanes, log_ratio, kept))
            }
            _ => (old_log_prob, log_ratio, neg_advantage),
        };
        lanes.store(log_ratio, &mut self.log_ratio[index..]);
        lanes.store(neg_advantage, &mut self.neg_advantage[index..]);

        let (upper, lower) = if S::BY_LOG_RATIO {
            (lanes.less(zero, compared), lanes.less(compared, zero))
        } else {
            sides(lanes, neg_advantage)
        };
        let keys = match self.bounds.shared_widths() {
            Some(widths) if S::NEEDS_WIDTH => {
                let [below, above] = widths.map(|width| lanes.splat(width));
                lanes.select(lower, below, above)
            }
            // SAFETY: required of the caller.
            _ => unsafe {
                let start = self.start + index;
                self.bounds.keys::<WHOLE, L>(lanes, start, log_prob_of_bounds, lower)
            },
        };
        let candidate = if S::NEEDS_WIDTH {
            lanes.or(upper, lower)
        } else {
            let reach = self.bounds.reach(lanes, keys, lower);
            lanes.or(
                lanes.and(upper, lanes.less(reach, compared)),
                lanes.and(lower, lanes.less(compared, reach)),
            )
        };
        self.candidates.bits[index / L::COUNT] = lanes.bits(candidate);
        lanes.compress(candidate, keys, &mut self.candidates.scratch[*candidates..]);
        lanes.compress(candidate, compared, &mut self.candidates.log_ratio[*candidates..]);
        if ANCHORED {
            let shift = lanes.sub(log_prob_of_bounds, old_log_prob);
            lanes.compress(candidate, shift, &mut self.candidates.shift[*candidates..]);
        }
        *candidates += lanes.bits(candidate).count_ones() as usize;

        sums.valid += lanes.bits(valid).count_ones();
        sums.log_ratio = lanes.add(sums.log_ratio, clamped);
        sums.old_log_prob = lanes.add(sums.old_log_prob, old_log_prob);
        // A NaN may get lost here, but not in the sum of the log-ratios.
        sums.min = lanes.min(lanes.select(valid, clamped, sums.min), sums.min);
        sums.max = lanes.max(lanes.select(valid, clamped, sums.max), sums.max);
        let larger = lanes.max(log_prob, sums.max_log_prob);
        sums.max_log_prob = lanes.max(old_log_prob, larger);
    }
}

/// Sums and extremes over the vectors of a block. Tokens that do not count add 0.
struct Sums<L: Lanes> {
    valid: u32,
    log_ratio: L::Float,
    old_log_prob: L::Float,
    min: L::Float,
    max: L::Float,
    max_log_prob: L::Float,
}

impl<L: Lanes<Scalar: Float>> Sums<L> {
    /// True if a log-prob is above [`MAX_LOG_PROB`].
    #[inline(always)]
    fn has_positive(&self, lanes: L) -> bool {
        lanes.bits(lanes.less(lanes.splat(MAX_LOG_PROB), self.max_log_prob)) != 0
    }

    #[inline(always)]
    fn add_to(&self, lanes: L, totals: &mut Totals) {
        totals.valid += u64::from(self.valid);
        let log_ratio = sum(lanes, self.log_ratio);
        totals.kl -= log_ratio;
        totals.entropy -= sum(lanes, self.old_log_prob);
        // NaN if any log-ratio is, since the extremes may have lost it; otherwise 0.
        let nan_or_zero = log_ratio * 0.0;
        let min = reduce(lanes, self.min, |a, b| if a < b { a } else { b });
        let max = reduce(lanes, self.max, |a, b| if a > b { a } else { b });
        totals.log_ratio_min = min_or_nan(totals.log_ratio_min, min + nan_or_zero);
        totals.log_ratio_max = -min_or_nan(-totals.log_ratio_max, -(max + nan_or_zero));
    }
}
