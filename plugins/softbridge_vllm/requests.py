"""What a server makes of a request's token ids: which prompt they name, and where its keys and values go."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from softbridge.arrays import Array
from softbridge.errors import EngineError, few
from softbridge_vllm.shelf import Named


class Desk:
    """Finds the prefix that a request names.

    Args:
        prompts: what is served; see `softbridge_vllm.shelf`.
    """

    def __init__(self, prompts: Collection[Named]) -> None:
        self._known = {one.tokens: one for one in prompts if one.is_prefix}
        self._lengths = sorted({len(tokens) for tokens in self._known})
        self._markers = {one.tokens[0] for one in prompts}
        self._names = [one.name for one in prompts if one.is_prefix]

    def named(self, tokens: Sequence[int]) -> Named | None:
        """The prefix that these ids [P + T] begin with. None: no prompt is named.

        Raises:
            EngineError: they name one that is not here, or have no text behind it.
        """
        if not tokens or tokens[0] not in self._markers:
            return None
        for length in self._lengths:
            found = self._known.get(tuple(tokens[:length]))
            if found is not None:
                if len(tokens) == length:
                    raise EngineError(
                        f"a request for '{found.name}' without a text", "a token at least", "send a text with it"
                    )
                return found
        raise EngineError(
            f"a request that begins with {few(tokens)}, which names a prompt that is not here",
            f"the token ids of one of {few(self._names)}; or a text that does not begin with {tokens[0]}",
            "ask softbridge_vllm.client for the ids; an old copy of a prompt has other ids than its new state",
        )


def slots(blocks: Sequence[int], size: int, start: int, stop: int) -> tuple[Array, Array]:
    """Where virtual tokens stand in a paged cache: places [N], and the numbers [N] of the tokens that belong there.

    Block 0 is vLLM's null block: it stands for what a sliding window has left behind, and nobody reads it.

    Args:
        blocks: ids of a request's blocks, in order.
        size: of a block, in tokens.
        start: the first virtual token that is to be written.
        stop: P.
    """
    numbers = np.arange(start, stop)
    block = np.asarray(blocks, np.int64)[numbers // size]
    used = block != 0
    return (block * size + numbers % size)[used], numbers[used]
