"""Commands that only show: inspect, explain, matrix, doctor, formats, engines, plugins; and the demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from softbridge.cli.console import (
    PROMPT,
    AsJson,
    Base,
    Output,
    Overwrite,
    command,
    completing,
    engine_names,
    format_option,
    method_names,
    print_json,
    printer,
    quiet,
    refuse,
    reporter,
)
from softbridge.cli.tables import (
    engines_table,
    explanation_table,
    formats_table,
    matrix_tables,
    plugins_table,
    prompt_table,
    shown,
)
from softbridge.errors import SoftbridgeError


@command(
    "softbridge inspect peft_prefix/",
    "softbridge inspect owner/name/folder@v1 --base path/to/base --json",
)
def inspect(
    path: Annotated[str, typer.Argument(help=f"What to look at: {PROMPT}", metavar="PROMPT")],
    base: Base = None,
    source_format: Annotated[
        str | None, format_option("--from", "The format to read. It is recognised by content if left out.")
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            "--html",
            help="Write a page with pictures, too. Where --base has weights, beside the model's own keys and words.",
            metavar="FILE",
        ),
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """What is this file, for which base model, and is it healthy?"""
    from softbridge.checkpoint.inspect import inspect as run_inspect

    try:
        with quiet():
            found = run_inspect(path, base=base, format=source_format)
            if html is not None:
                from softbridge import untrusted
                from softbridge.cli.portrait_page import drawn

                untrusted.write_file(html, drawn(found, base).encode(), overwrite=overwrite)
    except SoftbridgeError as error:
        refuse(error, as_json)
    if as_json:
        print_json(found)
    else:
        printer().print(prompt_table(found))
        if html is not None:
            reporter().print(shown(f"the page: {html}"))


@command(
    "softbridge explain --from peft --to adapterhub",
    "softbridge explain --from peft --to mlx --method prefix-tuning --base base/",
)
def explain(
    source: Annotated[str, format_option("--from", "The format that is read.")],
    target: Annotated[str, format_option("--to", "The format that is written.")],
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            help="A method, as 'softbridge matrix' names it. All if left out.",
            metavar="NAME",
            autocompletion=completing(method_names),
        ),
    ] = None,
    base: Base = None,
    as_json: AsJson = False,
) -> None:
    """Is a conversion exact, and why not? Without --base: for absolute, rotary and relative positions."""
    from softbridge.lowering.explain import explanations

    try:
        with quiet():
            found = explanations(source, target, method, base)
    except SoftbridgeError as error:
        refuse(error, as_json)
    if as_json:
        print_json([{"base": name, **explanation.to_json()} for name, explanation in found])
    else:
        printer().print(explanation_table(found))


@command("softbridge matrix", "softbridge matrix --json")
def matrix(as_json: AsJson = False) -> None:
    """The outcome of every conversion of every method. It is in Markdown, unless a terminal shows it."""
    from softbridge.lowering.matrix import markdown, summary
    from softbridge.lowering.matrix import matrix as run_matrix

    try:
        with quiet():
            found = run_matrix()
    except SoftbridgeError as error:
        refuse(error, as_json)
    if as_json:
        print_json([{"base": family, **one.to_json()} for cell in found.values() for family, one in cell.items()])
    elif (console := printer()).is_terminal:
        console.print(matrix_tables(summary(found)))
    else:
        console.out(markdown(found), end="", highlight=False)


@command("softbridge doctor", "softbridge doctor peft_prefix/ --base path/to/base")
def doctor(
    path: Annotated[
        str | None,
        typer.Argument(help=f"A prompt. Only defects that concern it are listed. It is {PROMPT}", metavar="PROMPT"),
    ] = None,
    base: Base = None,
    as_json: AsJson = False,
) -> None:
    """What can be run here, and which known defects of the toolkits are met?"""
    from softbridge.cli.doctor import diagnosis_table
    from softbridge.doctor import diagnose

    try:
        with quiet():
            found = diagnose(path, base)
    except SoftbridgeError as error:
        refuse(error, as_json)
    if as_json:
        print_json(found.to_json())
    else:
        printer().print(diagnosis_table(found))


@command("softbridge formats", "softbridge formats --json")
def formats(as_json: AsJson = False) -> None:
    """List the formats that are installed."""
    _list(formats_table, as_json)


@command("softbridge engines", "softbridge engines --json")
def engines(as_json: AsJson = False) -> None:
    """List the engines, and why one cannot be used here."""
    _list(engines_table, as_json)


@command("softbridge plugins", "softbridge plugins --json")
def plugins(as_json: AsJson = False) -> None:
    """List what each plugin brings."""
    _list(plugins_table, as_json)


def _list(make: Any, as_json: bool) -> None:
    try:
        table, rows = make()
    except SoftbridgeError as error:
        refuse(error, as_json)
    if as_json:
        print_json(rows)
    else:
        printer().print(table)


@command("softbridge demo --from peft --to adapterhub", "softbridge demo --directory demo/ --json")
def demo(
    source: Annotated[
        str,
        typer.Option(
            "--from", help="The engine that trains.", metavar="ENGINE", autocompletion=completing(engine_names)
        ),
    ] = "native",
    target: Annotated[str, format_option("--to", "The format to convert to.")] = "softbridge",
    directory: Annotated[
        Path | None, typer.Option("--directory", help="Where to keep the files. If it is left out, they are temporary.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """The whole job on a tiny Llama built in process: train a prefix, convert it, run both, and compare."""
    from softbridge.cli.demo import run as run_demo

    console = Output(quiet=True) if as_json else reporter()
    try:
        with quiet():
            certificate = run_demo(source, target, directory, console)
    except SoftbridgeError as error:
        refuse(error, as_json)
    if as_json:
        print_json(certificate.to_json())
    raise typer.Exit(certificate.exit_status)
