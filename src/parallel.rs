//! The thread pool: built at first use, one per process, with work cut the same way however many threads there are.
//!
//! A kernel cuts its work by size alone and folds the parts in order, so the number of threads never shows in a result.
//!
//! A forked child has none of its parent's threads, and any lock that one of these held stays locked for ever. So it touches no
//! lock of its parent's: what a process knows hangs on its id, a child makes its own, and all it reads of its parent's is an atomic
//! number. What the threads of any pool share (the collector of crossbeam) is made by [`prepare`], at a moment of the caller's
//! choice: the Python module calls it while no other thread can fork.
//!
//! Long work can be stopped: the thread that asked for it looks between its parts, or while others work, whether it is to go on.

use std::cell::Cell;
use std::process;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::error::Error;
use crate::memory;

/// Bytes below which waking a thread costs more than it saves (measured: two threads break even near 200 KB of int8).
const SERIAL_BYTES: usize = 256 << 10;

/// Bytes for each thread: its stack, the queues of its work, what its allocator keeps. A thread that finds no room for what the
/// standard library makes in it would end the process.
const OF_THREAD: usize = 3 << 20;

/// More threads than any machine has cores for; starting some ten thousand takes minutes.
const MAX_THREADS: usize = 1024;

/// Between two looks at whether work is to be stopped: seldom enough to cost nothing, often enough for who waits at a keyboard.
const PAUSE: Duration = Duration::from_millis(50);

thread_local! {
    /// Whether this thread is one of several that share the CPUs among them.
    static ALONE: Cell<bool> = const { Cell::new(false) };

    /// Tells whether the work that this thread asked for is to be stopped; None where nobody would.
    static STOPS: Cell<Option<fn() -> bool>> = const { Cell::new(None) };
}

/// What a process knows. Never freed: one for each fork along a line of processes that compute.
struct Process {
    id: u32,
    /// What was set, else the default once it was asked for: finding it out takes longer than some work does. 0: neither.
    threads: AtomicUsize,
    pool: Mutex<Option<Arc<ThreadPool>>>,
}

/// That of this process, or of the one that it was forked from.
static PROCESS: AtomicPtr<Process> = AtomicPtr::new(ptr::null_mut());

impl Process {
    /// Waits for nothing: threads that come at the same time each make one, and all but one are dropped again.
    fn current() -> &'static Process {
        loop {
            let known = PROCESS.load(Ordering::Acquire);
            #[expect(unsafe_code, reason = "a lock-free cell that is filled anew after a fork, which no safe one is")]
            // SAFETY: what was stored is a leaked box, or null, and is never freed or borrowed mutably.
            let found = unsafe { known.as_ref() };
            if let Some(process) = found.filter(|process| process.id == process::id()) {
                return process;
            }
            let threads = found.map_or(0, |parent| parent.threads.load(Ordering::Relaxed));
            let own = Process { id: process::id(), threads: AtomicUsize::new(threads), pool: Mutex::new(None) };
            let own = Box::into_raw(Box::new(own));
            if PROCESS.compare_exchange(known, own, Ordering::AcqRel, Ordering::Acquire).is_err() {
                #[expect(unsafe_code, reason = "as above")]
                // SAFETY: it comes from `into_raw` just now, and nobody else has seen it.
                drop(unsafe { Box::from_raw(own) });
            }
        }
    }

    fn num_threads(&self) -> usize {
        match self.threads.load(Ordering::Relaxed) {
            0 => {
                let threads = default_threads();
                let known = self.threads.compare_exchange(0, threads, Ordering::Relaxed, Ordering::Relaxed);
                known.map_or_else(|set| set, |_| threads)
            }
            known => known,
        }
    }

    fn pool(&self) -> Result<Arc<ThreadPool>, Error> {
        let mut pool = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pool) = &*pool {
            return Ok(Arc::clone(pool));
        }
        let threads = self.num_threads();
        memory::check(threads, OF_THREAD)?;
        let builder = ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("biascorr-{i}"));
        let built = builder.build().map_err(|error| Error::ThreadPool { threads, reason: error.to_string() })?;
        built.broadcast(|_| ()); // each thread has looked for work once: what they share is made
        Ok(Arc::clone(pool.insert(Arc::new(built))))
    }
}

/// Threads that large work is spread over: what was set, else `RAYON_NUM_THREADS`, else the CPUs of this process.
pub fn num_threads() -> usize {
    Process::current().num_threads()
}

