"""Several ways to do one thing, measured side by side: what every benchmark here prints, and how it comes by it.

The ways run in turns, A B C A B C, so that a busy machine slows all of them alike. The figure is processor time, of
this process and of all its threads, and its median; only ratios of one row mean something. The spread is that of the
ratio over the turns, from the first to the third quartile. That all ways give the same result is asserted before any
of them is timed.

Memory, where it is measured, is the peak of what torch allocates beyond what it had when the way began. torch's
profiler counts every allocation, so that the figure is exact and is the same on a busy machine. What Python, NumPy and
the libraries below torch allocate is not in it.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any, Literal

#: Float32 in another order of summation.
CLOSE = 1e-3
#: The environment variable with the file to which `keep` adds.
KEPT = "SOFTBRIDGE_BENCH_KEPT"
#: What can change a figure.
DISTRIBUTIONS = ("torch", "transformers", "peft", "adapters", "safetensors", "numpy")

Ways = Mapping[str, Callable[[], Any]]
Figure = Literal["seconds", "memory"]


@dataclass(frozen=True)
class Row:
    """One row of the table, or one point of a curve.

    Attributes:
        title: what was done.
        seconds: of each turn, by the name of the way; the first is softbridge.
        limit: the name of the way that no other can be faster than, or None. One that does more, as an engine has to,
            may stand beside it: its name begins with that of the limit.
        memory: bytes at the peak, likewise; empty if they were not measured.
    """

    title: str
    seconds: Mapping[str, Sequence[float]]
    limit: str | None = None
    memory: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @property
    def own(self) -> str:
        return next(iter(self.seconds))

    @property
    def limits(self) -> list[str]:
        """The limit, and what stands beside it."""
        return [way for way in self.seconds if self.limit is not None and way.startswith(self.limit)]

    @property
    def peers(self) -> list[str]:
        """The ways that are neither ours nor limits, the fastest first."""
        return sorted((way for way in self.seconds if way not in (self.own, *self.limits)), key=self.median)

    @property
    def peer(self) -> str | None:
        return self.peers[0] if self.peers else None

    def median(self, way: str, figure: Figure = "seconds") -> float:
        return statistics.median(getattr(self, figure)[way])

    def ratio(self, way: str, figure: Figure = "seconds") -> float:
        """What softbridge takes for each second, or byte, of this way, by the medians."""
        return self.median(self.own, figure) / self.median(way, figure)

    def quartiles(self, way: str) -> tuple[float, float]:
        """The first and the third quartile of the ratio, turn by turn."""
        turns = [ours / theirs for ours, theirs in zip(self.seconds[self.own], self.seconds[way], strict=True)]
        first, _, third = statistics.quantiles(turns, n=4) if len(turns) > 1 else turns * 3
        return first, third

    def against(self, *ways: str) -> str:
        spread = ((self.ratio(way), *self.quartiles(way)) for way in ways)
        return ", ".join(f"{ratio:.2f} ({first:.2f} to {third:.2f})" for ratio, first, third in spread)

    def timed(self, *ways: str) -> str:
        return ", ".join(f"{way} {self.median(way) * 1e3:.1f} ms" for way in ways)

    def remembered(self) -> str:
        """The peak of memory, and its ratios to the peer's and to the limit's."""
        if not self.memory:
            return ""
        others = [way for way in (self.peer, self.limit) if way in self.memory]
        ratios = (f"{self.ratio(way, 'memory'):.2f} of {way}" for way in others if way)
        return "; ".join([f"{self.median(self.own, 'memory') / 2**20:.1f} MiB", *ratios])


def measured(title: str, ways: Ways, rounds: int, limit: str | None = None, memory: bool = False) -> Row:
    """Run the ways in turns. The first turn does not count.

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
    return Row(title, spent, limit, {name: [peak(way)] for name, way in ways.items()} if memory else {})


def measure(title: str, ways: Ways, rounds: int, limit: str | None = None, memory: bool = False) -> Row:
    """Run the ways in turns, as `measured` does, and report the row."""
    row = measured(title, ways, rounds, limit, memory)
    report(row)
    return row


def peak(way: Callable[[], Any]) -> int:
    """Bytes that torch holds at the most while this runs, beyond what it had before; that counts as staying."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # below, the profiler says that it starts and stops
    from torch.profiler import ProfilerActivity, profile

    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        way()
    waiting = list(profiler.profiler.kineto_results.experimental_event_tree())
    changes = []
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.name == "[memory]":
            changes.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    # What is freed counts only if it was allocated here: of the rest, the profiler knows some and not all.
    sizes: dict[int, int] = {}
    held = most = 0
    for _, place, size in sorted(changes, key=lambda change: change[0]):
        if size > 0:
            sizes[place] = size
            held += size
        else:
            held -= sizes.pop(place, 0)
        most = max(most, held)
    return most


HEADINGS = ("row", "softbridge", "peers, the fastest first", "to the first", "limit", "to the limit", "memory")


def heading() -> str:
    return table_heading(HEADINGS)


def table_heading(names: Sequence[str]) -> str:
    return f"{table_line(names)}\n|{'---|' * len(names)}"


def table_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def cells(row: Row) -> tuple[str, ...]:
    """What stands under each of the `HEADINGS`."""
    return (
        row.title,
        f"{row.median(row.own) * 1e3:.1f} ms",
        row.timed(*row.peers),
        row.against(*row.peers[:1]),
        row.timed(*row.limits),
        row.against(*row.limits),
        row.remembered(),
    )


def line(row: Row) -> str:
    """The row of a Markdown table."""
    return table_line(cells(row))


def report(row: Row) -> None:
    """Print a row, and keep it for `table.py`, if that has asked."""
    print(line(row), flush=True)
    keep(row=asdict(row))


def keep(**what: Any) -> None:
    """Add this to the file that `KEPT` names, if it names one, as a line of JSON, with the versions of what ran."""
    path = os.environ.get(KEPT)
    if path:
        with open(path, "a") as file:
            file.write(json.dumps({"versions": versions(), **what}) + "\n")


def versions() -> dict[str, str]:
    """Those of `DISTRIBUTIONS` that are installed here."""
    found = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def check(ways: Ways, what: Callable[[Any], Any] = lambda found: found) -> None:
    """Assert that all ways give the same numbers, as tensors."""
    found = {name: what(way()).detach().double() for name, way in ways.items()}
    first = next(iter(found.values()))
    for name, other in found.items():
        apart = float((other - first).abs().max()) / float(first.abs().max())
        assert apart <= CLOSE, f"{name}: {apart:.1e} of the largest number apart"
