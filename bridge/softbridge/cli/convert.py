"""`softbridge convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from softbridge.choices import CONDITIONS, DROPPED, DTYPES, PARTS
from softbridge.cli.console import AsJson, Base, app, one_of, print_json, printer, quiet, refuse
from softbridge.cli.tables import certificate_table, serving_table, shown, steps_table
from softbridge.errors import SoftbridgeError


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="The checkpoint to read.")],
    target: Annotated[
        Path,
        typer.Argument(help="Output directory; or a file name, if the format writes a single file with that suffix."),
    ],
    to: Annotated[str, typer.Option("--to", help="The format to write.", metavar="FORMAT")],
    base: Base = None,
    source_format: Annotated[
        str | None,
        typer.Option("--from", help="The format to read; recognised by content if left out.", metavar="FORMAT"),
    ] = None,
    accept: Annotated[
        list[str] | None,
        one_of(CONDITIONS, "--accept", "Accept a condition that a refusal named; may be repeated."),
    ] = None,
    encoding: Annotated[
        str | None, typer.Option("--encoding", help="How to store tensors; see 'softbridge formats'.", metavar="NAME")
    ] = None,
    dtype: Annotated[
        str | None, one_of(DTYPES, "--dtype", "Store the numbers in this; the report says what it rounds.")
    ] = None,
    task: Annotated[
        int | None, typer.Option("--task", help="Which task of a multitask prompt to convert.", min=0)
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(
            "--part",
            help=f"Convert one part only, of those that the source has: {', '.join(PARTS)}.",
            metavar="NAME",
        ),
    ] = None,
    drop: Annotated[
        list[str] | None,
        one_of(DROPPED, "--drop", "Ignore this part of the source, even if it is valid; may be repeated."),
    ] = None,
    trained_on: Annotated[
        str | None,
        typer.Option(
            "--trained-on",
            help="The transformers that an input prompt was trained on, where that matters and no file says it.",
            metavar="VERSION",
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Run both, and write nothing if they differ. Needs --base.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing target.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Do all but write: the plan, the files, their sizes.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Convert a checkpoint to another toolkit's format. Refuses whatever would compute another function."""
    from softbridge import conversion

    try:
        with quiet():
            report = conversion.convert(
                source,
                target,
                to,
                base=base,
                format=source_format,
                accept=accept or (),
                encoding=encoding,
                dtype=dtype,
                task=task,
                part=part,
                drop=drop or (),
                trained_on=trained_on,
                verify=verify,
                overwrite=overwrite,
                dry_run=dry_run,
            )
    except SoftbridgeError as error:
        refuse(error, as_json)
    if as_json:
        print_json(
            {
                "source": {"path": str(report.source.path), "format": report.source.format.name},
                "target": {"path": str(report.path), "format": report.target, "files": dict(report.files)},
                "written": not dry_run,
                "steps": [vars(step) for step in report.steps],
                "advice": list(report.advice),
                "certificate": None if report.certificate is None else report.certificate.to_json(),
                "served": None if report.served is None else report.served.to_json(),
                "unserved": report.unserved,
            }
        )
        return
    console = printer()
    console.print(
        Text.assemble(
            shown(f"{report.source.format.name} {report.source.path} -> {report.target} "), shown(report.path, "bold")
        )
    )
    console.print(steps_table(report.steps))
    if dry_run:
        sizes = [f"{name} ({size:,d} bytes)" for name, size in report.files.items()]
        console.print(shown(f"nothing was written; it would have been {', '.join(sizes)}"))
    if report.certificate is not None:
        console.print(certificate_table(report.certificate))
    if report.served is not None:
        console.print(serving_table(report.served))
    if report.unserved:
        console.print(shown(f"{report.target} itself did not answer with it: {report.unserved}"))
    if report.advice:
        console.print(Text.assemble("to run it in ", shown(report.target), " itself:"))
        for line in report.advice:
            console.print(Text.assemble("- ", shown(line)))
