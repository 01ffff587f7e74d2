"""The matrix of methods and conversions, generated from what formats and engines declare."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations

from softbridge.base.model import BaseModel
from softbridge.lowering.examples import METHODS
from softbridge.lowering.explain import KINDS, Explanation, explain
from softbridge.plugin.hookspecs import Catalogued
from softbridge.plugin.optional import able
from softbridge.plugin.registry import formats

#: (method, source, target) -> family -> what it comes to.
Matrix = Mapping[tuple[str, str, str], Mapping[str, Explanation]]


def rows() -> list[str]:
    """The formats that the matrix is of: those that have no table of their own."""
    return [name for name, form in formats().items() if able(form, Catalogued) is None]


def matrix() -> Matrix:
    """Every method, from every format to every other, on one small model of each kind of positions."""
    from softbridge.base.tiny import tiny_config

    bases = {family: BaseModel(tiny_config(family)).imagine() for family in KINDS}
    return {
        (method, source, target): {family: explain(source, target, method, base=base) for family, base in bases.items()}
        for method in METHODS
        for source, target in permutations(rows(), 2)
    }


@dataclass(frozen=True)
class Summary:
    """The matrix in words.

    Attributes:
        sources: format that is read -> (method -> (format that is written -> the outcome)), of the methods that it can
            hold.
        reasons: names that outcomes mention -> what they stand for, sorted.
    """

    sources: Mapping[str, Mapping[str, Mapping[str, str]]]
    reasons: Mapping[str, str]


def summary(found: Matrix) -> Summary:
    """The matrix in words; families of base models that agree are told together."""
    reasons: dict[str, str] = {}
    names = dict.fromkeys(source for _, source, _ in found)
    sources: dict[str, dict[str, dict[str, str]]] = {}
    for source in names:
        sources[source] = {}
        for method in METHODS:
            cells = {target: found[method, source, target] for target in names if target != source}
            if any(one.held for cell in cells.values() for one in cell.values()):
                sources[source][method] = {target: _cell(cell, reasons) for target, cell in cells.items()}
    return Summary(sources, dict(sorted(reasons.items())))


def markdown(found: Matrix) -> str:
    """The matrix as tables, one for each source, with the reasons below."""
    told, lines = summary(found), []
    for source, methods in told.sources.items():
        targets = [target for target in told.sources if target != source]
        lines += ["", f"From `{source}` | " + " | ".join(f"to `{target}`" for target in targets)]
        lines += ["---|" * len(told.sources)]
        lines += [" | ".join([method, *cells.values()]) for method, cells in methods.items()]
    lines += ["", "| | |", "|---|---|"]
    lines += [f"| `{name}` | {reason} |" for name, reason in told.reasons.items()]
    return "\n".join(lines).strip() + "\n"


def _cell(cell: Mapping[str, Explanation], reasons: dict[str, str]) -> str:
    """The outcome of a conversion, the families that agree together; those without a source are left out."""
    groups: dict[str, list[str]] = {}
    for family, one in cell.items():
        if one.held:
            groups.setdefault(_word(one, reasons), []).append(family)
    if len(groups) == 1:
        return next(iter(groups))
    return "; ".join(f"{', '.join(families)}: {word}" for word, families in groups.items())


def _word(one: Explanation, reasons: dict[str, str]) -> str:
    if one.outcome == "exact":
        return "exact, training left out" if any(step.name == "eject" for step in one.steps) else "exact"
    if one.outcome == "impossible":
        names = {obstacle.name: obstacle.reason for obstacle in one.obstacles}
        start = "no: "
    else:
        names = {step.name: step.note for step in one.steps if step.exactness == one.outcome}
        start = "exact in float32: " if one.outcome == "rounding" else "if "
    for name, reason in names.items():
        reasons.setdefault(name, reason)
    return start + ", ".join(f"`{name}`" for name in names)
