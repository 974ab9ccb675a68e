//! The Python extension `bandpo._core`: convert, release the GIL, call, map the error. No logic.

// Python hands over its objects, and gets arrays back in pairs.
#![allow(clippy::needless_pass_by_value, clippy::type_complexity)]

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use numpy::{
    Element, IntoPyArray, PyArray1, PyArrayDyn, PyReadonlyArray1, PyReadonlyArrayDyn,
    PyReadwriteArrayDyn,
};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::band::{self, Band, Delta, Side};
use crate::divergence::Divergence;
use crate::error::Error;
use crate::loss::surrogate::Surrogate;
use crate::loss::{self, Advantages, BoundSource, Float, Outputs, Tokens};
use crate::table::{BandTable, Curve, Image, MaxError, Stretches, Verification};
use crate::threads;

impl From<Error> for PyErr {
    /// Each kind of error becomes the class of `bandpo.error` that callers expect.
    fn from(error: Error) -> Self {
        let class = match error {
            Error::TableFile { .. } => "TableFileError",
            Error::File { action: "read", .. } => "InputPathError",
            Error::File { .. } => "OutputPathError",
            _ => "InvalidValueError",
        };
        let message = error.to_string();
        Python::attach(|py| {
            match py
                .import("bandpo.error")
                .and_then(|module| module.getattr(class))
                .and_then(|class| class.call1((message,)))
            {
                Ok(value) => PyErr::from_value(value),
                Err(failed) => failed,
            }
        })
    }
}

/// A radius as Python gives it: a number, or one for every element.
#[derive(FromPyObject)]
enum DeltaArgument<'py> {
    Same(f64),
    Each(PyReadonlyArray1<'py, f64>),
}

impl DeltaArgument<'_> {
    fn as_delta(&self) -> PyResult<Delta<'_>> {
        Ok(match self {
            Self::Same(value) => Delta::Same(*value),
            Self::Each(values) => Delta::Each(values.as_slice()?),
        })
    }
}

/// A divergence by its specification.
#[pyclass(name = "Divergence", module = "bandpo._core", frozen, from_py_object)]
#[derive(Clone)]
struct PyDivergence(Divergence);

#[pymethods]
impl PyDivergence {
    #[new]
    fn new(spec: &str) -> PyResult<Self> {
        Ok(Self(Divergence::parse(spec)?))
    }

    #[staticmethod]
    fn from_expression(
        text: &str,
        at_zero: Option<f64>,
        slope_at_infinity: Option<f64>,
    ) -> PyResult<Self> {
        Ok(Self(Divergence::from_expression(text, at_zero, slope_at_infinity)?))
    }

    #[getter]
    fn spec(&self) -> &str {
        self.0.spec()
    }

    #[getter]
    fn curvature(&self) -> Option<f64> {
        self.0.curvature()
    }

    /// Number and parameter of the generator in the CUDA kernels.
    #[getter]
    fn kernel_generator(&self) -> Option<(i32, f64)> {
        self.0.kernel_generator()
    }

    /// The radii of the generator that radii of this divergence stand for.
    fn generator_radii<'py>(
        &self,
        py: Python<'py>,
        delta: PyReadonlyArray1<'py, f64>,
    ) -> PyResult<Bound<'py, PyArray1<f64>>> {
        let radii = delta.as_slice()?.iter().map(|&delta| self.0.generator_radius::<f64>(delta));
        Ok(radii.collect::<Vec<_>>().into_pyarray(py))
    }
}

/// Where a table's curve comes from, as Python gives it.
#[derive(FromPyObject)]
enum CurveArgument {
    Constant(f64),
    Band(PyDivergence, f64),
    /// `sampler(is_upper, logp) -> (log_bounds, slopes)`
    Sampled(Py<PyAny>),
}

/// A curve with everything that it refers to.
enum OwnedCurve {
    Constant(f64),
    Band(Band),
    Sampled(Box<dyn Fn(Side, &[f64]) -> crate::error::Result<Vec<(f64, f64)>> + Sync>),
}

/// What a Python function raised inside a call from Rust; it is raised again at the end.
#[derive(Default)]
struct Raised(Mutex<Option<PyErr>>);

impl Raised {
    fn keep(&self, error: PyErr) -> Error {
        if let Ok(mut kept) = self.0.lock() {
            kept.get_or_insert(error);
        }
        Error::Argument {
            argument: "region",
            value: "one that raised".to_owned(),
            allowed: "usable",
        }
    }

    fn or(&self, error: Error) -> PyErr {
        let kept = self.0.lock().ok().and_then(|mut kept| kept.take());
        kept.unwrap_or_else(|| error.into())
    }
}

