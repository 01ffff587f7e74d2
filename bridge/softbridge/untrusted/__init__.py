"""The only code that opens foreign bytes, and the only code that writes output.

Prompt checkpoints come from strangers, so one package answers for all of them. What it promises:

- no code from a checkpoint is ever executed: no unpickler sees a pickle, its program is walked here as data;
- nothing is allocated that the file does not really contain: every claim about a size is compared with the bytes that
  are there *before* it is believed (peak memory is at most 8 times a file of tensors; see `LIMIT` for its description);
- what is malformed is a `CheckpointError`, never another exception, never a guess;
- no input is modified, and an output appears whole or not at all.

Arrays are NumPy's. torch is imported only where a pickle is written, so that looking at files stays quick.

To read it, in this order: `claims` (what is believed of a file, and what is refused), `headers` (safetensors and .npy),
`pickle_walk` and `pickles`, `flax_state` and `zarr_array` (JAX's), `archives` (files within a file), `files` (the door
to all of them), `streamed` and `content` (what is written, piece by piece) and `output` (how it is written).
"""

from __future__ import annotations

from softbridge.untrusted.claims import (
    DEPTH,
    DTYPE_CODES,
    LIMIT,
    MEMBERS,
    is_safe_name,
    not_finite,
    parse_json,
    parse_yaml,
)
from softbridge.untrusted.content import (
    json_bytes,
    little_endian,
    npy_bytes,
    pickle_bytes,
    pickle_file,
    safetensors_bytes,
    safetensors_file,
    tensor_bytes,
    zip_bytes,
)
from softbridge.untrusted.files import Files, Kind
from softbridge.untrusted.hub import hub_id, located
from softbridge.untrusted.output import Log, check_name, check_vacant, write, write_file, write_into
from softbridge.untrusted.pickle_walk import Foreign
from softbridge.untrusted.pickles import Stored, pickled
from softbridge.untrusted.streamed import Content, Streamed, Written, sha256_of

__all__ = [
    "DEPTH",
    "DTYPE_CODES",
    "LIMIT",
    "MEMBERS",
    "Content",
    "Files",
    "Foreign",
    "Kind",
    "Log",
    "Stored",
    "Streamed",
    "Written",
    "check_name",
    "check_vacant",
    "hub_id",
    "is_safe_name",
    "json_bytes",
    "little_endian",
    "located",
    "not_finite",
    "npy_bytes",
    "parse_json",
    "parse_yaml",
    "pickle_bytes",
    "pickle_file",
    "pickled",
    "safetensors_bytes",
    "safetensors_file",
    "sha256_of",
    "tensor_bytes",
    "write",
    "write_file",
    "write_into",
    "zip_bytes",
]
