"""The classic interface to equalization: the steps one by one, and all of them together."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biascorr.adapters.loading import network_from_model
from biascorr.equalization.equalize import EQUALIZE_FIRST, equalize
from biascorr.equalization.folding import fold_batch_norms
from biascorr.equalization.high_bias import acting, fold_high_biases
from biascorr.equalization.scaling import ScaledChain, check_iterations, scale
from biascorr.graph.batch_norms import ConvBnInfoType, batch_norms_around_layers
from biascorr.graph.network import EditableNetwork, require_edits, require_float
from biascorr.graph.operations import Facts


@dataclass(frozen=True, eq=False)
class ClsSetLayerPairInfo:
    """Two layers whose channels in between were scaled.

    Parameters
    ----------
    layer1, layer2 : str
        Their names.
    scale_factor : ndarray, (C,), float64
        Factors: each output channel of the first was divided by one, the input channel of the second multiplied by it.
    relu_activation_between_layers : bool
        Whether there is an activation between them that does anything.
    """

    layer1: str
    layer2: str
    scale_factor: NDArray[np.float64]
    relu_activation_between_layers: bool


@dataclass(frozen=True, eq=False)
class ClsSetInfo:
    """Layers that were scaled together.

    Parameters
    ----------
    cls_pairs : sequence of ClsSetLayerPairInfo
        One for two layers, two for three of which the middle one is depthwise, and so on.
    """

    cls_pairs: Sequence[ClsSetLayerPairInfo]


def equalize_model(
    model: Any,
    *,
    iterations: int | None = None,
    replace_relu6: bool = False,
    conv_bn_dict: MutableMapping[str, ConvBnInfoType] | None = None,
) -> Any:
    """The model that :func:`biascorr.equalize` makes.

    Parameters
    ----------
    model, iterations, replace_relu6
        As there.
    conv_bn_dict : mutable mapping from str to ConvBnInfoType, optional
        The result of :func:`find_all_convs_bn_with_activation` for the model before; it is updated for the layers of the
        equalized model.

    Returns
    -------
    onnx.ModelProto or keras.Model
        A new model.

    Raises
    ------
    FileNotFoundError, ImportError, TypeError, ValueError
        As :func:`biascorr.equalize`.

    Notes
    -----
    :meth:`BiasCorrection.correct_bias` takes either: batch normalizations that became part of the layers of its model are taken
    as they are there, whatever a mapping from before says of them.
    """
    result = equalize(_network(model), iterations=iterations, replace_relu6=replace_relu6)
    if conv_bn_dict is not None:
        conv_bn_dict.update(batch_norms_around_layers(result.network))
    return result.model


def fold_all_batch_norms(model: Any) -> tuple[Any, list[tuple[str, str]]]:
    """The model with all batch normalizations folded into layers that can be.

    Parameters
    ----------
    model : path, bytes, onnx.ModelProto or keras.Model
        The float model, which is not changed.

    Returns
    -------
    model : onnx.ModelProto or keras.Model
        A new model, of the same function to rounding.
    pairs : list of (str, str)
        Layers and the batch normalizations that became part of them, by name.

    Raises
    ------
    FileNotFoundError, ImportError, TypeError, ValueError
        As :func:`biascorr.equalize`.
    """
    network, folds, _ = fold_batch_norms(_network(model))
    return network.model, [(fold.layer, fold.batch_norm) for fold in folds]


def fold_given_batch_norms(model: Any, layer_pairs: Sequence[tuple[str, str]]) -> Any:
    """The model with these batch normalizations folded into these layers.

    Parameters
    ----------
    model : path, bytes, onnx.ModelProto or keras.Model
        The float model, which is not changed.
    layer_pairs : sequence of (str, str)
        Layers and the batch normalizations after or before them, by name. One that several layers read has a pair with each.

    Returns
    -------
    onnx.ModelProto or keras.Model
        A new model, of the same function to rounding.

    Raises
    ------
    FileNotFoundError, ImportError, TypeError
        As :func:`biascorr.equalize`.
    ValueError
        As there; a pair cannot be folded, or has other names.
    """
    pairs = list(_checked_pairs("layer_pairs", layer_pairs))
    network, folds, left = fold_batch_norms(_network(model), pairs)
    done = {(fold.layer, fold.batch_norm) for fold in folds}
    for layer, norm in pairs:
        if (layer, norm) not in done:
            reason = left.get(norm, "no batch normalization of this name, or it is next to another layer")
            raise ValueError(f"layer_pairs: {norm} cannot be folded into {layer}: {reason}")
    return network.model


class CrossLayerScaling:
    """Scales channels between layers, so that each has the same range in both.

    Source: Nagel et al., "Data-Free Quantization through Weight Equalization and Bias Correction", arXiv 1906.04721,
    section 4.1.
    """

    @staticmethod
    def scale_model(model: Any, *, iterations: int | None = None) -> tuple[Any, list[ClsSetInfo]]:
        """Scales all layers that follow each other.

        Parameters
        ----------
        model : path, bytes, onnx.ModelProto or keras.Model
            The float model, which is not changed; its batch normalizations are folded before, or they end chains of layers.
        iterations : int, optional
            Sweeps over all layers; 1 is the classic single one. None: until nothing changes.

        Returns
        -------
        model : onnx.ModelProto or keras.Model
            A new model, of the same function to rounding.
        cls_set_info_list : list of ClsSetInfo
            The layers that were scaled, and their factors.

        Raises
        ------
        FileNotFoundError, ImportError, TypeError, ValueError
            As :func:`biascorr.equalize`.
        """
        check_iterations(iterations)
        network, chains, _ = scale(_network(model), iterations)
        return network.model, [_info(chain, network.facts()) for chain in chains]

    @staticmethod
    def scale_cls_sets(model: Any, cls_sets: Sequence[Sequence[str]]) -> tuple[Any, list[tuple[NDArray[np.float64], ...]]]:
        """Scales these layers, one sweep in this order.

        Parameters
        ----------
        model : path, bytes, onnx.ModelProto or keras.Model
            The float model, which is not changed.
        cls_sets : sequence of tuples of str
            Layers that follow each other, by name: two, or more with depthwise layers inside.

        Returns
        -------
        model : onnx.ModelProto or keras.Model
            A new model, of the same function to rounding.
        scale_factors : list of tuples of ndarray, (C,), float64
            Of each set, between each two layers.

        Raises
        ------
        FileNotFoundError, ImportError, TypeError
            As :func:`biascorr.equalize`.
        ValueError
            As there; layers of a set do not follow each other, or between them is something after which a scaled channel is not
            the same.
        """
        network, chains, _ = scale(_network(model), iterations=1, wanted=cls_sets)
        return network.model, [tuple(chain.factors) for chain in chains]


class HighBiasFold:
    """Moves biases that a ReLU never cuts to the next layers.

    Source: Nagel et al., "Data-Free Quantization through Weight Equalization and Bias Correction", arXiv 1906.04721,
    section 4.1.3.
    """

    @staticmethod
    def bias_fold(model: Any, folded_pairs: Sequence[tuple[str, str]], cls_set_info_list: Sequence[ClsSetInfo]) -> Any:
        """Folds the high biases of scaled layers.

        Parameters
        ----------
        model : path, bytes, onnx.ModelProto or keras.Model
            The scaled model, which is not changed; it knows what its folded batch normalizations said.
        folded_pairs : sequence of (str, str)
            The result of :func:`fold_all_batch_norms`: of these layers, biases are folded.
        cls_set_info_list : sequence of ClsSetInfo
            The result of :meth:`CrossLayerScaling.scale_model`: to the second layers of these pairs, biases move.

        Returns
        -------
        onnx.ModelProto or keras.Model
            A new model; its function is nearly the same, and the same where there is no activation between the layers.

        Raises
        ------
        FileNotFoundError, ImportError, TypeError, ValueError
            As :func:`biascorr.equalize`.
        """
        normalized = {layer for layer, _ in _checked_pairs("folded_pairs", folded_pairs)}
        pairs = [(pair.layer1, pair.layer2) for info in cls_set_info_list for pair in info.cls_pairs]
        return fold_high_biases(_network(model), [pair for pair in pairs if pair[0] in normalized])[0].model


def _checked_pairs(argument: str, pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    for k, pair in enumerate(pairs):
        if not isinstance(pair, (tuple, list)) or [isinstance(name, str) for name in pair] != [True, True]:
            raise ValueError(f"{argument}[{k}]: {pair!r}, expected a layer and a batch normalization, by name")
        layer, norm = pair
        yield layer, norm


def _network(model: Any) -> EditableNetwork:
    network = require_edits(network_from_model(model, "model"), "model", "equalization")
    require_float(network, "model", EQUALIZE_FIRST)
    return network


def _info(chain: ScaledChain, facts: Facts) -> ClsSetInfo:
    return ClsSetInfo(
        [
            ClsSetLayerPairInfo(link.first.name, link.second.name, factors, bool(acting(facts, link)))
            for link, factors in zip(chain.chain.links, chain.factors)
        ]
    )
