//! The clipped policy loss of every token and its gradient, in one pass over the batch.
//!
//! With the log-ratio `x = new - old` (or one that is given) clamped to `±`[`LOG_RATIO_LIMIT`],
//! `r = e^x`, and the bounds of the token, `beyond` means `A > 0` and `r > upper`, or `A < 0` and
//! `r < lower`; `sg` stops the gradient:
//!
//! | surrogate | loss | gradient with respect to `new` |
//! |---|---|---|
//! | min-clip (PPO; dual clip c: arXiv 1912.09729) | `-A min(r, upper)` for `A > 0`, `min(-A max(r, lower), -A c)` for `A < 0` | `-A r`; 0 beyond, where `A < 0` and `r >= c`, and where the clamp acts |
//! | mask (DPPO, arXiv 2602.04879) | `-A sg(min(r, c)) new`; 0 beyond | `-A min(r, c)`; 0 beyond |
//! | weight (CISPO, arXiv 2506.13585) | `-A sg(clip(r, lower, upper)) new` | `-A clip(r, lower, upper)` |
//! | gradient-preserving (CE-GPPO, arXiv 2509.20712) | `-A r`; beyond `-A beta bound r/sg(r)` | `-A r` but 0 where the clamp acts; beyond `-A beta bound` |
//!
//! At `r` equal to a bound a token is not beyond it. Only one side of each token is looked up: the one
//! that the sign of the advantage selects, and for weight the one that the sign of `x` selects.

// A function of vectors has to become part of one that is compiled for their instructions.
#![allow(clippy::inline_always)]

use std::fmt::Debug;

use crate::error::{Error, Result};
use crate::lanes::{Lanes, MOST_LANES, Number, Work};
use crate::table::Image;
use crate::threads::map_parts;

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

/// Vectors that are added up in the precision of the tokens before f64 takes over.
const BLOCK: usize = 32;

/// The float types that a loss is computed in: `f32` and `f64`.
pub trait Float: Number + Send + Sync + Debug {}
impl Float for f32 {}
impl Float for f64 {}

/// What a token's loss is, given its ratio and its bounds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Surrogate {
    /// PPO's.
    MinClip {
        /// Greatest ratio for `A < 0`, above 1.
        dual_clip: Option<f64>,
    },
    /// DPPO's.
    Mask {
        /// Greatest weight, above 1.
        truncation: Option<f64>,
    },
    /// CISPO's.
    Weight,
    /// CE-GPPO's.
    GradientPreserving {
        /// Factor of the gradient below the lower bound, finite and at least 0.
        beta_low: f64,
        /// Factor above the upper bound, likewise.
        beta_high: f64,
    },
}

