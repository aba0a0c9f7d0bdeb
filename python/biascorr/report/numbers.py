"""Numbers as a page shows them."""

from __future__ import annotations

NONE = "\N{EN DASH}"
"""Stands for a number that is not known."""

_MINUS = "\N{MINUS SIGN}"

_SMALL = 0.01
"""Round numbers below this have a power of ten."""


def decibels(value: float | None) -> str:
    """With two digits.

    Examples
    --------
    >>> decibels(12.345), decibels(None) == NONE
    ('12.35', True)
    """
    return NONE if value is None else f"{value:.2f}".replace("-", _MINUS)


def number(value: float | None) -> str:
    """With three digits that count.

    Examples
    --------
    >>> number(0.0012345)
    '0.00123'
    """
    return NONE if value is None else f"{value:.3g}".replace("-", _MINUS)


def signed(value: float | None) -> str:
    """The same with its sign.

    Examples
    --------
    >>> signed(1.5)
    '+1.5'
    """
    return NONE if value is None else f"{value:+.3g}".replace("-", _MINUS)


def gain(mean: float, error: float) -> str:
    """A gain and its standard error, with digits as far as the latter lets them count.

    Examples
    --------
    >>> gain(11.4406, 1.18), gain(0.00312, 0.00021)
    ('+11.4 ± 1.2', '+0.0031 ± 0.0002')
    """
    digits = min(max(1, _place(error or abs(mean) or 1.0)), 8)
    return f"{mean:+.{digits}f} ± {error:.{digits}f}".replace("-", _MINUS)


def _place(value: float) -> int:
    """The place of the first digit behind the point that counts."""
    return -int(f"{value:e}".partition("e")[2])


def round_number(value: float) -> str:
    """A round number, as short as it can be said.

    Examples
    --------
    >>> round_number(1e6), round_number(0.25), round_number(0.0)
    ('1e6', '0.25', '0')
    """
    text = f"{value:.0e}" if 0 < abs(value) < _SMALL else f"{value:.5g}"
    return text.replace("e-0", "e-").replace("e+0", "e").replace("-", _MINUS)
