"""A cache that holds virtual tokens, seen by the model as if it held real ones alone."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from softbridge.errors import EngineError

#: Of a cache: whether the stack that filled it is running, and counts all that it holds; and by whom it was begun.
_RUNNING, _BEGUN = "_softbridge_running", "_softbridge_begun"

#: And how many tokens it has read.
READ = "_softbridge_read"


def hide(cache: Any, length: int, owner: str) -> None:
    """Let a cache that holds so many virtual tokens count, and be cropped to, real ones; but not while its stack runs.

    What `generate` knows are real tokens: assisted decoding compares their number with the cache's, and crops.
    """
    if cache is not None:
        running(cache, hides(cache) and vars(cache)[_RUNNING])
        vars(cache)[_BEGUN] = owner
        if hasattr(cache, "get_seq_length"):
            cache.get_seq_length = partial(_real_length, cache, length)
        if hasattr(cache, "crop"):
            cache.crop = partial(_crop, cache, length)


def running(cache: Any, now: bool) -> None:
    """Say whether the stack runs; see `hide`."""
    vars(cache)[_RUNNING] = now


def check_begun(cache: Any, owner: str, past: int) -> None:
    """Refuse a cache that holds tokens without this prompt: the tokens behind would not see it.

    Raises:
        EngineError: the cache was not begun by a call with the prompt of this owner.
    """
    if past and vars(cache).get(_BEGUN) != owner:
        raise EngineError(
            f"a cache of {past} tokens that no call with this prompt began",
            "a cache that the model filled with this prompt attached, or an empty one",
            "begin the cache with this model, from the first token on",
        )


def begin(cache: Any, owner: str, past: int) -> None:
    """Say who begins a cache, where it is no matter how many tokens it holds; see `check_begun`."""
    if cache is not None:
        check_begun(cache, owner, past)
        vars(cache)[_BEGUN] = owner


def check_foreign(cache: Any, past: int) -> None:
    """Refuse a cache that holds a prompt, where the model runs without any.

    Raises:
        EngineError: a call with a prompt began the cache.
    """
    if past and _BEGUN in vars(cache):
        raise EngineError(
            f"a cache of {past} tokens that a call with a prompt began, and the prompt is switched off",
            "a cache that the model filled without a prompt, or an empty one",
            "begin a new cache where the prompt is off",
        )


def hides(cache: Any) -> bool:
    """Whether a cache was made to hide virtual tokens."""
    return cache is not None and _RUNNING in vars(cache)


def full_length(cache: Any) -> int:
    """How many tokens a cache holds, virtual ones included; or has read, where it keeps states of them only."""
    if cache is None or _blank(cache):
        return 0
    try:
        return int(type(cache).get_seq_length(cache))
    except (AttributeError, ValueError):  # states alone do not say
        return int(vars(cache).get(READ, 0))


def _blank(cache: Any) -> bool:
    """Whether a cache of a model's own kind, which may count what it has no keys of (Jamba's), has no number yet."""
    keys = vars(cache).get("key_cache")
    return isinstance(keys, list) and all(isinstance(each, Tensor) and each.numel() == 0 for each in keys)


def _real_length(cache: Any, virtual: int, *args: Any, **kwargs: Any) -> int:
    full = 0 if _blank(cache) else int(type(cache).get_seq_length(cache, *args, **kwargs))
    return full if vars(cache)[_RUNNING] else max(full - virtual, 0)


def _crop(cache: Any, virtual: int, length: int) -> None:
    """A number of tokens to keep counts real ones; a negative number is of those to drop."""
    type(cache).crop(cache, length + virtual if length > 0 else length)
