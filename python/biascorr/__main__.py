"""`python -m biascorr`, and the command `biascorr`."""

from biascorr.cli.signals import leave_on_signals


def main() -> None:
    """Runs the command line."""
    leave_on_signals("nothing was written")
    from biascorr.cli.app import app  # takes long enough for a Ctrl-C

    app()


if __name__ == "__main__":
    main()
