//! The clipped policy loss of every token and its gradient, in one pass over the batch.
//!
//! A batch is cut into blocks of tokens, and each block is taken through four steps: log-ratios, and who has
//! moved towards a bound; the bounds of those; who is beyond; losses and gradients. What a rule makes of a
//! token that is beyond is in [`crate::loss::surrogate`].

// A function of vectors has to become part of one that is compiled for their instructions.
#![allow(clippy::inline_always)]

pub mod surrogate;

use std::fmt::Debug;
use std::marker::PhantomData;

use crate::error::{Error, Result};
use crate::image::Image;
use crate::loss::surrogate::{
    Applied, GradientPreserving, Mask, MinClip, Rule, Surrogate, Vector, Weight,
};
use crate::simd::lanes::{Lanes, MAX_LANES};
use crate::simd::{LossLanes, Number, WithLanes};
use crate::threads::map_parts;

pub use crate::LOG_RATIO_LIMIT;

/// Where one bin of the old probability ends and the next, which it belongs to, begins.
pub const PROBABILITY_EDGES: [f64; 4] = [1e-3, 1e-2, 1e-1, 0.5];

/// Bins of the old probability.
pub const PROBABILITY_BINS: usize = PROBABILITY_EDGES.len() + 1;

/// Tokens that are added up at a time. Fixed, so that sums do not depend on the number of threads.
const CHUNK: usize = 8192;

/// Fewer tokens than this are done sooner than other threads wake up.
const PARALLEL_FROM: usize = 2 * CHUNK;

/// Tokens that are taken through each step together, so that what one step leaves for the next stays near
/// the processor; also those that are added up in their own precision before f64 takes over.
const BLOCK: usize = 512;

/// The float types that a loss is computed in: `f32` and `f64`.
pub trait Float: Number + Send + Sync + Debug {}
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
    fn tokens(&self) -> usize {
        match self {
            Self::PerToken(values) => values.len(),
            Self::PerRow { values, row_length } => values.len() * row_length,
        }
    }

    /// Of the tokens from `start` on, as many as the buffer holds; there if they are not in a row anyway.
    fn block<'a>(&'a self, start: usize, buffer: &'a mut [T]) -> &'a [T] {
        match self {
            Self::PerToken(values) => &values[start..start + buffer.len()],
            Self::PerRow { values, row_length } => {
                let mut filled = 0;
                while filled < buffer.len() {
                    let (row, column) =
                        ((start + filled) / row_length, (start + filled) % row_length);
                    let end = buffer.len().min(filled + row_length - column);
                    buffer[filled..end].fill(values[row]);
                    filled = end;
                }
                buffer
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

/// Where a loss goes, a number for each token.
#[derive(Debug)]
pub struct Outputs<'a, T> {
    /// The losses, if somebody wants them.
    pub per_token: Option<&'a mut [T]>,
    /// Their gradients with respect to `log_prob`, times `weight`.
    pub gradient: &'a mut [T],
    /// What the sum of the losses is to be multiplied by.
    pub weight: f64,
}

/// Writes the loss of every token and its gradient with respect to `log_prob`; returns the totals, which
/// know nothing of the weight.
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
    outputs: Outputs<'_, T>,
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
        ("per_token", outputs.per_token.as_ref().map_or(count, |losses| losses.len())),
        ("gradient", outputs.gradient.len()),
    ] {
        if actual != count {
            return Err(Error::Length { argument, actual, expected: count });
        }
    }
    surrogate.check()?;
    let batch = Batch { tokens, by_probability, outputs };
    Ok(match surrogate {
        Surrogate::MinClip { dual_clip } => batch.under(MinClip { dual_clip }, bounds),
        Surrogate::Mask { truncation } => batch.under(Mask { truncation }, bounds),
        Surrogate::Weight => batch.under(Weight, bounds),
        Surrogate::GradientPreserving { beta_low, beta_high } => {
            batch.under(GradientPreserving { beta_low, beta_high }, bounds)
        }
    })
}

