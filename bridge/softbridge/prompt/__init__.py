"""What a soft prompt is, independent of every toolkit; and the file of our own that holds one."""

from __future__ import annotations

from softbridge.arrays import Array, frozen, same_array
from softbridge.prompt.container import digest_of, file_of, pack, unpack
from softbridge.prompt.part import (
    Adaption,
    AdaptionPrompt,
    Entry,
    Gate,
    InputPrompt,
    Joins,
    KeyValue,
    KeyValuePrefix,
    Part,
    Placement,
)
from softbridge.prompt.soft_prompt import BaseId, Origin, Positions, SoftPrompt, Training
from softbridge.prompt.values import FrozenMap, Json

__all__ = [
    "Adaption",
    "AdaptionPrompt",
    "Array",
    "BaseId",
    "Entry",
    "FrozenMap",
    "Gate",
    "InputPrompt",
    "Joins",
    "Json",
    "KeyValue",
    "KeyValuePrefix",
    "Origin",
    "Part",
    "Placement",
    "Positions",
    "SoftPrompt",
    "Training",
    "digest_of",
    "file_of",
    "frozen",
    "pack",
    "same_array",
    "unpack",
]
