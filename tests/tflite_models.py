"""Small .tflite files, made by the object API of the schema alone, and what LiteRT makes of a file.

`MODELS` has float files by name: together, each operator that is a layer in each of its forms. `UNSUPPORTED` has files with
what cannot be corrected.
"""

import math

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter

_TYPES = {
    np.dtype(name): getattr(schema.TensorType, name.upper())
    for name in ("float32", "float16", "int8", "uint8", "int16", "int32", "int64", "bool")
}
_OPTIONS = {name.upper(): name for name in vars(schema.BuiltinOptions)}
_OPTIONS_OF = {
    "AVERAGE_POOL_2D": "Pool2DOptions",
    "MAX_POOL_2D": "Pool2DOptions",
    "MEAN": "ReducerOptions",
    "MINIMUM": "MaximumMinimumOptions",
    "SUM": "ReducerOptions",
}
ALIGNMENT = 16
"""Of buffers."""


class _AlignedBuffer(schema.BufferT):
    def Pack(self, builder):  # noqa: N802
        vector = None
        if self.data is not None:
            builder.StartVector(1, len(self.data), ALIGNMENT)
            builder.head -= len(self.data)
            builder.Bytes[builder.head : builder.head + len(self.data)] = self.data.tobytes()
            vector = builder.EndVector()
        schema.BufferStart(builder)
        if vector is not None:
            schema.BufferAddData(builder, vector)
        schema.BufferAddOffset(builder, self.offset)
        schema.BufferAddSize(builder, self.size)
        return schema.BufferEnd(builder)