/// How many tokens count, by the mask of [`Tokens`].
#[must_use]
pub fn count_valid(mask: &[u8]) -> usize {
    // As many at a time as a byte can count: that is what the compiler finds vectors for.
    let of_part = |part: &[u8]| part.iter().map(|&byte| u8::from(byte != 0)).sum::<u8>();
    mask.chunks(usize::from(u8::MAX)).map(|part| usize::from(of_part(part))).sum()
}

/// Multiplies the gradient by a factor: that of a loss of which the sum over the tokens is a part.
pub fn scale<T: Float + std::ops::MulAssign>(gradient: &mut [T], factor: T) {
    let one = |part: &mut [T]| part.iter_mut().for_each(|gradient| *gradient *= factor);
    if gradient.len() >= PARALLEL_FROM {
        map_parts(gradient.chunks_mut(CHUNK).collect(), one);
    } else {
        one(gradient);
    }
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
    let sides = [("lower", lower), ("log_upper", log_upper)];
    in_chunks(old_log_prob, sides, |old_log_prob, lower, log_upper| {
        T::run(LookUp { image, old_log_prob, lower, log_upper });
    })
}

/// Does the work on each chunk of some tokens and of what is written for them, on several threads if there
/// are many.
fn in_chunks<T: Sync, U: Send>(
    tokens: &[T],
    [(first_name, first), (second_name, second)]: [(&'static str, &mut [U]); 2],
    work: impl Fn(&[T], &mut [U], &mut [U]) + Send + Sync,
) -> Result<()> {
    let expected = tokens.len();
    for (argument, actual) in [(first_name, first.len()), (second_name, second.len())] {
        if actual != expected {
            return Err(Error::Length { argument, actual, expected });
        }
    }
    let outputs = first.chunks_mut(CHUNK).zip(second.chunks_mut(CHUNK));
    let parts = tokens.chunks(CHUNK).zip(outputs);
    let one = |(tokens, (first, second)): (&[T], (&mut [U], &mut [U]))| work(tokens, first, second);
    if expected >= PARALLEL_FROM {
        map_parts(parts.collect(), one);
    } else {
        parts.for_each(one);
    }
    Ok(())
}

/// Writes what [`BandTable::log_bounds`](crate::table::BandTable::log_bounds) says of every token.
///
/// # Errors
/// [`Error::Length`] if the slices differ in length.
pub fn table_log_bounds<T: Float>(
    image: Image<'_>,
    logp: &[T],
    log_lower: &mut [f64],
    log_upper: &mut [f64],
) -> Result<()> {
    let block = |(logp, (log_lower, log_upper)): (&[T], (&mut [f64], &mut [f64]))| {
        let [mut old, mut lower, mut upper] = [[0.0_f32; BLOCK]; 3];
        let old_log_prob = &mut old[..logp.len()];
        for (narrow, &logp) in old_log_prob.iter_mut().zip(logp) {
            *narrow = logp.to_f64() as f32;
        }
        let (lower, upper) = (&mut lower[..logp.len()], &mut upper[..logp.len()]);
        f32::run(LookUp { image, old_log_prob, lower, log_upper: upper });
        for (log_lower, &lower) in log_lower.iter_mut().zip(&*lower) {
            *log_lower = f64::from(lower).ln();
        }
        for (log_upper, &upper) in log_upper.iter_mut().zip(&*upper) {
            *log_upper = f64::from(upper);
        }
    };
    let sides = [("log_lower", log_lower), ("log_upper", log_upper)];
    in_chunks(logp, sides, |logp, log_lower, log_upper| {
        let sides = log_lower.chunks_mut(BLOCK).zip(log_upper.chunks_mut(BLOCK));
        logp.chunks(BLOCK).zip(sides).for_each(block);
    })
}

/// Both sides of a table for some tokens.
struct LookUp<'a, T> {
    image: Image<'a>,
    old_log_prob: &'a [T],
    lower: &'a mut [T],
    log_upper: &'a mut [T],
}

impl<T: Float> WithLanes<T> for LookUp<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<L: LossLanes<Scalar = T>>(self, lanes: L) {
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

/// Where the bounds of tokens are. `lower` says of which side: where it is true, the lower one.
trait Bounds<T>: Sync {
    /// Whether lower bounds are ratios. All others are log-ratios.
    const LOWER_IS_RATIO: bool;

    /// What the bounds are found by, of the tokens from `index` on.
    ///
    /// # Safety
    /// As of [`load`].
    unsafe fn keys<const WHOLE: bool, L: LossLanes<Scalar = T>>(
        &self,
        lanes: L,
        index: usize,
        old_log_prob: L::Float,
        lower: L::Mask,
    ) -> L::Float;

    /// The log-ratio up to which a token is surely not beyond its bound, of at least 0 or at most 0.
    fn reach<L: LossLanes<Scalar = T>>(&self, lanes: L, keys: L::Float, lower: L::Mask)
    -> L::Float;

    /// The bounds for such keys.
    fn find<L: LossLanes<Scalar = T>>(&self, lanes: L, keys: L::Float, lower: L::Mask) -> L::Float;
}

struct Constant {
    log_lower: f64,
    log_upper: f64,
}

impl<T> Bounds<T> for Constant {
    const LOWER_IS_RATIO: bool = false;

    #[inline(always)]
    unsafe fn keys<const WHOLE: bool, L: LossLanes<Scalar = T>>(
        &self,
        lanes: L,
        _: usize,
        _: L::Float,
        lower: L::Mask,
    ) -> L::Float {
        lanes.select(lower, lanes.splat(self.log_lower), lanes.splat(self.log_upper))
    }

    #[inline(always)]
    fn reach<L: LossLanes<Scalar = T>>(&self, _: L, keys: L::Float, _: L::Mask) -> L::Float {
        keys
    }

    #[inline(always)]
    fn find<L: LossLanes<Scalar = T>>(&self, _: L, keys: L::Float, _: L::Mask) -> L::Float {
        keys
    }
}

struct PerToken<'a, T> {
    log_lower: &'a [T],
    log_upper: &'a [T],
}

impl<T: Float> Bounds<T> for PerToken<'_, T> {
    const LOWER_IS_RATIO: bool = false;

    #[inline(always)]
    unsafe fn keys<const WHOLE: bool, L: LossLanes<Scalar = T>>(
        &self,
        lanes: L,
        index: usize,
        _: L::Float,
        lower: L::Mask,
    ) -> L::Float {
        // SAFETY: as the caller says.
        let (low, high) = unsafe {
            (
                load::<WHOLE, L>(lanes, self.log_lower, index),
                load::<WHOLE, L>(lanes, self.log_upper, index),
            )
        };
        lanes.select(lower, low, high)
    }

    #[inline(always)]
    fn reach<L: LossLanes<Scalar = T>>(&self, _: L, keys: L::Float, _: L::Mask) -> L::Float {
        keys
    }

    #[inline(always)]
    fn find<L: LossLanes<Scalar = T>>(&self, _: L, keys: L::Float, _: L::Mask) -> L::Float {
        keys
    }
}

