//! Whether there is room for what a kernel makes beside its input, before it makes it.
//!
//! An array that is broadcast has many more elements, and channels, than memory. Where a kernel needs memory in proportion to
//! them, it asks here first: an allocation that fails in its middle would end the process.

use crate::error::Error;

/// Less is not asked for: asking takes longer than some kernels do.
const SMALL: usize = 1 << 20;

/// Room for the small things that every kernel makes, which nothing asks for: parts, rows, what threads share.
const SLACK: usize = 4 << 20;

/// Fails where there is no room for so many things of so many bytes each.
pub fn check(count: usize, each: usize) -> Result<(), Error> {
    let bytes = count.saturating_mul(each);
    if bytes < SMALL { Ok(()) } else { reserve(bytes) }
}

/// Fails where there is little room left for anything.
pub fn check_slack() -> Result<(), Error> {
    reserve(0)
}

fn reserve(bytes: usize) -> Result<(), Error> {
    let room = Vec::<u8>::new().try_reserve_exact(bytes.saturating_add(SLACK));
    room.map_err(|_| Error::Memory { bytes: bytes.max(SLACK) })
}

/// The product, or more memory than there is.
pub fn product(counts: impl IntoIterator<Item = usize>) -> usize {
    counts.into_iter().fold(1, usize::saturating_mul)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_machine_has_is_an_error() {
        assert_eq!(check(SMALL, 2), Ok(()));
        for bytes in [1 << 60, usize::MAX] {
            assert_eq!(check(bytes, 1), Err(Error::Memory { bytes }));
        }
        assert_eq!(check(product([1 << 40, 1 << 40, 1 << 40]), 8), Err(Error::Memory { bytes: usize::MAX }));
    }
}
