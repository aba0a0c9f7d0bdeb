"""What is no Keras model that can be corrected, what is missing, and what is never imported for other models."""

import os
import re
import subprocess
import sys
import types
from pathlib import Path

import keras
import numpy as np
import onnx
import pytest
import tensorflow as tf
from keras import layers

import biascorr
from biascorr import BiasCorrection, QuantParams, correct, equalize
from keras_models import (
    KERAS_WARNS,
    ROUGH,
    X,
    chain,
    corrected,
    image,
    in_process,
    layers_of,
    outputs_of,
    params_of,
    plain,
    randomized,
    sequential,
    state_of,
    with_norms,
)
from networks import quantized as quantized_onnx
from networks import two_layers

pytestmark = KERAS_WARNS

TAKE_A_MODEL = {
    "correct": lambda model: correct(model, X),
    "equalize": equalize,
    "fold_all_batch_norms": biascorr.fold_all_batch_norms,
    "find_all_convs_bn_with_activation": biascorr.find_all_convs_bn_with_activation,
    "correct_bias": lambda model: BiasCorrection.correct_bias(model, params_of(plain()), ROUGH, [X]),
}


def refused(error, message, model):
    """Asserts that all functions refuse a model like this."""
    for use in TAKE_A_MODEL.values():
        with pytest.raises(error, match=message):
            use(model)


# Models


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.conv = layers.Conv2D(4, 3, use_bias=False, name="conv")

    def call(self, x):
        return self.conv(x) * 2


def test_a_model_with_a_call_of_its_own():
    model = Subclassed()
    model(X)
    refused(TypeError, r"^\w+: Subclassed computes what its method call does, .*keras\.Model\(inputs, model\.call", model)
    inputs = image()
    functional = keras.Model(inputs, model.call(inputs))  # the advice
    assert corrected(functional).report[0].method == "mean"


class FunctionalWithCall(keras.Model):
    def call(self, x, training=None):
        return super().call(x, training=training) + 1


def test_a_functional_model_with_a_call_of_its_own():
    refused(TypeError, "FunctionalWithCall computes what its method call does", plain(kind=FunctionalWithCall))


def test_a_sequential_model_that_is_not_built():
    model = keras.Sequential([layers.Conv2D(4, 3)])
    refused(TypeError, r"^\w+: a sequential model that is not built, .* call it on a batch once$", model)
    model(X)
    assert equalize(model).model.layers[0].name == model.layers[0].name


def test_a_saved_model(tmp_path):
    plain().export(tmp_path / "exported", verbose=False)
    refused(
        TypeError,
        r"\w+: .*exported is a SavedModel, expected the model that was exported, as a \.keras or \.h5 file",
        tmp_path / "exported",
    )


def test_a_model_of_keras_2(monkeypatch):
    module = types.ModuleType("tf_keras")
    module.Model = type("Model", (), {"__module__": "tf_keras"})
    monkeypatch.setitem(sys.modules, "tf_keras", module)
    model = type("Functional", (module.Model,), {})()
    refused(
        TypeError, r"\w+: a model of tf_keras \(Keras 2\), expected one of Keras 3: save it as \.h5 and give its path", model
    )


@pytest.mark.parametrize("model", [None, 3, [plain], layers.Dense(3), keras.Input((3,)), np.ones(3), "nothing", keras.Model])
def test_what_is_no_model(model):
    with pytest.raises((OSError, TypeError, ValueError), match="model|reference"):
        equalize(model)


class Forgetful(keras.Layer):
    def __init__(self, factors):
        super().__init__(name="forgetful")
        self.factors = factors

    def call(self, x):
        return x * self.factors.max()

    def get_config(self):
        return {"name": self.name}


def test_a_layer_that_cannot_be_made_again_is_named_before_the_work():
    model = randomized(chain(layers.Conv2D(4, 3), Forgetful(np.ones(3)), layers.Conv2D(4, 3)))
    message = r"\w+: layer forgetful \(Forgetful\) cannot be made again from its get_config\(\), .* needs too: .*unexpected"
    refused(TypeError, message, model)
    inner = keras.Sequential([image(), Forgetful(np.ones(3)), layers.Conv2D(4, 3)])
    refused(TypeError, message, randomized(chain(inner)))


