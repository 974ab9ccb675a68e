//! Threads of a batch call.

use std::ops::Range;
use std::time::{Duration, Instant};

use pyo3::prelude::*;

use crate::threads;

/// Releases the GIL and runs work on threads that live, also in a forked process.
pub(super) fn spread<O: Send>(py: Python<'_>, work: impl FnOnce() -> O + Send) -> O {
    py.detach(|| threads::with_living_threads(work))
}

/// Runs work on consecutive parts of `0..count`, and stops between two if Python got a signal, such as that of
/// Ctrl-C.
///
/// # Errors
/// The exception of the signal's handler, or of the work.
pub(super) fn in_parts(
    py: Python<'_>,
    count: usize,
    mut work: impl FnMut(Range<usize>) -> PyResult<()>,
) -> PyResult<()> {
    let (mut start, mut size) = (0, FIRST_PART);
    while start < count {
        let end = count.min(start + size);
        let begin = Instant::now();
        work(start..end)?;
        py.check_signals()?;
        // Tokens take from 2 ns to 100 us, so the size follows what the last part took.
        if begin.elapsed() < SHORT_PART {
            size = size.saturating_mul(4);
        } else if begin.elapsed() > LONG_PART {
            size = FIRST_PART.max(size / 4);
        }
        start = end;
    }
    Ok(())
}

/// Tokens of the first part, and min of a part.
const FIRST_PART: usize = 1 << 11;

/// Time below which the next part is larger.
const SHORT_PART: Duration = Duration::from_millis(25);

/// Time above which it is smaller.
const LONG_PART: Duration = Duration::from_millis(200);

/// The number of threads that share a batch.
#[pyfunction]
pub(super) fn thread_count() -> usize {
    rayon::current_num_threads()
}
