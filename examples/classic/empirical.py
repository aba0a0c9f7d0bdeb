"""Correct all layers, each by the difference between its float and its quantized mean output.

python examples/classic/empirical.py [MODEL.onnx SAMPLES.npy]
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
quant_params = QuantParams(quant_mode="tf_enhanced", round_mode="nearest", weight_bits=4)

corrected = BiasCorrection.correct_bias(model, params, quant_params, batches)

print_changes(model, corrected)