fn default_threads() -> usize {
    let asked = std::env::var("RAYON_NUM_THREADS").ok().and_then(|text| text.parse().ok()).filter(|&n| n > 0);
    asked.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from)).min(MAX_THREADS)
}

/// Sets the number of threads of this process.
pub fn set_num_threads(threads: isize) -> Result<(), Error> {
    let found = usize::try_from(threads).ok().filter(|threads| (1..=MAX_THREADS).contains(threads));
    let threads = found.ok_or(Error::Threads { found: threads, limit: MAX_THREADS })?;
    let process = Process::current();
    let mut pool = process.pool.lock().unwrap_or_else(PoisonError::into_inner);
    process.threads.store(threads, Ordering::Relaxed);
    *pool = None;
    Ok(())
}

/// From now on this thread does its work itself: it is one of several that share the CPUs among them.
pub fn work_alone() {
    ALONE.set(true);
}

fn is_worth_threads(bytes: usize) -> bool {
    bytes >= SERIAL_BYTES && !ALONE.get() && num_threads() > 1
}

/// Builds the pool that [`map`] needs for so much work, if it does.
pub fn prepare(bytes: usize) -> Result<(), Error> {
    if is_worth_threads(bytes) { Process::current().pool().map(drop) } else { Ok(()) }
}

/// Work that ends early, with [`Error::Stopped`], once `stops` says so; this thread calls it now and then.
pub fn stoppable<R>(stops: fn() -> bool, work: impl FnOnce() -> Result<R, Error>) -> Result<R, Error> {
    let outer = STOPS.replace(Some(stops));
    let done = work();
    STOPS.set(outer);
    done
}

/// `f` of each item, in order; over the pool when `bytes` of work are worth it.
pub fn map<I: Send, R: Send>(items: Vec<I>, bytes: usize, f: impl Fn(I) -> R + Send + Sync) -> Result<Vec<R>, Error> {
    let is_alone = items.len() < 2 || !is_worth_threads(bytes);
    match STOPS.get() {
        None if is_alone => Ok(items.into_iter().map(f).collect()),
        None => Ok(Process::current().pool()?.install(|| items.into_par_iter().map(f).collect())),
        Some(stops) if is_alone => map_until(stops, items, f),
        Some(stops) => Process::current().pool()?.in_place_scope(|scope| {
            let (stopped, (sender, receiver)) = (Arc::new(AtomicBool::new(false)), mpsc::channel());
            let seen = Arc::clone(&stopped);
            scope.spawn(move |_| {
                let unless_stopped = |item| (!seen.load(Ordering::Relaxed)).then(|| f(item));
                let _ = sender.send(items.into_par_iter().map(unless_stopped).collect::<Option<Vec<_>>>());
            });
            loop {
                match receiver.recv_timeout(PAUSE) {
                    Err(mpsc::RecvTimeoutError::Timeout) if stops() => {
                        stopped.store(true, Ordering::Relaxed);
                        return Err(Error::Stopped);
                    }
                    Err(mpsc::RecvTimeoutError::Timeout) => {}
                    done => return done.ok().flatten().ok_or(Error::Stopped),
                }
            }
        }),
    }
}

fn map_until<I, R>(stops: fn() -> bool, items: Vec<I>, f: impl Fn(I) -> R) -> Result<Vec<R>, Error> {
    let mut looked = Instant::now();
    let unless_stopped = |item| {
        if looked.elapsed() >= PAUSE {
            if stops() {
                return Err(Error::Stopped);
            }
            looked = Instant::now();
        }
        Ok(f(item))
    };
    items.into_iter().map(unless_stopped).collect()
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
    fn long_work_is_stopped_between_its_parts() {
        let slow = |i: usize| std::thread::sleep(PAUSE * u32::from(i < 40));
        for (bytes, parts) in [(0, 1 << 20), (SERIAL_BYTES, 1 << 20)] {
            let found = stoppable(|| true, || map((0..parts).collect(), bytes, slow));
            assert_eq!(found, Err(Error::Stopped));
            let found = stoppable(|| false, || map((0..3).collect(), bytes, slow));
            assert_eq!(found, Ok(vec![(); 3]));
        }
        assert!(map(vec![0; 3], 0, slow).is_ok());
    }

    #[test]
    fn no_threads_is_an_error() {
        assert_eq!(set_num_threads(0), Err(Error::Threads { found: 0, limit: MAX_THREADS }));
    }

    #[test]
    fn threads_that_come_at_once_share_what_the_process_knows() {
        let found = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(|| ptr::from_ref(Process::current()) as usize)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
        });
        assert!(found.iter().all(|&process| process == found[0]));
    }
}
