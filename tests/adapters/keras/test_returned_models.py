"""The Keras model that is returned is the given one but for what was asked; the given one stays as it is."""

import contextlib
import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import biascorr
from biascorr import BiasCorrection, CrossLayerScaling, HighBiasFold, equalize
from keras_models import (
    KERAS_WARNS,
    NESTED_X,
    ROUGH,
    X,
    chain,
    corrected,
    graph_of,
    image,
    in_process,
    layers_of,
    nested,
    operations_of,
    outputs_of,
    params_of,
    plain,
    randomized,
    sequential,
    state_of,
    with_norms,
)

pytestmark = [
    KERAS_WARNS,
    pytest.mark.filterwarnings("ignore:not folded:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*made the outputs worse:UserWarning"),
]

ROWS = X.reshape(-1)[:480].reshape(16, 6, 5)


def rows():
    """An input for `ROWS`."""
    return keras.Input((6, 5), name="rows")


# The model that is given


def compiled(model, data=X, steps=1):
    """The model after a step of training."""
    metrics = {"sum": ["mae"]} if isinstance(graph_of(model).output, dict) else ["mae"]
    model.compile(keras.optimizers.Adam(0.01), "mse", metrics=metrics)
    targets = keras.tree.map_structure(lambda each: np.zeros((16, *each.shape[1:]), np.float32), graph_of(model).output)
    model.fit(data, targets, batch_size=16, epochs=steps, verbose=0)
    return model


class Restless(keras.Layer):
    """A layer that changes its own variables, and adds a loss, whenever it is called."""

    def __init__(self, **options):
        super().__init__(**options)
        self.seed = keras.random.SeedGenerator(1)

    def build(self, _):
        self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False, name="calls")

    def call(self, x):
        self.calls.assign(self.calls + 1.0)
        self.add_loss(ops.mean(x))
        return x + 0.01 * keras.random.normal(ops.shape(x), seed=self.seed)


def restless():
    parts = layers.Conv2D(4, 3, name="first"), Restless(name="restless"), layers.ActivityRegularization(0.1), layers.Dense(2)
    return randomized(chain(*parts))


def folded_and_scaled(model, data):  # noqa: ARG001
    folded, pairs = biascorr.fold_all_batch_norms(model)
    scaled, infos = CrossLayerScaling.scale_model(folded)
    HighBiasFold.bias_fold(scaled, pairs, infos)


def by_hand(model, data):
    infos = biascorr.find_all_convs_bn_with_activation(model)
    BiasCorrection.bias_correction_per_layer(model, model, params_of(model), "second", [data], quant_params=ROUGH)
    BiasCorrection.analytical_bias_correction_per_layer(model, "second", infos["second"], ROUGH)
    BiasCorrection.correct_bias(model, params_of(model), ROUGH, [data], infos, perform_only_empirical_bias_corr=False)
    biascorr.fold_given_batch_norms(model, [("first", "norm")])
    CrossLayerScaling.scale_cls_sets(model, [("second", "logits")])


USES = {
    "correct": lambda model, data: corrected(model, data, method="auto").model,
    "correct, folded": lambda model, data: corrected(model, data, fold=True).model,
    "equalize": lambda model, data: equalize(model, data).model,
    "equalize_model": lambda model, data: biascorr.equalize_model(model, replace_relu6=bool(data is not None)),
    "classic equalization": folded_and_scaled,
}
GIVEN = {"with norms": (with_norms, X), "sequential": (sequential, X), "nested": (nested, NESTED_X), "restless": (restless, X)}


@pytest.mark.parametrize("name", GIVEN)
def test_the_given_model_stays_as_it_is(name):
    make, data = GIVEN[name]
    model = compiled(make(), data)
    model(data)  # leaves losses behind, where layers have some
    before, losses = state_of(model), [float(each) for each in model.losses]
    for use in USES.values():
        use(model, data)
        assert state_of(model) == before
        assert [float(each) for each in model.losses] == losses
    model.fit(data, keras.tree.map_structure(np.zeros_like, model(data)), verbose=0)


def test_the_given_model_stays_as_it_is_where_layers_are_corrected_one_by_one():
    model = compiled(with_norms())
    before = state_of(model)
    by_hand(model, X)
    assert state_of(model) == before


def test_the_returned_model_shares_nothing_that_changes():
    model = compiled(with_norms())
    before = state_of(model)
    returned = corrected(model).model
    returned.fit(X, np.zeros((16, 3)), verbose=0)
    returned.trainable = False
    for variable in returned.variables:
        variable.assign(np.ones(variable.shape))
    assert state_of(model) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, ValueError])
