"""A certificate as one HTML page that needs nothing else: no script, no reference to anything outside it.

Names in it come from files that nobody trusts, so that every text is shown as in a terminal and then escaped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape

from rich.table import Table
from rich.text import Text

from softbridge.cli.tables import certificate_table, shown
from softbridge.verification.certificate import Certificate

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { text-align: left; padding: .2rem .8rem .2rem 0 }
th, td { border-bottom: 1px solid #ddd; vertical-align: top } td { overflow-wrap: anywhere }
.verdict { font-size: 1.3rem; font-weight: bold } .same { color: #06623b } .not { color: #a3161b }
svg { width: 100%; height: auto; background: #fafafa; font-size: 11px } pre { overflow-x: auto; font-size: 12px }
"""
#: What the axis of a plot ends at. What is 0 stands below it, what is not a number or larger above.
_LEAST, _MOST = -18, 2
_WIDTH, _HEIGHT, _LEFT, _TOP, _FOOT = 900, 300, 60, 20, 130
_COLOURS = ("#1f5fa8", "#d9822b")

#: Label of a place on the axis, and the value of each series there, if it has one.
_Row = tuple[str, Sequence[float | None]]


def page(certificate: Certificate) -> str:
    """The page: verdict, tables, the differences by probe and by layer, and the certificate's JSON."""
    title = f"{certificate.verdict}: {certificate.source.path}, {certificate.target.path}"
    *tables, verdict = certificate_table(certificate).renderables
    bounds = [("bound", certificate.bound), ("noise floor", certificate.yardstick)]
    probes: list[_Row] = [(figure.probe, (figure.float64, figure.working)) for figure in certificate.figures]
    layers: list[_Row] = [(f"{one.stack} {one.layer} {one.part}", (one.apart,)) for one in certificate.layers]
    content = json.dumps(certificate.to_json(), indent=2, sort_keys=True)
    return "\n".join(
        (
            '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"/>',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\"/>",
            f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body>",
            "<h1>softbridge certificate</h1>",
            f'<p class="verdict {"same" if certificate.same else "not"}">{_text(verdict)}</p>',
            *(_table(one) if isinstance(one, Table) else f"<p>{_text(one)}</p>" for one in tables),
            "<h2>Difference by probe</h2>",
            _plot(probes, ("float64", certificate.dtype), bounds),
            "<h2>Difference by layer, first text, float64</h2>",
            _plot(layers, ("float64",), bounds[:1]) if layers else "<p>no layers were found to watch</p>",
            f"<details><summary>certificate.json</summary><pre>{escape(content)}</pre></details>",
            "</body></html>\n",
        )
    )


def _text(text: object) -> str:
    """A text as HTML, as `shown` has it."""
    return escape(text.plain if isinstance(text, Text) else shown(text).plain)


def _table(table: Table) -> str:
    rows = zip(*(column.cells for column in table.columns), strict=True)
    head = "".join(f"<th>{_text(column.header)}</th>" for column in table.columns)
    body = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _height(value: float) -> float:
    """Where on the logarithmic axis a value stands, as a coordinate of the drawing."""
    if math.isfinite(value):
        power = min(max(math.log10(value), _LEAST), _MOST) if value > 0 else _LEAST - 1
    else:
        power = _MOST + 1
    return _TOP + _HEIGHT * (_MOST + 1 - power) / (_MOST - _LEAST + 2)


def _across(y: float, stroke: str) -> str:
    return f'<line x1="{_LEFT}" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="{stroke}"/>'


def _plot(rows: Sequence[_Row], series: Sequence[str], lines: Sequence[tuple[str, float]]) -> str:
    """Dots over the rows' labels, on a logarithmic axis; `lines` are drawn across."""
    step = (_WIDTH - _LEFT) / len(rows)
    bottom, parts = _TOP + _HEIGHT, []
    marks = [("0", 0.0), *((f"1e{power}", 10.0**power) for power in range(_LEAST, _MOST + 1, 4))]
    for label, value in marks:
        y = _height(value)
        parts.append(_across(y, "#ddd"))
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for number, (label, value) in enumerate(lines):
        y, note = _height(value), _text(f"{label} {value:.0e}")
        parts.append(_across(y, "#888"))
        parts.append(f'<text x="{_WIDTH - 4 - 120 * number}" y="{y - 3:.1f}" text-anchor="end">{note}</text>')
    every = -(-len(rows) // 40)
    for number, (label, values) in enumerate(rows):
        x = _LEFT + (number + 0.5) * step
        if number % every == 0:
            turn = f"rotate(-60 {x:.1f} {bottom + 12})"
            parts.append(
                f'<text x="{x:.1f}" y="{bottom + 12}" text-anchor="end" transform="{turn}">{_text(label)}</text>'
            )
        for place, (name, far) in enumerate(zip(series, values, strict=True)):
            if far is not None:
                x_dot = x + (place - (len(series) - 1) / 2) * min(12.0, step / 3)
                parts.append(
                    f'<circle cx="{x_dot:.1f}" cy="{_height(far):.1f}" r="{4 if len(rows) < 50 else 2.5}" '
                    f'fill="{_COLOURS[place]}"><title>{_text(f"{label}, {name}: {far:.2e}")}</title></circle>'
                )
    for place, name in enumerate(series):
        parts.append(f'<circle cx="{_LEFT + 10 + 110 * place}" cy="10" r="4" fill="{_COLOURS[place]}"/>')
        parts.append(f'<text x="{_LEFT + 18 + 110 * place}" y="14">{_text(name)}</text>')
    return f'<svg viewBox="0 0 {_WIDTH} {bottom + _FOOT}" role="img">{"".join(parts)}</svg>'
