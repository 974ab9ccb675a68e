//! Clipped policy loss of every token and its gradient, in one pass over the batch.
//!
//! The batch is cut into blocks of tokens. Each block goes through four steps:
//!
//! 1. log-ratios, and the candidates: the tokens far enough from a ratio of 1 to be beyond their bound;
//! 2. the bounds of the candidates;
//! 3. their clipped ratios, or the widths of their regions;
//! 4. losses and gradients of all tokens, by the rule of a [`surrogate`].
//!
//! ```
//! use bandpo::loss::{Advantages, BoundSource, Outputs, Tokens, policy_loss};
//! use bandpo::surrogate::Surrogate;
//!
//! let tokens = Tokens {
//!     old_log_prob: &[-1.0, -1.0, 0.0],
//!     log_prob: &[-0.9, -0.5, 0.0],
//!     log_ratio: None,
//!     anchor_log_prob: None,
//!     advantages: Advantages::PerToken(&[1.0, 1.0, 1.0]),
//!     mask: &[1, 1, 0],
//! };
//! let bounds = BoundSource::Constant { log_lower: -0.2, log_upper: 0.2 };
//! let mut losses = [0.0; 3];
//! let mut gradient = [0.0; 3];
//! let outputs = Outputs { per_token: Some(&mut losses), gradient: &mut gradient, weight: 0.5 };
//! let surrogate = Surrogate::MinClip { dual_clip: None };
//! let totals = policy_loss(&tokens, &bounds, surrogate, false, outputs)?;
//!
//! assert_eq!((totals.valid, totals.clipped_high), (2, 1));
//! assert!((losses[0] + 0.1_f64.exp()).abs() < 1e-15); // within its bound: -A r
//! assert!((losses[1] + 0.2_f64.exp()).abs() < 1e-15); // beyond: -A upper
//! assert_eq!(gradient, [0.5 * losses[0], 0.0, 0.0]);
//! # Ok::<(), bandpo::error::Error>(())
//! ```

mod apply;
mod block;
mod bounds;
mod clip;
mod collect;
mod columns;
mod nan;
mod read;
mod scratch;
pub mod surrogate;
#[cfg(test)]
mod tests;
mod totals;

use std::fmt::Debug;
use std::marker::PhantomData;

use crate::error::{Error, Result};
use crate::loss::block::Batch;
use crate::loss::surrogate::{
    ByAdvantage, ByLogRatio, GradientPreserving, Mask, MinClip, Quadratic, SoftGate, Surrogate,
    Weight,
};
use crate::simd::Number;
use crate::threads::map_parts;

pub use crate::LOG_RATIO_LIMIT;
pub use crate::loss::bounds::BoundSource;
pub use crate::loss::read::{table_bounds, table_log_bounds};
pub use crate::loss::totals::{
    MAX_LOG_PROB, PROBABILITY_BINS, PROBABILITY_EDGES, ProbabilityBin, Totals,
};

/// Tokens of a part of the batch. Fixed, otherwise sums would depend on the number of threads.
const CHUNK: usize = 8192;

/// Chunks of a group, after which a call may be ended: some ten milliseconds. Tests have more than one with fewer tokens.
const GROUP: usize = if cfg!(test) { 3 } else { 256 };

/// Min tokens to share among threads. Fewer are done sooner than other threads wake up.
const PARALLEL_FROM: usize = 2 * CHUNK;

/// Tokens that go through each step together. Few enough that the columns between steps stay in the first
/// cache. Sums within a block have the precision of its numbers, sums of blocks that of f64.
const BLOCK: usize = 512;

/// Float type of a loss: `f32` or `f64`.
pub trait Float: Number + Send + Sync + Debug {}
impl Float for f32 {}
impl Float for f64 {}

/// Advantages of the tokens, or of rows of tokens.
///
/// ```
/// use bandpo::loss::Advantages;
///
/// // Two rows of three tokens each.
/// let shared = Advantages::PerRow { values: &[1.0, -0.5], row_length: 3 };
/// let each = Advantages::PerToken(&[1.0, 1.0, 1.0, -0.5, -0.5, -0.5]);
/// # let _ = (shared, each);
/// ```
#[derive(Debug, Clone, Copy)]
pub enum Advantages<'a, T> {
    /// One a token.
    PerToken(&'a [T]),
    /// One a row.
    PerRow {
        /// The advantages.
        values: &'a [T],
        /// Consecutive tokens that share one.
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

    /// The advantages of the tokens from `start` on, as many as the buffer holds. Fills the buffer unless they are
    /// neighbours already.
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

/// A batch of tokens, one element of each slice a token.
#[derive(Debug, Clone, Copy)]
pub struct Tokens<'a, T> {
    /// Natural log-probabilities under the policy that sampled the tokens.
    pub old_log_prob: &'a [T],
    /// Natural log-probabilities under the policy being trained.
    pub log_prob: &'a [T],
    /// Log-ratios that replace `log_prob - old_log_prob`, such as a sequence's mean.
    pub log_ratio: Option<&'a [T]>,
    /// Natural log-probabilities under a third policy, such as the one that sampled: the bounds stand at these and
    /// limit `log_prob - anchor_log_prob`, while the ratio stays that to `old_log_prob`. A given `log_ratio` is
    /// limited less `anchor_log_prob - old_log_prob`.
    pub anchor_log_prob: Option<&'a [T]>,
    /// Advantages.
    pub advantages: Advantages<'a, T>,
    /// 0 for tokens that do not count. Their other elements may hold anything.
    pub mask: &'a [u8],
}

/// Slices that a loss is written to, one element a token.
#[derive(Debug)]
pub struct Outputs<'a, T> {
    /// Losses. None saves the time to write them.
    pub per_token: Option<&'a mut [T]>,
    /// Gradients of the losses with respect to `log_prob`, times `weight`.
    pub gradient: &'a mut [T],
    /// Factor of the gradients: what the caller multiplies the sum of the losses by.
    pub weight: f64,
}

