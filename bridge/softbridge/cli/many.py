"""`softbridge convert --recursive`, and `softbridge merge-manifests`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from softbridge.cli.console import AsJson, Overwrite, command, draws, print_json, refuse, reporter
from softbridge.cli.tables import collection_table, shown
from softbridge.errors import SoftbridgeError

if TYPE_CHECKING:
    from softbridge.collection.record import Record

#: Of the summary for a program.
SCHEMA = "softbridge/collection-summary/1"
#: What a record is of that nobody has to look at.
FINE = ("converted", "planned", "not a prompt", "left out")


def convert_many(source: Path, target: Path, to: str, as_json: bool, **asked: Any) -> NoReturn:
    """Convert a folder of checkpoints, say what became of them, and leave with the exit status of that."""
    from softbridge.collection.run import convert_all

    try:
        with _bar() as watch:
            outcome = convert_all(source, target, to, watch=watch, **asked)
    except SoftbridgeError as error:
        refuse(error, as_json)
    except KeyboardInterrupt:
        line = f"interrupted: the manifest in {target} says what was done; the same command goes on from there"
        Console(stderr=True, soft_wrap=True).print(shown(line))
        raise
    if as_json:
        told = {"taken_over": outcome.taken_over, "exit_status": outcome.exit_status}
        print_json({"manifest": None if outcome.path is None else str(outcome.path), **told, **_told(outcome.records)})
    else:
        console = reporter()
        console.print(shown(f"{source} -> {to} {target}", "bold"))
        console.print(collection_table(outcome.records, outcome.taken_over))
        where = "nothing was written" if outcome.path is None else f"the manifest: {outcome.path}"
        console.print(shown(where))
    raise typer.Exit(outcome.exit_status)


@command(
    "softbridge merge-manifests out/ --output all.jsonl",
    "softbridge merge-manifests a/ b/ --output all.jsonl --overwrite --json",
)
def merge_manifests(
    manifests: Annotated[list[Path], typer.Argument(help="Manifests of shards, or folders that hold them.")],
    output: Annotated[Path, typer.Option("--output", help="The manifest to write, .jsonl.", metavar="FILE")],
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Join the manifests that 'convert --recursive --shard' wrote. Exit status as of that, or 2 if some are missing."""
    from softbridge.collection.merge import merge_manifests as merge

    try:
        merged = merge(manifests, output, overwrite=overwrite)
    except SoftbridgeError as error:
        refuse(error, as_json)
    if as_json:
        told = {"missing": list(merged.missing), "double": list(merged.double), "exit_status": merged.exit_status}
        print_json({"manifest": str(output), **told, **_told(merged.manifest.records)})
    else:
        console = reporter()
        console.print(collection_table(merged.manifest.records))
        for what, names in (("missing", merged.missing), ("in two manifests, alike", merged.double)):
            if names:
                console.print(shown(f"{what}: {', '.join(names)}"))
        console.print(shown(f"the manifest: {output}"))
    raise typer.Exit(merged.exit_status)


def _told(records: Sequence[Record]) -> dict[str, Any]:
    """What the summaries for a program have in common."""
    failures = [record for record in records if record.verdict not in FINE]
    return {
        "schema": SCHEMA,
        "counts": dict(Counter(record.verdict for record in records)),
        "failures": [
            {"path": record.path, "verdict": record.verdict, "reason": record.reason and vars(record.reason)}
            for record in failures
        ],
    }


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None] | None]:
    """What draws on a terminal's standard error how many are done, or None where nobody watches."""
    if not draws():
        yield None
        return
    columns = (TextColumn("converting"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("converting", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
