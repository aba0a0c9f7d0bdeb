"""Takes the bias that quantization leaves in neural networks out again.

Arrays: :class:`Quantization`, :func:`prepare_input_mean`, :class:`ChannelMean`, :class:`MeanBiasCorrector` and its relatives,
:func:`fake_quantize`. Whole models: :func:`correct`, :func:`equalize`, :class:`QuantParams`, and the classic
:class:`BiasCorrection` and :func:`equalize_model`.
"""

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
from biascorr.quantization import BiasCorrectionType, PackedInt4, Quantization, fake_quantize
from biascorr.statistics import ChannelMean, prepare_input_mean

if TYPE_CHECKING:
    from biascorr.model.classic import BiasCorrection, BiasCorrectionParams
    from biascorr.model.classic_equalization import (
        ClsSetInfo,
        ClsSetLayerPairInfo,
        CrossLayerScaling,
        HighBiasFold,
        equalize_model,
        fold_all_batch_norms,
        fold_given_batch_norms,
    )
    from biascorr.model.correction import Correction, correct
    from biascorr.model.equalization import Equalization, equalize
    from biascorr.model.network import ActivationType, LayerReport
    from biascorr.model.patterns import ConvBnInfoType, find_all_convs_bn_with_activation
    from biascorr.model.quant_params import QuantParams

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
    "ConvBnInfoType",
    "Correction",
    "CrossLayerScaling",
    "EmpiricalBiasCorrector",
    "Equalization",
    "HighBiasFold",
    "LayerReport",
    "MeanBiasCorrector",
    "NullBiasCorrector",
    "PackedInt4",
    "QuantParams",
    "Quantization",
    "correct",
    "equalize",
    "equalize_model",
    "fake_quantize",
    "find_all_convs_bn_with_activation",
    "fold_all_batch_norms",
    "fold_given_batch_norms",
    "get_num_threads",
    "prepare_input_mean",
    "set_num_threads",
    "show_config",
]
__version__ = _build_info()[0]

if not TYPE_CHECKING:  # hidden, or type checkers would take any name for an attribute of this module
    _MODULE_OF = {
        "ActivationType": "biascorr.model.network",
        "BiasCorrection": "biascorr.model.classic",
        "BiasCorrectionParams": "biascorr.model.classic",
        "ClsSetInfo": "biascorr.model.classic_equalization",
        "ClsSetLayerPairInfo": "biascorr.model.classic_equalization",
        "ConvBnInfoType": "biascorr.model.patterns",
        "Correction": "biascorr.model.correction",
        "CrossLayerScaling": "biascorr.model.classic_equalization",
        "Equalization": "biascorr.model.equalization",
        "HighBiasFold": "biascorr.model.classic_equalization",
        "LayerReport": "biascorr.model.network",
        "QuantParams": "biascorr.model.quant_params",
        "correct": "biascorr.model.correction",
        "equalize": "biascorr.model.equalization",
        "equalize_model": "biascorr.model.classic_equalization",
        "find_all_convs_bn_with_activation": "biascorr.model.patterns",
        "fold_all_batch_norms": "biascorr.model.classic_equalization",
        "fold_given_batch_norms": "biascorr.model.classic_equalization",
    }

    def __getattr__(name):
        """The interface to whole models, imported at first use: that takes longer than all the rest of this package."""
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(_MODULE_OF[name]), name)
        return value

    def __dir__():
        return sorted({*globals(), *__all__})


def show_config() -> None:
    """Prints what this build is and what it runs on: version, CPU tier, threads, build profile."""
    version, tier, profile = _build_info()
    print(f"biascorr {version}\ncpu tier: {tier}\nthreads: {get_num_threads()}\nbuild profile: {profile}")
