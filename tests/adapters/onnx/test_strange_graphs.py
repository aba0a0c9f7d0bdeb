"""Random graphs in types, opsets, domains, grids and forms that are seldom seen: the result loads, and is right."""

import re
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from biascorr import correct
from biascorr.calibration.samples import scored_parts
from biascorr.correction.scoring import OutputErrors, Terms
from random_graphs import OPSETS, PROFILE, Builder, Draw

pytestmark = pytest.mark.filterwarnings("ignore:.*made the outputs worse:UserWarning")

METHODS = ("auto", "mean", "iterative", "empirical", "activation", "hybrid")
WEIGHTS = {"Conv": 0, "ConvTranspose": 1, "Gemm": None, "MatMul": None}
TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "float64": TensorProto.DOUBLE}
ACTIVATIONS = {
    "uint8": np.uint8(90), "int8": np.int8(-20), "uint8, clamped": np.uint8(0), "uint16": np.uint16(20000),
    "int4": np.array(-1, ml_dtypes.int4), "float8": np.zeros((), ml_dtypes.float8_e4m3fn),
}  # fmt: skip
STEPS = {"uint16": 2**-12, "int4": 0.5}


def typed(model: onnx.ModelProto, dtype: str) -> onnx.ModelProto:
    """The model in another type of real numbers."""
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TYPES[dtype]
    constants = [attribute.t for node in model.graph.node for attribute in node.attribute if attribute.HasField("t")]
    for tensor in (*model.graph.initializer, *constants):
        array = numpy_helper.to_array(tensor)
        if array.dtype == np.float32:
            tensor.CopyFrom(numpy_helper.from_array(array.astype(dtype), tensor.name))
    return model


class Quantizer:
    """Puts quantizers around the layers of a graph, as other tools than onnxruntime's do."""

    def __init__(self, draw: Draw, model: onnx.ModelProto, dtype: str, domain: str) -> None:
        self.draw, self.model, self.dtype, self.domain = draw, model, dtype, domain
        self.count = 0

    def constant(self, array: Any) -> str:
        self.count += 1
        self.model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), f"k{self.count}"))
        return f"k{self.count}"

    def node(self, op: str, inputs: list[str], **given: Any) -> onnx.NodeProto:
        self.count += 1
        return helper.make_node(op, inputs, [f"n{self.count}"], f"{op}_{self.count}", domain=self.domain, **given)

    def weights(self, array: np.ndarray, axis: int) -> onnx.NodeProto:
        per_channel = self.draw(st.booleans())
        others = tuple(k for k in range(array.ndim) if k != axis)
        top = self.draw(st.sampled_from([3, 7, 127]))
        step = np.abs(array.astype(np.float64)).max(axis=others if per_channel else None, initial=0) / top
        step = step.astype(self.dtype)  # 0 where all weights are 0
        aligned = step.reshape([-1 if k == axis else 1 for k in range(array.ndim)]) if per_channel else step
        codes = np.rint(np.divide(array, aligned, out=np.zeros_like(array), where=aligned > 0)).astype(np.int8)
        inputs = [self.constant(codes), self.constant(step), self.constant(np.zeros(step.shape, np.int8))]
        return self.node("DequantizeLinear", inputs, **({"axis": axis} if per_channel or self.domain else {}))

    def activation(self, tensor: str, kind: str) -> list[onnx.NodeProto]:
        parameters = [self.constant(np.array(STEPS.get(kind, 1 / 16), self.dtype)), self.constant(ACTIVATIONS[kind])]
        quantize = self.node("QuantizeLinear", [tensor, *parameters])
        return [quantize, self.node("DequantizeLinear", [quantize.output[0], *parameters])]

    def run(self, kinds: list[str]) -> onnx.ModelProto:
        made = {node.output[0]: node for node in self.model.graph.node}
        values = {tensor.name: numpy_helper.to_array(tensor) for tensor in self.model.graph.initializer}
        values |= {
            name: numpy_helper.to_array(node.attribute[0].t) for name, node in made.items() if node.op_type == "Constant"
        }
        nodes = []
        for node in self.model.graph.node:
            new = []
            if node.op_type in WEIGHTS and self.draw(st.integers(0, 3)):
                index = 0 if node.input[0] in values else 1
                w, axis = values[node.input[index]], WEIGHTS[node.op_type]
                if axis is None:
                    last = index == 1 and not (node.attribute and any(a.name == "transB" and a.i for a in node.attribute))
                    axis = w.ndim - 1 if last else w.ndim - 2
                if node.op_type == "ConvTranspose" and any(a.name == "group" and a.i > 1 for a in node.attribute):
                    axis = 0
                new = [self.weights(w, axis)]
                node.input[index] = new[0].output[0]
                kind = self.draw(st.sampled_from(kinds))
                if kind != "none":
                    new += self.activation(node.input[1 - index], kind)
                    node.input[1 - index] = new[-1].output[0]
            nodes += [*new, node]
            kind = self.draw(st.sampled_from(kinds))
            is_output = node.output[0] in {value.name for value in self.model.graph.output}
            if (
                kind != "none"
                and node.op_type not in ("Constant", "DequantizeLinear")
                and not is_output
                and self.draw(st.booleans())
            ):
                after = self.activation(node.output[0], kind)
                before, node.output[0] = node.output[0], f"{node.output[0]}_real"
                after[0].input[0], after[1].output[0] = node.output[0], before
                nodes += after
        del self.model.graph.node[:]
        self.model.graph.node.extend(nodes)
        return self.model


