"""The digest of samples."""

import numpy as np
import pytest

from biascorr import correct
from biascorr.calibration.digest import Digest
from networks import mean_corrected, samples, two_layers

X = samples(8, 3, 6, 6)


def digest_of(batches, axes):
    digest = Digest()
    for batch in batches:
        digest.update(batch, axes)
    return digest.text


@pytest.mark.parametrize("axis", [0, 1])
def test_batches_make_no_difference(axis):
    rows = {"x": np.arange(24.0).reshape(4, 6), "shared": np.arange(3)}
    axes = {"x": axis, "shared": None}
    parts = [{**rows, "x": part} for part in np.split(rows["x"], 2, axis)]
    assert digest_of([rows], axes) == digest_of(parts, axes)


def test_all_else_makes_one():
    x = np.arange(6, dtype=np.int32).reshape(3, 2)
    batches = [{"x": x}, {"y": x}, {"x": x[::-1]}, {"x": x.astype(np.int64)}, {"x": x.reshape(3, 2, 1)}, {"x": x[:2]}]
    assert len({digest_of([batch], {"x": 0, "y": 0}) for batch in batches}) == len(batches)
    assert digest_of([{"x": x}, {"x": x}], {}) != digest_of([{"x": x}], {})


def test_text_and_scalars_have_one():
    assert digest_of([{"x": np.array(["a", "b"], object), "y": np.array(1.0)}], {"x": 0, "y": None})


def test_the_same_samples_have_the_same_digest_however_they_come(tmp_path):
    np.save(tmp_path / "x.npy", X)
    found = {
        mean_corrected(two_layers(), X).data_digest,
        mean_corrected(two_layers(), X, batch_size=3).data_digest,
        mean_corrected(two_layers(), {"x": X}).data_digest,
        mean_corrected(two_layers(), [X[:5], X[5:]]).data_digest,
        mean_corrected(two_layers(), tmp_path / "x.npy").data_digest,
    }
    assert len(found) == 1
    assert correct(two_layers(), method="analytical").data_digest is None
