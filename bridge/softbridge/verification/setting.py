"""What a comparison is run on: which small models or weights, in which precision, of which versions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from softbridge.base.model import BaseModel
from softbridge.errors import EngineError
from softbridge.plugin.hookspecs import Engine
from softbridge.prompt.soft_prompt import SoftPrompt
from softbridge.verification.bench import Subject
from softbridge.verification.run import choose_engine
from softbridge.verification.small_models import Structure, structures
from softbridge_compat import versions


def plan_of(
    subjects: Sequence[Subject], base: BaseModel, weights: bool, memory: int
) -> tuple[list[tuple[Engine, str]], list[Structure]]:
    """For each subject its engine, and why not its own toolkit's; and what to run of the model.

    That is all of it, or a small one whose layers the same engines run.
    """
    bare = None if weights else base.bare()
    model = bare or (base.weights(_float64()) if weights else base.structure(_float64()))
    chosen = [choose_engine(one.prompt, one.engine, model) for one in subjects]

    def runs(piece: Structure) -> bool:
        smaller, fitted = piece.base.bare(), [fitted_to(piece, one) for one in subjects]
        try:
            found = [choose_engine(one.prompt, one.engine, smaller)[0] for one in fitted if one is not None]
        except EngineError:
            return False
        return found == [engine for engine, _ in chosen]

    if weights:
        return chosen, [Structure(base)]
    return chosen, list(structures(base, bare, [subject.prompt for subject in subjects], runs, memory))


def is_gated(prompt: SoftPrompt) -> bool:
    """Whether the prompt weighs its keys and values anew for every input."""
    return any(part.gated for part in prompt.prefixes)


def weights_note(weights: bool, seed: int, pieces: Sequence[Structure]) -> str:
    """How the certificate calls the weights that were run."""
    return "the model's own" if weights else f"random, seed {seed}; {pieces[0].note}"


@cache
def versions_here() -> dict[str, str]:
    """Distribution -> installed version, of whatever can change a result."""
    return dict(versions())


def _float64() -> Any:
    import torch

    return torch.float64


def fitted_to(piece: Structure, subject: Subject) -> Subject | None:
    """What of a subject these layers see. Its files stand for it only as a whole."""
    prompt = piece.fit(subject.prompt)
    if prompt is None:
        return None
    return subject if prompt is subject.prompt else replace(subject, prompt=prompt, directory=None)
