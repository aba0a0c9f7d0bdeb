"""Types of arguments, for type checkers and for those who pass them on: the values of choices, kinds of models and of data.

Examples
--------
>>> from typing import get_args
>>> get_args(Method)
('auto', 'mean', 'iterative', 'empirical', 'activation', 'squared', 'analytical', 'hybrid')
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, TypeVar

if TYPE_CHECKING:
    from typing_extensions import TypeVar as _TypeVarWithDefault

    Model = _TypeVarWithDefault("Model", default=Any)
    Model_co = _TypeVarWithDefault("Model_co", default=Any, covariant=True)
else:
    Model = TypeVar("Model")
    Model_co = TypeVar("Model_co", covariant=True)

__all__ = [
    "Calibration",
    "Data",
    "ImageColor",
    "ImageLayout",
    "ImagePreset",
    "IndexedSamples",
    "Method",
    "Model",
    "ModelFile",
    "Model_co",
    "NewBiases",
    "QuantMode",
    "QuantizedType",
    "Reader",
    "RoundMode",
    "SamplesForInputs",
    "Tensor",
]

Method: TypeAlias = Literal["auto", "mean", "iterative", "empirical", "activation", "squared", "analytical", "hybrid"]
"""The `method` of :func:`biascorr.correct`."""

NewBiases: TypeAlias = Literal["add", "skip"]
"""The `new_biases` of :func:`biascorr.correct`."""

QuantizedType: TypeAlias = Literal["int8", "uint8", "int16", "uint16"]
"""The types of weights and activations of :func:`biascorr.quantize`."""

Calibration: TypeAlias = Literal["minmax", "entropy", "percentile"]
"""The `calibration` of :func:`biascorr.quantize`."""

QuantMode: TypeAlias = Literal["tf", "tf_enhanced"]
"""How the range of weights is found; see :class:`biascorr.QuantParams`."""

RoundMode: TypeAlias = Literal["nearest", "stochastic"]
"""How weights are rounded; see :class:`biascorr.QuantParams`."""

ImageLayout: TypeAlias = Literal["NCHW", "NHWC"]
"""The `layout` of :func:`biascorr.images`."""

ImageColor: TypeAlias = Literal["rgb", "bgr", "gray"]
"""The `color` of :func:`biascorr.images`."""

ImagePreset: TypeAlias = Literal["imagenet", "imagenet-caffe", "minus-one-to-one", "zero-to-one"]
"""The `preset` of :func:`biascorr.images`."""

ModelFile: TypeAlias = str | Path | PathLike[str] | bytes
"""A model by its path, or what is in its file."""


class Tensor(Protocol):
    """An array of numpy, or a tensor of another framework."""

    @property
    def shape(self) -> Any:
        """Its axes."""


class Reader(Protocol):
    """As onnxruntime's CalibrationDataReader."""

    def get_next(self) -> Any:
        """The next batch, a mapping from input names to arrays; None at the end."""


class IndexedSamples(Protocol):
    """As torch's Dataset and Keras' PyDataset: samples, or batches, by their numbers."""

    def __getitem__(self, index: int, /) -> Any:
        """One of them."""

    def __len__(self) -> int:
        """How many there are."""


class SamplesForInputs(Protocol):
    """As :func:`biascorr.images` makes them: samples that are read as the inputs of a model say."""

    def read(self, model_input: Any, *, most: int | None = None, name: str = "data") -> Any:
        """The samples as an array, or what is like one."""


Data: TypeAlias = (
    str
    | PathLike[str]
    | Tensor
    | Mapping[str, Any]
    | Iterable[Any]
    | Reader
    | IndexedSamples
    | SamplesForInputs
)  # fmt: skip
"""What the `data` of :func:`biascorr.correct` and others takes."""
