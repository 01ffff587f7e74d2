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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Float32 in another order of summation.
CLOSE = 1e-3

Ways = Mapping[str, Callable[[], Any]]


@dataclass(frozen=True)
class Measured:
    """One row of the table.

    Attributes:
        title: what was done.
        seconds: of each turn, by the name of the way; the first is softbridge.
        limits: which of the ways are no peer, but what no way can be faster than.
    """

    title: str
    seconds: Mapping[str, tuple[float, ...]]
    limits: tuple[str, ...]

    @property
    def own(self) -> str:
        """The name of softbridge's way."""
        return next(iter(self.seconds))

    def median(self, way: str) -> float:
        return statistics.median(self.seconds[way])

    def ratio(self, way: str) -> float:
        """How many times as long as this way softbridge takes, by the medians."""
        return self.median(self.own) / self.median(way)

    def spread(self, way: str) -> tuple[float, float]:
        """The first and third quartile of the same ratio, turn by turn."""
        turns = [ours / theirs for ours, theirs in zip(self.seconds[self.own], self.seconds[way], strict=True)]
        first, _, third = statistics.quantiles(turns, n=4)
        return first, third


def measure(title: str, ways: Ways, rounds: int, limits: tuple[str, ...] = ()) -> Measured:
    """Run the ways in turns; the first turn does not count."""
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            gc.collect()
            start = time.process_time()
            way()
            if turn:
                spent[name].append(time.process_time() - start)
    measured = Measured(title, {name: tuple(seconds) for name, seconds in spent.items()}, limits)
    print(line(measured), flush=True)
    return measured


def line(measured: Measured) -> str:
    """A row in words: every way, and how many times as long as it softbridge takes."""
    found = [f"{measured.title}: {measured.own} {measured.median(measured.own) * 1e3:.1f} ms"]
    for way in measured.seconds:
        if way != measured.own:
            first, third = measured.spread(way)
            found.append(
                f"{way} {measured.median(way) * 1e3:.1f} ms ({measured.ratio(way):.2f}, {first:.2f} to {third:.2f})"
            )
    return ", ".join(found)


def check(ways: Ways, what: Callable[[Any], Tensor] = lambda found: found) -> None:
    """Assert that all ways give the same."""
    with torch.no_grad():
        found = {name: what(way()) for name, way in ways.items()}
    first = next(iter(found.values()))
    for name, other in found.items():
        apart = float((other.double() - first.double()).abs().max()) / float(first.double().abs().max())
        assert apart <= CLOSE, f"{name}: {apart:.1e} of the largest number apart"
