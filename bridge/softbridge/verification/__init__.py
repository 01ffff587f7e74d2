"""Do two prompts compute the same function? Run both, each through its own toolkit, on the same inputs, and say.

Equality of two ways to run a prompt is a property of the architecture, so it shows on random weights of the same
attention geometry. A comparison proves nothing unless it would have noticed a difference, so every certificate states
how far the outputs move when the prompt is dropped, shifted or scrambled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from softbridge.base import BaseModel
from softbridge.errors import SoftbridgeError
from softbridge.head import load_head
from softbridge.hookspecs import Engine, Loader
from softbridge.lower import as_dtype
from softbridge.passes import DTYPES
from softbridge.prompt import Array, SoftPrompt
from softbridge.template import Template
from softbridge.verification.certificate import Certificate, Fault, Figure, Side
from softbridge.verification.mutations import mutations
from softbridge.verification.probes import LENGTHS, Probe, make_probes
from softbridge.verification.run import attached, choose_engine, find_islands, obstacles_of, run

__all__ = ["Certificate", "Fault", "Figure", "Side", "Subject", "verify", "verify_prompts"]

#: Relative to the largest logit. Float64 rounding of other summation orders stays below it on any depth we measured.
BOUND = 1e-12
#: Across a float32 island of the model itself, or of numbers that the conversion computed and stored in float32.
ISLAND_BOUND = 1e-5
#: A fault counts as noticed if it moves the outputs this many times further than the bound allows.
NOTICED = 100.0


@dataclass(frozen=True)
class Subject:
    """One of the two things that are compared.

    Attributes:
        path: what to call it.
        prompt: what softbridge read, or is about to write.
        engine: the engine that should run it: its own toolkit's.
        directory: its files, for the toolkit's own loader to read; None if there are none, or not in a form that
            stands for the whole prompt.
    """

    path: str
    prompt: SoftPrompt
    engine: str
    directory: Path | None = None


def verify(
    a: str | Path,
    b: str | Path,
    base: Any,
    *,
    weights: bool = False,
    dtype: str = "float32",
    seed: int = 0,
) -> Certificate:
    """Compare the prompts in two files or directories.

    Args:
        a: path of the first, the reference.
        b: path of the second.
        base: whatever `BaseModel.resolve` takes.
        weights: use the base model's own weights instead of random ones of its structure.
        dtype: the working precision, reported beside float64.
        seed: of texts and weights.

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
    )


def _is_wider(subject: Subject, kind: np.dtype[Any]) -> bool:
    arrays = [array for part in subject.prompt.parts for _, array in part.arrays()]
    return any(array.dtype.itemsize > kind.itemsize for array in arrays)


@dataclass(frozen=True)
class _Bench:
    """Builds a fresh model for every run, so that no run can leave anything behind for the next.

    Attributes:
        base: the base model, with the head that the prompts bring.
        weights: whether its own weights are used.
        seed: of random weights.
        window: what a sliding window is shortened to, so that the probes are longer, or None to leave it.
        probes: what is run.
        bare: the same with the real tokens only, for prompts without the template.
    """

    base: BaseModel
    weights: bool
    seed: int
    window: int | None
    probes: tuple[Probe, ...] = ()
    bare: tuple[Probe, ...] = ()

    def model(self, dtype: str = "float64") -> Any:
        import torch

        kind = getattr(torch, dtype)
        return self.base.weights(kind) if self.weights else self.base.structure(kind, self.seed, self.window)

    def probes_for(self, prompt: SoftPrompt | None) -> tuple[Probe, ...]:
        return self.probes if prompt is not None and _template(prompt) is not None else self.bare

    def alone(self, prompt: SoftPrompt | None) -> list[Probe]:
        return [probe for probe in self.probes_for(prompt) if probe.name.startswith("alone")]

    def own(self, subject: Subject, engine: Engine, dtype: str = "float64") -> dict[str, Array]:
        """All probes, with the toolkit's own loader reading its own files where there are any."""
        model = self.model(dtype)
        loader, probes = _loader(subject, engine), self.probes_for(subject.prompt)
        if loader is not None and subject.directory is not None:
            return run(loader.load(model, subject.prompt, subject.directory), probes)
        with attached(engine, model, subject.prompt) as running:
            return run(running, probes)

    def other(self, engine: Engine, prompt: SoftPrompt | None, head: Mapping[str, Array]) -> dict[str, Array]:
        """The texts alone, for another prompt (None: none, but the same head)."""
        model = self.model()
        if prompt is None:
            load_head(model, head)
            return run(model, self.alone(None))
        with attached(engine, model, prompt) as running:
            return run(running, self.alone(prompt))


