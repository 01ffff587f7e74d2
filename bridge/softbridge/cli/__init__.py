"""The command line. Prints and exits; nothing below it does.

Exit status: 0 done, or the same; 1 different; 2 refused, or could not be judged (the message says what was found, what
was expected and what to do); 3 a defect of softbridge: please report it with the traceback. As everywhere, 130 for an
interruption and 141 where nobody reads the output.
"""

from __future__ import annotations

import io
import json
import logging
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from softbridge.cli.tables import (
    certificate_table,
    engines_table,
    explanation_table,
    formats_table,
    inspection,
    plugins_table,
    prompt_table,
    shown,
    shown_lines,
    steps_table,
)
from softbridge.errors import SoftbridgeError

if TYPE_CHECKING:
    from softbridge.verification import Certificate


class _Group(TyperGroup):
    """Typer answers two unexpected exceptions, of which one is a closed pipe, with status 1, which is ours to give."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (EOFError, OSError) as error:
            raise RuntimeError("an unexpected error of input or output") from error


app = typer.Typer(
    cls=_Group,
    help="Translate soft prompts between toolkits, and prove that the outputs are the same.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

REFUSED = 2
DEFECT = 3
UNREAD = 141  # what a shell reports of a program that SIGPIPE ends


class Dtype(str, Enum):
    """The working precisions."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class StoredDtype(str, Enum):
    """What numbers can be stored in."""

    float64 = "float64"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Alike(str, Enum):
    """What can be counted as the same."""

    bitwise = "bitwise"
    exact = "exact"
    rounding = "rounding"


class Dropped(str, Enum):
    """What of a source can be left out; see `softbridge.choice.DROPPED`."""

    training = "training"
    manifest = "manifest"


Base = Annotated[
    str | None,
    typer.Option("--base", help="The base model: a directory, a config.json, or a hub id.", metavar="MODEL_OR_CONFIG"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a program instead of a table.")]


class _Console(Console):
    def on_broken_pipe(self) -> None:
        try:
            super().on_broken_pipe()
        except SystemExit as end:
            raise SystemExit(UNREAD) from end


def _out() -> Console:
    return _Console(width=None if Console().is_terminal else 120)


def _refuse(error: SoftbridgeError, as_json: bool) -> NoReturn:
    if as_json:
        refused = {"kind": type(error).__name__, "found": error.found, "expected": error.expected}
        obstacles = [vars(obstacle) for obstacle in getattr(error, "obstacles", ())]
        _print_json({"refused": {**refused, "remedy": error.remedy, "obstacles": obstacles}})
    message = Text.assemble(("refused:", "bold red"), " ", shown_lines(str(error)))
    Console(stderr=True, soft_wrap=True).print(message)
    raise typer.Exit(REFUSED)


def _print_json(value: Any) -> None:
    _out().out(json.dumps(value, indent=2, sort_keys=True), highlight=False)


def main() -> None:
    """Run the command line; see the module for the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a character is no reason to fail
    try:
        app()
    except Exception:
        lines = shown_lines(traceback.format_exc()).plain
        print(f"{lines}this is a defect of softbridge: please report it, with the lines above", file=sys.stderr)
        sys.exit(DEFECT)


def _version(wanted: bool) -> None:
    if wanted:
        from softbridge_compat import versions

        _out().out(" ".join(f"{name} {version}" for name, version in versions().items()), highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Versions of what can change a result.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what toolkits say while they run off the terminal: what matters of it is in the certificate.

    What softbridge itself has to say of what is installed comes first, on standard error; and, in a line that goes away
    again, how far a verification has come.
    """
    from softbridge.untested import warn_of_untested
    from softbridge.verification.progress import watching

    warn_of_untested()
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    shows = sys.stderr.isatty()
    try:
        with warnings.catch_warnings(), watching(_tell) if shows else nullcontext():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        if shows:
            _tell("")


def _tell(line: str) -> None:
    width = shutil.get_terminal_size().columns - 1
    print(f"\r\x1b[2K{line[:width]}", end="", file=sys.stderr, flush=True)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A file or a directory.")],
    base: Base = None,
    as_json: AsJson = False,
) -> None:
    """What is this file, for which base model, and is it healthy?"""
    try:
        found = inspection(path, base)
    except SoftbridgeError as error:
        _refuse(error, as_json)
    if as_json:
        _print_json(found)
    else:
        _out().print(prompt_table(found))


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="The checkpoint to read.")],
    target: Annotated[
        Path, typer.Argument(help="The directory to write; or a file, if the format has only one and it ends alike.")
    ],
    to: Annotated[str, typer.Option("--to", help="The format to write.", metavar="FORMAT")],
    base: Base = None,
    source_format: Annotated[
        str | None,
        typer.Option("--from", help="The format to read; recognised by content if left out.", metavar="FORMAT"),
    ] = None,
    accept: Annotated[
        list[str] | None,
        typer.Option("--accept", help="Accept a condition that a refusal named; may be repeated.", metavar="NAME"),
    ] = None,
    encoding: Annotated[
        str | None, typer.Option("--encoding", help="How to store tensors; see 'softbridge formats'.", metavar="NAME")
    ] = None,
    dtype: Annotated[
        StoredDtype | None, typer.Option("--dtype", help="Store the numbers in this; the report says what it rounds.")
    ] = None,
    task: Annotated[
        int | None, typer.Option("--task", help="Which task of a multitask prompt to convert.", min=0)
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(
            "--part",
            help="Convert one part only: encoder, self or cross (a prefix), encoder-input or decoder-input.",
            metavar="NAME",
        ),
    ] = None,
    drop: Annotated[
        list[Dropped] | None,
        typer.Option("--drop", help="Leave this out of the source, stale or not; may be repeated."),
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
    as_json: AsJson = False,
) -> None:
    """Convert a checkpoint to another toolkit's format. Refuses whatever would compute another function."""
    from softbridge.conversion import convert as run

    try:
        with _quiet():
            report = run(
                source,
                target,
                to,
                base,
                format=source_format,
                accept=accept or (),
                encoding=encoding,
                dtype=None if dtype is None else dtype.value,
                task=task,
                part=part,
                drop=[name.value for name in drop or ()],
                trained_on=trained_on,
                verify=verify,
                overwrite=overwrite,
            )
    except SoftbridgeError as error:
        _refuse(error, as_json)
    if as_json:
        _print_json(
            {
                "source": {"path": str(report.source.path), "format": report.source.format.name},
                "target": {"path": str(report.path), "format": report.target},
                "steps": [vars(step) for step in report.steps],
                "advice": list(report.advice),
                "certificate": None if report.certificate is None else report.certificate.to_json(),
            }
        )
        return
    console = _out()
    console.print(
        Text.assemble(
            shown(f"{report.source.format.name} {report.source.path} -> {report.target} "), shown(report.path, "bold")
        )
    )
    console.print(steps_table(report.steps))
    if report.certificate is not None:
        console.print(certificate_table(report.certificate))
    if report.advice:
        console.print(Text.assemble("to run it in ", shown(report.target), " itself:"))
        for line in report.advice:
            console.print(Text.assemble("- ", shown(line)))


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
    """What would a conversion come to, and why? Without --base: for absolute, rotary and relative positions."""
    from softbridge.explain import explanations

    try:
        found = explanations(source, target, method, base)
    except SoftbridgeError as error:
        _refuse(error, as_json)
    if as_json:
        _print_json([{"base": name, **explanation.to_json()} for name, explanation in found])
    else:
        _out().print(explanation_table(found))


