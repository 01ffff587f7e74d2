"""Several prompts asked at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from softbridge.arrays import Array, from_torch
from softbridge.attachment.attach import attach, check_bare, detach
from softbridge.base.words import evaluating
from softbridge.errors import few, refusal
from softbridge.prompt.soft_prompt import SoftPrompt

How = Literal["majority", "mean"]


# Ensembling


def ensemble(model: Any, prompts: Sequence[SoftPrompt], batch: Mapping[str, Any], *, engine: str = "native") -> Array:
    """The logits [N, B, ..., C] that one model gives for one batch under each of N prompts. `vote` combines them.

    The prompts are attached one after another: N forward passes, and one copy of the model. Heads that ride along are
    loaded and put back. The model is left as it was.

    Args:
        model: a `PreTrainedModel` without a prompt.
        prompts: for this model, of any kinds and lengths.
        batch: what the model is called with.
        engine: the name of an engine.

    Raises:
        EngineError, LoweringError, BaseModelError: as `softbridge.attach`.
        ValueError: no prompts, or the logits are not of one shape.
    """
    if not prompts:
        raise refusal("no prompts", "at least one", "pass some")
    check_bare(model)
    logits = []
    with evaluating(model):
        for prompt in prompts:
            running = attach(model, prompt, engine)
            try:
                running.eval()
                logits.append(from_torch(running(**batch).logits))
            finally:
                detach(running)
    shapes = sorted({array.shape for array in logits})
    if len(shapes) > 1:
        raise refusal(
            f"logits of shapes {few(shapes)}",
            "one shape under all prompts",
            "use an engine that strips virtual tokens",
        )
    return np.stack(logits)


def vote(logits: npt.ArrayLike, how: How = "majority") -> Array:
    """The classes [...] that N prompts agree on, from their logits [N, ..., C] (Lester et al. 2021, section 6).

    - ``majority``: the class that is the largest one for most prompts. Between equally many votes the larger mean
      probability decides, and then the lower number.
    - ``mean``: the class with the largest probability, averaged over the prompts.

    Raises:
        ValueError: the logits are not [N, ..., C].
    """
    scores = np.asarray(logits).astype(np.float64)
    if scores.ndim < 2 or not scores.size or how not in get_args(How):
        raise refusal(
            f"logits of shape {scores.shape}, how={how!r}",
            f"[N, ..., C], for N prompts and C classes; {' or '.join(get_args(How))}",
            "stack the prompts' logits (ensemble does)",
        )
    exponents = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mean = (exponents / exponents.sum(axis=-1, keepdims=True)).mean(axis=0)
    if how == "mean":
        return np.asarray(mean.argmax(axis=-1))
    votes = (np.arange(scores.shape[-1]) == scores.argmax(axis=-1)[..., None]).sum(axis=0)
    leading = votes == votes.max(axis=-1, keepdims=True)
    return np.asarray(np.where(leading, mean, -1.0).argmax(axis=-1))
