//! The loss of a batch, on contiguous numpy arrays of any number of dimensions.

use numpy::{
    Element, IntoPyArray, PyArray1, PyArrayDyn, PyReadonlyArray1, PyReadonlyArrayDyn,
    PyReadwriteArrayDyn,
};
use pyo3::prelude::*;

use super::threads::in_parts;
use crate::error::Error;
use crate::loss::surrogate::Surrogate;
use crate::loss::{self, Advantages, BoundSource, Float, Outputs, Tokens, Totals};
use crate::table::Image;

/// Sum of the losses, counts and sums, in the order of [`counts_of`] and [`sums_of`].
type Reduced<'py> = (f64, Bound<'py, PyArray1<i64>>, Bound<'py, PyArray1<f64>>);

/// Writes each token's loss to `per_token` and its gradient, times `weight`, to `gradient`.
///
/// - `log_ratio` replaces `log_prob - old_log_prob` if it is given.
/// - `anchor_log_prob` is where the bounds stand, in place of `old_log_prob`, if it is given.
/// - `advantages` has one element a token or one a row.
/// - `bounds` is the image of a table; or all lower log bounds, then all upper ones, one each or one a token.
/// - `parameters` belong to the surrogate, as [`Surrogate::new`] takes them.
#[pyfunction]
#[pyo3(signature = (
    old_log_prob, log_prob, log_ratio, advantages, mask, bounds, row_length, surrogate, parameters,
    by_probability, anchor_log_prob, weight, per_token, gradient, /
))]
#[allow(clippy::too_many_arguments)]
pub(super) fn policy_loss<'py>(
    py: Python<'py>,
    old_log_prob: Bound<'py, PyAny>,
    log_prob: Bound<'py, PyAny>,
    log_ratio: Option<Bound<'py, PyAny>>,
    advantages: Bound<'py, PyAny>,
    mask: PyReadonlyArrayDyn<'py, u8>,
    bounds: Bound<'py, PyAny>,
    row_length: usize,
    surrogate: &str,
    parameters: Vec<f64>,
    by_probability: bool,
    anchor_log_prob: Option<Bound<'py, PyAny>>,
    weight: f64,
    per_token: Option<Bound<'py, PyAny>>,
    gradient: Bound<'py, PyAny>,
) -> PyResult<Reduced<'py>> {
    let run = if is_float32(&log_prob) { Arguments::run::<f32> } else { Arguments::run::<f64> };
    let arguments = Arguments {
        old_log_prob,
        log_prob,
        log_ratio,
        advantages,
        mask,
        bounds,
        row_length,
        surrogate: Surrogate::new(surrogate, &parameters)?,
        by_probability,
        anchor_log_prob,
        weight,
        per_token,
        gradient,
    };
    run(&arguments, py)
}

fn is_float32(array: &Bound<'_, PyAny>) -> bool {
    array.cast::<PyArrayDyn<f32>>().is_ok()
}

/// Arguments of [`policy_loss`], whose floats are still of unknown type.
struct Arguments<'py> {
    old_log_prob: Bound<'py, PyAny>,
    log_prob: Bound<'py, PyAny>,
    log_ratio: Option<Bound<'py, PyAny>>,
    advantages: Bound<'py, PyAny>,
    mask: PyReadonlyArrayDyn<'py, u8>,
    bounds: Bound<'py, PyAny>,
    row_length: usize,
    surrogate: Surrogate,
    by_probability: bool,
    anchor_log_prob: Option<Bound<'py, PyAny>>,
    weight: f64,
    per_token: Option<Bound<'py, PyAny>>,
    gradient: Bound<'py, PyAny>,
}

impl<'py> Arguments<'py> {
    fn run<T: Float + Element>(&self, py: Python<'py>) -> PyResult<Reduced<'py>> {
        let old_log_prob: PyReadonlyArrayDyn<'_, T> = self.old_log_prob.extract()?;
        let log_prob: PyReadonlyArrayDyn<'_, T> = self.log_prob.extract()?;
        let log_ratio: Option<PyReadonlyArrayDyn<'_, T>> =
            self.log_ratio.as_ref().map(PyAnyMethods::extract).transpose()?;
        let anchor_log_prob: Option<PyReadonlyArrayDyn<'_, T>> =
            self.anchor_log_prob.as_ref().map(PyAnyMethods::extract).transpose()?;
        let advantages: PyReadonlyArrayDyn<'_, T> = self.advantages.extract()?;
        let mut per_token: Option<PyReadwriteArrayDyn<'_, T>> =
            self.per_token.as_ref().map(PyAnyMethods::extract).transpose()?;
        let mut gradient: PyReadwriteArrayDyn<'_, T> = self.gradient.extract()?;

        let log_prob = log_prob.as_slice()?;
        let values = advantages.as_slice()?;
        let tokens = Tokens {
            old_log_prob: old_log_prob.as_slice()?,
            log_prob,
            log_ratio: log_ratio.as_ref().map(|log_ratio| log_ratio.as_slice()).transpose()?,
            anchor_log_prob: anchor_log_prob
                .as_ref()
                .map(|anchor| anchor.as_slice())
                .transpose()?,
            advantages: if values.len() == log_prob.len() {
                Advantages::PerToken(values)
            } else {
                Advantages::PerRow { values, row_length: self.row_length }
            },
            mask: self.mask.as_slice()?,
        };
        let outputs = Outputs {
            per_token: per_token.as_mut().map(|losses| losses.as_slice_mut()).transpose()?,
            gradient: gradient.as_slice_mut()?,
            weight: self.weight,
        };
        let (surrogate, by_probability) = (self.surrogate, self.by_probability);
        #[allow(clippy::redundant_closure_for_method_calls)] // the method alone has one lifetime
        let signals = || Python::attach(|py| py.check_signals());
        let run = |source: BoundSource<'_, T>| {
            py.detach(|| {
                loss::policy_loss_in_groups(
                    &tokens,
                    &source,
                    surrogate,
                    by_probability,
                    outputs,
                    signals,
                )
            })
        };
        let totals = if let Ok(words) = self.bounds.extract::<PyReadonlyArray1<'_, u32>>() {
            run(BoundSource::Table(Image::new(words.as_slice()?)?))
        } else {
            let bounds: PyReadonlyArrayDyn<'_, T> = self.bounds.extract()?;
            run(match bounds.as_slice()? {
                &[log_lower, log_upper] => BoundSource::Constant { log_lower, log_upper },
                both => {
                    let (log_lower, log_upper) = both.split_at(both.len() / 2);
                    BoundSource::PerToken { log_lower, log_upper }
                }
            })
        }?;
        Ok((
            totals.loss,
            counts_of(&totals, by_probability).into_pyarray(py),
            sums_of(&totals).into_pyarray(py),
        ))
    }
}

