"""Corrections of Keras models that go on from a checkpoint."""

import pytest

from keras_models import KERAS_WARNS, corrected, digest, plain, with_norms
from resumed import assert_goes_on

pytestmark = KERAS_WARNS


def values(model):
    return [digest(each) for each in model.weights]


@pytest.mark.parametrize(("make", "method"), [(plain, "auto"), (with_norms, "squared")])
@pytest.mark.filterwarnings("ignore:not folded:UserWarning", "ignore:.*made the outputs worse:UserWarning")
def test_a_run_goes_on_with_the_same_bits(tmp_path, make, method):
    model = make()
    assert_goes_on(tmp_path, lambda folder: corrected(model, method=method, checkpoint=folder), values)


def test_other_weights_are_refused(tmp_path):
    model = plain()
    corrected(model, checkpoint=tmp_path)
    model.layers[-1].kernel.assign(model.layers[-1].kernel + 1)
    with pytest.raises(ValueError, match="is of another run .reference: "):
        corrected(model, checkpoint=tmp_path)