/// What a table is measured against: a band, or `exact(logp) -> (log_lower, log_upper)`.
#[derive(FromPyObject)]
enum ExactArgument {
    Band(PyDivergence, f64, f64),
    Function(Py<PyAny>),
}

impl ExactArgument {
    fn bounds(&self, logp: &[f64], raised: &Raised) -> crate::error::Result<(Vec<f64>, Vec<f64>)> {
        match self {
            Self::Band(divergence, low, high) => {
                let band = Band::new(divergence.0.clone(), *low, *high)?;
                Ok(band.log_bounds_of_many(logp))
            }
            Self::Function(function) => {
                Python::attach(|py| call_for_pair(py, function, (logp.to_vec().into_pyarray(py),)))
                    .map_err(|error| raised.keep(error))
            }
        }
    }
}

fn call_for_pair<'py>(
    py: Python<'py>,
    function: &Py<PyAny>,
    arguments: impl pyo3::call::PyCallArgs<'py>,
) -> PyResult<(Vec<f64>, Vec<f64>)> {
    py.check_signals()?;
    let pair = function.call1(py, arguments)?;
    let (first, second): (PyReadonlyArray1<'py, f64>, PyReadonlyArray1<'py, f64>) =
        pair.extract(py)?;
    Ok((first.as_slice()?.to_vec(), second.as_slice()?.to_vec()))
}

fn owned_curve(curve: CurveArgument, raised: &Arc<Raised>) -> PyResult<OwnedCurve> {
    let raised = Arc::clone(raised);
    Ok(match curve {
        CurveArgument::Constant(ratio) => OwnedCurve::Constant(ratio),
        CurveArgument::Band(divergence, delta) => {
            OwnedCurve::Band(Band::new(divergence.0, delta, delta)?)
        }
        CurveArgument::Sampled(function) => OwnedCurve::Sampled(Box::new(move |side, logp| {
            Python::attach(|py| {
                let arguments = (side == Side::Upper, logp.to_vec().into_pyarray(py));
                call_for_pair(py, &function, arguments)
            })
            .map(|(bounds, slopes)| bounds.into_iter().zip(slopes).collect())
            .map_err(|error| raised.keep(error))
        })),
    })
}

fn borrowed(side: &[(f64, OwnedCurve)]) -> Stretches<'_> {
    side.iter()
        .map(|(start, curve)| {
            let curve = match curve {
                OwnedCurve::Constant(ratio) => Curve::Constant(*ratio),
                OwnedCurve::Band(band) => Curve::Band(band),
                OwnedCurve::Sampled(sampler) => Curve::Sampled(sampler.as_ref()),
            };
            (*start, curve)
        })
        .collect()
}

/// A region's bounds as a lookup table.
#[pyclass(name = "BandTable", module = "bandpo._core", frozen)]
struct PyBandTable(BandTable);

#[pymethods]
impl PyBandTable {
    /// Tabulates curves, each with the `y` where it begins.
    #[staticmethod]
    fn build(
        py: Python<'_>,
        lower: Vec<(f64, CurveArgument)>,
        upper: Vec<(f64, CurveArgument)>,
        region: String,
        exact: ExactArgument,
    ) -> PyResult<Self> {
        let raised = Arc::new(Raised::default());
        let own = |side: Vec<(f64, CurveArgument)>| -> PyResult<Vec<(f64, OwnedCurve)>> {
            side.into_iter()
                .map(|(start, curve)| Ok((start, owned_curve(curve, &raised)?)))
                .collect()
        };
        let (lower, upper) = (own(lower)?, own(upper)?);
        spread(py, || {
            BandTable::build(&borrowed(&lower), &borrowed(&upper), region, &|logp| {
                exact.bounds(logp, &raised)
            })
        })
        .map(Self)
        .map_err(|error| raised.or(error))
    }

    #[staticmethod]
    fn from_bytes(data: &[u8]) -> PyResult<Self> {
        Ok(Self(BandTable::from_bytes(data)?))
    }

    #[staticmethod]
    fn load(path: PathBuf) -> PyResult<Self> {
        Ok(Self(BandTable::load(&path)?))
    }

