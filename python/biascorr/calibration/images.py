"""Calibration samples from a folder of images: found, turned, resized, cropped and scaled as for training, one batch at a time.

    pixels  -> upright -> resized -> cropped in the centre -> (pixels * scale - mean) / std -> axes and channels of the model

What is not said follows from the input of the model: its size, where its channels are, how many there are.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from biascorr.arguments import checked_choice
from biascorr.graph.network import ModelInput
from biascorr.typing import ImageColor, ImageLayout, ImagePreset

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""Of the files that are images, in lower case."""

_MARGIN = 256 / 224
"""What the shorter side is resized to, as a multiple of what is cropped, where ImageNet's networks are evaluated."""

_MOST_PIXELS = 1 << 27
"""Of an image that is enlarged: 400 MB of colors, a hundred times what networks take."""

_CROP = 224
"""What is cropped there."""


@dataclass(frozen=True)
class _Preset:
    """How pixels of 0 to 255 become what a network was trained with; means and deviations for red, green, blue."""

    scale: float
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    color: ImageColor | None = None
    margin: float | None = None

    def of_channels(self, color: str) -> tuple[float, NDArray[np.float32], NDArray[np.float32]]:
        """The scale, the means and the deviations, in the order of the channels; their averages for gray."""
        mean, std = (np.array(numbers, np.float32) for numbers in (self.mean, self.std))
        if color == "gray":
            return self.scale, mean.mean(keepdims=True), std.mean(keepdims=True)
        return (self.scale, mean[::-1], std[::-1]) if color == "bgr" else (self.scale, mean, std)


_PRESETS: dict[str, _Preset] = {
    "imagenet": _Preset(1 / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), margin=_MARGIN),  # torchvision's weights
    "imagenet-caffe": _Preset(1.0, (123.68, 116.779, 103.939), color="bgr", margin=_MARGIN),  # Caffe's, Keras' mode "caffe"
    "minus-one-to-one": _Preset(1 / 127.5, (1.0,)),  # TensorFlow's
    "zero-to-one": _Preset(1 / 255),
}


def images(
    folder: str | PathLike[str],
    *,
    size: int | Sequence[int] | None = None,
    crop: int | Sequence[int] | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    layout: ImageLayout | None = None,
    scale: float | None = None,
    color: ImageColor | None = None,
    preset: ImagePreset | None = None,
) -> Images:
    """Samples from a folder of images, for a model with one input; all that takes `data` takes what this returns.

    Files are found by their names (.jpg, .jpeg, .png, .bmp, .webp, .gif, .tif, .tiff) in the folder and in the folders in it,
    one level deep, as data sets have one for each class; hidden ones are left out. They are in the order of their paths. Where
    fewer are read than there are (`max_samples`), they are spread evenly over that order, so that all classes are among them.
    They are decoded when they are read, one batch at a time; animations by their first picture, transparent ones as if they
    were not, 16 bits as the upper 8.

    Parameters
    ----------
    folder : path
        The folder.
    size : int or (int, int), optional
        What images are resized to before they are cropped: the shorter side, or height and width, whatever becomes of the
        proportions. None: so that the crop just fits in, or as the preset says; with `crop` alone, they are not resized.
    crop : int or (int, int), optional
        Height and width that are cut out in the centre. None: the size that the model takes; where it takes any, a square of
        `size`.
    mean, std : float or sequence of float, optional
        Subtracted from the scaled pixels, and what the difference is divided by: one number, or one for each channel in the
        order of the model's. None: 0 and 1.
    layout : str, optional
        "NCHW" or "NHWC", where the channels are. None: as the shape of the model's input says.
    scale : float, optional
        What pixels of 0 to 255 are multiplied by before the mean is subtracted, e.g. 1 / 255. None: 1.
    color : str, optional
        "rgb", "bgr" or "gray". None: as many channels as the model has, red first.
    preset : str, optional
        What the rest is where it is not given:

        - "imagenet": ``(x / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)``, as torchvision's networks; the shorter side
          becomes 256 for a crop of 224, and in proportion where the model takes another size.
        - "imagenet-caffe": ``x - (103.939, 116.779, 123.68)``, blue first, and the same size.
        - "minus-one-to-one": ``x / 127.5 - 1``, as many networks of TensorFlow.
        - "zero-to-one": ``x / 255``.

        For one channel, the averages of these numbers.

    Returns
    -------
    Images
        The samples. `len` is how many images there are; :attr:`~Images.note` says what range the values have that were read.

    Raises
    ------
    ImportError
        Pillow is not installed (``pip install "biascorr[images]"``).
    FileNotFoundError, NotADirectoryError
        There is no such folder.
    ValueError
        There are no images in it; an option has a value that is not allowed. When they are read: the model takes something
        else, or does not say what it takes; a file cannot be decoded, or is smaller than the crop.

    Notes
    -----
    A model that takes integers is given the pixels as they are, whatever the preset; `mean`, `std` and `scale` are errors then.

    Examples
    --------
    >>> import tempfile
    >>> from PIL import Image
    >>> folder = tempfile.mkdtemp()
    >>> Image.new("RGB", (320, 240), "white").save(f"{folder}/white.png")
    >>> samples = images(folder, preset="imagenet")
    >>> samples
    <1 image, preset='imagenet'>
    >>> batch = samples.read(ModelInput("x", np.dtype("float32"), (None, 3, 224, 224)))[0:1]
    >>> batch.shape
    (1, 3, 224, 224)
    >>> samples.note
    'input x: 2.25 to 2.64, mean 2.44, of 1 image'
    """
    given = {"size": size, "crop": crop, "mean": mean, "std": std, "layout": layout, "scale": scale, "color": color}
    if not isinstance(folder, (str, PathLike)):
        raise TypeError(f"folder: {type(folder).__name__}, expected a path")
    return Images(Path(folder), _checked({**given, "preset": preset}))


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    """The options that are given. Raises ValueError where one has a value that is not allowed."""
    given = {name: value for name, value in options.items() if value is not None}
    for name, allowed in {"layout": ImageLayout, "color": ImageColor, "preset": ImagePreset}.items():
        if name in given:
            checked_choice(name, given[name], get_args(allowed))
    for name in ("size", "crop"):
        if name in given:
            given[name] = _sides(name, given[name])
    for name in ("mean", "std", "scale"):
        if name in given:
            given[name] = _numbers(name, given[name])
    return given


