"""What every command shares: the application, its options, where output goes, and how errors leave."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from softbridge.cli.tables import shown_lines
from softbridge.errors import SoftbridgeError


class _Group(TyperGroup):
    """Typer exits with status 1 on two unexpected exceptions, one a closed pipe; here status 1 means `different`."""

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
Base = Annotated[
    str | None,
    typer.Option("--base", help="The base model: a directory, a config.json, or a hub id.", metavar="MODEL_OR_CONFIG"),
]


def one_of(names: Iterable[str], flag: str, help: str) -> Any:
    """An option that takes one of these names, which are a list of the core's."""
    known = tuple(names)

    def parse(text: str) -> str:
        if text not in known:
            raise typer.BadParameter(f"{text!r} is not one of {', '.join(map(repr, known))}.")
        return text

    return typer.Option(flag, help=help, parser=parse, metavar=f"[{'|'.join(known)}]")


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a program instead of a table.")]


class Output(Console):
    """Standard output. Where nobody reads it, the command ends with the exit status of that."""

    def on_broken_pipe(self) -> None:
        try:
            super().on_broken_pipe()
        except SystemExit as end:
            raise SystemExit(UNREAD) from end


def printer() -> Console:
    """Standard output, 120 columns wide where it is no terminal."""
    return Output(width=None if Console().is_terminal else 120)


def refuse(error: SoftbridgeError, as_json: bool) -> NoReturn:
    """Say why and leave, with the exit status of a refusal."""
    if as_json:
        refused = {"kind": type(error).__name__, "found": error.found, "expected": error.expected}
        obstacles = [vars(obstacle) for obstacle in getattr(error, "obstacles", ())]
        print_json({"refused": {**refused, "remedy": error.remedy, "obstacles": obstacles}})
    message = Text.assemble(("refused:", "bold red"), " ", shown_lines(str(error)))
    Console(stderr=True, soft_wrap=True).print(message)
    raise typer.Exit(REFUSED)


def print_json(value: Any) -> None:
    """Data on standard output: sorted keys, two spaces."""
    printer().out(json.dumps(value, indent=2, sort_keys=True), highlight=False)


@contextmanager
def quiet() -> Iterator[None]:
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
        with warnings.catch_warnings(), watching(_tell) if shows else _no_bars():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        if shows:
            _tell("")


@contextmanager
def _no_bars() -> Iterator[None]:
    """Let transformers draw no progress bar, be it imported already or not: nobody watches."""
    name, said = "HF_HUB_DISABLE_PROGRESS_BARS", sys.modules.get("transformers.utils.logging")
    before, drawing = os.environ.get(name), said is not None and said.is_progress_bar_enabled()
    os.environ[name] = "1"
    if said is not None and drawing:
        said.disable_progress_bar()
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
        if said is not None and drawing:
            said.enable_progress_bar()


def _tell(line: str) -> None:
    width = shutil.get_terminal_size().columns - 1
    print(f"\r\x1b[2K{line[:width]}", end="", file=sys.stderr, flush=True)