impl Surrogate {
    fn check(self) -> Result<()> {
        let refuse = |argument, value: f64, allowed| {
            Err(Error::Argument { argument, value: value.to_string(), allowed })
        };
        match self {
            Self::MinClip { dual_clip: Some(c) } if c.is_nan() || c <= 1.0 => {
                refuse("dual_clip", c, "above 1")
            }
            Self::Mask { truncation: Some(c) } if c.is_nan() || c <= 1.0 => {
                refuse("truncation", c, "above 1")
            }
            Self::GradientPreserving { beta_low, beta_high } => {
                for (argument, beta) in [("beta_low", beta_low), ("beta_high", beta_high)] {
                    if !(0.0..f64::INFINITY).contains(&beta) {
                        return refuse(argument, beta, "finite and at least 0");
                    }
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

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
    fn tokens(&self) -> usize {
        match self {
            Self::PerToken(values) => values.len(),
            Self::PerRow { values, row_length } => values.len() * row_length,
        }
    }

    /// Of the tokens from `index` on.
    ///
    /// # Safety
    /// As of [`load`].
    #[inline(always)]
    unsafe fn load<const WHOLE: bool, L: Lanes<Scalar = T>>(
        &self,
        lanes: L,
        index: usize,
    ) -> L::Float {
        match self {
            // SAFETY: as the caller says.
            Self::PerToken(values) => unsafe { load::<WHOLE, L>(lanes, values, index) },
            Self::PerRow { values, row_length } => {
                let (first, last) = (index / row_length, (index + L::COUNT - 1) / row_length);
                if first == last {
                    return lanes.splat(values[first].to_f64());
                }
                lanes.load(&of_rows(values, *row_length, index))
            }
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
    /// Log-ratios to take in place of `log_prob - old_log_prob`, such as a sequence's mean.
    pub log_ratio: Option<&'a [T]>,
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
    /// Those beyond the lower bound; see the table of surrogates.
    pub clipped_low: u64,
    /// Those beyond the upper bound.
    pub clipped_high: u64,
    /// Those that the dual clip acts on, or whose weight was truncated.
    pub limited: u64,
    /// Sum of the losses.
    pub loss: f64,
    /// Sum of `-x`.
    pub kl: f64,
    /// Sum of `r - 1 - x`.
    pub kl_k3: f64,
    /// Sum of `-old_log_prob`.
    pub entropy: f64,
    /// Sum of `abs(A) r`, the gradient without any rule.
    pub gradient_free: f64,
    /// Sum of the absolute difference that the rule makes to it.
    pub gradient_removed: f64,
    /// Smallest `x`, NaN if any is, infinite for no token.
    pub log_ratio_min: f64,
    /// Greatest `x`, NaN if any is, `-inf` for no token.
    pub log_ratio_max: f64,
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
            limited: 0,
            loss: 0.0,
            kl: 0.0,
            kl_k3: 0.0,
            entropy: 0.0,
            gradient_free: 0.0,
            gradient_removed: 0.0,
            log_ratio_min: f64::INFINITY,
            log_ratio_max: f64::NEG_INFINITY,
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
        self.limited += other.limited;
        self.loss += other.loss;
        self.kl += other.kl;
        self.kl_k3 += other.kl_k3;
        self.entropy += other.entropy;
        self.gradient_free += other.gradient_free;
        self.gradient_removed += other.gradient_removed;
        self.log_ratio_min = smaller(self.log_ratio_min, other.log_ratio_min);
        self.log_ratio_max = -smaller(-self.log_ratio_max, -other.log_ratio_max);
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
/// [`Error::Length`] if two slices differ in length, [`Error::Argument`] if a parameter of the surrogate
/// is out of range.
pub fn policy_loss<T: Float>(
    tokens: &Tokens<'_, T>,
    bounds: &BoundSource<'_, T>,
    surrogate: Surrogate,
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
        ("log_ratio", tokens.log_ratio.map_or(count, <[T]>::len)),
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
    surrogate.check()?;
    let rule = Rule { tokens, surrogate, by_probability };
    Ok(match *bounds {
        BoundSource::Constant { log_lower, log_upper } => {
            let [log_lower, log_upper] = [log_lower, log_upper].map(Number::to_f64);
            batch(rule, &Constant { log_lower, log_upper }, per_token, gradient)
        }
        BoundSource::Table(image) => batch(rule, &image, per_token, gradient),
        BoundSource::PerToken { log_lower, log_upper } => {
            batch(rule, &PerToken { log_lower, log_upper }, per_token, gradient)
        }
    })
}

/// Writes the gradient times a factor: that of a loss of which the sum over the tokens is a part.
///
/// # Errors
/// [`Error::Length`] if the slices differ in length.
pub fn scale<T: Float + std::ops::Mul<Output = T>>(
    gradient: &[T],
    factor: T,
    scaled: &mut [T],
) -> Result<()> {
    if scaled.len() != gradient.len() {
        return Err(Error::Length {
            argument: "scaled",
            actual: scaled.len(),
            expected: gradient.len(),
        });
    }
    let one = |(scaled, gradient): (&mut [T], &[T])| {
        for (scaled, &gradient) in scaled.iter_mut().zip(gradient) {
            *scaled = gradient * factor;
        }
    };
    if gradient.len() >= PARALLEL_FROM {
        map_parts(scaled.chunks_mut(CHUNK).zip(gradient.chunks(CHUNK)).collect(), one);
    } else {
        one((scaled, gradient));
    }
    Ok(())
}

/// Writes the tabulated `lower`, a ratio, and `log_upper` of every token; NaN gives NaN.
///
/// # Errors
/// [`Error::Length`] if the slices differ in length.
pub fn table_bounds<T: Float>(
    image: Image<'_>,
    old_log_prob: &[T],
    lower: &mut [T],
    log_upper: &mut [T],
) -> Result<()> {
    let expected = old_log_prob.len();
    for (argument, actual) in [("lower", lower.len()), ("log_upper", log_upper.len())] {
        if actual != expected {
            return Err(Error::Length { argument, actual, expected });
        }
    }
    let sides = lower.chunks_mut(CHUNK).zip(log_upper.chunks_mut(CHUNK));
    let parts = old_log_prob.chunks(CHUNK).zip(sides);
    let one = |(old_log_prob, (lower, log_upper))| {
        T::run(LookUp { image, old_log_prob, lower, log_upper });
    };
    if expected >= PARALLEL_FROM {
        map_parts(parts.collect(), one);
    } else {
        parts.for_each(one);
    }
    Ok(())
}

/// Both sides of a table for some tokens.
struct LookUp<'a, T> {
    image: Image<'a>,
    old_log_prob: &'a [T],
    lower: &'a mut [T],
    log_upper: &'a mut [T],
}

impl<T: Float> Work<T> for LookUp<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes<Scalar = T>>(self, lanes: L) {
        for index in (0..self.old_log_prob.len()).step_by(L::COUNT) {
            let logp = if index + L::COUNT <= self.old_log_prob.len() {
                lanes.load(&self.old_log_prob[index..])
            } else {
                lanes.load(&padded(&self.old_log_prob[index..], T::ZERO))
            };
            let unknown = lanes.is_nan(logp);
            let every = lanes.less_or_equal(lanes.splat(0.0), lanes.splat(0.0));
            let none = lanes.and_not(every, every);
            for (side, to) in [(every, &mut *self.lower), (none, &mut *self.log_upper)] {
                let bound = lanes.look_up(self.image, logp, side);
                let bound = lanes.select(unknown, logp, bound);
                let to = &mut to[index..];
                if to.len() >= L::COUNT {
                    lanes.store(bound, to);
                } else {
                    to.copy_from_slice(&numbers(lanes, bound)[..to.len()]);
                }
            }
        }
    }
}

/// The bounds of a vector of tokens, one side each.
struct Edge<F> {
    bound: F,
    /// Whether lower bounds are ratios. All others are log-ratios.
    lower_is_ratio: bool,
}

/// Where the bounds of tokens are, the lower one where the mask is true.
trait Bounds<T>: Sync {
    /// # Safety
    /// As of [`load`].
    unsafe fn edge<const WHOLE: bool, L: Lanes<Scalar = T>>(
        &self,
        lanes: L,
        index: usize,
        old_log_prob: L::Float,
        lower: L::Mask,
    ) -> Edge<L::Float>;
}

struct Constant {
    log_lower: f64,
    log_upper: f64,
}

impl<T> Bounds<T> for Constant {
    #[inline(always)]
    unsafe fn edge<const WHOLE: bool, L: Lanes<Scalar = T>>(
        &self,
        lanes: L,
        _: usize,
        _: L::Float,
        lower: L::Mask,
    ) -> Edge<L::Float> {
        let (low, high) = (lanes.splat(self.log_lower), lanes.splat(self.log_upper));
        Edge { bound: lanes.select(lower, low, high), lower_is_ratio: false }
    }
}

struct PerToken<'a, T> {
    log_lower: &'a [T],
    log_upper: &'a [T],
}

impl<T: Float> Bounds<T> for PerToken<'_, T> {
    #[inline(always)]
    unsafe fn edge<const WHOLE: bool, L: Lanes<Scalar = T>>(
        &self,
        lanes: L,
        index: usize,
        _: L::Float,
        lower: L::Mask,
    ) -> Edge<L::Float> {
        // SAFETY: as the caller says.
        let (low, high) = unsafe {
            (
                load::<WHOLE, L>(lanes, self.log_lower, index),
                load::<WHOLE, L>(lanes, self.log_upper, index),
            )
        };
        Edge { bound: lanes.select(lower, low, high), lower_is_ratio: false }
    }
}

impl<T> Bounds<T> for Image<'_> {
    #[inline(always)]
    unsafe fn edge<const WHOLE: bool, L: Lanes<Scalar = T>>(
        &self,
        lanes: L,
        _: usize,
        old_log_prob: L::Float,
        lower: L::Mask,
    ) -> Edge<L::Float> {
        Edge { bound: lanes.look_up(*self, old_log_prob, lower), lower_is_ratio: true }
    }
}

/// The vector that begins at `index` of a column; if it is not `WHOLE`, the column's end and then zeros.
///
/// # Safety
/// The column has a token at `index`, and all of the vector's if it is `WHOLE`.
#[inline(always)]
unsafe fn load<const WHOLE: bool, L: Lanes<Scalar: Float>>(
    lanes: L,
    column: &[L::Scalar],
    index: usize,
) -> L::Float {
    if WHOLE {
        // SAFETY: as the caller says.
        lanes.load(unsafe { column.get_unchecked(index..index + L::COUNT) })
    } else {
        lanes.load(&padded(&column[index..], L::Scalar::ZERO))
    }
}

/// The end of a slice, with what is missing for a vector.
#[cold]
fn padded<T: Copy>(rest: &[T], padding: T) -> [T; MOST_LANES] {
    let mut padded = [padding; MOST_LANES];
    padded[..rest.len()].copy_from_slice(rest);
    padded
}

/// The values of the rows of a vector that reaches into several, the last of them maybe beyond its end.
#[cold]
fn of_rows<T: Copy>(values: &[T], row_length: usize, index: usize) -> [T; MOST_LANES] {
    std::array::from_fn(|lane| values[((index + lane) / row_length).min(values.len() - 1)])
}

/// What is done to a batch, apart from where its bounds come from.
#[derive(Clone, Copy)]
struct Rule<'a, T> {
    tokens: &'a Tokens<'a, T>,
    surrogate: Surrogate,
    by_probability: bool,
}

/// All chunks, on several threads if there are many; totals are merged in the order of the tokens.
fn batch<T: Float>(
    rule: Rule<'_, T>,
    bounds: &impl Bounds<T>,
    per_token: &mut [T],
    gradient: &mut [T],
) -> Totals {
    let parallel = per_token.len() >= PARALLEL_FROM;
    let one = |(index, (per_token, gradient)): (usize, (&mut [T], &mut [T]))| {
        T::run(Chunk { rule, bounds, start: index * CHUNK, per_token, gradient })
    };
    let outputs = per_token.chunks_mut(CHUNK).zip(gradient.chunks_mut(CHUNK)).enumerate();
    let totals: Vec<Totals> =
        if parallel { map_parts(outputs.collect(), one) } else { outputs.map(one).collect() };
    totals.iter().fold(Totals::default(), Totals::merge)
}

/// The tokens from `start` on, as many as the outputs hold.
struct Chunk<'a, T, B> {
    rule: Rule<'a, T>,
    bounds: &'a B,
    start: usize,
    per_token: &'a mut [T],
    gradient: &'a mut [T],
}

