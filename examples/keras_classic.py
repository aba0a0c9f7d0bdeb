"""The five recipes of the classic interface on Keras models.

python examples/keras_classic.py

prints, for a small network, how near the outputs of the quantized model come to those of the float one before and after each.
"""

import keras
import numpy as np
import tensorflow as tf

from biascorr import (
    BiasCorrection,
    BiasCorrectionParams,
    Quantization,
    QuantParams,
    equalize_model,
    fake_quantize,
    find_all_convs_bn_with_activation,
)

QUANT_PARAMS = QuantParams(quant_mode="tf_enhanced", round_mode="nearest", use_cuda=True, ops_to_ignore=None)

BIAS_CORRECTION_PARAMS = BiasCorrectionParams(
    batch_size=16, num_quant_samples=16, num_bias_correct_samples=64, input_op_names=["images"], output_op_names=["logits"]
)


def bias_correction_empirical(model: keras.Model, dataset: tf.data.Dataset) -> keras.Model:
    """Corrects all layers, each by the difference between its float and its quantized mean output."""
    return BiasCorrection.correct_bias(model, BIAS_CORRECTION_PARAMS, QUANT_PARAMS, dataset)


def bias_correction_empirical_analytical(model: keras.Model, dataset: tf.data.Dataset) -> keras.Model:
    """Corrects all layers: those after a batch normalization by the mean input that it gives, the others empirically."""
    conv_bn_dict = find_all_convs_bn_with_activation(model)
    return BiasCorrection.correct_bias(
        model, BIAS_CORRECTION_PARAMS, QUANT_PARAMS, dataset, conv_bn_dict=conv_bn_dict, perform_only_empirical_bias_corr=False
    )


def bias_correction_after_cle(model: keras.Model, dataset: tf.data.Dataset) -> keras.Model:
    """The same after equalization, which folds batch normalizations: the dictionary is taken before."""
    conv_bn_dict = find_all_convs_bn_with_activation(model)
    equalized = equalize_model(model, conv_bn_dict=conv_bn_dict)  # which updates the dictionary
    return BiasCorrection.correct_bias(
        equalized,
        BIAS_CORRECTION_PARAMS,
        QUANT_PARAMS,
        dataset,
        conv_bn_dict=conv_bn_dict,
        perform_only_empirical_bias_corr=False,
    )


def bias_correction_single_layer_empirical(model: keras.Model, dataset: tf.data.Dataset) -> keras.Model:
    """Corrects one layer by the difference between its float and its quantized mean output."""
    return BiasCorrection.bias_correction_per_layer(
        reference_model=model,
        corrected_model=model,  # or one in which the layers before it are corrected
        bias_correct_params=BIAS_CORRECTION_PARAMS,
        layer_name_to_be_corrected="logits",
        data_set=dataset,
        quant_params=QUANT_PARAMS,
    )


def bias_correction_single_layer_analytical(model: keras.Model) -> keras.Model:
    """Corrects one layer without data, by the mean input that the batch normalization before it gives."""
    conv_bn_dict = find_all_convs_bn_with_activation(model)
    return BiasCorrection.analytical_bias_correction_per_layer(
        model, "depthwise", conv_bn_dict["depthwise"], QUANT_PARAMS, is_first_conv=False
    )


def small_model(images: np.ndarray) -> keras.Model:
    """conv, depthwise, conv, average, dense, each convolution with a batch normalization of the statistics of these images.

    The channels of each layer have uneven ranges, as training leaves them.
    """
    rng = np.random.default_rng(0)
    inputs = keras.Input((16, 16, 3), name="images")
    x = inputs
    for name, layer in {
        "conv": keras.layers.Conv2D(16, 3, padding="same", use_bias=False, name="conv"),
        "depthwise": keras.layers.DepthwiseConv2D(3, padding="same", use_bias=False, name="depthwise"),
        "project": keras.layers.Conv2D(24, 1, use_bias=False, name="project"),
    }.items():
        x = layer(x)
        ranges = np.exp(rng.normal(0.0, 0.8, x.shape[-1])).reshape((-1, 1) if name == "depthwise" else -1)
        layer.kernel.assign(rng.normal(0.05, 0.3, layer.kernel.shape) * ranges)
        made = keras.Model(inputs, x)(images).numpy()
        norm = keras.layers.BatchNormalization(name=f"{name}_norm")
        x = norm(x)
        gamma, beta = rng.uniform(0.5, 1.5, made.shape[-1]), rng.normal(0.0, 0.5, made.shape[-1])
        norm.set_weights([gamma, beta, made.mean((0, 1, 2)), made.var((0, 1, 2))])
        x = keras.layers.ReLU(name=f"{name}_relu")(x)
    x = keras.layers.GlobalAveragePooling2D(name="average")(x)
    logits = keras.layers.Dense(10, name="logits")
    x = logits(x)
    logits.set_weights([rng.normal(0.0, 0.3, (24, 10)), np.zeros(10)])
    return keras.Model(inputs, x, name="small")


def random_images(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).gamma(2.0, 0.5, (count, 16, 16, 3)).astype(np.float32)


def quantized(model: keras.Model) -> keras.Model:
    """A copy of a model with its weights on the grids of `QUANT_PARAMS`: quantization in simulation."""
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    for layer in copy.layers:
        if hasattr(layer, "kernel"):
            kernel = layer.kernel.numpy()
            layer.kernel.assign(fake_quantize(kernel, Quantization.from_weights(kernel)))
    return copy


def sqnr(model: keras.Model, corrected: keras.Model, images: np.ndarray) -> float:
    """How near the outputs of a quantized model come to those of the float one, in dB."""
    expected, found = model(images).numpy(), quantized(corrected)(images).numpy()
    return 10 * np.log10(np.square(expected).sum() / np.square(found - expected).sum())


def main() -> None:
    images, held_out = random_images(64, seed=1), random_images(64, seed=2)
    model, dataset = small_model(images), tf.data.Dataset.from_tensor_slices(images).batch(16)
    print(f"{'uncorrected':42}{sqnr(model, model, held_out):6.2f} dB")
    for recipe in (bias_correction_empirical, bias_correction_empirical_analytical, bias_correction_single_layer_empirical):
        print(f"{recipe.__name__:42}{sqnr(model, recipe(model, dataset), held_out):6.2f} dB")
    corrected = bias_correction_single_layer_analytical(model)
    print(f"{bias_correction_single_layer_analytical.__name__:42}{sqnr(model, corrected, held_out):6.2f} dB")
    print(f"{'equalized, uncorrected':42}{sqnr(model, equalize_model(model), held_out):6.2f} dB")
    corrected = bias_correction_after_cle(model, dataset)
    print(f"{bias_correction_after_cle.__name__:42}{sqnr(model, corrected, held_out):6.2f} dB")


if __name__ == "__main__":
    main()