impl<T> Bounds<T> for Image<'_> {
    const LOWER_IS_RATIO: bool = true;

    #[inline(always)]
    unsafe fn keys<const WHOLE: bool, L: LossLanes<Scalar = T>>(
        &self,
        _: L,
        _: usize,
        old_log_prob: L::Float,
        _: L::Mask,
    ) -> L::Float {
        old_log_prob
    }

    #[inline(always)]
    fn reach<L: LossLanes<Scalar = T>>(
        &self,
        lanes: L,
        keys: L::Float,
        lower: L::Mask,
    ) -> L::Float {
        lanes.reach(*self, keys, lower)
    }

    #[inline(always)]
    fn find<L: LossLanes<Scalar = T>>(&self, lanes: L, keys: L::Float, lower: L::Mask) -> L::Float {
        lanes.look_up(*self, keys, lower)
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
fn padded<T: Copy>(rest: &[T], padding: T) -> [T; MAX_LANES] {
    let mut padded = [padding; MAX_LANES];
    padded[..rest.len()].copy_from_slice(rest);
    padded
}

/// What is done to which tokens, apart from how.
struct Batch<'a, T> {
    tokens: &'a Tokens<'a, T>,
    by_probability: bool,
    outputs: Outputs<'a, T>,
}

impl<T: Float> Batch<'_, T> {
    fn under<R: Rule>(self, rule: R, bounds: &BoundSource<'_, T>) -> Totals {
        match *bounds {
            BoundSource::Constant { log_lower, log_upper } => {
                let [log_lower, log_upper] = [log_lower, log_upper].map(Number::to_f64);
                self.run(rule, &Constant { log_lower, log_upper })
            }
            BoundSource::Table(image) => self.run(rule, &image),
            BoundSource::PerToken { log_lower, log_upper } => {
                self.run(rule, &PerToken { log_lower, log_upper })
            }
        }
    }

    /// All chunks, on several threads if there are many; totals are merged in the order of the tokens.
    fn run<R: Rule>(self, rule: R, bounds: &impl Bounds<T>) -> Totals {
        let Self { tokens, by_probability, outputs } = self;
        let parallel = outputs.gradient.len() >= PARALLEL_FROM;
        let chunks = outputs.parts(CHUNK).enumerate();
        let one = |(number, chunk): (usize, Outputs<'_, T>)| {
            let mut block = Block::new();
            let mut totals = Totals::default();
            let mut start = number * CHUNK;
            for outputs in chunk.parts(BLOCK) {
                let count = outputs.gradient.len();
                let task = Task { rule, bounds, tokens, start, count, by_probability };
                block.run(&task, outputs, &mut totals);
                start += count;
            }
            totals
        };
        let totals: Vec<Totals> =
            if parallel { map_parts(chunks.collect(), one) } else { chunks.map(one).collect() };
        totals.iter().fold(Totals::default(), Totals::merge)
    }
}

