"""What a server is: an engine that runs no transformers model, but one of its own, and answers with prompts in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from softbridge.arrays import Array
from softbridge.errors import Obstacle


@dataclass(frozen=True)
class Request:
    """One text.

    Attributes:
        tokens: its T token ids, without anything in the place of virtual tokens: the server knows what it needs there.
        prompt: the name under which the server was given a prompt's files, or None: the base model alone.
    """

    tokens: tuple[int, ...]
    prompt: str | None = None


@dataclass(frozen=True, eq=False)
class Answer:
    """The likeliest continuation of a text, token by token.

    Attributes:
        tokens: the N token ids that were picked, [N].
        log_probabilities: of every token of the vocabulary at each of the N steps, [N, V], float64.
    """

    tokens: Array
    log_probabilities: Array


#: Answers several requests in one batch, where the server has batches, each with so many tokens.
Ask = Callable[[Sequence[Request], int], Sequence[Answer]]


class Server(Protocol):
    """Serves a base model, with any number of prompts from files of its own format."""

    name: str
    summary: str

    def unavailable(self) -> str | None:
        """Why this server cannot be used in this environment, or None. Must not import it."""
        ...

    def version(self) -> str:
        """What runs: its distributions and their versions, and the dtype in which it computes. Only where available."""
        ...

    def obstacles(self, config: Any) -> Sequence[Obstacle]:
        """What stands against serving a base model of this configuration. Empty if nothing does."""
        ...

    def open(self, base: Path, prompts: Mapping[str, Path], scratch: Path) -> AbstractContextManager[Ask]:
        """Start it.

        Args:
            base: a directory that transformers' `save_pretrained` wrote, with weights in float32; no tokenizer.
            prompts: name -> what was written in the server's own format: a file, or a directory.
            scratch: an empty directory that is deleted afterwards.

        Raises:
            EngineError: it does not start, or a prompt's files are not for this base model. A prompt that it does not
                know is one when it is asked, and never served bare.
        """
        ...
