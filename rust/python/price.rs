//! Equal-price regions on one-dimensional numpy arrays.

use numpy::{IntoPyArray, PyArray1, PyReadonlyArray1};
use pyo3::prelude::*;

use super::band::PyDivergence;
use super::threads::{in_parts, spread};
use crate::band::price::PriceBand;
use crate::error::Error;

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
        let mut lower = Vec::with_capacity(logp.len());
        let mut upper = Vec::with_capacity(logp.len());
        in_parts(py, logp.len(), |part| {
            let (low, high) = spread(py, || self.0.log_bounds_of_many(&logp[part]));
            lower.extend(low);
            upper.extend(high);
            Ok(())
        })?;
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
        Error::check_length("log_ratio", log_ratio.len(), logp.len())?;
        let mut inside = Vec::with_capacity(logp.len());
        in_parts(py, logp.len(), |part| {
            let (logp, log_ratio) = (&logp[part.clone()], &log_ratio[part]);
            inside.extend(spread(py, || self.0.contains_many(logp, log_ratio))?);
            Ok(())
        })?;
        Ok(inside.into_pyarray(py))
    }
}
