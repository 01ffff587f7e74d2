"""What belongs to one call of a model, and to no other that runs at the same time.

Hooks and modules are shared: by the threads of a server, by the replicas of `nn.DataParallel`. So what they must
remember from one end of a call to the other they keep for each thread. And a stack's hooks run when it is called; its
class sees to it that they run, too, where its `forward` is called past `__call__`.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from torch import nn

from softbridge.attachment.trainer_model import Derived, derived

T = TypeVar("T")


class Own(threading.local, Generic[T]):
    """A value for each thread, a fresh one where a thread asks for the first time; copies start afresh.

    torch.compile follows it, in one graph, as long as it is the value that changes: what it assigns to a thread-local
    attribute itself is lost.

    Args:
        make: makes the value; a class.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self.make = make
        self.now = make()

    def __reduce__(self) -> tuple[Any, ...]:
        return Own, (self.make,)


class Entry:
    """Whether the hooks of a stack ran, and its forward is next."""

    def __init__(self) -> None:
        self.open = False


class Switch:
    """Whether a prompt is switched off: for the calls of a thread.

    The replicas of `nn.DataParallel` run in threads of their own, on behalf of the one that switched.
    """

    def __init__(self) -> None:
        self._depth: Own[_Depth] = Own(_Depth)
        self._all = _Depth()

    @contextmanager
    def off(self) -> Iterator[None]:
        """Off inside the ``with``."""
        mine = self._depth.now
        mine.off += 1
        self._all.off += 1
        try:
            yield
        finally:
            mine.off -= 1
            self._all.off -= 1

    def is_off(self, module: nn.Module) -> bool:
        """Whether a call of this module, or of this replica of it, is to run without the prompt."""
        return (self._all if "_is_replica" in module.__dict__ else self._depth.now).off > 0


class _Depth:
    def __init__(self) -> None:
        self.off = 0


_ENTRY = "_softbridge_entry"


class Hooked(Derived):
    """What the class of a stack has before all that its own has: `forward` runs the hooks, called directly, too."""

    @classmethod
    def members(cls, plain: type) -> Mapping[str, Any]:
        """A `forward` with the plain one's signature."""
        inner: Any = plain

        @functools.wraps(inner.forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            entry = self.__dict__[_ENTRY].now
            if not entry.open:
                return self(*args, **kwargs)
            entry.open = False
            return inner.forward(self, *args, **kwargs)

        return {"forward": forward}


def hook(stack: Any) -> Own[Entry]:
    """Give a stack its class. Its hooks open the entry when they have run. `unhook` undoes it."""
    entry = Own(Entry)
    plain: Any = type(stack)
    stack.__dict__[_ENTRY] = entry
    stack.__class__ = derived(Hooked, plain)
    return entry


def unhook(stack: Any) -> None:
    """Give it back the class that it had."""
    if isinstance(stack, Hooked):
        stack.__class__ = type(stack).plain
        del stack.__dict__[_ENTRY]


def past_hooks(stack: Any) -> Callable[..., Any]:
    """The stack's forward, without the hooks, as often as it is called."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        if isinstance(stack, Hooked):
            stack.__dict__[_ENTRY].now.open = True
        return stack.forward(*args, **kwargs)

    return forward