@pytest.mark.parametrize("calls", [1, 3, 6])
def test_the_given_model_stays_as_it_is_where_something_fails(error, calls):
    model = compiled(nested(), NESTED_X)
    before, left = state_of(model), iter(range(calls))

    def progress(*_):
        if next(left, None) is None:
            raise error

    for use in (corrected, equalize):
        with contextlib.suppress(error):
            use(model, NESTED_X, progress=progress)
        assert state_of(model) == before


def test_the_given_model_stays_as_it_is_where_the_data_is_wrong():
    model = compiled(with_norms())
    before = state_of(model)
    for data in (X[:, :4], X[..., :2], [X, X[:1, :1]], np.full_like(X, np.nan), {"picture": X}):
        with pytest.raises(ValueError, match="data|sample|input|image"):
            corrected(model, data)
        assert state_of(model) == before


# The model that is returned


def same(model, returned, but=()):
    """Asserts that all layers are there, of the same classes and values, but for these."""
    before, after = layers_of(model), layers_of(returned)
    assert [each for each in before if each not in but] == [each for each in after if each not in but]
    for name in set(before) - set(but):
        assert type(after[name]) is type(before[name])
        assert after[name].trainable == before[name].trainable
        assert str(after[name].dtype_policy) == str(before[name].dtype_policy)
        if not isinstance(before[name], keras.Model):
            for source, variable in zip(before[name].variables, after[name].variables, strict=True):
                assert (variable.dtype, variable.trainable) == (source.dtype, source.trainable)
                np.testing.assert_array_equal(variable.numpy(), source.numpy())
    assert returned.name == model.name
    graphs = graph_of(model), graph_of(returned)
    for side in ("input", "output"):
        described = [keras.tree.map_structure(described_tensor, getattr(graph, side)) for graph in graphs]
        assert described[0] == described[1]
        assert type(getattr(graphs[0], side)) is type(getattr(graphs[1], side))
    assert graphs[0].output_names == graphs[1].output_names


def described_tensor(tensor):
    return tensor._keras_history.operation.name, tuple(tensor.shape), str(tensor.dtype)


def test_a_functional_model():
    model = with_norms()
    returned = corrected(model).model
    assert type(returned) is type(model)
    same(model, returned, but=("first", "depthwise", "second", "logits"))
    for name in ("first", "depthwise", "second", "logits"):
        before, after = layers_of(model)[name], layers_of(returned)[name]
        np.testing.assert_array_equal(after.kernel.numpy(), before.kernel.numpy())
        assert after.use_bias
        assert np.abs(after.bias.numpy() - (before.bias.numpy() if before.use_bias else 0)).max() > 0


