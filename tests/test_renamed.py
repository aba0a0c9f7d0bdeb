"""The first parameter of correct and equalize is `reference`; its old name `model` works, and says so."""

import inspect

import pytest

from biascorr import correct, equalize
from networks import samples, two_layers

X = samples(2, 3, 6, 6)


@pytest.mark.parametrize("function", [correct, equalize])
def test_the_old_name_of_the_float_model(function):
    with pytest.warns(DeprecationWarning, match=rf"^{function.__name__}\(\): 'model' is now called 'reference'") as caught:
        old = function(model=two_layers(), data=X)
    assert caught[0].filename == __file__
    assert function(reference=two_layers(), data=X).model == old.model
    with pytest.raises(TypeError, match="either 'reference' or 'model', its old name, not both"):
        function(two_layers(), X, model=two_layers())
    with pytest.raises(TypeError, match="either 'reference' or 'model'"):
        function(reference=two_layers(), model=two_layers())
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'reference'"):
        function(data=X)
    assert next(iter(inspect.signature(function).parameters)) == "reference"