def test_a_model_of_text():
    inputs = keras.Input((), dtype="string", name="words")
    model = chain(layers.StringLookup(vocabulary=["a"]), layers.Embedding(3, 4), layers.Dense(2), inputs=inputs)
    for use in (equalize, biascorr.find_all_convs_bn_with_activation):
        with pytest.raises(
            ValueError, match=r"^(reference|model): input words takes text, expected a model of numbers: give the one after"
        ):
            use(model)


def test_a_model_that_keras_has_quantized():
    model = randomized(chain(layers.Conv2D(4, 3), layers.Dense(2, name="dense")))
    model.get_layer("dense").quantize("int8")
    for use in (corrected, equalize):
        with pytest.raises(
            ValueError, match=r"reference: layer dense is quantized when it runs; (give|equalize) the float model"
        ):
            use(model)


def test_a_model_without_layers():
    model = chain(layers.ReLU())
    correction = corrected(model)
    assert list(correction.report) == []
    assert correction.left is None
    np.testing.assert_array_equal(outputs_of(correction.model), outputs_of(model))
    with pytest.raises(ValueError, match="'conv' is no layer; the layers are none"):
        BiasCorrection.bias_correction_per_layer(model, model, params_of(model), "conv", [X])


def test_names_of_inputs_outputs_and_layers():
    model = plain()
    for inputs, outputs, message in (
        (["picture"], ["second"], "input_op_names: picture; the inputs of reference_model are image"),
        (["image"], ["first"], "output_op_names: first is no output of reference_model, which has second"),
    ):
        params = biascorr.BiasCorrectionParams(16, 16, 16, inputs, outputs)
        with pytest.raises(ValueError, match=message):
            BiasCorrection.correct_bias(model, params, ROUGH, [X])
    with pytest.raises(ValueError, match="'third' is no layer; the layers are first, second"):
        BiasCorrection.bias_correction_per_layer(model, model, params_of(model), "third", [X])
    with pytest.raises(ValueError, match="norm cannot be folded into first: no batch normalization of this name"):
        biascorr.fold_given_batch_norms(model, [("first", "norm")])


# Two models


def rounded(model, bits=5):
    """A copy with the weights of its layers on a grid, as somebody's own quantization has them."""
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    for layer in layers_of(copy).values():
        if hasattr(layer, "kernel"):
            kernel = layer.kernel.numpy()
            step = np.abs(kernel).max() / (2 ** (bits - 1) - 1)
            layer.kernel.assign(np.round(kernel / step) * step)
    return copy


@pytest.mark.parametrize("make", [plain, sequential], ids=["functional", "sequential"])
@pytest.mark.filterwarnings("ignore:.*made the outputs worse:UserWarning")
def test_a_model_whose_weights_somebody_rounded(make):
    model = make()
    quantized = rounded(model)
    before = [state_of(each) for each in (model, quantized)]
    correction = correct(model, X, validation=X, quantized=quantized)
    assert not correction.is_simulated
    assert correction.method != "none"
    names = [report.name for report in correction.report if report.method]
    assert len(names) > 0
    for name, layer in layers_of(correction.model).items():
        if hasattr(layer, "kernel"):
            np.testing.assert_array_equal(layer.kernel.numpy(), layers_of(quantized)[name].kernel.numpy())
    assert correction.deployed.keys() == {"none", correction.method}
    for label, score in correction.deployed.items():
        assert score.sqnr == pytest.approx(correction.scores[label].sqnr, abs=0.01)
    expected, *errors = [outputs_of(each)[0] for each in (model, quantized, correction.model)]
    assert np.square(errors[1] - expected).sum() < np.square(errors[0] - expected).sum()
    assert [state_of(each) for each in (model, quantized)] == before


def test_a_quantized_model_that_is_the_float_one():
    with pytest.raises(ValueError, match="quantized: its weights are those of the float model, and nothing in it is quantized"):
        correct(plain(), X, quantized=plain())


def test_quantized_models_of_something_else():
    other = randomized(chain(layers.Conv2D(7, 3, name="first"), name="other"))
    with pytest.raises(ValueError, match="quantized: "):
        correct(plain(), X, quantized=other)
    renamed = randomized(chain(layers.Conv2D(4, 3), inputs=image("picture")))
    with pytest.raises(ValueError, match=r"not of this float model: takes picture \(float32\), expected image \(float32\)"):
        correct(plain(), X, quantized=renamed)


def test_models_of_two_frameworks():
    model = two_layers()
    x = np.random.default_rng(0).normal(size=(4, 3, 6, 6)).astype(np.float32)
    for pair in ((plain(), quantized_onnx(model, [{"x": x}])), (model, plain())):
        with pytest.raises(ValueError, match=r"^quantized: not of this float model, but of another framework: .\w+, expected"):
            correct(pair[0], X, quantized=pair[1])


