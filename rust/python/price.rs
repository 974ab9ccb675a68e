//! Equal-price regions on one-dimensional numpy arrays.

use numpy::{IntoPyArray, PyArray1, PyReadonlyArray1};
use pyo3::prelude::*;

use super::band::PyDivergence;
use super::threads::spread;
use crate::band::price::PriceBand;

/// The region of a price on each side.
#[pyclass(name = "PriceBand", module = "bandpo._core", frozen, from_py_object)]
#[derive(Clone)]
pub(super) struct PyPriceBand(pub(super) PriceBand);

#[pymethods]
impl PyPriceBand {
    #[new]
    fn new(divergence: PyDivergence, price_low: f64, price_high: f64) -> PyResult<Self> {
        Ok(Self(PriceBand::new(divergence.0, price_low, price_high)?))
    }

    /// Exact `(log_lower, log_upper)` of each element.
    fn log_bounds<'py>(
        &self,
        py: Python<'py>,
        logp: PyReadonlyArray1<'py, f64>,
    ) -> PyResult<(Bound<'py, PyArray1<f64>>, Bound<'py, PyArray1<f64>>)> {
        let logp = logp.as_slice()?;
        let (lower, upper) = spread(py, || self.0.log_bounds_of_many(logp));
        Ok((lower.into_pyarray(py), upper.into_pyarray(py)))
    }

    /// True for each log-ratio in the region.
    fn contains<'py>(
        &self,
        py: Python<'py>,
        logp: PyReadonlyArray1<'py, f64>,
        log_ratio: PyReadonlyArray1<'py, f64>,
    ) -> PyResult<Bound<'py, PyArray1<bool>>> {
        let (logp, log_ratio) = (logp.as_slice()?, log_ratio.as_slice()?);
        Ok(spread(py, || self.0.contains_many(logp, log_ratio))?.into_pyarray(py))
    }
}
