"""What a foreign file may claim: how large, which dtypes, which names, which JSON, which numbers.

Every reader of the package asks here before it believes, and refuses here, so that there is one limit of each kind and
one way to say no.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from softbridge.arrays import BFLOAT16, Array, blocks, frozen
from softbridge.errors import CheckpointError

#: Bytes of JSON, of a safetensors header or of a pickle's program (not of data): what is parsed costs up to a hundred
#: times its size. The largest that was seen in a real prompt checkpoint is 200 KB.
LIMIT = 8 * 2**20
#: Nesting of JSON.
DEPTH = 64
#: Values of JSON, of whatever kind, keys among them: each costs as much as twenty bytes of text.
VALUES = 2**20
#: Members of a zip archive.
MEMBERS = 65_535

#: Code in safetensors -> dtype, in the order in which the library lays tensors out.
DTYPES = {
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "BF16": BFLOAT16,
    "F16": np.dtype("<f2"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}
#: Class in a pickle of torch -> dtype. torch.save writes its younger dtypes in a way that we do not read.
STORAGES = {
    "torch DoubleStorage": DTYPES["F64"],
    "torch FloatStorage": DTYPES["F32"],
    "torch HalfStorage": DTYPES["F16"],
    "torch BFloat16Storage": DTYPES["BF16"],
    "torch LongStorage": DTYPES["I64"],
    "torch IntStorage": DTYPES["I32"],
    "torch ShortStorage": DTYPES["I16"],
    "torch CharStorage": DTYPES["I8"],
    "torch ByteStorage": DTYPES["U8"],
    "torch BoolStorage": DTYPES["BOOL"],
}
_AGAIN = "get the file again from where it came from; if it is meant to be so, save it anew with its own toolkit"

_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother = 3, 80, 80


def refusal(found: str, expected: str, remedy: str = _AGAIN) -> CheckpointError:
    """The error for a file that is not as it should be, most often because it was damaged on its way."""
    return CheckpointError(found, expected, remedy)


def short(value: object) -> str:
    """A foreign value for a message: escaped, short, and cheap (nested tuples of 1 KB can print as gigabytes)."""
    text = _REPR.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# --- names and JSON ---------------------------------------------------------------------------------------------------


def is_safe_name(name: str) -> bool:
    """Whether a name from a file may be shown on a terminal and used as a relative path."""
    return name.isprintable() and not name.startswith("/") and ".." not in re.split(r"[/\\]", name)


def parse_json(content: bytes, what: str) -> dict[str, Any]:
    """The object in `content`, read strictly: no duplicate key, no NaN or infinity, nothing too large or too deep.

    Args:
        what: what to call it in an error.

    Raises:
        CheckpointError: `content` is not a JSON object, is too large, or repeats a key.
    """
    if len(content) > LIMIT:
        raise refusal(f"{what}: {len(content)} bytes of JSON", f"at most {LIMIT}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            ((name, count),) = Counter(name for name, _ in pairs).most_common(1)
            raise refusal(f"{what}: the key {short(name)} stands there {count} times", "every key once")
        return result

    def finite(text: str) -> float:
        number = float(text)
        if not math.isfinite(number):
            raise refusal(f"{what}: the number {short(text)}", "JSON, which has no NaN and no infinity")
        return number

    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=unique, parse_float=finite, parse_constant=finite)
    except RecursionError as error:
        raise refusal(f"{what}: JSON nested too deeply to read", f"at most {DEPTH} levels") from error
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, a number of more than 4,300 digits
        raise refusal(f"{what}: not readable as JSON: {error}", "a JSON object in UTF-8") from error
    return _object(value, what, "JSON")


def parse_yaml(content: bytes, what: str) -> dict[str, Any]:
    """The mapping in `content`, of plain values: no object of Python's, no alias (a few can stand for gigabytes).

    Raises:
        CheckpointError: `content` is no YAML mapping, or has more in it.
    """
    import yaml

    most = LIMIT // 64  # a token of one character costs as much as twenty of JSON
    if len(content) > most:
        raise refusal(f"{what}: {len(content)} bytes of YAML", f"at most {most}")
    depth = 0
    try:
        for event in yaml.parse(content, yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise refusal(f"{what}: YAML with an alias", "every value where it belongs")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEPTH:  # before yaml itself goes down there, step by step
                raise refusal(f"{what}: YAML nested too deeply", f"at most {DEPTH} levels")
        value = yaml.safe_load(content)
    except (yaml.YAMLError, ValueError) as error:
        raise refusal(f"{what}: not readable as YAML: {str(error)[:200]}", "a YAML mapping in UTF-8") from error
    return _object(value, what, "YAML")


def _object(value: Any, what: str, language: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise refusal(f"{what}: {language} of type {type(value).__name__}", f"a {language} object")
    level: list[Any] = [value]
    count = 0
    for _ in range(DEPTH):
        level = [child for node in level for child in _children(node, what)]
        if not level:
            return value
        count += len(level)
        if count > VALUES:
            raise refusal(f"{what}: {language} of more than {VALUES} values", f"at most {VALUES}")
    raise refusal(f"{what}: {language} nested too deeply", f"at most {DEPTH} levels")


def _children(node: Any, what: str) -> Iterator[Any]:
    if isinstance(node, dict):
        yield from node
        yield from node.values()
    elif isinstance(node, list):
        yield from node
    elif isinstance(node, str):
        try:
            node.encode("utf-8")
        except UnicodeEncodeError as error:
            raise refusal(
                f"{what}: half a surrogate pair in {short(node)}", "text that can be written as UTF-8"
            ) from error


# --- tensors ----------------------------------------------------------------------------------------------------------


def checked_bytes(what: str, dtype: np.dtype[Any], shape: Sequence[int], available: int) -> int:
    """The size in bytes of such a tensor, if the file can hold it.

    A dimension of 0 makes a tensor of any other dimensions empty; it is counted as 1, so that (0, 2**62) is refused.
    """
    if len(shape) > 32:
        raise refusal(f"{what}: {len(shape)} dimensions", "at most 32")
    if math.prod(max(size, 1) for size in shape) * dtype.itemsize > available:
        raise refusal(
            f"{what}: shape {short(tuple(shape))} of {dtype.name}, where there are {available} bytes",
            "a file that holds what it describes",
        )
    return math.prod(shape) * dtype.itemsize


def checked_values(what: str, array: Array) -> Array:
    """The array, read-only (it may be a window on a file's bytes), if its values are numbers that one can use."""
    if array.dtype == np.bool_:
        wrong = int(np.count_nonzero(array.view(np.uint8) > 1))
        if wrong:
            raise refusal(f"{what}: {wrong} of {array.size} truth values are neither 0 nor 1", "a byte of 0 or 1 each")
    else:
        wrong = not_finite(array)
        if wrong:
            raise refusal(
                f"{what}: {wrong} of {array.size} values are not finite",
                "finite numbers",
                "the training that made this file has diverged: take an earlier checkpoint",
            )
    return frozen(array)


def not_finite(array: Array) -> int:
    """How many of the values are NaN or infinite."""
    is_float = array.dtype == BFLOAT16 or array.dtype.kind == "f"
    return sum(one.size - int(np.count_nonzero(np.isfinite(one))) for (one,) in blocks(array)) if is_float else 0


def is_size(value: object) -> bool:
    """Whether the value is a whole number from 0, of 63 bits at most (True and False are not)."""
    return type(value) is int and 0 <= value < 2**63
