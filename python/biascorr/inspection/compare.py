"""`compare`: how near the outputs of models come to those of a reference, and how long they take.

Each model runs as it is deployed: its own runtime, with its default options. Per sample and output, see
:mod:`biascorr.correction.scoring`; besides, per output,

top1           share of positions at which the largest score is that of the same class
largest change max |q - r|
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biascorr import __version__
from biascorr.adapters.frameworks import Framework, framework_of_name
from biascorr.adapters.loading import network_from_model, sizes_by_file
from biascorr.arguments import paths_of
from biascorr.calibration.data import check_amounts
from biascorr.calibration.progress import Progress, Work
from biascorr.calibration.resources import checked_threads
from biascorr.calibration.samples import Samples
from biascorr.calibration.storage import Storage, checked_budget
from biascorr.correction.result import Correction
from biascorr.correction.scoring import (
    NOT_SCORED,
    KeptOutputs,
    Score,
    arrays_of,
    batches_again,
    compared_outputs,
    joined,
    output_pairs,
    random_among,
)
from biascorr.equalization.result import Equalization, largest_change
from biascorr.graph.network import BiasNetwork, Feeds, ModelInput, require_biases, versions_of
from biascorr.inspection.inputs import are_transposed, merged_inputs, paired_inputs, text_of_shape
from biascorr.report.records import Record, plain
from biascorr.report.reported import Reported
from biascorr.sweep.independence import BatchingFinder
from biascorr.typing import Data

_Outputs = Iterable[tuple[int, Feeds]]

_MAP = 4
"""Axes of an output that is a map: one with the channels of its pixels after the batch, or last."""


@dataclass(frozen=True)
class OutputComparison:
    """How near one output comes to that of the reference.

    Parameters
    ----------
    name : str
        The output of the reference.
    sqnr : float
        Mean signal to quantization noise ratio of the samples in dB.
    divergence : float or None
        Mean Kullback-Leibler divergence in nats; None where it is not probabilities.
    top1 : float or None
        Share of positions whose largest value is in the same place along the axis of classes; None where there is no such axis.
    largest_change : float
        The largest change of any value; nan where a number is none any more, or there are more or fewer of them.
    """

    name: str
    sqnr: float
    divergence: float | None
    top1: float | None
    largest_change: float


@dataclass(frozen=True, eq=False)
class ModelComparison:
    """How near a model comes to the reference.

    Parameters
    ----------
    name : str
        Its name.
    score : Score
        SQNR and divergence of each sample, the mean over the outputs.
    outputs : sequence of OutputComparison
        Each output that both models have.
    seconds : float
        What running it took, over all batches.
    size : int or None
        Bytes of its files; None of a model that is no file.
    """

    name: str
    score: Score = field(repr=False)
    outputs: Sequence[OutputComparison]
    seconds: float
    size: int | None = None

    @property
    def sqnr(self) -> float:
        """The mean SQNR in dB; nan where nothing could be compared."""
        return self.score.sqnr

    @property
    def divergence(self) -> float | None:
        """The mean divergence in nats; None where no output is probabilities."""
        return self.score.divergence

    @property
    def top1(self) -> float | None:
        """The mean over the outputs that have a top-1 agreement."""
        shares = [each.top1 for each in self.outputs if each.top1 is not None]
        return float(np.mean(shares)) if shares else None

    @property
    def largest_change(self) -> float:
        """The largest change of any output."""
        return float(np.max([each.largest_change for each in self.outputs])) if self.outputs else np.nan

    def to_dict(self) -> Record:
        """As plain data."""
        return {
            "name": self.name,
            "sqnr": plain(self.sqnr),
            "divergence": plain(self.divergence),
            "top1": plain(self.top1),
            "largest_change": plain(self.largest_change),
            "seconds": plain(self.seconds),
            "size": self.size,
            "outputs": [plain(vars(each)) for each in self.outputs],
        }


@dataclass(frozen=True, eq=False, repr=False)
class Comparison(Reported):
    """How near models come to a reference.

    Parameters
    ----------
    reference : str
        The name of the reference.
    models : sequence of ModelComparison
        The models, in the order in which they were given.
    samples, batches : int
        How many they ran over.
    seconds : float
        What running the reference took, over all batches.
    size : int or None
        Bytes of the reference.
    notes : sequence of str
        Remarks.
    versions : mapping from str to str
        Of what read and ran the models.
    """

    reference: str
    models: Sequence[ModelComparison]
    samples: int
    batches: int
    seconds: float
    size: int | None = None
    notes: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] | None = None
    command: str | None = None

    def __getitem__(self, name: str) -> ModelComparison:
        """A model by its name."""
        found = next((each for each in self.models if each.name == name), None)
        if found is None:
            raise KeyError(name)
        return found

    def to_dict(self) -> Record:
        return {
            "kind": "comparison",
            "biascorr": __version__,
            "reference": {"name": self.reference, "seconds": plain(self.seconds), "size": self.size},
            "samples": self.samples,
            "batches": self.batches,
            "models": [each.to_dict() for each in self.models],
            "notes": list(self.notes),
            "versions": dict(self.versions),
            "files": None if self.files is None else dict(self.files),
            "command": self.command,
        }


def compare(
    reference: Any,
    models: Any,
    data: Data,
    *,
    batch_size: int = 1,
    max_samples: int | None = 300,
    memory_budget: int | str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Compares the outputs of models with those of a reference, mostly quantized models with the float one.

    Each model runs as it is deployed: by its own runtime with its default options, on this CPU.

    Parameters
    ----------
    reference : path, bytes, onnx.ModelProto or keras.Model
        The model that the others are to come near to: ONNX, TFLite or Keras.
    models : model, sequence of models or mapping from str to model
        The models that are compared with it, of any framework, or what `correct` or `equalize` returned; a mapping names them.
        They take the inputs of the reference: of the same names or, where these differ, in the same order; of the same types
        and shapes.
    data : array, mapping, iterable, CalibrationDataReader or path
        Samples, as :func:`biascorr.correct` takes them.
    batch_size : int
        Samples of an array, or of a data set of single samples, that make a batch, where no model fixes that.
    max_samples : int, optional
        No more samples are read; a note says where there were more. None: all of them.
    memory_budget : int or str, optional
        Bytes of samples and outputs held in memory, also as "1.5GB"; the rest goes to a temporary folder that is removed at the
        end. None: half of the memory that is free, in the container that this process is in.
    threads : int, optional
        Threads that run a model, at least 1; TFLite models run by one, as is the default of their runtime. None: one for each
        CPU that this process may use.
    progress : callable, optional
        Called with the step, how much of all the work is done, and how much there is: 1000; None while nobody knows how many
        samples there are, when those that were read are counted.

    Returns
    -------
    Comparison
        Of each model the SQNR, divergence, top-1 agreement, largest change and seconds, in all and of each output.

    Raises
    ------
    FileNotFoundError, ImportError, OSError, TypeError
        As :func:`biascorr.correct`.
    ValueError
        A model is invalid, or does not take the inputs of the reference, or has none of its outputs; there are no models; the
        data does not fit.

    Notes
    -----
    The time of a model is that of its runs, of what the runtime does, after one that is not counted.

    Examples
    --------
    >>> import numpy as np
    >>> import onnx.parser
    >>> text = '''<ir_version: 8, opset_import: ["" : 17]> network (float[N,2] x) => (float[N,2] y)
    ...     <float[2,2] w = {0.1, 0.2, 0.3, %s}> { y = MatMul(x, w) }'''
    >>> exact, rounded = (onnx.parser.parse_model(text % weight) for weight in (0.41, 0.4))
    >>> comparison = compare(exact, {"rounded": rounded}, np.ones((8, 2), np.float32))
    >>> round(comparison["rounded"].sqnr, 1), comparison["rounded"].top1
    (37.3, 1.0)
    """
    check_amounts(batch_size, max_samples)
    budget, threads = checked_budget(memory_budget), checked_threads(threads)
    named, work = _named(models), Work(progress)
    network = require_biases(network_from_model(_model_of(reference), "reference"), "reference")
    pairs, versions = dict[str, dict[str, ModelInput]](), dict(versions_of(network))
    for name, model in named.items():
        loaded = _loaded(name, model)
        pairs[name] = paired_inputs(network.inputs, loaded.inputs, name)
        _check_outputs(network, loaded, name)
        versions |= versions_of(loaded)
        del loaded
    inputs = merged_inputs(network.inputs, pairs)
    with Storage(budget) as storage:
        samples = Samples(storage)
        batchings = BatchingFinder(network, inputs, storage, threads)
        samples.read(data, inputs, work, batch_size=batch_size, max_samples=max_samples, batchings=batchings)
        samples.score_all()
        work.plan({"running": (1 + len(named)) * len(samples.scored_batches)})
        expected = KeptOutputs(network, samples)
        ours = _Timed(network, samples, threads, work, _name_of(reference) or "reference")
        expected.keep(ours.outputs())
        again = ours.again(batches_again(samples.scored_batches))
        random = random_among(expected.errors({name: name for name in network.outputs}, again))
        ours.forget()
        found = [
            _compared(expected, network, _Timed(_loaded(name, model), samples, threads, work, name, pairs[name]), model)
            for name, model in named.items()
        ]
    notes = [f"not all samples were read, {max_samples} at most (max_samples)"] if samples.left_out else []
    if random:
        notes.append(
            f"the reference does not give the same outputs twice ({', '.join(random)}): what is said of them is chance"
        )
    notes += [note for _, remarks in found for note in remarks]
    return Comparison(
        ours.name,
        [each for each, _ in found],
        samples.count,
        samples.batches_read,
        ours.seconds,
        _size_of(reference),
        notes,
        versions,
        paths_of({"reference": reference, **{f"models[{name}]": model for name, model in named.items()}, "data": data}),
    )


