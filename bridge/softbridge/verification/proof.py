"""Do two prompts compute the same function? Run both, each through its own toolkit, on the same inputs, and say.

Equality of two ways to run a prompt is a property of the architecture, so it shows on random weights of the same
attention geometry. A comparison proves nothing unless it would have noticed a difference, so every certificate states
how far the outputs move when the prompt is dropped, shifted or scrambled.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from softbridge.base.model import BaseModel
from softbridge.errors import SoftbridgeError
from softbridge.plugin.hookspecs import Engine
from softbridge.progress import announced, stage
from softbridge.prompt.container import digest_of
from softbridge.prompt.soft_prompt import SoftPrompt
from softbridge.untested import warn_of_untested
from softbridge.untrusted import json_bytes
from softbridge.verification.bench import Bench, Capture, Subject, capture, common_template, loader_of
from softbridge.verification.certificate import Certificate, Fault, Figure, Side
from softbridge.verification.claim import Claim, Level
from softbridge.verification.judge import judge
from softbridge.verification.recorded import Recording
from softbridge.verification.recording import check_same_setting, fingerprint, record_elsewhere
from softbridge.verification.run import threads
from softbridge.verification.setting import fitted_to, is_gated, plan_of, versions_here, weights_note
from softbridge.verification.sides import Pair, alone, claim_of, read_sides, subjects
from softbridge.verification.small_models import BUDGET


def verify(
    a: str | Path,
    b: str | Path,
    *,
    base: Any,
    weights: bool = False,
    dtype: str = "float32",
    seed: int = 0,
    texts: Sequence[Sequence[int]] | None = None,
    memory: int = BUDGET,
    level: Level = "exact",
    python: Mapping[str, str] | None = None,
) -> Certificate:
    """Compare the prompts in two files or directories.

    Args:
        a: path of the first, the reference.
        b: path of the second.
        base: whatever `BaseModel.resolve` takes.
        weights: use the base model's own weights instead of random ones of its structure.
        dtype: the working precision, reported in addition to float64.
        seed: of texts and weights.
        texts: token ids to run instead of random ones.
        memory: bytes that a model without weights may take; a larger one is run some layers at a time.
        level: what counts as the same; see `softbridge.verification.certificate.Level`.
        python: name of an engine -> the interpreter of the environment in which that engine is installed; the side
            that is this toolkit's runs there. The base must then be a path or a hub id.

    Raises:
        SoftbridgeError: a file cannot be read, or no engine can run a prompt on this model.
    """
    warn_of_untested()
    resolved = BaseModel.resolve(base)
    sides = read_sides(a, b, resolved)
    if python:
        recordings = _across(sides, base, python, weights=weights, dtype=dtype, seed=seed, texts=texts, memory=memory)
        return compare(*recordings, level=level)
    claim = claim_of(sides, weights=weights, level=level)
    return _verify(claim, sides, resolved, dtype=dtype, seed=seed, texts=texts, memory=memory)


def verify_claim(a: str | Path, b: str | Path, base: Any, claim: Claim, *, dtype: str, seed: int) -> Certificate:
    """Compare two prompts as a claim says, whatever their files say by now; see `verify` for the other arguments."""
    warn_of_untested()
    resolved = BaseModel.resolve(base)
    return _verify(claim, read_sides(a, b, resolved, claim), resolved, dtype=dtype, seed=seed)


def _verify(claim: Claim, sides: Pair, base: BaseModel, **setting: Any) -> Certificate:
    claim, first, second = subjects(claim, sides, base)
    return verify_prompts(first, second, base, claim=claim, **setting)


def _across(
    pair: Pair,
    base: Any,
    python: Mapping[str, str],
    *,
    weights: bool,
    dtype: str,
    seed: int,
    texts: Sequence[Sequence[int]] | None,
    memory: int,
) -> list[Recording]:
    """Record each side where its toolkit is."""
    files = (pair["source"], pair["target"])
    unknown = sorted(set(python) - {loaded.format.engine for loaded in files})
    if unknown or not isinstance(base, (str, Path)):
        raise SoftbridgeError(
            f"an interpreter for {', '.join(unknown)}, which runs neither side"
            if unknown
            else f"a base model given as {type(base).__name__}, to be handed to another interpreter",
            f"the engines of the two sides ({', '.join(one.format.engine for one in files)}) and a base by name",
            "correct --python, or give --base as a path or a hub id",
        )
    sides = []
    for loaded, other in (files, files[::-1]):
        where = python.get(loaded.format.engine)
        if where is None:
            setting: dict[str, Any] = {"dtype": dtype, "seed": seed, "texts": texts, "memory": memory}
            sides.append(probe(loaded.path, base=base, against=other.path, weights=weights, **setting))
            continue
        options = {"--base": base, "--against": other.path, "--dtype": dtype, "--seed": seed, "--memory": memory}
        arguments = [str(word) for option in options.items() for word in option]
        with tempfile.TemporaryDirectory() as scratch:
            if texts is not None:
                ids = Path(scratch) / "texts.json"
                ids.write_bytes(json_bytes({"ids": [list(text) for text in texts]}))
                arguments += ["--texts", str(ids)]
            arguments += ["--weights"] if weights else []
            sides.append(record_elsewhere(where, loaded.path, arguments, Path(scratch) / "recording.safetensors"))
    return sides


def verify_prompts(
    a: Subject,
    b: Subject,
    base: BaseModel,
    *,
    claim: Claim | None = None,
    naive: SoftPrompt | None = None,
    dtype: str = "float32",
    seed: int = 0,
    texts: Sequence[Sequence[int]] | None = None,
    memory: int = BUDGET,
) -> Certificate:
    """Compare two prompts; the first is the reference. See `verify` for the other arguments.

    Args:
        claim: in which sense they are the same; None: without any condition.
        naive: the first prompt's numbers as the second side would run them without position_ids. Its difference is
            reported.
    """
    claim = claim or Claim().about([a.prompt, b.prompt])
    weights = claim.weights
    base = base.with_head(a.prompt.head or b.prompt.head)
    template = common_template(a.prompt, b.prompt)
    captures: list[tuple[Capture, Capture]] = []
    with threads(None if weights else 1):
        chosen, pieces = plan_of([a, b], base, weights, memory)
        for piece in announced(pieces, pieces[0].note):
            subjects = [fitted_to(piece, one) for one in (a, b)]
            if any(one is None for one in subjects):
                continue
            first, second = cast("tuple[Subject, Subject]", subjects)
            cached = not (is_gated(a.prompt) or is_gated(b.prompt))
            frames = a.prompt.positions.start != b.prompt.positions.start
            bench = Bench(piece.base, weights, seed, claim.window, texts, template, cached, piece.first, frames)
            copy = None if naive is None else piece.fit(naive)
            captures.append(
                (
                    _captured(bench, first, chosen[0][0], dtype, faults=False),
                    _captured(bench, second, chosen[1][0], dtype, reference=False, naive=copy),
                )
            )
    return _certificate(
        (_side(a, *chosen[0]), _side(b, *chosen[1])),
        claim,
        captures,
        base=base.name,
        geometry=base.geometry,
        weights=weights_note(weights, seed, pieces),
        seed=seed,
        dtype=dtype,
        versions=versions_here(),
    )


def probe(
    path: str | Path,
    *,
    base: Any,
    against: str | Path | None = None,
    weights: bool = False,
    dtype: str = "float32",
    seed: int = 0,
    texts: Sequence[Sequence[int]] | None = None,
    memory: int = BUDGET,
    window: int | None = None,
) -> Recording:
    """Run one side of a comparison, to be judged against another that ran elsewhere; see `verify` for the arguments.

    Args:
        against: path of the other side, whose files, too, say what is claimed of the two; None: the side is run as it
            is.
        window: what a sliding window is shortened to; None: the prompt's length and a little, unless files were
            written under a condition on the window.
    """
    warn_of_untested()
    resolved = BaseModel.resolve(base)
    if against is None:
        claim, *sides = alone(path, resolved, weights=weights)
    else:
        pair = read_sides(path, against, resolved)
        claim, *sides = subjects(claim_of(pair, weights=weights), pair, resolved)
    claim = claim if window is None else replace(claim, window=window)
    subject, weights = sides[0], claim.weights
    resolved = resolved.with_head(subject.prompt.head)
    cached = not any(is_gated(side.prompt) for side in sides)
    captures, models = [], []
    with threads(None if weights else 1):
        chosen, pieces = plan_of([subject], resolved, weights, memory)
        template = common_template(subject.prompt, sides[-1].prompt)
        for piece in announced(pieces, pieces[0].note):
            part = fitted_to(piece, subject)
            if part is not None:
                bench = Bench(piece.base, weights, seed, claim.window, texts, template, cached, piece.first)
                captures.append(_captured(bench, part, chosen[0][0], dtype))
                models.append(fingerprint(bench))
    return Recording(
        side=_side(subject, *chosen[0]),
        setting={"seed": seed, "precision": dtype, "window": claim.window, "own weights": weights, "model": models},
        captures=tuple(captures),
        base=resolved.name,
        geometry=resolved.geometry,
        weights=weights_note(weights, seed, pieces),
        claim=claim,
        versions=versions_here(),
    )


def _captured(bench: Bench, subject: Subject, engine: Engine, dtype: str, **setting: Any) -> Capture:
    with stage(f"running {subject.path} in {engine.name}"):
        return capture(bench, subject, engine, dtype, **setting)


def compare(a: Recording, b: Recording, *, level: Level = "exact") -> Certificate:
    """Judge two recordings; the first is the reference. `level` is what counts as the same.

    Raises:
        SoftbridgeError: the recordings are of different probes or models.
    """
    check_same_setting(a, b)
    theirs = {f"{name} (target)": version for name, version in b.versions.items() if a.versions.get(name) != version}
    return _certificate(
        (a.side, b.side),
        replace(a.claim.joined(b.claim), level=level),
        list(zip(a.captures, b.captures, strict=True)),
        base=a.base,
        geometry=a.geometry,
        weights=a.weights,
        seed=a.setting["seed"],
        dtype=a.setting["precision"],
        versions={**a.versions, **theirs},
    )


def _certificate(
    sides: tuple[Side, Side], claim: Claim, captures: Sequence[tuple[Capture, Capture]], **known: Any
) -> Certificate:
    """The findings on several pieces of a model, together."""
    found = [judge(one, other, claim) for one, other in captures]
    return Certificate(
        claim=claim,
        source=sides[0],
        target=sides[1],
        longest=max(one.longest for one in found),
        scale=max(one.scale for one in found),
        islands=tuple(sorted({region for one in found for region in one.float32_regions})),
        bound=max(one.bound for one in found),
        yardstick=max(one.noise_floor for one in found),
        unit=max(one.unit for one in found),
        figures=_worst([one.figures for one in found]),
        layers=tuple(place for one in found for place in one.layers),
        faults=_least([one.faults for one in found]),
        untried={name: why for one in found for name, why in one.untried.items()},
        naive=max((one.naive for one in found if one.naive is not None), default=None),
        **known,
    )


def _worst(found: Sequence[Sequence[Figure]]) -> tuple[Figure, ...]:
    """Of each probe the figures that are furthest apart; what is not judged on one piece is not judged."""
    named: dict[str, list[Figure]] = {}
    for figure in (figure for figures in found for figure in figures):
        named.setdefault(figure.probe, []).append(figure)
    return tuple(
        replace(
            figures[0],
            float64=_largest(figure.float64 for figure in figures),
            working=None if figures[0].working is None else _largest(figure.working for figure in figures),
            judged=all(figure.judged for figure in figures),
            note="; ".join(dict.fromkeys(figure.note for figure in figures if figure.note)),
        )
        for figures in named.values()
    )


def _largest(found: Iterable[float | None]) -> float:
    """The largest; what is not a number, if there is one."""
    return float(np.max([one for one in found if one is not None]))


def _least(found: Sequence[Sequence[Fault]]) -> tuple[Fault, ...]:
    """Of each fault the piece that notices it least."""
    named: dict[str, list[Fault]] = {}
    for fault in (fault for faults in found for fault in faults):
        named.setdefault(fault.name, []).append(fault)
    return tuple(min(faults, key=lambda fault: fault.moved) for faults in named.values())


def _side(subject: Subject, engine: Engine, why: str) -> Side:
    files = {} if subject.prompt.origin is None else subject.prompt.origin.digests
    digest = digest_of(subject.stands_for or subject.prompt)
    return Side(subject.path, engine.name, why, loader_of(subject, engine) is not None, digest, files)
