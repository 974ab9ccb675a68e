//! The clipped policy loss of every token and its gradient, in one pass over the batch.
//!
//! With `r = e^(new - old)`, the log-ratio clamped to `±`[`LOG_RATIO_LIMIT`], and the bounds of the
//! token, the min-clip surrogate (PPO, with dual clip: Ye et al. 2020, arXiv 1912.09729) is
//!
//! | | loss | gradient with respect to `new` is `-A r`, except 0 where |
//! |---|---|---|
//! | `A > 0` | `-A min(r, upper)` | `r > upper` |
//! | `A < 0` | `min(-A max(r, lower), -A c)` | `r < lower` or `r >= c` |
//!
//! and 0 where the clamp acts. At `r` equal to a bound the gradient passes. Only the side that the
//! sign of the advantage selects is looked up.

use std::fmt::Debug;

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::table::Image;

/// Log-ratios are clamped to plus and minus this before they are exponentiated.
pub const LOG_RATIO_LIMIT: f64 = 20.0;

/// Where one bin of the old probability ends and the next, which it belongs to, begins.
pub const PROBABILITY_EDGES: [f64; 4] = [1e-3, 1e-2, 1e-1, 0.5];

/// Bins of the old probability.
pub const PROBABILITY_BINS: usize = PROBABILITY_EDGES.len() + 1;

/// Tokens that are added up at a time. Fixed, so that sums do not depend on the number of threads.
const CHUNK: usize = 8192;

/// Fewer tokens than this are done sooner than other threads wake up.
const PARALLEL_FROM: usize = 2 * CHUNK;

mod sealed {
    use std::ops::{Mul, Neg, Sub};

    /// What the loss needs of a number.
    pub trait Number:
        Copy + PartialOrd + Sub<Output = Self> + Mul<Output = Self> + Neg<Output = Self>
    {
        const ZERO: Self;
        fn from_f64(value: f64) -> Self;
        fn from_f32(value: f32) -> Self;
        fn to_f64(self) -> f64;
        fn to_f32(self) -> f32;
        fn exp(self) -> Self;
        fn exp_m1(self) -> Self;
        /// Keeps a NaN.
        fn clamp(self, limit: Self) -> Self;
        fn is_finite(self) -> bool;
    }

    macro_rules! number {
        ($float:ty) => {
            impl Number for $float {
                const ZERO: Self = 0.0;
                fn from_f64(value: f64) -> Self {
                    value as Self
                }
                fn from_f32(value: f32) -> Self {
                    value as Self
                }
                fn to_f64(self) -> f64 {
                    f64::from(self)
                }
                fn to_f32(self) -> f32 {
                    self as f32
                }
                fn exp(self) -> Self {
                    self.exp()
                }
                fn exp_m1(self) -> Self {
                    self.exp_m1()
                }
                fn clamp(self, limit: Self) -> Self {
                    self.clamp(-limit, limit)
                }
                fn is_finite(self) -> bool {
                    self.is_finite()
                }
            }
        };
    }
    number!(f32);
    number!(f64);
}

/// The float types that a loss is computed in: `f32` and `f64`.
pub trait Float: sealed::Number + Send + Sync + Debug {}
impl Float for f32 {}
impl Float for f64 {}

/// Advantages: one a token, or one for all tokens of a row.
#[derive(Debug, Clone, Copy)]
pub enum Advantages<'a, T> {
    /// One a token.
    PerToken(&'a [T]),
    /// One a row.
    PerRow {
        /// The advantages.
        values: &'a [T],
        /// How many consecutive tokens share one.
        row_length: usize,
    },
}

impl<T: Float> Advantages<'_, T> {
    fn at(&self, index: usize) -> T {
        match self {
            Self::PerToken(values) => values[index],
            Self::PerRow { values, row_length } => values[index / row_length],
        }
    }

    fn tokens(&self) -> usize {
        match self {
            Self::PerToken(values) => values.len(),
            Self::PerRow { values, row_length } => values.len() * row_length,
        }
    }
}

/// A batch of tokens, each slice one element a token.
#[derive(Debug, Clone, Copy)]
pub struct Tokens<'a, T> {
    /// Natural log-probabilities under the policy that drew the tokens.
    pub old_log_prob: &'a [T],
    /// The same under the policy being trained.
    pub log_prob: &'a [T],
    /// How much better than expected the tokens did.
    pub advantages: Advantages<'a, T>,
    /// 0 for tokens that do not count, which may hold anything.
    pub mask: &'a [u8],
}

