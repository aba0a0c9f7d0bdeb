"""The classic interface: corrected float models by simulated quantization, all layers or one, with data or without.

    empirical     bias -= E[y quantized] - E[y float]
    analytical    bias -= (quantized weights - weights) x E[input], as the batch normalization before the layer gives it

Nothing is scored: the cost is one pass of the float network and one sweep of the quantized one.
"""

from __future__ import annotations

import collections
import itertools
import math
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from biascorr.adapters.loading import network_from_model
from biascorr.arguments import checked_integer
from biascorr.calibration.data import batches_from_data
from biascorr.calibration.resources import available_cpus
from biascorr.calibration.samples import Samples
from biascorr.calibration.storage import Storage, checked_budget
from biascorr.correction.analytical import analytical_shift
from biascorr.correction.candidates import Candidate, CandidateBuilder, Choice
from biascorr.correction.pooling import PooledShifts
from biascorr.correction.quant_params import QuantParams
from biascorr.correction.simulation import layers_to_quantize, ranges_of, simulated
from biascorr.graph.batch_norms import ConvBnInfoType, batch_norms_around_layers, with_current_statistics
from biascorr.graph.layer import Layer, without_later_calls
from biascorr.graph.matching import match_by_name
from biascorr.graph.network import EditableNetwork, Feeds, ModelInput, Network, require_edits, require_float
from biascorr.graph.reasons import LayerReport
from biascorr.sweep.shard import OneShard

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
        Outputs of the model; they have to be there, and that is all. Of both, names may have the ":0" of TensorFlow's tensors
        or not, where the model has only the other.

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
            checked_integer(name, getattr(self, name), 1)
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
        found = [_known(each, inputs) for each in self.input_op_names]
        if sorted(inputs) != sorted(found):
            raise ValueError(f"input_op_names: {_listed(self.input_op_names)}; the inputs of {name} are {_listed(inputs)}")
        unknown = [each for each in self.output_op_names if _known(each, network.outputs) not in network.outputs]
        if unknown:
            raise ValueError(f"output_op_names: {unknown[0]} is no output of {name}, which has {_listed(network.outputs)}")
        return [inputs[each] for each in found]


def _known(name: str, names: Collection[str]) -> str:
    """A name as it is among others: itself, or with the ":0" of TensorFlow's tensors added or removed."""
    other = name.removesuffix(":0") if name.endswith(":0") else f"{name}:0"
    return other if other in names and name not in names else name


def find_all_convs_bn_with_activation(model: Any) -> dict[str, ConvBnInfoType]:
    """The batch normalizations around the convolutions and matrix products of a float model.

    Parameters
    ----------
    model : path, bytes, onnx.ModelProto or keras.Model
        The model, which is not changed.

    Returns
    -------
    dict from str to ConvBnInfoType
        By the name of the layer, in topological order; layers without any batch normalization around them are left out. A layer
        that is called several times is there once, with what is the same around all calls.

    Raises
    ------
    FileNotFoundError, ImportError, TypeError, ValueError
        As :func:`biascorr.correct`, of its model.

    Notes
    -----
    Batch normalizations that :func:`biascorr.fold_all_batch_norms` or :func:`biascorr.equalize_model` have made part of layers
    are found too, with the statistics that their outputs have now: scaled, and without the high biases that were folded.

    `input_bn` is found through ReLU, Clip with constant bounds, Min and Max with constants, Identity, Dropout, an average over
    all positions and a reshape of such averages, whatever else reads the tensors in between. Anything else in between ends the
    builder: the mean of the layer's input would not follow from the batch normalization.

    Examples
    --------
    >>> import onnx.parser
    >>> model = onnx.parser.parse_model('''<ir_version: 8, opset_import: ["" : 17]>
    ...     network (float[N,1,8] x) => (float[N,1,8] y)
    ...     <float[1] beta = {0.5}, float[1] gamma = {2.0}, float[1] mean = {0.0}, float[1] var = {1.0}, float[1,1,1] w = {3.0}>
    ...     { n = BatchNormalization(x, gamma, beta, mean, var)  r = Relu(n)  [layer] y = Conv(r, w) }''')
    >>> info = find_all_convs_bn_with_activation(model)["layer"]
    >>> info.input_bn.beta, info.in_activation_type.name
    (array([0.5]), 'relu')
    """
    return batch_norms_around_layers(network_from_model(model, "model"))