impl<T: Float> Outputs<'_, T> {
    fn parts(self, size: usize) -> impl Iterator<Item = Self> {
        let Self { per_token, gradient, weight } = self;
        let mut per_token = per_token.map(|losses| losses.chunks_mut(size));
        gradient.chunks_mut(size).map(move |gradient| Self {
            per_token: per_token.as_mut().and_then(Iterator::next),
            gradient,
            weight,
        })
    }
}

/// The tokens from `start` on, `count` of them, and what is done to them.
struct Task<'a, T, R, B> {
    rule: R,
    bounds: &'a B,
    tokens: &'a Tokens<'a, T>,
    start: usize,
    count: usize,
    by_probability: bool,
}

/// What each step over some tokens leaves for the next. Vectors may reach beyond the last of them.
#[repr(align(64))] // so that no vector lies across two lines of a cache
struct Block<T> {
    /// Not clamped; 0 where a token does not count.
    log_ratio: [T; BLOCK + MAX_LANES],
    /// Minus the advantage, likewise.
    cost: [T; BLOCK + MAX_LANES],
    moved: Moved<T>,
    /// Where they are one a row.
    advantages: [T; BLOCK],
    /// Where nobody wants them.
    losses: [T; BLOCK],
}

/// The tokens of a block that have moved so far towards the bound that holds for them that they may be beyond
/// it, one after the other: they are few, and bounds are found much faster side by side.
#[repr(align(64))]
struct Moved<T> {
    /// What their bounds are found by; then their bounds; and then where their ratios stop: at the bound if
    /// they are beyond it, at 0, where no bound is that a ratio could be beyond, if they are not.
    bounds: [T; BLOCK + MAX_LANES],
    /// Clamped; negative where the lower bound holds.
    log_ratio: [T; BLOCK + MAX_LANES],
    count: usize,
    /// Which tokens they are, a bit each, vector by vector.
    who: [u32; BLOCK],
}

impl<T: Float> Block<T> {
    fn new() -> Self {
        let zeros = [T::ZERO; BLOCK + MAX_LANES];
        let moved = Moved { bounds: zeros, log_ratio: zeros, count: 0, who: [0; BLOCK] };
        let [advantages, losses] = [[T::ZERO; BLOCK]; 2];
        Self { log_ratio: zeros, cost: zeros, moved, advantages, losses }
    }

