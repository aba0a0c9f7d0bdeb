"""A digest of samples, so that it can be seen later whether others are the same ones.

SHA-256 over, input by input in the order of their names, the dtype and shape of a sample and the bytes of all samples, in the
order in which they were read: the same however they were batched.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biascorr.calibration.batching import Axes
from biascorr.graph.network import Feeds


class Digest:
    """Takes batches in, one after the other.

    Examples
    --------
    >>> import numpy as np
    >>> whole, parts, samples = Digest(), Digest(), np.arange(6.0).reshape(3, 2)
    >>> whole.update({"x": samples}, {"x": 0})
    >>> for sample in samples:
    ...     parts.update({"x": sample[None]}, {"x": 0})
    >>> whole.text == parts.text
    True
    """

    def __init__(self) -> None:
        self._inputs: dict[str, Any] = {}
        self._kinds: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
        self._shared: dict[str, bytes] = {}

    def update(self, feeds: Feeds, axes: Axes) -> None:
        """Adds a batch whose samples are along these axes; all of them share an input without one, until it changes."""
        for name, array in feeds.items():
            axis = axes.get(name)
            if name in axes and axis is None and not self._is_new(name, array):
                continue
            samples = _apart(array, axis)
            if name not in self._inputs:
                self._inputs[name] = hashlib.sha256()
            found, kind = self._inputs[name], (samples.dtype, samples.shape[1:])
            if self._kinds.get(name) != kind:
                self._kinds[name] = kind
                found.update(f"{kind[0]} {kind[1]}\n".encode())
            found.update(_bytes_of(samples))

    def _is_new(self, name: str, array: NDArray[Any]) -> bool:
        before, found = self._shared.get(name), hashlib.sha256(_bytes_of(array)).digest()
        self._shared[name] = found
        return found != before

    @property
    def text(self) -> str | None:
        """The digest of all so far, in hexadecimal; None where there were no batches."""
        whole = hashlib.sha256()
        for name, found in sorted(self._inputs.items()):
            whole.update(f"{name!r}\n".encode(errors="surrogatepass") + found.digest())
        return whole.hexdigest() if self._inputs else None


def _apart(array: NDArray[Any], axis: int | None) -> NDArray[Any]:
    """With the samples along the first axis."""
    if axis is None or axis >= array.ndim:
        return array[None]
    return array if axis == 0 else np.moveaxis(array, axis, 0)


def _bytes_of(array: NDArray[Any]) -> Any:
    if array.dtype.kind in "OSU":
        return repr(array.tolist()).encode(errors="surrogatepass")
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
