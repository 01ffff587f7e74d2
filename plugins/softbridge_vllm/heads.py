"""Which key/value heads one rank of vLLM's tensor parallelism has.

As `vllm/model_executor/layers/linear.py` (`QKVParallelLinear`) shares them out: where there are as many heads as ranks,
or more, each rank has the same number, in order. Where there are fewer, several neighbouring ranks have the same head.
"""

from __future__ import annotations

from softbridge.errors import EngineError


def heads_of(rank: int, ranks: int, heads: int) -> slice:
    """The heads of a rank, of all K.

    Args:
        rank: from 0.
        ranks: how many there are.
        heads: K of the whole model.

    Raises:
        EngineError: they cannot be shared out evenly. vLLM does not start such a model either.
    """
    if max(ranks, heads) % min(ranks, heads):
        raise EngineError(
            f"{heads} key/value heads on {ranks} ranks", "a multiple, one way or the other", "choose another number"
        )
    if heads >= ranks:
        count = heads // ranks
        return slice(rank * count, (rank + 1) * count)
    head = rank // (ranks // heads)
    return slice(head, head + 1)
