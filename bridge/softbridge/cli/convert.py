"""`softbridge convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from softbridge.choices import CONDITIONS, DROPPED, DTYPES, PARTS
from softbridge.cli.console import (
    PROMPT,
    AsJson,
    Base,
    Overwrite,
    command,
    completing,
    format_option,
    one_of,
    print_json,
    quiet,
    refuse,
    reporter,
)
from softbridge.cli.many import convert_many
from softbridge.cli.tables import certificate_table, serving_table, shown, steps_table
from softbridge.errors import ArgumentError, SoftbridgeError


@command(
    "softbridge convert prefix/ out/ --to adapterhub --base path/to/base --verify",
    "softbridge convert owner/name@v1 out/ --to softbridge --dry-run",
)
def convert(
    source: Annotated[str, typer.Argument(help=f"The checkpoint to read: {PROMPT}", metavar="PROMPT")],
    target: Annotated[
        Path,
        typer.Argument(
            help="The directory to write. If the format has one file, a file name with its suffix will do.",
            metavar="TARGET",
        ),
    ],
    to: Annotated[str, format_option("--to", "The format to write.")],
    base: Base = None,
    source_format: Annotated[
        str | None, format_option("--from", "The format to read. It is recognised by content if left out.")
    ] = None,
    accept: Annotated[
        list[str] | None,
        one_of(CONDITIONS, "--accept", "Accept a condition that a refusal named. May be repeated."),
    ] = None,
    encoding: Annotated[
        str | None,
        typer.Option(
            "--encoding",
            help="How to store tensors. 'softbridge formats' lists the ways of each format.",
            metavar="NAME",
        ),
    ] = None,
    dtype: Annotated[
        str | None, one_of(DTYPES, "--dtype", "Store the numbers in this. The report says what it rounds.")
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
            autocompletion=completing(lambda: PARTS),
        ),
    ] = None,
    drop: Annotated[
        list[str] | None,
        one_of(DROPPED, "--drop", "Ignore this part of the source, even if it is valid. May be repeated."),
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
    overwrite: Overwrite = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Do all but write: the plan, the files, their sizes.")
    ] = False,
    recursive: Annotated[
        bool, typer.Option("--recursive", help="Convert all checkpoints in the directory, each to its place in TARGET.")
    ] = False,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", help="With --recursive: how many processes convert. It is 1 if left out.", min=1),
    ] = None,
    shard: Annotated[
        str | None, typer.Option("--shard", help="With --recursive: one of N parts, I from 1.", metavar="I/N")
    ] = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            "--push-to-hub",
            help="Open a pull request with what is written, in this repository. Its main branch is not touched.",
            metavar="OWNER/NAME",
        ),
    ] = None,
    create_repo: Annotated[
        bool, typer.Option("--create-repo", help="Make that repository, private, if it does not exist.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Convert a checkpoint to another toolkit's format. What would compute another function is refused.

    With --recursive the same command goes on where an earlier one stopped.

    Its exit status is 0 if all were converted, now or earlier.

    Else it is 3 for a defect, 1 if one came out different, and 2 if one was refused.
    """
    from softbridge import conversion
    from softbridge.checkpoint.manifest import CARD

    asked: dict[str, Any] = {
        "base": base,
        "format": source_format,
        "accept": accept or (),
        "encoding": encoding,
        "dtype": dtype,
        "task": task,
        "part": part,
        "drop": drop or (),
        "trained_on": trained_on,
        "verify": verify,
        "overwrite": overwrite,
        "dry_run": dry_run,
    }
    if recursive:
        if push_to_hub is not None:
            refuse(ArgumentError("--push-to-hub, of many", "one checkpoint to push", "push one at a time"), as_json)
        convert_many(Path(source), target, to, as_json, jobs=jobs or 1, shard=shard, **asked)
    if jobs is not None or shard is not None:
        refuse(ArgumentError("--jobs or --shard for one checkpoint", "a directory of many", "say --recursive"), as_json)
    try:
        with quiet():
            report = conversion.convert(source, target, to, **asked, push_to_hub=push_to_hub, create_repo=create_repo)
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
                "replaced": report.replaced,
                "pull_request": None if report.pull_request is None else vars(report.pull_request),
            }
        )
        return
    console = reporter()
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
    if report.replaced:
        console.print(shown(f"the source's model card was not carried over: {CARD} of the target is one of its own"))
    if report.pull_request is not None:
        said = report.pull_request.url or f"none: {push_to_hub} has all of it already"
        console.print(shown(f"pull request: {said}"))
        if report.pull_request.replaces:
            console.print(shown(f"it replaces {', '.join(report.pull_request.replaces)}"))
    if report.advice:
        console.print(Text.assemble("to run it in ", shown(report.target), " itself:"))
        for line in report.advice:
            console.print(Text.assemble("- ", shown(line)))
