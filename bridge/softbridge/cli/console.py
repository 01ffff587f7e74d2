"""What every command shares: the application, its options, where output goes, and how errors leave."""

from __future__ import annotations

import functools
import inspect
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from contextvars import ContextVar
from typing import Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.text import Text
from typer.core import TyperGroup

from softbridge.cli.display import line, tell_time, watched
from softbridge.cli.tables import shown_lines
from softbridge.errors import DifferentError, SoftbridgeError, UntestedVersionWarning


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
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
DIFFERENT = 1
REFUSED = 2
DEFECT = 3
UNREAD = 141  # what a shell reports of a program that SIGPIPE ends
_loudness: ContextVar[Literal["quiet", "normal", "verbose"]] = ContextVar("loudness", default="normal")
#: What a prompt and a base model may be given as, for the help. What looks like rich's markup is a hub id's brackets;
#: with spaces between them it fits into a narrow column.
PROMPT = escape("a file, a directory, or a hub id (owner/name [/folder] [@revision]). A local path comes first.")
BASE = "The base model: a directory, a config.json, or a hub id (owner/name). A local path comes first."
Base = Annotated[
    str | None,
    typer.Option("--base", help=BASE, metavar="MODEL_OR_CONFIG"),
]
NeededBase = Annotated[str, typer.Option("--base", help=BASE, metavar="MODEL_OR_CONFIG")]


Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing of what was done. Errors are told.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Show what toolkits log and warn of, and how long each stage took.")
]


def speak(quiet: bool, verbose: bool) -> None:
    """Act on ``--quiet`` and ``--verbose`` from here on.

    Raises:
        typer.BadParameter: both are given.
    """
    if quiet and verbose:
        raise typer.BadParameter("one of --quiet and --verbose, not both.")
    _loudness.set("quiet" if quiet else "verbose" if verbose else "normal")


def command(*examples: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a command of its own name, with ``--quiet`` and ``--verbose`` as options.

    Args:
        examples: command lines for its help.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(*, quiet: bool, verbose: bool, **given: Any) -> None:
            if quiet or verbose:  # else what was said before the command's name holds
                speak(quiet, verbose)
            try:
                function(**given)
            finally:
                _loudness.set("normal")

        own = inspect.signature(function, eval_str=True)
        more = {"quiet": Quiet, "verbose": Verbose}
        run.__signature__ = own.replace(  # type: ignore[attr-defined]  # what typer looks at
            parameters=[
                *own.parameters.values(),
                *(
                    inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=a)
                    for n, a in more.items()
                ),
            ]
        )
        app.command(epilog="\n\n".join(map(escape, ("Examples:", *examples))))(run)
        return function

    return register


def completing(names: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """What a shell is offered for an option: those of the names that begin with what was typed."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names() if name.startswith(incomplete)]

    return complete


def format_names() -> Iterable[str]:
    """All formats, for completion; they are looked up when somebody asks."""
    from softbridge.plugin.registry import formats

    return formats()


def engine_names() -> Iterable[str]:
    """All engines, likewise."""
    from softbridge.plugin.registry import engines

    return engines()


def method_names() -> Iterable[str]:
    """All methods, likewise."""
    from softbridge.lowering.examples import METHODS

    return METHODS


def format_option(flag: str, help: str) -> Any:
    """An option that takes the name of a format."""
    return typer.Option(flag, help=help, metavar="FORMAT", autocompletion=completing(format_names))


def one_of(names: Iterable[str], flag: str, help: str) -> Any:
    """An option that takes one of these names, which are a list of the core's."""
    known = tuple(names)

    def parse(text: str) -> str:
        if text not in known:
            raise typer.BadParameter(f"{text!r} is not one of {', '.join(map(repr, known))}.")
        return text

    offered = completing(lambda: known)
    told = f"{help} One of: {', '.join(known)}."
    return typer.Option(flag, help=told, parser=parse, metavar="NAME", autocompletion=offered)


Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there already.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a program instead of a table.")]


class Output(Console):
    """Standard output. Where nobody reads it, the command ends with the exit status of that."""

    def on_broken_pipe(self) -> None:
        try:
            super().on_broken_pipe()
        except SystemExit as end:
            raise SystemExit(UNREAD) from end


def printer() -> Console:
    """Standard output, for what was asked for: 120 columns wide where neither a terminal nor COLUMNS says it."""
    return _output(silent=False)


def reporter() -> Console:
    """Standard output, for what is said of what was done: ``--quiet`` leaves it out."""
    return _output(silent=_loudness.get() == "quiet")


def _output(*, silent: bool) -> Console:
    known = Console().is_terminal or "COLUMNS" in os.environ
    return Output(file=sys.stdout, width=None if known else 120, quiet=silent)


def refuse(error: SoftbridgeError, as_json: bool) -> NoReturn:
    """Say why and leave, with the exit status of a refusal; or that of a difference, if that is why."""
    if as_json:
        refused = {"kind": type(error).__name__, "found": error.found, "expected": error.expected}
        obstacles = [vars(obstacle) for obstacle in getattr(error, "obstacles", ())]
        print_json({"refused": {**refused, "remedy": error.remedy, "obstacles": obstacles}})
    message = Text.assemble(("refused:", "bold red"), " ", shown_lines(str(error)))
    Console(stderr=True, soft_wrap=True).print(message)
    raise typer.Exit(DIFFERENT if isinstance(error, DifferentError) else REFUSED)


def print_json(value: Any) -> None:
    """Data on standard output: sorted keys, two spaces."""
    printer().out(json.dumps(value, indent=2, sort_keys=True), highlight=False)


def draws() -> bool:
    """Whether somebody watches standard error, and wants to see how far the work is."""
    return _loudness.get() == "normal" and watched()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what toolkits print, log and warn of off the terminal: what matters of it is in the certificate.

    What softbridge itself warns of comes through, and a line that goes away again says what is being done. With
    ``--quiet`` neither does. With ``--verbose`` all of it does, on standard error, with how long each stage took.
    """
    from softbridge.progress import watching

    loudness = _loudness.get()
    if loudness == "verbose":
        with redirect_stdout(sys.stderr), watching(lambda what: None, tell_time):
            yield
        return
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with ExitStack() as stack:
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            if loudness == "normal":
                warnings.simplefilter("default", UntestedVersionWarning)
            stack.enter_context(_no_bars())
            if draws():
                stack.enter_context(watching(stack.enter_context(line())))
            yield
    finally:
        logging.disable(before)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Let transformers draw no progress bar, be it imported already or not."""
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
