"""The classic interface: corrected float models by simulated quantization, all layers or one, with data or without.

    empirical     bias -= E[y quantized] - E[y float]
    analytical    bias -= (quantized weights - weights) x E[input], as the batch normalization before the layer tells it

Nothing is judged: the cost is one pass of the float network and one sweep of the quantized one.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from biascorr.adapters.loading import network_from_model
from biascorr.calibration.data import ModelInput, batches_from_data, number_of_samples
from biascorr.calibration.samples import Samples
from biascorr.calibration.storage import Storage, default_budget
from biascorr.correction.analytical import analytical_shift
from biascorr.correction.candidates import Workshop
from biascorr.correction.correct import add_shifts
from biascorr.correction.quant_params import QuantParams
from biascorr.correction.simulation import layers_to_quantize, simulated
from biascorr.graph.batch_norms import ConvBnInfoType, brought_up_to_date
from biascorr.graph.network import Feeds, Layer, LayerReport, Network

_DEFAULTS = QuantParams()


@dataclass(frozen=True)
class BiasCorrectionParams:
    """How much data is used, and what it goes through.

    Parameters
    ----------
    batch_size : int
        Samples in a batch of the data; arrays that hold all samples are cut into batches of this size.
    num_quant_samples : int
        Samples that the ranges of activations are measured on, where these are quantized.
    num_bias_correct_samples : int
        Samples that biases are corrected with. Of both, as many batches are read as hold so many samples if each is full.
    input_op_names : iterable of str
        All inputs of the model, in the order that the arrays of a batch have.
    output_op_names : iterable of str
        Outputs of the model; they have to be there, and that is all.

    Raises
    ------
    TypeError
        Names are one string, or something else is among them.
    ValueError
        A number is no integer of at least 1.

    Examples
    --------
    >>> BiasCorrectionParams(8, 64, 256, input_op_names=["images"], output_op_names=["logits"]).input_op_names
    ('images',)
    """

    batch_size: int
    num_quant_samples: int
    num_bias_correct_samples: int
    input_op_names: Sequence[str]
    output_op_names: Sequence[str]

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_quant_samples", "num_bias_correct_samples"):
            value = getattr(self, name)
            if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: {value!r}, expected an integer of at least 1")
        for name in ("input_op_names", "output_op_names"):
            value = getattr(self, name)
            names = [value] if isinstance(value, (str, bytes)) else list(value)
            if names == [value] or not all(isinstance(each, str) for each in names):
                raise TypeError(f"{name}: {value!r}, expected a list of names")
            object.__setattr__(self, name, tuple(names))

    def inputs_of(self, network: Network, name: str) -> list[ModelInput]:
        """The inputs of a network, which errors call by this name, in the order of `input_op_names`.

        Raises ValueError where these names or `output_op_names` are not the network's.
        """
        inputs = {each.name: each for each in network.inputs}
        if sorted(inputs) != sorted(self.input_op_names):
            raise ValueError(f"input_op_names: {_listed(self.input_op_names)}; the inputs of {name} are {_listed(inputs)}")
        unknown = [each for each in self.output_op_names if each not in network.outputs]
        if unknown:
            raise ValueError(f"output_op_names: {unknown[0]} is no output of {name}, which has {_listed(network.outputs)}")
        return [inputs[each] for each in self.input_op_names]


class BiasCorrection:
    """Bias correction by simulated quantization.

    Models are ONNX: a path, bytes or an onnx.ModelProto. They are float, and so is what is returned: a new onnx.ModelProto,
    the model with biases that fit its weights once these are quantized. Models, files and data given are not changed.

    A data set is anything iterable over batches: arrays, tuples or lists with one array per input, mappings by input name; a
    `tf.data.Dataset`, a torch `DataLoader`, an onnxruntime `CalibrationDataReader`, an iterator that can be read only once. An
    array, or a mapping to arrays, holds samples along the first axis.

    All raise FileNotFoundError, ImportError, TypeError and ValueError as :func:`biascorr.correct` does, and ValueError where
    a name is no layer's, or no input's or output's of the model.
    """

    @staticmethod
    def correct_bias(
        reference_model: Any,
        bias_correct_params: BiasCorrectionParams,
        quant_params: QuantParams,
        data_set: Any,
        conv_bn_dict: Mapping[str, ConvBnInfoType] | None = None,
        perform_only_empirical_bias_corr: bool = True,
    ) -> Any:
        """Corrects all layers in topological order, each behind corrected ones.

        Parameters
        ----------
        reference_model : path, bytes or onnx.ModelProto
            The float model.
        bias_correct_params : BiasCorrectionParams
            How much data is used.
        quant_params : QuantParams
            How quantization is simulated.
        data_set : iterable
            See the class.
        conv_bn_dict : mapping from str to ConvBnInfoType, optional
            What is around layers, for the analytical correction; None: what :func:`find_all_convs_bn_with_activation` finds.
            Batch normalizations that became part of layers since are taken as they are in the model now.
        perform_only_empirical_bias_corr : bool
            False: layers behind a batch normalization are corrected analytically, all others empirically.

        Returns
        -------
        onnx.ModelProto
            The float model with corrected biases; layers without a bias have one.

        Warns
        -----
        UserWarning
            The data ended early, or layers could not be corrected.
        """
        reference = network_from_model(reference_model, "reference_model")
        layers = layers_to_quantize(reference, quant_params)
        for name in conv_bn_dict or ():
            _layer(reference, name, "conv_bn_dict")
        norms = None if conv_bn_dict is None else brought_up_to_date(conv_bn_dict, reference)
        workshop = _workshop(reference, reference, layers, bias_correct_params, quant_params, data_set, norms)
        with workshop as corrected:
            candidate = corrected.empirical() if perform_only_empirical_bias_corr else corrected.hybrid()
        add_shifts(reference, candidate.shifts)
        _warn_of_layers_left_alone([*candidate.reports.values(), *reference.left_alone])
        return reference.model

    @staticmethod
    def bias_correction_per_layer(
        reference_model: Any,
        corrected_model: Any,
        bias_correct_params: BiasCorrectionParams,
        layer_name_to_be_corrected: str,
        data_set: Any,
        *,
        quant_params: QuantParams = _DEFAULTS,
    ) -> Any:
        """Corrects one layer so that its mean output, with all weights of the model quantized, is that of the float model.

        Parameters
        ----------
        reference_model : path, bytes or onnx.ModelProto
            The float model.
        corrected_model : path, bytes or onnx.ModelProto
            The same model, float too; the biases of its other layers may be corrected already, and stay as they are.
        bias_correct_params : BiasCorrectionParams
            How much data is used.
        layer_name_to_be_corrected : str
            The layer, of this name in both models.
        data_set : iterable
            See the class.
        quant_params : QuantParams
            How quantization is simulated.

        Returns
        -------
        onnx.ModelProto
            `corrected_model` with another bias of this layer.

        Warns
        -----
        UserWarning
            The data ended early, or the layer could not be corrected.
        """
        reference = network_from_model(reference_model, "reference_model")
        network = network_from_model(corrected_model, "corrected_model")
        bias_correct_params.inputs_of(network, "corrected_model")
        expected = _layer(reference, layer_name_to_be_corrected, "reference_model")
        layer = _layer(network, layer_name_to_be_corrected, "corrected_model")
        if expected.channels != layer.channels:
            found = f"{layer.channels} channels in corrected_model, {expected.channels} in reference_model"
            raise ValueError(f"layer {layer.name}: {found}, expected as many")
        layers = [layer] if layer in layers_to_quantize(network, quant_params) else []
        with _workshop(reference, network, layers, bias_correct_params, quant_params, data_set) as workshop:
            candidate = workshop.empirical()
        add_shifts(network, candidate.shifts)
        _warn_of_layers_left_alone(candidate.reports.values())
        return network.model

    @staticmethod
    def analytical_bias_correction_per_layer(
        corrected_model: Any,
        layer: str,
        preceeding_bn_layer_info: ConvBnInfoType | None,
        quant_params: QuantParams,
        is_first_conv: bool = False,
    ) -> Any:
        """Corrects one layer by what the batch normalization before it tells of its input, without data.

        Parameters
        ----------
        corrected_model : path, bytes or onnx.ModelProto
            The float model; the biases of its layers may be corrected already.
        layer : str
            Name of the layer.
        preceeding_bn_layer_info : ConvBnInfoType or None
            What is before the layer.
        quant_params : QuantParams
            How quantization is simulated; activations do not count.
        is_first_conv : bool
            Whether the layer reads an input of the model. It may then have no batch normalization before it, and is left as
            it is: only data would tell the mean of its input.

        Returns
        -------
        onnx.ModelProto
            `corrected_model` with another bias of this layer; unchanged where the layer is one to ignore, or where there is no
            batch normalization before a first layer.

        Raises
        ------
        ValueError
            `preceeding_bn_layer_info` is None for a layer that is not the first; there is no batch normalization in it, or an
            activation behind it that is no Clip; it has another number of channels than the layer.
        """
        network = network_from_model(corrected_model, "corrected_model")
        found = _layer(network, layer, "corrected_model")
        info = preceeding_bn_layer_info
        if info is None and not is_first_conv:
            raise ValueError(f"preceeding_bn_layer_info: None for layer {layer}, expected one unless is_first_conv is set")
        if info is not None and info.input_bn is None and is_first_conv:
            info = None  # it says what is behind the layer
        if info is not None:
            info = brought_up_to_date({layer: info}, network)[layer]
        if info is not None and found in layers_to_quantize(network, quant_params):
            quantized = replace(found, weights=quant_params.fake_quantized(found))
            shape = network.surroundings.shapes.get(found.input)
            network.add_to_bias(found, analytical_shift(quantized, found.weights, info, shape))
        return network.model


@contextlib.contextmanager
def _workshop(
    reference: Network,
    network: Network,
    layers: Sequence[Layer],
    params: BiasCorrectionParams,
    quant_params: QuantParams,
    data_set: Any,
    norms: Mapping[str, ConvBnInfoType] | None = None,
) -> Iterator[Workshop]:
    """Corrects these layers of a network, quantized in simulation, against those of the same names in the reference."""
    inputs = params.inputs_of(reference, "reference_model")
    batches = batches_from_data(data_set, inputs, name="data_set", batch_size=params.batch_size)
    fitted = math.ceil(params.num_bias_correct_samples / params.batch_size)
    measured = 0 if quant_params.activation_bits is None else math.ceil(params.num_quant_samples / params.batch_size)
    with Storage(default_budget()) as storage:
        samples = Samples(storage)
        reading = _read(batches, inputs, samples, fitted, max(fitted, measured))
        quantized = simulated(network, quant_params, itertools.islice(reading, measured))
        collections.deque(reading, maxlen=0)
        before, after = ({layer.name: layer for layer in each.layers} for each in (reference, quantized))
        pairs = {layer.name: (before[layer.name], after[layer.name]) for layer in layers}
        yield Workshop(reference, quantized, pairs, samples, lambda *_: None, activated=False, norms=norms)


def _read(
    batches: Iterable[Feeds], inputs: Sequence[ModelInput], samples: Samples, fitted: int, wanted: int
) -> Iterator[Feeds]:
    """Up to the wanted number of batches, of which the first go to the samples too."""
    read = 0
    for read, feeds in enumerate(itertools.islice(batches, wanted), start=1):
        if read <= fitted:
            samples.add({name: array.copy() for name, array in feeds.items()}, number_of_samples(feeds, inputs))
        yield feeds
    if read == 0:
        raise ValueError("data_set: no samples, at least one is needed")
    if read < wanted:
        warnings.warn(f"data_set: ended after {read} batches, {wanted} were asked for", stacklevel=2)


def _layer(network: Network, name: str, where: str) -> Layer:
    """The layer of this name. Raises ValueError where it cannot be corrected, or there is none."""
    for layer in network.layers:
        if layer.name == name:
            return layer
    for report in network.left_alone:
        if report.name == name:
            raise ValueError(f"{where}: layer {name} cannot be corrected: {report.reason}")
    raise ValueError(f"{where}: {name!r} is no layer; the layers are {_listed(layer.name for layer in network.layers)}")


def _warn_of_layers_left_alone(reports: Iterable[LayerReport]) -> None:
    left = [f"{report.name} ({report.op}): {report.reason}" for report in reports if report.method is None]
    if left:
        warnings.warn(f"layers left alone: {'; '.join(left)}", stacklevel=3)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
