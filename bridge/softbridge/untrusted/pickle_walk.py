"""A walk over a pickle's program as data: nothing is looked up, nothing is called.

torch's restricted unpickler runs no foreign code, but it believes sizes: bytearray(2**36), a storage of the old format
with a made-up length, a view of zero strides. So no unpickler sees a foreign program at all. What plain tensors need is
understood here; any other call is a `Foreign`, which says what would have been called and does nothing.
"""

from __future__ import annotations

import io
import pickletools
import re
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

import numpy as np

from softbridge.untrusted.claims import LIMIT, STORAGES, is_size, refusal, short


@dataclass(frozen=True)
class Global:
    """A name that a pickle refers to. Nothing is looked up."""

    name: str


@dataclass(eq=False, repr=False)
class Foreign:
    """What a pickle makes by a call that plain tensors do not need. It was not made.

    Attributes:
        name: of the function or class, as ``module name``.
        arguments: that it would have been called with.
        state: what would have been set on the object, or None.
    """

    name: str
    arguments: Any = ()
    state: Any = None

    def __repr__(self) -> str:
        return f"<{self.name.replace(' ', '.')}>"


@dataclass(frozen=True)
class Storage:
    """Numbers in a row, as a pickle claims them.

    Attributes:
        key: under which the file has them.
        home: the nested file that has them; None: the file itself.
    """

    key: str
    dtype: np.dtype[Any]
    count: int
    home: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True)
class View:
    """A tensor as a pickle claims it: a window on a storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class Program:
    """What a pickle's program would make, and everything that it makes on the way, whether it is kept or dropped."""

    result: Any
    storages: Mapping[str, Storage]
    views: Set[View]


#: Steps of a program. The longest that was seen in a real prompt checkpoint has 30,000.
OPERATIONS = 2**20
#: Bits of a whole number in a pickle: the states of random generators have 128.
_BITS = 256

#: Loads the storage that bytes of the old format hold; the bytes -> that storage. A pickle that torch.save did not make
#: (a tensor given to pickle.dumps) has its numbers so.
Nested = Callable[[bytes], Storage]

