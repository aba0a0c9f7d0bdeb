"""`equalize`: a float model in, the same function out, with channels of even ranges between its layers.

    fold batch normalizations -> (ReLU6 to ReLU) -> scale across layers -> fold high biases

Source: Nagel et al., "Data-Free Quantization through Weight Equalization and Bias Correction", arXiv 1906.04721, section 4.1.
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biascorr.adapters.loading import network_from_model
from biascorr.arguments import check_flags, paths_of, renamed
from biascorr.calibration.data import check_amounts
from biascorr.calibration.progress import LOGGER, Progress, Work
from biascorr.calibration.resources import checked_threads
from biascorr.calibration.samples import Samples
from biascorr.calibration.storage import Storage, checked_budget
from biascorr.equalization.folding import fold_batch_norms
from biascorr.equalization.high_bias import fold_high_biases
from biascorr.equalization.result import Equalization, OutputChange, largest_change
from biascorr.equalization.scaling import check_iterations, scale
from biascorr.graph.network import EditableNetwork, Edits, Feeds, Network, require_edits, require_float
from biascorr.graph.operations import Activation, ActivationType
from biascorr.graph.reasons import ReasonCode
from biascorr.typing import Data, Model, ModelFile

_ROUNDING = 1e-4
"""Relative change of an output that rounding to float32 explains."""

_ROUNDINGS = 8
"""Steps of a coarser type that rounding explains."""


_SWEEPS = 20
"""Sweeps over all layers, about."""

EQUALIZE_FIRST = "equalize the float model, then quantize it"


@renamed(model="reference")
def equalize(
    reference: Model | ModelFile,
    data: Data | None = None,
    *,
    iterations: int | None = None,
    replace_relu6: bool = False,
    batch_size: int = 1,
    max_samples: int | None = None,
    memory_budget: int | str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Equalization[Model]:
    """Scales channels between layers so that each layer's channels have even ranges, which quantization loses less of.

    Batch normalizations are folded into layers; each channel between two layers is scaled so that its weights have the same
    range in both; high biases move to the next layers. The statistics of the folded batch normalizations stay with the model,
    for :func:`find_all_convs_bn_with_activation` and analytical bias correction.

    Parameters
    ----------
    reference : path, bytes, onnx.ModelProto or keras.Model
        The float model: ONNX, TFLite or Keras.
    data : array, mapping, iterable, CalibrationDataReader or path, optional
        Samples, as :func:`biascorr.correct` takes them: they limit what is folded of high biases, and the float outputs for
        them before and after are compared.
    iterations : int, optional
        Sweeps over all layers; 1 is the classic single one. None: until nothing changes.
    replace_relu6 : bool
        Whether ReLU6 becomes ReLU everywhere, which changes the function. Otherwise, a ReLU6 or Clip between two scaled layers
        gets a bound for each channel where that gains more than it costs, and else ends the chain.
    batch_size : int
        Samples of an array, or of a data set of single samples, that make a batch, where the model does not fix that.
    max_samples : int, optional
        No more samples are read, of any kind of data. None: all of them.
    memory_budget : int or str, optional
        Bytes of samples and outputs held in memory, also as "1.5GB"; the rest goes to a temporary folder that is removed at the
        end. None: half of the memory that is free, in the container that this process is in.
    threads : int, optional
        Threads that run the model, at least 1. None: one for each CPU that this process may use.
    progress : callable, optional
        Called with the step, how much of all the work is done, and how much there is: 1000; None while nobody knows how many
        samples there are, when those that were read are counted.

    Returns
    -------
    Equalization
        The equalized model and what was done. The model and the files given are not changed.

    Raises
    ------
    FileNotFoundError, ImportError, TypeError
        As :func:`biascorr.correct`.
    ValueError
        The model is invalid or quantized; iterations, batch_size or max_samples is no integer of at least 1; the data does not
        fit the model, or never ends and there is no max_samples.

    Warns
    -----
    UserWarning
        The float outputs moved by more than rounding; ranges did not settle.

    Notes
    -----
    Folding and scaling change nothing but rounding. Folding high biases through a ReLU does without data, where a value falls
    more than three standard deviations below its mean; with data, no more is folded than leaves all of it as it was.

    Examples
    --------
    >>> import onnx.parser
    >>> model = onnx.parser.parse_model('''<ir_version: 8, opset_import: ["" : 17]> network (float[N,1] x) => (float[N,1] y)
    ...     <float[1,2] w1 = {8, 1}, float[2,1] w2 = {2, 4}> { [a] h = MatMul(x, w1)  r = Relu(h)  [b] y = MatMul(r, w2) }''')
    >>> equalization = equalize(model)
    >>> equalization.chains[0].factors
    [array([2. , 0.5])]
    """
    started = time.perf_counter()
    check_iterations(iterations)
    check_flags(replace_relu6=replace_relu6)
    check_amounts(batch_size, max_samples)
    budget, threads = checked_budget(memory_budget), checked_threads(threads)
    network, work = require_edits(network_from_model(reference, "reference"), "reference", "equalization"), Work(progress)
    with Storage(budget) as storage:
        samples = Samples(storage)
        if data is not None:
            samples.read(data, network.inputs, work, batch_size=batch_size, max_samples=max_samples)
        result = equalized(network, samples, work, threads, iterations=iterations, replace_relu6=replace_relu6)
    if result.change is not None and not result.change.relative <= _rounding(network):
        warnings.warn(f"the float outputs moved by up to {result.change}", stacklevel=3)
    for step, change in result.changes.items():
        LOGGER.info("%s: outputs moved by up to %s", step, change)
    files = paths_of({"reference": reference, "data": data})
    return replace(result, seconds=time.perf_counter() - started, files=files, data_digest=samples.digest)


def equalized(
    network: EditableNetwork,
    samples: Samples,
    progress: Progress | Work,
    threads: int = 0,
    *,
    iterations: int | None = None,
    replace_relu6: bool = False,
) -> Equalization:
    """See :func:`equalize`; of a network, which is not changed."""
    require_float(network, "reference", EQUALIZE_FIRST)
    work = Work.of(progress)
    work.expect({"float": (3 if samples.data_batches else 0) * len(samples.data_batches), "scaling": _SWEEPS})
    meter = _Meter(network, samples, work, threads)
    network, folds, left = fold_batch_norms(network)
    meter.measure("batch norm fold", network, bool(folds))
    network, replaced = _with_relu(network) if replace_relu6 else (network, [])
    meter.measure("ReLU6 to ReLU", network, bool(replaced))
    with work.doing("scaling", _SWEEPS, "scaling") as advance:
        network, chains, unscaled = scale(network, iterations, lambda *_: advance(1 / _SWEEPS))
    meter.measure("scaling", network, bool(chains))
    network, high_biases, kept = fold_high_biases(network, batches=samples.feeds, threads=threads)
    meter.measure("high-bias fold", network, bool(high_biases))
    meter.forget()
    reasons = {report.name: report.reasons for report in network.unsupported}
    reasons |= {name: (reason,) for name, reason in (left | unscaled).items()}
    for name, reason in kept.items():
        reasons[name] = (*reasons.get(name, ()), ReasonCode.HIGH_BIAS_STAYS(reason=reason))
    return Equalization(network, folds, replaced, chains, high_biases, reasons, meter.changes)


def _with_relu(network: EditableNetwork) -> tuple[EditableNetwork, list[str]]:
    """A network with ReLU in place of ReLU6, and where that was."""
    roles = network.facts().roles.items()
    found = [name for name, role in roles if isinstance(role, Activation) and role.type == ActivationType.relu6]
    return network.edited(Edits(limits=dict.fromkeys(found, (0.0, np.inf)))), found


def _rounding(network: Network) -> float:
    """Relative change of an output that rounding to the types of the network explains."""
    return max([_ROUNDING, *(_ROUNDINGS * float(np.finfo(layer.weights.dtype).eps) for layer in network.layers)])


class _Meter:
    """Measures how far outputs have moved from those of the given network."""

    def __init__(self, network: Network, samples: Samples, work: Work, threads: int) -> None:
        self._samples = samples
        self._batches = samples.data_batches
        self._work = work
        self._threads = threads
        self._largest: dict[str, float] = {}
        self.changes: dict[str, OutputChange] = {}
        for batch, outputs in self._outputs(network, "float network"):
            for name, array in outputs.items():
                if isinstance(array, np.ndarray) and array.dtype.kind in "fiub":  # not a sequence, nor text
                    samples.storage["float", name, batch] = array
                    self._largest[name] = max(self._largest.get(name, 0.0), _largest(array))

    def measure(self, step: str, network: Network, is_changed: bool) -> None:
        """Measures a network after this step, where it has changed anything."""
        if not is_changed or not self._batches:
            return
        change = OutputChange()
        for batch, outputs in self._outputs(network, step):
            for name, largest in self._largest.items():
                moved = largest_change(self._samples.storage["float", name, batch], outputs[name])
                relative = moved / largest if largest else moved
                change = OutputChange(*np.maximum((moved, relative), (change.absolute, change.relative)).tolist())
        self.changes[step] = change

    def forget(self) -> None:
        """Frees what was held."""
        for name, batch in itertools.product(self._largest, self._batches):
            self._samples.storage.pop(("float", name, batch))

    def _outputs(self, network: Network, step: str) -> Iterator[tuple[int, Feeds]]:
        compute: Callable[[Feeds], Feeds] | None = None
        batches = zip(self._batches, self._samples.feeds(self._batches))
        for batch, feeds in self._work.each(batches, "float", len(self._batches), step):
            compute = compute or network.part(feeds, network.outputs, threads=self._threads)
            yield batch, compute(feeds)


def _largest(array: NDArray[Any]) -> float:
    values = np.abs(array.astype(np.float64))
    return float(values.max(initial=0.0, where=np.isfinite(values)))
