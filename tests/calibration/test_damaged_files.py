"""Files of arrays that are damaged, or lie about what is in them."""

import struct
import zipfile

import numpy as np
import pytest

from biascorr import correct
from networks import samples, two_layers


def written(path, shape="(4, 3, 6, 6)", descr="'<f4'", is_fortran=False):
    """A file with the values of four samples, and a header that says something else."""
    header = f"{{'descr': {descr}, 'fortran_order': {is_fortran}, 'shape': {shape}, }}\n".encode()
    content = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + samples(4, 3, 6, 6).tobytes()
    if path.suffix == ".npy":
        path.write_bytes(content)
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("x.npy", content)
    return path


@pytest.fixture(params=["x.npy", "x.npz"])
def path(request, tmp_path):
    return tmp_path / request.param


def refused(path, match, error=ValueError):
    with pytest.raises(error, match=match):
        correct(two_layers(), path, method="mean")


def test_what_is_not_changed_is_read(path):
    assert correct(two_layers(), written(path), method="mean").report[0].method == "mean"


@pytest.mark.parametrize("is_fortran", [False, True])
@pytest.mark.parametrize("shape", ["(1000000000000,)", "(4, 3, 6, 7)", "(2**40, 2**40)".replace("2**40", str(2**40))])
def test_memory_is_taken_only_for_what_is_there(path, shape, is_fortran):
    refused(written(path, shape, is_fortran=is_fortran), r"^data: .*x\.np[yz] cannot be read: \d+ bytes are missing")


@pytest.mark.parametrize("shape", ["(-1, 3, 6, 6)", "(4, -3, -6, 6)"])
def test_sizes_below_zero(path, shape):
    refused(written(path, shape), r"^data: .*x\.np[yz] cannot be read: an array of shape \(-?\d, ")


@pytest.mark.parametrize("descr", ["'|V0'", "'|S0'", "'<U0'"])
def test_values_of_no_bytes(path, descr):
    refused(written(path, descr=descr), r"x\.np[yz]\[0\]: input x: dtype \S+, the model takes float32", TypeError)


def test_archives_that_say_that_there_is_more_than_any_memory_has(tmp_path, monkeypatch):
    """The size of a member is what the archive says."""

    def read_array(*_, **__):
        raise MemoryError("Unable to allocate 8 EiB")

    monkeypatch.setattr(np.lib.format, "read_array", read_array)
    refused(written(tmp_path / "x.npz"), r"^data: .*x\.npz: ", MemoryError)