impl<T: Float, B: Bounds<T>> Work<T> for Chunk<'_, T, B> {
    type Output = Totals;

    #[inline(always)]
    fn run<L: Lanes<Scalar = T>>(self, lanes: L) -> Totals {
        let mut totals = Totals::default();
        let mut sums = Sums::new(lanes);
        let count = self.per_token.len();
        for first in (0..count).step_by(BLOCK * L::COUNT) {
            let end = count.min(first + BLOCK * L::COUNT);
            let mut flags = [[0; BLOCK]; 5];
            for (vector, offset) in (first..end).step_by(L::COUNT).enumerate() {
                let index = self.start + offset;
                let (losses, slopes) =
                    (&mut self.per_token[offset..end], &mut self.gradient[offset..end]);
                // SAFETY: `policy_loss` has checked that all columns are as long as the outputs, and these
                // have a token here, or all of a vector.
                let token = if losses.len() >= L::COUNT {
                    let token = unsafe { self.rule.vector::<true, L>(lanes, self.bounds, index) };
                    lanes.store(token.loss, losses);
                    lanes.store(token.slope, slopes);
                    token
                } else {
                    let token = unsafe { self.rule.vector::<false, L>(lanes, self.bounds, index) };
                    losses.copy_from_slice(&numbers(lanes, token.loss)[..losses.len()]);
                    slopes.copy_from_slice(&numbers(lanes, token.slope)[..slopes.len()]);
                    token
                };
                for (flags, bits) in flags.iter_mut().zip(token.flags(lanes)) {
                    flags[vector] = bits;
                }
                sums.add(lanes, &token);
                if self.rule.by_probability {
                    totals.count_by_probability(lanes, &token);
                }
            }
            totals.take(&sums.numbers(lanes), &flags);
            sums.clear(lanes);
        }
        let [least, most, nan] =
            [sums.least, sums.most, sums.nan].map(|vector| numbers(lanes, vector));
        for lane in 0..L::COUNT {
            totals.take_extremes(least[lane].to_f64(), most[lane].to_f64(), nan[lane].to_f64());
        }
        totals
    }
}

