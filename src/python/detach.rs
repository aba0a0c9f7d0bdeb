//! The one way out of the GIL, and the one table from [`Error`] to Python exceptions.

use pyo3::exceptions::{PyMemoryError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;

use crate::error::Error;
use crate::parallel;

/// Work on fewer bytes ends sooner than another thread could make use of the GIL (about 20 us at 3 GB/s).
const ATTACHED_BYTES: usize = 64 << 10;

/// Runs a kernel over `bytes` of input, without the GIL when that takes long. The pool is built with it: Python forks with the
/// GIL held, so no child finds that half done.
pub fn detached<R: Send>(
    py: Python<'_>, bytes: usize, kernel: impl Send + FnOnce() -> Result<R, Error>,
) -> PyResult<R> {
    if bytes < ATTACHED_BYTES {
        return Ok(kernel()?);
    }
    parallel::prepare(bytes)?;
    Ok(py.detach(kernel)?)
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
            Error::Memory { .. } => PyMemoryError::new_err(message),
            Error::ThreadPool { .. } => PyRuntimeError::new_err(message),
        }
    }
}
