"""Progress lines of a verification, for a caller that shows them: a large model is run in many pieces."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

Piece = TypeVar("Piece")

_watcher: ContextVar[Callable[[str], None] | None] = ContextVar("watcher", default=None)


@contextmanager
def watching(report: Callable[[str], None]) -> Iterator[None]:
    """Let `report` be called with a line for each step of what is verified meanwhile."""
    token = _watcher.set(report)
    try:
        yield
    finally:
        _watcher.reset(token)


def announced(pieces: Sequence[Piece], what: str) -> Iterator[Piece]:
    """The pieces, one after the other, with what is to come said first and, from the second on, how long it takes."""
    report, start = _watcher.get(), time.monotonic()
    for done, piece in enumerate(pieces):
        if report is not None:
            left = (time.monotonic() - start) / done * (len(pieces) - done) if done else None
            rest = "" if left is None else f", about {left:.0f} s left"
            report(f"verifying: model {done + 1} of {len(pieces)} ({what}){rest}")
        yield piece
