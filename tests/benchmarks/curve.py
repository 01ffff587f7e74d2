"""How a figure grows: the points of a curve, the slope that is expected of it, and the one that it has.

The slope is that of the logarithms, by least squares, over the upper half of the curve. So 1 says that twice as much
costs twice as much, and 0 that it costs nothing. Below the upper half stands what does not grow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log
from statistics import linear_regression
from typing import Any

from side_by_side import Figure, Row


@dataclass(frozen=True)
class Curve:
    """A figure against a size.

    Attributes:
        title: what was done.
        axis: what grows, with its unit.
        at: the sizes, ascending; at least four.
        rows: what was measured at each. All have the same ways.
        expected: of each figure that was measured, the slope that it should have, or the name of the way whose slope.
    """

    title: str
    axis: str
    at: Sequence[float]
    rows: Sequence[Row]
    expected: Mapping[Figure, float | str]

    @classmethod
    def of(cls, kept: Mapping[str, Any]) -> Curve:
        """From JSON."""
        return cls(**{**kept, "rows": [Row(**row) for row in kept["rows"]]})

    @property
    def ways(self) -> tuple[str, ...]:
        """Softbridge first."""
        return tuple(self.rows[0].seconds)

    def values(self, way: str, figure: Figure) -> list[float]:
        return [row.median(way, figure) for row in self.rows]

    def slope(self, way: str, figure: Figure) -> float:
        upper = len(self.at) // 2
        pairs = zip(self.at[upper:], self.values(way, figure)[upper:], strict=True)
        found: float = linear_regression(*zip(*((log(x), log(y)) for x, y in pairs), strict=True)).slope
        return found

    def awaited(self, figure: Figure) -> float:
        """The slope that softbridge should have."""
        named = self.expected[figure]
        return self.slope(named, figure) if isinstance(named, str) else named


HEADINGS = ("what grows", "from", "to", "figure", "expected", "slope of softbridge", "beside it")


def lines(curve: Curve) -> list[tuple[str, ...]]:
    """What stands under the `HEADINGS`, for each figure."""
    own, *others = curve.ways
    return [
        (
            f"{curve.title}: {curve.axis}",
            f"{curve.at[0]:g}",
            f"{curve.at[-1]:g}",
            "time" if figure == "seconds" else "memory",
            f"{curve.awaited(figure):.2f}" + (f" ({named})" if isinstance(named, str) else ""),
            f"{curve.slope(own, figure):.2f}",
            ", ".join(f"{way} {curve.slope(way, figure):.2f}" for way in others),
        )
        for figure, named in curve.expected.items()
    ]