def _loader(subject: Subject, engine: Engine) -> Loader | None:
    """The engine as a loader, if it is the toolkit of the files and they are there."""
    if subject.directory is None or not subject.directory.is_dir() or engine.name != subject.engine:
        return None
    return cast("Loader", engine) if hasattr(engine, "load") else None


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
    bench = _Bench(base, weights, seed, window)
    model = bench.model()
    template = _common_template(a.prompt, b.prompt)
    full, bare = (
        make_probes(base.geometry, model.config, seed, base.task, template, placeholders=kept) for kept in (True, False)
    )
    bench = replace(bench, probes=full, bare=bare)
    alone = [probe.name for probe in bench.alone(None)]
    islands = find_islands(model, bench.alone(None)[0])
    bound = ISLAND_BOUND if islands or rounded else BOUND
    engine_a, why_a = choose_engine(a.prompt, a.engine, model)
    engine_b, why_b = choose_engine(b.prompt, b.engine, model)
    del model

    exact_a, exact_b = bench.own(a, engine_a), bench.own(b, engine_b)
    rough_a, rough_b = bench.own(a, engine_a, dtype), bench.own(b, engine_b, dtype)
    scale = max(float(np.abs(exact_a[probe.name]).max()) for probe in bench.probes if not probe.greedy)

    figures = []
    for group, members in _groups(bench.probes).items():
        if members[0].greedy:
            same = np.array_equal(exact_a[group], exact_b[group])
            figures.append(Figure(group, float(not same), float(not np.array_equal(rough_a[group], rough_b[group]))))
            continue
        names = [probe.name for probe in members]
        note = ""
        if group == "left-padded":
            variant = [
                f"{engine.name} is not invariant to left padding by itself ({own:.1e})"
                for engine, out in ((engine_a, exact_a), (engine_b, exact_b))
                if not (own := _apart(out, ["left-padded"], out, alone, scale)) <= bound
            ]
            note = "; ".join(dict.fromkeys(variant))
        apart, rough = (_apart(x, names, y, names, scale) for x, y in ((exact_a, exact_b), (rough_a, rough_b)))
        figures.append(Figure(group, apart, rough, judged=not note, note=note))

    faults = []
    for fault, wrong in mutations(b.prompt, base.positions):
        if wrong is not None and obstacles_of(engine_b, wrong, bench.model()):
            continue
        moved = _apart(bench.other(engine_b, wrong, b.prompt.head), alone, exact_b, alone, scale)
        faults.append(Fault(fault, moved, not moved <= NOTICED * bound))  # what is not a number is noticed
    copied = None
    if naive is not None and not obstacles_of(engine_b, naive, bench.model()):
        copied = _apart(bench.other(engine_b, naive, naive.head), alone, exact_a, alone, scale)

    return Certificate(
        source=_side(a, engine_a, why_a),
        target=_side(b, engine_b, why_b),
        base=base.name,
        geometry=base.geometry,
        weights="the model's own" if weights else f"random, seed {seed}; vocabulary and feed-forward shrunk",
        seed=seed,
        dtype=dtype,
        conditions=tuple(conditions),
        rounded=tuple(rounded),
        longest=max(probe.inputs["input_ids"].shape[1] for probe in bench.probes),
        scale=scale,
        islands=islands,
        bound=bound,
        figures=tuple(figures),
        faults=tuple(faults),
        naive=copied,
        versions=versions(),
    )


def _template(prompt: SoftPrompt) -> Template | None:
    return next((part.template for part in prompt.inputs if part.template is not None), None)


def _common_template(a: SoftPrompt, b: SoftPrompt) -> Template | None:
    """The template of the two, or of the one that has one.

    Raises:
        SoftbridgeError: they have different ones.
    """
    first, second = _template(a), _template(b)
    if first is not None and second is not None and first.pieces != second.pieces:
        raise SoftbridgeError(
            "prompts with two different templates", "one template", "rows that one makes mean nothing to the other"
        )
    return first or second


def _side(subject: Subject, engine: Engine, why: str) -> Side:
    files = {} if subject.prompt.origin is None else subject.prompt.origin.digests
    return Side(subject.path, engine.name, why, _loader(subject, engine) is not None, subject.prompt.digest(), files)


def _groups(probes: Sequence[Probe]) -> dict[str, list[Probe]]:
    groups: dict[str, list[Probe]] = {}
    for probe in probes:
        groups.setdefault("alone" if probe.name.startswith("alone") else probe.name, []).append(probe)
    return groups


def _apart(
    a: Mapping[str, Array], names_a: Sequence[str], b: Mapping[str, Array], names_b: Sequence[str], scale: float
) -> float:
    """The largest difference of logits, relative to `scale`. Rows of several probes follow one another."""
    left, right = np.concatenate([a[name] for name in names_a]), np.concatenate([b[name] for name in names_b])
    return float(np.abs(left - right).max()) / scale
