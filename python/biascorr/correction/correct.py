"""`correct`: a quantized model in, the same model with corrected biases and a report out."""

from __future__ import annotations

import functools
import itertools
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import TYPE_CHECKING, get_args

import numpy as np

from biascorr.adapters.loading import check_same_framework, network_from_model
from biascorr.arguments import check_flags, checked_choice, checked_integer, paths_of, renamed
from biascorr.calibration.data import check_amounts
from biascorr.calibration.progress import LOGGER, Progress, Work
from biascorr.calibration.resources import checked_threads
from biascorr.calibration.samples import Samples
from biascorr.calibration.storage import Storage, checked_budget
from biascorr.correction.candidates import Candidate, CandidateBuilder, Choice
from biascorr.correction.choosing import choose, finalists, is_safe
from biascorr.correction.identity import RunIdentity
from biascorr.correction.layer_errors import layer_errors
from biascorr.correction.metrics import Metric
from biascorr.correction.planning import work_left
from biascorr.correction.quant_params import QuantParams
from biascorr.correction.reading import notes_on_left_out, notes_on_samples, read_samples
from biascorr.correction.result import Correction
from biascorr.correction.returning import deployed
from biascorr.correction.roles import Pair, check_is_static, check_method, check_roles, paired, with_inputs_of
from biascorr.correction.scoring import NOT_SCORED, FloatOutputs, output_pairs
from biascorr.correction.selection import excluded_layers
from biascorr.correction.simulation import layers_to_quantize, simulated, tensor_ranges
from biascorr.equalization.equalize import equalized
from biascorr.equalization.folding import fold_batch_norms, foldable_batch_norms
from biascorr.equalization.result import Equalization
from biascorr.graph.layer import Layer, without_later_calls
from biascorr.graph.matching import Match, match_by_name
from biascorr.graph.network import BiasNetwork, Network, require_biases, require_edits
from biascorr.graph.reasons import LayerReport, ReasonCode
from biascorr.report.lines import counted
from biascorr.sweep.checkpoint import check_so_far, checked_folder
from biascorr.sweep.running import check_cluster, running_shards
from biascorr.sweep.shard import Shards, Shifted
from biascorr.typing import Data, Method, Model, ModelFile, NewBiases

if TYPE_CHECKING:
    from distributed import Client

METHODS: tuple[Method, ...] = get_args(Method)

NEW_BIASES: tuple[NewBiases, ...] = get_args(NewBiases)

_SCALED = ("empirical", "activation", "squared")
"""Methods whose shifts can be scaled."""

_AUTO = (Choice("squared"), Choice("activation", 0.5), Choice("iterative"), Choice("mean"), Choice("activation"))
"""The candidates of `auto`, from cautious to bold: by the harm that they did to real networks where they were chosen wrongly.

More of them win no more, by chance often less (measured, docs/benchmarks/networks.md).
"""

_UNCORRECTED = Choice("none")

_FEW = 8
"""Scores of fewer samples than this are too uncertain."""


