//! The Python extension `bandpo._core`. It converts arguments, releases the GIL, calls the crate and maps errors.

// pyo3 passes arguments by value, and results are tuples of arrays.
#![allow(clippy::needless_pass_by_value, clippy::type_complexity)]

mod band;
mod loss;
mod price;
mod simd;
mod spec;
mod table;
mod threads;

use pyo3::prelude::*;

use crate::error::Error;

impl From<Error> for PyErr {
    /// Makes each kind of error an instance of its class in `bandpo.error`.
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

/// Compiled half of bandpo. It is private: use `bandpo`.
#[pymodule(gil_used = false)]
mod _core {
    use super::{Bound, PyModule, PyResult};

    #[pymodule_export]
    use super::band::{PyDivergence, contains, diagnose, divergences, log_bounds};
    #[pymodule_export]
    use super::loss::{count_valid, policy_loss, scale, table_bounds};
    #[pymodule_export]
    use super::price::PyPriceBand;
    #[pymodule_export]
    use super::simd::simd_level;
    #[pymodule_export]
    use super::spec::parse_spec;
    #[pymodule_export]
    use super::table::PyBandTable;
    #[pymodule_export]
    use super::threads::thread_count;

    #[pymodule_export]
    const DIVERGENCES: &[&str] = crate::divergence::ALL;

    #[pymodule_export]
    const KERNEL_SOURCE: &str = crate::KERNEL_SOURCE;

    #[pymodule_export]
    #[allow(non_upper_case_globals)] // Python's convention
    const __version__: &str = env!("CARGO_PKG_VERSION");

    /// Refuses a `BANDPO_SIMD` that names no instructions.
    #[pymodule_init]
    fn init(_module: &Bound<'_, PyModule>) -> PyResult<()> {
        Ok(crate::simd::check()?)
    }
}
