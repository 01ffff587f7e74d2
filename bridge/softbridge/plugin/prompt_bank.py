"""Many prompts beside one model: each row of a batch runs with the prompt of its own name, or with none.

    >>> bank = PromptBank({"sentiment": "prompts/sst2", "summary": "prompts/xsum"}, limit=2**30)
    >>> model = softbridge.attach(model, bank)
    >>> with bank.rows(["summary", "sentiment", None]):
    ...     model.generate(**batch)

This is the mixed-task batch of Lester et al. (2021, section 7): one model serves any number of tasks at once. Prompts
may be of different methods and lengths. They are read from disk when a row first asks for them; with a limit, those
that were asked for longest ago make room.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

from softbridge.errors import EngineError
from softbridge.prompt.soft_prompt import SoftPrompt

#: A prompt, or where its file or directory is.
Source: TypeAlias = SoftPrompt | str | Path

#: The name of each row's prompt; None: no prompt.
Names: TypeAlias = tuple[str | None, ...]

#: The names that were chosen, and how often each row is repeated, by the identity of the bank.
_ROWS: ContextVar[Mapping[int, tuple[Names, int]]] = ContextVar("softbridge_rows", default={})  # noqa: B039


@dataclass(frozen=True, eq=False)
class Entry:
    """What a name stands for. Another entry, even of the same source, is another prompt."""

    source: Source


class PromptBank(Mapping[str, Source]):
    """Prompts by name, and which of them the rows of the next calls run with.

    Args:
        prompts: name -> a prompt, or the path of its file or directory.
        limit: how many bytes of prompts may be held ready at once, for each model. Prompts of one call are held
            together, whatever the limit. None: all that were ever asked for.
    """

    def __init__(self, prompts: Mapping[str, Source] | None = None, limit: int | None = None) -> None:
        self.limit = limit
        self._entries: dict[str, Entry] = {}
        for name, source in (prompts or {}).items():
            self[name] = source

    def __setitem__(self, name: str, source: Source) -> None:
        self._entries[name] = Entry(source)

    def __delitem__(self, name: str) -> None:
        del self._entries[name]

    def __getitem__(self, name: str) -> Source:
        return self._entries[name].source

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def entry(self, name: str) -> Entry:
        """What the name stands for now.

        Raises:
            EngineError: nothing. It did when the rows were named: it has been removed since, perhaps by another thread.
        """
        found = self._entries.get(name)
        if found is None:
            raise EngineError(
                f"the prompt {name!r} was removed from the bank while rows were to run with it",
                "a bank that keeps a prompt until all calls with it are done",
                f"remove it after `with bank.rows(...)`, or add it again: bank[{name!r}] = prompt",
            )
        return found

    def entries(self) -> Container[Entry]:
        """What all names stand for now."""
        return frozenset(self._entries.values())

    @contextmanager
    def rows(self, names: str | Sequence[str | None] | None, copies: int = 1) -> Iterator[None]:
        """The prompts of the rows of all calls inside the ``with``, in this thread or task alone (`contextvars`).

        Args:
            names: one for each row, None for a row without a prompt; or one for all rows.
            copies: how often `generate` repeats each row: its ``num_beams`` or ``num_return_sequences``.

        Raises:
            EngineError: there is no prompt of some name.
        """
        wanted: Names = (names,) if names is None or isinstance(names, str) else tuple(names)
        unknown = sorted({name for name in wanted if name is not None and name not in self._entries})
        if unknown:
            raise EngineError(
                f"no prompt is called {', '.join(map(repr, unknown))}",
                f"names in the bank, which holds {len(self)}",
                "add it: bank[name] = prompt",
            )
        single = names is None or isinstance(names, str)
        token = _ROWS.set({**_ROWS.get(), id(self): (wanted, 0 if single else copies)})
        try:
            yield
        finally:
            _ROWS.reset(token)

    def names(self, batch: int) -> Names:
        """The name of each row's prompt, for a batch of so many rows.

        Raises:
            EngineError: none were chosen, or of another number.
        """
        chosen = _ROWS.get().get(id(self))
        if chosen is None:
            raise EngineError(
                "the model was called outside `with bank.rows(...)`, so no prompt was chosen for its rows",
                "the call inside `with bank.rows(names):`",
                "name the prompts; `bank.rows(None)` runs the model without any",
            )
        names, copies = chosen
        if copies == 0:
            return names * batch
        if len(names) == batch:  # the encoder runs before rows are repeated
            return names
        if len(names) * copies != batch:
            repeats = f", {copies} times each" if copies > 1 else ""
            remedy = "name a prompt, or None, for each row"
            if len(names) and batch % len(names) == 0:
                remedy += f"; where generate repeats each row: bank.rows(names, copies={batch // len(names)})"
            raise EngineError(f"a batch of {batch} rows, and {len(names)} names{repeats}", "as many as rows", remedy)
        return tuple(name for name in names for _ in range(copies))


class Sized(Protocol):
    """What takes bytes."""

    nbytes: int


T = TypeVar("T", bound=Sized)


class Recent(Generic[T]):
    """Values by key, as many as fit into a limit of bytes: those that were asked for longest ago go first."""

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.nbytes = 0
        self._values: OrderedDict[Any, T] = OrderedDict()

    def get(self, key: Any) -> T | None:
        """The value, which was asked for now."""
        value = self._values.get(key)
        if value is not None:
            self._values.move_to_end(key)
        return value

    def put(self, key: Any, value: T) -> T:
        """Hold a value that is not held, and return it."""
        self._values[key] = value
        self.nbytes += value.nbytes
        return value

    def shrink(self, keep: Container[Any], known: Container[Any]) -> None:
        """Let values go until the limit is kept, but not those of the keys to keep; and those of no known key."""
        for key in list(self._values):
            full = self.limit is not None and self.nbytes > self.limit
            if key not in known or (full and key not in keep):
                self.nbytes -= self._values.pop(key).nbytes

    def __len__(self) -> int:
        return len(self._values)