def test_a_model_with_folded_batch_normalizations():
    model = with_norms()
    returned, pairs = biascorr.fold_all_batch_norms(model)
    assert pairs == [("first", "norm"), ("depthwise", "norm_2")]
    removed = {name for _, name in pairs}
    assert list(layers_of(returned)) == [name for name in layers_of(model) if name not in removed]
    same(model, returned, but=("norm", "norm_2", "first", "depthwise"))
    np.testing.assert_allclose(outputs_of(returned), outputs_of(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["functional", "sequential"])
def test_a_batch_normalization_that_makes_an_output_becomes_an_identity_of_its_name(kind):
    parts = layers.Conv2D(4, 3, name="first"), layers.BatchNormalization(name="norm")
    model = randomized(chain(*parts) if kind == "functional" else keras.Sequential([image(), *parts]))
    returned, pairs = biascorr.fold_all_batch_norms(model)
    assert pairs == [("first", "norm")]
    assert type(layers_of(returned)["norm"]) is layers.Identity
    assert graph_of(returned).output_names == ["norm"]
    assert type(returned) is type(model)
    np.testing.assert_allclose(outputs_of(returned), outputs_of(model), rtol=1e-4, atol=1e-4)


def test_a_sequential_model_stays_one():
    model = sequential()
    for returned in (corrected(model).model, equalize(model, X).model):
        assert type(returned) is keras.Sequential
        assert [each.name for each in returned.layers if each.name != "norm"] == [
            each.name for each in model.layers if each.name != "norm"
        ]


def test_a_sequential_model_becomes_a_functional_one_where_limits_need_operations():
    parts = [layers.Conv2D(4, 3, name="first"), layers.ReLU(6.0, name="relu"), layers.Conv2D(3, 3, name="second")]
    model = randomized(keras.Sequential([image(), *parts], name="row"))
    factors = np.float32([1, 4, 16, 64])  # which make it worth while
    for variable, by in ((parts[0].kernel, factors), (parts[0].bias, factors), (parts[2].kernel, 1 / factors[:, None])):
        variable.assign(variable * by)
    returned = equalize(model, X).model
    assert not isinstance(returned, keras.Sequential)
    assert returned.name == "row"
    names = [each.name for each in operations_of(returned)]
    assert set(names) == {"image", "first", "relu", "relu_limit", "second"}
    assert layers_of(returned)["relu"].max_value is None
    np.testing.assert_allclose(outputs_of(returned), outputs_of(model), rtol=1e-4, atol=1e-4)


def test_models_inside_and_shared_layers_stay_what_they_are():
    model = nested()
    returned = corrected(model, NESTED_X).model
    same(model, returned, but=("conv", "shared", "sum", "left"))
    assert isinstance(layers_of(returned)["inner"], keras.Sequential)
    assert len(layers_of(returned)["shared"]._inbound_nodes) == 2
    assert len(layers_of(returned)["inner"]._inbound_nodes) == len(layers_of(model)["inner"]._inbound_nodes)
    assert [type(each).__name__ for each in operations_of(returned)] == [type(each).__name__ for each in operations_of(model)]
    assert list(returned(NESTED_X)) == ["sum", "left"]


def test_a_sequential_model_that_was_built_by_its_first_batch():
    model = keras.Sequential([layers.Conv2D(4, 3, use_bias=False, name="first"), layers.Dense(2, name="second")])
    model(X)
    returned = corrected(model).model
    same(model, returned, but=("first", "second"))
    assert returned.inputs[0].name == model.inputs[0].name


def test_inputs_without_names_keep_those_of_their_layers_and_tensors():
    a, b = keras.Input((8, 8, 3)), keras.Input((8, 8, 3))
    model = randomized(keras.Model([a, b], layers.Conv2D(2, 3, name="conv")(a - b)))
    returned = biascorr.equalize_model(model)
    same(model, returned)
    assert [each.name for each in returned.inputs] == [each.name for each in model.inputs]


def as_list():
    x = image()
    return keras.Model([x], [layers.Conv2D(4, 3, use_bias=False, name="conv")(x)])


def with_input_as_output():
    x = image()
    y = layers.Conv2D(4, 3, use_bias=False, name="conv")(x)
    return keras.Model(x, (x, y, {"again": y}))


@pytest.mark.parametrize("make", [as_list, with_input_as_output])
def test_structures_of_inputs_and_outputs_stay(make):
    model = randomized(make())
    returned = corrected(model, [X] if make is as_list else X).model
    same(model, returned, but=("conv",))


class WithSteps(keras.Model):
    def train_step(self, data):
        return {**super().train_step(data), "mine": ops.ones(())}


class RowWithSteps(keras.Sequential):
    def train_step(self, data):
        return {**super().train_step(data), "mine": ops.ones(())}


@pytest.mark.parametrize("make", [lambda: plain(kind=WithSteps), lambda: sequential(RowWithSteps)], ids=["model", "row"])
def test_a_derived_class_that_is_made_as_its_base_stays(make):
    model = make()
    returned = corrected(model).model
    assert type(returned) is type(model)
    assert isinstance(returned, (WithSteps, RowWithSteps))
    returned.compile("sgd", "mse")
    assert "mine" in returned.fit(X, np.zeros((16, *returned.output_shape[1:])), verbose=0).history


class Own(keras.Model):
    def __init__(self, filters):
        x = image()
        super().__init__(x, layers.Conv2D(filters, 3, use_bias=False, name="first")(x), name="own")
        self.filters = filters

    def get_config(self):
        return {"filters": self.filters}


def test_a_derived_class_with_another_constructor_becomes_a_plain_model_with_a_warning():
    model = Own(4)
    with pytest.warns(UserWarning, match="own: the model that is returned is no Own, whose constructor takes something else"):
        returned = corrected(model).model
    assert type(returned) is type(plain())
    same(model, returned, but=("first",))


KINDS = {
    "LSTM": lambda: chain(layers.Dense(4, name="d"), layers.LSTM(3), layers.Dense(2), inputs=rows()),
    "Bidirectional": lambda: chain(layers.Dense(4, name="d"), layers.Bidirectional(layers.GRU(3)), inputs=rows()),
    "stateful RNN": lambda: chain(
        layers.Dense(4, name="d"), layers.GRU(3, stateful=True), inputs=keras.Input(batch_shape=(16, 6, 5), name="rows")
    ),
    "LayerNormalization": lambda: chain(layers.Dense(4, name="d"), layers.LayerNormalization(), inputs=rows()),
    "PReLU": lambda: chain(layers.Dense(4, name="d"), layers.PReLU(), layers.Dense(2), inputs=rows()),
    "TimeDistributed": lambda: chain(
        layers.TimeDistributed(layers.Dense(4, use_bias=False)), layers.TimeDistributed(layers.LayerNormalization()),
        layers.Dense(2, name="d"), inputs=rows(),
    ),
    "EinsumDense": lambda: chain(layers.EinsumDense("abc,cde->abde", (None, 2, 3), name="d"), inputs=rows()),
    "Masking": lambda: chain(layers.Masking(), layers.Dense(4, name="d"), layers.LSTM(3), inputs=rows()),
    "augmentation": lambda: chain(layers.GaussianNoise(0.1), layers.Dense(4, name="d"), layers.Dropout(0.5), inputs=rows()),
    "Lambda": lambda: chain(layers.Dense(4, name="d"), layers.Lambda(lambda t: t * 2, name="twice"), inputs=rows()),
    "mixed precision": lambda: chain(
        layers.Dense(4, name="d", dtype="mixed_bfloat16"), layers.Dense(4, use_bias=False, dtype="mixed_float16"),
        layers.Dense(2, dtype="float32"), inputs=rows(),
    ),
    "LoRA": lambda: with_lora(chain(layers.Dense(4, name="d"), layers.Dense(4, name="adapted"), inputs=rows())),
}  # fmt: skip


def with_lora(model):
    model.get_layer("adapted").enable_lora(2)
    return model


@pytest.mark.parametrize("name", KINDS)
def test_layers_of_many_kinds_are_made_again(name):
    model = randomized(KINDS[name]())
    correction = corrected(model, [ROWS])
    changed = {report.name for report in correction.report if report.method}
    assert changed
    same(model, correction.model, but=changed)
    for output, expected in zip(outputs_of(equalize(model).model, ROWS), outputs_of(model, ROWS)):
        np.testing.assert_allclose(output, expected, rtol=1e-5, atol=0.05 if name == "mixed precision" else 1e-4)


def test_an_einsum_gets_a_bias_of_its_channels():
    model = randomized(KINDS["EinsumDense"]())
    layer = layers_of(corrected(model, ROWS).model)["d"]
    assert layer.bias_axes == "de"
    assert layer.bias.shape == (2, 3)


# Weights that are no weights


def normalized():
    layer = layers.Normalization(name="normalization")
    layer.adapt(X * 3 + 1)
    return chain(layer, layers.Conv2D(4, 3, name="conv"))


def looked_up():
    layer = layers.IntegerLookup(name="lookup")
    layer.adapt(np.array([7, 7, 5, 3]))
    inputs = keras.Input((6,), name="numbers", dtype="int64")
    return chain(layer, layers.Embedding(9, 5), layers.Flatten(), layers.Dense(2, name="dense"), inputs=inputs)


def cut_up():
    layer = layers.Discretization(num_bins=4, output_mode="one_hot", name="bins")
    layer.adapt(ROWS.reshape(-1, 5))
    return chain(layer, layers.Flatten(), layers.Dense(2, name="dense"), inputs=keras.Input((5,), name="numbers"))


ADAPTED = {
    "Normalization": (normalized, X),
    "IntegerLookup": (looked_up, np.arange(96, dtype=np.int64).reshape(16, 6) % 9),
    "Discretization": (cut_up, ROWS[:, 0]),
}


@pytest.mark.parametrize("name", ADAPTED)
def test_layers_that_were_adapted_stay_so(name, tmp_path):
    make, data = ADAPTED[name]
    model = make()
    returned = biascorr.equalize_model(model)
    np.testing.assert_array_equal(outputs_of(returned, data), outputs_of(model, data))
    correction = corrected(model, data)
    correction.save(tmp_path / "out.keras")
    again = keras.saving.load_model(tmp_path / "out.keras")
    np.testing.assert_array_equal(outputs_of(again, data), outputs_of(correction.model, data))


def test_a_text_model_inside_of_a_model_of_numbers_keeps_its_words():
    """Text can be no input; but a layer that nothing but constants go through may be there."""
    words = layers.StringLookup(vocabulary=["a", "b"], name="words")
    x = image()
    offset = ops.cast(words(ops.convert_to_tensor(tf.constant(["b"]))), "float32")
    model = keras.Model(x, layers.Conv2D(2, 3, name="conv")(x + offset))
    np.testing.assert_array_equal(outputs_of(biascorr.equalize_model(model)), outputs_of(model))


# Flags


def frozen_inside(model):
    model.get_layer("inner").get_layer("conv").trainable = False


def frozen_model(model):
    model.get_layer("inner").trainable = False
    model.get_layer("sum").trainable = False


def all_but_one(model):
    model.trainable = False
    model.get_layer("sum").trainable = True


@pytest.mark.parametrize("freeze", [frozen_inside, frozen_model, all_but_one])
def test_layers_that_are_not_trained_stay_so(freeze):
    model = nested()
    freeze(model)
    returned = corrected(model, NESTED_X).model
    flags = [{name: each.trainable for name, each in layers_of(each).items()} for each in (model, returned)]
    assert flags[0] == flags[1]
    assert returned.trainable == model.trainable
    kernels = [{each.path for each in m.trainable_weights if each.name == "kernel"} for m in (model, returned)]
    assert kernels[0] == kernels[1]


def test_a_batch_normalization_that_is_frozen_stays_so():
    model = with_norms()
    model.get_layer("norm").trainable = False
    returned = compiled(corrected(model).model)
    before, after = model.get_layer("norm"), returned.get_layer("norm")
    np.testing.assert_array_equal(after.moving_mean.numpy(), before.moving_mean.numpy())
    assert np.abs(returned.get_layer("norm_2").moving_mean.numpy() - model.get_layer("norm_2").moving_mean.numpy()).max() > 0


def test_options_of_layers_stay():
    options = {"kernel_regularizer": "l2", "bias_constraint": "non_neg", "activity_regularizer": "l1"}
    model = randomized(chain(layers.Conv2D(4, 3, use_bias=False, name="first", **options), layers.Dense(2, name="second")))
    returned = corrected(model).model
    before, after = (each.get_layer("first").get_config() for each in (model, returned))
    assert after == before | {"use_bias": True}


# What it is compiled with


def test_training_goes_on_where_it_was():
    model = compiled(plain(), steps=3)
    returned = biascorr.equalize_model(model)  # nothing of its variables is new
    assert [each.path for each in returned.variables] == [each.path for each in model.variables]
    targets = np.zeros((16, 4, 4, 2))
    assert int(returned.optimizer.iterations) == 3
    for source, variable in zip(model.optimizer.variables, returned.optimizer.variables, strict=True):
        np.testing.assert_array_equal(variable.numpy(), source.numpy())
    after, expected = (each.fit(X, targets, epochs=2, verbose=0).history["loss"] for each in (returned, model))
    assert after == pytest.approx(expected, rel=1e-3)


def test_slots_of_new_biases_are_empty_and_all_others_as_they_were():
    model = compiled(plain(), steps=3)
    returned = corrected(model).model
    assert int(returned.optimizer.iterations) == 3
    before, after = ({each.path: each.numpy() for each in m.optimizer.variables} for m in (model, returned))
    new = set(after) - set(before)
    assert len(new) == 2
    assert all("first_bias" in name and not after[name].any() for name in new)
    for name in before:
        np.testing.assert_array_equal(after[name], before[name])
    assert returned.evaluate(X, np.zeros((16, 4, 4, 2)), verbose=0, return_dict=True).keys() == {"loss", "mae"}


def test_a_model_that_is_compiled_but_not_trained():
    model = plain()
    model.compile(keras.optimizers.SGD(0.125, momentum=0.5), "mse", jit_compile=False, run_eagerly=True)
    returned = corrected(model).model
    assert (float(returned.optimizer.learning_rate), returned.optimizer.momentum) == (0.125, 0.5)
    assert (returned.run_eagerly, returned.jit_compile) == (True, False)
    assert returned.optimizer is not model.optimizer


def test_a_training_that_failed_is_no_obstacle():
    model = plain()
    model.compile(keras.optimizers.Adam(), "mse")
    with contextlib.suppress(Exception):
        model.fit(X, np.zeros((16, 3, 3, 3)), verbose=0)
    assert corrected(model).model.compiled


def test_losses_and_metrics_of_the_caller_stay():
    def half(y_true, y_pred):
        return 0.5 * ops.mean(ops.square(y_true - y_pred))

    class Largest(keras.metrics.Mean):
        def update_state(self, y_true, y_pred, sample_weight=None):  # noqa: ARG002
            super().update_state(ops.max(ops.abs(y_pred)))

    model = plain()
    model.compile("adam", half, metrics=[Largest(name="largest"), lambda y_true, y_pred: ops.mean(y_pred - y_true)])
    targets = np.ones((16, 4, 4, 2), np.float32)
    expected = model.evaluate(X, targets, verbose=0)
    returned = biascorr.equalize_model(model)
    assert returned.evaluate(X, targets, verbose=0) == pytest.approx(expected, rel=1e-5)
    assert model.evaluate(X, targets, verbose=0) == pytest.approx(expected, rel=1e-5)


class WithCompile(keras.Model):
    def compile(self, *, temperature):
        super().compile("adam", "mse")
        self.temperature = temperature


def test_a_model_that_is_compiled_in_its_own_way_is_returned_with_a_warning():
    model = plain(kind=WithCompile)
    model.compile(temperature=2.0)
    with pytest.warns(UserWarning, match="reference: compile the model that is returned yourself: .*temperature|unexpected"):
        returned = corrected(model).model
    assert type(returned) is WithCompile
    returned.compile(temperature=2.0)


def test_a_model_that_is_not_compiled_stays_so():
    assert not corrected(plain()).model.compiled


# Use


@pytest.mark.parametrize("name", GIVEN)
def test_the_returned_model_works(name):
    make, data = GIVEN[name]
    model = make()
    for returned in (corrected(model, data).model, equalize(model, data).model):
        returned.summary(print_fn=lambda *_, **__: None)
        compiled(returned, data)
        predicted = keras.tree.flatten(returned.predict(data, verbose=0))
        assert [each.shape for each in predicted] == [each.shape for each in outputs_of(model, data)]
        clone = keras.models.clone_model(returned)
        clone.set_weights(returned.get_weights())


RELOADED = """
    import sys
    from pathlib import Path
    import keras, numpy as np
    for path in map(Path, sys.argv[1:]):
        model = keras.saving.load_model(path / "by_us.keras")
        with np.load(path / "x.npz") as file:
            data = dict(file) if len(file.files) > 1 else file[file.files[0]]
        np.savez(path / "y.npz", *map(np.array, keras.tree.flatten(model(data))))
    assert "biascorr" not in sys.modules
"""
SAVED = list(itertools.product(("correct", "equalize"), ("with norms", "sequential", "nested")))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders with a returned model, its samples and its outputs in another process, and its outputs in this one, by case."""
    found = {}
    for use, name in SAVED:
        (make, data), folder = GIVEN[name], tmp_path_factory.mktemp("saved")
        result = equalize(make(), data) if use == "equalize" else corrected(make(), data)
        result.save(folder / "by_us.keras")
        result.model.save(folder / "by_keras.keras")
        np.savez(folder / "x.npz", **(data if isinstance(data, dict) else {"x": data}))
        found[use, name] = folder, outputs_of(result.model, data)
    done = in_process(RELOADED, *(folder for folder, _ in found.values()))
    assert done.returncode == 0, done.stderr
    return found


@pytest.mark.parametrize(("use", "name"), SAVED)
def test_saved_models_are_the_same_when_they_are_loaded(use, name, saved):
    folder, expected = saved[use, name]
    for file in ("by_us.keras", "by_keras.keras"):
        for output, each in zip(outputs_of(keras.saving.load_model(folder / file), GIVEN[name][1]), expected, strict=True):
            np.testing.assert_array_equal(output, each)
    with np.load(folder / "y.npz") as file:
        for output, each in zip(file.values(), expected, strict=True):
            np.testing.assert_allclose(output, each, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_returned_model_can_be_converted_for_litert():
    from ai_edge_litert.interpreter import Interpreter

    returned = equalize(with_norms(), X).model
    content = tf.lite.TFLiteConverter.from_keras_model(returned).convert()
    interpreter = Interpreter(model_content=content)
    (source,), (target,) = interpreter.get_input_details(), interpreter.get_output_details()
    interpreter.resize_tensor_input(source["index"], X.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(source["index"], X)
    interpreter.invoke()
    np.testing.assert_allclose(interpreter.get_tensor(target["index"]), outputs_of(returned)[0], rtol=1e-3, atol=1e-3)