    fn to_bytes<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &self.0.to_bytes()?))
    }

    fn save(&self, path: PathBuf) -> PyResult<()> {
        Ok(self.0.save(&path)?)
    }

    fn log_bounds(
        &self,
        py: Python<'_>,
        logp: &Bound<'_, PyAny>,
        mut log_lower: PyReadwriteArrayDyn<'_, f64>,
        mut log_upper: PyReadwriteArrayDyn<'_, f64>,
    ) -> PyResult<()> {
        let (log_lower, log_upper) = (log_lower.as_slice_mut()?, log_upper.as_slice_mut()?);
        let image = self.0.image();
        if let Ok(logp) = logp.extract::<PyReadonlyArrayDyn<'_, f32>>() {
            let logp = logp.as_slice()?;
            return Ok(py.detach(|| loss::table_log_bounds(image, logp, log_lower, log_upper))?);
        }
        let logp: PyReadonlyArrayDyn<'_, f64> = logp.extract()?;
        let logp = logp.as_slice()?;
        Ok(py.detach(|| loss::table_log_bounds(image, logp, log_lower, log_upper))?)
    }

    fn words<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<i32>> {
        let words: Vec<i32> = self.0.words().iter().map(|&word| word as i32).collect();
        words.into_pyarray(py)
    }

    /// The largest errors at the values number `start..stop` of `count`; see [`BandTable::errors_between`].
    fn errors_between(
        &self,
        py: Python<'_>,
        start: u64,
        stop: u64,
        count: u64,
        exact: ExactArgument,
    ) -> PyResult<(f64, f64)> {
        py.check_signals()?;
        let raised = Raised::default();
        spread(py, || {
            self.0.errors_between(start, stop, count, &|logp| exact.bounds(logp, &raised))
        })
        .map(|error| (error.log_upper, error.lower))
        .map_err(|error| raised.or(error))
    }

    /// The largest errors at some values in every cell; see [`BandTable::errors_in_cells`].
    fn errors_in_cells(&self, py: Python<'_>, exact: ExactArgument) -> PyResult<(f64, f64)> {
        py.check_signals()?;
        let raised = Raised::default();
        let samples = BandTable::SAMPLES_A_CELL;
        spread(py, || self.0.errors_in_cells(samples, &|logp| exact.bounds(logp, &raised)))
            .map(|error| (error.log_upper, error.lower))
            .map_err(|error| raised.or(error))
    }

    /// How many values an exhaustive verification looks at.
    #[staticmethod]
    fn checkable() -> u64 {
        BandTable::checkable()
    }

    /// A copy that says that `count` values were looked at and these largest errors were found.
    fn verified(&self, count: u64, log_upper: f64, lower: f64) -> Self {
        Self(self.0.clone().verified(count, MaxError { log_upper, lower }))
    }

    #[getter]
    fn nbytes(&self) -> usize {
        self.0.nbytes()
    }

    #[getter]
    fn metadata(&self) -> Vec<(&'static str, String)> {
        self.0.metadata()
    }

    #[getter]
    fn region(&self) -> &str {
        self.0.region()
    }

    #[getter]
    fn max_error(&self) -> (f64, f64) {
        (self.0.max_error().log_upper, self.0.max_error().lower)
    }

    #[getter]
    fn exhaustive(&self) -> bool {
        self.0.verification() == Verification::Exhaustive
    }
}

/// `(log_lower, log_upper)` of every element, exact.
#[pyfunction]
#[pyo3(signature = (divergence, delta_low, delta_high, logp, /))]
fn log_bounds<'py>(
    py: Python<'py>,
    divergence: &PyDivergence,
    delta_low: DeltaArgument<'py>,
    delta_high: DeltaArgument<'py>,
    logp: PyReadonlyArray1<'py, f64>,
) -> PyResult<(Bound<'py, PyArray1<f64>>, Bound<'py, PyArray1<f64>>)> {
    let (low, high, logp) = (delta_low.as_delta()?, delta_high.as_delta()?, logp.as_slice()?);
    let mut lower = vec![0.0; logp.len()];
    let mut upper = vec![0.0; logp.len()];
    spread(py, || band::log_bounds(&divergence.0, low, high, logp, &mut lower, &mut upper))?;
    Ok((lower.into_pyarray(py), upper.into_pyarray(py)))
}