def strange(draw: Draw, model: onnx.ModelProto) -> None:
    """Takes names away, shuffles nodes, and hangs a branch whose tensors have names that new ones like to have."""
    if draw(st.booleans()):
        for node in model.graph.node:
            node.name = ""
    if draw(st.booleans()):
        tensor = model.graph.node[-1].output[0]
        names = [f"{tensor}_bias", f"{tensor}_before_bias"]
        inner = [helper.make_node("Shape", ["x"], [names[0]]), helper.make_node("Identity", [names[0]], [names[1]])]
        result = helper.make_tensor_value_info(names[1], TensorProto.INT64, ["r"])
        other = [helper.make_node("Shape", ["x"], ["else_out"])]
        branches = (
            helper.make_graph(inner, "then", [], [result]),
            helper.make_graph(other, "else", [], [helper.make_tensor_value_info("else_out", TensorProto.INT64, ["r"])]),
        )
        model.graph.initializer.append(numpy_helper.from_array(np.array(True), "is_then"))
        model.graph.node.append(
            helper.make_node("If", ["is_then"], ["sizes"], "branches", then_branch=branches[0], else_branch=branches[1])
        )
        model.graph.output.append(helper.make_tensor_value_info("sizes", TensorProto.INT64, ["r"]))
    if draw(st.booleans()):
        nodes = draw(st.permutations(list(model.graph.node)))
        del model.graph.node[:]
        model.graph.node.extend(nodes)


