"""The command `biascorr`."""