_MARK = Global("mark")
_REBUILD = ("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor")
_PARAMETER = "torch._utils _rebuild_parameter"
_NESTED = "torch.storage _load_from_bytes"
_ORDERED = "collections OrderedDict"
_ENCODED = "_codecs encode"
#: What torch.save needs for plain tensors, beside what has a case of its own below.
_VALUES = frozenset(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"))
#: What other pickles have besides.
_MORE_VALUES = frozenset(("SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "LONG4"))
_MORE = _MORE_VALUES | {
    *(
        "FRAME",
        "MEMOIZE",
        "STACK_GLOBAL",
        "NEWOBJ",
        "NEWOBJ_EX",
        "EMPTY_SET",
        "ADDITEMS",
        "FROZENSET",
        "POP",
        "POP_MARK",
    ),
}


def walk(stream: BinaryIO, what: str, nested: Nested | None = None, *, plain: bool = False) -> Program:
    """What the program that begins here would make.

    Args:
        what: what to call it in an error.
        nested: see `Nested`; None: there are none.
        plain: refuse what torch.save does not need for plain tensors.

    Raises:
        CheckpointError: a call, with `plain`.
        ValueError, and what a walk over hostile bytes else ends in: KeyError, IndexError, ...
    """
    start = stream.tell()
    program = io.BytesIO(stream.read(LIMIT + 1))  # whatever its steps claim, there is no more
    room = LIMIT  # for what calls make out of what is there already
    loaded: dict[bytes, Storage] = {}
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    storages: dict[str, Storage] = {}
    views: set[View] = set()

    def pop_to_mark() -> list[Any]:
        items: list[Any] = []
        while (item := stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def set_items(target: Any, items: list[Any]) -> None:
        if len(items) % 2 or not isinstance(target, (dict, Foreign)):
            raise ValueError("items set on something that is no dictionary of names")
        for name, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(target, dict):
                continue  # an object with a dictionary's interface: what it would hold is not known
            # Longer numbers can be chosen to have one hash, and each would be compared with all.
            if isinstance(name, str) or (isinstance(name, int) and abs(name) < 2**63):
                target[name] = value
            elif plain:
                raise ValueError("items set on something that is no dictionary of names")

    def reduced(function: Any, arguments: Any) -> Any:
        """What a call makes, if plain tensors need it."""
        nonlocal room
        name = function.name
        if name in _REBUILD and len(arguments) <= 8:
            storage, offset, shape, stride, *rest = arguments
            sizes = len(shape) == len(stride) <= 64 and all(map(is_size, (offset, *shape, *stride)))
            if (
                not isinstance(storage, Storage) or not sizes or any(rest[2:])
            ):  # rest: gradient, hooks, conjugate's bits
                raise ValueError(f"a tensor described as {short(arguments)}")
            view = View(storage, offset, tuple(shape), tuple(stride))
            views.add(view)
            return view
        if name == _PARAMETER and isinstance(arguments[0], View):
            return arguments[0]
        if name == _ORDERED and arguments in ((), ([],)):
            return {}
        if name == _NESTED and nested is not None and len(arguments) == 1 and isinstance(arguments[0], bytes):
            if arguments[0] not in loaded:
                loaded[arguments[0]] = nested(arguments[0])
            return loaded[arguments[0]]
        if name == _ENCODED and not plain and arguments[1:] == ("latin1",) and isinstance(arguments[0], str):
            room -= len(arguments[0])
            if room < 0:
                raise ValueError(f"more than {LIMIT} bytes made out of texts")
            return arguments[0].encode("latin1")  # bytes, as protocol 2 writes them
        if plain:
            raise refusal(
                f"{what}: the pickle calls {short(name.replace(' ', '.'))}",
                "a pickle of plain, dense tensors",
                "load it with its own toolkit, if you trust its author, and save the prompt's tensors alone, as "
                ".safetensors",
            )
        return Foreign(name, arguments)

    for count, (opcode, argument, position) in enumerate(pickletools.genops(program)):
        if (position or 0) > LIMIT or count > OPERATIONS:
            raise ValueError(f"a program of more than {LIMIT} bytes or {OPERATIONS} steps")
        name = opcode.name
        if isinstance(argument, int) and argument.bit_length() > _BITS:
            raise ValueError(f"a number of {argument.bit_length()} bits")
        if plain and name in _MORE:
            raise ValueError(f"the opcode {name}, which torch.save does not need for plain tensors")
        if name in _VALUES or name in _MORE_VALUES:
            stack.append(argument)
            continue
        match name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                (result,) = stack
                stream.seek(start + program.tell())
                return Program(result, storages, views)
            case "MARK":
                stack.append(_MARK)
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(name == "NEWTRUE")
            case "GLOBAL":
                stack.append(Global(str(argument)))
            case "STACK_GLOBAL":
                module, attribute = stack.pop(-2), stack.pop()
                if not isinstance(module, str) or not isinstance(attribute, str):
                    raise ValueError("a name that is no text")
                stack.append(Global(f"{module[:100]} {attribute[:100]}"))
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE":
                stack.append(tuple(pop_to_mark()))
            case "FROZENSET":
                stack.append(pop_to_mark())
            case "POP":
                stack.pop()
            case "POP_MARK":
                pop_to_mark()
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                length = int(name[-1])
                if len(stack) < length:
                    raise ValueError("the stack is empty")
                stack[-length:] = [tuple(stack[-length:])]
            case "BINPUT" | "LONG_BINPUT":
                memo[cast("int", argument)] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[cast("int", argument)])
            case "APPEND" | "APPENDS" | "ADDITEMS":
                items = [stack.pop()] if name == "APPEND" else pop_to_mark()
                if isinstance(stack[-1], list):
                    stack[-1].extend(items)
                elif not isinstance(stack[-1], Foreign):
                    raise ValueError("items appended to something that is no list")
            case "SETITEM" | "SETITEMS":
                items = pop_to_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
                set_items(stack[-1], items)
            case "BUILD":  # torch's state dictionaries carry attributes, such as _metadata; they say nothing to us
                state = stack.pop()
                if isinstance(stack[-1], Foreign):
                    stack[-1].state = state
                elif not isinstance(stack[-1], dict):
                    raise ValueError(f"attributes set on a {type(stack[-1]).__name__}")
            case "BINPERSID":
                identity = stack.pop()
                if not plain and isinstance(identity, tuple) and len(identity) == 4 and identity[0] == "module":
                    stack.append(identity[1])  # a class, beside its source text
                    continue
                storage = _storage(identity)
                if storages.setdefault(storage.key, storage) != storage:
                    raise ValueError(f"two descriptions of storage {storage.key}")
                stack.append(storage)
            case "REDUCE" | "NEWOBJ":
                arguments = stack.pop()
                stack.append(reduced(stack.pop(), arguments))
            case "NEWOBJ_EX":
                named, arguments = stack.pop(), stack.pop()
                stack.append(Foreign(stack.pop().name, (arguments, named)))
            case _:
                raise ValueError(f"the opcode {name}, which torch.save does not need for plain tensors")
    raise ValueError("no end")


def _storage(identity: Any) -> Storage:
    tag, kind, key, _, count, *view = identity
    if (
        tag != "storage"
        or kind.name not in STORAGES
        or not isinstance(key, str)
        or not re.fullmatch("[0-9]{1,20}", key)
    ):
        raise ValueError(f"a storage described as {short(identity)}")
    if not is_size(count) or any(view):
        raise ValueError(f"a storage of {short(count)} elements, or one that is part of another")
    return Storage(key, STORAGES[kind.name], count)