/// A vector of tokens with what was done to them. Masks are false where a token does not count.
struct Token<L: Lanes> {
    loss: L::Float,
    slope: L::Float,
    valid: L::Mask,
    clipped_low: L::Mask,
    clipped_high: L::Mask,
    limited: L::Mask,
    old_log_prob: L::Float,
    log_ratio: L::Float,
    kl_k3: L::Float,
    gradient_free: L::Float,
    gradient_removed: L::Float,
}

impl<L: Lanes> Token<L> {
    /// Which tokens of the vector count, and are not finite, clipped low, clipped high, limited; a bit each.
    #[inline(always)]
    fn flags(&self, lanes: L) -> [u32; 5] {
        let finite = lanes.less(lanes.abs(self.loss), lanes.splat(f64::INFINITY));
        let nonfinite = lanes.and_not(self.valid, finite);
        [
            lanes.bits(self.valid),
            lanes.bits(nonfinite),
            lanes.bits(self.clipped_low),
            lanes.bits(self.clipped_high),
            lanes.bits(self.limited),
        ]
    }
}

impl<T: Float> Rule<'_, T> {
    /// The tokens from `index` on, as many as a vector holds; those beyond the last do not count.
    ///
    /// # Safety
    /// As of [`load`], for every column.
    #[inline(always)]
    unsafe fn vector<const WHOLE: bool, L: Lanes<Scalar = T>>(
        &self,
        lanes: L,
        bounds: &impl Bounds<T>,
        index: usize,
    ) -> Token<L> {
        let tokens = self.tokens;
        let zero = lanes.splat(0.0);
        let valid = if WHOLE {
            // SAFETY: as the caller says.
            lanes.load_mask(unsafe { tokens.mask.get_unchecked(index..index + L::COUNT) })
        } else {
            lanes.load_mask(&padded(&tokens.mask[index..], 0))
        };
        // SAFETY: as the caller says.
        let column = |column: &[T]| unsafe {
            lanes.select(valid, load::<WHOLE, L>(lanes, column, index), zero)
        };
        let (old_log_prob, log_prob) = (column(tokens.old_log_prob), column(tokens.log_prob));
        // SAFETY: as the caller says.
        let advantage = unsafe { tokens.advantages.load::<WHOLE, L>(lanes, index) };
        let cost = lanes.sub(zero, lanes.select(valid, advantage, zero));
        let unclamped = match tokens.log_ratio {
            Some(log_ratio) => column(log_ratio),
            None => lanes.sub(log_prob, old_log_prob),
        };

        let clamped = lanes.less(lanes.splat(LOG_RATIO_LIMIT), lanes.abs(unclamped));
        let log_ratio = lanes.at_most(LOG_RATIO_LIMIT, unclamped);
        let log_ratio = lanes.at_least(-LOG_RATIO_LIMIT, log_ratio);
        let exponentials = lanes.exponentials(log_ratio);
        let ratio = exponentials.exp;

        let (up, down) = match self.surrogate {
            Surrogate::Weight => (lanes.less(zero, log_ratio), lanes.less(log_ratio, zero)),
            _ => (lanes.less(cost, zero), lanes.less(zero, cost)),
        };
        // SAFETY: as the caller says.
        let edge = unsafe { bounds.edge::<WHOLE, L>(lanes, index, old_log_prob, down) };
        let measure = if edge.lower_is_ratio { ratio } else { log_ratio };
        let clipped_low = lanes.and(down, lanes.less(measure, edge.bound));
        let clipped_high = lanes.and(up, lanes.less(edge.bound, log_ratio));
        let beyond = lanes.or(clipped_low, clipped_high);
        // The bound as a ratio, where a token is beyond it: few are, and exponentials cost.
        let bound = if lanes.bits(beyond) == 0 {
            zero
        } else {
            let exp = lanes.exponentials(edge.bound).exp;
            if edge.lower_is_ratio { lanes.select(down, edge.bound, exp) } else { exp }
        };

        let nowhere = lanes.and(up, down);
        let (loss, slope, limited) = match self.surrogate {
            Surrogate::MinClip { dual_clip } => {
                let stop = lanes.select(beyond, bound, ratio);
                let (limited, stop) = match dual_clip {
                    None => (nowhere, stop),
                    Some(c) => {
                        let reached = lanes.less_or_equal(lanes.splat(c.ln()), log_ratio);
                        let limited = lanes.and(down, reached);
                        (limited, lanes.select(limited, lanes.splat(c), stop))
                    }
                };
                let loss = lanes.mul(cost, stop);
                let stopped = lanes.or(clamped, lanes.or(beyond, limited));
                (loss, lanes.select(stopped, zero, loss), limited)
            }
            Surrogate::Mask { truncation } => {
                let (limited, weight) = match truncation {
                    None => (nowhere, ratio),
                    Some(c) => {
                        let c = lanes.splat(c);
                        let limited = lanes.and_not(lanes.less(c, ratio), beyond);
                        (limited, lanes.select(limited, c, ratio))
                    }
                };
                let slope = lanes.mul(cost, weight);
                let loss = lanes.mul(slope, log_prob);
                (lanes.select(beyond, zero, loss), lanes.select(beyond, zero, slope), limited)
            }
            Surrogate::Weight => {
                let slope = lanes.mul(cost, lanes.select(beyond, bound, ratio));
                (lanes.mul(slope, log_prob), slope, nowhere)
            }
            Surrogate::GradientPreserving { beta_low, beta_high } => {
                let beta = lanes.select(down, lanes.splat(beta_low), lanes.splat(beta_high));
                let loss = lanes.mul(cost, lanes.select(beyond, lanes.mul(beta, bound), ratio));
                let stopped = lanes.and_not(clamped, beyond);
                (loss, lanes.select(stopped, zero, loss), nowhere)
            }
        };
        let free = lanes.mul(cost, ratio);
        let of_valid = |mask: L::Mask| lanes.and(valid, mask);
        Token {
            loss: lanes.select(valid, loss, zero),
            slope: lanes.select(valid, slope, zero),
            valid,
            clipped_low: of_valid(clipped_low),
            clipped_high: of_valid(clipped_high),
            limited: of_valid(limited),
            old_log_prob,
            log_ratio,
            kl_k3: exponentials.excess,
            gradient_free: lanes.abs(free),
            gradient_removed: lanes.abs(lanes.sub(free, slope)),
        }
    }
}

