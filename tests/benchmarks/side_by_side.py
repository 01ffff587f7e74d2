"""Several ways to do one thing, measured side by side: what every benchmark here prints, and how it comes by it.

The ways run in turns, A B C A B C, so that a busy machine slows all of them alike. The figure is processor time, of
this process and of all its threads, and its median; only ratios of one row mean something. The spread is that of the
ratio over the turns, from the first to the third quartile. That all ways give the same result is asserted before any
of them is timed.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: Float32 in another order of summation.
CLOSE = 1e-3

Ways = Mapping[str, Callable[[], Any]]


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        title: what was done.
        seconds: of each turn, by the name of the way; the first is softbridge.
        limit: the name of the way that no other can be faster than, or None.
    """

    title: str
    seconds: Mapping[str, Sequence[float]]
    limit: str | None = None

    @property
    def own(self) -> str:
        return next(iter(self.seconds))

    @property
    def peer(self) -> str | None:
        """The fastest way that is neither ours nor the limit."""
        others = [way for way in self.seconds if way not in (self.own, self.limit)]
        return min(others, key=self.median, default=None)

    def median(self, way: str) -> float:
        return statistics.median(self.seconds[way])

    def against(self, way: str | None) -> str:
        """What softbridge takes for each second of this way: by the medians, and the quartiles turn by turn."""
        if way is None:
            return ""
        turns = [ours / theirs for ours, theirs in zip(self.seconds[self.own], self.seconds[way], strict=True)]
        first, _, third = statistics.quantiles(turns, n=4)
        ratio = self.median(self.own) / self.median(way)
        return f"{ratio:.2f} ({first:.2f} to {third:.2f})"

    def timed(self, way: str | None) -> str:
        return "" if way is None else f"{way} {self.median(way) * 1e3:.1f} ms"


def measure(title: str, ways: Ways, rounds: int, limit: str | None = None) -> Row:
    """Run the ways in turns, and print the row. The first turn does not count.

    A way that returns a number has timed itself.
    """
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            gc.collect()
            start = time.process_time()
            found = way()
            seconds = found if isinstance(found, float) else time.process_time() - start
            if turn:
                spent[name].append(seconds)
    row = Row(title, spent, limit)
    print(line(row), flush=True)
    return row


HEADINGS = ("row", "softbridge", "best peer", "to the peer", "limit", "to the limit")


def heading() -> str:
    return f"| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}"


def line(row: Row) -> str:
    """The row of a Markdown table."""
    cells = (
        row.title,
        f"{row.median(row.own) * 1e3:.1f} ms",
        row.timed(row.peer),
        row.against(row.peer),
        row.timed(row.limit),
        row.against(row.limit),
    )
    return f"| {' | '.join(cells)} |"


def check(ways: Ways, what: Callable[[Any], Any] = lambda found: found) -> None:
    """Assert that all ways give the same numbers, as tensors."""
    found = {name: what(way()).detach().double() for name, way in ways.items()}
    first = next(iter(found.values()))
    for name, other in found.items():
        apart = float((other - first).abs().max()) / float(first.abs().max())
        assert apart <= CLOSE, f"{name}: {apart:.1e} of the largest number apart"
