//! Bounds of whole arrays of tokens, read from a table.

// A function of vectors has to become part of one that is compiled for their instructions.
#![allow(clippy::inline_always)]

use crate::error::{Error, Result};
use crate::image::Image;
use crate::loss::columns::{numbers, padded};
use crate::loss::{BLOCK, CHUNK, Float, PARALLEL_FROM};
use crate::simd::{LossLanes, Number, WithLanes};
use crate::threads::map_parts;

/// Writes the tabulated `lower`, a ratio, and `log_upper` of every token. NaN gives NaN.
///
/// ```
/// use bandpo::band::Band;
/// use bandpo::divergence::Divergence;
/// use bandpo::loss::table_bounds;
/// use bandpo::table::BandTable;
///
/// let band = Band::new(Divergence::parse("kl")?, 0.05, 0.05)?;
/// let table = BandTable::of_band(&band)?;
/// let (mut lower, mut log_upper) = ([0.0], [0.0]);
/// table_bounds(table.image(), &[-1.5_f32], &mut lower, &mut log_upper)?;
///
/// let (exact_lower, exact_upper) = band.log_bounds(-1.5);
/// assert!((f64::from(lower[0]) - exact_lower.exp()).abs() < 1e-6);
/// assert!((f64::from(log_upper[0]) - exact_upper).abs() < 1e-6);
/// # Ok::<(), bandpo::error::Error>(())
/// ```
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

/// Does the work on each chunk of tokens and of its two outputs, on several threads if there are many.
fn in_chunks<T: Sync, U: Send>(
    tokens: &[T],
    [(first_name, first), (second_name, second)]: [(&'static str, &mut [U]); 2],
    work: impl Fn(&[T], &mut [U], &mut [U]) + Send + Sync,
) -> Result<()> {
    let expected = tokens.len();
    Error::check_length(first_name, first.len(), expected)?;
    Error::check_length(second_name, second.len(), expected)?;
    let outputs = first.chunks_mut(CHUNK).zip(second.chunks_mut(CHUNK));
    let parts = tokens.chunks(CHUNK).zip(outputs);
    let one = |(tokens, (first, second)): (&[T], (&mut [U], &mut [U]))| work(tokens, first, second);
    if expected >= PARALLEL_FROM {
        map_parts(parts.collect(), &one);
    } else {
        parts.for_each(one);
    }
    Ok(())
}

/// Writes [`BandTable::log_bounds`](crate::table::BandTable::log_bounds) of every token.
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

/// Looks up both sides of each token.
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
