//! Sums and counts over the tokens of a batch.

// A function of vectors has to become part of one that is compiled for their instructions.
#![allow(clippy::inline_always)]

use crate::loss::Float;
use crate::loss::columns::numbers;
use crate::loss::nan::min_or_nan;
use crate::simd::Number;
use crate::simd::lanes::Lanes;

/// Max log-probability that rounding may make of one that is at most 0, also in bfloat16.
pub const MAX_LOG_PROB: f64 = 0.05;

/// Edges between bins of the old probability. An edge belongs to the bin above it.
pub const PROBABILITY_EDGES: [f64; 4] = [1e-3, 1e-2, 1e-1, 0.5];

/// Number of bins of the old probability.
pub const PROBABILITY_BINS: usize = PROBABILITY_EDGES.len() + 1;

/// Sums, counts and extremes over the tokens that count. Those of two batches can be merged, unlike means.
///
/// `A` is a token's advantage, `x` its log-ratio, clamped to `±`[`LOG_RATIO_LIMIT`](crate::LOG_RATIO_LIMIT), and
/// `r = e^x`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Totals {
    /// Tokens that count.
    pub valid: u64,
    /// Tokens whose loss is infinite or NaN.
    pub nonfinite: u64,
    /// Tokens beyond their lower bound, by the table of [`surrogate`](crate::loss::surrogate).
    pub clipped_low: u64,
    /// Tokens beyond their upper bound.
    pub clipped_high: u64,
    /// Tokens that the dual clip acts on, or whose weight was truncated.
    pub limited: u64,
    /// Tokens with a log-prob above [`MAX_LOG_PROB`].
    pub positive: u64,
    /// Sum of the losses.
    pub loss: f64,
    /// Sum of `-x`.
    pub kl: f64,
    /// Sum of `r - 1 - x`.
    pub kl_k3: f64,
    /// Sum of `-old_log_prob`.
    pub entropy: f64,
    /// Sum of `abs(A) r`, the gradient without a rule.
    pub gradient_unclipped: f64,
    /// Sum of the absolute change of the gradient by the rule.
    pub gradient_removed: f64,
    /// Min `x`, NaN if any is, infinite for no token.
    pub log_ratio_min: f64,
    /// Max `x`, NaN if any is, `-inf` for no token.
    pub log_ratio_max: f64,
    /// Counts of each bin of the old probability, ascending. All 0 unless requested.
    pub by_probability: [ProbabilityBin; PROBABILITY_BINS],
}

/// Counts of the tokens whose old probability lies in one bin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ProbabilityBin {
    /// Tokens that count.
    pub valid: u64,
    /// As in [`Totals`].
    pub clipped_low: u64,
    /// As in [`Totals`].
    pub clipped_high: u64,
}

impl Default for Totals {
    fn default() -> Self {
        Self {
            valid: 0,
            nonfinite: 0,
            clipped_low: 0,
            clipped_high: 0,
            limited: 0,
            positive: 0,
            loss: 0.0,
            kl: 0.0,
            kl_k3: 0.0,
            entropy: 0.0,
            gradient_unclipped: 0.0,
            gradient_removed: 0.0,
            log_ratio_min: f64::INFINITY,
            log_ratio_max: f64::NEG_INFINITY,
            by_probability: [ProbabilityBin::default(); PROBABILITY_BINS],
        }
    }
}

impl Totals {
    pub(super) fn merge(mut self, other: &Self) -> Self {
        self.valid += other.valid;
        self.nonfinite += other.nonfinite;
        self.clipped_low += other.clipped_low;
        self.clipped_high += other.clipped_high;
        self.limited += other.limited;
        self.positive += other.positive;
        self.loss += other.loss;
        self.kl += other.kl;
        self.kl_k3 += other.kl_k3;
        self.entropy += other.entropy;
        self.gradient_unclipped += other.gradient_unclipped;
        self.gradient_removed += other.gradient_removed;
        self.log_ratio_min = min_or_nan(self.log_ratio_min, other.log_ratio_min);
        self.log_ratio_max = -min_or_nan(-self.log_ratio_max, -other.log_ratio_max);
        for (bin, more) in self.by_probability.iter_mut().zip(&other.by_probability) {
            bin.valid += more.valid;
            bin.clipped_low += more.clipped_low;
            bin.clipped_high += more.clipped_high;
        }
        self
    }
}

/// Combines all lanes of a vector, in pairs.
#[inline(always)]
pub(super) fn reduce<L: Lanes<Scalar: Float>>(
    lanes: L,
    vector: L::Float,
    operation: impl Fn(f64, f64) -> f64,
) -> f64 {
    let mut rest = numbers(lanes, vector).map(Number::to_f64);
    let mut count = L::COUNT;
    while count > 1 {
        count /= 2;
        for lane in 0..count {
            rest[lane] = operation(rest[lane], rest[lane + count]);
        }
    }
    rest[0]
}

#[inline(always)]
pub(super) fn sum<L: Lanes<Scalar: Float>>(lanes: L, vector: L::Float) -> f64 {
    reduce(lanes, vector, |a, b| a + b)
}

impl Totals {
    /// Counts tokens by bin: `kinds` are those that are valid, clipped low and clipped high.
    #[inline(always)]
    pub(super) fn count_by_probability<L: Lanes>(
        &mut self,
        lanes: L,
        old_log_prob: L::Float,
        kinds: [L::Mask; 3],
    ) {
        let above =
            PROBABILITY_EDGES.map(|edge| lanes.less_or_equal(lanes.splat(edge.ln()), old_log_prob));
        for (index, bin) in self.by_probability.iter_mut().enumerate() {
            let [valid, clipped_low, clipped_high] = kinds.map(|mut kind| {
                if index > 0 {
                    kind = lanes.and(kind, above[index - 1]);
                }
                if index < above.len() {
                    kind = lanes.and_not(kind, above[index]);
                }
                u64::from(lanes.bits(kind).count_ones())
            });
            bin.valid += valid;
            bin.clipped_low += clipped_low;
            bin.clipped_high += clipped_high;
        }
    }
}
