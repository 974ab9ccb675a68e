//! Last step: losses and gradients.

// A function of vectors has to become part of one that is compiled for their instructions.
#![allow(clippy::inline_always)]

use crate::loss::collect::clamp;
use crate::loss::columns::{Columns, load, numbers};
use crate::loss::nan::count_nonfinite;
use crate::loss::scratch::{Candidates, Column};
use crate::loss::surrogate::{MIN_WIDTH, Outcome, Rule, Selection, TokenVector};
use crate::loss::totals::sum;
use crate::loss::{Float, LOG_RATIO_LIMIT, Totals};
use crate::simd::lanes::Lanes;
use crate::simd::{LossLanes, WithLanes};

/// Writes losses and weighted gradients.
pub(super) struct Apply<'a, T, R, const ANCHORED: bool> {
    pub(super) rule: R,
    pub(super) columns: Columns<'a, T>,
    pub(super) by_probability: bool,
    pub(super) log_ratio: &'a Column<T>,
    pub(super) neg_advantage: &'a Column<T>,
    pub(super) candidates: &'a Candidates<T>,
    pub(super) weight: f64,
    pub(super) per_token: &'a mut [T],
    pub(super) gradient: &'a mut [T],
    pub(super) totals: &'a mut Totals,
}

impl<T: Float, R: Rule, const ANCHORED: bool> WithLanes<T> for Apply<'_, T, R, ANCHORED> {
    type Output = ();

    #[inline(always)]
    fn run<L: LossLanes<Scalar = T>>(mut self, lanes: L) {
        let zero = lanes.splat(0.0);
        let mut sums = Sums {
            loss: zero,
            kl_k3: zero,
            gradient_unclipped: zero,
            gradient_removed: zero,
            counts: PackedCounts::default(),
        };
        let count = self.columns.mask.len();
        let (mut index, mut candidate) = (0, 0);
        while index + L::COUNT <= count {
            // SAFETY: all columns and outputs have tokens up to `count`.
            unsafe { self.step::<true, L>(lanes, index, &mut candidate, &mut sums) };
            index += L::COUNT;
        }
        if index < count {
            // SAFETY: likewise.
            unsafe { self.step::<false, L>(lanes, index, &mut candidate, &mut sums) };
        }
        sums.add_to(lanes, self.totals, self.per_token);
    }
}

