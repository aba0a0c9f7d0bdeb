"""Correct one layer without data, by the mean input that the batch normalization before it gives.

python examples/classic/one_layer_analytical.py [MODEL.onnx SAMPLES.npy]
"""

from small_network import model_and_batches, print_changes

from biascorr import BiasCorrection, QuantParams, find_all_convs_bn_with_activation

model, _ = model_and_batches()
conv_bn_dict = find_all_convs_bn_with_activation(model)
layer = next(name for name, info in conv_bn_dict.items() if info.input_bn)

corrected = BiasCorrection.analytical_bias_correction_per_layer(
    model, layer, conv_bn_dict[layer], QuantParams(weight_bits=4), is_first_conv=False
)

print_changes(model, corrected)
