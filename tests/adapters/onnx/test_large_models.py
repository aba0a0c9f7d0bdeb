"""What is held of large models, and how the cost grows with the number of nodes."""

import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from biascorr import QuantParams, correct, equalize
from biascorr.adapters.onnx.network import OnnxNetwork
from biascorr.graph import matching

MB = 1 << 20
WIDTH, DEPTH = 1024, 32

MEMORY = """
import sys
from pathlib import Path
import numpy as np
from biascorr import correct

def status(key):
    text = Path("/proc/self/status").read_text()
    return int(text.split(key + ":")[1].split()[0]) * 1024

correct  # what is imported at first use is not what a model takes
import biascorr.adapters.onnx.network
before, data = status("VmRSS"), np.random.default_rng(0).random((8, 16, 1024), np.float32)
correction = correct(sys.argv[1], data, quantized=sys.argv[2], method=sys.argv[3])
correction.save(sys.argv[4])
print(correction.method, status("VmHWM") - before)
"""


def model(quantized, layers=DEPTH):
    """A chain of wide matrix products, as floats or in blocks of 4 bits."""
    rng = np.random.default_rng(0)
    nodes, tensors, x = [], [], "x"
    for k in range(layers):
        w = rng.standard_normal((WIDTH, WIDTH), dtype=np.float32) / np.float32(WIDTH**0.5)
        if quantized:
            scales = np.abs(w.T.reshape(WIDTH, -1, 32)).max(axis=2) / np.float32(7)
            codes = np.rint(w.T.reshape(WIDTH, -1, 32) / scales[..., None] + 8).clip(0, 15).astype(np.uint8)
            parts = {f"w{k}": codes[..., ::2] | codes[..., 1::2] << 4, f"s{k}": scales.ravel()}
            options = {"K": WIDTH, "N": WIDTH, "bits": 4, "block_size": 32, "domain": "com.microsoft"}
            nodes.append(helper.make_node("MatMulNBits", [x, *parts], [f"p{k}"], f"layer{k}", **options))
        else:
            parts = {f"w{k}": w}
            nodes.append(helper.make_node("MatMul", [x, f"w{k}"], [f"p{k}"], f"layer{k}"))
        tensors += [numpy_helper.from_array(array, name) for name, array in parts.items()]
        nodes.append(helper.make_node("Relu", [f"p{k}"], [f"r{k}"]))
        x = f"r{k}"
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", "T", WIDTH]) for name in ("x", x)]
    graph = helper.make_graph(nodes, "wide", values[:1], values[1:], tensors)
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """128 MB of float weights, in the model and beside it, and the same quantized."""
    folder = tmp_path_factory.mktemp("large")
    onnx.save(model(False), folder / "inside.onnx")
    onnx.save(model(False), folder / "beside.onnx", save_as_external_data=True, location="beside.data")
    onnx.save(model(True), folder / "quantized.onnx")
    return folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("name", "method"), [("inside", "auto"), ("beside", "empirical")])
def test_memory_is_a_small_multiple_of_the_files(name, method, files):
    out = files / f"{name}-{method}.onnx"
    arguments = [str(files / f"{name}.onnx"), str(files / "quantized.onnx"), method, str(out)]
    done = subprocess.run([sys.executable, "-c", MEMORY, *arguments], capture_output=True, text=True, check=True)
    taken, grown = done.stdout.split()[0], int(done.stdout.split()[-1])
    assert taken != "none"
    both = DEPTH * WIDTH**2 * (4 + 0.5 + 4 / 32)
    activations = 2 * 8 * 16 * WIDTH * 4 * 2
    assert grown < 2.5 * both + activations + 16 * MB, f"{grown / both:.2f} times the files"
    onnx.checker.check_model(out)


def test_weights_beside_the_model_are_read_where_they_lie(files):
    network = OnnxNetwork.load(files / "beside.onnx", "model")
    first, again = (np.asarray(network.layers[0].weights) for _ in range(2))
    assert np.shares_memory(first, again)
    assert not first.flags.writeable
    inside = OnnxNetwork.load(files / "inside.onnx", "model")
    np.testing.assert_array_equal(first, np.asarray(inside.layers[0].weights))


def test_a_copy_shares_the_weights(files):
    network = OnnxNetwork.load(files / "inside.onnx", "model")
    shifted = network.with_shifts({layer.name: np.ones(WIDTH) for layer in network.layers})
    for before, after in zip(network.layers, shifted.layers):
        assert np.shares_memory(np.asarray(before.weights), np.asarray(after.weights))
    assert len(shifted.model.graph.node) == 3 * DEPTH
    assert len(network.model.graph.node) == 2 * DEPTH


