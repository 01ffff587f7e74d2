"""Do two prompts compute the same function? Run both, each through its own toolkit, on the same inputs, and say.

Equality of two ways to run a prompt is a property of the architecture, so it shows on random weights of the same
attention geometry. A comparison proves nothing unless it would have noticed a difference, so every certificate states
how far the outputs move when the prompt is dropped, shifted or scrambled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from softbridge.base import BaseModel
from softbridge.errors import EngineError
from softbridge.hookspecs import Engine
from softbridge.lower import as_dtype
from softbridge.passes import DTYPES
from softbridge.prompt import SoftPrompt
from softbridge.verification.certificate import Certificate, Fault, Figure, Side
from softbridge.verification.comparison import Bench, Subject, capture, common_template, judge, loader_of
from softbridge.verification.probes import LENGTHS
from softbridge.verification.run import choose_engine
from softbridge.verification.structure import BUDGET, Structure, bare_model, structures

__all__ = ["Certificate", "Fault", "Figure", "Side", "Subject", "verify", "verify_prompts"]


def verify(
    a: str | Path,
    b: str | Path,
    base: Any,
    *,
    weights: bool = False,
    dtype: str = "float32",
    seed: int = 0,
    texts: Sequence[Sequence[int]] | None = None,
    memory: int = BUDGET,
) -> Certificate:
    """Compare the prompts in two files or directories.

    Args:
        a: path of the first, the reference.
        b: path of the second.
        base: whatever `BaseModel.resolve` takes.
        weights: use the base model's own weights instead of random ones of its structure.
        dtype: the working precision, reported beside float64.
        seed: of texts and weights.
        texts: token ids to run instead of random ones.
        memory: bytes that a model without weights may take; a larger one is run some layers at a time.

    Raises:
        SoftbridgeError: a file cannot be read, or no engine can run a prompt on this model.
    """
    from softbridge.conversion import read

    resolved = BaseModel.resolve(base)
    files = [read(a, resolved), read(b, resolved)]
    conditions = tuple(dict.fromkeys(name for loaded in files for name in loaded.conditions))
    steps = [step.name for loaded in files for step in loaded.steps if step.exactness == "rounding"]
    subjects = [Subject(str(one.path), one.prompt, one.format.engine, one.path) for one in files]
    if "head" in conditions:  # one side left it to its caller: the comparison gives it the other's
        head = next((one.prompt.head for one in files if one.prompt.head), {})
        subjects = [
            one if one.prompt.head else replace(one, prompt=replace(one.prompt, head=head), directory=None)
            for one in subjects
        ]
    asked = next((one.dtype for one in files if one.dtype is not None), "float32" if "dtype" in conditions else None)
    if asked is not None:  # one side was rounded
        kind = DTYPES[asked]
        subjects = [
            replace(one, prompt=as_dtype(one.prompt, kind), directory=None) if _is_wider(one, kind) else one
            for one in subjects
        ]
    return verify_prompts(
        subjects[0],
        subjects[1],
        resolved,
        conditions=conditions,
        rounded=tuple(dict.fromkeys(name for name in steps if name != "narrow")),
        weights=weights or "entry" in steps,  # what the embedding block makes of vectors depends on its weights
        dtype=dtype,
        seed=seed,
        texts=texts,
        memory=memory,
    )


def _is_wider(subject: Subject, kind: np.dtype[Any]) -> bool:
    arrays = [array for part in subject.prompt.parts for _, array in part.arrays()]
    return any(array.dtype.itemsize > kind.itemsize for array in arrays)


def verify_prompts(
    a: Subject,
    b: Subject,
    base: BaseModel,
    *,
    naive: SoftPrompt | None = None,
    conditions: Sequence[str] = (),
    rounded: Sequence[str] = (),
    weights: bool = False,
    dtype: str = "float32",
    seed: int = 0,
    texts: Sequence[Sequence[int]] | None = None,
    memory: int = BUDGET,
) -> Certificate:
    """Compare two prompts; the first is the reference.

    Args:
        naive: the first prompt's numbers as the second side would run them untold; its difference is reported.
        conditions: names of the conditions that were accepted, for the certificate.
        rounded: names of the conversion's steps that stored what they computed in float32, which bounds how closely
            the two can agree.
    """
    from softbridge_compat import versions

    base = base.with_head(a.prompt.head or b.prompt.head)
    window = None
    if "window" not in conditions:  # they must agree beyond it, too
        window = max(a.prompt.counted().values(), default=0) + LENGTHS[0] // 2
    template = common_template(a.prompt, b.prompt)
    model = base.weights(_float64()) if weights else bare_model(base) or base.structure(_float64())
    (engine_a, why_a), (engine_b, why_b) = (choose_engine(one.prompt, one.engine, model) for one in (a, b))
    del model

    def runs(smaller: Any) -> bool:
        try:
            chosen = [choose_engine(one.prompt, one.engine, smaller)[0].name for one in (a, b)]
        except EngineError:
            return False
        return chosen == [engine_a.name, engine_b.name]

    pieces = [Structure(base)] if weights else list(structures(base, [a.prompt, b.prompt], runs, memory))
    found = []
    for piece in pieces:
        subjects = [_fitted(piece, one) for one in (a, b)]
        if any(one is None for one in subjects):
            continue
        first, second = cast("tuple[Subject, Subject]", subjects)
        bench = Bench(piece.base, weights, seed, window, texts, template)
        reference = capture(bench, first, engine_a, dtype, faults=False)
        copy = None if naive is None else piece.fit(naive)
        found.append(judge(reference, capture(bench, second, engine_b, dtype, naive=copy), rounded))
    return Certificate(
        source=_side(a, engine_a, why_a),
        target=_side(b, engine_b, why_b),
        base=base.name,
        geometry=base.geometry,
        weights="the model's own" if weights else f"random, seed {seed}; {pieces[0].note}",
        seed=seed,
        dtype=dtype,
        conditions=tuple(conditions),
        rounded=tuple(rounded),
        longest=max(one.longest for one in found),
        scale=max(one.scale for one in found),
        islands=tuple(sorted({island for one in found for island in one.islands})),
        bound=max(one.bound for one in found),
        yardstick=max(one.yardstick for one in found),
        figures=_worst([one.figures for one in found]),
        faults=_least([one.faults for one in found]),
        naive=max((one.naive for one in found if one.naive is not None), default=None),
        versions=versions(),
    )


def _float64() -> Any:
    import torch

    return torch.float64


def _fitted(piece: Structure, subject: Subject) -> Subject | None:
    """What of a subject these layers see. Its files stand for it only as a whole."""
    prompt = piece.fit(subject.prompt)
    if prompt is None:
        return None
    return subject if prompt is subject.prompt else replace(subject, prompt=prompt, directory=None)


def _worst(found: Sequence[Sequence[Figure]]) -> tuple[Figure, ...]:
    """Of each probe the figures that are furthest apart; what is not judged on one piece is not judged."""
    named: dict[str, list[Figure]] = {}
    for figure in (figure for figures in found for figure in figures):
        named.setdefault(figure.probe, []).append(figure)
    return tuple(
        replace(
            figures[0],
            float64=max(figure.float64 for figure in figures),
            working=max(figure.working for figure in figures),
            judged=all(figure.judged for figure in figures),
            note="; ".join(dict.fromkeys(figure.note for figure in figures if figure.note)),
        )
        for figures in named.values()
    )


def _least(found: Sequence[Sequence[Fault]]) -> tuple[Fault, ...]:
    """Of each fault the piece that notices it least."""
    named: dict[str, list[Fault]] = {}
    for fault in (fault for faults in found for fault in faults):
        named.setdefault(fault.name, []).append(fault)
    return tuple(min(faults, key=lambda fault: fault.moved) for faults in named.values())


def _side(subject: Subject, engine: Engine, why: str) -> Side:
    files = {} if subject.prompt.origin is None else subject.prompt.origin.digests
    return Side(subject.path, engine.name, why, loader_of(subject, engine) is not None, subject.prompt.digest(), files)