class BiasCorrection:
    """Bias correction by simulated quantization.

    Models are those of ONNX, TFLite or Keras: a path, bytes, an onnx.ModelProto or a keras.Model. They are float, and so is
    what is returned, a new model of the same kind, with biases that fit its weights once these are quantized. Models, files and
    data given are not changed.

    A data set is anything iterable over batches: arrays, tuples or lists with one array per input, mappings by input name; a
    `tf.data.Dataset`, a `keras.utils.PyDataset`, a torch `DataLoader`, an onnxruntime `CalibrationDataReader`, an iterator that
    can be read only once. It may be without an end, since no more is read than is needed. An array, or a mapping to arrays,
    holds samples along the first axis.

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
        """Corrects all layers in topological order, each after corrected ones.

        Parameters
        ----------
        reference_model : path, bytes, onnx.ModelProto or keras.Model
            The float model.
        bias_correct_params : BiasCorrectionParams
            How much data is used.
        quant_params : QuantParams
            How quantization is simulated.
        data_set : iterable
            See the class.
        conv_bn_dict : mapping from str to ConvBnInfoType, optional
            The batch normalizations around layers, for the analytical correction; None: those that
            :func:`find_all_convs_bn_with_activation` finds. Those that became part of layers since are taken as they are in the
            model now.
        perform_only_empirical_bias_corr : bool
            False: layers after a batch normalization are corrected analytically, all others empirically.

        Returns
        -------
        onnx.ModelProto or keras.Model
            The float model with corrected biases; layers without a bias have one.

        Warns
        -----
        UserWarning
            The data ended early, or layers could not be corrected.
        """
        reference = _loaded(reference_model, "reference_model")
        layers = layers_to_quantize(reference, quant_params)
        for name in conv_bn_dict or ():
            _layer(reference, name, "conv_bn_dict")
        norms = (
            batch_norms_around_layers(reference) if conv_bn_dict is None else with_current_statistics(conv_bn_dict, reference)
        )
        choice = Choice("empirical" if perform_only_empirical_bias_corr else "hybrid")
        candidate = _candidate(reference, reference, layers, bias_correct_params, quant_params, data_set, choice, norms)
        _warn_of_uncorrected_layers([*candidate.reports.values(), *reference.unsupported])
        return reference.with_shifts(candidate.shifts).model

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
        reference_model : path, bytes, onnx.ModelProto or keras.Model
            The float model.
        corrected_model : path, bytes, onnx.ModelProto or keras.Model
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
        onnx.ModelProto or keras.Model
            `corrected_model` with another bias of this layer.

        Warns
        -----
        UserWarning
            The data ended early, or the layer could not be corrected.
        """
        reference = network_from_model(reference_model, "reference_model")
        network = _loaded(corrected_model, "corrected_model")
        bias_correct_params.inputs_of(network, "corrected_model")
        expected = _layer(reference, layer_name_to_be_corrected, "reference_model")
        layer = _layer(network, layer_name_to_be_corrected, "corrected_model")
        if expected.channels != layer.channels:
            found = f"{layer.channels} channels in corrected_model, {expected.channels} in reference_model"
            raise ValueError(f"layer {layer.name}: {found}, expected as many")
        layers = [each for each in layers_to_quantize(network, quant_params) if each.first_call == layer.name]
        if not {each.name for each in layers}.issubset(each.name for each in reference.layers):
            raise ValueError(f"layer {layer.name}: called more often in corrected_model than in reference_model")
        candidate = _candidate(reference, network, layers, bias_correct_params, quant_params, data_set, Choice("empirical"))
        _warn_of_uncorrected_layers(candidate.reports.values())
        return network.with_shifts(candidate.shifts).model

    @staticmethod
    def analytical_bias_correction_per_layer(
        corrected_model: Any,
        layer: str,
        preceeding_bn_layer_info: ConvBnInfoType | None,
        quant_params: QuantParams,
        is_first_conv: bool = False,
    ) -> Any:
        """Corrects one layer by the statistics that the batch normalization before it gives its input, without data.

        Parameters
        ----------
        corrected_model : path, bytes, onnx.ModelProto or keras.Model
            The float model; the biases of its layers may be corrected already.
        layer : str
            Name of the layer.
        preceeding_bn_layer_info : ConvBnInfoType or None
            The batch normalization and activation before the layer.
        quant_params : QuantParams
            How quantization is simulated; activations do not count.
        is_first_conv : bool
            Whether the layer reads an input of the model. It may then have no batch normalization before it, and is left as
            it is: only data would give the mean of its input.

        Returns
        -------
        onnx.ModelProto or keras.Model
            `corrected_model` with another bias of this layer; unchanged where the layer is one to ignore, or where there is no
            batch normalization before a first layer.

        Raises
        ------
        ValueError
            `preceeding_bn_layer_info` is None for a layer that is not the first; there is no batch normalization in it, or an
            activation after it that is no Clip; it has another number of channels than the layer.
        """
        network = _loaded(corrected_model, "corrected_model")
        found = _layer(network, layer, "corrected_model")
        info = preceeding_bn_layer_info
        if info is None and not is_first_conv:
            raise ValueError(f"preceeding_bn_layer_info: None for layer {layer}, expected one unless is_first_conv is set")
        if info is not None and info.input_bn is None and is_first_conv:
            info = None  # it says what is after the layer
        if info is not None:
            info = with_current_statistics({layer: info}, network)[layer]
        if info is None or found not in layers_to_quantize(network, quant_params):
            return network.model
        weights, shapes = quant_params.fake_quantized(found), network.facts().shapes
        pooled = PooledShifts()
        for call in (each for each in network.layers if each.first_call == layer):
            quantized = replace(call, weights=weights)
            pooled.add(call, analytical_shift(quantized, call.weights, info, shapes.get(call.input)))
        return network.with_shifts(pooled.by_layer()).model


