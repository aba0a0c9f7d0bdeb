"""Small Keras models for tests of what is done to them as a whole, and what there is to compare of a model."""

import hashlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers, ops

from biascorr import BiasCorrectionParams, QuantParams, correct

X = np.random.default_rng(0).normal(size=(16, 8, 8, 3)).astype(np.float32)
ROUGH = QuantParams(weight_bits=4)

KERAS_WARNS = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
"""At each variable that Keras gives to numpy 2."""


def randomized(model, seed=0):
    """The model with other values in all weights, positive ones where these are variances or factors."""
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        if variable.dtype in ("float32", "float16", "bfloat16"):
            values = rng.normal(size=variable.shape) * 0.5
            variable.assign(np.abs(values) + 0.5 if variable.path.endswith(("variance", "gamma")) else values)
    return model


def image(name="image"):
    """An input for `X`."""
    return keras.Input((8, 8, 3), name=name)


def chain(*parts, inputs=None, kind=keras.Model, name="model"):
    """A functional model of layers in a row."""
    inputs = image() if inputs is None else inputs
    y = inputs
    for part in parts:
        y = part(y)
    return kind(inputs, y, name=name)


def with_norms():
    """Two convolutions with batch normalizations before a third, and a dense layer."""
    return randomized(
        chain(
            layers.Conv2D(4, 3, padding="same", use_bias=False, name="first"),
            layers.BatchNormalization(name="norm"),
            layers.ReLU(6.0, name="relu"),
            layers.DepthwiseConv2D(3, padding="same", use_bias=False, name="depthwise"),
            layers.BatchNormalization(name="norm_2"),
            layers.ReLU(name="relu_2"),
            layers.Conv2D(5, 1, name="second"),
            layers.GlobalAveragePooling2D(name="pool"),
            layers.Dense(3, name="logits"),
        )
    )


def plain(**options):
    """Two convolutions, the first without a bias."""
    parts = layers.Conv2D(4, 3, use_bias=False, activation="relu", name="first"), layers.Conv2D(2, 3, name="second")
    return randomized(chain(*parts, **options))


def sequential(kind=keras.Sequential):
    """Layers in a row, with all that a row may have."""
    parts = [
        image(),
        layers.Conv2D(4, 3, use_bias=False, name="first"),
        layers.BatchNormalization(name="norm"),
        layers.ReLU(name="relu"),
        layers.Dropout(0.5, name="dropout"),
        layers.Conv2D(4, 3, activation="relu", name="second"),
        layers.Flatten(name="flatten"),
        layers.Dense(3, name="logits"),
    ]
    return randomized(kind(parts, name="row"))


def nested():
    """A model in a model, called twice, a layer that is called twice, operations in between, two inputs and outputs."""
    a, b = image("a"), image("b")
    inner = keras.Sequential([image("inside"), layers.Conv2D(4, 3, name="conv"), layers.ReLU(name="relu")], name="inner")
    shared = layers.Conv2D(5, 3, use_bias=False, name="shared")
    left, right = shared(inner(a)), shared(inner(ops.negative(b)))
    total = ops.mean(ops.add(left, right) * 0.5, axis=(1, 2))
    flat = layers.Flatten(name="flat")(left)
    outputs = {"sum": layers.Dense(3, name="sum")(total), "left": layers.Dense(2, name="left")(flat)}
    return randomized(keras.Model({"a": a, "b": b}, outputs, name="outer"))


NESTED_X = {"a": X, "b": X[::-1] + 1}


def corrected(model, data=X, **options):
    """The correction for weights of 4 bits, by one pass."""
    return correct(model, data, **{"quant_params": ROUGH, "method": "mean", **options})


def params_of(model, names=None):
    """All samples at once; names of the inputs and outputs of the model."""
    graph = graph_of(model)
    names = names or [each._keras_history.operation.name for each in graph.inputs]
    return BiasCorrectionParams(16, 16, 16, names, graph.output_names)


def graph_of(model):
    """The model, or the functional one in a sequential one."""
    return model._functional if isinstance(model, keras.Sequential) else model


def operations_of(model):
    """All layers and operations that a model calls, those of models inside too."""
    found = {}
    for nodes in graph_of(model)._nodes_by_depth.values():
        for node in nodes:
            found[id(node.operation)] = node.operation
            if isinstance(node.operation, keras.Model):
                found |= {id(each): each for each in operations_of(node.operation)}
    return list(found.values())


def layers_of(model):
    """All layers of a model by their names, those of models inside too."""
    return {each.name: each for each in operations_of(model) if isinstance(each, keras.Layer)}


def state_of(model):
    """All that could change in a model: nodes, configurations, values, flags, losses, what it is compiled with."""
    state = {"config": json.dumps(model.get_config(), default=repr)}
    inside = [each for each in model._flatten_layers() if each is not model]
    for operation in [model, *operations_of(model), *inside]:
        own = state[f"{operation.name} {id(operation)}"] = {
            "nodes": [list(map(id, nodes)) for nodes in (operation._inbound_nodes, operation._outbound_nodes)],
            "attributes": sorted(vars(operation)),
        }
        if isinstance(operation, keras.Layer):
            own["flags"] = (operation.trainable, operation.built, str(operation.dtype_policy))
            own["variables"] = [(id(each), each.path, each.trainable, digest(each)) for each in operation.variables]
            own["losses"] = list(map(id, operation._losses))
    if model.compiled:
        state["compiled"] = json.dumps(model.get_compile_config(), default=repr), id(model.optimizer), id(model.loss)
        state["optimizer"] = [digest(each) for each in model.optimizer.variables]
        state["metrics"] = [(id(each), [digest(v) for v in each.variables]) for each in model.metrics]
        state["functions"] = [id(getattr(model, f"{each}_function")) for each in ("train", "test", "predict")]
    return state


def digest(variable):
    """The bytes of a variable, in short."""
    return hashlib.sha256(variable.numpy().tobytes()).hexdigest()[:16]


def outputs_of(model, data=X):
    """The outputs of a model that is used, not trained."""
    graph = graph_of(model)
    data = [data] if isinstance(graph.input, list) else data
    return [ops.convert_to_numpy(each) for each in keras.tree.flatten(model(data, training=False))]


def in_process(script, *arguments, **environment):
    """Runs a script in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"} | environment,
    )
