"""Processes that live as long as there is work, and of which one may die without the others.

`concurrent.futures` gives up all that is waiting when one process dies, and `multiprocessing.Pool` waits for it for
ever. Here the task that it had is reported, another process takes its place, and the rest goes on.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from softbridge.errors import EngineError

#: Seconds that a worker has to clean up, when it is interrupted, before it is killed.
PATIENCE = 10.0


@dataclass(frozen=True)
class Death:
    """The process that had a task ended before it answered.

    Attributes:
        code: its exit status; of a signal, that number below zero.
    """

    code: int | None

    def __str__(self) -> str:
        if self.code is None or self.code >= 0:
            return f"its process ended with the status {self.code}"
        name = signal.Signals(-self.code).name if -self.code in set(signal.Signals) else str(-self.code)
        return f"its process was ended by {name}"


@dataclass
class _Running:
    process: Any
    task: Any = None
    ready: bool = False


@dataclass
class Pool:
    """Worker processes that each make one function and call it with task after task.

    Attributes:
        make: called once in each process, with `arguments`: returns the function. All of it is pickled.
        jobs: how many processes there are at most.
        preload: modules to import before anything is forked.
    """

    make: Callable[..., Callable[[Any], Any]]
    arguments: tuple[Any, ...]
    jobs: int
    preload: tuple[str, ...] = ()
    _workers: dict[Connection, _Running] = field(default_factory=dict)
    _said: list[tuple[Any, Any]] = field(default_factory=list)

    def results(self, tasks: Iterable[Any], begin: Callable[[Any], None]) -> Generator[tuple[Any, Any], None, None]:
        """(task, what the function returned or `Death`) in the order in which they are done.

        If it is left early, by an exception or an interruption, the workers are interrupted, and clean up.

        Args:
            begin: called with each task before a worker is given it.

        Raises:
            EngineError: a process ended before it was ready.
            Exception: what `make` raised.
        """
        waiting = list(tasks)[::-1]
        context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
        if self.preload and sys.platform == "linux":
            context.set_forkserver_preload(list(self.preload))
        try:
            while len(self._workers) < min(self.jobs, len(waiting)):
                self._start(context)
            while self._workers:
                for end in wait(list(self._workers)):
                    assert isinstance(end, Connection)
                    running = self._workers[end]
                    try:
                        kind, value = end.recv()
                    except (EOFError, OSError):
                        yield from self._buried(end)
                        if waiting:
                            self._start(context)
                        continue
                    if kind == "failed":
                        raise value
                    task, running.task, running.ready = running.task, None, True
                    if kind == "done":
                        yield task, value
                    if not waiting:
                        del self._workers[end]
                        end.close()  # which ends the worker
                        running.process.join()
                        continue
                    running.task = waiting.pop()
                    begin(running.task)
                    with suppress(OSError):  # it is dead: the next look says so
                        end.send(running.task)
        finally:
            self._stop()

    def rest(self) -> list[tuple[Any, Any]]:
        """What was done when `results` was left early, and not yet said."""
        return self._said

    def _start(self, context: Any) -> None:
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, self.make, self.arguments, self.jobs), daemon=True)
        process.start()
        theirs.close()
        self._workers[ours] = _Running(process)

    def _buried(self, end: Connection) -> Iterator[tuple[Any, Death]]:
        running = self._workers.pop(end)
        running.process.join()
        end.close()
        if not running.ready:
            raise EngineError(
                f"a worker process that ended with the status {running.process.exitcode} before it began",
                "processes that import the script that starts them, and begin nothing by that",
                "put what the script does below if __name__ == '__main__':, or leave jobs out",
            )
        if running.task is not None:
            yield running.task, Death(running.process.exitcode)

    def _stop(self) -> None:
        """Interrupt those that are at work, and end the others, of which some are still starting."""
        for running in self._workers.values():
            if running.task is None:
                running.process.kill()
            elif running.process.is_alive():
                with suppress(OSError):
                    os.kill(running.process.pid, signal.SIGINT)
        for end, running in self._workers.items():
            running.process.join(PATIENCE)
            if running.process.is_alive():
                running.process.kill()
                running.process.join()
            with suppress(EOFError, OSError):
                while running.task is not None and end.poll():
                    kind, value = end.recv()
                    if kind == "done":
                        self._said.append((running.task, value))
                        running.task = None
            end.close()
        self._workers.clear()


def _work(end: Connection, make: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...], jobs: int) -> None:
    """What a worker does: say that it is ready, then answer task after task, until nobody asks."""
    signal.signal(signal.SIGINT, _interrupted_once)
    try:
        _quiet()
        try:
            _share_processors(jobs)
            function = make(*arguments)
        except Exception as error:
            end.send(("failed", error))
            return
        end.send(("ready", None))
        while True:
            end.send(("done", function(end.recv())))
    except (EOFError, OSError, KeyboardInterrupt):
        return


def _interrupted_once(number: int, frame: Any) -> None:
    """Nothing that comes after it may interrupt the cleaning up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def _quiet() -> None:
    """What toolkits say while they run is not for the terminal that all workers share."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    os.close(nowhere)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def _share_processors(jobs: int) -> None:
    """Give each worker its part of the processors' threads. torch, if it comes later, reads the variable."""
    share = max(1, (os.cpu_count() or 1) // jobs)
    os.environ.setdefault("OMP_NUM_THREADS", str(share))
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(min(torch.get_num_threads(), share))