def _loaded(model: Any, name: str) -> EditableNetwork:
    network = require_edits(network_from_model(model, name), name, "simulated quantization")
    require_float(network, name, "give the float model, whose quantization is simulated")
    return network


def _candidate(
    reference: Network,
    network: EditableNetwork,
    layers: Sequence[Layer],
    params: BiasCorrectionParams,
    quant_params: QuantParams,
    data_set: Any,
    choice: Choice,
    norms: Mapping[str, ConvBnInfoType] | None = None,
) -> Candidate:
    """Shifts of these layers of a network, quantized in simulation, against those of the same names in the reference."""
    inputs = params.inputs_of(reference, "reference_model")
    batches = batches_from_data(data_set, inputs, name="data_set", batch_size=params.batch_size)
    fitted = math.ceil(params.num_bias_correct_samples / params.batch_size)
    measured = 0 if quant_params.activation_bits is None else math.ceil(params.num_quant_samples / params.batch_size)
    with Storage(checked_budget(None)) as storage:
        samples = Samples(storage)
        reading = _read(batches, samples, fitted, max(fitted, measured))
        quantized = simulated(
            network, quant_params, lambda names: ranges_of(network, names, itertools.islice(reading, measured))
        )
        collections.deque(reading, maxlen=0)
        names = {layer.name for layer in layers}
        after = [layer for layer in quantized.layers if layer.name in names]
        matches = match_by_name(reference.layers, after)
        builder = CandidateBuilder(
            reference, quantized, matches, [choice], samples, OneShard(samples, available_cpus()), lambda *_: None, norms=norms
        )
        return builder.candidate(choice)


def _read(batches: Iterable[Feeds], samples: Samples, fitted: int, wanted: int) -> Iterator[Feeds]:
    """Up to the wanted number of batches, of which the first go to the samples too, each as one."""
    read = 0
    for read, feeds in enumerate(itertools.islice(batches, wanted), start=1):
        if read <= fitted:
            samples.add({name: array.copy() for name, array in feeds.items()}, 1)
        yield feeds
    if read == 0:
        raise ValueError("data_set: no samples, at least one is needed")
    if read < wanted:
        warnings.warn(f"data_set: ended after {read} batches, {wanted} were asked for", stacklevel=2)


def _layer(network: Network, name: str, where: str) -> Layer:
    """The layer of this name. Raises ValueError where it cannot be corrected, or there is none."""
    layers = without_later_calls(network.layers)
    for layer in layers:
        if layer.name == name:
            return layer
    for report in network.unsupported:
        if report.name == name:
            raise ValueError(f"{where}: layer {name} cannot be corrected: {report.reason}")
    raise ValueError(f"{where}: {name!r} is no layer; the layers are {_listed(layer.name for layer in layers)}")


def _warn_of_uncorrected_layers(reports: Iterable[LayerReport]) -> None:
    left = [f"{report.name} ({report.op}): {report.reason}" for report in reports if report.method is None]
    if left:
        warnings.warn(f"layers left as they are: {'; '.join(left)}", stacklevel=3)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
