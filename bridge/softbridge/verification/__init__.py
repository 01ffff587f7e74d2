"""Do two prompts compute the same function? Run both, each through its own toolkit, on the same inputs, and say.

Equality of two ways to run a prompt is a property of the architecture, so it shows on random weights of the same
attention geometry. A comparison proves nothing unless it would have noticed a difference, so every certificate states
how far the outputs move when the prompt is dropped, shifted or scrambled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from softbridge.base import BaseModel
from softbridge.prompt import Array, SoftPrompt
from softbridge.verification.certificate import Certificate, Fault, Figure, Side
from softbridge.verification.mutations import mutations
from softbridge.verification.probes import Probe, make_probes
from softbridge.verification.run import choose_engine, find_islands, run

__all__ = ["Certificate", "Fault", "Figure", "Side", "verify", "verify_prompts"]

#: Relative to the largest logit. Float64 rounding of other summation orders stays below it on any depth we measured.
BOUND = 1e-12
#: Across a float32 island of the model itself.
ISLAND_BOUND = 1e-5
#: A fault counts as noticed if it moves the outputs this many times further than the bound allows.
NOTICED = 100.0


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
    sides = [
        (str(loaded.path), loaded.prompt, loaded.format.engine) for loaded in (read(a, resolved), read(b, resolved))
    ]
    return verify_prompts(sides[0], sides[1], resolved, weights=weights, dtype=dtype, seed=seed)


@dataclass(frozen=True)
class _Runner:
    """Builds a fresh model for every run, so that no run can leave anything behind for the next."""

    base: BaseModel
    weights: bool
    seed: int

    def model(self, dtype: str) -> Any:
        import torch

        kind = getattr(torch, dtype)
        return self.base.weights(kind) if self.weights else self.base.structure(kind, self.seed)


def verify_prompts(
    a: tuple[str, SoftPrompt, str],
    b: tuple[str, SoftPrompt, str],
    base: BaseModel,
    *,
    naive: SoftPrompt | None = None,
    weights: bool = False,
    dtype: str = "float32",
    seed: int = 0,
) -> Certificate:
    """Compare two prompts, each given as (label, prompt, preferred engine).

    Args:
        naive: the first prompt's numbers as the second side would run them untold; its difference is reported.
    """
    from softbridge_compat import versions

    runner = _Runner(base, weights, seed)
    model = runner.model("float64")
    probes = make_probes(base.geometry, model.config, seed)
    alone = [probe for probe in probes if probe.name.startswith("alone")]
    islands = find_islands(model, alone[0])
    bound = ISLAND_BOUND if islands else BOUND
    (_, prompt_a, preferred_a), (_, prompt_b, preferred_b) = a, b
    engine_a, why_a = choose_engine(prompt_a, preferred_a, model)
    engine_b, why_b = choose_engine(prompt_b, preferred_b, model)

    plain = run(engine_a, model, None, alone)
    exact_a = run(engine_a, model, prompt_a, probes)
    exact_b = run(engine_b, runner.model("float64"), prompt_b, probes)
    rough_a = run(engine_a, runner.model(dtype), prompt_a, probes)
    rough_b = run(engine_b, runner.model(dtype), prompt_b, probes)
    scale = max(float(np.abs(exact_a[probe.name]).max()) for probe in probes if not probe.greedy)

    figures = []
    for group, members in _groups(probes).items():
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
                if not (own := _apart(out, ["left-padded"], out, [probe.name for probe in alone], scale)) <= bound
            ]
            note = "; ".join(dict.fromkeys(variant))
        figures.append(
            Figure(
                group,
                _apart(exact_a, names, exact_b, names, scale),
                _apart(rough_a, names, rough_b, names, scale),
                judged=not note,
                note=note,
            )
        )

    names = [probe.name for probe in alone]
    faults = []
    for fault, wrong in mutations(prompt_b, tellable=base.positions.tellable):
        if wrong is not None and engine_b.obstacles(wrong, model):
            continue
        out = plain if wrong is None else run(engine_b, runner.model("float64"), wrong, alone)
        moved = _apart(out, names, exact_b, names, scale)
        faults.append(Fault(fault, moved, not moved <= NOTICED * bound))  # what is not a number is noticed
    copied = None
    if naive is not None and not engine_b.obstacles(naive, model):
        copied = _apart(run(engine_b, runner.model("float64"), naive, alone), names, exact_a, names, scale)

    return Certificate(
        source=Side(a[0], engine_a.name, why_a, prompt_a.digest(), _digests(prompt_a)),
        target=Side(b[0], engine_b.name, why_b, prompt_b.digest(), _digests(prompt_b)),
        base=base.name,
        geometry=base.geometry,
        weights="the model's own" if weights else f"random, seed {seed}; vocabulary and feed-forward shrunk",
        seed=seed,
        dtype=dtype,
        scale=scale,
        islands=islands,
        bound=bound,
        figures=tuple(figures),
        faults=tuple(faults),
        naive=copied,
        versions=versions(),
    )


def _groups(probes: Sequence[Probe]) -> dict[str, list[Probe]]:
    groups: dict[str, list[Probe]] = {}
    for probe in probes:
        groups.setdefault("alone" if probe.name.startswith("alone") else probe.name, []).append(probe)
    return groups


def _digests(prompt: SoftPrompt) -> Mapping[str, str]:
    return {} if prompt.origin is None else prompt.origin.digests


def _apart(
    a: Mapping[str, Array], names_a: Sequence[str], b: Mapping[str, Array], names_b: Sequence[str], scale: float
) -> float:
    """The largest difference of logits, relative to `scale`. Rows of several probes follow one another."""
    left, right = np.concatenate([a[name] for name in names_a]), np.concatenate([b[name] for name in names_b])
    return float(np.abs(left - right).max()) / scale