/// Whether each log-ratio lies in the band.
#[pyfunction]
#[pyo3(signature = (divergence, delta_low, delta_high, logp, log_ratio, /))]
fn contains<'py>(
    py: Python<'py>,
    divergence: &PyDivergence,
    delta_low: DeltaArgument<'py>,
    delta_high: DeltaArgument<'py>,
    logp: PyReadonlyArray1<'py, f64>,
    log_ratio: PyReadonlyArray1<'py, f64>,
) -> PyResult<Bound<'py, PyArray1<bool>>> {
    let (low, high) = (delta_low.as_delta()?, delta_high.as_delta()?);
    let (logp, log_ratio) = (logp.as_slice()?, log_ratio.as_slice()?);
    let inside = spread(py, || band::contains(&divergence.0, low, high, logp, log_ratio))?;
    Ok(inside.into_pyarray(py))
}

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
fn policy_loss<'py>(
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
    let first = parameters.first().copied();
    let surrogate = match (surrogate, parameters.as_slice()) {
        ("min-clip", [] | [_]) => Surrogate::MinClip { dual_clip: first },
        ("mask", [] | [_]) => Surrogate::Mask { truncation: first },
        ("weight", []) => Surrogate::Weight,
        ("gradient-preserving", &[beta_low, beta_high]) => {
            Surrogate::GradientPreserving { beta_low, beta_high }
        }
        _ => {
            return Err(Error::Argument {
                argument: "surrogate",
                value: format!("{surrogate} with {} parameters", parameters.len()),
                allowed: "min-clip, mask, weight or gradient-preserving with its parameters",
            }
            .into());
        }
    };
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
        totals.gradient_free,
        totals.gradient_removed,
        totals.log_ratio_min,
        totals.log_ratio_max,
    ];
    Ok((totals.loss, counts.into_pyarray(py), sums.into_pyarray(py)))
}

/// Writes the tabulated `lower`, a ratio, and `log_upper` of every token. Arrays are contiguous.
#[pyfunction]
#[pyo3(signature = (words, old_log_prob, lower, log_upper, /))]
fn table_bounds<'py>(
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
fn count_valid(mask: PyReadonlyArrayDyn<'_, u8>) -> PyResult<usize> {
    Ok(loss::count_valid(mask.as_slice()?))
}

/// Multiplies a gradient by a factor, an array without dimensions.
#[pyfunction]
#[pyo3(signature = (gradient, factor, /))]
fn scale<'py>(
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

/// The bound of one side with how it was found: `(log_ratio, outside, status, evaluations)`.
#[pyfunction]
#[pyo3(signature = (divergence, delta, logp, upper, /))]
fn diagnose<'py>(
    py: Python<'py>,
    divergence: &PyDivergence,
    delta: DeltaArgument<'py>,
    logp: PyReadonlyArray1<'py, f64>,
    upper: bool,
) -> PyResult<(
    Bound<'py, PyArray1<f64>>,
    Bound<'py, PyArray1<f64>>,
    Bound<'py, PyArray1<u8>>,
    Bound<'py, PyArray1<u32>>,
)> {
    let side = if upper { Side::Upper } else { Side::Lower };
    let (delta, logp) = (delta.as_delta()?, logp.as_slice()?);
    let found = spread(py, || band::diagnose(&divergence.0, delta, logp, side))?;
    Ok((
        found.iter().map(|bound| bound.log_ratio).collect::<Vec<_>>().into_pyarray(py),
        found.iter().map(|bound| bound.outside).collect::<Vec<_>>().into_pyarray(py),
        found.iter().map(|bound| bound.status as u8).collect::<Vec<_>>().into_pyarray(py),
        found.iter().map(|bound| bound.evaluations).collect::<Vec<_>>().into_pyarray(py),
    ))
}

/// The divergence of {this token, everything else} at each log-ratio.
#[pyfunction]
#[pyo3(signature = (divergence, logp, log_ratio, /))]
fn divergences<'py>(
    py: Python<'py>,
    divergence: &PyDivergence,
    logp: PyReadonlyArray1<'py, f64>,
    log_ratio: PyReadonlyArray1<'py, f64>,
) -> PyResult<Bound<'py, PyArray1<f64>>> {
    let (logp, log_ratio) = (logp.as_slice()?, log_ratio.as_slice()?);
    let values = spread(py, || band::divergences(&divergence.0, logp, log_ratio))?;
    Ok(values.into_pyarray(py))
}

/// Runs work without the interpreter, on threads that this process has even if it was forked.
fn spread<O: Send>(py: Python<'_>, work: impl FnOnce() -> O + Send) -> O {
    py.detach(|| threads::with_living_threads(work))
}

/// How many threads batches are spread over.
#[pyfunction]
fn thread_count() -> usize {
    rayon::current_num_threads()
}

/// The compiled half of bandpo. Private: use `bandpo` itself.
#[pymodule(gil_used = false)]
mod _core {
    #[pymodule_export]
    use super::{
        PyBandTable, PyDivergence, contains, count_valid, diagnose, divergences, log_bounds,
        policy_loss, scale, table_bounds, thread_count,
    };

    #[pymodule_export]
    const KERNEL_SOURCE: &str = crate::KERNEL_SOURCE;

    #[pymodule_export]
    #[allow(non_upper_case_globals)] // Python's name for it
    const __version__: &str = env!("CARGO_PKG_VERSION");
}
