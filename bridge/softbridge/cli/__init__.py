"""The command line. Prints and exits; nothing below it does.

Exit status: 0 done, or the same; 1 different; 2 refused, or could not be judged (the message says what was found, what
was expected and what to do); 3 a defect of softbridge: please report it with the traceback. As everywhere, 130 for an
interruption and 141 where nobody reads the output.
"""

from __future__ import annotations

import io
import signal
import sys
import traceback
from types import FrameType
from typing import Annotated

import typer

from softbridge.cli import bake, convert, look, show, verify  # noqa: F401  # each adds its commands
from softbridge.cli.console import DEFECT, Quiet, Verbose, app, printer, speak
from softbridge.cli.tables import shown_lines
from softbridge_compat import versions


def _place(name: str) -> int:
    return _FIRST.index(name) if name in _FIRST else len(_FIRST)


#: In the help, what a newcomer asks for first.
_FIRST = ("demo", "inspect", "convert", "verify", "explain", "doctor", "formats", "engines", "plugins", "matrix")
app.registered_commands.sort(key=lambda made: _place(made.callback.__name__ if made.callback else ""))


def main() -> None:
    """Run the command line; see the module for the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a character is no reason to fail
    interrupted = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    try:
        app(prog_name="softbridge")
    except Exception:
        if interrupted:  # a module of C that was being imported makes another error of it
            raise KeyboardInterrupt from None
        lines = shown_lines(traceback.format_exc()).plain
        print(f"{lines}this is a defect of softbridge: please report it, with the lines above", file=sys.stderr)
        sys.exit(DEFECT)
    finally:
        signal.signal(signal.SIGINT, before)


def _version(wanted: bool) -> None:
    if wanted:
        printer().out(" ".join(f"{name} {version}" for name, version in versions().items()), highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Versions of what can change a result.", callback=_version, is_eager=True)
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    speak(quiet, verbose)