def test_quantized_weights_are_dequantized_when_they_are_read(files):
    network = OnnxNetwork.load(files / "quantized.onnx", "quantized")
    layer = network.layers[0]
    assert layer.weights.shape == (WIDTH, WIDTH)
    first, again = (np.asarray(layer.weights) for _ in range(2))
    assert not np.shares_memory(first, again)
    np.testing.assert_array_equal(first, again)
    assert np.asarray(layer.weight_step).shape == (1, WIDTH)


def blocks(count, *, quantized, renamed=False, size=4):
    """Blocks of a product, a bias, an activation and a residual."""
    rng = np.random.default_rng(1)
    nodes, tensors, x = [], [], "x"
    for k in range(count):
        w = rng.standard_normal((size, size), dtype=np.float32)
        name = f"w{k}"
        if quantized:
            step = np.float32(np.abs(w).max() / 127)
            parts = {f"q{k}": np.rint(w / step).astype(np.int8), f"s{k}": step, f"z{k}": np.int8(0)}
            nodes.append(helper.make_node("DequantizeLinear", list(parts), [name], f"dequantize{k}"))
        else:
            parts = {name: w}
        parts |= {f"b{k}": rng.standard_normal(size, dtype=np.float32)}
        tensors += [numpy_helper.from_array(np.asarray(array), key) for key, array in parts.items()]
        layer = f"other{k}" if renamed else f"layer{k}"
        nodes += [
            helper.make_node("MatMul", [x, name], [f"p{k}"], layer),
            helper.make_node("Add", [f"p{k}", f"b{k}"], [f"a{k}"], f"add{k}"),
            helper.make_node("Relu", [f"a{k}"], [f"r{k}"], f"relu{k}"),
            helper.make_node("Add", [x, f"r{k}"], [f"x{k}"], f"sum{k}"),
        ]
        x = f"x{k}"
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", size]) for name in ("x", x)]
    graph = helper.make_graph(nodes, "blocks", values[:1], values[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def operations_of(work):
    """How many functions are called, those written in C among them, by the thread that does the work."""
    count = 0

    def counted(_, event, __):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(counted)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


X = np.random.default_rng(2).random((8, 4), np.float32)
WORK = {
    "load": lambda n: (lambda m: lambda: OnnxNetwork.load(m, "model"))(blocks(n, quantized=True)),
    "mean": lambda n: (lambda f, q: lambda: correct(f, X, quantized=q, method="mean"))(
        blocks(n, quantized=False), blocks(n, quantized=True)
    ),
    "empirical of renamed layers": lambda n: (lambda f, q: lambda: correct(f, X, quantized=q, method="empirical"))(
        blocks(n, quantized=False), blocks(n, quantized=True, renamed=True)
    ),
    "activation": lambda n: (lambda f, q: lambda: correct(f, X, quantized=q, method="activation"))(
        blocks(n, quantized=False), blocks(n, quantized=True)
    ),
    "simulated": lambda n: (lambda m: lambda: correct(m, X, method="mean", quant_params=QuantParams("tf")))(
        blocks(n, quantized=False)
    ),
    "equalize": lambda n: (lambda m: lambda: equalize(m))(blocks(n, quantized=False)),
}


@pytest.mark.parametrize("name", WORK)
@pytest.mark.filterwarnings("ignore:.*made the outputs worse:UserWarning")
def test_the_cost_is_linear_in_the_number_of_nodes(name):
    """Twice the nodes take twice the operations beside a fixed part, wherever they are; a quadratic part would show."""
    WORK[name](2)()  # what is done once a process
    small, middle, large = (operations_of(WORK[name](n)) for n in (25, 50, 100))
    assert (large - middle) < 2.2 * (middle - small), (small, middle, large)


def test_layers_are_found_by_weights_without_comparing_each_with_each(monkeypatch):
    compared = []

    class Counted(matching._Comparison):
        def __init__(self, *layers):
            compared.append(layers)
            super().__init__(*layers)

    monkeypatch.setattr(matching, "_Comparison", Counted)
    reference = OnnxNetwork.load(blocks(60, quantized=False), "model").layers
    quantized = OnnxNetwork.load(blocks(60, quantized=True, renamed=True), "quantized").layers
    found = matching.match_layers(reference, quantized)
    assert {name: match.reference.name for name, match in found.items()} == {f"other{k}": f"layer{k}" for k in range(60)}
    assert len(compared) <= 6 * 60
