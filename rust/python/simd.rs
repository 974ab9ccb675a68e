//! The vector instructions in use.

use pyo3::prelude::*;

use crate::simd;

/// Name of the widest vector instructions that run: `portable`, `avx2` or `avx512`.
#[pyfunction]
pub(super) fn simd_level() -> &'static str {
    simd::level()
}
