//! Where the parts of a batch are worked on: the threads that the process runs its batches on anyway.
//!
//! A process that has `PyTorch` in it has a team of OpenMP threads, which after each piece of work spin for
//! milliseconds in wait of the next. Threads of our own would have to share their processors with them; so
//! the parts are given to that team, where there is one, and it is as large as the user told `PyTorch`.
//! Elsewhere they are rayon's.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rayon::prelude::*;

/// Works on every part, on as many threads as there are, and returns the results in the order of the parts.
pub(crate) fn map_parts<I: Send, O: Send>(
    parts: Vec<I>,
    work: impl Fn(I) -> O + Send + Sync,
) -> Vec<O> {
    // A team of one is the thread that calls it, which a fork takes along.
    let Some(team) = team::find().filter(|team| team.size() == 1 || !is_forked()) else {
        return with_living_threads(|| parts.into_par_iter().map(work).collect());
    };
    let next = AtomicUsize::new(0);
    let slots: Vec<Mutex<(Option<I>, Option<O>)>> =
        parts.into_iter().map(|part| Mutex::new((Some(part), None))).collect();
    // Every thread takes the next part until none is left. Nobody else locks a slot at that time.
    let take_turns = || {
        while let Some(slot) = slots.get(next.fetch_add(1, Ordering::Relaxed)) {
            let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(part) = slot.0.take() {
                slot.1 = Some(work(part));
            }
        }
    };
    team.run(&|| {
        // A panic must not cross the team's C code. Its part has no result then.
        let _ = catch_unwind(AssertUnwindSafe(take_turns));
    });
    let results = slots.into_iter().map(|slot| {
        let slot = slot.into_inner().unwrap_or_else(PoisonError::into_inner);
        slot.1.expect("a part panicked")
    });
    results.collect()
}

/// Whether the threads belong to another process: to the one that was the first to need any.
fn is_forked() -> bool {
    static HOME: OnceLock<u32> = OnceLock::new();
    let process = std::process::id();
    *HOME.get_or_init(|| process) != process
}

/// Runs work that may be spread over rayon's threads.
///
/// A process that was forked has none of the threads of its parent and would wait for them for ever; it is
/// given threads of its own.
pub(crate) fn with_living_threads<O: Send>(work: impl FnOnce() -> O + Send) -> O {
    static OWN: Mutex<Option<(u32, Arc<rayon::ThreadPool>)>> = Mutex::new(None);
    if !is_forked() {
        return work();
    }
    let pool = {
        let mut own = OWN.lock().unwrap_or_else(PoisonError::into_inner);
        match &*own {
            Some((process, pool)) if *process == std::process::id() => Arc::clone(pool),
            _ => {
                // Nobody may wait for the end of threads that a parent had.
                std::mem::forget(own.take());
                let Ok(pool) = rayon::ThreadPoolBuilder::new().build().map(Arc::new) else {
                    return work(); // as rayon does, whose own pool fails as well
                };
                *own = Some((std::process::id(), Arc::clone(&pool)));
                pool
            }
        }
    };
    pool.install(work)
}

#[cfg(target_os = "linux")]
mod team {
    use std::ffi::{CStr, c_int, c_uint, c_void};

    type Parallel =
        unsafe extern "C" fn(unsafe extern "C" fn(*mut c_void), *mut c_void, c_uint, c_uint);
    type MaxThreads = unsafe extern "C" fn() -> c_int;

    /// The OpenMP threads of the process.
    pub struct Team {
        parallel: Parallel,
        threads: c_uint,
    }

    /// The team, if its library (GNU's, or LLVM's with GNU's names) is in the process. Asked each time: it
    /// may come later, and its size may change.
    pub fn find() -> Option<Team> {
        let symbol = |name: &CStr| {
            // SAFETY: looks a name up among the libraries that are there.
            let at = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
            (!at.is_null()).then_some(at)
        };
        let (parallel, threads) = (symbol(c"GOMP_parallel")?, symbol(c"omp_get_max_threads")?);
        // SAFETY: these are the types of these functions in every OpenMP library that has them.
        let (parallel, threads) = unsafe {
            (
                std::mem::transmute::<*mut c_void, Parallel>(parallel),
                std::mem::transmute::<*mut c_void, MaxThreads>(threads)(),
            )
        };
        Some(Team { parallel, threads: c_uint::try_from(threads).unwrap_or(1).max(1) })
    }

    impl Team {
        pub fn size(&self) -> c_uint {
            self.threads
        }

        /// Calls `body`, which does not panic, once on every thread, and waits for all of them.
        pub fn run(&self, body: &(dyn Fn() + Sync)) {
            unsafe extern "C" fn call(body: *mut c_void) {
                // SAFETY: `run` passes a reference to its body, which lives until all calls have returned.
                unsafe { (*body.cast::<&(dyn Fn() + Sync)>())() }
            }
            let mut body = body;
            let data = std::ptr::from_mut(&mut body).cast::<c_void>();
            // SAFETY: the library calls `call` with `data` on its threads and returns after the last.
            unsafe { (self.parallel)(call, data, self.threads, 0) }
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod team {
    /// There is none whose entry is known.
    pub enum Team {}

    pub fn find() -> Option<Team> {
        None
    }

    impl Team {
        pub fn size(&self) -> u32 {
            match *self {}
        }

        pub fn run(&self, _: &(dyn Fn() + Sync)) {
            match *self {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_keep_the_order_of_the_parts() {
        let squares = map_parts((0..1000_u64).collect(), |part| part * part);
        assert_eq!(squares, (0..1000).map(|part| part * part).collect::<Vec<u64>>());
        assert!(map_parts(Vec::<u8>::new(), |part| part).is_empty());
    }
}
