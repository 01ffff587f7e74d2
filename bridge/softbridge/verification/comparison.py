"""Run two prompts on one model, each through its own toolkit, and measure how far apart they are."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np

from softbridge.base import BaseModel
from softbridge.errors import SoftbridgeError
from softbridge.head import load_head
from softbridge.hookspecs import Engine, Loader
from softbridge.lower import turn
from softbridge.prompt import Array, SoftPrompt
from softbridge.template import Template
from softbridge.verification.certificate import Fault, Figure
from softbridge.verification.mutations import mutations
from softbridge.verification.probes import Probe, make_probes
from softbridge.verification.run import attached, find_islands, gradient, obstacles_of, run

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


@dataclass(frozen=True)
class Findings:
    """What one comparison found; see `softbridge.verification.Certificate`."""

    scale: float
    islands: tuple[str, ...]
    bound: float
    yardstick: float
    longest: int
    figures: tuple[Figure, ...]
    faults: tuple[Fault, ...]
    naive: float | None


@dataclass(frozen=True)
class Bench:
    """A fresh model for every run, so that no run can leave anything behind for the next.

    Attributes:
        base: the base model, with the head that the prompts bring.
        weights: whether its own weights are used.
        seed: of random weights and of the texts.
        window: what a sliding window is shortened to, so that the probes are longer, or None to leave it.
        texts: token ids to run instead of random ones, or None.
        template: that of the prompts, if they have one.
    """

    base: BaseModel
    weights: bool
    seed: int
    window: int | None
    texts: Sequence[Sequence[int]] | None
    template: Template | None

    @cached_property
    def _pristine(self) -> Any:
        import torch

        return self.base.structure(torch.float64, self.seed, self.window)

    def model(self, dtype: str = "float64") -> Any:
        """A model that nobody has touched. Random weights are drawn once and copied."""
        import torch

        kind = getattr(torch, dtype)
        return self.base.weights(kind) if self.weights else copy.deepcopy(self._pristine).to(kind)

    @cached_property
    def config(self) -> Any:
        return self.base.config if self.weights else self._pristine.config

    @cached_property
    def full(self) -> tuple[Probe, ...]:
        """What is run, with the virtual tokens of a template in the rows."""
        return self._probes(placeholders=True)

    @cached_property
    def bare(self) -> tuple[Probe, ...]:
        """The same real tokens only, for prompts without the template."""
        return self._probes(placeholders=False)

    def _probes(self, *, placeholders: bool) -> tuple[Probe, ...]:
        base, texts = self.base, self.texts
        return make_probes(
            base.geometry, self.config, self.seed, base.task, self.template, placeholders=placeholders, texts=texts
        )

    def probes(self, prompt: SoftPrompt | None) -> tuple[Probe, ...]:
        return self.full if prompt is not None and template_of(prompt) is not None else self.bare

    def alone(self, prompt: SoftPrompt | None) -> list[Probe]:
        return [probe for probe in self.probes(prompt) if probe.name.startswith("alone")]

    def own(self, subject: Subject, engine: Engine, dtype: str = "float64") -> dict[str, Array]:
        """All probes, with the toolkit's own loader reading its own files where there are any."""
        model = self.model(dtype)
        loader, probes = loader_of(subject, engine), self.probes(subject.prompt)
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

    def gradient(self, engine: Engine, prompt: SoftPrompt) -> tuple[float, SoftPrompt]:
        """Loss of the first text and its gradient, in the prompt's own form."""
        return gradient(engine, self.model(), prompt, self.alone(prompt)[0])