/// Writes the loss of every token and its gradient with respect to `log_prob`. Returns the totals, which are
/// independent of the weight.
///
/// Tokens that do not count get 0 for both. A NaN makes the loss of its token NaN, and the gradient where no bound or
/// clamp makes that 0. Results are the same bit for bit on any number of threads.
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
    policy_loss_in_groups(tokens, bounds, surrogate, by_probability, outputs, || Ok(()))
}

/// Does as [`policy_loss`] in groups of 2^21 tokens, and calls `between` between two groups. An error of `between` ends
/// the call; outputs of the groups that are left keep what they hold.
///
/// # Errors
/// Those of [`policy_loss`], and the error of `between`.
pub fn policy_loss_in_groups<T: Float, E: From<Error>>(
    tokens: &Tokens<'_, T>,
    bounds: &BoundSource<'_, T>,
    surrogate: Surrogate,
    by_probability: bool,
    outputs: Outputs<'_, T>,
    mut between: impl FnMut() -> Result<(), E>,
) -> Result<Totals, E> {
    check_lengths(tokens, bounds, &outputs)?;
    surrogate.check()?;
    let mut ended = Ok(());
    let proceed = &mut || {
        ended = between();
        ended.is_ok()
    };
    let batch = Batch { tokens, bounds, by_probability, outputs, proceed };
    let totals = match surrogate {
        Surrogate::MinClip { dual_clip } => batch.run(MinClip { dual_clip }),
        Surrogate::Mask { truncation, symmetric: false } => {
            batch.run(Mask::<ByAdvantage> { truncation, selection: PhantomData })
        }
        Surrogate::Mask { truncation, symmetric: true } => {
            batch.run(Mask::<ByLogRatio> { truncation, selection: PhantomData })
        }
        Surrogate::Weight => batch.run(Weight),
        Surrogate::GradientPreserving { beta_low, beta_high } => {
            batch.run(GradientPreserving { beta_low, beta_high })
        }
        Surrogate::SoftGate { tau_positive, tau_negative } => {
            batch.run(SoftGate { tau_positive, tau_negative })
        }
        Surrogate::Quadratic => batch.run(Quadratic),
    };
    ended.map(|()| totals)
}

fn check_lengths<T: Float>(
    tokens: &Tokens<'_, T>,
    bounds: &BoundSource<'_, T>,
    outputs: &Outputs<'_, T>,
) -> Result<()> {
    let count = tokens.log_prob.len();
    let bound_lengths = match bounds {
        BoundSource::PerToken { log_lower, log_upper } => (log_lower.len(), log_upper.len()),
        _ => (count, count),
    };
    for (argument, actual) in [
        ("old_log_prob", tokens.old_log_prob.len()),
        ("log_ratio", tokens.log_ratio.map_or(count, <[T]>::len)),
        ("anchor_log_prob", tokens.anchor_log_prob.map_or(count, <[T]>::len)),
        ("advantages", tokens.advantages.tokens()),
        ("mask", tokens.mask.len()),
        ("log_lower", bound_lengths.0),
        ("log_upper", bound_lengths.1),
        ("per_token", outputs.per_token.as_ref().map_or(count, |losses| losses.len())),
        ("gradient", outputs.gradient.len()),
    ] {
        Error::check_length(argument, actual, count)?;
    }
    Ok(())
}

/// Number of tokens that count, by the mask of [`Tokens`].
///
/// ```
/// assert_eq!(bandpo::loss::count_valid(&[1, 0, 255]), 2);
/// ```
#[must_use]
pub fn count_valid(mask: &[u8]) -> usize {
    // Compilers vectorise counts of a byte, which hold no more than 255.
    let of_part = |part: &[u8]| part.iter().map(|&byte| u8::from(byte != 0)).sum::<u8>();
    mask.chunks(usize::from(u8::MAX)).map(|part| usize::from(of_part(part))).sum()
}

/// Multiplies a gradient by a factor, on several threads if it is long.
///
/// ```
/// let mut gradient = [1.0, -2.0];
/// bandpo::loss::scale(&mut gradient, 0.5);
/// assert_eq!(gradient, [0.5, -1.0]);
/// ```
pub fn scale<T: Float + std::ops::MulAssign>(gradient: &mut [T], factor: T) {
    let one = |part: &mut [T]| part.iter_mut().for_each(|gradient| *gradient *= factor);
    if gradient.len() >= PARALLEL_FROM {
        map_parts(gradient.chunks_mut(CHUNK).collect(), &one);
    } else {
        one(gradient);
    }
}
