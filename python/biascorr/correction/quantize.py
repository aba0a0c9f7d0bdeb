"""`quantize`: a float ONNX model in, the best int8 model that is found out, and a report.

    float -> pre-processing -> quantize_static -> candidates of correction
    float -> equalization -> pre-processing -> quantize_static -> candidates of correction

All candidates are scored against the float model as it was given, on the same held-out samples; one of the equalized model is
taken where it is surely better.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, get_args

from biascorr.adapters.frameworks import Framework
from biascorr.adapters.loading import framework_of, network_from_model
from biascorr.arguments import check_flags, checked_choice, checked_integer, nearest, paths_of
from biascorr.calibration.data import check_amounts
from biascorr.calibration.progress import Progress, Work
from biascorr.calibration.resources import checked_threads
from biascorr.calibration.samples import Samples
from biascorr.calibration.storage import Storage, TemporaryFolder, checked_budget
from biascorr.correction.candidates import Choice
from biascorr.correction.correct import Attempt, Options, best_of, builder_of, check_options, wanted_choices
from biascorr.correction.metrics import Metric
from biascorr.correction.planning import work_left
from biascorr.correction.reading import notes_on_left_out, notes_on_samples, read_samples
from biascorr.correction.result import Correction
from biascorr.correction.roles import paired
from biascorr.correction.scoring import FloatOutputs
from biascorr.correction.selection import excluded_layers
from biascorr.equalization.equalize import equalized
from biascorr.equalization.result import Equalization
from biascorr.graph.matching import Match
from biascorr.graph.network import BiasNetwork, Feeds, Network, require_edits, require_float, versions_of
from biascorr.graph.origin import origin_of
from biascorr.sweep.shard import OneShard, Shifted
from biascorr.typing import Calibration, Data, Method, Model, ModelFile, NewBiases, QuantizedType

if TYPE_CHECKING:
    from biascorr.adapters.onnx.static_quantization import StaticQuantization

TYPES: tuple[str, ...] = get_args(QuantizedType)
CALIBRATIONS: tuple[str, ...] = get_args(Calibration)

OP_TYPES = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Relu", "Clip")
"""Operators that are quantized by default: those with weights, and activations that runtimes fuse with them.

