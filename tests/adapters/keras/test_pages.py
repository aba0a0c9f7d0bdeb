"""The examples of the pages about Keras and TFLite run as they stand."""

import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import biascorr
from pages import DOCS, PROJECT, run_page

FIXTURES = PROJECT / "tests" / "fixtures" / "tflite"
IMAGES = np.random.default_rng(0).gamma(2.0, 0.5, (16, 16, 16, 3)).astype(np.float32)


def model_of(name, output):
    """A small network; its input and its last layer are called so."""
    inputs = keras.Input((16, 16, 3), name=name)
    x = keras.layers.Conv2D(4, 3, use_bias=False)(inputs)
    x = keras.layers.ReLU(6.0)(keras.layers.BatchNormalization()(x))
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(4, 3)(x))
    return keras.Model(inputs, keras.layers.Dense(4, name=output)(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Statistics for quantized inputs")  # TFLiteConverter says so where it has them
@pytest.mark.filterwarnings("ignore:.*experimental_preserve_all_tensors")  # which litert-quantizer sets
@pytest.mark.parametrize("page", ["how-to/keras.md", "how-to/tflite.md", "migration/aimet.md"])
def test_examples_run_as_they_stand(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("float", "int8"):
        shutil.copy(FIXTURES / f"classifier_{name}.tflite", f"model{'_int8' * (name == 'int8')}.tflite")
    inputs, output = ("input_1", "fc1000") if page == "migration/aimet.md" else ("image", "logits")
    labelled = tf.data.Dataset.from_tensor_slices((IMAGES, np.zeros(16))).batch(4)
    names = {
        "biascorr": biascorr,
        "np": np,
        "tf": tf,
        "Path": Path,
        "model": model_of(inputs, output),
        "labelled": labelled,
        "dataset": labelled.map(lambda image, _: image),
        "images": IMAGES,
        "samples": IMAGES,
        "quant_params": biascorr.QuantParams(),
        "bias_correction_params": biascorr.BiasCorrectionParams(4, 16, 16, [inputs], [output]),
    }
    run_page(DOCS / page, names)