@st.composite
def examples(draw: Draw) -> tuple[onnx.ModelProto, onnx.ModelProto, np.ndarray, str]:
    opset = draw(st.sampled_from(OPSETS))
    dtypes = ["float32", "float32", *(["float16"] if opset >= 19 else []), *(["float64"] if opset >= 13 else [])]
    dtype = draw(st.sampled_from(dtypes))
    domain = "com.microsoft" if opset < 13 or (dtype != "float64" and draw(st.booleans())) else ""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = draw(st.sampled_from([(6,), (4, 7), (3, 5, 6), (1, 6, 6)]))
    builder = Builder(draw, opset, rng, {"x": shape}, draw(st.booleans()))
    (builder.conv if len(shape) > 1 else builder.gemm)("x", shape)
    for _ in range(draw(st.integers(0, 5))):
        builder.grow()
    model = builder.model([list(builder.shapes)[-1]])
    model.ir_version = 10 if opset >= 19 else model.ir_version
    typed(model, dtype)
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    kinds = ["none"] if dtype == "float64" else ["none", "uint8", "int8", "uint8, clamped"]
    kinds += ["uint16", "int4"] if opset >= 21 and not domain and dtype == "float32" else []
    kinds += ["float8"] if opset >= 19 and not domain and dtype == "float32" else []
    Quantizer(draw, twin, dtype, domain).run(kinds)
    if domain:
        twin.opset_import.append(helper.make_opsetid(domain, 1))
    strange(draw, twin)
    x = rng.normal(0.3, 1, (24, *shape)).astype(dtype)
    is_quantized = any(node.op_type == "DequantizeLinear" for node in twin.graph.node)
    if not is_quantized or not all(map(is_finite, (model, twin), (x, x))):
        reject()
    return model, twin, x, draw(st.sampled_from(METHODS))


def is_finite(model: onnx.ModelProto, x: np.ndarray) -> bool:
    """Not where onnxruntime has an operator for other types only, nor where float16 overflows."""
    try:
        return all(
            np.isfinite(array).all() for unoptimized in (True, False) for array in run(model, x, unoptimized=unoptimized)
        )
    except Exception:  # onnxruntime's have no base of their own
        return False


def run(model: onnx.ModelProto, x: np.ndarray, *, unoptimized: bool) -> list[np.ndarray]:
    return session(model, unoptimized=unoptimized).run(None, {"x": x})


def session(model: onnx.ModelProto, *, unoptimized: bool) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    if unoptimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def constants_of(model: onnx.ModelProto) -> dict[str, bytes]:
    return {tensor.name: tensor.SerializeToString() for tensor in model.graph.initializer}


NEW = re.compile(r"_(bias|biased|add_bias|before_bias|own)|^k\d+$|^c\d+_\d+$")


def check(example: tuple[onnx.ModelProto, onnx.ModelProto, np.ndarray, str]) -> None:
    model, given, x, method = example
    before = given.SerializeToString()
    correction = correct(model, x, quantized=given, method=method)
    assert given.SerializeToString() == before
    after = correction.model
    operators = [sorted(node.op_type for node in each.graph.node) for each in (given, after)]
    new = [op for op in operators[1] if op in ("Add", "DequantizeLinear", "QuantizeLinear")]
    assert [op for op in operators[1] if op not in new] == [op for op in operators[0] if op not in new]
    known, found = constants_of(given), constants_of(after)
    assert all(
        NEW.search(name) for name in {name for name in known if found.get(name) != known[name]} | (found.keys() - known.keys())
    )
    for unoptimized in (True, False):
        results = [run(each, x, unoptimized=unoptimized) for each in (given, after)]
        assert [array.shape for array in results[0]] == [array.shape for array in results[1]]
        assert all(np.isfinite(array).all() for array in results[1])
    if method != "auto" or not correction.scores:
        return
    assert not correction.scores[correction.method].is_worse_than(correction.scores["none"])
    held_out, errors = x[scored_parts([1] * len(x), 0)[0]], [OutputErrors(), OutputErrors()]
    reference, *others = (session(each, unoptimized=True) for each in (model, given, after))
    for error, other in zip(errors, others):
        for sample in held_out:
            error.add("y", Terms.of(*(each.run(None, {"x": sample[None]})[:1] for each in (reference, other))))
    assert errors[1].score.sqnr >= errors[0].score.sqnr - 0.1


@settings(PROFILE, max_examples=60)
@given(examples())
def test_strange_graphs(example: tuple[onnx.ModelProto, onnx.ModelProto, np.ndarray, str]) -> None:
    check(example)


@pytest.mark.slow
@settings(PROFILE, max_examples=300)
@given(examples())
def test_many_strange_graphs(example: tuple[onnx.ModelProto, onnx.ModelProto, np.ndarray, str]) -> None:
    check(example)
