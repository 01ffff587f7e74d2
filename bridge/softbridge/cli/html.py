"""What all pages have in common: one HTML file that needs nothing else, its style, its tables and its drawings.

No script, no reference to anything outside. Names come from files that nobody trusts, so that every text is shown as in
a terminal and then escaped. Colours are those of the style alone, in drawings, too, so that a page is dark where its
reader's screen is. Drawings are a few lines of SVG: a library that draws would be a dependency with colours of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np
from rich.table import Table
from rich.text import Text

from softbridge.arrays import Array
from softbridge.cli.tables import shown

_STYLE = """
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --panel: #f7f7f8; --rule: #ddd; --mark: #777;
        --one: #1f5fa8; --two: #c4660e; --good: #06623b; --bad: #a3161b }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ddd; --paper: #16181c; --panel: #1f2228; --rule: #3a3f47; --mark: #999;
          --one: #6cb0ff; --two: #f0a35a; --good: #6fd3a0; --bad: #ff8a8a } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: var(--ink); background: var(--paper) }
table { border-collapse: collapse; margin: 1rem 0 } td, th { text-align: left; padding: .2rem .8rem .2rem 0 }
th, td { border-bottom: 1px solid var(--rule); vertical-align: top } td { overflow-wrap: anywhere }
.verdict { font-size: 1.3rem; font-weight: bold } .same { color: var(--good) } .not { color: var(--bad) }
figure { margin: 1rem 0 } figcaption { font-size: .9rem; color: var(--mark) }
.pair figure { max-width: 32rem }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 0 1.5rem }
svg { width: 100%; height: auto; background: var(--panel); border-radius: 4px; font-size: 11px }
svg text { fill: var(--ink) } .rule { stroke: var(--rule) } .mark { stroke: var(--mark); stroke-dasharray: 4 3 }
.one { fill: var(--one); stroke: var(--one) } .two { fill: var(--two); stroke: var(--two) }
line.one, line.two { stroke-width: 2 } rect.one, rect.two { stroke: none }
pre { overflow-x: auto; font-size: 12px }
"""
_SERIES = ("one", "two")
_WIDTH, _HEIGHT, _LEFT, _TOP, _FOOT = 900, 300, 60, 20, 130
#: More rows or columns are drawn as means of neighbours.
_MOST_CELLS = 64

#: What a series has at a place: nothing, a number, or the least, the middle and the largest of several.
Value = float | tuple[float, float, float] | None
#: Label of a place on the axis, and the value of each series there.
Row = tuple[str, Sequence[Value]]


def document(title: str, body: Iterable[str]) -> str:
    """The page."""
    return "\n".join(
        (
            '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"/>',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\"/>",
            f"<title>{text_of(title)}</title><style>{_STYLE}</style></head><body>",
            *body,
            "</body></html>\n",
        )
    )


def text_of(text: object) -> str:
    """A text as HTML, as `shown` has it."""
    return escape(text.plain if isinstance(text, Text) else shown(text).plain)


def table_of(table: object) -> str:
    """A table, or a line of text, as the terminal shows it."""
    if not isinstance(table, Table):
        return f"<p>{text_of(table)}</p>"
    rows = zip(*(column.cells for column in table.columns), strict=True)
    head = "".join(f"<th>{text_of(column.header)}</th>" for column in table.columns)
    body = "".join(f"<tr>{''.join(f'<td>{text_of(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def figure(drawing: str, caption: str) -> str:
    """A drawing with what it shows."""
    return f"<figure>{drawing}<figcaption>{text_of(caption)}</figcaption></figure>"


def decades(values: Iterable[Value]) -> tuple[int, int]:
    """The powers of ten that a logarithmic axis for these ends at."""
    flat = [one for value in values for one in (value if isinstance(value, tuple) else (value,))]
    powers = [math.log10(one) for one in flat if one is not None and 0 < one < math.inf]
    return (math.floor(min(powers)), max(math.ceil(max(powers)), math.floor(min(powers)) + 1)) if powers else (0, 1)


def plot(
    rows: Sequence[Row],
    series: Sequence[str],
    lines: Sequence[tuple[str, float]],
    ends: tuple[int, int],
    every: int = 1,
) -> str:
    """Dots over the rows' labels, with a line from the least to the largest of several, on a logarithmic axis.

    Args:
        rows: at least one.
        series: names of at most two.
        lines: drawn across, with their names.
        ends: powers of ten. What is 0 stands below the least, what is no number or larger above.
        every: of so many powers one has a line.
    """
    step = (_WIDTH - _LEFT) / len(rows)
    bottom, parts = _TOP + _HEIGHT, []
    numbers = [one for _, values in rows for one in values if one is not None and not isinstance(one, tuple)]
    for label, value in [*_marks(ends, every), *([("0", 0.0)] if 0.0 in numbers else [])]:
        y = _height(value, ends)
        parts.append(_across(y, "rule"))
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for number, (label, value) in enumerate(lines):
        y, note = _height(value, ends), text_of(f"{label} {value:.0e}")
        parts.append(_across(y, "mark"))
        parts.append(f'<text x="{_WIDTH - 4 - 120 * number}" y="{y - 3:.1f}" text-anchor="end">{note}</text>')
    skipped = -(-len(rows) // 40)
    radius = 4 if len(rows) < 50 else 2.5
    for number, (label, values) in enumerate(rows):
        x = _LEFT + (number + 0.5) * step
        if number % skipped == 0:
            turn = f' transform="rotate(-60 {x:.1f} {bottom + 12})"' if len(label) > 3 else ""
            anchor = "end" if turn else "middle"
            parts.append(f'<text x="{x:.1f}" y="{bottom + 12}" text-anchor="{anchor}"{turn}>{text_of(label)}</text>')
        for place, (name, found) in enumerate(zip(series, values, strict=True)):
            if found is None:
                continue
            least, middle, largest = found if isinstance(found, tuple) else (found, found, found)
            x_dot = x + (place - (len(series) - 1) / 2) * min(12.0, step / 3)
            if least < largest:
                parts.append(
                    f'<line x1="{x_dot:.1f}" x2="{x_dot:.1f}" y1="{_height(least, ends):.1f}" '
                    f'y2="{_height(largest, ends):.1f}" class="{_SERIES[place]}"/>'
                )
            said = f"{middle:.2e}" + (f" ({least:.2e} to {largest:.2e})" if least < largest else "")
            parts.append(
                f'<circle cx="{x_dot:.1f}" cy="{_height(middle, ends):.1f}" r="{radius}" '
                f'class="{_SERIES[place]}"><title>{text_of(f"{label}, {name}: {said}")}</title></circle>'
            )
    for place, name in enumerate(series):
        across = _LEFT + 10 + 180 * place
        parts.append(f'<circle cx="{across}" cy="10" r="4" class="{_SERIES[place]}"/>')
        parts.append(f'<text x="{across + 8}" y="14">{text_of(name)}</text>')
    foot = _FOOT if any(len(label) > 3 for label, _ in rows) else 24
    return _drawing(_WIDTH, bottom + foot, parts)


def heatmap(values: Array, rows: Sequence[object], columns: Sequence[object], largest: float) -> str:
    """Cells [N, M], the fuller the larger; what is below zero is in the other colour.

    Args:
        rows: labels [N].
        columns: labels [M].
        largest: what is drawn full.
    """
    values, rows, columns = _thinned(values, rows, columns)
    side = min(28.0, (_WIDTH / 2 - 50) / max(len(columns), 1))
    parts = []
    for number, row in enumerate(values):
        y = 6 + number * side
        if number % -(-len(rows) // 24) == 0:
            parts.append(f'<text x="34" y="{y + side / 2 + 4:.1f}" text-anchor="end">{text_of(rows[number])}</text>')
        for place, value in enumerate(row):
            full = min(abs(float(value)) / largest, 1.0) if largest > 0 else 0.0
            said = text_of(f"{rows[number]}, {columns[place]}: {value:.3g}")
            parts.append(
                f'<rect x="{40 + place * side:.1f}" y="{y:.1f}" width="{side:.1f}" height="{side:.1f}" '
                f'class="{_SERIES[int(value < 0)]}" fill-opacity="{full:.3f}"><title>{said}</title></rect>'
            )
    bottom = 6 + len(values) * side
    for place in range(0, len(columns), -(-len(columns) // 12)):
        x = 40 + (place + 0.5) * side
        parts.append(f'<text x="{x:.1f}" y="{bottom + 14:.1f}" text-anchor="middle">{text_of(columns[place])}</text>')
    return _drawing(_WIDTH // 2, round(bottom + 22), parts)


def _thinned(
    values: Array, rows: Sequence[object], columns: Sequence[object]
) -> tuple[Array, Sequence[object], Sequence[object]]:
    for axis in (0, 1):
        every = -(-values.shape[axis] // _MOST_CELLS)
        starts = range(0, values.shape[axis], every)
        if every > 1:
            blocks = [values.take(range(n, min(n + every, values.shape[axis])), axis).mean(axis) for n in starts]
            values = np.stack(blocks, axis)
        rows, columns = (rows[::every], columns) if axis == 0 else (rows, columns[::every])
    return values, rows, columns


def _drawing(width: int, height: int, parts: Iterable[str]) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg>'


def _marks(ends: tuple[int, int], every: int) -> Iterable[tuple[str, float]]:
    """Labels and values of the lines across: powers of ten, and what lies between if there are few."""
    least, most = ends
    if most - least > 2:
        return [(f"1e{power}", 10.0**power) for power in range(least, most + 1, every)]
    between = [digit * 10.0**power for power in range(least, most) for digit in (1, 2, 5)]
    return [(f"{value:g}", value) for value in (*between, 10.0**most)]


def _across(y: float, kind: str) -> str:
    return f'<line x1="{_LEFT}" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}" class="{kind}"/>'


def _height(value: float, ends: tuple[int, int]) -> float:
    """Where on the logarithmic axis a value stands, as a coordinate of the drawing."""
    least, most = ends
    margin = (most - least) / 20
    if math.isfinite(value):
        power = min(max(math.log10(value), least), most) if value > 0 else least - margin
    else:
        power = most + margin
    return _TOP + _HEIGHT * (most + margin - power) / (most - least + 2 * margin)