@app.command()
def matrix(as_json: AsJson = False) -> None:
    """What every conversion of every method comes to: the README's tables, from what is installed here."""
    from softbridge.matrix import markdown
    from softbridge.matrix import matrix as run

    try:
        found = run()
    except SoftbridgeError as error:
        _refuse(error, as_json)
    if as_json:
        _print_json([{"base": family, **one.to_json()} for cell in found.values() for family, one in cell.items()])
    else:
        _out().out(markdown(found), end="", highlight=False)


Weights = Annotated[
    bool, typer.Option("--weights", help="Use the base model's own weights, not random ones of its structure.")
]
Working = Annotated[Dtype, typer.Option("--dtype", help="The working precision, reported beside float64.")]
Seed = Annotated[int, typer.Option("--seed", help="Of texts and random weights.", min=0, max=2**32 - 1)]
Texts = Annotated[
    Path | None,
    typer.Option(
        "--texts",
        help="Run these instead of random tokens: a text a line, for the base model's tokenizer; or JSON with 'ids'.",
    ),
]
Memory = Annotated[
    int | None,
    typer.Option("--memory", help="Bytes that a model without weights may take; larger ones run in pieces.", min=1),
]
AsLevel = Annotated[
    Alike,
    typer.Option(
        "--level",
        help="What counts as the same: no bit differs; float64 agrees; or no more than the working precision rounds.",
    ),
]
AsPage = Annotated[
    Path | None, typer.Option("--html", help="Write the certificate as a page with plots, too.", metavar="FILE")
]
NeededBase = Annotated[
    str, typer.Option("--base", help="A directory, a config.json, or a hub id.", metavar="MODEL_OR_CONFIG")
]