/// Sums over vectors, a number for each lane. Tokens that do not count add 0 to all of them.
struct Sums<L: Lanes> {
    loss: L::Float,
    log_ratio: L::Float,
    kl_k3: L::Float,
    old_log_prob: L::Float,
    gradient_free: L::Float,
    gradient_removed: L::Float,
    least: L::Float,
    most: L::Float,
    nan: L::Float,
}

impl<L: Lanes<Scalar: Float>> Sums<L> {
    #[inline(always)]
    fn new(lanes: L) -> Self {
        let zero = lanes.splat(0.0);
        Self {
            loss: zero,
            log_ratio: zero,
            kl_k3: zero,
            old_log_prob: zero,
            gradient_free: zero,
            gradient_removed: zero,
            least: lanes.splat(f64::INFINITY),
            most: lanes.splat(f64::NEG_INFINITY),
            nan: zero,
        }
    }

    #[inline(always)]
    fn add(&mut self, lanes: L, token: &Token<L>) {
        self.loss = lanes.add(self.loss, token.loss);
        self.log_ratio = lanes.add(self.log_ratio, token.log_ratio);
        self.kl_k3 = lanes.add(self.kl_k3, token.kl_k3);
        self.old_log_prob = lanes.add(self.old_log_prob, token.old_log_prob);
        self.gradient_free = lanes.add(self.gradient_free, token.gradient_free);
        self.gradient_removed = lanes.add(self.gradient_removed, token.gradient_removed);
        let x = token.log_ratio;
        let lowest = lanes.and(token.valid, lanes.less(x, self.least));
        let highest = lanes.and(token.valid, lanes.less(self.most, x));
        self.least = lanes.select(lowest, x, self.least);
        self.most = lanes.select(highest, x, self.most);
        self.nan = lanes.select(lanes.is_nan(x), x, self.nan);
    }

    /// The sums of each lane, in the order in which `Totals::take` takes them.
    #[inline(always)]
    fn numbers(&self, lanes: L) -> [[L::Scalar; MOST_LANES]; 6] {
        [
            numbers(lanes, self.loss),
            numbers(lanes, self.log_ratio),
            numbers(lanes, self.kl_k3),
            numbers(lanes, self.old_log_prob),
            numbers(lanes, self.gradient_free),
            numbers(lanes, self.gradient_removed),
        ]
    }