impl<T: Float, R: Rule, const ANCHORED: bool> Apply<'_, T, R, ANCHORED> {
    /// # Safety
    /// Every column and output meets the condition of [`load`].
    #[inline(always)]
    unsafe fn step<const WHOLE: bool, L: LossLanes<Scalar = T>>(
        &mut self,
        lanes: L,
        index: usize,
        candidate: &mut usize,
        sums: &mut Sums<L>,
    ) {
        let zero = lanes.splat(0.0);
        let (losses, gradients) = (&mut self.per_token[index..], &mut self.gradient[index..]);
        // SAFETY: required of the caller.
        let valid = unsafe { self.columns.valid::<WHOLE, L>(lanes, index) };
        if WHOLE && lanes.bits(valid) == 0 {
            lanes.store(zero, losses);
            lanes.store(zero, gradients);
            return;
        }
        let neg_advantage = lanes.load(&self.neg_advantage[index..]);
        let unclamped = lanes.load(&self.log_ratio[index..]);
        let candidates = self.candidates.bits[index / L::COUNT];
        let expanded =
            lanes.expand(lanes.mask_of(candidates), &self.candidates.scratch[*candidate..]);
        *candidate += candidates.count_ones() as usize;

        let log_ratio = clamp(lanes, unclamped);
        let exponentials = lanes.exp_and_gap(log_ratio);
        let ratio = exponentials.exp;
        let unclipped = lanes.mul(neg_advantage, ratio);
        // SAFETY: required of the caller.
        let column = |column: &[T]| unsafe {
            lanes.select(valid, load::<WHOLE, L>(lanes, column, index), zero)
        };
        let log_prob = column(self.columns.log_prob);
        // The last two are for rules that need a width alone.
        let (compared, excess, loss_scale) = match self.columns.anchor_log_prob {
            Some(anchor) if ANCHORED && R::Selection::NEEDS_WIDTH => {
                let anchor = column(anchor);
                let compared = match self.columns.log_ratio {
                    Some(_) => {
                        let old_log_prob = column(self.columns.old_log_prob);
                        lanes.sub(unclamped, lanes.sub(anchor, old_log_prob))
                    }
                    None => lanes.sub(log_prob, anchor),
                };
                let compared = clamp(lanes, compared);
                let of_compared = lanes.exp_and_gap(compared);
                let excess = lanes.add(of_compared.gap, compared);
                (compared, excess, lanes.div(ratio, of_compared.exp))
            }
            _ => (log_ratio, lanes.add(exponentials.gap, log_ratio), lanes.splat(1.0)),
        };
        let clipped_ratio = if ANCHORED { lanes.abs(expanded) } else { expanded };
        let lower = if ANCHORED && R::Selection::BY_LOG_RATIO && !R::Selection::NEEDS_WIDTH {
            lanes.less(expanded, zero) // for tokens beyond their bound, which is what it counts for
        } else if R::Selection::BY_LOG_RATIO {
            lanes.less(compared, zero)
        } else {
            lanes.less(zero, neg_advantage)
        };
        let width = lanes.clamp_min(MIN_WIDTH, expanded);
        let tokens = TokenVector {
            log_prob,
            neg_advantage,
            log_ratio,
            ratio,
            unclipped,
            clipped_ratio,
            width,
            excess,
            loss_scale,
            clamped: lanes.less(lanes.splat(LOG_RATIO_LIMIT), lanes.abs(unclamped)),
            beyond: if R::Selection::NEEDS_WIDTH {
                lanes.less(width, lanes.abs(excess))
            } else if ANCHORED {
                // Where anchor and old are 0, the place of the bound is 0/0, and the token is beyond it.
                lanes.or(lanes.less(zero, clipped_ratio), lanes.is_nan(clipped_ratio))
            } else {
                lanes.less(zero, clipped_ratio)
            },
            lower,
        };
        let Outcome { loss, gradient, limited } = self.rule.apply(lanes, &tokens);
        let weighted = lanes.mul(gradient, lanes.splat(self.weight));
        if WHOLE {
            lanes.store(loss, losses);
            lanes.store(weighted, gradients);
        } else {
            losses.copy_from_slice(&numbers(lanes, loss)[..losses.len()]);
            gradients.copy_from_slice(&numbers(lanes, weighted)[..gradients.len()]);
        }
        let clipped_low = lanes.and(tokens.beyond, lower);
        let clipped_high = lanes.and_not(tokens.beyond, lower);
        sums.loss = lanes.add(sums.loss, loss);
        sums.kl_k3 = lanes.add(sums.kl_k3, exponentials.gap);
        sums.gradient_unclipped = lanes.add(sums.gradient_unclipped, lanes.abs(unclipped));
        let removed = lanes.abs(lanes.sub(unclipped, gradient));
        sums.gradient_removed = lanes.add(sums.gradient_removed, removed);
        sums.counts.add(lanes, clipped_low, clipped_high, limited);
        if self.by_probability {
            // SAFETY: required of the caller.
            let old_log_prob = unsafe { load::<WHOLE, L>(lanes, self.columns.old_log_prob, index) };
            let kinds = [valid, clipped_low, clipped_high];
            self.totals.count_by_probability(lanes, old_log_prob, kinds);
        }
    }
}

/// Sums over the vectors of a block. Tokens that do not count add 0.
struct Sums<L: Lanes> {
    loss: L::Float,
    kl_k3: L::Float,
    gradient_unclipped: L::Float,
    gradient_removed: L::Float,
    counts: PackedCounts,
}

impl<L: Lanes<Scalar: Float>> Sums<L> {
    #[inline(always)]
    fn add_to(&self, lanes: L, totals: &mut Totals, losses: &[L::Scalar]) {
        let loss = sum(lanes, self.loss);
        totals.loss += loss;
        totals.kl_k3 += sum(lanes, self.kl_k3);
        totals.gradient_unclipped += sum(lanes, self.gradient_unclipped);
        totals.gradient_removed += sum(lanes, self.gradient_removed);
        totals.clipped_low += self.counts.clipped_low();
        totals.clipped_high += self.counts.clipped_high();
        totals.limited += self.counts.limited();
        if !loss.is_finite() {
            totals.nonfinite += count_nonfinite(losses);
        }
    }
}

/// Counts of a block in one word, 16 bits each. Compilers turn separate counts into table lookups.
#[derive(Clone, Copy, Default)]
struct PackedCounts(u64);

impl PackedCounts {
    #[inline(always)]
    fn add<L: Lanes>(
        &mut self,
        lanes: L,
        clipped_low: L::Mask,
        clipped_high: L::Mask,
        limited: L::Mask,
    ) {
        let count = |mask: L::Mask| u64::from(lanes.bits(mask).count_ones());
        self.0 += count(clipped_low) | count(clipped_high) << 16 | count(limited) << 32;
    }

    #[inline(always)]
    fn clipped_low(self) -> u64 {
        self.0 & 0xffff
    }

    #[inline(always)]
    fn clipped_high(self) -> u64 {
        self.0 >> 16 & 0xffff
    }

    #[inline(always)]
    fn limited(self) -> u64 {
        self.0 >> 32 & 0xffff
    }
}
