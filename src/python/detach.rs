//! The ways out of the GIL and into Python code, and the one table from [`Error`] to Python exceptions.

use std::cell::RefCell;
use std::ffi::c_int;
use std::thread;

use pyo3::exceptions::{PyKeyboardInterrupt, PyMemoryError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyTuple;
use pyo3::{BoundObject, ffi};

use crate::error::Error;
use crate::{memory, parallel};

/// Work on fewer bytes ends sooner than another thread could make use of the GIL (about 20 us at 3 GB/s).
const ATTACHED_BYTES: usize = 64 << 10;

/// Work on more bytes may take longer than somebody waits who has pressed Ctrl-C (about 100 ms at 3 GB/s).
const PATIENT_BYTES: usize = 256 << 20;

thread_local! {
    /// What a handler of a signal raised while this thread waited for a kernel.
    static RAISED: RefCell<Option<PyErr>> = const { RefCell::new(None) };
}

/// Runs a kernel over `bytes` of input, without the GIL when that takes long. The pool is built with it: Python forks with the
/// GIL held, so no child finds that half done. Where it takes very long, what a handler of a signal raises ends it.
pub fn detached<R: Send>(
    py: Python<'_>, bytes: usize, kernel: impl Send + FnOnce() -> Result<R, Error>,
) -> PyResult<R> {
    if bytes < ATTACHED_BYTES {
        return Ok(kernel()?);
    }
    parallel::prepare(bytes)?;
    memory::check_slack()?;
    if bytes < PATIENT_BYTES {
        return Ok(py.detach(kernel)?);
    }
    match py.detach(|| parallel::stoppable(is_raised, kernel)) {
        Err(Error::Stopped) => Err(RAISED.take().unwrap_or_else(|| Error::Stopped.into())),
        done => Ok(done?),
    }
}

/// Lets handlers of signals run; whether one has raised something.
fn is_raised() -> bool {
    let raised = Python::try_attach(check_signals).and_then(Result::err);
    let is_any = raised.is_some();
    RAISED.set(raised);
    is_any
}

#[cfg(not(unix))]
use ffi::{PyErr_CheckSignals, PyObject_CallObject};
#[cfg(unix)]
#[expect(unsafe_code, reason = "PyO3 declares them as functions that do not unwind")]
unsafe extern "C-unwind" {
    fn PyErr_CheckSignals() -> c_int;
    fn PyObject_CallObject(function: *mut ffi::PyObject, arguments: *mut ffi::PyObject) -> *mut ffi::PyObject;
}

/// Ends a thread that is unwound without unwinding further.
struct Hang;

impl Drop for Hang {
    fn drop(&mut self) {
        loop {
            thread::park();
        }
    }
}

/// Calls what may let other threads run.
///
/// Where the interpreter has ended when a daemon thread wants to go on, CPython before 3.14 has `pthread_exit` unwind the
/// thread. No frame of Rust survives that, so it hangs here, as it does in CPython from 3.14 on, and as PyO3 has it where the GIL
/// is taken back.
fn hanging<R>(call: impl FnOnce() -> R) -> R {
    let hang = Hang;
    let result = call();
    std::mem::forget(hang);
    result
}

/// Lets handlers of signals run, where this is the thread that runs them; raises what they raise.
pub fn check_signals(py: Python<'_>) -> PyResult<()> {
    #[expect(unsafe_code, reason = "calls a function of C")]
    // SAFETY: the GIL is held.
    match hanging(|| unsafe { PyErr_CheckSignals() }) {
        0 => Ok(()),
        _ => Err(PyErr::fetch(py)),
    }
}

/// What a function of Python returns.
pub fn called<'py>(
    function: &Bound<'py, PyAny>, arguments: impl IntoPyObject<'py, Target = PyTuple>,
) -> PyResult<Bound<'py, PyAny>> {
    let py = function.py();
    let arguments = arguments.into_pyobject(py).map_err(Into::into)?.into_bound();
    #[expect(unsafe_code, reason = "calls a function of C")]
    // SAFETY: both are borrowed, and the GIL is held.
    let result = hanging(|| unsafe { PyObject_CallObject(function.as_ptr(), arguments.as_ptr()) });
    #[expect(unsafe_code, reason = "as above")]
    // SAFETY: it is a new reference, or null where an exception is set.
    unsafe {
        Bound::from_owned_ptr_or_err(py, result)
    }
}

impl From<Error> for PyErr {
    fn from(error: Error) -> PyErr {
        let message = error.to_string();
        match error {
            Error::NoSamples
            | Error::ZeroDimensional { .. }
            | Error::EmptySample { .. }
            | Error::Channels { .. }
            | Error::WeightShape { .. }
            | Error::LayoutRank { .. }
            | Error::Layout { .. }
            | Error::Groups { .. }
            | Error::MeanShape { .. }
            | Error::PerChannel { .. }
            | Error::Nan
            | Error::NotFinite
            | Error::ChannelAxis { .. }
            | Error::Isa { .. }
            | Error::GridStrides { .. }
            | Error::Threads { .. } => PyValueError::new_err(message),
            Error::Stopped => PyKeyboardInterrupt::new_err(message),
            Error::Memory { .. } => PyMemoryError::new_err(message),
            Error::ThreadPool { .. } => PyRuntimeError::new_err(message),
        }
    }
}
