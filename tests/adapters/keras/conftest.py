"""The same random weights in each run, whichever tests run before."""

import keras
import pytest


@pytest.fixture(autouse=True)
def same_weights() -> None:
    keras.utils.set_random_seed(0)
