"""What is being done, and how long it took, for a caller that shows it. Nothing is said where nobody listens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TypeVar

Piece = TypeVar("Piece")


@dataclass
class _Watcher:
    report: Callable[[str], None]
    timed: Callable[[str, float], None] | None
    open: list[str] = field(default_factory=list)


_watcher: ContextVar[_Watcher | None] = ContextVar("watcher", default=None)


@contextmanager
def watching(report: Callable[[str], None], timed: Callable[[str, float], None] | None = None) -> Iterator[None]:
    """Let `report` be called with a line for each stage that begins meanwhile, or that goes on after an inner one.

    Args:
        report: takes what is being done.
        timed: takes the same at its end, and the seconds that it took.
    """
    token = _watcher.set(_Watcher(report, timed))
    try:
        yield
    finally:
        _watcher.reset(token)


@contextmanager
def stage(what: str) -> Iterator[None]:
    """Tell whoever watches that this is being done while the block runs. Stages may lie in each other."""
    watcher = _watcher.get()
    if watcher is None:
        yield
        return
    start = time.monotonic()
    watcher.open.append(what)
    watcher.report(what)
    try:
        yield
    finally:
        watcher.open.pop()
        if watcher.timed is not None:
            watcher.timed(what, time.monotonic() - start)
        if watcher.open:
            watcher.report(watcher.open[-1])


def announced(pieces: Sequence[Piece], what: str) -> Iterator[Piece]:
    """The pieces, one after the other, each as a stage. From the second on it is said how long the rest takes."""
    start = time.monotonic()
    for done, piece in enumerate(pieces):
        left = (time.monotonic() - start) / done * (len(pieces) - done) if done else None
        rest = "" if left is None else f", about {left:.0f} s left"
        with stage(f"verifying: model {done + 1} of {len(pieces)} ({what}){rest}"):
            yield piece