def compare(
    bench: Bench,
    a: Subject,
    b: Subject,
    engines: tuple[Engine, Engine],
    *,
    naive: SoftPrompt | None,
    rounded: Sequence[str],
    dtype: str,
) -> Findings:
    """Compare two prompts on one model; the first is the reference."""
    alone = [probe.name for probe in bench.alone(None)]
    islands = find_islands(bench.model(), bench.alone(None)[0])
    bound = ISLAND_BOUND if islands or rounded else BOUND
    engine_a, engine_b = engines
    exact_a, exact_b = bench.own(a, engine_a), bench.own(b, engine_b)
    rough_a, rough_b = bench.own(a, engine_a, dtype), bench.own(b, engine_b, dtype)
    probes = bench.probes(a.prompt)
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
                if not (own := _apart(out, ["left-padded"], out, alone, scale)) <= bound
            ]
            note = "; ".join(dict.fromkeys(variant))
        apart, rough = (_apart(x, names, y, names, scale) for x, y in ((exact_a, exact_b), (rough_a, rough_b)))
        figures.append(Figure(group, apart, rough, judged=not note, note=note))
    figures += _training(bench, a.prompt, b.prompt, engines, rounded)

    faults = []
    for fault, wrong in mutations(b.prompt, bench.base.positions):
        if wrong is not None and obstacles_of(engine_b, wrong, bench.model()):
            continue
        moved = _apart(bench.other(engine_b, wrong, b.prompt.head), alone, exact_b, alone, scale)
        faults.append(Fault(fault, moved, not moved <= NOTICED * bound))  # what is not a number is noticed
    copied = None
    if naive is not None and not obstacles_of(engine_b, naive, bench.model()):
        copied = _apart(bench.other(engine_b, naive, naive.head), alone, exact_a, alone, scale)
    yardstick = _apart(rough_a, alone, rough_a, ["right-padded"], scale)
    longest = max(probe.inputs["input_ids"].shape[1] for probe in probes)
    return Findings(scale, islands, bound, yardstick, longest, tuple(figures), tuple(faults), copied)


def _training(
    bench: Bench, a: SoftPrompt, b: SoftPrompt, engines: tuple[Engine, Engine], rounded: Sequence[str]
) -> list[Figure]:
    """Whether training goes on identically: the loss, and its gradient in the prompt's numbers, in float64 alone."""
    (loss_a, grown), (loss_b, other) = (bench.gradient(e, p) for e, p in zip(engines, (a, b), strict=True))
    loss = abs(loss_a - loss_b) / (abs(loss_a) or 1.0)
    note = ""
    if "entry" in rounded:
        note = "the embedding block lies between the two, and their gradients are not each other's"
    elif any(_repeats(prompt) for prompt in (a, b)):
        note = "layers share their numbers, and what a toolkit does with that in training is not compared"
    scheme = bench.base.positions
    if scheme.kind == "rotary":
        for stack, start in b.positions.start.items():
            if shift := start - a.positions.start.get(stack, start):
                grown = turn(grown, stack, scheme.rotation(shift))
    arrays = [{name: array for part in p.parts for name, array in _named(part)} for p in (grown, other)]
    if arrays[0].keys() != arrays[1].keys():
        return [Figure("loss", loss, loss)]
    size = max(float(np.abs(array).max()) for array in arrays[0].values())
    apart = max(float(np.abs(arrays[0][name] - arrays[1][name]).max()) for name in arrays[0]) / (size or 1.0)
    return [Figure("loss", loss, loss), Figure("gradient", apart, apart, judged=not note, note=note)]


def _named(part: Any) -> list[tuple[str, Array]]:
    where = part.stack if hasattr(part, "stack") else part.site
    return [(f"{where}.{name}", array) for name, array in part.arrays()]


def _repeats(prompt: SoftPrompt) -> bool:
    """Whether two layers have the same numbers."""
    pairs = [list(part.layers.values()) for part in prompt.prefixes]
    return any(pair in layers[:number] for layers in pairs for number, pair in enumerate(layers))


def loader_of(subject: Subject, engine: Engine) -> Loader | None:
    """The engine as a loader, if it is the toolkit of the files and they are there."""
    if subject.directory is None or not subject.directory.is_dir() or engine.name != subject.engine:
        return None
    return cast("Loader", engine) if hasattr(engine, "load") else None


def template_of(prompt: SoftPrompt) -> Template | None:
    """The template of its vectors, if they have one."""
    return next((part.template for part in prompt.inputs if part.template is not None), None)


def common_template(a: SoftPrompt, b: SoftPrompt) -> Template | None:
    """The template of the two, or of the one that has one.

    Raises:
        SoftbridgeError: they have different ones.
    """
    first, second = template_of(a), template_of(b)
    if first is not None and second is not None and first.pieces != second.pieces:
        raise SoftbridgeError(
            "prompts with two different templates", "one template", "rows that one makes mean nothing to the other"
        )
    return first or second


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
