"""Corrections of TFLite files that go on from a checkpoint."""

import pytest

from biascorr import correct
from resumed import assert_goes_on
from tflite_networks import content_of, float_of, samples_of


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("convolutions-int8", "squared"),
        ("residual-int8", "auto"),
        ("depthwise-int16x8", "squared"),
        ("fully_connected-weights_int4", "auto"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*made the outputs worse:UserWarning")
def test_a_run_goes_on_with_the_same_bytes(tmp_path, name, method):
    samples, reference, content = samples_of(name, 16), float_of(name), content_of(name)
    assert_goes_on(
        tmp_path, lambda folder: correct(reference, samples, quantized=content, method=method, checkpoint=folder), bytes
    )


def test_another_file_is_refused(tmp_path):
    samples, reference = samples_of("convolutions", 4), float_of("convolutions")
    correct(reference, samples, quantized=content_of("convolutions-int8"), method="mean", checkpoint=tmp_path)
    with pytest.raises(ValueError, match="is of another run .quantized: "):
        correct(reference, samples, quantized=content_of("convolutions-int8x4"), method="mean", checkpoint=tmp_path)