@renamed(model="reference")
def correct(
    reference: Model | ModelFile,
    data: Data | None = None,
    *,
    quantized: Model | ModelFile | None = None,
    method: Method = "auto",
    strength: float = 1.0,
    shrunk: bool = False,
    quant_params: QuantParams | None = None,
    equalize: bool = False,
    fold: bool = False,
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
    client: Client | None = None,
    checkpoint: str | PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Correction[Model]:
    """Corrects the biases of a quantized model, so that its outputs come nearer to those of the float model.

    Parameters
    ----------
    reference : path, bytes, onnx.ModelProto or keras.Model
        The float model: ONNX, TFLite or Keras.
    data : array, mapping, iterable, CalibrationDataReader or path, optional
        Calibration samples, as the model takes them. An array, or a mapping from input names to arrays, holds samples along
        the first axis, or along that which an ONNX model calls the batch; an array of zarr, h5py or dask, or one mapped from a
        file, is read part by part. An iterable, be it a `CalibrationDataReader`, a `tf.data.Dataset`, a
        `keras.utils.PyDataset` or a torch `DataLoader`, gives batches: arrays, tuples with one array per input, or mappings; a
        `tf.data.Dataset` may also give single samples. A path is an .npy or .npz file or a folder of them, one batch per file;
        :func:`biascorr.images` makes samples of a folder of images; "module:function" is what this function returns. Only the
        method "analytical" does without.
    quantized : path, bytes, onnx.ModelProto or keras.Model, optional
        The same model quantized: ONNX in QDQ or QOperator format or with MatMulNBits, or TFLite; its biases are corrected.
        None: the float model is quantized in simulation, and the float model with corrected biases is returned.
    method : str
        "auto": a quarter of the samples is held out, 8 at least where there are 16, chosen at random. Several of the methods
        below, one at half strength too, correct with the other samples. The most cautious one that the best is not surely
        better than is taken, where its own gain over the uncorrected model is sure on the held-out samples, in exact arithmetic
        and as its own runtime runs it; it is then fitted again to all samples. Else the model is returned as it was. With fewer
        than four samples, all are corrected with and all are scored.

        By name, from all samples:

        - "mean": weight error times the mean input of each layer, per kernel tap, all measured in one pass.
        - "iterative": the same, each layer after corrected ones.
        - "empirical": the mean output of each layer becomes that of the float one, each after corrected ones.
        - "activation": the same for the tensor after the layer's activation.
        - "squared": the squared error after the layer's activation becomes least, value by value; the mean output becomes that
          of the float layer where there is no activation. The float model runs beside the quantized one.
        - "analytical": weight error times the mean input that a BatchNormalization before the layer gives, through ReLU or
          Clip; of the layers that read the model's inputs, their mean in the data, if there is any. Other layers stay as they
          are.
        - "hybrid": analytical where a BatchNormalization gives the mean input, else empirical.
    strength : float
        The part of each shift that is corrected, above 0 up to 1; only for "empirical", "activation" and "squared".
    shrunk : bool
        Whether the shift s of each channel is multiplied by s^2 / (s^2 + its variance over the samples), so that little is
        done where samples disagree; only for "empirical", "activation" and "squared".
    quant_params : QuantParams, optional
        How quantization is simulated, where no quantized model is given; None: `QuantParams()`, 8-bit weights.
    equalize : bool
        Whether the float model is equalized before quantization is simulated, as :func:`biascorr.equalize` does it. "auto" also
        tries it without, and returns what is best.
    fold : bool
        Whether batch normalizations are folded into layers before quantization is simulated, as far as they can be; the float
        model that is returned has them folded. Converters do this, and quantize the weights that it makes.
    new_biases : str
        "add": a layer without a bias gets one. "skip": it is left as it is, and no node is added to the model.
    only : iterable of str, optional
        The layers that are corrected: names, patterns of names with ``*`` and ``?``, or operators. None: all of them.
    exclude : iterable of str
        Layers that are left as they are, named the same way.
    batch_size : int
        Samples of an array, or of a data set of single samples, that make a batch, where the model does not fix that.
    max_samples : int, optional
        No more samples are read, of any kind of data; a note says where there were more. None: all of them.
    validation : array, mapping, iterable, CalibrationDataReader or path, optional
        Other samples to score on, of the same kinds as `data`, of which none are held out then.
    seed : int
        Chooses the samples that are held out, or else scored.
    metric : callable, optional
        What is best, in place of SQNR and divergence: ``metric(outputs, reference) -> float``, of one sample, from its outputs
        by name (first axis 1) and those of the float model, all that both have; or ``evaluate(run) -> float``, of a model that
        ``run(batch)`` runs, with your own inputs, labels and loop: `run` takes a mapping from input names to arrays, or an
        array where there is one input, and gives the outputs by name. Greater is better.
    memory_budget : int or str, optional
        Bytes of activations held in memory, also as "1.5GB"; the rest goes to a temporary folder that is removed at the end.
        None: half of the memory that is free, in the container that this process is in.
    threads : int, optional
        Threads that run the model and the statistics, at least 1. None: one for each CPU that this process may use.
    client : distributed.Client, optional
        Connected to a Dask cluster, whose workers run the models, each over a part of the samples: `threads` and
        `memory_budget` are those of a worker then. The result has the same bits, whatever workers there are; those that are
        lost on the way are made up for. None: this process runs them.
    checkpoint : path, optional
        A folder for what is found on the way, made where there is none: a run that was killed goes on where it was, when it
        is started again with the same folder, models, data and options, and gives the same result.
    progress : callable, optional
        Called with the step, how much of all the work is done, and how much there is: 1000; None while nobody knows how many
        samples there are, when those that were read are counted.

    Returns
    -------
    Correction
        The corrected model and a report. The models and files given are not changed.

    Raises
    ------
    ConnectionError
        The scheduler of the client is lost.
    FileNotFoundError
        A file is missing.
    ImportError
        onnx and onnxruntime are not installed (``pip install "biascorr[onnx]"``); for a TFLite model, LiteRT
        (``pip install "biascorr[tflite]"``); for a Keras model, Keras and TensorFlow (``pip install "biascorr[keras]"
        tensorflow``); for a client, Dask (``pip install "biascorr[dask]"``).
    OSError
        The temporary folder is full, on all workers where there is a client; the checkpoint cannot be written, or another
        process uses it.
    RuntimeError
        The corrected model is not valid, or computes something else than was measured, by an error of this package; `metric`
        raised an exception, which is the cause of this one; workers have another version of this package, or are lost again
        and again.
    TimeoutError
        There are no workers.
    TypeError
        The model or the data is of a kind that is not understood; a sample has another dtype than the input; the model is one
        whose weights cannot be changed, and no quantized one is given.
    ValueError
        An option has a value that is not allowed; a model is invalid; the quantized model is not of this float model; there
        are no samples for a method that needs some, or no end of them and no `max_samples`; a sample has other names or shapes
        than the inputs, or nan; the checkpoint is of other models, data, options or versions.

    Warns
    -----
    UserWarning
        A method asked for by name made the outputs worse; quantization is simulated with neither `fold` nor `equalize`, and
        there are batch normalizations that could be folded.

    Examples
    --------
    >>> import numpy as np
    >>> import onnx.parser
    >>> model = onnx.parser.parse_model('''<ir_version: 8, opset_import: ["" : 17]>
    ...     network (float[N,2] x) => (float[N,2] y) <float[2,2] w = {0.1, 0.2, 0.3, 0.4}> { [layer] y = MatMul(x, w) }''')
    >>> samples = np.ones((32, 2), np.float32)
    >>> correction = correct(model, samples, quant_params=QuantParams("tf", weight_bits=3), method="mean")
    >>> correction.report[0].reason
    'it had no bias; one was added'
    """
    started = time.perf_counter()
    check_options(method, strength, shrunk, new_biases, data is not None)
    check_flags(equalize=equalize, fold=fold)
    check_amounts(batch_size, max_samples)
    checked_integer("seed", seed, 0)
    budget, own_threads = checked_budget(memory_budget), checked_threads(threads)
    check_cluster(client)
    folder = checked_folder(checkpoint)
    user_metric = None if metric is None else Metric(metric)
    for name, is_given in {"quant_params": quant_params is not None, "equalize": equalize, "fold": fold}.items():
        if quantized is not None and is_given:
            raise ValueError(f"{name}: only for simulated quantization, but there is a quantized model")
    if quantized is not None:
        check_same_framework(reference, quantized)
    float_network = network_from_model(reference, "reference")
    given = None if quantized is None else require_biases(network_from_model(quantized, "quantized"), "quantized")
    check_method(method, float_network)
    given = given and with_inputs_of(float_network, given)
    check_roles(float_network, given)
    if given is not None:
        check_is_static(given)
    notes = _check_inputs_and_outputs(float_network, given or float_network)
    params = quant_params or QuantParams()
    pair = _to_simulate(float_network, params, fold, equalize) if given is None else paired(float_network, given)
    float_network, notes = pair.reference, [*notes, *pair.notes]
    excluded = excluded_layers(given or float_network, only, exclude)
    wanted = wanted_choices(method, strength, shrunk)
    settings = {
        "method": method,
        "strength": float(strength),
        "shrunk": bool(shrunk),
        "quant_params": params,
        "equalize": bool(equalize),
        "fold": bool(fold),
        "new_biases": new_biases,
        "layers left out": sorted(excluded),
        "seed": int(seed),
        "metric": user_metric and user_metric.name,
    }
    identity = RunIdentity(float_network, given, settings)
    if folder is not None:
        check_so_far(folder, identity.known)
    with Storage(budget) as storage:
        samples, work = Samples(storage, hold_out=method == "auto", seed=seed), Work(progress)
        sizes = read_samples(
            samples,
            float_network,
            given or float_network,
            data,
            validation,
            batch_size=batch_size,
            max_samples=max_samples,
            threads=own_threads,
            work=work,
        )
        notes += notes_on_left_out(samples, max_samples)
        notes += notes_on_samples(float_network, given or float_network, samples)
        with running_shards(
            samples,
            threads=threads,
            memory_budget=memory_budget,
            client=client,
            checkpoint=folder,
            identity=functools.partial(identity.with_samples, samples, sizes),
        ) as shards:
            expected = FloatOutputs(float_network, samples, shards, user_metric, work)
            options = Options(wanted, samples, shards, work, expected, method == "auto", new_biases == "add", excluded)
            later = [Choice("activation")] if method == "auto" else []
            work.plan(work_left(samples, first=wanted, second=later * 2, refitted=later, times=1 + equalize))
            if given is None:
                options, equalization, attempts = _simulated_attempts(options, float_network, params, equalize)
            else:
                attempt = Attempt(given, pair.matches, builder_of(options, float_network, given, pair.matches))
                equalization, attempts = None, iter([attempt])
            result = best_of(options, attempts, given, equalization, notes)
    files = paths_of({"reference": reference, "quantized": quantized, "data": data, "validation": validation})
    return replace(result, seconds=time.perf_counter() - started, files=files)


def best_of(
    options: Options,
    attempts: Iterable[Attempt],
    given: BiasNetwork | None,
    equalization: Equalization | None,
    notes: Sequence[str],
) -> Correction:
    """The best candidate of all attempts, fitted again and looked at as its own runtime runs it, with its report.

    Parameters
    ----------
    options : Options
        What the attempts have in common.
    attempts : iterable of Attempt
        The first one has the uncorrected network that all candidates are compared with.
    given : BiasNetwork or None
        That network, where it is the one that is deployed; None where quantization is simulated.
    equalization : Equalization or None
        Of the float network, where that was asked for.
    notes : sequence of str
        Remarks so far.
    """
    samples, expected, notes = options.samples, options.expected, [*notes]
    attempts = iter(attempts)
    first = None if given is None else next(attempts)
    candidates, best, chosen = _chosen(options, attempts if first is None else itertools.chain([first], attempts))
    taken, more_notes = _refitted(options, best, candidates[0], chosen)
    corrected = Shifted(chosen.network, taken.shifts)
    with options.work.step("the corrected model as its runtime runs it"):
        found = deployed(given, candidates[0], corrected, taken, expected)
        random = expected.random_outputs()
    network = corrected.network
    notes += [*_notes(best, candidates[0], samples, random), *more_notes, *found.notes]
    if found.is_worse and not options.is_auto:
        before, after = found.scores.values()
        notes.append(f"{best.choice.label} made the outputs worse as the runtime runs it: {before} before, {after} after")
    if first is not None and network is not first.network and not found.is_better and options.is_auto:
        notes.append(
            f"in the runtime's own arithmetic, {best.choice} is not surely better than the uncorrected model, which is returned"
        )
        network, taken, chosen = first.network, candidates[0], first
    for each in candidates:
        LOGGER.info("candidate %s: %s", each.choice, each.score)
    for note in notes:
        LOGGER.info("note: %s", note)
    errors = _layer_errors(options, chosen, taken) if samples.batches else {}
    return Correction(
        network,
        taken.choice,
        _report(chosen, taken, options.excluded, errors),
        {str(each.choice): each.score for each in candidates if each.score is not NOT_SCORED},
        notes,
        samples.count,
        samples.batches_read,
        equalization,
        given is None,
        found.scores,
        is_refitted=taken.is_refitted,
        scored_samples=samples.scored if candidates[0].score is not NOT_SCORED else 0,
        is_held_out=samples.holds_out,
        data_digest=samples.digest,
    )


@dataclass(frozen=True, eq=False)
class Options:
    """Options that all attempts have in common.

    Parameters
    ----------
    wanted : sequence of Choice
        The candidates to make.
    samples, shards, work
        See :class:`CandidateBuilder`.
    expected : FloatOutputs
        The float outputs that candidates are scored against.
    is_auto : bool
        Whether to try the analytical method too, where there are statistics for it.
    adds_biases : bool
        Whether layers without a bias get one.
    excluded : set of str
        The layers that are not corrected, by the names of their first calls.
    attempts : int
        The attempts that there are.
    between : mapping from str to float
        The work by kind that comes before each attempt but the first one.
    """

    wanted: Sequence[Choice]
    samples: Samples
    shards: Shards
    work: Work
    expected: FloatOutputs
    is_auto: bool
    adds_biases: bool
    excluded: Set[str]
    attempts: int = 1
    between: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Attempt:
    """A network, and what makes candidates of it.

    Parameters
    ----------
    network : BiasNetwork
        The network that gets the shifts of the best candidate: the quantized one, or the float one where quantization was
        simulated.
    matches : mapping from str to Match
        The float layer of each of its layers.
    builder : CandidateBuilder
        Makes the candidates.
    is_equalized : bool
        Whether the float network was equalized before.
    is_corrected : bool
        Whether candidates other than the uncorrected one are made.
    is_optional : bool
        Whether a method asked for by name is taken from an earlier attempt, unless it is surely better in this one.
    """

    network: BiasNetwork
    matches: Mapping[str, Match]
    builder: CandidateBuilder
    is_equalized: bool = False
    is_corrected: bool = True
    is_optional: bool = False


def _to_simulate(network: Network, params: QuantParams, fold: bool, equalize: bool) -> Pair:
    """The float network whose quantization is simulated; warns of batch normalizations that stay in it and need not."""
    reference = require_edits(network, "reference", "simulated quantization")
    if fold:
        reference, folds, _ = fold_batch_norms(reference)
        return Pair(reference, {}, (f"{counted(len(folds), 'batch normalization')} folded into layers",) if folds else ())
    if equalize:
        return Pair(reference, {})
    layers = {layer.name for layer in layers_to_quantize(reference, params)}
    count = sum(layer in layers for layer in foldable_batch_norms(reference).values())
    if not count:
        return Pair(reference, {})
    note = (
        f"not folded: {counted(count, 'batch normalization')}, which a converter folds into layers before it quantizes "
        "these, so that their weights will be others than those simulated; fold=True (--fold) folds them first"
    )
    warnings.warn(note, stacklevel=4)
    return Pair(reference, {}, (note,))


def _simulated_attempts(
    options: Options, network: Network, params: QuantParams, equalize: bool
) -> tuple[Options, Equalization | None, Iterator[Attempt]]:
    """With simulated quantization of the float network, and of the equalized one where that is asked for."""
    reference = require_edits(network, "reference", "simulated quantization")
    samples = options.samples
    equalization = equalized(reference, samples, options.work, options.shards.threads) if equalize else None
    networks = {False: reference}
    if equalization is not None and equalization.is_anything_done:
        networks[True] = equalization.network

    def attempts() -> Iterator[Attempt]:
        for is_equalized, network in networks.items():
            ranges = functools.partial(options.shards.each, tensor_ranges, samples.data_batches, network)
            measured = simulated(network, params, ranges)
            matches = match_by_name(network.layers, measured.layers)
            is_corrected = options.is_auto or is_equalized == (True in networks)
            yield Attempt(network, matches, builder_of(options, network, measured, matches), is_equalized, is_corrected)

    return replace(options, attempts=len(networks)), equalization, attempts()


def builder_of(options: Options, reference: Network, measured: BiasNetwork, matches: Mapping[str, Match]) -> CandidateBuilder:
    """Makes candidates of a quantized network, whose layers are corrected as far as they can and may be."""
    return CandidateBuilder(
        reference,
        measured,
        {
            name: match
            for name, match in matches.items()
            if match.is_quantized
            and match.is_finite
            and (options.adds_biases or match.quantized.bias is not None)
            and match.quantized.first_call not in options.excluded
        },
        options.wanted,
        options.samples,
        options.shards,
        options.work,
        expected=options.expected,
    )


def _chosen(options: Options, attempts: Iterable[Attempt]) -> tuple[list[Candidate], Candidate, Attempt]:
    """The candidates of all attempts, the uncorrected one first; the one that is taken, and its attempt, the only one kept."""
    candidates: list[Candidate] = []
    taken: tuple[Candidate, Attempt] | None = None
    for number, attempt in enumerate(attempts):
        made = _candidates(options, attempt, number)
        candidates += made
        best = choose(candidates) if options.is_auto else _named(made[-1], taken and taken[0], attempt.is_optional)
        if taken is None or any(best is each for each in made):
            taken = best, attempt
    assert taken is not None
    return candidates, *taken


def _named(found: Candidate, before: Candidate | None, is_optional: bool) -> Candidate:
    """The candidate of a method asked for by name: that of an earlier attempt, where this one is optional and not better."""
    stays = before is not None and is_optional and not found.score.is_better_than(before.score)
    return before if before is not None and stays else found


def _candidates(options: Options, attempt: Attempt, number: int) -> list[Candidate]:
    """The candidates of an attempt, the uncorrected one first, all but the best of many fitted to a part of the samples."""
    builder, is_equalized, work = attempt.builder, attempt.is_equalized, options.work
    extra = [Choice("analytical")] if options.is_auto and builder.analytical_shifts() else []
    choices = [replace(choice, is_equalized=is_equalized) for choice in (*options.wanted, *extra)]
    part = builder.part if options.is_auto else None
    left = functools.partial(work_left, options.samples, builder, is_deployed=attempt.network is builder.quantized)
    later = [] if part is None else [Choice("activation")]
    refitted = [Choice("activation")] if options.is_auto and options.samples.held_out_batches else []
    later_attempts = options.attempts - number - 1
    work.plan(left(first=choices, second=later * 2, refitted=refitted, times=1 + later_attempts))
    work.expect({kind: later_attempts * units for kind, units in options.between.items()})
    with work.step("uncorrected model"):
        before = builder.uncorrected(replace(_UNCORRECTED, is_equalized=is_equalized))
    if not attempt.is_corrected or not builder.has_layers:
        return [before]
    part = None if before.score is NOT_SCORED else part
    candidates = [before]
    for k, choice in enumerate(choices):
        of = f"candidate {number * len(choices) + k + 1} of {options.attempts * len(choices)}: " if options.is_auto else ""
        with work.step(f"{of}{choice}"):
            candidates.append(builder.candidate(choice, part))
    best = finalists(candidates) if part is not None else []
    if number == options.attempts - 1:
        work.plan(left(second=[each.choice for each in best], refitted=[each.choice for each in best[:1]] or refitted))
    for k, each in enumerate(best):
        with work.step(f"finalist {k + 1} of {len(best)}: {each.choice}"):
            candidates[candidates.index(each)] = builder.candidate(each.choice)
    return candidates


def _refitted(options: Options, best: Candidate, before: Candidate, chosen: Attempt) -> tuple[Candidate, list[str]]:
    """The candidate that was chosen, fitted to held-out samples too where that is safe; a note where it is not."""
    builder, work = chosen.builder, options.work
    left = functools.partial(work_left, options.samples, builder, is_deployed=chosen.network is builder.quantized)
    if not options.is_auto or not best.shifts or not options.samples.held_out_batches:
        work.plan(left())
        return best, []
    work.plan(left(refitted=[best.choice]))
    with work.step(f"{best.choice}, fitted to all samples"):
        refitted = replace(builder.candidate(best.choice, with_held_out=True), is_refitted=True)
    work.plan(left())
    if is_safe(refitted, best, before):
        return refitted, []
    label, without = best.choice.label, best.score
    return best, [
        f"not fitted again to all samples, which was not surely as good: {label} has {without} without the held-out ones, "
        f"{refitted.score} with them"
    ]


def wanted_choices(method: str, strength: float, shrunk: bool) -> list[Choice]:
    """The candidates to make for a method: that one, or those of "auto"."""
    return [Choice(method, strength, shrunk)] if method != "auto" else [*_AUTO]


def check_options(method: str, strength: float, shrunk: bool, new_biases: str, has_data: bool) -> None:
    """Raises as :func:`correct` where an option has a value that is not allowed, or that does not go with the method."""
    checked_choice("method", method, METHODS)
    if not isinstance(strength, (int, float, np.integer, np.floating)) or not 0.0 < strength <= 1.0:
        raise ValueError(f"strength: {strength!r}, expected a number above 0 up to 1")
    check_flags(shrunk=shrunk)
    if strength != 1.0 and method not in _SCALED:
        raise ValueError(f"strength: {strength}, expected 1 with method {method!r}")
    if shrunk and method not in _SCALED:
        raise ValueError(f"shrunk: {shrunk}, expected False with method {method!r}")
    if not has_data and method != "analytical":
        raise ValueError(f"data: None, expected samples with method {method!r}; only 'analytical' does without")
    checked_choice("new_biases", new_biases, NEW_BIASES)


def _check_inputs_and_outputs(reference: Network, quantized: Network) -> list[str]:
    """Raises ValueError where the networks do not take the same samples, or give out nothing in common; remarks."""
    expected, found = ({each.name: each.dtype for each in network.inputs} for network in (reference, quantized))
    if found != expected:
        listed = [", ".join(f"{name} ({dtype})" for name, dtype in inputs.items()) for inputs in (found, expected)]
        raise ValueError(f"quantized: not of this float model: takes {listed[0]}, expected {listed[1]}")
    pairs = output_pairs(reference, quantized)
    if not pairs:
        listed = [", ".join(network.outputs) for network in (quantized, reference)]
        raise ValueError(f"quantized: not of this float model: gives out {listed[0]}, expected {listed[1]}")
    known = {*pairs, *pairs.values()}
    others = [name for name in dict.fromkeys([*reference.outputs, *quantized.outputs]) if name not in known]
    return [f"not scored, as only one of the models gives it out: {', '.join(others)}"] if others else []


def _notes(best: Candidate, before: Candidate, samples: Samples, random: Sequence[str]) -> list[str]:
    """Remarks about the scores; warns where the model got worse."""
    if before.score is NOT_SCORED:
        return ["nothing was scored, which needs " + ("real outputs" if samples.count else "data")]
    notes = []
    kind = ("held-out sample" if samples.holds_out else "fitted sample") + ("" if samples.scored == 1 else "s")
    if random:
        notes.append(
            f"the float model does not give the same outputs twice ({', '.join(random)}): scores, and what is chosen by them, "
            "are chance"
        )
    if samples.scored < _FEW:
        notes.append(f"scored on {samples.scored} {kind}: too few to be sure, {_FEW * 2} samples in all would do")
    if best.score.is_worse_than(before.score) and str(best.score) != str(before.score):
        label = best.choice.label
        notes.append(f"{label} made the outputs worse: {before.score} before, {best.score} after, on {samples.scored} {kind}")
        warnings.warn(notes[-1], stacklevel=5)
    return notes


def _layer_errors(options: Options, attempt: Attempt, taken: Candidate) -> dict[str, tuple[float | None, float | None]]:
    """The SQNR of each layer before and after correction, by name."""
    builder, samples = attempt.builder, options.samples
    networks = [Shifted(builder.quantized, shifts) for shifts in ({}, taken.shifts)[: 1 + bool(taken.shifts)]]
    layers = {name: match.reference.name for name, match in attempt.matches.items()}
    batches = samples.scored_batches or samples.fitted_batches
    with options.work.step("errors of layers"):
        found = layer_errors(builder.reference, networks, layers, options.shards, batches, options.work)
    return {name: (sqnr, found[-1][name]) for name, sqnr in found[0].items()}


def _report(
    attempt: Attempt, best: Candidate, excluded: Set[str], errors: Mapping[str, tuple[float | None, float | None]]
) -> list[LayerReport]:
    """One entry per layer, in topological order."""
    reports = {report.name: report for report in attempt.network.unsupported} | best.reports
    for layer in without_later_calls(attempt.network.layers):
        if layer.name not in reports:
            left = _excluded(layer) if layer.name in excluded else _uncorrectable(layer, attempt.matches.get(layer.name))
            reports[layer.name] = left
    for name, (before, after) in errors.items():
        if name in reports:
            reports[name] = replace(reports[name], sqnr_before=before, sqnr_after=after)
    return [reports[name] for name in attempt.network.order if name in reports]


def _excluded(layer: Layer) -> LayerReport:
    return LayerReport(layer.name, layer.op, channels=layer.channels, reasons=(ReasonCode.EXCLUDED(),))


def _uncorrectable(layer: Layer, match: Match | None) -> LayerReport:
    """The report of a layer that needs or allows no correction."""
    if match is None:
        return LayerReport(layer.name, layer.op, channels=layer.channels, reasons=(ReasonCode.UNMATCHED(),))
    if not match.is_finite:
        return LayerReport(layer.name, layer.op, channels=layer.channels, reasons=(ReasonCode.WEIGHTS_NOT_FINITE(),))
    if not match.is_quantized:
        return LayerReport(layer.name, layer.op, None, layer.channels, 0.0, 0.0, (ReasonCode.NOT_QUANTIZED(),))
    return LayerReport(layer.name, layer.op, channels=layer.channels, reasons=(ReasonCode.BIAS_SKIPPED(),))