class Builder:
    """A .tflite file that is written operator by operator.

    Tensors are numbers in the subgraph that is being written. Operators are named by their outputs: `name`, else their kind and
    a number. What is computed from an input of any batch has any batch.
    """

    def __init__(self, seed=0):
        self.rng = np.random.default_rng(seed)
        self.model = schema.ModelT(3, [], [], "", [_AlignedBuffer()], None, [], [])
        self.subgraph("main")

    def subgraph(self, name):
        """Begins another subgraph, which what follows goes to."""
        self.graph = schema.SubGraphT([], [], [], [], name)
        self.names = {}
        self.model.subgraphs.append(self.graph)

    def shape(self, tensor):
        return tuple(self.graph.tensors[tensor].shape)

    def any_batch(self, tensor):
        return self.graph.tensors[tensor].shapeSignature is not None

    def tensor(self, name, shape, dtype=np.float32, any_batch=False, buffer=0):
        signature = [-1, *shape[1:]] if any_batch else None
        shape, kind = [int(size) for size in shape], _TYPES[np.dtype(dtype)]
        self.graph.tensors.append(
            schema.TensorT(shape, kind, buffer, name, schema.QuantizationParametersT(), shapeSignature=signature, hasRank=True)
        )
        return len(self.graph.tensors) - 1

    def input(self, name, shape, any_batch=False, dtype=np.float32):
        """A tensor that signatures call by this name."""
        tensor = self.tensor(f"serving_default_{name}:0", shape, dtype, any_batch)
        self.graph.inputs.append(tensor)
        self.names[tensor] = name
        return tensor

    def output(self, tensor, name):
        self.graph.outputs.append(tensor)
        self.names[tensor] = name

    def signature(self, key="serving_default"):
        """Gives the inputs and outputs of the subgraph their names."""
        inputs, outputs = (
            [schema.TensorMapT(self.names[tensor], tensor) for tensor in tensors]
            for tensors in (self.graph.inputs, self.graph.outputs)
        )
        index = next(i for i, graph in enumerate(self.model.subgraphs) if graph is self.graph)
        self.model.signatureDefs.append(schema.SignatureDefT(inputs, outputs, key, index))

    def metadata(self, name, content):
        self.model.metadata.append(schema.MetadataT(name, self._buffer(content)))

    def _buffer(self, content):
        self.model.buffers.append(_AlignedBuffer(np.frombuffer(content, np.uint8)))
        return len(self.model.buffers) - 1

    def constant(self, array, name=None, buffer_of=None, scale=None, axis=0):
        """A constant tensor; in the buffer of another one if that is given; of symmetric codes if there is a scale."""
        array = np.asarray(array)
        buffer = self._buffer(array.tobytes()) if buffer_of is None else self.graph.tensors[buffer_of].buffer
        tensor = self.tensor(name or f"constant_{len(self.graph.tensors)}", array.shape, array.dtype, buffer=buffer)
        if scale is not None:
            scale = np.atleast_1d(np.float32(scale))
            quantization = schema.QuantizationParametersT(None, None, scale, np.zeros(len(scale), np.int64), 0, None, axis)
            self.graph.tensors[tensor].quantization = quantization
        return tensor

    def weights(self, *shape, fan_in=None, name=None):
        """A constant of random weights, of output channels along the first axis unless `fan_in` is given."""
        values = self.rng.normal(size=shape) / math.sqrt(fan_in or math.prod(shape[1:]))
        return self.constant(values.astype(np.float32), name)

    def bias(self, channels, name=None):
        return self.constant(self.rng.normal(0, 0.3, channels).astype(np.float32), name)

    def sparse(self, array, name=None):
        """A constant matrix that is kept as the nonzero values of its rows."""
        rows, columns = np.nonzero(array)
        tensor = self.constant(array[rows, columns], name)
        segments = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(array)))]).astype(np.int32)
        vectors = [schema.Int32VectorT(vector) for vector in (segments, columns.astype(np.int32))]
        kind = schema.SparseIndexVector.Int32Vector
        compressed = schema.DimensionMetadataT(schema.DimensionType.SPARSE_CSR, 0, kind, vectors[0], kind, vectors[1])
        dense = schema.DimensionMetadataT(schema.DimensionType.DENSE, len(array))
        self.graph.tensors[tensor].sparsity = schema.SparsityParametersT([0, 1], None, [dense, compressed])
        self.graph.tensors[tensor].shape = list(array.shape)
        return tensor

    def op(self, kind, inputs, *shapes, name=None, dtype=np.float32, custom=None, version=1, **options):
        """Any operator, by its name in the schema and with the schema's options; an input of -1 is left out.

        Returns its output, or a list of them where there are several shapes.
        """
        name = name or f"{kind.lower()}_{len(self.graph.operators)}"
        any_batch = any(self.any_batch(tensor) for tensor in inputs if tensor >= 0)
        outputs = [
            self.tensor(name + (f"_{i}" if i else ""), shape, dtype, any_batch and len(shape) > 0)
            for i, shape in enumerate(shapes)
        ]
        operator = schema.OperatorT(self._code(kind, custom, version), list(inputs), outputs)
        union = _OPTIONS_OF.get(kind) or _OPTIONS.get(kind.replace("_", "") + "OPTIONS")
        if union:
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, union)
            operator.builtinOptions = getattr(schema, union + "T")(**options)
        self.graph.operators.append(operator)
        return outputs if len(shapes) > 1 else outputs[0]

    def _code(self, kind, custom, version):
        code = getattr(schema.BuiltinOperator, kind)
        wanted = schema.OperatorCodeT(min(code, 127), custom, version, code)
        for i, present in enumerate(self.model.operatorCodes):
            if vars(present) == vars(wanted):
                return i
        self.model.operatorCodes.append(wanted)
        return len(self.model.operatorCodes) - 1

    def conv2d(self, x, weights, bias=None, *, strides=(1, 1), dilation=(1, 1), padding="SAME", activation="NONE", name=None):
        """Weights are (O, H, W, I); fewer I than channels of `x` make groups."""
        channels, *kernel, _ = self.shape(weights)
        shape = (self.shape(x)[0], *_positions(self.shape(x)[1:3], kernel, strides, dilation, padding), channels)
        options = _spatial(strides, padding) | _dilation(dilation) | _fused(activation)
        return self.op("CONV_2D", _present(x, weights, bias), shape, name=name, **options)

    def depthwise(
        self, x, weights, bias=None, *, strides=(1, 1), dilation=(1, 1), padding="SAME", activation="NONE", name=None
    ):
        """Weights are (1, H, W, I M), for M output channels of each of I."""
        _, *kernel, channels = self.shape(weights)
        shape = (self.shape(x)[0], *_positions(self.shape(x)[1:3], kernel, strides, dilation, padding), channels)
        options = _spatial(strides, padding) | _dilation(dilation) | _fused(activation)
        multiplier = channels // self.shape(x)[-1]
        return self.op("DEPTHWISE_CONV_2D", _present(x, weights, bias), shape, name=name, depthMultiplier=multiplier, **options)

    def transpose_conv(self, x, weights, bias=None, *, strides=(2, 2), padding="SAME", activation="NONE", name=None):
        """Weights are (O, H, W, I)."""
        channels, *kernel, _ = self.shape(weights)
        batch, *positions, _ = self.shape(x)
        overlap = [max(k - s, 0) if padding == "VALID" else 0 for k, s in zip(kernel, strides)]
        shape = (batch, *(n * s + more for n, s, more in zip(positions, strides, overlap)), channels)
        inputs = _present(self._sizes(x, shape), weights, x, bias)
        options = _spatial(strides, padding) | _fused(activation)
        return self.op("TRANSPOSE_CONV", inputs, shape, name=name, version=1 if bias is None else 3, **options)

    def _sizes(self, x, shape):
        """The shape as a tensor; one that is computed, as the converter has it, where any batch goes."""
        if not self.any_batch(x):
            return self.constant(np.int32(shape))
        sizes = self.op("SHAPE", [x], (4,), dtype=np.int32, outType=schema.TensorType.INT32)
        bounds = [self.constant(np.int32([bound])) for bound in (0, 1, 1)]
        batch = self.op("STRIDED_SLICE", [sizes, *bounds], (), dtype=np.int32, shrinkAxisMask=1)
        others = [self.constant(np.int32(size)) for size in shape[1:]]
        sizes = self.op("PACK", [batch, *others], (4,), dtype=np.int32, valuesCount=4)
        for tensor in self.graph.tensors[-9:]:
            tensor.shapeSignature = None
        return sizes

    def conv3d(self, x, weights, bias=None, *, strides=(1, 1, 1), padding="SAME", activation="NONE", name=None):
        """Weights are (D, H, W, I, O)."""
        *kernel, _, channels = self.shape(weights)
        shape = (self.shape(x)[0], *_positions(self.shape(x)[1:4], kernel, strides, (1, 1, 1), padding), channels)
        options = _spatial(strides[1:], padding) | _fused(activation) | {"strideD": strides[0]}
        return self.op("CONV_3D", _present(x, weights, bias), shape, name=name, **options)

    def fully_connected(self, x, weights, bias=None, *, keep_dims=False, activation="NONE", name=None):
        """Weights are (O, I); the sizes of `x` are flattened to rows of I."""
        channels, inputs = self.shape(weights)
        shape = self.shape(x)[:-1] if keep_dims else (math.prod(self.shape(x)) // inputs,)
        inputs = [x, weights, -1 if bias is None else bias]  # as the converter has it
        return self.op("FULLY_CONNECTED", inputs, (*shape, channels), name=name, keepNumDims=keep_dims, **_fused(activation))

    def matmul(self, a, b, *, adj_x=False, adj_y=False, name=None):
        a_shape, b_shape = self.shape(a), self.shape(b)
        rows, columns = a_shape[-1 if adj_x else -2], b_shape[-2 if adj_y else -1]
        shape = (*np.broadcast_shapes(a_shape[:-2], b_shape[:-2]), rows, columns)
        return self.op("BATCH_MATMUL", [a, b], shape, name=name, adjX=adj_x, adjY=adj_y)

    def unary(self, kind, x, name=None, **options):
        """RELU, RELU6, HARD_SWISH, LOGISTIC, TANH, SOFTMAX and whatever else keeps the shape."""
        return self.op(kind, [x], self.shape(x), name=name, **options)

    def leaky_relu(self, x, alpha=0.2, name=None):
        return self.unary("LEAKY_RELU", x, name, alpha=alpha)

    def prelu(self, x, name=None):
        slopes = self.constant(self.rng.uniform(0, 0.5, (1, 1, self.shape(x)[-1])).astype(np.float32))
        return self.op("PRELU", [x, slopes], self.shape(x), name=name)

    def softmax(self, x, name=None):
        return self.unary("SOFTMAX", x, name, beta=1.0)

    def binary(self, kind, a, b, name=None, **options):
        return self.op(kind, [a, b], np.broadcast_shapes(self.shape(a), self.shape(b)), name=name, **options)

    def add(self, a, b, activation="NONE", name=None):
        return self.binary("ADD", a, b, name, **_fused(activation))

    def mul(self, a, b, activation="NONE", name=None):
        return self.binary("MUL", a, b, name, **_fused(activation))

    def minimum(self, a, b, name=None):
        return self.binary("MINIMUM", a, b, name)

    def mean(self, x, axes=(1, 2), keep_dims=False, name=None):
        sizes = [1 if axis in axes else size for axis, size in enumerate(self.shape(x)) if keep_dims or axis not in axes]
        return self.op("MEAN", [x, self.constant(np.int32(axes))], sizes, name=name, keepDims=keep_dims)

    def pool(self, kind, x, size=2, padding="VALID", activation="NONE", name=None):
        """AVERAGE_POOL_2D or MAX_POOL_2D."""
        batch, *positions, channels = self.shape(x)
        shape = (batch, *_positions(positions, (size, size), (size, size), (1, 1), padding), channels)
        options = _spatial((size, size), padding) | _fused(activation)
        return self.op(kind, [x], shape, name=name, filterWidth=size, filterHeight=size, **options)

    def pad(self, x, amounts, name=None):
        shape = [before + size + after for (before, after), size in zip(amounts, self.shape(x))]
        return self.op("PAD", [x, self.constant(np.int32(amounts))], shape, name=name)

    def reshape(self, x, shape, name=None):
        """The first size is that of `x` where it takes any batch."""
        shape = (self.shape(x)[0], *shape[1:]) if self.any_batch(x) else shape
        target = np.int32([-1, *shape[1:]]) if self.any_batch(x) else np.int32(shape)
        return self.op("RESHAPE", [x, self.constant(target)], shape, name=name, newShape=target)

    def concatenation(self, tensors, axis=-1, name=None):
        shape = list(self.shape(tensors[0]))
        shape[axis] = sum(self.shape(tensor)[axis] for tensor in tensors)
        return self.op("CONCATENATION", tensors, shape, name=name, axis=axis % len(shape), **_fused("NONE"))

    def dequantize(self, tensor, name=None):
        return self.unary("DEQUANTIZE", tensor, name)

    def bytes(self, behind=False):
        return packed(self.model, behind)


def packed(model, behind=False):
    """The file of a model; with all buffers behind the flatbuffer, if asked for, as the converter writes large files."""
    contents = [buffer.data for buffer in model.buffers]
    places = [(ALIGNMENT, len(data)) if behind and data is not None else (0, 0) for data in contents]
    for _ in range(2):  # the size of the flatbuffer does not depend on the places
        model.buffers = [_AlignedBuffer(None if place[0] else data, *place) for data, place in zip(contents, places)]
        builder = flatbuffers.Builder()
        builder.Finish(model.Pack(builder), b"TFL3")
        content = bytearray(builder.Output())
        for i, (place, _) in enumerate(places):
            if place:
                content += bytes(-len(content) % ALIGNMENT)
                places[i] = len(content), len(contents[i])
                content += contents[i].tobytes()
    model.buffers = [_AlignedBuffer(data) for data in contents]
    return bytes(content)


def unpacked(content):
    """The model of a file, to be changed and packed again."""
    model = schema.ModelT.InitFromPackedBuf(content)
    for i, buffer in enumerate(model.buffers):
        behind = np.frombuffer(content, np.uint8, buffer.size, buffer.offset) if buffer.offset > 1 else None
        model.buffers[i] = _AlignedBuffer(buffer.data if behind is None else behind)
    return model


def deduplicated(content):
    """The file with one buffer where several are equal, as the converter has it."""
    model = unpacked(content)
    first = {}
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            data = model.buffers[tensor.buffer].data
            if data is not None:
                tensor.buffer = first.setdefault(data.tobytes(), tensor.buffer)
    return packed(model)


def of_uint8(content):
    """The file with uint8 in place of int8, as TensorFlow 1 made them; without weights per channel."""
    model = unpacked(content)
    changed = [tensor for tensor in model.subgraphs[0].tensors if tensor.type == schema.TensorType.INT8]
    for tensor in changed:
        tensor.type, tensor.quantization.zeroPoint = schema.TensorType.UINT8, np.asarray(tensor.quantization.zeroPoint) + 128
    for index in {tensor.buffer for tensor in changed}:
        codes = model.buffers[index].data
        model.buffers[index].data = None if codes is None else codes.view(np.uint8) ^ np.uint8(128)
    return packed(model)


def _present(*inputs):
    return [tensor for tensor in inputs if tensor is not None]


def _positions(sizes, kernel, strides, dilation, padding):
    reach = [0 if padding == "SAME" else (k - 1) * d for k, d in zip(kernel, dilation)]
    return [-(-(size - r) // s) for size, r, s in zip(sizes, reach, strides)]


def _spatial(strides, padding):
    return {"padding": getattr(schema.Padding, padding), "strideH": strides[0], "strideW": strides[1]}


def _dilation(dilation):
    return {"dilationHFactor": dilation[0], "dilationWFactor": dilation[1]}


def _fused(activation):
    return {"fusedActivationFunction": getattr(schema.ActivationFunctionType, activation)}


def ends(interpreter):
    """Details of the inputs and of the outputs, by the names that the signature has for them, else those of their tensors."""
    if interpreter.get_signature_list():
        runner = interpreter.get_signature_runner(next(iter(interpreter.get_signature_list())))
        return runner.get_input_details(), runner.get_output_details()
    return tuple(
        {end["name"]: end for end in side} for side in (interpreter.get_input_details(), interpreter.get_output_details())
    )


def samples_for(content, count=8, seed=0):
    """Values for each input, in (-0.5, 1.5), whatever the dtype of the input."""
    rng = np.random.default_rng(seed)
    inputs, _ = ends(Interpreter(model_content=content))
    return {name: rng.uniform(-0.5, 1.5, (count, *end["shape"][1:])).astype(np.float32) for name, end in sorted(inputs.items())}


def outputs_of(content, samples, **options):
    """Real outputs by name, for real inputs by name, of a file as LiteRT runs it sample by sample."""
    interpreter = Interpreter(model_content=content, num_threads=1, **options)
    interpreter.allocate_tensors()
    inputs, outputs = ends(interpreter)
    rows = {name: [] for name in outputs}
    for i in range(len(next(iter(samples.values())))):
        for name, end in inputs.items():
            interpreter.set_tensor(end["index"], _codes(samples[name][i : i + 1], end))
        interpreter.invoke()
        for name, end in outputs.items():
            rows[name].append(_reals(interpreter.get_tensor(end["index"]), end))
    return {name: np.concatenate(values) for name, values in rows.items()}


def _codes(values, end):
    if end["dtype"] == np.float32:
        return values
    scale, zero_point = end["quantization"]
    limits = np.iinfo(end["dtype"])
    return np.clip(np.rint(values / scale) + zero_point, limits.min, limits.max).astype(end["dtype"])


def _reals(values, end):
    scale, zero_point = end["quantization"]
    return values if end["dtype"] == np.float32 else ((values.astype(np.float32) - zero_point) * scale).astype(np.float32)


MODELS = {}
"""Functions that make float files that LiteRT runs, by name: of `any_batch`, `signature` (None: without one), `behind`."""
UNSUPPORTED = {}
"""The same for files with what cannot be corrected; LiteRT knows none of their custom operators."""


def _file(*shapes, among=MODELS):
    """Makes a function from a builder and inputs of these shapes to outputs, maybe by name, one that makes a file."""

    def kept(body):
        def make(any_batch=False, signature="serving_default", behind=False):
            builder = Builder()
            names = ["image", "other"]
            inputs = [builder.input(name, shape, any_batch) for name, shape in zip(names, shapes)]
            outputs = body(builder, *inputs)
            for name, tensor in (outputs if isinstance(outputs, dict) else {"output": outputs}).items():
                builder.output(tensor, name)
            if signature:
                builder.signature(signature)
            return builder.bytes(behind)

        among[body.__name__] = make
        return make

    return kept


@_file((1, 8, 8, 3))
def convolutions(b, x):
    y = b.conv2d(x, b.weights(8, 3, 3, 3), b.bias(8), strides=(2, 2), activation="RELU6", name="first")
    y = b.conv2d(y, b.weights(6, 3, 2, 8), b.bias(6), dilation=(1, 2), padding="VALID", name="second")
    y = b.conv2d(b.unary("RELU", y), b.weights(8, 1, 1, 6), b.bias(8), activation="RELU", name="third")
    return b.conv2d(y, b.weights(4, 2, 2, 8), b.bias(4), strides=(1, 2), name="fourth")


@_file((1, 8, 8, 4))
def grouped(b, x):
    y = b.conv2d(x, b.weights(8, 3, 3, 2), b.bias(8), activation="RELU", name="groups_of_2")
    return b.conv2d(y, b.weights(5, 1, 1, 8), b.bias(5), name="last")


@_file((1, 8, 8, 3))
def depthwise(b, x):
    y = b.depthwise(x, b.weights(1, 3, 3, 3, fan_in=9), b.bias(3), activation="RELU6", name="one")
    y = b.depthwise(y, b.weights(1, 3, 3, 6, fan_in=9), b.bias(6), strides=(2, 2), activation="RELU", name="two")
    y = b.depthwise(y, b.weights(1, 2, 2, 18, fan_in=4), b.bias(18), dilation=(2, 2), padding="VALID", name="three")
    return b.conv2d(y, b.weights(4, 1, 1, 18), b.bias(4), name="pointwise")


@_file((1, 4, 4, 4))
def fully_connected(b, x):
    y = b.fully_connected(x, b.weights(16, 64), b.bias(16), activation="RELU", name="flattening")
    y = b.fully_connected(y, b.weights(12, 16), activation="RELU6", name="without_bias")
    return b.softmax(b.fully_connected(y, b.weights(5, 12), b.bias(5), name="logits"), name="probabilities")


@_file((1, 6, 8))
def fully_connected_of_steps(b, x):
    y = b.fully_connected(x, b.weights(10, 8), b.bias(10), keep_dims=True, activation="RELU", name="kept")
    y = b.fully_connected(y, b.weights(8, 10), keep_dims=True, name="kept_without_bias")
    y = b.fully_connected(b.unary("TANH", y), b.weights(7, 8), b.bias(7), name="rows")
    return b.reshape(y, (1, 6, 7), name="steps")


@_file((1, 4, 4, 6))
def transpose_conv(b, x):
    y = b.transpose_conv(x, b.weights(5, 3, 3, 6), b.bias(5), activation="RELU", name="same")
    y = b.transpose_conv(y, b.weights(4, 3, 2, 5), padding="VALID", strides=(2, 1), name="valid")
    return b.conv2d(b.unary("RELU", y), b.weights(3, 1, 1, 4), b.bias(3), name="last")


@_file((1, 6, 8))
def matmul_right(b, x):
    y = b.add(b.matmul(x, b.weights(8, 10, fan_in=8), name="plain"), b.bias(10), activation="RELU", name="plain_biased")
    y = b.add(b.matmul(y, b.weights(1, 7, 10, fan_in=10), adj_y=True, name="adj"), b.bias(7), name="adj_biased")
    return b.matmul(b.unary("TANH", y), b.weights(7, 5, fan_in=7), name="without_bias")


@_file((1, 6, 8))
def matmul_left(b, x):
    bias = b.constant(np.float32([[0.1], [-0.2], [0.3], [0.1], [-0.1]]))
    y = b.add(b.matmul(b.weights(1, 5, 6), x, name="plain"), bias, activation="RELU", name="plain_biased")
    return b.matmul(b.weights(1, 5, 4, fan_in=5), y, adj_x=True, name="adj")


@_file((1, 6, 8))
def attention(b, x):
    q, k, v = (b.fully_connected(x, b.weights(8, 8), b.bias(8), keep_dims=True, name=name) for name in "qkv")
    scores = b.matmul(q, k, adj_y=True, name="scores")
    y = b.matmul(b.softmax(scores), v, name="mixed")
    return b.add(x, b.fully_connected(y, b.weights(8, 8), b.bias(8), keep_dims=True, name="projected"), name="sum")


@_file((1, 4, 6, 6, 2))
def conv3d(b, x):
    y = b.conv3d(x, b.weights(2, 3, 3, 2, 5, fan_in=36), b.bias(5), activation="RELU", name="first")
    y = b.conv3d(y, b.weights(2, 2, 2, 5, 3, fan_in=40), strides=(1, 2, 2), padding="VALID", name="second")
    return b.fully_connected(b.mean(y, (1, 2, 3)), b.weights(4, 3), b.bias(4), name="logits")


@_file((1, 6, 6, 3))
def activations(b, x):
    kinds = ["RELU", "RELU6", "RELU_N1_TO_1", "HARD_SWISH", "LOGISTIC", "TANH", "ELU", "GELU"]
    layers = [
        b.conv2d(x, b.weights(4, 3, 3, 3), b.bias(4), name=f"before_{kind.lower()}") for kind in [*kinds, "leaky", "prelu"]
    ]
    outputs = [b.unary(kind, layer) for kind, layer in zip(kinds, layers)]
    outputs += [b.leaky_relu(layers[-2]), b.prelu(layers[-1])]
    return b.conv2d(b.concatenation(outputs), b.weights(4, 1, 1, 40), b.bias(4), name="last")


@_file((1, 8, 8, 4))
def residual(b, x):
    y = b.conv2d(x, b.weights(16, 1, 1, 4), b.bias(16), activation="RELU6", name="expanded")
    y = b.depthwise(y, b.weights(1, 3, 3, 16, fan_in=9), b.bias(16), activation="RELU6", name="depthwise")
    y = b.add(x, b.conv2d(y, b.weights(4, 1, 1, 16), b.bias(4), name="projected"), activation="RELU", name="sum")
    y = b.mean(b.conv2d(y, b.weights(8, 3, 3, 4), b.bias(8), strides=(2, 2), activation="RELU", name="head"))
    return b.fully_connected(y, b.weights(5, 8), b.bias(5), name="logits")


@_file((1, 8, 8, 3))
def squeezed(b, x):
    x = b.conv2d(x, b.weights(8, 3, 3, 3), b.bias(8), name="stem")
    x = b.mul(x, b.unary("LOGISTIC", x), name="swish")
    y = b.conv2d(b.mean(x, keep_dims=True), b.weights(4, 1, 1, 8), b.bias(4), activation="RELU", name="squeeze")
    y = b.unary("LOGISTIC", b.conv2d(y, b.weights(8, 1, 1, 4), b.bias(8), name="excite"))
    return b.conv2d(b.mul(x, y, name="scaled"), b.weights(4, 1, 1, 8), b.bias(4), name="last")


@_file((1, 9, 9, 3))
def pooling(b, x):
    y = b.conv2d(x, b.weights(8, 3, 3, 3), b.bias(8), activation="RELU", name="first")
    y = b.pool("MAX_POOL_2D", b.pad(y, [(0, 0), (1, 0), (0, 1), (0, 0)]))
    y = b.conv2d(y, b.weights(6, 3, 3, 8), b.bias(6), name="second")
    return b.fully_connected(b.pool("AVERAGE_POOL_2D", y, 5, activation="RELU"), b.weights(4, 6), b.bias(4), name="logits")


@_file((1, 8, 8, 3))
def scaled_relu6(b, x):
    y = b.conv2d(x, b.weights(8, 3, 3, 3), b.bias(8), activation="RELU", name="first")
    y = b.minimum(y, b.constant(np.linspace(0.5, 2, 8, dtype=np.float32)))
    return b.conv2d(y, b.weights(4, 3, 3, 8), b.bias(4), name="last")


@_file((1, 8, 8, 3), (1, 5))
def two_inputs(b, image, other):
    y = b.mean(b.conv2d(image, b.weights(8, 3, 3, 3), b.bias(8), activation="RELU", name="conv"))
    y = b.concatenation([y, b.fully_connected(other, b.weights(4, 5), b.bias(4), activation="RELU", name="dense")])
    return b.fully_connected(y, b.weights(3, 12), b.bias(3), name="logits")


@_file((1, 8, 8, 3))
def several_outputs(b, x):
    stem = b.conv2d(x, b.weights(8, 3, 3, 3), b.bias(8), activation="RELU6", name="stem")
    boxes = b.conv2d(stem, b.weights(4, 1, 1, 8), b.bias(4), name="boxes")
    classes = b.unary("LOGISTIC", b.conv2d(stem, b.weights(3, 1, 1, 8), b.bias(3), name="classes"))
    return {"classes": classes, "boxes": boxes, "features": stem}


@_file((1, 8, 8, 3))
def shared_weights(b, x):
    weights, bias = b.weights(3, 3, 3, 3), b.bias(3)
    y = b.conv2d(x, weights, bias, activation="RELU", name="once")
    y = b.conv2d(y, weights, bias, activation="RELU", name="twice")
    return b.conv2d(y, b.weights(4, 1, 1, 3), b.bias(4), name="last")


@_file((1, 8, 8, 3))
def shared_biases(b, x):
    """Tensors of one buffer, as the converter makes them of equal biases."""
    bias = b.constant(np.zeros(8, np.float32))
    y = b.conv2d(x, b.weights(8, 3, 3, 3), bias, activation="RELU", name="first")
    for name in ("second", "third"):
        y = b.conv2d(
            y, b.weights(8, 3, 3, 8), b.constant(np.zeros(8, np.float32), buffer_of=bias), activation="RELU", name=name
        )
    return b.conv2d(y, b.weights(4, 1, 1, 8), b.bias(4), name="last")


@_file((1, 8, 8, 3))
def float16_weights(b, x):
    b.metadata("min_runtime_version", b"1.5.0".ljust(16, b"\0"))

    def half(*shape):
        return b.dequantize(b.constant(b.rng.normal(0, 0.3, shape).astype(np.float16)))

    y = b.conv2d(x, half(8, 3, 3, 3), half(8), activation="RELU", name="first")
    return b.fully_connected(b.mean(y), half(4, 8), half(4), name="logits")


@_file((1, 8, 8, 3))
def int8_weights(b, x):
    """Weights alone are codes: per channel, and per tensor."""
    codes = [b.rng.integers(-127, 128, shape).astype(np.int8) for shape in [(8, 3, 3, 3), (4, 8)]]
    weights = [b.dequantize(b.constant(code, scale=scale)) for code, scale in zip(codes, [np.linspace(1, 3, 8) / 500, 0.004])]
    y = b.conv2d(x, weights[0], b.bias(8), activation="RELU", name="first")
    return b.fully_connected(b.mean(y), weights[1], b.bias(4), name="logits")


@_file((1, 8), among=UNSUPPORTED)
def control_flow(b, x):
    y = b.fully_connected(x, b.weights(6, 8), b.bias(6), name="before")
    total = b.op("SUM", [y, b.constant(np.int32([0, 1]))], ())
    positive = b.op("GREATER", [total, b.constant(np.float32(0))], (), dtype=bool)
    y = b.op("IF", [positive, y], (1, 6), thenSubgraphIndex=1, elseSubgraphIndex=2)
    y = b.fully_connected(y, b.weights(3, 6), b.bias(3), name="after")
    main, names = b.graph, b.names
    for branch in ("then", "else"):
        b.subgraph(branch)
        inside = b.input("x", (1, 6))
        b.output(b.fully_connected(inside, b.weights(6, 6), b.bias(6), name=f"in_{branch}"), "y")
    b.graph, b.names = main, names
    return y


@_file((1, 8), among=UNSUPPORTED)
def custom_operator(b, x):
    y = b.fully_connected(x, b.weights(6, 8), b.bias(6), name="before")
    return b.fully_connected(b.op("CUSTOM", [y], (1, 6), custom="Unheard"), b.weights(3, 6), b.bias(3), name="after")


@_file((1, 8), among=UNSUPPORTED)
def sparse_weights(b, x):
    values = b.rng.normal(size=(6, 8)).astype(np.float32)
    y = b.fully_connected(x, b.sparse(np.where(values > 0, values, np.float32(0))), b.bias(6), name="sparse")
    return b.fully_connected(y, b.weights(3, 6), b.bias(3), name="after")


@_file((1, 8), among=UNSUPPORTED)
def computed_weights(b, x):
    weights = b.reshape(b.fully_connected(x, b.weights(16, 8), b.bias(16), name="before"), (2, 8))
    return b.fully_connected(x, weights, name="of_computed")


@_file((1, 8), among=UNSUPPORTED)
def flex_operator(b, x):
    y = b.fully_connected(x, b.weights(6, 8), b.bias(6), name="before")
    return b.fully_connected(b.op("CUSTOM", [y], (1, 6), custom="FlexErf"), b.weights(3, 6), b.bias(3), name="after")


@_file((1, 5, 8), among=UNSUPPORTED)
def lstm(b, x):
    gates, missing = range(4), [-1] * 3
    weights = [b.weights(6, 8) for _ in gates] + [b.weights(6, 6) for _ in gates]
    biases = [b.bias(6) for _ in gates]
    states = [b.tensor(name, (1, 6)) for name in ("hidden", "cell")]
    for state in states:
        b.graph.tensors[state].isVariable = True
    inputs = [x, *weights, *missing, *biases, -1, -1, *states, *missing, -1]
    y = b.op("UNIDIRECTIONAL_SEQUENCE_LSTM", inputs, (1, 5, 6), **_fused("TANH"))
    return b.fully_connected(y, b.weights(3, 6), b.bias(3), keep_dims=True, name="after")


def several_signatures(keys=("encode", "decode")):
    """A file with a subgraph for each signature."""
    builder = Builder()
    for i, key in enumerate(keys):
        if i:
            builder.subgraph(key)
        x = builder.input("x", (1, 8))
        y = builder.fully_connected(x, builder.weights(6, 8), builder.bias(6), activation="RELU", name=f"{key}_first")
        builder.output(builder.fully_connected(y, builder.weights(3, 6), builder.bias(3), name=f"{key}_last"), "y")
        builder.signature(key)
    return builder.bytes()


def random_file(seed, any_batch=False):
    """A float file of some layers of any form, in a row with shortcuts, and maybe with outputs in the middle.

    None of one channel: LiteRT corrupts its memory in BATCH_MATMUL of integers with such sizes.
    """
    b = Builder(seed)

    def pick(*values):
        return values[b.rng.integers(len(values))]

    x = b.input("image", (1, pick(5, 8), 8, pick(2, 3, 4)), any_batch)
    for i in range(pick(1, 2, 3, 4)):
        inputs, channels, kernel = b.shape(x)[-1], pick(4, 5, 8), pick((1, 1), (3, 3), (2, 3))
        form = {"activation": pick("NONE", "NONE", "RELU", "RELU6"), "name": f"layer_{i}"}
        in_space = form | {"strides": pick((1, 1), (2, 1), (2, 2))}
        padding = pick("SAME", "VALID") if min(b.shape(x)[1:3]) > 4 else "SAME"
        match pick("conv2d", "conv2d", "depthwise", "transpose_conv", "fully_connected", "matmul"):
            case "conv2d":
                weights, bias = b.weights(channels, *kernel, inputs), b.bias(channels)
                y = b.conv2d(x, weights, bias, dilation=pick((1, 1), (1, 2)), padding=padding, **in_space)
            case "depthwise":
                channels = inputs * pick(1, 1, 2, 3)
                weights = b.weights(1, *kernel, channels, fan_in=math.prod(kernel))
                y = b.depthwise(x, weights, b.bias(channels), padding=padding, **in_space)
            case "transpose_conv":
                weights = b.weights(channels, *kernel, inputs)
                y = b.transpose_conv(x, weights, pick(None, b.bias(channels)), **in_space)
            case "fully_connected":
                y = b.fully_connected(x, b.weights(channels, inputs), pick(None, b.bias(channels)), keep_dims=True, **form)
            case "matmul":
                y = b.matmul(x, b.weights(inputs, channels, fan_in=inputs), name=f"layer_{i}")
                y = b.add(y, b.bias(channels), form["activation"])
        if b.shape(y) == b.shape(x):
            y = b.add(x, y)
        activation = pick("RELU", "HARD_SWISH", "TANH", "LOGISTIC", "LEAKY_RELU")
        x = b.unary(activation, y)
        # litert-quantizer leaves these float, and SHAPE: its signatures then name tensors that are no outputs.
        if not any_batch and activation not in ("HARD_SWISH", "LEAKY_RELU") and pick(True, False):
            b.output(x, f"after_{i}")
    b.output(b.fully_connected(b.mean(x), b.weights(3, b.shape(x)[-1]), pick(None, b.bias(3)), name="logits"), "output")
    b.signature()
    return b.bytes()
