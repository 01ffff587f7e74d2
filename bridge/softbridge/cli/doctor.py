"""What `softbridge doctor` shows."""

from __future__ import annotations

from collections import Counter

from rich.console import Group

from softbridge.cli.tables import rows_table, shown
from softbridge.doctor import Diagnosis, describe
from softbridge.selfcheck.verdict import Verdict


def diagnosis_table(found: Diagnosis) -> Group:
    """Versions and which of them are untested, engines and defects, and of which prompt, if of one."""
    newer = {one.distribution: f"newer than the newest tested, {one.newest}" for one in found.untested}
    installed = rows_table(
        ["installed", "version", ""], [[name, version, newer.get(name, "")] for name, version in found.versions.items()]
    )
    usable = rows_table(
        ["engine", "here"],
        [[name, "yes" if reason is None else f"no: {reason}"] for name, reason in found.engines.items()],
    )
    known = rows_table(["known defect", "what happens"], [[defect.id, defect.summary] for defect in found.defects])
    checked = rows_table(
        ["model", "self-check of the engine", "on", "what"],
        [[verdict.model, verdict.status, verdict.note, _what(verdict)] for verdict in found.self_checks],
    )
    counts = Counter(verdict.status for verdict in found.self_checks)
    told = ", ".join(f"{counts[status]} {status}" for status in ("kept", "broken", "unproven"))
    checks = shown(f"self-checks with these versions: {told}" if counts else "no self-checks with these versions yet")
    what = "of these toolkits" if found.prompt is None else f"that concern this prompt ({describe(found.prompt)})"
    count = shown(f"{len(found.defects)} known defects {what}")
    tables = (checks, checked) if counts else (checks,)
    return Group(shown(found.platform), installed, usable, count, known, *tables)


def _what(verdict: Verdict) -> str:
    """The promises that are broken, each with its worst figure; or why nothing was tried."""
    broken = [
        (found.promise, max(found.broken, key=lambda one: one.value)) for found in verdict.findings if found.broken
    ]
    return "; ".join(f"{name}: {one.name} {one.value:.1e}" for name, one in broken) or verdict.reason