/// Where the bounds come from.
#[derive(Debug, Clone, Copy)]
pub enum BoundSource<'a, T> {
    /// The same log bounds for every token.
    Constant {
        /// At most 0.
        log_lower: T,
        /// At least 0.
        log_upper: T,
    },
    /// A table.
    Table(Image<'a>),
    /// The log bounds of every token.
    PerToken {
        /// At most 0 each.
        log_lower: &'a [T],
        /// At least 0 each.
        log_upper: &'a [T],
    },
}

/// What the tokens that count add up to. Sums, not means, so that those of batches can be merged.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Totals {
    /// Tokens that count.
    pub valid: u64,
    /// Those of them whose loss is infinite or NaN.
    pub nonfinite: u64,
    /// Those with `A < 0` and `r < lower`.
    pub clipped_low: u64,
    /// Those with `A > 0` and `r > upper`.
    pub clipped_high: u64,
    /// Those that the dual clip acts on.
    pub dual_clipped: u64,
    /// Sum of `-ln r`.
    pub kl: f64,
    /// Sum of `r - 1 - ln r`.
    pub kl_k3: f64,
    /// Smallest `r`, NaN if any is, infinite for no token.
    pub ratio_min: f64,
    /// Greatest `r`, NaN if any is, `-inf` for no token.
    pub ratio_max: f64,
    /// By old probability, ascending; all 0 unless they were asked for.
    pub by_probability: [ProbabilityBin; PROBABILITY_BINS],
}

/// The tokens whose old probability lies in one bin.
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
            dual_clipped: 0,
            kl: 0.0,
            kl_k3: 0.0,
            ratio_min: f64::INFINITY,
            ratio_max: f64::NEG_INFINITY,
            by_probability: [ProbabilityBin::default(); PROBABILITY_BINS],
        }
    }
}

impl Totals {
    fn merge(mut self, other: &Self) -> Self {
        self.valid += other.valid;
        self.nonfinite += other.nonfinite;
        self.clipped_low += other.clipped_low;
        self.clipped_high += other.clipped_high;
        self.dual_clipped += other.dual_clipped;
        self.kl += other.kl;
        self.kl_k3 += other.kl_k3;
        self.ratio_min = smaller(self.ratio_min, other.ratio_min);
        self.ratio_max = -smaller(-self.ratio_max, -other.ratio_max);
        for (bin, more) in self.by_probability.iter_mut().zip(&other.by_probability) {
            bin.valid += more.valid;
            bin.clipped_low += more.clipped_low;
            bin.clipped_high += more.clipped_high;
        }
        self
    }
}

/// The minimum, NaN if either is, unlike `f64::min`.
fn smaller(a: f64, b: f64) -> f64 {
    if b < a || b.is_nan() { b } else { a }
}

/// Writes the loss of every token and its gradient with respect to `log_prob`; returns the totals.
///
/// Tokens that do not count get 0 for both, whatever they hold. A NaN makes loss and gradient of its
/// token NaN. Results are the same bit for bit on any number of threads.
///
/// # Errors
/// [`Error::Length`] if two slices differ in length, [`Error::Argument`] if `dual_clip` is not above 1.
pub fn min_clip<T: Float>(
    tokens: &Tokens<'_, T>,
    bounds: &BoundSource<'_, T>,
    dual_clip: Option<f64>,
    by_probability: bool,
    per_token: &mut [T],
    gradient: &mut [T],
) -> Result<Totals> {
    let count = tokens.log_prob.len();
    let bound_lengths = match bounds {
        BoundSource::PerToken { log_lower, log_upper } => (log_lower.len(), log_upper.len()),
        _ => (count, count),
    };
    for (argument, actual) in [
        ("old_log_prob", tokens.old_log_prob.len()),
        ("advantages", tokens.advantages.tokens()),
        ("mask", tokens.mask.len()),
        ("log_lower", bound_lengths.0),
        ("log_upper", bound_lengths.1),
        ("per_token", per_token.len()),
        ("gradient", gradient.len()),
    ] {
        if actual != count {
            return Err(Error::Length { argument, actual, expected: count });
        }
    }
    let cap = match dual_clip {
        Some(ratio) if ratio > 1.0 => {
            Cap { log_ratio: T::from_f64(ratio.ln()), ratio: T::from_f64(ratio) }
        }
        Some(ratio) => {
            return Err(Error::Argument {
                argument: "dual_clip",
                value: ratio.to_string(),
                allowed: "above 1",
            });
        }
        None => Cap { log_ratio: T::from_f64(f64::INFINITY), ratio: T::from_f64(f64::INFINITY) },
    };
    Ok(match *bounds {
        BoundSource::Constant { log_lower, log_upper } => {
            let bounds = Constant { log_lower, log_upper };
            batch(tokens, &bounds, cap, by_probability, per_token, gradient)
        }
        BoundSource::Table(image) => {
            batch(tokens, &image, cap, by_probability, per_token, gradient)
        }
        BoundSource::PerToken { log_lower, log_upper } => {
            let bounds = PerToken { log_lower, log_upper };
            batch(tokens, &bounds, cap, by_probability, per_token, gradient)
        }
    })
}

