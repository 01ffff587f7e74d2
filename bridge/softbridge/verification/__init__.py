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
from softbridge.head import load_head
from softbridge.hookspecs import Engine, Loader
from softbridge.lower import as_dtype
from softbridge.prompt import Array, SoftPrompt
from softbridge.verification.certificate import Certificate, Fault, Figure, Side
from softbridge.verification.mutations import mutations
from softbridge.verification.probes import LENGTHS, Probe, make_probes
from softbridge.verification.run import attached, choose_engine, find_islands, run

__all__ = ["Certificate", "Fault", "Figure", "Side", "Subject", "verify", "verify_prompts"]

#: Relative to the largest logit. Float64 rounding of other summation orders stays below it on any depth we measured.
BOUND = 1e-12
#: Across a float32 island of the model itself.
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
    subjects = [Subject(str(one.path), one.prompt, one.format.engine, one.path) for one in files]
    if "head" in conditions:  # one side left it to its caller: the comparison gives it the other's
        head = next((one.prompt.head for one in files if one.prompt.head), {})
        subjects = [
            one if one.prompt.head else replace(one, prompt=replace(one.prompt, head=head), directory=None)
            for one in subjects
        ]
    if "dtype" in conditions:  # one side was rounded
        subjects = [
            replace(one, prompt=as_dtype(one.prompt, np.dtype(np.float32)), directory=None) if _is_wide(one) else one
            for one in subjects
        ]
    return verify_prompts(
        subjects[0], subjects[1], resolved, conditions=conditions, weights=weights, dtype=dtype, seed=seed
    )


def _is_wide(subject: Subject) -> bool:
    return any(array.dtype.itemsize > 4 for part in subject.prompt.parts for _, array in part.arrays())


@dataclass(frozen=True)
class _Bench:
    """Builds a fresh model for every run, so that no run can leave anything behind for the next.

    Attributes:
        base: the base model, with the head that the prompts bring.
        weights: whether its own weights are used.
        seed: of random weights.
        window: what a sliding window is shortened to, so that the probes are longer, or None to leave it.
        probes: what is run.
    """

    base: BaseModel
    weights: bool
    seed: int
    window: int | None
    probes: tuple[Probe, ...]

    def model(self, dtype: str = "float64") -> Any:
        import torch

        kind = getattr(torch, dtype)
        return self.base.weights(kind) if self.weights else self.base.structure(kind, self.seed, self.window)

    @property
    def alone(self) -> list[Probe]:
        return [probe for probe in self.probes if probe.name.startswith("alone")]

    def own(self, subject: Subject, engine: Engine, dtype: str = "float64") -> dict[str, Array]:
        """All probes, with the toolkit's own loader reading its own files where there are any."""
        model = self.model(dtype)
        loader = _loader(subject, engine)
        if loader is not None and subject.directory is not None:
            return run(loader.load(model, subject.prompt, subject.directory), self.probes)
        with attached(engine, model, subject.prompt) as running:
            return run(running, self.probes)

    def other(self, engine: Engine, prompt: SoftPrompt | None, head: Mapping[str, Array]) -> dict[str, Array]:
        """The texts alone, for another prompt (None: none, but the same head)."""
        model = self.model()
        if prompt is None:
            load_head(model, head)
            return run(model, self.alone)
        with attached(engine, model, prompt) as running:
            return run(running, self.alone)


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
    weights: bool = False,
    dtype: str = "float32",
    seed: int = 0,
) -> Certificate:
    """Compare two prompts; the first is the reference.

    Args:
        naive: the first prompt's numbers as the second side would run them untold; its difference is reported.
        conditions: names of the conditions that were accepted, for the certificate.
    """
    from softbridge_compat import versions

    base = base.with_head(a.prompt.head or b.prompt.head)
    window = None
    if "window" not in conditions:  # they must agree beyond it, too
        window = max(a.prompt.counted().values(), default=0) + LENGTHS[0] // 2
    bench = _Bench(base, weights, seed, window, ())
    model = bench.model()
    bench = replace(bench, probes=make_probes(base.geometry, model.config, seed, base.task))
    alone = [probe.name for probe in bench.alone]
    islands = find_islands(model, bench.alone[0])
    bound = ISLAND_BOUND if islands else BOUND
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
        if wrong is not None and engine_b.obstacles(wrong, bench.model()):
            continue
        moved = _apart(bench.other(engine_b, wrong, b.prompt.head), alone, exact_b, alone, scale)
        faults.append(Fault(fault, moved, not moved <= NOTICED * bound))  # what is not a number is noticed
    copied = None
    if naive is not None and not engine_b.obstacles(naive, bench.model()):
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
        longest=max(probe.inputs["input_ids"].shape[1] for probe in bench.probes),
        scale=scale,
        islands=islands,
        bound=bound,
        figures=tuple(figures),
        faults=tuple(faults),
        naive=copied,
        versions=versions(),
    )


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
