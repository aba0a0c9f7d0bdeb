"""The files that other tests are made of: one network, however its file is written."""

import numpy as np
import pytest

from tflite_fixtures import PAIRS, images, path_of
from tflite_models import MODELS, deduplicated, outputs_of, packed, samples_for, unpacked
from tflite_quantizers import BLOCKS, quantized


def sqnr(found, expected):
    return 10 * np.log10(np.square(expected).sum() / np.square(found - expected).sum())


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_model_computes_the_same_however_it_is_written(make):
    content, behind = make(), make(behind=True)
    assert packed(unpacked(behind)) == content
    assert packed(unpacked(content), behind=True) == behind
    samples = samples_for(content)
    expected = outputs_of(content, samples)
    for other in (behind, deduplicated(content), make(any_batch=True)):
        found = outputs_of(other, samples)
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6)


def test_weights_of_blocks_run():
    model, recipe = BLOCKS
    content = MODELS[model]()
    samples = samples_for(content)
    (found,), (expected,) = (outputs_of(c, samples).values() for c in (quantized(content, recipe, samples), content))
    assert 10 < sqnr(found, expected) < 60


@pytest.mark.parametrize(("reference", "name"), PAIRS, ids=[name for _, name in PAIRS])
def test_files_of_the_converter_run(reference, name):
    contents = [path_of(file).read_bytes() for file in (reference, name)]
    samples = {"image": images(8, seed=1)}
    expected, found = (outputs_of(content, samples) for content in contents)
    assert all(sqnr(found[output], expected[output]) > 15 for output in expected)


def test_equal_buffers_become_one():
    content = MODELS["shared_biases"]()
    samples = samples_for(content)
    content = quantized(content, "int8", samples)
    files = [content, deduplicated(content)]
    buffers = [[tensor.buffer for tensor in unpacked(file).subgraphs[0].tensors] for file in files]
    assert [len(set(some)) for some in buffers] == [9, 7]
    first, second = (outputs_of(file, samples)["output"] for file in files)
    np.testing.assert_array_equal(first, second)