/// Counts of tokens; with bins, also the valid, clipped low and clipped high tokens of each.
fn counts_of(totals: &Totals, by_probability: bool) -> Vec<i64> {
    let mut counts = vec![
        totals.valid,
        totals.nonfinite,
        totals.clipped_low,
        totals.clipped_high,
        totals.limited,
        totals.positive,
    ];
    if by_probability {
        let bins = &totals.by_probability;
        counts.extend(bins.iter().map(|bin| bin.valid));
        counts.extend(bins.iter().map(|bin| bin.clipped_low));
        counts.extend(bins.iter().map(|bin| bin.clipped_high));
    }
    counts.into_iter().map(|count| count as i64).collect()
}

/// Sums over tokens, then the extremes of the log-ratio.
fn sums_of(totals: &Totals) -> Vec<f64> {
    vec![
        totals.kl,
        totals.kl_k3,
        totals.entropy,
        totals.gradient_unclipped,
        totals.gradient_removed,
        totals.log_ratio_min,
        totals.log_ratio_max,
    ]
}

/// Writes each token's tabulated `lower`, a ratio, and `log_upper`.
#[pyfunction]
#[pyo3(signature = (words, old_log_prob, lower, log_upper, /))]
pub(super) fn table_bounds<'py>(
    py: Python<'py>,
    words: PyReadonlyArray1<'py, u32>,
    old_log_prob: Bound<'py, PyAny>,
    lower: Bound<'py, PyAny>,
    log_upper: Bound<'py, PyAny>,
) -> PyResult<()> {
    let image = Image::new(words.as_slice()?)?;
    let run =
        if is_float32(&old_log_prob) { table_bounds_of::<f32> } else { table_bounds_of::<f64> };
    run(py, image, &old_log_prob, &lower, &log_upper)
}

fn table_bounds_of<T: Float + Element>(
    py: Python<'_>,
    image: Image<'_>,
    old_log_prob: &Bound<'_, PyAny>,
    lower: &Bound<'_, PyAny>,
    log_upper: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let old_log_prob: PyReadonlyArrayDyn<'_, T> = old_log_prob.extract()?;
    let mut lower: PyReadwriteArrayDyn<'_, T> = lower.extract()?;
    let mut log_upper: PyReadwriteArrayDyn<'_, T> = log_upper.extract()?;
    let (old_log_prob, lower, log_upper) =
        (old_log_prob.as_slice()?, lower.as_slice_mut()?, log_upper.as_slice_mut()?);
    Error::check_length("lower", lower.len(), old_log_prob.len())?;
    Error::check_length("log_upper", log_upper.len(), old_log_prob.len())?;
    in_parts(py, old_log_prob.len(), |part| {
        let (lower, log_upper) = (&mut lower[part.clone()], &mut log_upper[part.clone()]);
        Ok(py.detach(|| loss::table_bounds(image, &old_log_prob[part], lower, log_upper))?)
    })
}

/// The number of valid tokens.
#[pyfunction]
#[pyo3(signature = (mask, /))]
pub(super) fn count_valid(mask: PyReadonlyArrayDyn<'_, u8>) -> PyResult<usize> {
    Ok(loss::count_valid(mask.as_slice()?))
}

/// Multiplies a gradient by a factor, which is an array without dimensions.
#[pyfunction]
#[pyo3(signature = (gradient, factor, /))]
pub(super) fn scale<'py>(
    py: Python<'py>,
    gradient: Bound<'py, PyAny>,
    factor: Bound<'py, PyAny>,
) -> PyResult<()> {
    let run = if is_float32(&gradient) { scale_of::<f32> } else { scale_of::<f64> };
    run(py, &gradient, &factor)
}

fn scale_of<T: Float + Element + std::ops::MulAssign>(
    py: Python<'_>,
    gradient: &Bound<'_, PyAny>,
    factor: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let mut gradient: PyReadwriteArrayDyn<'_, T> = gradient.extract()?;
    let factor: PyReadonlyArrayDyn<'_, T> = factor.extract()?;
    let &[factor] = factor.as_slice()? else {
        return Err(Error::Length {
            argument: "factor",
            actual: factor.as_slice()?.len(),
            expected: 1,
        }
        .into());
    };
    let gradient = gradient.as_slice_mut()?;
    py.detach(|| loss::scale(gradient, factor));
    Ok(())
}
