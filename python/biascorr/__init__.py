"""Bias correction for quantized neural networks.

Arrays: :class:`Quantization`, :func:`prepare_input_mean`, :class:`ChannelMean`, :class:`MeanBiasCorrector` and its relatives,
:func:`fake_quantize`. Whole models: :func:`correct`, :func:`quantize`, :func:`compare`, :func:`inspect`, :func:`equalize`,
:func:`fold`, with samples from a folder by :func:`images`; :class:`QuantParams`; and the classic :class:`BiasCorrection` and
:func:`equalize_model`.
"""

# ruff: noqa: E402 (numpy, and all that is imported here, takes long enough for a Ctrl-C)

import sys

_name = sys.argv[0].replace("\\", "/").rpartition("/")[2] if sys.argv else ""
if (sys.orig_argv[-len(sys.argv)] if _name == "-m" else _name) in ("biascorr", "biascorr.exe"):  # this is the command
    from biascorr.cli.signals import leave_on_signals

    leave_on_signals("nothing was written")

import importlib
from typing import TYPE_CHECKING

from biascorr._kernels import build_info as _build_info
from biascorr._kernels import get_num_threads, set_num_threads
from biascorr.correctors import (
    AnalyticalBiasCorrector,
    BiasCorrector,
    EmpiricalBiasCorrector,
    MeanBiasCorrector,
    NullBiasCorrector,
)
from biascorr.quantization import BiasCorrectionType, Quantization, fake_quantize
from biascorr.statistics import ChannelMean, prepare_input_mean

if TYPE_CHECKING:
    from biascorr.calibration.images import images
    from biascorr.correction.classic import BiasCorrection, BiasCorrectionParams, find_all_convs_bn_with_activation
    from biascorr.correction.correct import correct
    from biascorr.correction.quant_params import QuantParams
    from biascorr.correction.quantize import quantize
    from biascorr.correction.result import Correction
    from biascorr.equalization.classic import (
        ClsSetInfo,
        ClsSetLayerPairInfo,
        CrossLayerScaling,
        HighBiasFold,
        equalize_model,
        fold_all_batch_norms,
        fold_given_batch_norms,
    )
    from biascorr.equalization.equalize import equalize
    from biascorr.equalization.fold import Folding, fold
    from biascorr.equalization.result import Equalization
    from biascorr.graph.batch_norms import ConvBnInfoType
    from biascorr.graph.operations import ActivationType
    from biascorr.graph.reasons import LayerReport
    from biascorr.inspection.compare import Comparison, compare
    from biascorr.inspection.inspect import Inspection, inspect

__all__ = [
    "ActivationType",
    "AnalyticalBiasCorrector",
    "BiasCorrection",
    "BiasCorrectionParams",
    "BiasCorrectionType",
    "BiasCorrector",
    "ChannelMean",
    "ClsSetInfo",
    "ClsSetLayerPairInfo",
    "Comparison",
    "ConvBnInfoType",
    "Correction",
    "CrossLayerScaling",
    "EmpiricalBiasCorrector",
    "Equalization",
    "Folding",
    "HighBiasFold",
    "Inspection",
    "LayerReport",
    "MeanBiasCorrector",
    "NullBiasCorrector",
    "QuantParams",
    "Quantization",
    "compare",
    "correct",
    "equalize",
    "equalize_model",
    "fake_quantize",
    "find_all_convs_bn_with_activation",
    "fold",
    "fold_all_batch_norms",
    "fold_given_batch_norms",
    "get_num_threads",
    "images",
    "inspect",
    "prepare_input_mean",
    "quantize",
    "set_num_threads",
    "show_config",
]
__version__ = _build_info()[0]

if not TYPE_CHECKING:  # hidden, or type checkers would take any name for an attribute of this module
    _MODULE_OF = {
        "ActivationType": "biascorr.graph.operations",
        "BiasCorrection": "biascorr.correction.classic",
        "BiasCorrectionParams": "biascorr.correction.classic",
        "ClsSetInfo": "biascorr.equalization.classic",
        "ClsSetLayerPairInfo": "biascorr.equalization.classic",
        "Comparison": "biascorr.inspection.compare",
        "ConvBnInfoType": "biascorr.graph.batch_norms",
        "Correction": "biascorr.correction.result",
        "CrossLayerScaling": "biascorr.equalization.classic",
        "Equalization": "biascorr.equalization.result",
        "Folding": "biascorr.equalization.fold",
        "HighBiasFold": "biascorr.equalization.classic",
        "Inspection": "biascorr.inspection.inspect",
        "LayerReport": "biascorr.graph.reasons",
        "QuantParams": "biascorr.correction.quant_params",
        "compare": "biascorr.inspection.compare",
        "correct": "biascorr.correction.correct",
        "equalize": "biascorr.equalization.equalize",
        "equalize_model": "biascorr.equalization.classic",
        "quantize": "biascorr.correction.quantize",
        "inspect": "biascorr.inspection.inspect",
        "find_all_convs_bn_with_activation": "biascorr.correction.classic",
        "fold": "biascorr.equalization.fold",
        "fold_all_batch_norms": "biascorr.equalization.classic",
        "fold_given_batch_norms": "biascorr.equalization.classic",
        "images": "biascorr.calibration.images",
    }

    def __getattr__(name):
        """The interface to whole models, imported at first use: that takes longer than all the rest of this package."""
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(_MODULE_OF[name]), name)
        return value

    def __dir__():
        return sorted({*(name for name in globals() if name.startswith("__")), *__all__})


def show_config() -> None:
    """Prints what this build is and what it runs on: version, CPU tier, threads, build profile."""
    version, tier, profile = _build_info()
    print(f"biascorr {version}\ncpu tier: {tier}\nthreads: {get_num_threads()}\nbuild profile: {profile}")
