//! Specs of regions as JSON.

use pyo3::prelude::*;

use crate::spec;

/// The syntax tree of a region spec, as JSON; see [`spec::parse`].
#[pyfunction]
#[pyo3(signature = (text, /))]
pub(super) fn parse_spec(text: &str) -> PyResult<String> {
    Ok(spec::parse(text)?)
}