    fn run<R: Rule, B: Bounds<T>>(
        &mut self,
        task: &Task<'_, T, R, B>,
        outputs: Outputs<'_, T>,
        totals: &mut Totals,
    ) {
        let Self { log_ratio, cost, moved, advantages, losses } = self;
        let &Task { rule, bounds, tokens, start, count, by_probability } = task;
        let here = start..start + count;
        let columns = Columns {
            old_log_prob: &tokens.old_log_prob[here.clone()],
            log_prob: &tokens.log_prob[here.clone()],
            given: tokens.log_ratio.map(|given| &given[here.clone()]),
            advantages: tokens.advantages.block(start, &mut advantages[..count]),
            mask: &tokens.mask[here],
        };
        T::run(Collect::<T, R, B> {
            rule: PhantomData,
            bounds,
            start,
            columns,
            log_ratio,
            cost,
            moved,
            totals,
        });
        T::run(Find { bounds, moved });
        if B::LOWER_IS_RATIO {
            T::run(Stop::<T, true> { moved });
        } else {
            T::run(Stop::<T, false> { moved });
        }
        let Outputs { per_token, gradient, weight } = outputs;
        T::run(Apply {
            rule,
            columns,
            by_probability,
            log_ratio,
            cost,
            moved,
            weight,
            per_token: per_token.unwrap_or(&mut losses[..count]),
            gradient,
            totals,
        });
    }
}

/// The tokens of a block: all columns are equally long.
#[derive(Clone, Copy)]
struct Columns<'a, T> {
    old_log_prob: &'a [T],
    log_prob: &'a [T],
    /// Log-ratios, if they are given.
    given: Option<&'a [T]>,
    advantages: &'a [T],
    mask: &'a [u8],
}

impl<T: Float> Columns<'_, T> {
    /// # Safety
    /// As of [`load`].
    #[inline(always)]
    unsafe fn valid<const WHOLE: bool, L: Lanes<Scalar = T>>(
        &self,
        lanes: L,
        index: usize,
    ) -> L::Mask {
        if WHOLE {
            // SAFETY: as the caller says.
            lanes.load_mask(unsafe { self.mask.get_unchecked(index..index + L::COUNT) })
        } else {
            lanes.load_mask(&padded(&self.mask[index..], 0))
        }
    }
}

/// The first step: the log-ratios, what is summed up of them, and who has moved far.
struct Collect<'a, T, R, B> {
    rule: PhantomData<R>,
    bounds: &'a B,
    start: usize,
    columns: Columns<'a, T>,
    log_ratio: &'a mut [T; BLOCK + MAX_LANES],
    cost: &'a mut [T; BLOCK + MAX_LANES],
    moved: &'a mut Moved<T>,
    totals: &'a mut Totals,
}

