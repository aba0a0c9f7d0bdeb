"""Data sets of TensorFlow and Keras are read sample by sample, each one once."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from biascorr import QuantParams, correct

X = np.random.default_rng(0).gamma(2.0, 0.5, (20, 8, 8, 3)).astype(np.float32)


def generated(reads):
    for k, sample in enumerate(X):
        reads.append(k)
        yield sample


def dataset(reads):
    return tf.data.Dataset.from_generator(lambda: generated(reads), output_signature=tf.TensorSpec((8, 8, 3), tf.float32))


class Counted(keras.utils.PyDataset):
    def __init__(self, reads):
        super().__init__()
        self.reads = reads

    def __len__(self):
        return 5

    def __getitem__(self, index):
        self.reads.extend(range(4 * index, 4 * index + 4))
        return X[4 * index : 4 * index + 4]


SOURCES = {
    "single samples": dataset,
    "batches": lambda reads: dataset(reads).batch(3),
    "cached on the way": lambda reads: dataset(reads).map(lambda x: x).prefetch(2).batch(4),
    "PyDataset": Counted,
}


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.ReLU()(keras.layers.Conv2D(4, 3)(inputs))
    return keras.Model(inputs, keras.layers.Dense(4)(keras.layers.GlobalAveragePooling2D()(x)))


@pytest.mark.parametrize("budget", [0, None])
@pytest.mark.parametrize("source", SOURCES)
def test_a_correction_reads_each_sample_once(source, budget, model):
    reads = []
    options = {"quant_params": QuantParams(weight_bits=4), "method": "auto", "memory_budget": budget}
    correct(model, SOURCES[source](reads), **options)
    assert reads == list(range(20))
