"""A model of any framework as a network."""

from __future__ import annotations

from typing import Any

from biascorr.graph.network import Network


def network_from_model(model: Any, name: str) -> Network:
    """The network that a path, bytes or onnx.ModelProto holds; `name` is what errors call it.

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
    try:
        from biascorr.adapters.onnx.network import OnnxNetwork
    except ImportError as error:
        raise ImportError(f'reading a model needs {error.name}: pip install "biascorr[onnx]"') from error
    return OnnxNetwork.load(model, name)
