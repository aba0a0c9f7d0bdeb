"""The user's own measure of a network: greater is better.

metric(outputs, reference) -> float    of one sample: outputs by name, beside those of the float network
evaluate(run) -> float                 of the network that `run` runs: own inputs, own labels, own loop
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from numpy.typing import NDArray

from biascorr.arguments import function_from_name

Outputs: TypeAlias = Mapping[str, Any]
"""The outputs of a network by name."""

Run: TypeAlias = Callable[[Any], dict[str, NDArray[Any]]]
"""Runs a network on one batch: a mapping from input names to arrays, or an array where there is one input."""


class Metric:
    """A metric, and which of the two kinds it is: by how many arguments it needs.

    Parameters
    ----------
    function : callable
        ``metric(outputs, reference)`` or ``evaluate(run)``.

    Raises
    ------
    TypeError
        It is none of these.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        if not callable(function):
            raise TypeError(f"metric: {function!r}, expected a function metric(outputs, reference) or evaluate(run)")
        self._function = function
        self.evaluates_runs = _takes(function, 1) and not _takes(function, 0)
        if not self.evaluates_runs and not _takes(function, 2):
            raise TypeError(f"metric: {function!r} takes neither (outputs, reference) nor (run)")

    @property
    def name(self) -> str:
        """The name of the function."""
        return str(getattr(self._function, "__qualname__", type(self._function).__qualname__))

    def of_sample(self, outputs: Outputs, reference: Outputs) -> float:
        """Of one sample, from the outputs of a network and those of the float one. Raises RuntimeError where it fails."""
        return self._number(outputs, reference)

    def of_run(self, run: Run) -> float:
        """Of a network. Raises RuntimeError where it fails."""
        return self._number(run)

    def _number(self, *arguments: Any) -> float:
        try:
            value = self._function(*arguments)
        except MemoryError:
            raise
        except Exception as error:
            if str(error).startswith(_LABEL):  # of the run that it was given
                raise
            raise RuntimeError(f"{_LABEL}{self.name} failed: {type(error).__name__}: {error}".removesuffix(": ")) from error
        return _number(value)


_LABEL = "metric: "
"""What errors of metrics begin with."""


def metric_from_name(name: str) -> Callable[..., Any]:
    """The function that "module:function" names; modules in the current folder are found too. Raises ValueError."""
    return function_from_name(name, "metric")


def _takes(function: Callable[..., Any], count: int) -> bool:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # it has none that can be read: it is called with two, and may say so
        return count == 2
    try:
        signature.bind(*[None] * count)
    except TypeError:
        return False
    return True


def _number(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"metric: it gave {value!r}, expected a number") from None
    if not math.isfinite(number):
        raise ValueError(f"metric: it gave {number}, expected a finite number: greater is better")
    return number