With all that onnxruntime can quantize, a text recognizer loses 3 dB and is slower; without Relu and Clip, which then read what
was rounded to a wider range, a classifier loses 7 dB (measured: PP-OCRv4, EfficientNet-Lite0).
"""

_OTHERS = {
    Framework.TFLITE: "tf.lite.TFLiteConverter quantizes the model that this file was converted from",
    Framework.KERAS: "tf.lite.TFLiteConverter quantizes it",
}
"""What quantizes models of other frameworks."""


def quantize(
    reference: Model | ModelFile,
    data: Data,
    *,
    per_channel: bool = True,
    weight_type: QuantizedType = "int8",
    activation_type: QuantizedType = "int8",
    calibration: Calibration = "minmax",
    op_types: Sequence[str] | None = None,
    reduce_range: bool | None = None,
    equalize: bool = True,
    method: Method = "auto",
    strength: float = 1.0,
    shrunk: bool = False,
    new_biases: NewBiases = "add",
    only: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    batch_size: int = 1,
    max_samples: int | None = 300,
    validation: Data | None = None,
    seed: int = 0,
    metric: Callable[..., float] | None = None,
    memory_budget: int | str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Correction[Model]:
    """Quantizes a float ONNX model with onnxruntime and corrects its biases, equalized before where that scores better.

    The model is prepared as onnxruntime's `quant_pre_process` does it, quantized by its `quantize_static` in QDQ format, and
    corrected as :func:`biascorr.correct` does it; the float model that matches is found on the way.

    Parameters
    ----------
    reference : path, bytes or onnx.ModelProto
        The float model, ONNX.
    data : array, mapping, iterable, CalibrationDataReader or path
        Calibration samples, as :func:`biascorr.correct` takes them. The ranges of activations are those of all of them; those
        that are held out are not corrected by, but for the last fit.
    per_channel : bool
        Whether weights have a scale for each output channel, else one in all.
    weight_type, activation_type : str
        "int8", "uint8", "int16" or "uint16".
    calibration : str
        How the range of a tensor is found: "minmax", from the least to the greatest value; "entropy", what loses least
        information; "percentile", without the 0.001 % on either side.
    op_types : sequence of str, optional
        The operators that are quantized, such as "Conv"; an empty sequence: all that onnxruntime can quantize. None: those with
        weights, and Relu and Clip, which runtimes fuse with them.
    reduce_range : bool, optional
        Whether weights have 7 bits, for CPUs whose products of 8 bits saturate: x86 without VNNI. None: where 8 bits lose
        more as this CPU runs them than in exact arithmetic, and 7 bits are not surely worse.
    equalize : bool
        Whether the model is also quantized equalized, as :func:`biascorr.equalize` does it, and that is returned where it is
        surely better.
    method, strength, shrunk, new_biases, only, exclude
        How biases are corrected, and which; see :func:`biascorr.correct`.
    batch_size, max_samples, validation, seed, metric, memory_budget, threads, progress
        See :func:`biascorr.correct`.

    Returns
    -------
    Correction
        The quantized and corrected model and a report: the score of "none" is that of the quantized model before it was
        corrected, `choice.is_equalized` and `equalization` say whether it was equalized, and what that did. The model and files
        given are not changed.

    Raises
    ------
    FileNotFoundError, ImportError, OSError, RuntimeError
        As :func:`biascorr.correct`.
    TypeError
        The model is not ONNX, or the data is of a kind that is not understood.
    ValueError
        An option has a value that is not allowed; the model is invalid, quantized already, or onnxruntime cannot quantize it;
        the data does not fit.

    Notes
    -----
    onnxruntime is kept quiet while it works: what it prints is hidden, and its log is silent, for the whole process.

    Examples
    --------
    >>> import numpy as np
    >>> import onnx.parser
    >>> model = onnx.parser.parse_model('''<ir_version: 8, opset_import: ["" : 17]>
    ...     network (float[N,2] x) => (float[N,2] y) <float[2,2] w = {0.1, 0.2, 0.3, 0.4}> { [layer] y = MatMul(x, w) }''')
    >>> samples = np.random.default_rng(0).uniform(-1, 1, (32, 2)).astype(np.float32)
    >>> correction = quantize(model, samples)
    >>> sorted({node.op_type for node in correction.model.graph.node} - {"Add"})  # the bias that it got, if that is better
    ['DequantizeLinear', 'MatMul', 'QuantizeLinear']
    """
    started = time.perf_counter()
    _check_options(weight_type, activation_type, calibration, op_types)
    check_options(method, strength, shrunk, new_biases, has_data=True)
    check_flags(per_channel=per_channel, equalize=equalize, **({} if reduce_range is None else {"reduce_range": reduce_range}))
    check_amounts(batch_size, max_samples)
    checked_integer("seed", seed, 0)
    budget, threads = checked_budget(memory_budget), checked_threads(threads)
    user_metric = None if metric is None else Metric(metric)
    network = _loaded(reference)
    from biascorr.adapters.onnx.static_quantization import StaticQuantization

    operators = OP_TYPES if op_types is None else _checked_operators(network, op_types)
    settings = StaticQuantization(per_channel, weight_type, activation_type, calibration, operators, bool(reduce_range))
    work, wanted = Work(progress), wanted_choices(method, strength, shrunk)
    with Storage(budget) as storage:
        samples = Samples(storage, hold_out=method == "auto", seed=seed)
        read_samples(
            samples,
            network,
            network,
            data,
            validation,
            batch_size=batch_size,
            max_samples=max_samples,
            threads=threads,
            work=work,
        )
        later = [Choice("activation")] if method == "auto" else []
        left = work_left(samples, first=wanted, second=later * 2, refitted=later, times=1 + equalize)
        calibrating = {_CALIBRATING: len(samples.data_batches)}
        work.plan({**left, _CALIBRATING: (1 + equalize) * calibrating[_CALIBRATING]})
        editable = require_edits(network, "reference", "equalization")
        equalization = equalized(editable, samples, work, threads) if equalize else None
        shards = OneShard(samples, threads)
        expected = FloatOutputs(network, samples, shards, user_metric, work)
        first = _Quantized.of(network, samples, work, settings)
        if reduce_range is None and not settings.is_wide:
            first = _without_saturation(first, network, expected, work)
        notes = [*notes_on_left_out(samples, max_samples), *first.notes]
        notes += notes_on_samples(network, first.network, samples)
        excluded = excluded_layers(first.network, only, exclude)
        options = Options(wanted, samples, shards, work, expected, method == "auto", new_biases == "add", excluded)
        attempts = _Attempts(options, first, equalization)
        options = replace(options, attempts=1 + attempts.is_scaled, between=calibrating)
        result = best_of(options, iter(attempts), first.network, equalization, notes)
    files = paths_of({"reference": reference, "data": data, "validation": validation})
    return replace(result, seconds=time.perf_counter() - started, files=files)


_SATURATED = 1.0
"""dB that a runtime's own arithmetic may cost without weights of 7 bits being tried."""