@app.command()
def verify(
    a: Annotated[Path, typer.Argument(help="The reference; or a certificate.json, to see whether it still holds.")],
    b: Annotated[Path | None, typer.Argument(help="What is compared with it.")] = None,
    base: Base = None,
    weights: Weights = False,
    dtype: Working = Dtype.float32,
    seed: Seed = 0,
    texts: Texts = None,
    memory: Memory = None,
    python: Annotated[
        list[str] | None,
        typer.Option(
            "--python",
            help="Run the side of this engine's toolkit with another environment's interpreter; may be repeated.",
            metavar="ENGINE=PATH",
        ),
    ] = None,
    level: AsLevel = Alike.exact,
    html: AsPage = None,
    as_json: AsJson = False,
) -> None:
    """Do two checkpoints compute the same function? Exit status 0 same, 1 different, 2 refused or not to be judged."""
    from softbridge.verification import verify as run
    from softbridge.verification.structure import BUDGET

    if b is None:
        _verify_again(a, base, html, as_json)

    def certify() -> Certificate:
        if b is None or base is None:
            raise SoftbridgeError("no base model", "a directory, a config.json, or a hub id", "give it with --base")
        elsewhere = dict(_assignment(one) for one in python or ())
        return run(
            a,
            b,
            base,
            weights=weights,
            dtype=dtype.value,
            seed=seed,
            texts=_token_ids(texts, base),
            python=elsewhere,
            level=level.value,
            memory=BUDGET if memory is None else memory,
        )

    _show_certificate(certify, html, as_json)


@app.command()
def probe(
    path: Annotated[Path, typer.Argument(help="A file or a directory.")],
    base: NeededBase,
    output: Annotated[Path, typer.Option("--output", help="The file to write, .safetensors.")],
    weights: Weights = False,
    dtype: Working = Dtype.float32,
    seed: Seed = 0,
    texts: Texts = None,
    memory: Memory = None,
    against: Annotated[
        Path | None,
        typer.Option("--against", help="The other side, whose files, too, say what is claimed of the two."),
    ] = None,
    window: Annotated[
        int | None, typer.Option("--window", help="What a sliding window is shortened to, for both sides alike.", min=1)
    ] = None,
) -> None:
    """Record what one checkpoint computes, to compare it with another that runs in another environment."""
    from softbridge import untrusted
    from softbridge.verification import probe as run
    from softbridge.verification.recording import pack

    try:
        with _quiet():
            recording = run(
                path,
                base,
                against=against,
                weights=weights,
                dtype=dtype.value,
                seed=seed,
                texts=_token_ids(texts, base),
                window=window,
                **({} if memory is None else {"memory": memory}),
            )
            untrusted.write_file(output, pack(recording))
    except SoftbridgeError as error:
        _refuse(error, as_json=False)
    _out().print(shown(f"{path}, run by {recording.side.engine}: {output}"))


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="The reference, as 'softbridge probe' wrote it.")],
    b: Annotated[Path, typer.Argument(help="What is compared with it.")],
    level: AsLevel = Alike.exact,
    html: AsPage = None,
    as_json: AsJson = False,
) -> None:
    """Judge two recordings. Exit status as of 'verify'."""
    from softbridge.verification import compare as run
    from softbridge.verification.recording import unpack

    _show_certificate(lambda: run(unpack(a), unpack(b), level=level.value), html, as_json)


def _write_page(certificate: Certificate, path: Path | None) -> None:
    from softbridge import untrusted
    from softbridge.cli.page import page

    if path is not None:
        untrusted.write_file(path, page(certificate).encode())


def _show_certificate(certify: Callable[[], Certificate], html: Path | None, as_json: bool) -> NoReturn:
    try:
        with _quiet():
            certificate = certify()
        _write_page(certificate, html)
    except SoftbridgeError as error:
        _refuse(error, as_json)
    if as_json:
        _print_json(certificate.to_json())
    else:
        _out().print(certificate_table(certificate))
    raise typer.Exit(certificate.exit_status)


def _verify_again(path: Path, base: str | None, html: Path | None, as_json: bool) -> NoReturn:
    from softbridge.verification.again import verify_again

    try:
        with _quiet():
            again = verify_again(path, base)
        _write_page(again.certificate, html)
    except SoftbridgeError as error:
        _refuse(error, as_json)
    if as_json:
        found = {"holds": again.holds, "recorded": again.recorded, "changes": list(again.changes)}
        _print_json({**found, "certificate": again.certificate.to_json()})
    else:
        console = _out()
        console.print(certificate_table(again.certificate))
        for change in again.changes:
            console.print(shown(change))
        console.print("the certificate holds" if again.holds else "the certificate does not hold")
    raise typer.Exit(0 if again.holds else 1 if again.changes else again.certificate.exit_status)


def _assignment(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise SoftbridgeError(f"--python {text}", "ENGINE=PATH", "name the engine whose toolkit is installed there")
    return name, path


def _token_ids(path: Path | None, base: str) -> list[list[int]] | None:
    """The texts of a file as token ids."""
    from softbridge.verification.texts import read_texts

    return None if path is None else read_texts(path, base)


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
        _refuse(error, as_json)
    if as_json:
        _print_json(found.to_json())
    else:
        _out().print(diagnosis_table(found))


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
        _refuse(error, as_json)
    if as_json:
        _print_json(rows)
    else:
        _out().print(table)


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
    from softbridge.cli.demo import run

    try:
        with _quiet():
            certificate = run(source, target, directory, _Console(quiet=True) if as_json else _out())
    except SoftbridgeError as error:
        _refuse(error, as_json)
    if as_json:
        _print_json(certificate.to_json())
    raise typer.Exit(certificate.exit_status)
