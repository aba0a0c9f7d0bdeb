"""Correct one layer, here the last one, by the difference between its float and its quantized mean output.

python examples/classic/one_layer_empirical.py [MODEL.onnx SAMPLES.npy]
"""

from small_network import BATCH, model_and_batches, names_of, print_changes

from biascorr import BiasCorrection, BiasCorrectionParams, QuantParams

model, batches = model_and_batches()
inputs, outputs = names_of(model)
params = BiasCorrectionParams(
    batch_size=BATCH,
    num_quant_samples=BATCH,
    num_bias_correct_samples=BATCH * len(batches),
    input_op_names=inputs,
    output_op_names=outputs,
)
layer = [node.name for node in model.graph.node if node.op_type in ("Conv", "Gemm")][-1]

corrected = BiasCorrection.bias_correction_per_layer(
    reference_model=model,
    corrected_model=model,  # or one in which the layers before it are corrected
    bias_correct_params=params,
    layer_name_to_be_corrected=layer,
    data_set=batches,
    quant_params=QuantParams(weight_bits=4),
)

print_changes(model, corrected)