_LARGEST = 1e12
"""What no number of a preprocessing reaches; with it, and its reciprocal, samples are finite in float32."""


def _sides(name: str, value: Any) -> int | tuple[int, int]:
    sides = tuple(value) if isinstance(value, (tuple, list, np.ndarray)) else (value,)
    are_integers = all(isinstance(side, (int, np.integer)) and not isinstance(side, bool) and side > 0 for side in sides)
    if not are_integers or len(sides) not in (1, 2):
        raise ValueError(f"{name}: {value!r}, expected an integer of at least 1, or two, height and width")
    return (int(sides[0]), int(sides[1])) if len(sides) == 2 else int(sides[0])


def _numbers(name: str, value: Any) -> tuple[float, ...]:
    try:
        numbers = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        numbers = np.full((), np.nan)
    least = 1 if name == "scale" else 3
    if numbers.ndim > 1 or numbers.size not in (1, least) or not (np.abs(numbers) < _LARGEST).all():
        several = "" if name == "scale" else ", or one for each channel"
        raise ValueError(f"{name}: {value!r}, expected a number{several}")
    if name != "mean" and (numbers < 1 / _LARGEST).any():
        raise ValueError(f"{name}: {value!r}, expected more than 0")
    return tuple(map(float, np.atleast_1d(numbers)))


class Images:
    """Samples that are images in files; made by :func:`images`.

    Parameters
    ----------
    folder : Path
        Where they are.
    options : dict
        Those of :func:`images` that are given, checked.

    Attributes
    ----------
    folder : Path
        Where they are.
    files : tuple of Path
        All of them, in order.
    note : str
        A line on the values that were last read: their input, range and mean. Empty before.

    Raises
    ------
    ImportError, FileNotFoundError, NotADirectoryError, ValueError
        As :func:`images`.
    """

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        _pillow()
        self.folder = folder
        self.files = _files(folder)
        self._options = options
        self._rows: ImageRows | None = None

    def __len__(self) -> int:
        return len(self.files)

    def __repr__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self._options.items())
        return f"<{_count(len(self))}{options}>"

    @property
    def note(self) -> str:
        """A line on the values that were last read."""
        return "" if self._rows is None else self._rows.note

    def other_presets(self) -> dict[str, Callable[[NDArray[Any]], NDArray[Any]]]:
        """What makes of the values that were last read those that each preset would give, by its name; none of integers."""
        return {} if self._rows is None else self._rows.other_presets()

    def read(self, model_input: ModelInput, *, most: int | None = None, name: str = "data") -> ImageRows:
        """The images as rows of an array, as this input of a model takes them; nothing is decoded yet.

        Parameters
        ----------
        model_input : ModelInput
            The input.
        most : int, optional
            So many come first, spread evenly over all of them; the others follow.
        name : str
            The name that errors give them.
        """
        steps = _Steps.of(self._options, model_input, name)
        self._rows = ImageRows(_spread(self.files, most), steps, model_input, name)
        return self._rows


