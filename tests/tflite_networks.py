"""TFLite files by name, as networks and as LiteRT runs them, for the tests of the adapter.

"convolutions"              a float file of tflite_models.MODELS
"convolutions-int8"         it, quantized with a recipe of tflite_quantizers.RECIPES
"fixture:classifier_int8"   a file of TFLiteConverter
"""

import functools

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from biascorr.adapters.tflite.network import TfliteNetwork
from tflite_fixtures import FORMATS, images, path_of
from tflite_models import MODELS, outputs_of, samples_for, unpacked
from tflite_quantizers import CASES, quantized

FLOATS = [*MODELS, *(f"fixture:{name}_float" for name in ("classifier", "decoder", "equal_biases", "any_batch"))]
"""Names of all float files."""

QUANTIZED = [
    *(f"{model}-{recipe}" for model, recipe in CASES),
    *(f"fixture:{network}_{name}" for network in ("classifier", "decoder") for name in FORMATS),
    *(f"fixture:{network}_int8" for network in ("equal_biases", "any_batch")),
]
"""Names of all quantized files."""

SOME = [
    name
    for i, name in enumerate(QUANTIZED)
    if name.startswith("fixture:") or name.endswith("-int8") or i % 3 == 0  # 3: each recipe with each third model
]
"""Names of files with every model and every format."""


_LEFT = "int8x4", "dynamic_int4", "float16"
"""Recipes by which litert-quantizer leaves BATCH_MATMUL as it is."""

_EACH = "depthwise", "fully_connected_of_steps", "transpose_conv", "matmul_right", "matmul_left", "conv3d"
"""Models that together have each operator."""

CORRECTABLE = [name for name in QUANTIZED if not (name.startswith("matmul") and name.endswith(_LEFT))]
"""Names of files with quantized weights."""

EACH = [name for name in CORRECTABLE if name.startswith((*_EACH, "fixture:")) or name.endswith("-int8")]
"""Those with each operator in each format, and with each model in one."""


@functools.cache
def content_of(name):
    if name.startswith("fixture:"):
        return path_of(name.removeprefix("fixture:")).read_bytes()
    model, _, recipe = name.partition("-")
    content = MODELS[model]()
    return quantized(content, recipe, samples_for(content)) if recipe else content


def float_of(name):
    """The float file that a quantized one was made of."""
    if name.startswith("fixture:"):
        return content_of(name.split("_int")[0].split("_uint")[0].split("_dynamic")[0].split("_float")[0] + "_float")
    return content_of(name.partition("-")[0])


@functools.cache
def network_of(name):
    return TfliteNetwork.load(content_of(name), name)


def samples_of(name, count=4, seed=1):
    if name.startswith("fixture:"):
        return {"image": images(count, seed)}
    return samples_for(content_of(name), count, seed)


def batches(samples):
    """Feeds of one sample each."""
    return [{name: rows[i : i + 1] for name, rows in samples.items()} for i in range(len(next(iter(samples.values()))))]


def tensors_of(network, feeds, threads=1):
    """All tensors that depend on the inputs, by name."""
    wanted = [name for step in network.operations if step.is_lasting for name in step.outputs]
    return {**feeds, **network.part(feeds, wanted, threads=threads)(feeds)}


def run(network, samples, wanted=None):
    """Tensors by name, joined along the first axis, of one sample after the other."""
    wanted = network.outputs if wanted is None else wanted
    each, part = batches(samples), None
    part = network.part(each[0], wanted, threads=1)
    found = [part(feeds) for feeds in each]
    return {name: np.concatenate([np.atleast_1d(tensors[name]) for tensors in found]) for name in wanted}


def litert(content, samples, **options):
    """What LiteRT makes of a file, by the names of its outputs."""
    return outputs_of(content, samples, **options)


def called(content):
    """Names of the inputs and outputs of the first subgraph, by the tensors that they are."""
    model = unpacked(content)
    graph = model.subgraphs[0]
    ends = [int(index) for index in (*graph.inputs, *graph.outputs)]
    named = {index: graph.tensors[index].name.decode() for index in ends}
    for signature in (model.signatureDefs or [])[:1]:
        named.update({each.tensorIndex: each.name.decode() for each in (*signature.inputs, *signature.outputs)})
    return named


def kind_of(model, operator):
    """The number of an operator in the schema."""
    code = model.operatorCodes[operator.opcodeIndex]
    return max(code.builtinCode, code.deprecatedBuiltinCode)


def steps_of(content):
    """The scales of outputs of codes, or of those that outputs are dequantized from, by name; 0 where there are none."""
    model, found = unpacked(content), {}
    graph = model.subgraphs[0]
    for index, name in called(content).items():
        made = next((each for each in graph.operators if index in each.outputs), None)
        if made is not None:
            is_dequantized = kind_of(model, made) == schema.BuiltinOperator.DEQUANTIZE
            quantization = graph.tensors[made.inputs[0] if is_dequantized else index].quantization
            scale = None if quantization is None else quantization.scale
            found[name] = 0.0 if scale is None or not len(scale) else float(scale[0])
    return found
