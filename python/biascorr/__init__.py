"""Takes the bias that quantization leaves in neural networks out again.

Arrays: :class:`Quantization`, :func:`prepare_input_mean`, :class:`ChannelMean`, :class:`MeanBiasCorrector` and its relatives,
:func:`fake_quantize`. Whole models: :func:`correct`.
"""

from biascorr._kernels import build_info as _build_info
from biascorr._kernels import get_num_threads, set_num_threads
from biascorr.correctors import (
    AnalyticalBiasCorrector,
    BiasCorrector,
    EmpiricalBiasCorrector,
    MeanBiasCorrector,
    NullBiasCorrector,
)
from biascorr.model.correction import Correction, correct
from biascorr.model.network import LayerReport
from biascorr.quantization import BiasCorrectionType, Quantization, fake_quantize
from biascorr.statistics import ChannelMean, prepare_input_mean

__all__ = [
    "AnalyticalBiasCorrector",
    "BiasCorrectionType",
    "BiasCorrector",
    "ChannelMean",
    "Correction",
    "EmpiricalBiasCorrector",
    "LayerReport",
    "MeanBiasCorrector",
    "NullBiasCorrector",
    "Quantization",
    "correct",
    "fake_quantize",
    "get_num_threads",
    "prepare_input_mean",
    "set_num_threads",
    "show_config",
]
__version__ = _build_info()[0]


def show_config() -> None:
    """Prints what this build is and what it runs on: version, CPU tier, threads, build profile."""
    version, tier, profile = _build_info()
    print(f"biascorr {version}\ncpu tier: {tier}\nthreads: {get_num_threads()}\nbuild profile: {profile}")