def test_options_that_need_other_models():
    with pytest.raises(ValueError, match="quant_params: only for simulated quantization"):
        correct(plain(), X, quantized=rounded(plain()), quant_params=QuantParams())
    with pytest.raises(ValueError, match="data: None, expected samples"):
        correct(plain())


# What is installed


OTHER_BACKEND = """
    import sys
    import biascorr
    try:
        biascorr.equalize(sys.argv[1])
    except (ImportError, ValueError) as error:
        print(type(error).__name__, error)
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    plain().save(folder / "model.keras")
    onnx.save(two_layers(), folder / "model.onnx")
    np.savez(folder / "x.npz", x=np.random.default_rng(0).normal(size=(4, 3, 6, 6)).astype(np.float32))
    return folder


@pytest.mark.parametrize("backend", ["numpy", "jax"])
def test_another_backend(backend, saved):
    done = in_process(OTHER_BACKEND, saved / "model.keras", KERAS_BACKEND=backend)
    message = f"ValueError reference: Keras runs by {backend!r}, expected 'tensorflow': set KERAS_BACKEND=tensorflow, or save"
    assert done.stdout.startswith(message), done


def test_another_backend_of_a_model_that_is_there(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
    with pytest.raises(
        ValueError, match=r"reference: Keras runs by 'torch', expected 'tensorflow': .*save the model as \.keras"
    ):
        equalize(plain())


MISSING = """
    import sys
    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == sys.argv[2]:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    sys.meta_path.insert(0, Blocker())
    import biascorr
    try:
        biascorr.equalize(sys.argv[1])
    except ImportError as error:
        print(error)
"""


@pytest.mark.parametrize("module", ["keras", "tensorflow"])
def test_what_is_not_installed_is_named(module, saved):
    done = in_process(MISSING, saved / "model.keras", module)
    assert f'a Keras model needs {module}: pip install "biascorr[keras]", and tensorflow or tensorflow-cpu' in done.stdout, done


UNUSED = """
    import sys
    {}
    print(*sorted({{"keras", "tensorflow"}} & set(sys.modules)))
"""
DO_NOT_NEED_IT = {
    "import": "import biascorr; biascorr.correct, biascorr.equalize, biascorr.BiasCorrection",
    "correct": "import biascorr; biascorr.correct(sys.argv[1], sys.argv[2], method='mean')",
    "equalize": "import biascorr; biascorr.equalize(sys.argv[1], sys.argv[2])",
    "help": "import biascorr.cli.app as cli; cli.app(['--help'], standalone_mode=False)",
    "an error": "import biascorr, contextlib\n    with contextlib.suppress(TypeError): biascorr.equalize(object())",
    "a missing file": "import biascorr, contextlib\n    with contextlib.suppress(OSError): biascorr.equalize('none.onnx')",
}


@pytest.mark.parametrize("name", DO_NOT_NEED_IT)
def test_tensorflow_is_not_imported_without_a_model_of_it(name, saved):
    done = in_process(UNUSED.format(DO_NOT_NEED_IT[name]), saved / "model.onnx", saved / "x.npz")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == ""


def test_the_command_line_does_not_import_tensorflow_for_a_wrong_name(saved, tmp_path):
    command = [sys.executable, "-X", "importtime", "-m", "biascorr", "equalize", str(saved / "model.keras"), "-o", "out.onnx"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path, env=os.environ)
    assert done.returncode == 1
    assert "out.onnx: expected a name that ends with .keras" in done.stderr
    assert not re.search(r"\| +(keras|tensorflow)$", done.stderr, re.MULTILINE)


def test_modules_of_the_folder_keras_are_the_only_ones_that_import_it():
    root = Path(biascorr.__file__).parent
    for path in root.rglob("*.py"):
        if "keras" not in path.parent.name:
            assert not re.search(r"^\s*(import|from) (keras|tensorflow)\b", path.read_text(), re.MULTILINE), path


def test_what_is_checked_before_the_work_leaves_no_trace():
    model = with_norms()
    before = state_of(model)
    with pytest.raises(ValueError, match="data: None"):
        correct(model)
    with pytest.raises(TypeError, match="data"):
        correct(model, object(), fold=True)
    assert state_of(model) == before
    assert tf.executing_eagerly()