#[inline(always)]
fn clamp<L: Lanes>(lanes: L, log_ratio: L::Float) -> L::Float {
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

/// The second step: the bounds of those who have.
struct Find<'a, T, B> {
    bounds: &'a B,
    moved: &'a mut Moved<T>,
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
struct Stop<'a, T, const LOWER_IS_RATIO: bool> {
    moved: &'a mut Moved<T>,
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

/// The last step: losses and gradients.
struct Apply<'a, T, R> {
    rule: R,
    columns: Columns<'a, T>,
    by_probability: bool,
    log_ratio: &'a [T; BLOCK + MAX_LANES],
    cost: &'a [T; BLOCK + MAX_LANES],
    moved: &'a Moved<T>,
    weight: f64,
    per_token: &'a mut [T],
    gradient: &'a mut [T],
    totals: &'a mut Totals,
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

/// The numbers of a vector, then zeros.
#[inline(always)]
fn numbers<L: Lanes<Scalar: Float>>(lanes: L, vector: L::Float) -> [L::Scalar; MAX_LANES] {
    let mut numbers = [L::Scalar::ZERO; MAX_LANES];
    lanes.store(vector, &mut numbers);
    numbers
}

#[cold]
fn nonfinite<T: Float>(losses: &[T]) -> u64 {
    losses.iter().filter(|loss| !loss.to_f64().is_finite()).count() as u64
}

/// All lanes of a vector taken together, two and two.
#[inline(always)]
fn reduce<L: Lanes<Scalar: Float>>(
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
fn sum<L: Lanes<Scalar: Float>>(lanes: L, vector: L::Float) -> f64 {
    reduce(lanes, vector, |a, b| a + b)
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

    /// Counts those that are valid, clipped low and clipped high.
    #[inline(always)]
    fn count_by_probability<L: Lanes>(
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

    fn both<'a, T>(losses: &'a mut [T], gradient: &'a mut [T]) -> Outputs<'a, T> {
        Outputs { per_token: Some(losses), gradient, weight: 1.0 }
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
            policy_loss(&tokens, bounds, surrogate, true, both(&mut per_token, &mut gradient))
                .unwrap();
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
        let totals =
            policy_loss(&tokens, &bounds, PLAIN, true, both(&mut loss, &mut slope)).unwrap();
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
            policy_loss(&tokens, &bounds, PLAIN, false, both(&mut loss, &mut slope)).unwrap();
            (loss, slope)
        };
        let each = with(Advantages::PerToken(&[2.0, 2.0, 2.0, -3.0, -3.0, -3.0]));
        assert_eq!(each, with(Advantages::PerRow { values: &[2.0, -3.0], row_length: 3 }));
    }

    /// Every surrogate in float32, with holes in the mask, against each token by itself.
    #[test]
    fn a_token_does_not_see_its_neighbours() {
        let count = BLOCK + CHUNK + 45;
        let table = table("kl", 0.05);
        let wave = |i: usize, frequency: f64| (i as f64 * frequency).sin() as f32;
        let old: Vec<f32> = (0..count).map(|i| -2.0 - 2.0 * wave(i, 0.37)).collect();
        let new: Vec<f32> = (0..count).map(|i| old[i] + wave(i, 0.11)).collect();
        let advantages: Vec<f32> = (0..count).map(|i| wave(i, 0.73)).collect();
        let mask: Vec<u8> =
            (0..count).map(|i| u8::from(i % 100 < 40 || wave(i, 1.9) > 0.0)).collect();
        let (low, high): (Vec<f32>, Vec<f32>) =
            (0..count).map(|i| (-0.3 - 0.2 * wave(i, 0.5), 0.4 + 0.3 * wave(i, 0.6))).unzip();
        let of = |from: usize, to: usize, per_token: bool, surrogate: Surrogate| {
            let tokens = Tokens {
                old_log_prob: &old[from..to],
                log_prob: &new[from..to],
                log_ratio: None,
                advantages: Advantages::PerToken(&advantages[from..to]),
                mask: &mask[from..to],
            };
            let bounds = if per_token {
                BoundSource::PerToken { log_lower: &low[from..to], log_upper: &high[from..to] }
            } else {
                BoundSource::Table(table.image())
            };
            let (mut loss, mut slope) = (vec![7.0; to - from], vec![7.0; to - from]);
            let outputs = both(&mut loss, &mut slope);
            let totals = policy_loss(&tokens, &bounds, surrogate, true, outputs).unwrap();
            (loss, slope, totals)
        };
        for surrogate in [
            dual(1.3),
            Surrogate::Mask { truncation: Some(1.2) },
            Surrogate::Weight,
            Surrogate::GradientPreserving { beta_low: 0.5, beta_high: 0.25 },
        ] {
            for per_token in [false, true] {
                let (loss, slope, totals) = of(0, count, per_token, surrogate);
                let mut sum = Totals::default();
                for i in 0..count {
                    let single = of(i, i + 1, per_token, surrogate);
                    assert_eq!(
                        (loss[i], slope[i]),
                        (single.0[0], single.1[0]),
                        "{surrogate:?} {i}"
                    );
                    sum = sum.merge(&single.2);
                }
                let extremes = |totals: &Totals| (totals.log_ratio_min, totals.log_ratio_max);
                let counts = |totals: &Totals| {
                    let Totals { valid, clipped_low, clipped_high, limited, .. } = *totals;
                    (valid, clipped_low, clipped_high, limited, totals.by_probability)
                };
                assert_eq!(counts(&totals), counts(&sum));
                assert_eq!(extremes(&totals), extremes(&sum));
                // Up to 64 tokens are added up in float32.
                let close = |a: f64, b: f64, scale: f64| (a - b).abs() <= 64.0 * 2e-7 * scale;
                assert!(close(totals.loss, sum.loss, sum.gradient_free * 8.0));
                assert!(close(totals.kl, sum.kl, totals.valid as f64));
                assert!(close(totals.kl_k3, sum.kl_k3, sum.kl_k3));
                assert!(close(totals.entropy, sum.entropy, sum.entropy));
                assert!(close(totals.gradient_free, sum.gradient_free, sum.gradient_free));
                assert!(close(totals.gradient_removed, sum.gradient_removed, sum.gradient_removed));
            }
        }
    }

    #[test]
    fn a_weight_is_of_the_gradient_alone_and_losses_need_not_be_written() {
        let count = CHUNK + 46;
        let wave = |i: usize, frequency: f64| (i as f64 * frequency).sin() as f32;
        let old: Vec<f32> = (0..count).map(|i| -2.0 - 2.0 * wave(i, 0.37)).collect();
        let new: Vec<f32> = (0..count).map(|i| old[i] + wave(i, 0.11)).collect();
        let advantages = Advantages::PerRow { values: &[1.0, -1.0, 0.5], row_length: count / 3 };
        assert_eq!(count % 3, 0);
        let mask: Vec<u8> = (0..count).map(|i| (i % 7) as u8).collect();
        let tokens =
            Tokens { old_log_prob: &old, log_prob: &new, log_ratio: None, advantages, mask: &mask };
        let bounds = BoundSource::Constant { log_lower: -0.2, log_upper: 0.3 };
        let (mut loss, mut slope) = (vec![7.0; count], vec![7.0; count]);
        let totals =
            policy_loss(&tokens, &bounds, PLAIN, true, both(&mut loss, &mut slope)).unwrap();
        let mut weighted = vec![7.0; count];
        let outputs = Outputs { per_token: None, gradient: &mut weighted, weight: 1.0 / 3.0 };
        assert_eq!(policy_loss(&tokens, &bounds, PLAIN, true, outputs).unwrap(), totals);
        let expected: Vec<f32> = slope.iter().map(|slope| slope * (1.0 / 3.0)).collect();
        assert_eq!(weighted, expected);
        assert_eq!(count_valid(&mask) as u64, totals.valid);
        assert_eq!(count_valid(&[]), 0);
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
            policy_loss(tokens, &bounds, surrogate, false, both(&mut loss, &mut slope))
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
        policy_loss(&tokens, &bounds, PLAIN, false, both(&mut loss, &mut slope)).unwrap();
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

        let old: Vec<f64> = old.into_iter().map(|old| 1.000_000_01 * f64::from(old)).collect();
        let (mut log_lower, mut log_upper) = (vec![0.0; old.len()], vec![0.0; old.len()]);
        table_log_bounds(table.image(), &old, &mut log_lower, &mut log_upper).unwrap();
        for ((&old, lower), upper) in old.iter().zip(&log_lower).zip(&log_upper) {
            let scalar = table.log_bounds(old);
            if old.is_nan() {
                assert!(lower.is_nan() && upper.is_nan());
            } else {
                assert_eq!((*lower, *upper), scalar, "{old}");
            }
        }
        let (log_lower, log_upper) = (&mut log_lower[1..], &mut log_upper);
        assert!(table_log_bounds(table.image(), &old, log_lower, log_upper).is_err());
    }

    #[test]
    fn no_token_at_all_adds_up_to_nothing() {
        let (_, _, totals) =
            run::<f32>(&[], &BoundSource::Constant { log_lower: -0.1, log_upper: 0.1 }, PLAIN);
        assert_eq!(totals, Totals::default());
    }
}