_CALIBRATING = "calibrating"
"""The kind of work that is a run for the ranges of activations."""


def _check_options(weight_type: str, activation_type: str, calibration: str, op_types: Sequence[str] | None) -> None:
    for name, value, allowed in (
        ("weight_type", weight_type, TYPES),
        ("activation_type", activation_type, TYPES),
        ("calibration", calibration, CALIBRATIONS),
    ):
        checked_choice(name, value, allowed)
    if isinstance(op_types, str):
        raise TypeError(f"op_types: {op_types!r}, expected a sequence of operators: [{op_types!r}]")


def _checked_operators(network: Network, op_types: Sequence[str]) -> tuple[str, ...]:
    """The operators. Raises ValueError where one is neither in the network nor known to onnxruntime's quantization."""
    from biascorr.adapters.onnx.network import OnnxNetwork
    from biascorr.adapters.onnx.static_quantization import QUANTIZABLE

    assert isinstance(network, OnnxNetwork)
    known = sorted({*QUANTIZABLE, *network.op_types})
    for each in op_types:
        if each not in known:
            raise ValueError(f"op_types: {each!r}, which is no operator of the model{nearest(each, known)}")
    return tuple(op_types)


def check_framework(reference: Any) -> None:
    """Raises TypeError where a model is of another framework than ONNX."""
    framework = framework_of(reference, "reference")
    if framework in _OTHERS:
        raise TypeError(
            f"reference: a {framework.suffix} model, expected ONNX: {_OTHERS[framework]}; then give both models to "
            "correct (biascorr correct)"
        )


def _loaded(reference: Any) -> Network:
    """The float network. Raises TypeError where it is of another framework than ONNX."""
    check_framework(reference)
    network = network_from_model(reference, "reference")
    require_float(network, "reference", "give the float model; what is quantized already is for correct (biascorr correct)")
    return network


