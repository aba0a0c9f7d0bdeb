"""Where a TFLite model comes from; see :mod:`biascorr.graph.origin`."""

from __future__ import annotations

import re
from typing import Any

from biascorr.adapters.tflite.tensors import PACKED, grid_of, has_codes, type_name

_CONVERTER = "MLIR Converted."
"""What TFLiteConverter describes its models with."""

_METADATA = b"CONVERSION_METADATA"
"""The entry in which TFLiteConverter says which TensorFlow it is of."""

_VERSION = re.compile(rb"\d+\.\d+\.\d+[\w.+-]*")


def format_of(model: Any) -> str:
    """The format with its version, and that of the runtime which it needs."""
    needed = _entry(model, b"min_runtime_version")
    found = None if needed is None else _VERSION.search(needed)
    return ", ".join([f"TFLite {model.version}", *([f"runtime {found[0].decode()} or later"] if found else [])])


def quantization_of(model: Any) -> str | None:
    """How it is quantized: the types of its activations and weights; "dynamic" where only weights are."""
    tensors = [tensor for subgraph in model.subgraphs for tensor in subgraph.tensors or []]
    constant = [_has_values(model, tensor) for tensor in tensors]
    weights = {_type(each) for each, is_constant in zip(tensors, constant) if is_constant and grid_of(each) is not None}
    activations = {_type(each) for each, is_constant in zip(tensors, constant) if not is_constant and has_codes(each)}
    if activations:
        kinds = "/".join(sorted(activations)), "/".join(sorted(weights - {"int32", "int64"})) or "none"
        return f"{kinds[0]} activations, {kinds[1]} weights"
    return f"dynamic, {'/'.join(sorted(weights))} weights" if weights else None


def producer_of(model: Any) -> str | None:
    """What wrote a model."""
    description = (model.description or b"").decode(errors="replace")
    if description != _CONVERTER:
        return description or None
    version = _VERSION.search(_entry(model, _METADATA) or b"")
    return "TFLiteConverter" + (f" of TensorFlow {version[0].decode()}" if version else "")


def _entry(model: Any, name: bytes) -> bytes | None:
    index = next((int(each.buffer) for each in model.metadata or [] if each.name == name), -1)
    buffers = model.buffers or []
    return bytes(buffers[index].data) if 0 <= index < len(buffers) and buffers[index].data is not None else None


def _has_values(model: Any, tensor: Any) -> bool:
    buffer = tensor.buffer if tensor.buffer is not None else 0
    return bool(0 < buffer < len(model.buffers) and model.buffers[buffer].data is not None)


def _type(tensor: Any) -> str:
    return f"int{PACKED[tensor.type]}" if tensor.type in PACKED else type_name(tensor).lower()