    #[inline(always)]
    fn clear(&mut self, lanes: L) {
        let zero = lanes.splat(0.0);
        (self.loss, self.log_ratio, self.kl_k3) = (zero, zero, zero);
        (self.old_log_prob, self.gradient_free, self.gradient_removed) = (zero, zero, zero);
    }
}

/// The numbers of a vector, then zeros.
#[inline(always)]
fn numbers<L: Lanes<Scalar: Float>>(lanes: L, vector: L::Float) -> [L::Scalar; MOST_LANES] {
    let mut numbers = [L::Scalar::ZERO; MOST_LANES];
    lanes.store(vector, &mut numbers);
    numbers
}

impl Totals {
    /// Adds the sums of [`Sums::numbers`], and counts the bits of [`Token::flags`].
    #[inline(never)] // once for many tokens: apart from their loop it does not get into its way
    fn take<T: Float>(&mut self, sums: &[[T; MOST_LANES]; 6], flags: &[[u32; BLOCK]; 5]) {
        let [loss, log_ratio, kl_k3, old_log_prob, free, removed] =
            sums.map(|lanes| lanes.iter().map(|number| number.to_f64()).sum::<f64>());
        self.loss += loss;
        self.kl -= log_ratio;
        self.kl_k3 += kl_k3;
        self.entropy -= old_log_prob;
        self.gradient_free += free;
        self.gradient_removed += removed;
        let [valid, nonfinite, clipped_low, clipped_high, limited] =
            flags.map(|flags| flags.iter().map(|bits| u64::from(bits.count_ones())).sum::<u64>());
        self.valid += valid;
        self.nonfinite += nonfinite;
        self.clipped_low += clipped_low;
        self.clipped_high += clipped_high;
        self.limited += limited;
    }

    /// Takes the least and the greatest log-ratio of a lane, and its NaN if it had one, else 0.
    fn take_extremes(&mut self, least: f64, most: f64, nan: f64) {
        self.log_ratio_min = smaller(self.log_ratio_min, least + nan);
        self.log_ratio_max = -smaller(-self.log_ratio_max, -(most + nan));
    }

