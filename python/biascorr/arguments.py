"""Arguments that several functions take: checks, and what was given."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import numpy as np

Function = TypeVar("Function", bound=Callable[..., Any])


def checked_integer(name: str, value: Any, least: int, most: int | None = None, *, otherwise: str = "") -> int:
    """The value as an int.

    Parameters
    ----------
    name : str
        The name that the error gives it.
    value : int or numpy integer
        The argument; booleans are none.
    least, most : int
        The limits; None: no upper one.
    otherwise : str
        Another value that is allowed, for the error.

    Raises
    ------
    ValueError
        The value is no integer, or not within the limits.

    Examples
    --------
    >>> checked_integer("bits", 8, 2, 32)
    8
    >>> checked_integer("iterations", 0, 1, otherwise="None")
    Traceback (most recent call last):
    ...
    ValueError: iterations: 0, expected an integer of at least 1, or None
    """
    is_integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if is_integer and value >= least and (most is None or value <= most):
        return int(value)
    limits = f"of at least {least}" if most is None else f"from {least} to {most}"
    raise ValueError(f"{name}: {value!r}, expected an integer {limits}" + (f", or {otherwise}" if otherwise else ""))


def check_flags(**flags: Any) -> None:
    """Raises TypeError where one of these arguments, given by name, is neither True nor False.

    Examples
    --------
    >>> check_flags(equalize=True, per_channel="no")
    Traceback (most recent call last):
    ...
    TypeError: per_channel: 'no', expected True or False
    """
    for name, value in flags.items():
        if not isinstance(value, (bool, np.bool_)):
            raise TypeError(f"{name}: {value!r}, expected True or False")


def check_path(name: str, value: Any) -> None:
    """Raises TypeError where the value is no path.

    Examples
    --------
    >>> check_path("path", None)
    Traceback (most recent call last):
    ...
    TypeError: path: NoneType, expected a path
    """
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name}: {type(value).__name__}, expected a path")


def checked_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Raises ValueError where the value is none of these.

    Examples
    --------
    >>> checked_choice("method", "emprical", ("auto", "empirical"))
    Traceback (most recent call last):
    ...
    ValueError: method: 'emprical', expected one of auto, empirical; did you mean empirical?
    """
    if not (isinstance(value, str) and value in allowed):
        raise ValueError(f"{name}: {value!r}, expected one of {', '.join(allowed)}{nearest(value, allowed)}")


def nearest(value: Any, allowed: Sequence[str]) -> str:
    """The end of a message that asks whether this one of what is allowed was meant; nothing where none is like it."""
    import difflib  # takes a while, and only mistakes need it

    found = difflib.get_close_matches(value, allowed, n=1) if isinstance(value, str) else []
    return f"; did you mean {found[0]}?" if found else ""


def checked_groups(groups: Any) -> int:
    """The groups of a layer as an int. Raises TypeError where they are none, ValueError below 1 and from 2^31 on."""
    if not isinstance(groups, (int, np.integer)) or isinstance(groups, bool):
        raise TypeError(f"groups: {type(groups).__name__}, expected an integer")
    if not 1 <= groups < 2**31:
        raise ValueError(f"groups: {groups}, expected at least 1 and below 2^31")
    return int(groups)


def paths_of(given: Mapping[str, Any]) -> dict[str, str] | None:
    """The arguments that are paths, as text by their names; None where none is.

    Examples
    --------
    >>> paths_of({"reference": "net.onnx", "data": [1.0]})
    {'reference': 'net.onnx'}
    """
    paths = {name: os.fspath(value) for name, value in given.items() if isinstance(value, (str, os.PathLike))}
    return {name: path if isinstance(path, str) else os.fsdecode(path) for name, path in paths.items()} or None


def renamed(**old: str) -> Callable[[Function], Function]:
    """Has a function take parameters by their old names too, as keywords.

    Parameters
    ----------
    **old : str
        The present names by the old ones.

    Returns
    -------
    callable
        A decorator.

    Raises
    ------
    TypeError
        When the function is called: a parameter is given by both names.

    Warns
    -----
    DeprecationWarning
        When the function is called with an old name.

    Examples
    --------
    >>> from pathlib import Path
    >>> @renamed(model="reference")
    ... def name_of(reference):
    ...     return reference.stem
    >>> name_of(Path("net.onnx"), model=Path("old.onnx"))
    Traceback (most recent call last):
    ...
    TypeError: name_of() takes either 'reference' or 'model', its old name, not both
    """

    def with_old_names(function: Function) -> Function:
        positions = {name: position for position, name in enumerate(inspect.signature(function).parameters)}

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for name in old.keys() & kwargs:
                new = old[name]
                if new in kwargs or len(args) > positions[new]:
                    raise TypeError(f"{function.__name__}() takes either {new!r} or {name!r}, its old name, not both")
                message = f"{function.__name__}(): {name!r} is now called {new!r}; the old name will be removed"
                warnings.warn(message, DeprecationWarning, stacklevel=2)
                kwargs[new] = kwargs.pop(name)
            return function(*args, **kwargs)

        return cast(Function, call)

    return with_old_names


def is_function(text: str) -> bool:
    """Whether a text reads as "module:function"."""
    return _FUNCTION.fullmatch(text) is not None


_FUNCTION = re.compile(r"[^\W\d][\w.]*:[^\W\d]\w*")
"""A module and a function in it."""


def function_from_name(name: str, argument: str) -> Callable[..., Any]:
    """The function that "module:function" names; modules in the current folder are found too.

    Parameters
    ----------
    name : str
        Of the module, with its packages, and of the function.
    argument : str
        What the error calls it.

    Raises
    ------
    ValueError
        The name is none; the module cannot be imported, or has no such function.

    Examples
    --------
    >>> function_from_name("math:floor", "metric")
    <built-in function floor>
    >>> function_from_name("math:flor", "metric")
    Traceback (most recent call last):
    ...
    ValueError: metric: 'math:flor' cannot be found: module 'math' has no attribute 'flor'
    """
    module, _, function = name.partition(":")
    if not module or not function:
        raise ValueError(f"{argument}: {name!r}, expected module:function")
    if "" not in sys.path:
        sys.path.append("")  # it stays: the module may import others when it is called
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # the module runs when it is imported, and may raise anything
        raise ValueError(f"{argument}: {name!r} cannot be found: {error}") from error
    if not callable(found):
        raise ValueError(f"{argument}: {name!r} is a {type(found).__name__}, expected a function")
    return found  # type: ignore[no-any-return]
