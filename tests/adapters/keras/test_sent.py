"""Keras networks that are pickled, and what they are known by."""

import pickle

import keras
import numpy as np
import pytest
from keras import layers, ops

from biascorr import QuantParams
from biascorr.adapters.keras.network import KerasNetwork
from biascorr.correction.simulation import simulated
from biascorr.equalization.folding import fold_batch_norms
from biascorr.graph.layer import without_later_calls
from biascorr.graph.network import Edits
from keras_models import KERAS_WARNS, NESTED_X, X, chain, image, nested, plain, randomized, sequential, with_norms
from keras_networks import of_keras
from networks import ranges_in
from travelling import assert_same, assert_same_in_another_process, sent

pytestmark = [KERAS_WARNS, of_keras]


class Doubled(keras.Layer):
    """A layer that no package registers."""

    def call(self, x):
        return 2 * x


@keras.saving.register_keras_serializable("tests")
class Tripled(keras.Layer):
    """One that is registered."""

    def build(self, shape):
        self.three = self.add_weight(shape=(shape[-1],), initializer=lambda shape, dtype: 3 * ops.ones(shape, dtype))

    def call(self, x):
        return self.three * x


class Counting(keras.Layer):
    """One that counts its calls."""

    def build(self, shape):  # noqa: ARG002
        self.count = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, x):
        self.count.assign_add(1.0)
        return x + self.count


def halved(x):
    return 0.5 * x


def own():
    parts = [layers.Conv2D(4, 3, activation=halved, name="first"), Doubled(name="doubled"), Tripled(name="tripled")]
    return chain(*parts, layers.Lambda(lambda x: x[:, 1:] + 1, name="moved"), layers.Conv2D(3, 1, name="last"))


def with_lora():
    model = randomized(chain(layers.Conv2D(4, 3, name="first"), layers.Dense(5, name="last")))
    model.get_layer("last").enable_lora(2)
    return randomized(model)


def normalized():
    layer = layers.Normalization(name="normalized")
    layer.adapt(X)
    return chain(layer, layers.SeparableConv2D(4, 3, name="first"), layers.Flatten(), layers.Dense(2, name="last"))


def einsum():
    return randomized(chain(layers.EinsumDense("abcd,de->abce", (None, 8, 5), name="first"), layers.Conv2D(3, 1, name="last")))


def half():
    parts = layers.Conv2D(4, 3, dtype="bfloat16", activation="relu", name="first"), layers.Conv2D(2, 3, name="last")
    return randomized(chain(*parts))


MODELS = {
    "with norms": with_norms,
    "plain": plain,
    "sequential": sequential,
    "nested": nested,
    "own layers": own,
    "counting": lambda: chain(layers.Conv2D(4, 3, name="first"), Counting(name="counting")),
    "LoRA": with_lora,
    "adapted": normalized,
    "einsum": einsum,
    "bfloat16": half,
}


def loaded(model):
    return KerasNetwork.load(model, "model")


def feeds_of(network):
    arrays = NESTED_X.values() if len(network.inputs) > 1 else [X]
    return {each.name: array[:2] for each, array in zip(network.inputs, arrays)}


def shifted(network):
    return network.with_shifts({each.name: np.linspace(-1, 1, each.channels) for each in without_later_calls(network.layers)})


def edited(network):
    layer, activation = network.layers[0], next(name for name in network.order if network.facts().activation(name))
    weights, bias = 2 * np.asarray(layer.weights), np.ones(layer.channels)
    return network.edited(Edits({layer.name: weights}, {layer.name: bias}, {activation: (-0.5, 3.0)}))


def simulation(network):
    return simulated(network, QuantParams(weight_bits=4, activation_bits=8), ranges_in(network, [feeds_of(network)]))


CHANGES = {
    "shifted": shifted,
    "edited": edited,
    "folded": lambda network: fold_batch_norms(network)[0],
    "folded and shifted": lambda network: shifted(fold_batch_norms(network)[0]),
    "simulated": simulation,
}


@pytest.mark.parametrize("name", MODELS)
def test_a_network_that_was_sent_is_the_same(name):
    network = loaded(MODELS[name]())
    assert_same(network, sent(network), feeds_of(network))


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_network_is_the_same(change):
    network = CHANGES[change](loaded(with_norms()))
    assert_same(network, sent(network), feeds_of(network))


@pytest.mark.parametrize("name", ["with norms", "own layers"])
def test_a_network_is_the_same_in_another_process(name, tmp_path):
    network = CHANGES["simulated"](loaded(MODELS[name]()))
    assert_same_in_another_process(network, feeds_of(network), tmp_path)


def test_nothing_that_was_made_of_it_travels():
    network = shifted(loaded(plain()))
    unused = len(pickle.dumps(network))
    network.facts(), network.model, network.digest, network.part(feeds_of(network), network.outputs)
    assert abs(len(pickle.dumps(network)) - unused) < 100  # the archive has the times of its files


def test_a_model_that_keras_does_not_read_as_it_wrote_it_is_refused():
    conv, inner = layers.Conv2D(3, 3, padding="same", name="conv"), image("inside")
    block = keras.Model(inner, layers.ReLU(name="relu")(conv(inner)), name="block")
    x = image()
    network = loaded(randomized(keras.Model(x, block(conv(x)), name="twofold")))
    content = pickle.dumps(network)
    with pytest.raises(ValueError, match="twofold: it cannot be sent: Keras does not read what it writes of it"):
        pickle.loads(content)


# Digests


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("own layers", "counting", "LoRA")])
def test_a_model_has_one_digest_however_it_is_given(name, tmp_path):
    model = MODELS[name]()
    model.save(tmp_path / "model.keras")
    assert loaded(tmp_path / "model.keras").digest == loaded(model).digest


def test_how_a_model_is_trained_is_not_in_its_digest():
    model = plain()
    before = loaded(model).digest
    model.compile("adam", "mse")
    model.fit(X[:1], model(X[:1]), verbose=0, epochs=0)
    assert loaded(model).digest == before


def changed(change):
    model = with_norms()
    change(model)
    return loaded(model)


def negate(model):
    variable = model.get_layer("norm").moving_mean
    variable.assign(-variable)


def test_all_that_is_computed_with_is_in_the_digest():
    network = loaded(with_norms())
    networks = [
        network,
        *(change(network) for change in CHANGES.values()),
        changed(negate),
        changed(lambda model: setattr(model.get_layer("relu"), "max_value", 5.0)),
        changed(lambda model: setattr(model.get_layer("norm"), "epsilon", 0.5)),
        network.with_shifts({"logits": np.array([0.0, 0.0, 2.0**-20])}),
        loaded(chain(layers.Lambda(lambda x: x + 1, name="moved"), name="model")),
        loaded(chain(layers.Lambda(lambda x: x + 2, name="moved"), name="model")),
        loaded(chain(lambda x: ops.add(x, 1.0), name="model")),
        loaded(chain(lambda x: ops.add(x, 2.0), name="model")),
    ]
    assert len({each.digest for each in networks}) == len(networks)
    assert loaded(with_norms()).digest == network.digest


def test_where_a_class_is_defined_is_not_in_the_digest(monkeypatch):
    model = own()
    before = loaded(model).digest
    for each in (Doubled, halved):
        monkeypatch.setattr(each, "__module__", "__main__")
    assert loaded(model).digest == before


def test_where_a_function_is_registered_is_not_in_the_digest():
    def doubled(x):
        return 2 * x

    model = chain(layers.Dense(2, activation=doubled, name="last"))
    before = loaded(model).digest
    keras.saving.register_keras_serializable("scripts")(doubled)
    assert loaded(model).digest == before
