"""Correct all layers of an equalized model, those after a batch normalization, now folded, by the mean input that it gave.

python examples/classic/after_equalization.py [MODEL.onnx SAMPLES.npy]
"""

from small_network import BATCH, model_and_batches, names_of, print_changes

from biascorr import BiasCorrection, BiasCorrectionParams, QuantParams, equalize_model, find_all_convs_bn_with_activation

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
conv_bn_dict = find_all_convs_bn_with_activation(model)

equalized = equalize_model(model, conv_bn_dict=conv_bn_dict)  # which updates the dictionary
corrected = BiasCorrection.correct_bias(
    equalized, params, quant_params, batches, conv_bn_dict=conv_bn_dict, perform_only_empirical_bias_corr=False
)

print("analytical:", ", ".join(name for name, info in conv_bn_dict.items() if info.input_bn) or "none")
print_changes(equalized, corrected)
