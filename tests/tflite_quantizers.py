"""Float .tflite files quantized by litert-quantizer, in the forms that people deploy."""

import warnings

from ai_edge_litert.interpreter import Interpreter
from litert_quantizer import Quantizer, qtyping

from tflite_models import MODELS

_PER_TENSOR, _BLOCKS_OF_32 = qtyping.QuantGranularity.TENSORWISE, qtyping.QuantGranularity.BLOCKWISE_32
_ALL, _INPUT, _OUTPUT, _MATMUL, _DENSE = (
    qtyping.TFLOperationName(name) for name in ("*", "INPUT", "OUTPUT", "BATCH_MATMUL", "FULLY_CONNECTED")
)
_FLOAT16 = qtyping.OpQuantizationConfig(
    weight_tensor_config=qtyping.TensorQuantizationConfig(num_bits=16, dtype=qtyping.TensorDataType.FLOAT)
)


def _static(activation_bits=8, weight_bits=8, integer_ends=False, **options):
    def add(quantizer):
        quantizer.add_static_config(".*", _ALL, activation_bits, weight_bits, **options)
        if weight_bits == 8:  # LiteRT has one scale for each side
            quantizer.add_static_config(".*", _MATMUL, activation_bits, weight_bits, _PER_TENSOR)
        for end in () if integer_ends else (_INPUT, _OUTPUT):
            quantizer.update_quantization_recipe(".*", end, algorithm_key="no_quantize")

    return add


RECIPES = {
    "int8": _static(),
    "int8_per_tensor": _static(weight_granularity=_PER_TENSOR),
    "int8_in_out": _static(integer_ends=True),
    "int16x8": _static(16),
    "int8x4": _static(weight_bits=4),
    "dynamic": lambda quantizer: quantizer.add_dynamic_config(".*", _ALL, 8),
    "dynamic_per_tensor": lambda quantizer: quantizer.add_dynamic_config(".*", _ALL, 8, _PER_TENSOR),
    "dynamic_int4": lambda quantizer: quantizer.add_dynamic_config(".*", _ALL, 4),
    "weights_int8": lambda quantizer: quantizer.add_weight_only_config(".*", _ALL, 8),
    "weights_int4": lambda quantizer: quantizer.add_weight_only_config(".*", _ALL, 4),
    "int4_blocks": lambda quantizer: quantizer.add_dynamic_config("flattening", _DENSE, 4, _BLOCKS_OF_32),
    "float16": lambda quantizer: quantizer.update_quantization_recipe(".*", _ALL, _FLOAT16, "float_casting"),
}
"""By name, functions that add what is wanted to a quantizer. Inputs and outputs are float, except where the name says.

"int4_blocks" is for one layer of one model, and "dynamic_per_tensor" for files without depthwise layers, in which LiteRT reads
scales that are not there.
"""

CASES = [
    (model, recipe)
    for model in MODELS
    for recipe in RECIPES
    if recipe != "int4_blocks"
    and model not in ("float16_weights", "int8_weights")  # are quantized already
    and not (model == "matmul_left" and recipe in ("int16x8", "dynamic", "dynamic_per_tensor"))  # LiteRT refuses it
    and not (model in ("depthwise", "residual") and recipe == "dynamic_per_tensor")
]
"""Names of a model and of a recipe for it whose file LiteRT runs."""

BLOCKS = ("fully_connected", "int4_blocks")
"""A case with what cannot be corrected: weights of 4 bits, with a scale for each 32 of them along the inputs of one layer."""


def quantized(content, recipe, samples):
    """The file, quantized with a recipe and ranges of the samples: (N, *S) by the names of inputs. It needs a signature."""
    quantizer = Quantizer(content)
    RECIPES[recipe](quantizer)
    (signature,) = Interpreter(model_content=content).get_signature_list()
    count = len(next(iter(samples.values())))
    feeds = {signature: [{name: values[i : i + 1] for name, values in samples.items()} for i in range(count)]}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*preserve_all_tensors", UserWarning)  # which it asks LiteRT for
        ranges = quantizer.calibrate(feeds, num_threads=1) if quantizer.need_calibration else None
        result = quantizer.quantize(ranges, enable_progress_bar=False, enable_progress_report=False)
    return bytes(result.quantized_model)