@dataclass(frozen=True, eq=False)
class _Quantized:
    """A network that onnxruntime quantized.

    Parameters
    ----------
    reference : Network
        The float network as it was prepared.
    network : BiasNetwork
        The quantized one.
    matches : mapping from str to Match
        The float layer of each of its layers.
    settings : StaticQuantization
        How it was quantized.
    samples : Samples
        What it was quantized by.
    notes : tuple of str
        How it was quantized, and what is worth knowing about that.
    """

    reference: Network
    network: BiasNetwork
    matches: Mapping[str, Match]
    settings: StaticQuantization
    samples: Samples
    notes: tuple[str, ...]

    @classmethod
    def of(cls, network: Network, samples: Samples, work: Work, settings: StaticQuantization) -> _Quantized:
        """Quantizes a float network by all samples that may be fitted."""
        from biascorr.adapters.onnx.network import OnnxNetwork
        from biascorr.adapters.onnx.static_quantization import statically_quantized

        assert isinstance(network, OnnxNetwork)
        batches = samples.data_batches
        with work.doing(_CALIBRATING, len(batches), "quantizing") as advance, _folder() as folder:

            def feeds() -> Iterator[Feeds]:
                for each in samples.feeds(batches):
                    yield each
                    advance(1 / len(batches))

            prepared, quantized = statically_quantized(network, feeds, len(batches), settings, folder.path)
        _check_quantized(network, quantized, settings.op_types)
        pair = paired(prepared, quantized)
        said = f"quantized by onnxruntime {versions_of(network)['onnxruntime']}: {settings}"
        return cls(pair.reference, quantized, pair.matches, settings, samples, (said, *pair.notes))


def _check_quantized(network: Network, quantized: BiasNetwork, op_types: Sequence[str]) -> None:
    """Raises ValueError where no layer was quantized; of those that are unsupported, that is not known."""
    is_left_open = quantized.unsupported and origin_of(quantized).quantization is not None
    if is_left_open or any(layer.weight_step is not None for layer in quantized.layers):
        return
    found = sorted({layer.op for layer in network.layers})
    if op_types and not {*found} & {*op_types}:
        listed = ", ".join(found) or "no layers"
        raise ValueError(f"op_types: {', '.join(op_types)}, expected operators of the model's layers; it has {listed}")
    types = ", ".join(sorted({str(layer.weights.dtype) for layer in network.layers})) or "no layers"
    raise ValueError(f"reference: onnxruntime quantized none of its layers; it takes weights of float32, the model has {types}")


def _without_saturation(first: _Quantized, network: Network, expected: FloatOutputs, work: Work) -> _Quantized:
    """With weights of 7 bits, where 8 saturate and these are not surely worse, as this CPU runs them; a note says so.

    What saturates is not corrected by any bias, and 7 bits lose less after correction than before.
    """
    with work.step("quantized model as its runtime runs it"):
        quantized = Shifted(first.network, {})
        exact, found = expected.score(quantized), expected.score_deployed(quantized)
        if not exact.sqnr - found.sqnr > _SATURATED:
            return first
        reduced = _Quantized.of(network, first.samples, work, replace(first.settings, reduce_range=True))
        better = expected.score_deployed(Shifted(reduced.network, {}))
    if found.is_better_than(better):
        return first
    note = (
        f"weights have 7 bits (reduce_range), which gives {better} on this CPU, before any correction: with 8 bits, whose "
        f"products saturate there, the model gives {found}, in exact arithmetic {exact}"
    )
    return replace(reduced, notes=(*reduced.notes, note))


@contextlib.contextmanager
def _folder() -> Iterator[TemporaryFolder]:
    folder = TemporaryFolder()
    try:
        yield folder
    finally:
        folder.cleanup()


class _Attempts:
    """With the float network as it is, and equalized where that scales anything.

    Parameters
    ----------
    options : Options
        What they have in common.
    first : _Quantized
        The network that is not equalized.
    equalization : Equalization or None
        Of the float network.
    """

    def __init__(self, options: Options, first: _Quantized, equalization: Equalization | None) -> None:
        self._options = options
        self._first = first
        self._equalization = equalization
        self.is_scaled = equalization is not None and bool(equalization.chains or equalization.high_biases)

    def __iter__(self) -> Iterator[Attempt]:
        first, options = self._first, self._options
        yield Attempt(first.network, first.matches, builder_of(options, first.reference, first.network, first.matches))
        if self._equalization is not None and self.is_scaled:
            other = _Quantized.of(self._equalization.network, first.samples, options.work, first.settings)
            builder = builder_of(options, other.reference, other.network, other.matches)
            yield Attempt(other.network, other.matches, builder, is_equalized=True, is_optional=True)
