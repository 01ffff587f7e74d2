"""What a prompt's origin records of the PEFT file that it was read from, so that the file is written as it was.

That is its configuration; and, of an encoder-decoder model, the numbers in it that are not the prompt's. With two
submodules, PEFT's default there, an input prompt is saved with as many rows again, of which no model sees any (of a
multitask prompt: only in training), and of a prefix of evenly many layers every second block is dead.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

import numpy as np

from softbridge.arrays import Array
from softbridge.lowering.precision import DTYPES
from softbridge.prompt import AdaptionPrompt, InputPrompt, SoftPrompt
from softbridge_peft import facts
from softbridge_peft.config import Config

#: The record may go into the header of a file, which softbridge believes up to 8 MiB of. So many bytes are kept.
MOST = 4 * 2**20

_RECORD = "unused"


def config_of_origin(prompt: SoftPrompt) -> Mapping[str, Any]:
    """The configuration of the PEFT file that the prompt was read from; empty if it was not read from one."""
    origin = prompt.origin
    config = origin.details.get("config") if origin is not None and origin.format == "peft" else None
    return config if isinstance(config, dict) else {}


def unused_details(fields: Config, tensors: Mapping[str, Array]) -> tuple[dict[str, Any], list[str]]:
    """What the origin of a prompt records of its file's unused numbers, and the notes that say so."""
    length, layers = fields.length, fields.layers or 0
    rest: dict[str, Array] = {}
    what = ""
    if fields.submodules == 2 and fields.kind == "input":
        rest[facts.PROMPT] = tensors[facts.PROMPT][length:]
        if fields.peft_type == facts.MULTITASK:
            rest[facts.COLUMNS] = tensors[facts.COLUMNS][:, length:]
        use = "uses in training only" if fields.peft_type == facts.MULTITASK else "never uses"
        what = f"rows {length} to {2 * length - 1}, which PEFT {use}"
    elif fields.submodules == 2 and layers % 2 == 0:
        rest[facts.PROMPT] = tensors[facts.PROMPT].reshape(length, layers, -1)[:, 1::2].reshape(length, -1)
        what = "blocks of odd number, which PEFT never uses with two submodules"
    if not rest:
        return {}, []
    if sum(array.nbytes for array in rest.values()) > MOST:
        return {}, [f"{what}, are left out"]
    record = {
        name: {"dtype": array.dtype.name, "data": base64.b64encode(array.tobytes()).decode()}
        for name, array in rest.items()
    }
    return {_RECORD: record}, [f"{what}, are kept for a file of PEFT's own alone"]


def unused(prompt: SoftPrompt, peft_type: str) -> dict[str, Array]:
    """Tensor name -> the numbers that stand behind (or, of a prefix, between) the prompt's in a file of that type.

    Empty if the prompt did not come from such a file, or has another shape by now: then they belong to nothing.
    """
    if prompt.origin is None or config_of_origin(prompt).get("peft_type") != peft_type:
        return {}
    part = prompt.parts[0]
    if isinstance(part, InputPrompt):
        wanted = {facts.PROMPT: part.vectors}
        if peft_type == facts.MULTITASK and prompt.training is not None:
            wanted[facts.COLUMNS] = prompt.training.tensors["columns"]
        shapes = {name: array.shape for name, array in wanted.items()}
        dtype: Any = part.vectors.dtype
    elif isinstance(part, AdaptionPrompt):
        return {}
    else:
        kv_heads, length, head_dim = part.layers[0].keys.shape
        shapes = {facts.PROMPT: (length, len(part.layers) // 2 * 2 * kv_heads * head_dim)}
        dtype = part.layers[0].keys.dtype
    record = prompt.origin.details.get(_RECORD, {})
    if not isinstance(record, dict) or record.keys() != shapes.keys():
        return {}
    try:
        return {name: _decoded(record[name]).reshape(shape).astype(dtype) for name, shape in shapes.items()}
    except (KeyError, TypeError, ValueError, binascii.Error):  # of another shape, or written by a stranger
        return {}


def _decoded(entry: Mapping[str, str]) -> Array:
    return np.frombuffer(base64.b64decode(entry["data"], validate=True), DTYPES[entry["dtype"]])
