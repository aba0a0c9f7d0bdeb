//! The thread pool: built at first use, one per process, with work cut the same way however many threads there are.
//!
//! A kernel cuts its work by size alone and folds the parts in order, so the number of threads never shows in a result.
//! A forked child has none of its parent's threads; it builds a pool of its own at first use.

use std::cell::Cell;
use std::process;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::error::Error;

/// Bytes below which waking a thread costs more than it saves (measured: two threads break even near 200 KB of int8).
const SERIAL_BYTES: usize = 256 << 10;

/// More threads than any machine has cores for; starting some ten thousand takes minutes.
const MAX_THREADS: usize = 1024;

thread_local! {
    /// Whether this thread is one of several that share the CPUs among them.
    static ALONE: Cell<bool> = const { Cell::new(false) };
}

struct State {
    process: u32,
    /// What was set, else the default once it was asked for: finding it out takes longer than some work does.
    threads: Option<usize>,
    pool: Option<Arc<ThreadPool>>,
}

static STATE: Mutex<State> = Mutex::new(State { process: 0, threads: None, pool: None });

/// Threads that large work is spread over: what was set, else `RAYON_NUM_THREADS`, else the CPUs of this process.
pub fn num_threads() -> usize {
    *own_state().threads.get_or_insert_with(default_threads)
}

fn default_threads() -> usize {
    let asked = std::env::var("RAYON_NUM_THREADS").ok().and_then(|text| text.parse().ok()).filter(|&n| n > 0);
    asked.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from)).min(MAX_THREADS)
}

/// Sets the number of threads of this process.
pub fn set_num_threads(threads: isize) -> Result<(), Error> {
    let found = usize::try_from(threads).ok().filter(|threads| (1..=MAX_THREADS).contains(threads));
    let mut state = own_state();
    state.threads = Some(found.ok_or(Error::Threads { found: threads, limit: MAX_THREADS })?);
    state.pool = None;
    Ok(())
}

/// The state, without the pool of a parent process: its workers do not exist here, joining them would wait for ever.
fn own_state() -> MutexGuard<'static, State> {
    let mut state = STATE.lock().unwrap_or_else(PoisonError::into_inner);
    if state.process != process::id() {
        std::mem::forget(state.pool.take());
        state.process = process::id();
    }
    state
}

fn pool() -> Result<Arc<ThreadPool>, Error> {
    let mut state = own_state();
    if let Some(pool) = &state.pool {
        return Ok(Arc::clone(pool));
    }
    let threads = *state.threads.get_or_insert_with(default_threads);
    let builder = ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("biascorr-{i}"));
    let pool = builder.build().map_err(|error| Error::ThreadPool { threads, reason: error.to_string() })?;
    let pool = Arc::new(pool);
    state.pool = Some(Arc::clone(&pool));
    Ok(pool)
}

/// From now on this thread does its work itself: it is one of several that share the CPUs among them.
pub fn work_alone() {
    ALONE.set(true);
}

/// `f` of each item, in order; over the pool when `bytes` of work are worth it.
pub fn map<I: Send, R: Send>(items: Vec<I>, bytes: usize, f: impl Fn(I) -> R + Send + Sync) -> Result<Vec<R>, Error> {
    if bytes < SERIAL_BYTES || items.len() < 2 || ALONE.get() || num_threads() == 1 {
        return Ok(items.into_iter().map(f).collect());
    }
    Ok(pool()?.install(|| items.into_par_iter().map(f).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_keep_the_order_of_the_items() {
        let doubled = map((0..1000).collect(), SERIAL_BYTES, |i: usize| 2 * i).unwrap();
        assert_eq!(doubled, (0..1000).map(|i| 2 * i).collect::<Vec<_>>());
    }

    #[test]
    fn no_threads_is_an_error() {
        assert_eq!(set_num_threads(0), Err(Error::Threads { found: 0, limit: MAX_THREADS }));
    }
}
