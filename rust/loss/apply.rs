//! The last step: losses and gradients.

// A function of vectors has to become part of one that is compiled for their instructions.
#![allow(clippy::inline_always)]

use crate::loss::block::Moved;
use crate::loss::collect::clamp;
use crate::loss::columns::{Columns, load, numbers};
use crate::loss::surrogate::{Applied, Rule, Vector};
use crate::loss::totals::sum;
use crate::loss::{BLOCK, Float, LOG_RATIO_LIMIT, Totals};
use crate::simd::lanes::{Lanes, MAX_LANES};
use crate::simd::{LossLanes, WithLanes};

/// The last step: losses and gradients.
pub(super) struct Apply<'a, T, R> {
    pub(super) rule: R,
    pub(super) columns: Columns<'a, T>,
    pub(super) by_probability: bool,
    pub(super) log_ratio: &'a [T; BLOCK + MAX_LANES],
    pub(super) cost: &'a [T; BLOCK + MAX_LANES],
    pub(super) moved: &'a Moved<T>,
    pub(super) weight: f64,
    pub(super) per_token: &'a mut [T],
    pub(super) gradient: &'a mut [T],
    pub(super) totals: &'a mut Totals,
}

/// Sums over the vectors of a block. Tokens that do not count add 0.
struct Sums<L: Lanes> {
    loss: L::Float,
    kl_k3: L::Float,
    gradient_free: L::Float,
    gradient_removed: L::Float,
    /// Those clipped low, clipped high and limited, 16 bits each.
    counts: u64,
}

impl<T: Float, R: Rule> WithLanes<T> for Apply<'_, T, R> {
    type Output = ();

    #[inline(always)]
    fn run<L: LossLanes<Scalar = T>>(mut self, lanes: L) {
        let zero = lanes.splat(0.0);
        let mut sums = Sums {
            loss: zero,
            kl_k3: zero,
            gradient_free: zero,
            gradient_removed: zero,
            counts: 0,
        };
        let count = self.columns.mask.len();
        let (mut index, mut stopped) = (0, 0);
        while index + L::COUNT <= count {
            // SAFETY: all columns and outputs have tokens up to `count`.
            unsafe { self.step::<true, L>(lanes, index, &mut stopped, &mut sums) };
            index += L::COUNT;
        }
        if index < count {
            // SAFETY: likewise.
            unsafe { self.step::<false, L>(lanes, index, &mut stopped, &mut sums) };
        }
        self.totals.take(lanes, &sums, self.per_token);
    }
}

impl<T: Float, R: Rule> Apply<'_, T, R> {
    /// # Safety
    /// As of [`load`], for every column and output.
    #[inline(always)]
    unsafe fn step<const WHOLE: bool, L: LossLanes<Scalar = T>>(
        &mut self,
        lanes: L,
        index: usize,
        stopped: &mut usize,
        sums: &mut Sums<L>,
    ) {
        let zero = lanes.splat(0.0);
        let (losses, slopes) = (&mut self.per_token[index..], &mut self.gradient[index..]);
        // SAFETY: as the caller says.
        let valid = unsafe { self.columns.valid::<WHOLE, L>(lanes, index) };
        if WHOLE && lanes.bits(valid) == 0 {
            lanes.store(zero, losses);
            lanes.store(zero, slopes);
            return;
        }
        let cost = lanes.load(&self.cost[index..]);
        let unclamped = lanes.load(&self.log_ratio[index..]);
        let who = self.moved.who[index / L::COUNT];
        let stop = lanes.expand(lanes.mask_of(who), &self.moved.bounds[*stopped..]);
        *stopped += who.count_ones() as usize;

        let log_ratio = clamp(lanes, unclamped);
        let exponentials = lanes.exp_and_gap(log_ratio);
        let ratio = exponentials.exp;
        let free = lanes.mul(cost, ratio);
        let down =
            if R::BY_LOG_RATIO { lanes.less(log_ratio, zero) } else { lanes.less(zero, cost) };
        let tokens = Vector {
            // SAFETY: as the caller says.
            log_prob: unsafe {
                lanes.select(valid, load::<WHOLE, L>(lanes, self.columns.log_prob, index), zero)
            },
            cost,
            log_ratio,
            ratio,
            free,
            clamped: lanes.less(lanes.splat(LOG_RATIO_LIMIT), lanes.abs(unclamped)),
            beyond: lanes.less(zero, stop),
            down,
        };
        let Applied { loss, slope, limited } = self.rule.apply(lanes, &tokens, stop);
        let weighted = lanes.mul(slope, lanes.splat(self.weight));
        if WHOLE {
            lanes.store(loss, losses);
            lanes.store(weighted, slopes);
        } else {
            losses.copy_from_slice(&numbers(lanes, loss)[..losses.len()]);
            slopes.copy_from_slice(&numbers(lanes, weighted)[..slopes.len()]);
        }
        let clipped_low = lanes.and(tokens.beyond, down);
        let clipped_high = lanes.and_not(tokens.beyond, down);
        sums.loss = lanes.add(sums.loss, loss);
        sums.kl_k3 = lanes.add(sums.kl_k3, exponentials.gap);
        sums.gradient_free = lanes.add(sums.gradient_free, lanes.abs(free));
        let removed = lanes.abs(lanes.sub(free, slope));
        sums.gradient_removed = lanes.add(sums.gradient_removed, removed);
        let count = |mask: L::Mask| u64::from(lanes.bits(mask).count_ones());
        sums.counts += count(clipped_low) | count(clipped_high) << 16 | count(limited) << 32;
        if self.by_probability {
            // SAFETY: as the caller says.
            let old_log_prob = unsafe { load::<WHOLE, L>(lanes, self.columns.old_log_prob, index) };
            let kinds = [valid, clipped_low, clipped_high];
            self.totals.count_by_probability(lanes, old_log_prob, kinds);
        }
    }
}

#[cold]
fn nonfinite<T: Float>(losses: &[T]) -> u64 {
    losses.iter().filter(|loss| !loss.to_f64().is_finite()).count() as u64
}

impl Totals {
    #[inline(always)]
    fn take<L: Lanes<Scalar: Float>>(&mut self, lanes: L, sums: &Sums<L>, losses: &[L::Scalar]) {
        let loss = sum(lanes, sums.loss);
        self.loss += loss;
        self.kl_k3 += sum(lanes, sums.kl_k3);
        self.gradient_free += sum(lanes, sums.gradient_free);
        self.gradient_removed += sum(lanes, sums.gradient_removed);
        let [clipped_low, clipped_high, limited] =
            [0, 16, 32].map(|shift| sums.counts >> shift & 0xffff);
        self.clipped_low += clipped_low;
        self.clipped_high += clipped_high;
        self.limited += limited;
        if !loss.is_finite() {
            self.nonfinite += nonfinite(losses);
        }
    }
}
