//! Threads that the parts of a batch are distributed to.
//!
//! A process with `PyTorch` has a team of OpenMP threads, which spin for milliseconds after each task. Other threads
//! would share the processors with them. Therefore the parts go to that team, whose size is set in `PyTorch`. Without
//! a team they go to rayon's threads.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rayon::prelude::*;

/// Does the work on every part, on all threads. Returns the results in the order of the parts.
///
/// Work is called by a pointer, because a copy of rayon for each would be a fifth of the library.
pub(crate) fn map_parts<I: Send, O: Send>(parts: Vec<I>, work: &(dyn Fn(I) -> O + Sync)) -> Vec<O> {
    // A team of one is its calling thread, which a forked process has too.
    let Some(team) = team::find().filter(|team| team.size() == 1 || !is_forked()) else {
        return with_living_threads(|| parts.into_par_iter().map(work).collect());
    };
    let next = AtomicUsize::new(0);
    let slots: Vec<Mutex<(Option<I>, Option<O>)>> =
        parts.into_iter().map(|part| Mutex::new((Some(part), None))).collect();
    // Every thread takes the next part until none is left. No two threads lock the same slot.
    let take_turns = || {
        while let Some(slot) = slots.get(next.fetch_add(1, Ordering::Relaxed)) {
            let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(part) = slot.0.take() {
                slot.1 = Some(work(part));
            }
        }
    };
    team.run(&|| {
        // A panic must not unwind through the team's C code. Its part then lacks a result.
        let _ = catch_unwind(AssertUnwindSafe(take_turns));
    });
    let results = slots.into_iter().map(|slot| {
        let slot = slot.into_inner().unwrap_or_else(PoisonError::into_inner);
        slot.1.expect("a part panicked")
    });
    results.collect()
}

/// True in a process that was forked after threads were first used. The threads exist in its parent only.
fn is_forked() -> bool {
    static HOME: OnceLock<u32> = OnceLock::new();
    let process = std::process::id();
    *HOME.get_or_init(|| process) != process
}

/// Runs work that may use rayon's threads.
///
/// A forked process gets new threads, because it has none of its parent's and would wait for them forever.
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
                // Forgotten, because dropping the parent's pool would wait for its threads.
                std::mem::forget(own.take());
                let Ok(pool) = rayon::ThreadPoolBuilder::new().build().map(Arc::new) else {
                    return work(); // no thread can be started; rayon's global pool is the last resort
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

    /// The team of OpenMP threads of the process.
    pub struct Team {
        parallel: Parallel,
        threads: c_uint,
    }

    /// The team, if its library (GNU's, or LLVM's with GNU's names) is in the process. Not cached, because the library
    /// may be loaded later, and the size may change.
    pub fn find() -> Option<Team> {
        let symbol = |name: &CStr| {
            // SAFETY: `dlsym` searches the loaded libraries for a name that ends in 0.
            let at = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
            (!at.is_null()).then_some(at)
        };
        let (parallel, threads) = (symbol(c"GOMP_parallel")?, symbol(c"omp_get_max_threads")?);
        // SAFETY: every OpenMP library with these functions gives them these types.
        let (parallel, threads) = unsafe {
            (
                std::mem::transmute::<*mut c_void, Parallel>(parallel),
                std::mem::transmute::<*mut c_void, MaxThreads>(threads)(),
            )
        };
        Some(Team { parallel, threads: c_uint::try_from(threads).unwrap_or(1).max(1) })
    }

    impl Team {
        /// The number of threads.
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
    /// Never present: the entry point is known on Linux only.
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
        let squares = map_parts((0..1000_u64).collect(), &|part| part * part);
        assert_eq!(squares, (0..1000).map(|part| part * part).collect::<Vec<u64>>());
        assert!(map_parts(Vec::<u8>::new(), &|part| part).is_empty());
    }
}
