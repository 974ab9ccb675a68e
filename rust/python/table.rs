//! Tables, and the regions and functions that they are built from.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use numpy::{IntoPyArray, PyArray1, PyReadonlyArray1, PyReadonlyArrayDyn, PyReadwriteArrayDyn};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::band::PyDivergence;
use super::price::PyPriceBand;
use super::threads::{in_parts, spread};
use crate::band::price::PriceBand;
use crate::band::{Band, Side};
use crate::error::Error;
use crate::loss::{self, Float};
use crate::table::{BandTable, Curve, Image, MaxError, Stretches, Verification};

/// A curve of a table, as Python passes it.
#[derive(FromPyObject)]
enum CurveArgument {
    Constant(f64),
    Band(PyDivergence, f64),
    Price(PyPriceBand),
    /// `sampler(is_upper, logp) -> (log_bounds, slopes)`
    Sampled(Py<PyAny>),
}

/// A curve that owns its data; [`Curve`] borrows it.
enum OwnedCurve {
    Constant(f64),
    Band(Band),
    Price(PriceBand),
    Sampled(Box<dyn Fn(Side, &[f64]) -> crate::error::Result<Vec<(f64, f64)>> + Sync>),
}

/// First exception of a Python function that Rust called. It is raised once Rust returns.
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

    /// The kept exception, or else an error of Rust.
    fn or(&self, error: Error) -> PyErr {
        let kept = self.0.lock().ok().and_then(|mut kept| kept.take());
        kept.unwrap_or_else(|| error.into())
    }
}

/// Exact bounds to measure a table against: a band's, or `exact(logp) -> (log_lower, log_upper)`.
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
        CurveArgument::Price(price) => OwnedCurve::Price(price.0),
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
                OwnedCurve::Price(price) => Curve::Band(price),
                OwnedCurve::Sampled(sampler) => Curve::Sampled(sampler.as_ref()),
            };
            (*start, curve)
        })
        .collect()
}

/// Tabulated bounds of a region.
#[pyclass(name = "BandTable", module = "bandpo._core", frozen)]
pub(super) struct PyBandTable(BandTable);

#[pymethods]
impl PyBandTable {
    /// Tabulates curves, each with the `y` it begins at.
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
            return log_bounds_of(py, image, logp.as_slice()?, log_lower, log_upper);
        }
        let logp: PyReadonlyArrayDyn<'_, f64> = logp.extract()?;
        log_bounds_of(py, image, logp.as_slice()?, log_lower, log_upper)
    }

    fn words<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<i32>> {
        let words: Vec<i32> = self.0.words().iter().map(|&word| word as i32).collect();
        words.into_pyarray(py)
    }

    /// Max errors at the values numbered `start..stop` of `count`; see [`BandTable::errors_between`].
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

    /// Max errors at some values in each cell; see [`BandTable::errors_in_cells`].
    fn errors_in_cells(&self, py: Python<'_>, exact: ExactArgument) -> PyResult<(f64, f64)> {
        py.check_signals()?;
        let raised = Raised::default();
        let samples = BandTable::SAMPLES_A_CELL;
        spread(py, || self.0.errors_in_cells(samples, &|logp| exact.bounds(logp, &raised)))
            .map(|error| (error.log_upper, error.lower))
            .map_err(|error| raised.or(error))
    }

    /// The number of values of an exhaustive verification.
    #[staticmethod]
    fn checkable() -> u64 {
        BandTable::checkable()
    }

    /// A copy with the max errors that a verification of `count` values found.
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

fn log_bounds_of<T: Float>(
    py: Python<'_>,
    image: Image<'_>,
    logp: &[T],
    log_lower: &mut [f64],
    log_upper: &mut [f64],
) -> PyResult<()> {
    Error::check_length("log_lower", log_lower.len(), logp.len())?;
    Error::check_length("log_upper", log_upper.len(), logp.len())?;
    in_parts(py, logp.len(), |part| {
        let (lower, upper) = (&mut log_lower[part.clone()], &mut log_upper[part.clone()]);
        Ok(py.detach(|| loss::table_log_bounds(image, &logp[part], lower, upper))?)
    })
}
