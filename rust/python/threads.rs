//! Threads of a batch call.

use pyo3::prelude::*;

use crate::threads;

/// Releases the GIL and runs work on threads that live, also in a forked process.
pub(super) fn spread<O: Send>(py: Python<'_>, work: impl FnOnce() -> O + Send) -> O {
    py.detach(|| threads::with_living_threads(work))
}

/// The number of threads that share a batch.
#[pyfunction]
pub(super) fn thread_count() -> usize {
    rayon::current_num_threads()
}