/// The dual clip, at infinity if there is none.
#[derive(Clone, Copy)]
struct Cap<T> {
    log_ratio: T,
    ratio: T,
}

/// The bounds of a token: each side answers whether a ratio is beyond it, and where it lies if so.
trait Bounds<T>: Sync {
    /// The upper bound, where `log_ratio` is above it.
    fn upper_if_above(&self, index: usize, old_log_prob: T, log_ratio: T) -> Option<T>;
    /// The lower bound, where `ratio = e^log_ratio` is below it.
    fn lower_if_below(&self, index: usize, old_log_prob: T, log_ratio: T, ratio: T) -> Option<T>;
}

struct Constant<T> {
    log_lower: T,
    log_upper: T,
}

impl<T: Float> Bounds<T> for Constant<T> {
    fn upper_if_above(&self, _: usize, _: T, log_ratio: T) -> Option<T> {
        (log_ratio > self.log_upper).then(|| self.log_upper.exp())
    }

    fn lower_if_below(&self, _: usize, _: T, log_ratio: T, _: T) -> Option<T> {
        (log_ratio < self.log_lower).then(|| self.log_lower.exp())
    }
}

struct PerToken<'a, T> {
    log_lower: &'a [T],
    log_upper: &'a [T],
}

impl<T: Float> Bounds<T> for PerToken<'_, T> {
    fn upper_if_above(&self, index: usize, _: T, log_ratio: T) -> Option<T> {
        let bound = self.log_upper[index];
        (log_ratio > bound).then(|| bound.exp())
    }

    fn lower_if_below(&self, index: usize, _: T, log_ratio: T, _: T) -> Option<T> {
        let bound = self.log_lower[index];
        (log_ratio < bound).then(|| bound.exp())
    }
}

impl<T: Float> Bounds<T> for Image<'_> {
    fn upper_if_above(&self, _: usize, old_log_prob: T, log_ratio: T) -> Option<T> {
        let y = Self::y(old_log_prob.to_f32());
        let tabulated = self.log_upper(y);
        // Where everything is allowed, y in f32 could fall short of a new probability of 1.
        let bound = if tabulated >= y && old_log_prob <= T::ZERO {
            -old_log_prob
        } else {
            T::from_f32(tabulated)
        };
        (log_ratio > bound).then(|| bound.exp())
    }

    fn lower_if_below(&self, _: usize, old_log_prob: T, _: T, ratio: T) -> Option<T> {
        // The table holds this side as a ratio.
        let bound = T::from_f32(self.lower(Self::y(old_log_prob.to_f32())));
        (ratio < bound).then_some(bound)
    }
}

/// All chunks, on several threads if there are many; totals are merged in the order of the tokens.
fn batch<T: Float>(
    tokens: &Tokens<'_, T>,
    bounds: &impl Bounds<T>,
    cap: Cap<T>,
    by_probability: bool,
    per_token: &mut [T],
    gradient: &mut [T],
) -> Totals {
    let parallel = per_token.len() >= PARALLEL_FROM;
    let one = |(index, (per_token, gradient)): (usize, (&mut [T], &mut [T]))| {
        chunk(tokens, bounds, cap, by_probability, index * CHUNK, per_token, gradient)
    };
    let totals: Vec<Totals> = if parallel {
        let outputs = per_token.par_chunks_mut(CHUNK).zip(gradient.par_chunks_mut(CHUNK));
        outputs.enumerate().map(one).collect()
    } else {
        let outputs = per_token.chunks_mut(CHUNK).zip(gradient.chunks_mut(CHUNK));
        outputs.enumerate().map(one).collect()
    };
    totals.iter().fold(Totals::default(), Totals::merge)
}

