"""`python -m biascorr`, and the command `biascorr`."""

import os
import sys

from biascorr.cli.signals import leave_on_signals

_STDOUT, _STDERR = 1, 2


def main() -> None:
    """Runs the command line."""
    leave_on_signals("nothing was written")
    _open_what_is_closed()
    from biascorr.cli.app import app  # takes long enough for a Ctrl-C

    app(prog_name="biascorr")  # also as python -m biascorr: a name for completion scripts


def _open_what_is_closed() -> None:
    """A file opened later would be what is printed to, where a standard stream is closed."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= _STDERR:  # it is the lowest that is free
        pass
    os.close(number)
    sys.stdout = sys.stdout or os.fdopen(_STDOUT, "w")
    sys.stderr = sys.stderr or os.fdopen(_STDERR, "w")


if __name__ == "__main__":
    main()