def _count(images: int) -> str:
    return f"{images} image" + ("" if images == 1 else "s")


def _pillow() -> Any:
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise ImportError('images need Pillow: pip install "biascorr[images]"') from None
    return Image, ImageOps


def has_images(path: Path) -> bool:
    """Whether a path is an image by its name, or a folder with some, as :func:`images` finds them."""
    return bool(_found(path)) if path.is_dir() else path.suffix.lower() in SUFFIXES


def _files(folder: Path) -> tuple[Path, ...]:
    if not folder.exists():
        raise FileNotFoundError(f"folder: no such folder: {folder}")
    if not folder.is_dir():
        raise NotADirectoryError(f"folder: {folder}: it is a file, expected a folder of images")
    found = _found(folder)
    if not found:
        count = sum(1 for each in folder.rglob("*") if each.is_file())
        hint = f" and one level of folders in it; {count} files, none {', '.join(SUFFIXES)}" if count else ", which is empty"
        raise ValueError(f"folder: {folder}: no image in this folder{hint}")
    return tuple(found)


def _found(folder: Path) -> list[Path]:
    """Images in a folder, and in those in it; without hidden ones, as macOS puts beside files and Jupyter into folders."""
    inside = [each for each in sorted(folder.iterdir()) if not each.name.startswith(".")]
    below = [file for each in inside if each.is_dir() for file in sorted(each.iterdir()) if not file.name.startswith(".")]
    return sorted(each for each in (*inside, *below) if each.suffix.lower() in SUFFIXES and each.is_file())


