"""The digest of a model: of its values, wherever they are, and of its graph without them."""

from __future__ import annotations

import hashlib

import onnx
from google.protobuf.message import Message

from biascorr.adapters.onnx.files import PROVENANCE, all_tensors
from biascorr.adapters.onnx.tensors import Values, key_of, raw_of


def digest_of(model: onnx.ModelProto, values: Values) -> str:
    """SHA-256, in hexadecimal, of all but provenance and texts for people; values are read where they lie."""
    light, digest = onnx.ModelProto(), hashlib.sha256()
    light.CopyFrom(model)
    for tensor in all_tensors(light):
        raw = tensor.raw_data if key_of(tensor) is None else raw_of(tensor, values).data
        digest.update(f"{len(raw)}:".encode())
        digest.update(raw)
        for field in ("raw_data", "data_location", "external_data"):
            tensor.ClearField(field)
    others = [entry for entry in light.metadata_props if entry.key != PROVENANCE]
    del light.metadata_props[:]
    light.metadata_props.extend(others)
    _clear_texts(light)
    digest.update(light.SerializeToString(deterministic=True))
    return digest.hexdigest()


def _clear_texts(message: Message) -> None:
    for field, value in message.ListFields():
        if field.name == "doc_string":
            message.ClearField(field.name)
        elif field.message_type is not None:
            for each in [value] if isinstance(value, Message) else value:
                _clear_texts(each)
