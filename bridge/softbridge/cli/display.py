"""What a person sees while a command works: one line on a terminal, or with ``--verbose`` how long each stage took."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Timer

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column

from softbridge.cli.tables import shown

#: Seconds that a command may take before anything is shown of it.
PATIENCE = 1.0


def watched() -> bool:
    """Whether a person sees standard error, on a terminal that can take a line back."""
    return sys.stderr.isatty() and Console(stderr=True).is_interactive


@contextmanager
def line() -> Iterator[Callable[[str], None]]:
    """A line on standard error with what is being done. It appears after a second, and goes away at the end.

    Yields:
        What to call with what is being done.
    """
    what = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
    progress = Progress(
        SpinnerColumn(),
        what,
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    task = progress.add_task("")
    timer = Timer(PATIENCE, progress.start)
    timer.daemon = True
    timer.start()
    try:
        yield lambda text: progress.update(task, description=shown(text).plain)
    finally:
        timer.cancel()
        timer.join()
        progress.stop()


def tell_time(what: str, seconds: float) -> None:
    """Print on standard error how long a stage took."""
    print(f"{shown(what).plain}: {seconds:.2f} s", file=sys.stderr)