def _spread(files: Sequence[Path], most: int | None) -> list[Path]:
    """So many of the files, evenly spread, then the others."""
    if most is None or most >= len(files):
        return [*files]
    first = [k * len(files) // most for k in range(most)]
    return [*(files[k] for k in first), *(files[k] for k in sorted({*range(len(files))}.difference(first)))]


@dataclass(frozen=True)
class _Steps:
    """How an image becomes a sample.

    Parameters
    ----------
    size : int, (int, int) or None
        What it is resized to, the shorter side or both; None: so that it covers `margin` times the crop.
    margin : float
        See `size`; 0: it is not resized.
    crop : (int, int)
        Height and width that are cut out.
    color : str
        See :func:`images`.
    is_last : bool
        Whether channels are the last axis.
    affine : (float, ndarray, ndarray) or None
        What pixels are multiplied by, what is subtracted, what the difference is divided by; None: they stay as they are.
    """

    size: int | tuple[int, int] | None
    margin: float
    crop: tuple[int, int]
    color: str
    is_last: bool
    affine: tuple[float, NDArray[np.float32], NDArray[np.float32]] | None

    @classmethod
    def of(cls, options: dict[str, Any], model_input: ModelInput, name: str) -> _Steps:
        """Those for an input of a model. Raises ValueError where they cannot be, or are not known."""
        label = f"{name}: input {model_input.name}"
        preset = _PRESETS.get(options.get("preset", ""), _Preset(1.0))
        shape = model_input.shape or (None,) * 4
        if len(shape) != 4:
            raise ValueError(f"{label}: takes shape {_shape(shape)}, images have four axes: (N, C, H, W) or (N, H, W, C)")
        is_last = _is_last(options.get("layout"), shape, label)
        height, width, channels = shape[1:] if is_last else (shape[2], shape[3], shape[1])
        color = _color(options.get("color"), preset, channels, label)
        crop = _crop(options, preset, (height, width), label)
        margin = preset.margin or (0.0 if "crop" in options else 1.0)
        return cls(options.get("size"), margin, crop, color, is_last, _affine(options, preset, color, model_input.dtype, label))

    def of_image(self, image: Any) -> NDArray[Any]:
        """The sample that an image gives, which is upright and has the mode of this color."""
        image = self._cut(self._resized(image))
        pixels = np.asarray(image)
        pixels = pixels[..., None] if self.color == "gray" else pixels[..., ::-1] if self.color == "bgr" else pixels
        if self.affine is not None:
            scale, mean, std = self.affine
            pixels = (pixels * np.float32(scale) - mean) / std
        return pixels if self.is_last else pixels.transpose(2, 0, 1)

    @property
    def mode(self) -> str:
        """What Pillow calls the channels."""
        return "L" if self.color == "gray" else "RGB"

    def _resized(self, image: Any) -> Any:
        width, height = image.size
        if isinstance(self.size, tuple):
            height, width = self.size
        elif self.size is not None:  # rounded as torchvision does
            short = self.size
            height, width = (short, int(short * width / height)) if height <= width else (int(short * height / width), short)
        elif self.margin:
            rows, columns = self.crop
            factor = max(round(rows * self.margin) / height, round(columns * self.margin) / width)
            height, width = max(rows, int(height * factor + 1e-6)), max(columns, int(width * factor + 1e-6))
        if width * height > max(_MOST_PIXELS, image.width * image.height):
            raise _SizeError(
                f"{image.height}x{image.width} (height x width) would be resized to {height}x{width}, more than {_MOST_PIXELS} "
                "pixels; remove it, or give another size"
            )
        return image if image.size == (width, height) else image.resize((width, height), _pillow()[0].Resampling.BILINEAR)

    def _cut(self, image: Any) -> Any:
        rows, columns = self.crop
        if image.width < columns or image.height < rows:
            found = f"{image.height}x{image.width}"
            raise _SizeError(f"{found} (height x width), smaller than the crop of {rows}x{columns}; give a larger size")
        top, left = round((image.height - rows) / 2), round((image.width - columns) / 2)
        return image.crop((left, top, left + columns, top + rows))


class _SizeError(ValueError):
    """An image is smaller than what is cropped, or would become too large."""


def _shape(shape: Sequence[int | None]) -> str:
    return "(" + ", ".join("any" if axis is None else str(axis) for axis in shape) + ")"


def _is_last(layout: str | None, shape: Sequence[int | None], label: str) -> bool:
    """Whether channels are the last axis, as is said, or as one of the axes can be channels and the other not."""
    if layout is not None:
        return layout == "NHWC"
    first, last = shape[1] in (1, 3), shape[3] in (1, 3)
    if first == last:
        raise ValueError(
            f"{label}: takes shape {_shape(shape)}, which does not say where the channels are; "
            "give layout='NCHW' or 'NHWC' (--layout)"
        )
    return last


def _color(color: str | None, preset: _Preset, channels: int | None, label: str) -> str:
    found = color or ("gray" if channels == 1 else preset.color or "rgb")
    count = 1 if found == "gray" else 3
    if channels not in (None, count):
        hint = "give layout (--layout) if that is another axis" if channels not in (1, 3) else f"{found!r} has {count}"
        raise ValueError(f"{label}: takes {channels} channels, images have 3, or 1 if they are gray; {hint}")
    return found


def _crop(options: dict[str, Any], preset: _Preset, expected: tuple[int | None, int | None], label: str) -> tuple[int, int]:
    """What is cut out: what is said, or what the model takes; as its size, where it takes any."""
    given = options.get("crop", None if None not in expected else options.get("size", _CROP if preset.margin else None))
    sides = (given, given) if isinstance(given, int) else given or (None, None)
    found = tuple(side if "crop" in options else known or side for side, known in zip(sides, expected))
    if None in found:
        raise ValueError(f"{label}: takes images of any size; give one (size, crop; --size, --crop)")
    if any(known not in (None, side) for side, known in zip(found, expected)):
        raise ValueError(f"{label}: takes images of {_size(expected)}, crop is {_size(found)}")
    height, width = found
    return height, width


def _size(sides: Sequence[int | None]) -> str:
    return "x".join("any" if side is None else str(side) for side in sides) + " (height x width)"


def _affine(
    options: dict[str, Any], preset: _Preset, color: str, dtype: np.dtype[Any], label: str
) -> tuple[float, NDArray[np.float32], NDArray[np.float32]] | None:
    if dtype.kind in "iu":
        given = [name for name in ("mean", "std", "scale") if name in options]
        if given:
            raise ValueError(f"{label}: takes {dtype}, which are pixels as they are; drop {', '.join(given)}")
        if np.iinfo(dtype).max < np.iinfo(np.uint8).max:
            raise ValueError(f"{label}: takes {dtype}, pixels are 0 to 255; give a model that takes uint8 or floats")
        return None
    if dtype.kind in "bcmMOSU":
        raise ValueError(f"{label}: takes {dtype}, images are numbers: floats, or pixels of 0 to 255")
    scale, *of_preset = preset.of_channels(color)
    mean, std = (np.array(options.get(name, numbers), np.float32) for name, numbers in zip(("mean", "std"), of_preset))
    count = 1 if color == "gray" else 3
    for name, numbers in {"mean": mean, "std": std}.items():
        if numbers.size not in (1, count):
            raise ValueError(f"{label}: {name}: {numbers.size} numbers for {count} channel")
    return options.get("scale", (scale,))[0], mean, std


class ImageRows:
    """Images as the rows of an array, decoded when they are asked for.

    Parameters
    ----------
    files : sequence of Path
        One for each row.
    steps : _Steps
        How an image becomes a sample.
    model_input : ModelInput
        What takes it.
    name : str
        The name that errors give them.

    Attributes
    ----------
    shape, dtype, ndim
        As of an array.
    """

    def __init__(self, files: Sequence[Path], steps: _Steps, model_input: ModelInput, name: str) -> None:
        rows, columns = steps.crop
        channels = 1 if steps.color == "gray" else 3
        self.shape = (len(files), *((rows, columns, channels) if steps.is_last else (channels, rows, columns)))
        self.dtype, self.ndim = model_input.dtype, 4
        self._files, self._steps, self._input, self._name = files, steps, model_input.name, name
        self._images, self._low, self._high, self._sum = 0, math.inf, -math.inf, 0.0

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, key: slice | int) -> NDArray[Any]:
        if not isinstance(key, slice):
            return np.asarray(self[key : key + 1][0])
        batch = (
            np.stack([self._sample(file) for file in self._files[key]]) if self._files[key] else np.empty((0, *self.shape[1:]))
        )
        self._images += len(batch)
        self._low, self._high = min(self._low, float(batch.min())), max(self._high, float(batch.max()))
        self._sum += float(batch.mean(dtype=np.float64)) * len(batch)
        return batch.astype(self.dtype, copy=False)

    @property
    def note(self) -> str:
        """A line on the values that were read; empty where none were."""
        if not self._images:
            return ""
        low, high, mean = (f"{value:.3g}" for value in (self._low, self._high, self._sum / self._images))
        return f"input {self._input}: {low} to {high}, mean {mean}, of {_count(self._images)}"

    def other_presets(self) -> dict[str, Callable[[NDArray[Any]], NDArray[Any]]]:
        """See :meth:`Images.other_presets`; channels stay in their order."""
        affine, axis = self._steps.affine, -1 if self._steps.is_last else 1
        if affine is None:
            return {}

        def change(preset: _Preset) -> Callable[[NDArray[Any]], NDArray[Any]]:
            (scale, mean, std), (other_scale, other_mean, other_std) = affine, preset.of_channels(self._steps.color)
            factor = np.moveaxis((std * other_scale / (scale * other_std)).reshape(1, 1, 1, -1), -1, axis)
            added = np.moveaxis(((mean * other_scale / scale - other_mean) / other_std).reshape(1, 1, 1, -1), -1, axis)
            return lambda array: (array * factor + added).astype(array.dtype)

        return {name: change(preset) for name, preset in _PRESETS.items()}

    def _sample(self, file: Path) -> NDArray[Any]:
        try:
            image = _upright(file, self._steps.mode)
        except (MemoryError, PermissionError):
            raise
        except Exception as error:  # Pillow raises a dozen kinds at files that are damaged
            remedy = "remove it, or save it again as .png"
            if "DecompressionBomb" in type(error).__name__:
                remedy = "make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"
            raise ValueError(f"{self._name}: {file}: no image that can be read: {_line(error)}; {remedy}") from None
        try:
            return self._steps.of_image(image)
        except _SizeError as error:
            raise ValueError(f"{self._name}: {file}: {error}") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _upright(file: Path, mode: str) -> Any:
    """An image of a mode with 8 bits for each channel, turned as its camera says."""
    image_module, operations = _pillow()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of tags that are damaged, and of transparency that is left out
        with image_module.open(os.fspath(file)) as opened:
            image = operations.exif_transpose(opened)
            if image.mode.startswith("I"):
                image = image_module.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
            elif image.mode == "F":
                raise ValueError("its pixels are real numbers, expected 8 bits")
            return image.convert(mode)
