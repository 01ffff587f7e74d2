"""The curves of `bench.json` as a picture: two panels for each, time above and memory below.

    python tests/benchmarks/plot.py BENCH.json PICTURE.svg [WORD ...]

    .envs/bench/bin/python tests/benchmarks/plot.py build/bench/bench.json tests/benchmarks/growth.svg \\
        "step, 2 rows" "real tokens" drawn "file to"

It needs matplotlib and nothing else. The second command draws the committed picture. Words choose the curves whose
titles or axes have one of them. The picture has no background and neither black nor white, so that it can be read in
the dark, too.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

import matplotlib
from curve import Curve
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture
from matplotlib.ticker import NullLocator
from side_by_side import Figure
from table import head

#: Grey that stands out from black as from white.
INK = "#7d8590"
OWN, PEER = "#2f81f7", "#d9822b"
ACROSS = 4
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "softbridge",  # the same names for the same numbers
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8,
    "axes.titlesize": 8,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.alpha": 0.25,
    **dict.fromkeys(
        (
            "text.color",
            "axes.labelcolor",
            "axes.edgecolor",
            "axes.titlecolor",
            "xtick.color",
            "ytick.color",
            "grid.color",
        ),
        INK,
    ),
}
UNITS: dict[Figure, tuple[str, float]] = {"seconds": ("time, ms", 1e-3), "memory": ("peak memory, MiB", 2.0**20)}


def draw(axes: Axes, curve: Curve, figure: Figure) -> None:
    """One panel."""
    size = UNITS[figure][1]
    own = curve.ways[0]
    for way in curve.ways:
        values = [value / size for value in curve.values(way, figure)]
        name = "softbridge" if way == own else way
        axes.plot(
            curve.at,
            values,
            color=OWN if way == own else PEER if way == "peft" else INK,
            label=f"{name} {curve.slope(way, figure):.2f}",
            zorder=3 if way == own else 2,
        )
    awaited = curve.awaited(figure)
    last = curve.values(own, figure)[-1] / size
    line = [last * (at / curve.at[-1]) ** awaited for at in curve.at]
    axes.plot(curve.at, line, ":", color=OWN, label=f"expected {awaited:.2f}", zorder=0)
    axes.set(xscale="log", yscale="log")
    low, high = axes.get_ylim()
    span = max(high / low, 20)  # what does not grow shall look so
    axes.set_ylim(low / 1.3, low * span**1.6)  # the legend stands above the lines
    axes.set_xticks([curve.at[0], curve.at[len(curve.at) // 2], curve.at[-1]])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.legend(handlelength=1.4, loc="upper left")


def picture(curves: Sequence[Curve], caption: str) -> Picture:
    """Two panels for each curve, and four curves side by side."""
    lines = -(-len(curves) // ACROSS)
    across = min(len(curves), ACROSS)
    whole = Picture(figsize=(2.4 * across, 4.6 * lines + 0.3), layout="constrained")
    panels = whole.subplots(2 * lines, across, squeeze=False)
    for number in range(lines * across):
        line, column = divmod(number, across)
        upper, lower = panels[2 * line][column], panels[2 * line + 1][column]
        if number >= len(curves):
            upper.remove()
            lower.remove()
            continue
        curve = curves[number]
        for axes, figure in ((upper, "seconds"), (lower, "memory")):
            draw(axes, curve, figure)
            axes.set_ylabel("" if column else UNITS[figure][0])
        upper.set_title(fill(curve.title, 30))
        upper.tick_params(labelbottom=False)
        lower.set_xlabel(curve.axis)
    whole.supxlabel(caption, fontsize=6)
    return whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("words", nargs="*")
    given = parser.parse_args()
    results = json.loads(given.results.read_text())
    curves = [Curve.of(one["curve"]) for script in results["scripts"] for one in script["kept"] if "curve" in one]
    curves = [
        one for one in curves if not given.words or any(word in f"{one.title}: {one.axis}" for word in given.words)
    ]
    if not curves:
        print(f"{given.results} has no such curve: nothing is drawn")
        return
    matplotlib.rcParams.update(STYLE)
    picture(curves, head(results).replace("- ", "")).savefig(given.picture, transparent=True)


if __name__ == "__main__":
    main()
