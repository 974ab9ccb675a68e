//! The loss of a batch, for Python.

use numpy::{
    Element, IntoPyArray, PyArray1, PyArrayDyn, PyReadonlyArray1, PyReadonlyArrayDyn,
    PyReadwriteArrayDyn,
};
use pyo3::prelude::*;

use crate::error::Error;
use crate::loss::surrogate::Surrogate;
use crate::loss::{self, Advantages, BoundSource, Float, Outputs, Tokens};
use crate::table::Image;

/// Loss and gradient of every token, written to `per_token` and `gradient`. Arrays are contiguous, of any
/// number of dimensions.
///
/// `log_ratio` replaces `log_prob - old_log_prob` where it is given. `advantages` has one element a token
/// or one a row; `bounds` is the image of a table, or all lower and then all upper log bounds, one each or
/// one a token. `parameters` are those of the surrogate: the dual clip or the truncation, if any, or both
/// betas. Returns the sum of the losses, the counts (valid, nonfinite, clipped low, clipped high, limited; if asked for also
/// valid, clipped low and clipped high of each bin), then the sums (`kl`, `kl_k3`, entropy, gradient
/// without a rule, gradient removed) and the extremes of the log-ratio.
#[pyfunction]
#[pyo3(signature = (
    old_log_prob, log_prob, log_ratio, advantages, mask, bounds, row_length, surrogate, parameters,
    by_probability, weight, per_token, gradient, /
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
    weight: f64,
    per_token: Option<Bound<'py, PyAny>>,
    gradient: Bound<'py, PyAny>,
) -> PyResult<(f64, Bound<'py, PyArray1<i64>>, Bound<'py, PyArray1<f64>>)> {
    let surrogate = Surrogate::new(surrogate, &parameters)?;
    let arrays = [old_log_prob, log_prob, advantages, bounds, gradient];
    let run = if arrays[1].cast::<PyArrayDyn<f32>>().is_ok() {
        policy_loss_of::<f32>
    } else {
        policy_loss_of::<f64>
    };
    let some = [log_ratio.as_ref(), per_token.as_ref()];
    run(py, &arrays, some, &mask, row_length, surrogate, by_probability, weight)
}

#[allow(clippy::too_many_arguments)]
fn policy_loss_of<'py, T: Float + Element>(
    py: Python<'py>,
    [old_log_prob, log_prob, advantages, bounds, gradient]: &[Bound<'_, PyAny>; 5],
    [log_ratio, per_token]: [Option<&Bound<'_, PyAny>>; 2],
    mask: &PyReadonlyArrayDyn<'_, u8>,
    row_length: usize,
    surrogate: Surrogate,
    by_probability: bool,
    weight: f64,
) -> PyResult<(f64, Bound<'py, PyArray1<i64>>, Bound<'py, PyArray1<f64>>)> {
    let old_log_prob: PyReadonlyArrayDyn<'_, T> = old_log_prob.extract()?;
    let log_prob: PyReadonlyArrayDyn<'_, T> = log_prob.extract()?;
    let log_ratio: Option<PyReadonlyArrayDyn<'_, T>> =
        log_ratio.map(PyAnyMethods::extract).transpose()?;
    let advantages: PyReadonlyArrayDyn<'_, T> = advantages.extract()?;
    let mut per_token: Option<PyReadwriteArrayDyn<'_, T>> =
        per_token.map(PyAnyMethods::extract).transpose()?;
    let mut gradient: PyReadwriteArrayDyn<'_, T> = gradient.extract()?;

    let log_prob = log_prob.as_slice()?;
    let values = advantages.as_slice()?;
    let tokens = Tokens {
        old_log_prob: old_log_prob.as_slice()?,
        log_prob,
        log_ratio: log_ratio.as_ref().map(|log_ratio| log_ratio.as_slice()).transpose()?,
        advantages: if values.len() == log_prob.len() {
            Advantages::PerToken(values)
        } else {
            Advantages::PerRow { values, row_length }
        },
        mask: mask.as_slice()?,
    };
    let outputs = Outputs {
        per_token: per_token.as_mut().map(|losses| losses.as_slice_mut()).transpose()?,
        gradient: gradient.as_slice_mut()?,
        weight,
    };
    let run = |source: BoundSource<'_, T>| {
        py.detach(|| loss::policy_loss(&tokens, &source, surrogate, by_probability, outputs))
    };
    let totals = if let Ok(words) = bounds.extract::<PyReadonlyArray1<'_, u32>>() {
        run(BoundSource::Table(Image::new(words.as_slice()?)?))
    } else {
        let bounds: PyReadonlyArrayDyn<'_, T> = bounds.extract()?;
        run(match bounds.as_slice()? {
            &[log_lower, log_upper] => BoundSource::Constant { log_lower, log_upper },
            both => {
                let (log_lower, log_upper) = both.split_at(both.len() / 2);
                BoundSource::PerToken { log_lower, log_upper }
            }
        })
    }?;

    let mut counts = vec![
        totals.valid,
        totals.nonfinite,
        totals.clipped_low,
        totals.clipped_high,
        totals.limited,
    ];
    if by_probability {
        let bins = &totals.by_probability;
        counts.extend(bins.iter().map(|bin| bin.valid));
        counts.extend(bins.iter().map(|bin| bin.clipped_low));
        counts.extend(bins.iter().map(|bin| bin.clipped_high));
    }
    let counts: Vec<i64> = counts.into_iter().map(|count| count as i64).collect();
    let sums = vec![
        totals.kl,
        totals.kl_k3,
        totals.entropy,
        totals.gradient_unclipped,
        totals.gradient_removed,
        totals.log_ratio_min,
        totals.log_ratio_max,
    ];
    Ok((totals.loss, counts.into_pyarray(py), sums.into_pyarray(py)))
}

/// Writes the tabulated `lower`, a ratio, and `log_upper` of every token. Arrays are contiguous.
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
    if old_log_prob.cast::<PyArrayDyn<f32>>().is_ok() {
        table_bounds_of::<f32>(py, image, &old_log_prob, &lower, &log_upper)
    } else {
        table_bounds_of::<f64>(py, image, &old_log_prob, &lower, &log_upper)
    }
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
    Ok(py.detach(|| loss::table_bounds(image, old_log_prob, lower, log_upper))?)
}

/// How many tokens count.
#[pyfunction]
#[pyo3(signature = (mask, /))]
pub(super) fn count_valid(mask: PyReadonlyArrayDyn<'_, u8>) -> PyResult<usize> {
    Ok(loss::count_valid(mask.as_slice()?))
}

/// Multiplies a gradient by a factor, an array without dimensions.
#[pyfunction]
#[pyo3(signature = (gradient, factor, /))]
pub(super) fn scale<'py>(
    py: Python<'py>,
    gradient: Bound<'py, PyAny>,
    factor: Bound<'py, PyAny>,
) -> PyResult<()> {
    if gradient.cast::<PyArrayDyn<f32>>().is_ok() {
        scale_of::<f32>(py, &gradient, &factor)
    } else {
        scale_of::<f64>(py, &gradient, &factor)
    }
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
