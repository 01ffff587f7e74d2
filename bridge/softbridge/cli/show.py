"""Commands that only show: inspect, explain, matrix, doctor, formats, engines, plugins; and the demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from softbridge.cli.console import AsJson, Base, Output, app, print_json, printer, quiet, refuse
from softbridge.cli.tables import engines_table, explanation_table, formats_table, plugins_table, prompt_table
from softbridge.errors import SoftbridgeError


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A file or a directory.")],
    base: Base = None,
    source_format: Annotated[
        str | None,
        typer.Option("--from", help="The format to read; recognised by content if left out.", metavar="FORMAT"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What is this file, for which base model, and is it healthy?"""
    from softbridge.checkpoint.inspect import inspect as run_inspect

    try:
        found = run_inspect(path, base=base, format=source_format)
    except SoftbridgeError as error:
        refuse(error, as_json)
    if as_json:
        print_json(found)
    else:
        printer().print(prompt_table(found))


@app.command()
def explain(
    source: Annotated[str, typer.Option("--from", help="The format that is read.", metavar="FORMAT")],
    target: Annotated[str, typer.Option("--to", help="The format that is written.", metavar="FORMAT")],
    method: Annotated[
        str | None,
        typer.Option("--method", help="A method, as 'softbridge matrix' names it; all if left out.", metavar="NAME"),
    ] = None,
    base: Base = None,
    as_json: AsJson = False,
) -> None:
    """Is a conversion exact, and why not? Without --base: for absolute, rotary and relative positions."""
    from softbridge.lowering.explain import explanations

    try:
        found = explanations(source, target, method, base)
    except SoftbridgeError as error:
        refuse(error, as_json)
    if as_json:
        print_json([{"base": name, **explanation.to_json()} for name, explanation in found])
    else:
        printer().print(explanation_table(found))


@app.command()
def matrix(as_json: AsJson = False) -> None:
    """The outcome of every conversion of every method: tests/MATRIX.md, from what is installed here."""
    from softbridge.lowering.matrix import markdown
    from softbridge.lowering.matrix import matrix as run_matrix

    try:
        found = run_matrix()
    except SoftbridgeError as error:
        refuse(error, as_json)
    if as_json:
        print_json([{"base": family, **one.to_json()} for cell in found.values() for family, one in cell.items()])
    else:
        printer().out(markdown(found), end="", highlight=False)


@app.command()
def doctor(
    path: Annotated[Path | None, typer.Argument(help="A prompt: only defects that concern it are listed.")] = None,
    base: Base = None,
    as_json: AsJson = False,
) -> None:
    """What can be run here, and which known defects of the toolkits are met?"""
    from softbridge.cli.doctor import diagnosis_table
    from softbridge.doctor import diagnose

    try:
        found = diagnose(path, base)
    except SoftbridgeError as error:
        refuse(error, as_json)
    if as_json:
        print_json(found.to_json())
    else:
        printer().print(diagnosis_table(found))


@app.command()
def formats(as_json: AsJson = False) -> None:
    """List the formats that are installed."""
    _list(formats_table, as_json)


@app.command()
def engines(as_json: AsJson = False) -> None:
    """List the engines, and why one cannot be used here."""
    _list(engines_table, as_json)


@app.command()
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


@app.command()
def demo(
    source: Annotated[str, typer.Option("--from", help="The engine that trains.", metavar="ENGINE")] = "native",
    target: Annotated[str, typer.Option("--to", help="The format to convert to.", metavar="FORMAT")] = "softbridge",
    directory: Annotated[
        Path | None, typer.Option("--directory", help="Where to keep the files; a temporary folder if left out.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """The whole job on a tiny Llama built in process: train a prefix, convert it, run both, and compare."""
    from softbridge.cli.demo import run as run_demo

    try:
        with quiet():
            certificate = run_demo(source, target, directory, Output(quiet=True) if as_json else printer())
    except SoftbridgeError as error:
        refuse(error, as_json)
    if as_json:
        print_json(certificate.to_json())
    raise typer.Exit(certificate.exit_status)
