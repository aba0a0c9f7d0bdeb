"""A model of any framework as a network."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from biascorr.graph.network import Network, is_network


def network_from_model(model: Any, name: str) -> Network:
    """The network that a path, bytes or onnx.ModelProto holds, or that another adapter has made; errors call it by the name.

    Raises
    ------
    FileNotFoundError
        The file or its external data is missing.
    ImportError
        onnx and onnxruntime are not installed.
    TypeError
        It is none of the above.
    ValueError
        It is not a valid model.
    """
    if is_network(model):
        return cast(Network, model)
    with _needed():
        from biascorr.adapters.onnx.network import OnnxNetwork
    return OnnxNetwork.load(model, name)


def sizes_by_file(path: Path, name: str) -> dict[Path, int]:
    """The files that a model is in, with the bytes that it has in each. Raises as :func:`network_from_model`."""
    with _needed():
        from biascorr.adapters.onnx import files
    return files.sizes_by_file(path, name)


@contextlib.contextmanager
def _needed() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ImportError(f'reading a model needs {error.name}: pip install "biascorr[onnx]"') from error
