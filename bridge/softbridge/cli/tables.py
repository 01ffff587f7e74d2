"""What the command line shows, as rich tables and as plain rows for ``--json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

from rich.console import Group
from rich.table import Table
from rich.text import Text

from softbridge.cli.grid import Grid

if TYPE_CHECKING:  # `softbridge --help` shows none of these
    from softbridge.collection.record import Record
    from softbridge.lowering.explain import Explanation
    from softbridge.lowering.matrix import Summary
    from softbridge.lowering.steps import Step
    from softbridge.plugin.hookspecs import Engine
    from softbridge.plugin.serving import Server
    from softbridge.verification.certificate import Certificate
    from softbridge.verification.serving import Serving

Rows = list[dict[str, Any]]
#: So many of a collection's failures are shown; the manifest has all.
MOST_FAILURES = 20


def shown(text: object, style: str = "") -> Text:
    """A string that comes from a file or a caller, to be shown as it is.

    It is never read as markup, and what a terminal would act on (escape sequences, line breaks, marks that turn the
    direction of writing) is replaced by its name in Python.
    """
    visible = (c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text))
    return Text("".join(visible), style)


def shown_lines(text: str, indent: str = "") -> Text:
    """The same of a message that may have several lines."""
    return Text("\n" + indent).join(shown(line) for line in text.split("\n"))


def _table(*headings: str) -> Grid:
    return Grid(*map(shown, headings))


def _row(table: Table, *cells: object) -> None:
    table.add_row(*map(shown, cells))


def rows_table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> Grid:
    """A table of plain cells."""
    table = _table(*headings)
    for row in rows:
        _row(table, *row)
    return table


def formats_table() -> tuple[Table, Rows]:
    """What `softbridge formats` shows."""
    from softbridge.plugin.registry import formats

    table, rows = (
        _table("format", "what", "encodings", "input prompts", "prefixes", "adaption", "real tokens stand at"),
        [],
    )
    for name, form in formats().items():
        able = form.capabilities
        inputs = sorted({f"{stack} {entry}" for stack, entry, _ in able.inputs})
        start = {"counted": "P", "zero": "0", None: "any"}[able.prefix_start]
        sites = sorted(able.prefix_sites)
        encodings = list(form.encodings)
        joins = sorted(able.adaption)
        lists = [", ".join(words) or "-" for words in (inputs, sites, joins)]
        _row(table, name, form.summary, ", ".join(encodings), *lists, start)
        brings = {"encodings": encodings, "inputs": inputs, "prefixes": sites, "adaption": joins}
        rows.append({"name": name, "summary": form.summary, **brings})
    return table, rows


def engines_table() -> tuple[Table, Rows]:
    """What `softbridge engines` shows."""
    from softbridge.plugin.registry import engines, servers

    table, rows = _table("engine", "what", "runs", "here"), []
    kinds: dict[str, Mapping[str, Engine | Server]] = {"transformers": engines(), "its own model": servers()}
    for kind, known in kinds.items():
        for name, engine in known.items():
            reason = engine.unavailable()
            _row(table, name, engine.summary, kind, "yes" if reason is None else f"no: {reason}")
            rows.append({"name": name, "summary": engine.summary, "runs": kind, "unavailable": reason})
    return table, rows


def plugins_table() -> tuple[Table, Rows]:
    """What `softbridge plugins` shows."""
    from softbridge.plugin.registry import owners

    table, rows = _table("plugin", "hook", "brings"), []
    for hook, brought in owners().items():
        for owner in sorted(set(brought.values())):
            names = [name for name, by in brought.items() if by == owner]
            _row(table, owner, hook, ", ".join(names))
            rows.append({"plugin": owner, "hook": hook, "brings": names})
    return table, rows


def prompt_table(found: dict[str, Any]) -> Group:
    """What `softbridge inspect` shows of `softbridge.checkpoint.inspect.inspect`."""
    head = _table("format", "base model", "files")
    _row(head, found["format"], found.get("base") or "not recorded", ", ".join(found["files"]))
    if found["needs_base"]:
        return Group(head, shown(f"give --base to see more: {found['needs_base']}"))
    parts = _table("part", "where", "virtual tokens", "shape", "dtype", "std", "largest")
    for part in found["parts"]:
        if part["kind"] == "input":
            what, where = "input prompt", f"{part['stack']}, {part['entry']} the embedding block, {part['placement']}"
        else:
            layers = part["layers"]
            whole = layers == list(range(len(layers)))
            where = f"{part['site']}, {len(layers)} layers" if whole else f"{part['site']}, layers {layers}"
            what = "key/value prefix" if part["kind"] == "prefix" else f"adaption prompt, added to: {part['joins']}"
        shape = "x".join(map(str, part["shape"]))
        _row(parts, what, where, part["length"], shape, part["dtype"], f"{part['std']:.3g}", f"{part['largest']:.3g}")
    start = ", ".join(f"{stack} {position}" for stack, position in found["positions"]["start"].items())
    facts = [f"the first real token stands at: {start or 'no stack is moved'}"]
    unbiased = ", ".join(f"{stack} {layer}" for stack, layer in found["positions"].get("unbiased_from", {}).items())
    if unbiased:
        facts.append(f"self-attention has no relative position bias from this layer on: {unbiased}")
    if found["conditions"]:
        facts.append(f"written under the conditions: {', '.join(found['conditions'])}")
    if found["training"]:
        facts.append(f"training can go on: {found['training']} parameterisation")
    if found["task"]:
        facts.append(f"task {found['task']['number']} of {found['task']['of']}, counted from 0")
    if found["head"]:
        facts.append(f"head: {', '.join(found['head'])}")
    return Group(head, parts, *map(shown, [*facts, *found["notes"]]))


def steps_table(steps: Sequence[Step]) -> Table | Text:
    """What lowering did."""
    if not steps:
        return Text("nothing had to be changed: the target expresses the same numbers")
    table = _table("step", "exactness", "what it means")
    for step in steps:
        _row(table, step.name, step.exactness, step.note)
    return table


def explanation_table(explanations: Sequence[tuple[str, Explanation]]) -> Table:
    """What `softbridge explain` shows."""
    from softbridge.lowering.examples import LENGTH

    table = _table("base model", "method", "outcome", f"why (for a prompt of {LENGTH} virtual tokens, say)")
    for base, found in explanations:
        reasons = [f"{step.name}: {step.note}" for step in found.steps]
        reasons += [f"{obstacle.name}: {obstacle.reason}" for obstacle in found.obstacles]
        why = Text("\n").join(map(shown, reasons or ["the same numbers"]))
        table.add_row(shown(base), shown(found.method), shown(found.outcome), why)
    return table


def matrix_tables(told: Summary) -> Group:
    """What `softbridge matrix` shows on a terminal."""
    tables: list[Grid] = []
    for source, methods in told.sources.items():
        targets = [target for target in told.sources if target != source]
        rows = [[method, *(cells[target] for target in targets)] for method, cells in methods.items()]
        tables.append(rows_table([f"from {source}", *(f"to {target}" for target in targets)], rows))
    return Group(*tables, rows_table(["named above", "what it is"], list(told.reasons.items())))


def certificate_table(certificate: Certificate) -> Group:
    """A certificate for a person."""
    reasons = [f"the model computes in float32 inside {', '.join(certificate.islands)}"] if certificate.islands else []
    reasons += [f"the conversion stored in float32 what it computed ({', '.join(certificate.rounded)})"] * bool(
        certificate.rounded
    )
    bound = f"bound {certificate.bound:.0e}" + (f": {'; '.join(reasons)}" if reasons else "")
    sides = _table("", "files", "loaded", "run by")
    for label, side in (("source", certificate.source), ("target", certificate.target)):
        loaded = "by its own loader" if side.loaded else "from what softbridge read"
        _row(sides, label, side.path, loaded, side.engine + (f" ({side.instead_of})" if side.instead_of else ""))
    effects = _table("relative to the largest logit", "float64", certificate.dtype, "")
    for fault in certificate.faults:
        name = "the prompt's effect (dropped)" if fault.name == "dropped" else f"fault: {fault.name}"
        _row(effects, name, f"{fault.moved:.1e}", "", "noticed" if fault.noticed else "not noticed")
    for name, why in certificate.untried.items():
        _row(effects, f"fault: {name}", "not run", "", why)
    if certificate.naive is not None:
        _row(effects, "copied as it is", f"{certificate.naive:.1e}", "", "another function")
    _row(effects, "the source against itself", "", _with_unit(certificate.yardstick, certificate), "in another order")
    for figure in certificate.figures:
        if figure.probe == "greedy":
            same = "the same tokens", "other tokens"
            values = [same[0] if value == 0 else same[1] for value in (figure.float64, figure.working)]
        else:
            values = [f"{figure.float64:.1e}", _with_unit(figure.working, certificate)]
        _row(
            effects,
            f"difference: {figure.probe}",
            *values,
            figure.note if figure.judged else f"not judged: {figure.note}",
        )
    facts = [
        f"base: {certificate.base or certificate.geometry.model_type}; weights: {certificate.weights}; "
        f"texts of up to {certificate.longest} tokens; {bound}"
    ]
    if certificate.parted is not None:
        facts.append(f"the two part at {certificate.parted}: by {certificate.parted.apart:.1e} of what comes out there")
    if not certificate.independent:
        facts.append(
            "one engine ran both sides: it shows that both files hold the same prompt, not that two toolkits agree"
        )
    if certificate.conditions:
        facts.append(f"under the conditions: {', '.join(certificate.conditions)}")
    return Group(sides, effects, *map(shown, facts), shown(f"verdict: {verdict_of(certificate)}", "bold"))


def serving_table(served: Serving) -> Group:
    """What a server answered, for a person."""
    table = _table("log-probabilities, from transformers", "apart", "")
    _row(table, f"{served.server} by itself, without a prompt", f"{served.noise:.1e}", f"bound {served.bound:.1e}")
    if served.strain > 1:
        _row(table, "rounding counts for more with the prompt", f"{served.strain:.1f} times", "in transformers, too")
    _row(table, "the prompt's effect, in transformers", f"{served.effect:.1e}", "")
    for fault in served.faults:
        _row(table, f"fault: {fault.name}", f"{fault.moved:.1e}", "noticed" if fault.noticed else "not noticed")
    for name, why in served.untried.items():
        _row(table, f"fault: {name}", "not run", why)
    _row(table, "difference: alone", f"{served.alone:.1e}", "")
    _row(table, "difference: in a batch with others", f"{served.batch:.1e}", "")
    _row(table, "difference: bare texts in that batch", f"{served.bare:.1e}", "")
    ran = f"{served.server}: {served.version}; weights: {served.weights}"
    return Group(table, shown(ran), shown(f"verdict of the server: {served.verdict}", "bold"))


def verdict_of(certificate: Certificate) -> str:
    """A verdict in words."""
    asked = "" if certificate.same or certificate.verdict == "insensitive" else f", where {certificate.level} is asked"
    return {
        "bitwise": "the same, bit for bit",
        "exact": "the same function" + asked,
        "rounding": f"another function, by no more than {certificate.dtype} rounds by itself{asked}",
        "different": "DIFFERENT",
        "insensitive": "could not be judged: the outputs do not depend on the prompt",
    }[certificate.verdict]


def _with_unit(relative: float | None, certificate: Certificate) -> str:
    """A difference in the working precision, also in units of least precision."""
    return "" if relative is None else f"{relative:.1e} ({relative / certificate.unit:.3g} units)"


def collection_table(records: Sequence[Record], taken_over: int = 0) -> Group:
    """What became of a folder of checkpoints: how many of each, and why what failed did."""
    from softbridge.collection.record import Verdict

    counts = _table("verdict", "checkpoints", "")
    notes = {"converted": f"{taken_over} of them by an earlier run" if taken_over else ""}
    for verdict in get_args(Verdict):
        count = sum(record.verdict == verdict for record in records)
        if count:
            _row(counts, verdict, count, notes.get(verdict, ""))
    failed = [record for record in records if record.verdict in ("refused", "differs", "defect")]
    if not failed:
        return Group(counts)
    table = _table("checkpoint", "why", "to do")
    for record in failed[:MOST_FAILURES]:
        reason = record.reason
        assert reason is not None  # it was not converted
        found = reason.found.strip().splitlines()[-1] if record.verdict == "defect" else reason.found
        _row(table, record.path, f"{record.verdict}: {found}", reason.remedy)
    more = len(failed) - MOST_FAILURES
    return Group(counts, table, *([shown(f"and {more} more, in the manifest")] if more > 0 else []))