    #[inline(always)]
    fn count_by_probability<L: Lanes>(&mut self, lanes: L, token: &Token<L>) {
        let above = PROBABILITY_EDGES
            .map(|edge| lanes.less_or_equal(lanes.splat(edge.ln()), token.old_log_prob));
        for (index, bin) in self.by_probability.iter_mut().enumerate() {
            let mut here = token.valid;
            if index > 0 {
                here = lanes.and(here, above[index - 1]);
            }
            if index < above.len() {
                here = lanes.and_not(here, above[index]);
            }
            let count = |mask: L::Mask| u64::from(lanes.bits(lanes.and(here, mask)).count_ones());
            bin.valid += count(here);
            bin.clipped_low += count(token.clipped_low);
            bin.clipped_high += count(token.clipped_high);
        }
    }
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
        surrogate: Surrogate,
    ) -> (Vec<T>, Vec<T>, Totals) {
        let column = |pick: fn(&(T, T, T)) -> T| tokens.iter().map(pick).collect::<Vec<T>>();
        let (old, new, advantage) =
            (column(|token| token.0), column(|token| token.1), column(|token| token.2));
        let mut per_token = vec![T::ZERO; tokens.len()];
        let mut gradient = vec![T::ZERO; tokens.len()];
        let tokens = Tokens {
            old_log_prob: &old,
            log_prob: &new,
            log_ratio: None,
            advantages: Advantages::PerToken(&advantage),
            mask: &vec![1; old.len()],
        };
        let totals =
            policy_loss(&tokens, bounds, surrogate, true, &mut per_token, &mut gradient).unwrap();
        (per_token, gradient, totals)
    }

    const PLAIN: Surrogate = Surrogate::MinClip { dual_clip: None };

    const fn dual(c: f64) -> Surrogate {
        Surrogate::MinClip { dual_clip: Some(c) }
    }

    #[test]
    fn where_everything_is_allowed_a_new_probability_of_1_is() {
        let table = table("tv", 0.3);
        let tokens: Vec<(f64, f64, f64)> =
            (0..1000).map(|i| (-f64::from(i) / 3000.0, 0.0, 1.0)).collect();
        let (loss, slope, totals) = run(&tokens, &BoundSource::Table(table.image()), PLAIN);
        assert_eq!((loss, totals.clipped_high), (slope, 0));
    }

    #[test]
    fn each_rule_stops_the_gradient_on_its_own_side_only() {
        let (lower, upper, c) = (0.8_f64, 1.28_f64, 3.0_f64);
        let bounds = BoundSource::Constant { log_lower: lower.ln(), log_upper: upper.ln() };
        let case = |log_ratio: f64, advantage: f64| {
            let (loss, slope, totals) =
                run(&[(-1.0, -1.0 + log_ratio, advantage)], &bounds, dual(c));
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
        assert_eq!((slope, totals.limited, totals.clipped_low), (0.0, 1, 0));

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
            dual(3.0),
        );
        assert_eq!(loss[..2], slope[..2]);
        assert_eq!((slope[2], loss[2]), (0.0, 3.0));
        assert_eq!((totals.clipped_high, totals.clipped_low, totals.limited), (0, 0, 1));
    }

    #[test]
    fn the_clamp_acts_beyond_its_limit_only() {
        let free = BoundSource::Constant { log_lower: f64::NEG_INFINITY, log_upper: f64::INFINITY };
        let (loss, slope, totals) = run(
            &[(0.0, -20.0, 1.0), (-20.0, 0.0, 1.0), (-21.0, 0.0, 1.0), (0.0, -800.0, 1.0)],
            &free,
            PLAIN,
        );
        assert_eq!(loss[..2], slope[..2]);
        assert_eq!((loss[2], slope[2]), (-(20.0_f64.exp()), 0.0));
        assert_eq!((loss[3], slope[3]), (-((-20.0_f64).exp()), 0.0));
        assert_eq!((totals.log_ratio_min, totals.log_ratio_max), (-20.0, 20.0));
    }

    #[test]
    fn a_nan_stays_with_its_token_and_a_masked_one_is_nowhere() {
        let nan = f32::NAN;
        let table = table("kl", 0.05);
        let bounds = BoundSource::Table(table.image());
        let (loss, slope, totals) = run(
            &[(nan, -1.0, 1.0), (-1.0, nan, -1.0), (-1.0, -1.0, nan), (-1.0, -1.0, 1.0)],
            &bounds,
            PLAIN,
        );
        assert!(loss[..3].iter().chain(&slope[..3]).all(|value| value.is_nan()));
        assert_eq!((loss[3], slope[3], totals.nonfinite, totals.valid), (-1.0, -1.0, 3, 4));
        assert!(
            totals.log_ratio_min.is_nan() && totals.log_ratio_max.is_nan() && totals.kl.is_nan()
        );

        let tokens = Tokens {
            old_log_prob: &[nan, -1.0],
            log_prob: &[f32::INFINITY, -1.5],
            log_ratio: None,
            advantages: Advantages::PerToken(&[nan, 1.0]),
            mask: &[0, 1],
        };
        let (mut loss, mut slope) = ([nan; 2], [nan; 2]);
        let totals = policy_loss(&tokens, &bounds, PLAIN, true, &mut loss, &mut slope).unwrap();
        assert_eq!((loss[0], slope[0], totals.valid, totals.nonfinite), (0.0, 0.0, 1, 0));
        assert_eq!((totals.kl, totals.log_ratio_min), (0.5, -0.5));
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
        let (loss, slope, totals) = run(&tokens, &bounds, dual(2.0));
        let single = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        let again = single.install(|| run(&tokens, &bounds, dual(2.0)));
        assert_eq!((&loss, &slope, totals), (&again.0, &again.1, again.2));

        let cut = CHUNK + 5;
        let (first, second) = tokens.split_at(cut);
        let (first, second) = (run(first, &bounds, dual(2.0)), run(second, &bounds, dual(2.0)));
        assert_eq!((&loss[..cut], &loss[cut..]), (&first.0[..], &second.0[..]));
        let parts = first.2.merge(&second.2);
        let counts = |totals: &Totals| {
            let Totals { valid, clipped_low, clipped_high, limited, by_probability, .. } = *totals;
            (valid, clipped_low, clipped_high, limited, by_probability)
        };
        assert_eq!(counts(&totals), counts(&parts));
        assert!(totals.clipped_low > 0 && totals.clipped_high > 0 && totals.limited > 0);
        assert_eq!(totals.by_probability.iter().map(|bin| bin.valid).sum::<u64>(), totals.valid);
        assert!((totals.kl_k3 - parts.kl_k3).abs() < 1e-12 * totals.kl_k3);
    }

    #[test]
    fn a_row_shares_its_advantage() {
        let (old, new) = ([-1.0_f32; 6], [-1.1, -1.0, -0.9, -1.1, -1.0, -0.9]);
        let bounds = BoundSource::Constant { log_lower: -0.05, log_upper: 0.05 };
        let with = |advantages| {
            let (mut loss, mut slope) = ([0.0; 6], [0.0; 6]);
            let tokens = Tokens {
                old_log_prob: &old,
                log_prob: &new,
                log_ratio: None,
                advantages,
                mask: &[1; 6],
            };
            policy_loss(&tokens, &bounds, PLAIN, false, &mut loss, &mut slope).unwrap();
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
            log_ratio: None,
            advantages: Advantages::PerToken(&[1.0]),
            mask: &[1],
        };
        let bounds = BoundSource::Constant { log_lower: -0.1, log_upper: 0.1 };
        let (mut loss, mut slope) = ([7.0], [7.0]);
        let mut refused = |tokens: &Tokens<'_, f64>, surrogate| {
            policy_loss(tokens, &bounds, surrogate, false, &mut loss, &mut slope)
                .unwrap_err()
                .to_string()
        };
        assert_eq!(refused(&tokens, PLAIN), "old_log_prob has 2 elements, expected 1");
        let tokens = Tokens { old_log_prob: &[-1.0], ..tokens };
        assert_eq!(refused(&tokens, dual(1.0)), "dual_clip must be above 1, got 1");
        assert_eq!(refused(&tokens, dual(f64::NAN)), "dual_clip must be above 1, got NaN");
        assert_eq!((loss, slope), ([7.0], [7.0]));
    }

    #[test]
    fn each_surrogate_is_its_formula() {
        // (x, A): inside, at a bound, beyond on the side of A and on the other, beyond the clamp.
        let cases = [
            (0.1, 2.0),
            (-0.2, -1.0),
            (0.3, 1.0),
            (0.3, -1.5),
            (-0.4, 1.0),
            (-0.4, -2.0),
            (4.0, 0.5),
            (4.0, -0.5),
            (-30.0, -1.0),
            (-30.0, 1.0),
            (0.5, 0.0),
        ];
        let (low, high, old) = (-0.2_f64, 0.25_f64, -5.0_f64);
        let bounds = BoundSource::Constant { log_lower: low, log_upper: high };
        for (x, advantage) in cases {
            let new = old + x;
            let x = (new - old).clamp(-20.0, 20.0);
            let (r, clamp_acts) = (x.exp(), (new - old).abs() > 20.0);
            let (below, above) = (advantage < 0.0 && x < low, advantage > 0.0 && x > high);
            let beyond = below || above;
            let edge = if below { low.exp() } else { high.exp() };
            let weight = r.min(3.0);
            let clipped = x.clamp(low, high).exp();
            let (beta_low, beta_high) = (0.75, 0.5);
            let beta = if below { beta_low } else { beta_high };
            let preserved = if beyond { beta * edge } else { r };
            let formulas = [
                (
                    Surrogate::Mask { truncation: Some(3.0) },
                    if beyond { 0.0 } else { -advantage * weight * new },
                    if beyond { 0.0 } else { -advantage * weight },
                ),
                (Surrogate::Weight, -advantage * clipped * new, -advantage * clipped),
                (
                    Surrogate::GradientPreserving { beta_low, beta_high },
                    -advantage * preserved,
                    if clamp_acts && !beyond { 0.0 } else { -advantage * preserved },
                ),
            ];
            for (surrogate, loss, slope) in formulas {
                let (actual, gradient, totals) = run(&[(old, new, advantage)], &bounds, surrogate);
                let near = |a: f64, b: f64| (a - b).abs() <= 4e-16 * b.abs();
                assert!(near(actual[0], loss), "{surrogate:?} {x} {advantage} {actual:?} {loss}");
                assert!(near(gradient[0], slope), "{surrogate:?} {x} {gradient:?} {slope}");
                let removed = (-advantage * r - slope).abs();
                assert!((totals.gradient_removed - removed).abs() <= 4e-16 * (r * advantage).abs());
                let (low_count, high_count) = match surrogate {
                    Surrogate::Weight => (x < low, x > high),
                    _ => (below, above),
                };
                assert_eq!(
                    (totals.clipped_low, totals.clipped_high),
                    (u64::from(low_count), u64::from(high_count)),
                    "{surrogate:?} {x} {advantage}"
                );
            }
        }
    }

    #[test]
    fn a_given_log_ratio_takes_the_place_of_the_tokens_own() {
        let bounds = BoundSource::Constant { log_lower: -0.1, log_upper: 0.1 };
        let tokens = Tokens {
            old_log_prob: &[-1.0, -1.0],
            log_prob: &[-1.5, -0.5],
            log_ratio: Some(&[0.05, 0.2]),
            advantages: Advantages::PerToken(&[1.0, 1.0]),
            mask: &[1, 1],
        };
        let (mut loss, mut slope) = ([0.0; 2], [0.0; 2]);
        policy_loss(&tokens, &bounds, PLAIN, false, &mut loss, &mut slope).unwrap();
        assert_eq!(loss, [-0.05_f64.exp(), -0.1_f64.exp()]);
        assert_eq!(slope, [-0.05_f64.exp(), 0.0]);
    }

    #[test]
    fn the_sides_of_a_table_are_its_scalar_ones() {
        let table = table("reverse-kl", 0.05);
        let old: Vec<f32> = (0..3 * PARALLEL_FROM + 7).map(|i| -(i as f32) * 2e-3).collect();
        let old = [old, vec![f32::NAN, 0.5, f32::NEG_INFINITY]].concat();
        let (mut lower, mut log_upper) = (vec![0.0; old.len()], vec![0.0; old.len()]);
        table_bounds(table.image(), &old, &mut lower, &mut log_upper).unwrap();
        for ((&old, &lower), &log_upper) in old.iter().zip(&lower).zip(&log_upper) {
            let y = Image::y(old);
            for (found, scalar) in
                [(lower, table.image().lower(y)), (log_upper, table.image().log_upper(y))]
            {
                assert!(
                    found == scalar || found.is_nan() && old.is_nan(),
                    "{old} {found} {scalar}"
                );
            }
        }
        assert!(table_bounds(table.image(), &old, &mut lower[1..], &mut log_upper).is_err());
    }

    #[test]
    fn no_token_at_all_adds_up_to_nothing() {
        let (_, _, totals) =
            run::<f32>(&[], &BoundSource::Constant { log_lower: -0.1, log_upper: 0.1 }, PLAIN);
        assert_eq!(totals, Totals::default());
    }
}
