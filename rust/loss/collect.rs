//! The first step: log-ratios, what is summed up of them, and who has moved far.

// A function of vectors has to become part of one that is compiled for their instructions.
#![allow(clippy::inline_always)]

use std::marker::PhantomData;

use crate::loss::block::Moved;
use crate::loss::bounds::Bounds;
use crate::loss::columns::{Columns, load};
use crate::loss::surrogate::Rule;
use crate::loss::totals::{reduce, smaller, sum};
use crate::loss::{BLOCK, Float, LOG_RATIO_LIMIT, Totals};
use crate::simd::lanes::{Lanes, MAX_LANES};
use crate::simd::{LossLanes, WithLanes};

/// The first step: the log-ratios, what is summed up of them, and who has moved far.
pub(super) struct Collect<'a, T, R, B> {
    pub(super) rule: PhantomData<R>,
    pub(super) bounds: &'a B,
    pub(super) start: usize,
    pub(super) columns: Columns<'a, T>,
    pub(super) log_ratio: &'a mut [T; BLOCK + MAX_LANES],
    pub(super) cost: &'a mut [T; BLOCK + MAX_LANES],
    pub(super) moved: &'a mut Moved<T>,
    pub(super) totals: &'a mut Totals,
}

#[inline(always)]
pub(super) fn clamp<L: Lanes>(lanes: L, log_ratio: L::Float) -> L::Float {
    lanes.clamp_min(-LOG_RATIO_LIMIT, lanes.clamp_max(LOG_RATIO_LIMIT, log_ratio))
}

impl<T: Float, R: Rule, B: Bounds<T>> WithLanes<T> for Collect<'_, T, R, B> {
    type Output = ();

    #[inline(always)]
    fn run<L: LossLanes<Scalar = T>>(mut self, lanes: L) {
        let zero = lanes.splat(0.0);
        let mut sums = Collected {
            valid: 0,
            log_ratio: zero,
            old_log_prob: zero,
            least: lanes.splat(f64::INFINITY),
            most: lanes.splat(f64::NEG_INFINITY),
        };
        let count = self.columns.mask.len();
        let (mut index, mut movers) = (0, 0);
        while index + L::COUNT <= count {
            // SAFETY: all columns have tokens up to `count`.
            unsafe { self.step::<true, L>(lanes, index, &mut movers, &mut sums) };
            index += L::COUNT;
        }
        if index < count {
            // SAFETY: likewise.
            unsafe { self.step::<false, L>(lanes, index, &mut movers, &mut sums) };
        }
        self.moved.count = movers;
        self.totals.take_collected(lanes, &sums);
    }
}

/// Sums over the vectors of a block. Tokens that do not count add 0.
struct Collected<L: Lanes> {
    valid: u32,
    log_ratio: L::Float,
    old_log_prob: L::Float,
    least: L::Float,
    most: L::Float,
}

impl<T: Float, R: Rule, B: Bounds<T>> Collect<'_, T, R, B> {
    /// # Safety
    /// As of [`load`], for every column.
    #[inline(always)]
    unsafe fn step<const WHOLE: bool, L: LossLanes<Scalar = T>>(
        &mut self,
        lanes: L,
        index: usize,
        movers: &mut usize,
        sums: &mut Collected<L>,
    ) {
        let columns = self.columns;
        let zero = lanes.splat(0.0);
        // SAFETY: as the caller says.
        let valid = unsafe { columns.valid::<WHOLE, L>(lanes, index) };
        // SAFETY: as the caller says.
        let column = |column: &[T]| unsafe {
            lanes.select(valid, load::<WHOLE, L>(lanes, column, index), zero)
        };
        let old_log_prob = column(columns.old_log_prob);
        let log_ratio = match columns.given {
            Some(given) => column(given),
            None => lanes.sub(column(columns.log_prob), old_log_prob),
        };
        let cost = lanes.sub(zero, column(columns.advantages));
        lanes.store(log_ratio, &mut self.log_ratio[index..]);
        lanes.store(cost, &mut self.cost[index..]);

        let clamped = clamp(lanes, log_ratio);
        let (upper, lower) = if R::BY_LOG_RATIO {
            (lanes.less(zero, log_ratio), lanes.less(log_ratio, zero))
        } else {
            (lanes.less(cost, zero), lanes.less(zero, cost))
        };
        // SAFETY: as the caller says.
        let keys =
            unsafe { self.bounds.keys::<WHOLE, L>(lanes, self.start + index, old_log_prob, lower) };
        let reach = self.bounds.reach(lanes, keys, lower);
        let moving = lanes.or(
            lanes.and(upper, lanes.less(reach, log_ratio)),
            lanes.and(lower, lanes.less(log_ratio, reach)),
        );
        self.moved.who[index / L::COUNT] = lanes.bits(moving);
        lanes.compress(moving, keys, &mut self.moved.bounds[*movers..]);
        lanes.compress(moving, clamped, &mut self.moved.log_ratio[*movers..]);
        *movers += lanes.bits(moving).count_ones() as usize;

        sums.valid += lanes.bits(valid).count_ones();
        sums.log_ratio = lanes.add(sums.log_ratio, clamped);
        sums.old_log_prob = lanes.add(sums.old_log_prob, old_log_prob);
        // A NaN may get lost here: the sum of the log-ratios has it.
        sums.least = lanes.min(lanes.select(valid, clamped, sums.least), sums.least);
        sums.most = lanes.max(lanes.select(valid, clamped, sums.most), sums.most);
    }
}

impl Totals {
    #[inline(always)]
    fn take_collected<L: Lanes<Scalar: Float>>(&mut self, lanes: L, sums: &Collected<L>) {
        self.valid += u64::from(sums.valid);
        let log_ratio = sum(lanes, sums.log_ratio);
        self.kl -= log_ratio;
        self.entropy -= sum(lanes, sums.old_log_prob);
        // A NaN can have got lost in the extremes, but not in the sum.
        let unknown = log_ratio * 0.0;
        let least = reduce(lanes, sums.least, |a, b| if a < b { a } else { b });
        let most = reduce(lanes, sums.most, |a, b| if a > b { a } else { b });
        self.log_ratio_min = smaller(self.log_ratio_min, least + unknown);
        self.log_ratio_max = -smaller(-self.log_ratio_max, -(most + unknown));
    }
}
