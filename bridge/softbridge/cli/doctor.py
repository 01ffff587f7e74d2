"""What `softbridge doctor` shows."""

from __future__ import annotations

from collections import Counter

from rich import box
from rich.console import Group
from rich.table import Table

from softbridge.cli.tables import shown
from softbridge.doctor import Diagnosis
from softbridge.selfcheck.verdict import Verdict


def diagnosis_table(found: Diagnosis) -> Group:
    """Versions and which of them are untested, engines and defects, and of which prompt, if of one."""
    installed = Table(box=box.SIMPLE, pad_edge=False)
    for heading in ("installed", "version", ""):
        installed.add_column(heading)
    newer = {one.distribution: f"newer than the newest tested, {one.newest}" for one in found.untested}
    for name, version in found.versions.items():
        installed.add_row(shown(name), shown(version), shown(newer.get(name, "")))
    usable = Table(box=box.SIMPLE, pad_edge=False)
    for heading in ("engine", "here"):
        usable.add_column(heading, overflow="fold")
    for name, reason in found.engines.items():
        usable.add_row(shown(name), shown("yes" if reason is None else f"no: {reason}"))
    known = Table(box=box.SIMPLE, pad_edge=False)
    for heading in ("known defect", "what happens"):
        known.add_column(heading, overflow="fold")
    for defect in found.defects:
        known.add_row(shown(defect.id), shown(defect.summary))
    checked = Table(box=box.SIMPLE, pad_edge=False)
    for heading in ("model", "self-check of the engine", "on", "what"):
        checked.add_column(heading, overflow="fold")
    for verdict in found.self_checks:
        checked.add_row(*map(shown, (verdict.model, verdict.status, verdict.note, _what(verdict))))
    counts = Counter(verdict.status for verdict in found.self_checks)
    told = ", ".join(f"{counts[status]} {status}" for status in ("kept", "broken", "unproven"))
    checks = shown(f"self-checks with these versions: {told}" if counts else "no self-checks with these versions yet")
    what = "of these toolkits" if found.prompt is None else f"that concern {found.prompt}"
    count = shown(f"{len(found.defects)} known defects {what}")
    tables = (checks, checked) if counts else (checks,)
    return Group(shown(found.platform), installed, usable, count, known, *tables)


def _what(verdict: Verdict) -> str:
    """The promises that are broken, each with its worst figure; or why nothing was tried."""
    broken = [
        (found.promise, max(found.broken, key=lambda one: one.value)) for found in verdict.findings if found.broken
    ]
    return "; ".join(f"{name}: {one.name} {one.value:.1e}" for name, one in broken) or verdict.reason