def _named(models: Any) -> dict[str, Any]:
    """The models by name."""
    if isinstance(models, Mapping):
        listed, names = list(models.values()), list(map(str, models))
    else:
        listed = list(models) if isinstance(models, (list, tuple)) else [models]
        names = [_name_of(model) or f"model {k}" for k, model in enumerate(listed, start=1)]
        if len(set(names)) < len(names):
            names = [str(model) if _name_of(model) else name for model, name in zip(listed, names)]
    if not names:
        raise ValueError("models: none, expected at least one")
    return dict(zip(_distinct(names), listed))


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, with a number where one comes again."""
    found: list[str] = []
    for name in names:
        numbered = (f"{name} ({k})" for k in itertools.count(2))
        found.append(name if name not in found else next(each for each in numbered if each not in (*names, *found)))
    return found


def _name_of(model: Any) -> str | None:
    return Path(model).name if isinstance(model, (str, PathLike)) else None


def _model_of(model: Any) -> Any:
    return model.network if isinstance(model, (Correction, Equalization)) else model


def _loaded(name: str, model: Any) -> BiasNetwork:
    return require_biases(network_from_model(_model_of(model), name), name)


def _size_of(model: Any) -> int | None:
    return sum(sizes_by_file(Path(model), "models").values()) if isinstance(model, (str, PathLike)) else None


def _check_outputs(reference: BiasNetwork, network: BiasNetwork, name: str) -> None:
    if not output_pairs(reference, network):
        listed = [", ".join(each.outputs) for each in (network, reference)]
        raise ValueError(f"{name}: gives out {listed[0]}, expected the outputs of the reference: {listed[1]}")


class _Timed:
    """A model as it is deployed, run over all batches.

    Parameters
    ----------
    network : BiasNetwork
        The model.
    samples : Samples
        What it runs over.
    threads : int
        Threads that run it.
    work : Work
        What is told of batches that are done.
    name : str
        Its name.
    inputs : mapping from str to ModelInput, optional
        Its input for each one of the samples; None: those of the same names.

    Attributes
    ----------
    seconds : float
        What its runs took.
    """

    def __init__(
        self,
        network: BiasNetwork,
        samples: Samples,
        threads: int,
        work: Work,
        name: str,
        inputs: Mapping[str, ModelInput] | None = None,
    ) -> None:
        self.network: BiasNetwork | None = network
        self.name = name
        self.seconds = 0.0
        self._samples = samples
        self._work = work
        self._names = {key: each.name for key, each in (inputs or {}).items()}
        self._run: Callable[[Feeds], dict[str, Any]] | None = network.deployed(threads=threads)

    def outputs(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The outputs of all batches; runs the first one twice, as runtimes prepare much at the first run."""
        batches = self._samples.scored_batches
        self._computed(next(self._samples.feeds(batches[:1])))
        runs = zip(batches, self._samples.feeds(batches))
        for batch, feeds in self._work.each(runs, "running", len(batches), f"running {self.name}"):
            start = time.perf_counter()
            computed = self._computed(feeds)
            self.seconds += time.perf_counter() - start
            yield batch, computed

    def again(self, batches: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        """The outputs of some batches, not counted."""
        yield from ((batch, self._computed(feeds)) for batch, feeds in zip(batches, self._samples.feeds(batches)))

    def forget(self) -> None:
        """Frees what runs the model."""
        self._run = self.network = None

    def _computed(self, feeds: Feeds) -> dict[str, Any]:
        assert self._run is not None
        return self._run({self._names.get(name, name): array for name, array in feeds.items()})


def _compared(expected: KeptOutputs, reference: BiasNetwork, model: _Timed, given: Any) -> tuple[ModelComparison, list[str]]:
    """A model beside the reference, which is released then; and remarks."""
    assert model.network is not None
    network, name = model.network, model.name
    pairs = compared_outputs(reference, network)
    classes = _class_axis(reference, given)
    watched = {output: _Watched(f"{name}: output {output}", classes) for output in pairs}
    errors = joined(expected.errors(pairs, _watch(expected, model.outputs(), pairs, watched)))
    outputs = [
        OutputComparison(output, sqnr, errors.divergences.get(output), watched[output].top1, watched[output].largest_change)
        for output, sqnr in errors.outputs.items()
    ]
    missing = [each for each in reference.outputs if each not in errors.outputs]
    score = errors.score
    notes = [f"{name}: not compared, as it does not give them out, or as codes: {', '.join(missing)}"] if missing else []
    broken = [each.name for each in outputs if np.isnan(each.largest_change)]
    if broken:
        notes.append(f"{name}: gives out nan, infinities or another shape where the reference does not: {', '.join(broken)}")
    if score is NOT_SCORED:
        notes.append(f"{name}: nothing could be compared")
    model.forget()
    return ModelComparison(name, score, outputs, model.seconds, _size_of(given)), notes


def _class_axis(reference: BiasNetwork, given: Any) -> int:
    """The axis of classes of a map, by where layers of the reference have channels."""
    windows = [layer.output_axis for layer in reference.layers if layer.window is not None]
    if windows:
        return -1 if windows[0] == -1 else 1
    is_path = isinstance(given, (str, PathLike))
    return -1 if is_path and framework_of_name(given) in (Framework.KERAS, Framework.TFLITE) else 1


def _watch(
    expected: KeptOutputs, outputs: _Outputs, pairs: Mapping[str, str], watched: Mapping[str, _Watched]
) -> Iterator[tuple[int, Feeds]]:
    for batch, computed in outputs:
        for name, found in pairs.items():
            for r, q in zip(arrays_of(expected.kept(name, batch)), arrays_of(computed[found])):
                watched[name].add(r, q)
        yield batch, computed


class _Watched:
    """What is measured of an output besides its errors.

    Parameters
    ----------
    label : str
        What errors call it.
    map_axis : int
        The axis of classes, if it is a map.
    """

    def __init__(self, label: str, map_axis: int) -> None:
        self._label = label
        self._map_axis = map_axis
        self._positions = 0
        self._same = 0
        self.largest_change = 0.0

    @property
    def top1(self) -> float | None:
        """Share of positions with the same class; None where there are no classes."""
        return self._same / self._positions if self._positions else None

    def add(self, r: NDArray[Any], q: NDArray[Any]) -> None:
        """Adds an array of it, and that of the reference."""
        if are_transposed(r.shape, q.shape):
            raise ValueError(
                f"{self._label} has shape {text_of_shape(q.shape)}, that of the reference {text_of_shape(r.shape)}: channels "
                "are elsewhere; compare models of one layout, each quantized one with the float model of its own framework"
            )
        self.largest_change = float(np.maximum(self.largest_change, _largest_change(r, q)))  # nan stays
        axis = self._map_axis if r.ndim >= _MAP else -1
        if r.dtype.kind == q.dtype.kind == "f" and r.shape == q.shape and r.ndim > 1 and r.size and r.shape[axis] > 1:
            same = r.argmax(axis=axis) == q.argmax(axis=axis)
            self._same += int(np.count_nonzero(same))
            self._positions += same.size


def _largest_change(r: NDArray[Any], q: NDArray[Any]) -> float:
    """As :func:`largest_change`; of what is no number, nan where anything differs."""
    if r.shape == q.shape and not all(each.dtype.kind in "fiub" or each.dtype.isbuiltin != 1 for each in (r, q)):
        return 0.0 if np.array_equal(r, q) else np.nan
    return largest_change(r, q)
