//! Threads, for Python.

use pyo3::prelude::*;

use crate::threads;

/// Runs work without the interpreter, on threads that this process has even if it was forked.
pub(super) fn spread<O: Send>(py: Python<'_>, work: impl FnOnce() -> O + Send) -> O {
    py.detach(|| threads::with_living_threads(work))
}

/// How many threads batches are spread over.
#[pyfunction]
pub(super) fn thread_count() -> usize {
    rayon::current_num_threads()
}
