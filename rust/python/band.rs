//! Divergences and their exact bounds, on one-dimensional numpy arrays.

use numpy::{IntoPyArray, PyArray1, PyReadonlyArray1};
use pyo3::prelude::*;

use super::threads::{in_parts, spread};
use crate::band::{self, Delta, Side};
use crate::divergence::Divergence;
use crate::error::Error;

/// A delta for all elements, or one for each.
#[derive(FromPyObject)]
pub(super) enum DeltaArgument<'py> {
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
pub(super) struct PyDivergence(pub(super) Divergence);

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

    /// The radii of the generator for deltas of this divergence.
    fn generator_radii<'py>(
        &self,
        py: Python<'py>,
        delta: PyReadonlyArray1<'py, f64>,
    ) -> PyResult<Bound<'py, PyArray1<f64>>> {
        let radii = delta.as_slice()?.iter().map(|&delta| self.0.generator_radius::<f64>(delta));
        Ok(radii.collect::<Vec<_>>().into_pyarray(py))
    }
}

/// Exact `(log_lower, log_upper)` of each element.
#[pyfunction]
#[pyo3(signature = (divergence, delta_low, delta_high, logp, /))]
pub(super) fn log_bounds<'py>(
    py: Python<'py>,
    divergence: &PyDivergence,
    delta_low: DeltaArgument<'py>,
    delta_high: DeltaArgument<'py>,
    logp: PyReadonlyArray1<'py, f64>,
) -> PyResult<(Bound<'py, PyArray1<f64>>, Bound<'py, PyArray1<f64>>)> {
    let (low, high, logp) = (delta_low.as_delta()?, delta_high.as_delta()?, logp.as_slice()?);
    low.check("delta_low", logp.len())?;
    high.check("delta_high", logp.len())?;
    let mut lower = vec![0.0; logp.len()];
    let mut upper = vec![0.0; logp.len()];
    in_parts(py, logp.len(), |part| {
        let (lower, upper) = (&mut lower[part.clone()], &mut upper[part.clone()]);
        let (low, high) = (low.part(part.start, part.len()), high.part(part.start, part.len()));
        Ok(spread(py, || band::log_bounds(&divergence.0, low, high, &logp[part], lower, upper))?)
    })?;
    Ok((lower.into_pyarray(py), upper.into_pyarray(py)))
}

/// True for each log-ratio in the band.
#[pyfunction]
#[pyo3(signature = (divergence, delta_low, delta_high, logp, log_ratio, /))]
pub(super) fn contains<'py>(
    py: Python<'py>,
    divergence: &PyDivergence,
    delta_low: DeltaArgument<'py>,
    delta_high: DeltaArgument<'py>,
    logp: PyReadonlyArray1<'py, f64>,
    log_ratio: PyReadonlyArray1<'py, f64>,
) -> PyResult<Bound<'py, PyArray1<bool>>> {
    let (low, high) = (delta_low.as_delta()?, delta_high.as_delta()?);
    let (logp, log_ratio) = (logp.as_slice()?, log_ratio.as_slice()?);
    low.check("delta_low", logp.len())?;
    high.check("delta_high", logp.len())?;
    Error::check_length("log_ratio", log_ratio.len(), logp.len())?;
    let mut inside = Vec::with_capacity(logp.len());
    in_parts(py, logp.len(), |part| {
        let (low, high) = (low.part(part.start, part.len()), high.part(part.start, part.len()));
        let (logp, log_ratio) = (&logp[part.clone()], &log_ratio[part]);
        inside.extend(spread(py, || band::contains(&divergence.0, low, high, logp, log_ratio))?);
        Ok(())
    })?;
    Ok(inside.into_pyarray(py))
}

/// One side's bounds with the solver's bracket, status and cost: `(log_ratio, outside, status, evaluations)`.
#[pyfunction]
#[pyo3(signature = (divergence, delta, logp, upper, /))]
pub(super) fn diagnose<'py>(
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
    delta.check("delta", logp.len())?;
    let mut found = Vec::with_capacity(logp.len());
    in_parts(py, logp.len(), |part| {
        let (delta, logp) = (delta.part(part.start, part.len()), &logp[part]);
        found.extend(spread(py, || band::diagnose(&divergence.0, delta, logp, side))?);
        Ok(())
    })?;
    Ok((
        found.iter().map(|bound| bound.log_ratio).collect::<Vec<_>>().into_pyarray(py),
        found.iter().map(|bound| bound.outside).collect::<Vec<_>>().into_pyarray(py),
        found.iter().map(|bound| bound.status as u8).collect::<Vec<_>>().into_pyarray(py),
        found.iter().map(|bound| bound.evaluations).collect::<Vec<_>>().into_pyarray(py),
    ))
}

/// The divergence of {this token, all others} at each log-ratio.
#[pyfunction]
#[pyo3(signature = (divergence, logp, log_ratio, /))]
pub(super) fn divergences<'py>(
    py: Python<'py>,
    divergence: &PyDivergence,
    logp: PyReadonlyArray1<'py, f64>,
    log_ratio: PyReadonlyArray1<'py, f64>,
) -> PyResult<Bound<'py, PyArray1<f64>>> {
    let (logp, log_ratio) = (logp.as_slice()?, log_ratio.as_slice()?);
    Error::check_length("log_ratio", log_ratio.len(), logp.len())?;
    let mut values = Vec::with_capacity(logp.len());
    in_parts(py, logp.len(), |part| {
        let (logp, log_ratio) = (&logp[part.clone()], &log_ratio[part]);
        values.extend(spread(py, || band::divergences(&divergence.0, logp, log_ratio))?);
        Ok(())
    })?;
    Ok(values.into_pyarray(py))
}