/// The tokens from `start` on, as many as the outputs hold.
fn chunk<T: Float>(
    tokens: &Tokens<'_, T>,
    bounds: &impl Bounds<T>,
    cap: Cap<T>,
    by_probability: bool,
    start: usize,
    per_token: &mut [T],
    gradient: &mut [T],
) -> Totals {
    let limit = T::from_f64(LOG_RATIO_LIMIT);
    let edges = PROBABILITY_EDGES.map(|edge| T::from_f64(edge.ln()));
    let mut totals = Totals::default();
    for (offset, (loss, slope)) in per_token.iter_mut().zip(gradient).enumerate() {
        let index = start + offset;
        if tokens.mask[index] == 0 {
            (*loss, *slope) = (T::ZERO, T::ZERO);
            continue;
        }
        let old_log_prob = tokens.old_log_prob[index];
        let advantage = tokens.advantages.at(index);
        let unclamped = tokens.log_prob[index] - old_log_prob;
        let log_ratio = unclamped.clamp(limit);
        let clamped = unclamped < -limit || unclamped > limit;
        let ratio = log_ratio.exp();

        let (mut clipped_low, mut clipped_high, mut dual_clipped) = (false, false, false);
        let mut surrogate = ratio;
        if advantage > T::ZERO {
            if let Some(upper) = bounds.upper_if_above(index, old_log_prob, log_ratio) {
                (surrogate, clipped_high) = (upper, true);
            }
        } else if advantage < T::ZERO {
            if log_ratio >= cap.log_ratio {
                (surrogate, dual_clipped) = (cap.ratio, true);
            } else if let Some(lower) = bounds.lower_if_below(index, old_log_prob, log_ratio, ratio)
            {
                (surrogate, clipped_low) = (lower, true);
            }
        }
        let stopped = clipped_low || clipped_high || dual_clipped || clamped;
        *loss = -advantage * surrogate;
        *slope = if stopped { T::ZERO } else { *loss };

        totals.valid += 1;
        totals.nonfinite += u64::from(!loss.is_finite());
        totals.clipped_low += u64::from(clipped_low);
        totals.clipped_high += u64::from(clipped_high);
        totals.dual_clipped += u64::from(dual_clipped);
        totals.kl -= log_ratio.to_f64();
        // Not ratio - 1: near 1, where it matters, that has lost the digits.
        totals.kl_k3 += (log_ratio.exp_m1() - log_ratio).to_f64();
        totals.ratio_min = smaller(totals.ratio_min, ratio.to_f64());
        totals.ratio_max = -smaller(-totals.ratio_max, -ratio.to_f64());
        if by_probability {
            let bin = edges.iter().filter(|edge| old_log_prob >= **edge).count();
            let bin = &mut totals.by_probability[bin];
            bin.valid += 1;
            bin.clipped_low += u64::from(clipped_low);
            bin.clipped_high += u64::from(clipped_high);
        }
    }
    totals
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::band::Band;
    use crate::divergence::Divergence;
    use crate::table::BandTable;

    fn table(spec: &str, delta: f64) -> BandTable {
        let band = Band::new(Divergence::parse(spec).unwrap(), delta, delta).unwrap();
        BandTable::of_band(&band).unwrap()
    }

    /// Loss, gradient and totals of single tokens `(old, new, advantage)`, all valid.
    fn run<T: Float>(
        tokens: &[(T, T, T)],
        bounds: &BoundSource<'_, T>,
        dual_clip: Option<f64>,
    ) -> (Vec<T>, Vec<T>, Totals) {
        let column = |pick: fn(&(T, T, T)) -> T| tokens.iter().map(pick).collect::<Vec<T>>();
        let (old, new, advantage) =
            (column(|token| token.0), column(|token| token.1), column(|token| token.2));
        let mut per_token = vec![T::ZERO; tokens.len()];
        let mut gradient = vec![T::ZERO; tokens.len()];
        let tokens = Tokens {
            old_log_prob: &old,
            log_prob: &new,
            advantages: Advantages::PerToken(&advantage),
            mask: &vec![1; old.len()],
        };
        let totals =
            min_clip(&tokens, bounds, dual_clip, true, &mut per_token, &mut gradient).unwrap();
        (per_token, gradient, totals)
    }

    #[test]
    fn where_everything_is_allowed_a_new_probability_of_1_is() {
        let table = table("tv", 0.3);
        let tokens: Vec<(f64, f64, f64)> =
            (0..1000).map(|i| (-f64::from(i) / 3000.0, 0.0, 1.0)).collect();
        let (loss, slope, totals) = run(&tokens, &BoundSource::Table(table.image()), None);
        assert_eq!((loss, totals.clipped_high), (slope, 0));
    }

    #[test]
    fn each_rule_stops_the_gradient_on_its_own_side_only() {
        let (lower, upper, c) = (0.8_f64, 1.28_f64, 3.0_f64);
        let bounds = BoundSource::Constant { log_lower: lower.ln(), log_upper: upper.ln() };
        let case = |log_ratio: f64, advantage: f64| {
            let (loss, slope, totals) =
                run(&[(-1.0, -1.0 + log_ratio, advantage)], &bounds, Some(c));
            (loss[0], slope[0], totals)
        };
        let near = |a: f64, b: f64| assert!((a - b).abs() <= 1e-14 * b.abs(), "{a} {b}");

        let (loss, slope, totals) = case(0.5, 2.0);
        near(loss, -2.0 * upper);
        assert_eq!((slope, totals.clipped_high, totals.clipped_low), (0.0, 1, 0));

        let (loss, slope, totals) = case(-0.5, 2.0);
        near(loss, -2.0 * (-0.5_f64).exp());
        assert_eq!((slope, totals.clipped_high, totals.clipped_low), (loss, 0, 0));

        let (loss, slope, totals) = case(-0.5, -2.0);
        near(loss, 2.0 * lower);
        assert_eq!((slope, totals.clipped_high, totals.clipped_low), (0.0, 0, 1));

        let (loss, slope, totals) = case(2.0, -2.0);
        near(loss, 2.0 * c);
        assert_eq!((slope, totals.dual_clipped, totals.clipped_low), (0.0, 1, 0));

        let (loss, slope, _) = case(1.0, -2.0);
        near(loss, 2.0 * 1.0_f64.exp());
        assert_eq!(slope, loss);
    }

    #[test]
    fn at_a_bound_the_gradient_passes_and_at_the_dual_clip_it_does_not() {
        let bounds = BoundSource::Constant { log_lower: -0.25, log_upper: 0.25 };
        let (loss, slope, totals) = run(
            &[(0.0, 0.25, 1.0), (0.0, -0.25, -1.0), (0.0, 3.0_f64.ln(), -1.0)],
            &bounds,
            Some(3.0),
        );
        assert_eq!(loss[..2], slope[..2]);
        assert_eq!((slope[2], loss[2]), (0.0, 3.0));
        assert_eq!((totals.clipped_high, totals.clipped_low, totals.dual_clipped), (0, 0, 1));
    }

    #[test]
    fn the_clamp_acts_beyond_its_limit_only() {
        let free = BoundSource::Constant { log_lower: f64::NEG_INFINITY, log_upper: f64::INFINITY };
        let (loss, slope, totals) = run(
            &[(0.0, -20.0, 1.0), (-20.0, 0.0, 1.0), (-21.0, 0.0, 1.0), (0.0, -800.0, 1.0)],
            &free,
            None,
        );
        assert_eq!(loss[..2], slope[..2]);
        assert_eq!((loss[2], slope[2]), (-(20.0_f64.exp()), 0.0));
        assert_eq!((loss[3], slope[3]), (-((-20.0_f64).exp()), 0.0));
        assert_eq!((totals.ratio_min, totals.ratio_max), ((-20.0_f64).exp(), 20.0_f64.exp()));
    }

    #[test]
    fn a_nan_stays_with_its_token_and_a_masked_one_is_nowhere() {
        let nan = f32::NAN;
        let table = table("kl", 0.05);
        let bounds = BoundSource::Table(table.image());
        let (loss, slope, totals) = run(
            &[(nan, -1.0, 1.0), (-1.0, nan, -1.0), (-1.0, -1.0, nan), (-1.0, -1.0, 1.0)],
            &bounds,
            None,
        );
        assert!(loss[..3].iter().chain(&slope[..3]).all(|value| value.is_nan()));
        assert_eq!((loss[3], slope[3], totals.nonfinite, totals.valid), (-1.0, -1.0, 3, 4));
        assert!(totals.ratio_min.is_nan() && totals.ratio_max.is_nan() && totals.kl.is_nan());

        let tokens = Tokens {
            old_log_prob: &[nan, -1.0],
            log_prob: &[f32::INFINITY, -1.5],
            advantages: Advantages::PerToken(&[nan, 1.0]),
            mask: &[0, 1],
        };
        let (mut loss, mut slope) = ([nan; 2], [nan; 2]);
        let totals = min_clip(&tokens, &bounds, None, true, &mut loss, &mut slope).unwrap();
        assert_eq!((loss[0], slope[0], totals.valid, totals.nonfinite), (0.0, 0.0, 1, 0));
        assert_eq!((totals.kl, totals.ratio_min), (0.5, f64::from((-0.5_f32).exp())));
    }

    #[test]
    fn many_tokens_are_the_sum_of_their_parts_on_any_number_of_threads() {
        let count = 3 * PARALLEL_FROM + 17;
        let table = table("kl", 0.05);
        let bounds = BoundSource::Table(table.image());
        let wave = |i: usize, frequency: f64| (i as f64 * frequency).sin();
        let tokens: Vec<(f64, f64, f64)> = (0..count)
            .map(|i| {
                let old = -5.0 - 5.0 * wave(i, 0.37);
                (old, old + wave(i, 0.11), wave(i, 0.73))
            })
            .collect();
        let (loss, slope, totals) = run(&tokens, &bounds, Some(2.0));
        let single = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        let again = single.install(|| run(&tokens, &bounds, Some(2.0)));
        assert_eq!((&loss, &slope, totals), (&again.0, &again.1, again.2));

        let cut = CHUNK + 5;
        let (first, second) = tokens.split_at(cut);
        let (first, second) = (run(first, &bounds, Some(2.0)), run(second, &bounds, Some(2.0)));
        assert_eq!((&loss[..cut], &loss[cut..]), (&first.0[..], &second.0[..]));
        let parts = first.2.merge(&second.2);
        let counts = |totals: &Totals| {
            let Totals { valid, clipped_low, clipped_high, dual_clipped, by_probability, .. } =
                *totals;
            (valid, clipped_low, clipped_high, dual_clipped, by_probability)
        };
        assert_eq!(counts(&totals), counts(&parts));
        assert!(totals.clipped_low > 0 && totals.clipped_high > 0 && totals.dual_clipped > 0);
        assert_eq!(totals.by_probability.iter().map(|bin| bin.valid).sum::<u64>(), totals.valid);
        assert!((totals.kl_k3 - parts.kl_k3).abs() < 1e-12 * totals.kl_k3);
    }

    #[test]
    fn a_row_shares_its_advantage() {
        let (old, new) = ([-1.0_f32; 6], [-1.1, -1.0, -0.9, -1.1, -1.0, -0.9]);
        let bounds = BoundSource::Constant { log_lower: -0.05, log_upper: 0.05 };
        let with = |advantages| {
            let (mut loss, mut slope) = ([0.0; 6], [0.0; 6]);
            let tokens = Tokens { old_log_prob: &old, log_prob: &new, advantages, mask: &[1; 6] };
            min_clip(&tokens, &bounds, None, false, &mut loss, &mut slope).unwrap();
            (loss, slope)
        };
        let each = with(Advantages::PerToken(&[2.0, 2.0, 2.0, -3.0, -3.0, -3.0]));
        assert_eq!(each, with(Advantages::PerRow { values: &[2.0, -3.0], row_length: 3 }));
    }

    #[test]
    fn bad_arguments_are_refused_and_nothing_is_written() {
        let tokens = Tokens {
            old_log_prob: &[-1.0, -1.0],
            log_prob: &[-1.0_f64],
            advantages: Advantages::PerToken(&[1.0]),
            mask: &[1],
        };
        let bounds = BoundSource::Constant { log_lower: -0.1, log_upper: 0.1 };
        let (mut loss, mut slope) = ([7.0], [7.0]);
        let mut refused = |tokens: &Tokens<'_, f64>, dual_clip| {
            min_clip(tokens, &bounds, dual_clip, false, &mut loss, &mut slope)
                .unwrap_err()
                .to_string()
        };
        assert_eq!(refused(&tokens, None), "old_log_prob has 2 elements, expected 1");
        let tokens = Tokens { old_log_prob: &[-1.0], ..tokens };
        assert_eq!(refused(&tokens, Some(1.0)), "dual_clip must be above 1, got 1");
        assert_eq!(refused(&tokens, Some(f64::NAN)), "dual_clip must be above 1, got NaN");
        assert_eq!((loss, slope), ([7.0], [7.0]));
    }

    #[test]
    fn no_token_at_all_adds_up_to_nothing() {
        let (_, _, totals) =
            run::<f32>(&[], &BoundSource::Constant { log_lower: -0.1, log_upper: 0.1 }, None);
        assert_eq!(totals, Totals::default());
    }
}
