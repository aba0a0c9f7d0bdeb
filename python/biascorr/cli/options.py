"""Options that several commands have, in groups, and how their values are read."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from biascorr.arguments import is_function, nearest
from biascorr.calibration.storage import bytes_from_text
from biascorr.cli.configuring import read_config
from biascorr.typing import ImageColor, ImageLayout, ImagePreset, Method, NewBiases

DATA_PANEL = "Samples"
IMAGE_PANEL = "Samples from a folder of images"
SIMULATED_PANEL = "Simulated quantization"
QUANTIZATION_PANEL = "Quantization"
RUN_PANEL = "Running"
OUTPUT_PANEL = "Output"

PANELS = (DATA_PANEL, IMAGE_PANEL, QUANTIZATION_PANEL, SIMULATED_PANEL, RUN_PANEL, OUTPUT_PANEL)
"""The groups of options, in the order in which they are shown."""

LAYOUTS: tuple[str, ...] = get_args(ImageLayout)
COLORS: tuple[str, ...] = get_args(ImageColor)
PRESETS: tuple[str, ...] = get_args(ImagePreset)
METHODS: tuple[str, ...] = get_args(Method)
NEW_BIASES: tuple[str, ...] = get_args(NewBiases)


def one_of(*allowed: str) -> Callable[[str], str]:
    """Reads a value that is one of these."""

    def choice(text: str) -> str:
        if text not in allowed:
            raise typer.BadParameter(f"{text!r}, expected one of {', '.join(allowed)}{nearest(text, allowed)}")
        return text

    return choice


def completed(*allowed: str) -> Callable[[str], list[str]]:
    """Completes a value that is one of these."""
    return lambda incomplete: [each for each in allowed if each.startswith(incomplete)]


def bytes_of(text: str | int) -> int:
    """Reads "2GB"."""
    if isinstance(text, int):
        return text
    try:
        return bytes_from_text(text)
    except ValueError as error:
        raise typer.BadParameter(str(error).removeprefix("memory_budget: ")) from None


def sides_of(text: str | int) -> int | tuple[int, int]:
    """Reads 256, or height x width."""
    parts = str(text).lower().split("x")
    if len(parts) > 2 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"{text!r}, expected a number of pixels or two, height and width: 224 or 224x320")
    numbers = [int(part) for part in parts]
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def numbers_of(text: str | float) -> tuple[float, ...]:
    """Reads one number, or one for each channel."""
    try:
        return tuple(map(number_of, str(text).split(",")))
    except typer.BadParameter:
        raise typer.BadParameter(f"{text!r}, expected a number, or one for each channel: 0.485,0.456,0.406") from None


def number_of(text: str | float) -> float:
    """Reads a number, also as a fraction."""
    try:
        return float(Fraction(text.strip())) if isinstance(text, str) else float(text)
    except (ValueError, ZeroDivisionError):
        raise typer.BadParameter(f"{text!r}, expected a number: 0.00392 or 1/255") from None


Reference = Annotated[
    str, typer.Argument(metavar="FLOAT", help="The float model: .onnx, .tflite, .keras or .h5.", show_default=False)
]
MaxSamples = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Read no more samples than this.", rich_help_panel=DATA_PANEL)
]

_DATA = (
    "Calibration samples: an .npz or .npy file, a folder of them (a batch each), a folder of images (see below), or "
    "module:function, which returns anything that Python takes."
)


def _image(metavar: str, text: str, parser: Callable[[Any], Any] | None = None, choices: Sequence[str] = ()) -> Any:
    return typer.Option(
        metavar=metavar,
        help=text,
        parser=one_of(*choices) if choices else parser,
        autocompletion=completed(*choices) if choices else None,
        rich_help_panel=IMAGE_PANEL,
        show_default=False,
    )


@dataclass(frozen=True)
class DataOptions:
    """Where samples come from."""

    data: Annotated[str | None, typer.Option(metavar="PATH", help=_DATA, rich_help_panel=DATA_PANEL)] = None
    batch_size: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            help="Samples of an array that make a batch, where the model does not fix that.",
            rich_help_panel=DATA_PANEL,
        ),
    ] = 1
    preset: Annotated[
        str | None, _image("NAME", f"What the network was trained with: {', '.join(PRESETS)}.", choices=PRESETS)
    ] = None
    size: Annotated[
        Any, _image("N|HxW", "Resize to this: the shorter side, or height and width. Default: so that the crop fits.", sides_of)
    ] = None
    crop: Annotated[Any, _image("N|HxW", "Cut this out in the centre. Default: the size that the model takes.", sides_of)] = (
        None
    )
    scale: Annotated[Any, _image("X", "Multiply pixels of 0 to 255 by this first: 1/255.", number_of)] = None
    mean: Annotated[Any, _image("X[,X,X]", "Subtract this then, one number or one for each channel.", numbers_of)] = None
    std: Annotated[Any, _image("X[,X,X]", "Divide by this in the end.", numbers_of)] = None
    layout: Annotated[
        str | None, _image("NCHW|NHWC", "Where channels are. Default: as the model's input says.", choices=LAYOUTS)
    ] = None
    color: Annotated[
        str | None, _image("rgb|bgr|gray", "The channels. Default: as many as the model takes, red first.", choices=COLORS)
    ] = None

    def image_options(self) -> dict[str, Any]:
        """The options of images that are given."""
        names = ("size", "crop", "mean", "std", "layout", "scale", "color", "preset")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def samples(self, data: str | None) -> Any:
        """The samples as Python takes them: those of a folder of images where it is said how these are read."""
        options = self.image_options()
        if data is None or not options:
            if options:
                names = ", ".join(f"--{name}" for name in options)
                verb = "is" if len(options) == 1 else "are"
                raise typer.BadParameter(f"missing, {names} {verb} for images", param_hint="--data")
            return data
        if not Path(data).is_dir() and (Path(data).exists() or is_function(data)):
            given = " ".join(f"--{name}" for name in options)
            raise typer.BadParameter(f"{data} is no folder of images; leave out {given}", param_hint="--data")
        from biascorr.calibration.images import images

        return images(data, **options)


@dataclass(frozen=True)
class CorrectionOptions:
    """How biases are corrected, and which."""

    method: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            parser=one_of(*METHODS),
            autocompletion=completed(*METHODS),
            help=f"How shifts are found: {', '.join(METHODS)}.",
        ),
    ] = "auto"
    strength: Annotated[
        float, typer.Option(metavar="X", help="The part of each shift that is corrected, with a method that has one.")
    ] = 1.0
    shrunk: Annotated[
        bool, typer.Option(help="Correct less where samples disagree, with a method that has a strength.", show_default=False)
    ] = False
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LAYER", help="Correct only these layers: a name, a pattern with * and ?, an operator. Repeatable."
        ),
    ] = None
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="LAYER", help="Leave these layers as they are, named the same way. Repeatable.")
    ] = None
    new_biases: Annotated[
        str,
        typer.Option(
            metavar="add|skip",
            parser=one_of(*NEW_BIASES),
            autocompletion=completed(*NEW_BIASES),
            help="Layers without a bias: add one, or skip them.",
        ),
    ] = "add"
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="What is best, greater is better: metric(outputs, reference) of a sample, or evaluate(run) of a model.",
        ),
    ] = None
    validation: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Other samples to score on: then none of the calibration samples are held out.",
            rich_help_panel=DATA_PANEL,
        ),
    ] = None
    seed: Annotated[
        int, typer.Option(metavar="N", min=0, help="Chooses the samples that are held out.", rich_help_panel=DATA_PANEL)
    ] = 0

    def keywords(self, samples: DataOptions) -> dict[str, Any]:
        """As Python takes them."""
        from biascorr.correction.metrics import metric_from_name

        return {
            "method": self.method,
            "strength": self.strength,
            "shrunk": self.shrunk,
            "new_biases": self.new_biases,
            "only": self.only or None,
            "exclude": self.exclude or (),
            "validation": samples.samples(self.validation) if self.validation else None,
            "seed": self.seed,
            "metric": None if self.metric is None else metric_from_name(self.metric),
        }


@dataclass(frozen=True)
class RunOptions:
    """How much of the machine is used."""

    memory_budget: Annotated[
        Any,
        typer.Option(
            parser=bytes_of,
            metavar="BYTES",
            help="Activations held in memory, e.g. 2GB; the rest goes to a temporary folder. Default: half of what is free.",
            show_default=False,
            rich_help_panel=RUN_PANEL,
        ),
    ] = None
    threads: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Threads to use. Default: one for each CPU that may be used.", rich_help_panel=RUN_PANEL
        ),
    ] = None


def _output(*names: str, **settings: Any) -> Any:
    return typer.Option(*names, rich_help_panel=OUTPUT_PANEL, show_default=False, **settings)


@dataclass(frozen=True)
class ModelOptions:
    """The model that is written."""

    output: Annotated[
        Path, _output("--output", "-o", metavar="OUT", help="Where the model that is made goes: .onnx, .tflite or .keras.")
    ]
    provenance: Annotated[
        bool,
        _output(
            "--provenance/--no-provenance", help="Write no version, method and digest of the data into the model's metadata."
        ),
    ] = True


@dataclass(frozen=True)
class ShowOptions:
    """What is shown, and where else it goes."""

    json: Annotated[bool, _output(help="Print the whole report as JSON, and nothing else, on stdout.")] = False
    csv: Annotated[str | None, _output(metavar="FILE", help="Write the rows of the report as CSV; - for stdout.")] = None
    report: Annotated[Path | None, _output(metavar="FILE", help="Write the report as one page, an .html file.")] = None
    quiet: Annotated[bool, _output("--quiet/--no-quiet", "-q", help="Print nothing but errors and warnings.")] = False
    verbose: Annotated[bool, _output("--verbose/--no-verbose", "-v", help="Show all rows of tables, and log to stderr.")] = (
        False
    )
    force: Annotated[bool, _output(help="Overwrite existing files.")] = False
    config: Annotated[
        Path | None,
        _output(
            metavar="FILE",
            is_eager=True,
            callback=read_config,
            help="A .toml file of options by their names, as max-samples = 100. The command line overrides it.",
        ),
    ] = None


def with_groups(function: Callable[..., None]) -> Callable[..., None]:
    """A command whose groups of options, dataclasses, are parameters of their own."""
    signature = inspect.signature(function, eval_str=True)
    annotations = {name: each.annotation for name, each in signature.parameters.items()}
    groups: dict[str, Any] = {name: kind for name, kind in annotations.items() if dataclasses.is_dataclass(kind)}

    @functools.wraps(function)
    def command(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
        function(**values)

    parameters: list[inspect.Parameter] = []
    for name, each in signature.parameters.items():
        if name not in groups:
            parameters.append(each.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        hints = get_type_hints(groups[name], include_extras=True)
        for field in dataclasses.fields(groups[name]):
            default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
            kind = inspect.Parameter.KEYWORD_ONLY
            parameters.append(inspect.Parameter(field.name, kind, default=default, annotation=hints[field.name]))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    del command.__wrapped__
    return command
