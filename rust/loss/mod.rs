//! The clipped policy loss of every token and its gradient, in one pass over the batch.
//!
//! A batch is cut into blocks of tokens, and each block is taken through four steps: log-ratios, and who has
//! moved towards a bound; the bounds of those; who is beyond; losses and gradients. What a rule makes of a
//! token that is beyond is in [`crate::loss::surrogate`].

mod apply;
mod block;
mod bounds;
mod clip;
mod collect;
mod columns;
mod read;
mod scratch;
pub mod surrogate;
#[cfg(test)]
mod tests;
mod totals;

use std::fmt::Debug;

use crate::error::{Error, Result};
use crate::loss::surrogate::{GradientPreserving, Mask, MinClip, Surrogate, Weight};
use crate::simd::Number;
use crate::threads::map_parts;

pub use crate::LOG_RATIO_LIMIT;
pub use crate::loss::bounds::BoundSource;
pub use crate::loss::read::{table_bounds, table_log_bounds};
pub use crate::loss::totals::{PROBABILITY_BINS, PROBABILITY_EDGES, ProbabilityBin, Totals};

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
    Ok(match surrogate {
        Surrogate::MinClip { dual_clip } => {
            block::run(MinClip { dual_clip }, tokens, bounds, by_probability, outputs)
        }
        Surrogate::Mask { truncation } => {
            block::run(Mask { truncation }, tokens, bounds, by_probability, outputs)
        }
        Surrogate::Weight => block::run(Weight, tokens, bounds, by_probability, outputs),
        Surrogate::GradientPreserving { beta_low, beta_high } => {
            let rule = GradientPreserving { beta_low, beta_high };
            block::run(rule, tokens, bounds, by_probability, outputs)
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
