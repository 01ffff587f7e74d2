"""Run two prompts on one model, each through its own toolkit, and measure how far apart they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from softbridge.arrays import Array
from softbridge.base.build import fresh
from softbridge.base.head import load_head, restore_head
from softbridge.base.model import BaseModel
from softbridge.errors import EngineError, SoftbridgeError
from softbridge.lowering.token_positions import rotate
from softbridge.parts import named_arrays
from softbridge.plugin.hookspecs import Engine, Loader
from softbridge.plugin.optional import able
from softbridge.prompt.part import InputPrompt
from softbridge.prompt.soft_prompt import SoftPrompt
from softbridge.template import Template
from softbridge.verification.faults import faulty_prompts
from softbridge.verification.layers import places, watch
from softbridge.verification.probes import REVERSED, Probe, make_probes, reverse
from softbridge.verification.run import (
    attached,
    check_loss,
    find_float32_regions,
    float32_regions,
    generate_fault,
    gradient,
    obstacles_of,
    run,
)


@dataclass(frozen=True)
class Subject:
    """One of the two things that are compared.

    Attributes:
        path: what to call it.
        prompt: what softbridge read, or is about to write.
        engine: the engine that should run it: its own toolkit's.
        directory: its files, for the toolkit's own loader to read; None if there are no files, or the
            files do not hold the whole prompt.
        stands_for: the prompt of the files, where something else is run for it: its numbers before they were rounded.
    """

    path: str
    prompt: SoftPrompt
    engine: str
    directory: Path | None = None
    stands_for: SoftPrompt | None = None


@dataclass(frozen=True)
class Capture:
    """What one side of a comparison put out.

    Attributes:
        engine: that ran it.
        left_pads: whether the engine says that pads on the left change nothing.
        float32_regions: modules of the model, and of the toolkit in it, that compute in less than float64.
        longest: tokens of the longest text.
        exact: probe -> logits at the real tokens in float64, or generated tokens.
        rough: the same in the working precision; of a reference also ``reversed``.
        unit: what that precision calls a unit of the last place of 1.
        states: what the layers put out for the first text in float64; see `softbridge.verification.layers`.
        loss: of the first text.
        start: stack -> where its first real token stands.
        gradient: array of the prompt -> gradient of that loss.
        rotated: of a model with rotary positions, the same in the frame of tokens that stand at 0; else, or where
            nobody needs it, empty.
        repeats: whether two layers of the prompt have the same numbers.
        faults: deliberate fault -> how far it moves the logits of the first text.
        untried: deliberate fault -> why the engine cannot run it.
        stepwise: why tokens were picked through the toolkit's forward instead of its `generate`, or empty.
        naive: the logits of the texts alone for the naive copy, if there was one.
    """

    engine: str
    left_pads: bool
    float32_regions: tuple[str, ...]
    longest: int
    exact: Mapping[str, Array]
    rough: Mapping[str, Array]
    unit: float
    states: Mapping[str, Array]
    loss: float
    start: Mapping[str, int]
    gradient: Mapping[str, Array]
    rotated: Mapping[str, Array]
    repeats: bool
    faults: Mapping[str, float]
    untried: Mapping[str, str]
    stepwise: str
    naive: Mapping[str, Array] | None


@dataclass(frozen=True)
class Bench:
    """A fresh model for every run that decides, so that no run can leave anything behind for the next.

    Attributes:
        base: the base model, with the head that the prompts bring.
        weights: whether its own weights are used.
        seed: of random weights and of the texts.
        window: what a sliding window is shortened to, so that the probes are longer, or None to leave it.
        texts: token ids to run instead of random ones, or None.
        template: that of the prompts, if they have one.
        cached: whether generating may use the model's cache. A gate weighs the positions of each call, so that with a
            cache it is another function, and whether a toolkit has one is its own affair.
        first: which layer of the whole model this one's layer 0 is.
        frames: whether the two sides' tokens may start at different positions, so that gradients must be rotated into a
            common frame.
    """

    base: BaseModel
    weights: bool
    seed: int
    window: int | None
    texts: Sequence[Sequence[int]] | None
    template: Template | None
    cached: bool = True
    first: int = 0
    frames: bool = True

    @cached_property
    def _pristine(self) -> Any:
        import torch

        return self.base.structure(torch.float64, self.seed, self.window)

    def model(self, dtype: str = "float64") -> Any:
        """A model that nobody has touched. Random weights are drawn once and copied."""
        import torch

        kind = getattr(torch, dtype)
        return self.base.weights(kind) if self.weights else fresh(self._pristine).to(kind)

    def spare(self) -> Any:
        """A model for whatever leaves it as it was. One with its own weights may be too large to keep."""
        return self.model() if self.weights else self._kept

    @cached_property
    def _kept(self) -> Any:
        return self.model()

    @cached_property
    def float32_regions(self) -> tuple[str, ...]:
        model, probe = self.spare(), self.alone(None)[0]
        regions = find_float32_regions(model, probe)
        check_loss(model, probe)
        return regions

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
        return make_probes(
            self.base.geometry,
            self.config,
            self.seed,
            self.base.task,
            self.template,
            placeholders=placeholders,
            texts=self.texts,
            cached=self.cached,
        )

    def probes(self, prompt: SoftPrompt | None) -> tuple[Probe, ...]:
        return self.full if prompt is not None and template_of(prompt) is not None else self.bare

    def alone(self, prompt: SoftPrompt | None) -> list[Probe]:
        return [probe for probe in self.probes(prompt) if probe.name.startswith("alone")]

    def own(
        self, subject: Subject, engine: Engine, dtype: str = "float64", more: Sequence[Probe] = ()
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """All probes, and what the layers put out for the first of them.

        The toolkit's own loader reads its own files where there are any.
        """
        model = self.model(dtype)
        inside = places(model)
        stepwise = generate_fault(engine, subject.prompt, self.base.geometry) is not None
        probes = [replace(probe, stepwise=stepwise) for probe in (*self.probes(subject.prompt), *more)]
        loader = loader_of(subject, engine)
        if loader is not None and subject.directory is not None:
            running = _loaded(loader, model, subject)
            states = watch(inside, self.first)
            return _within(subject, running, probes), states
        with attached(engine, model, subject.prompt) as running:
            states = watch(inside, self.first)
            return _within(subject, running, probes), states

    def other(self, model: Any, engine: Engine, prompt: SoftPrompt, texts: int | None = None) -> dict[str, Array]:
        """The first texts (None: all) alone, for another prompt; the model is given back as it was."""
        with attached(engine, model, prompt) as running:
            return run(running, self.alone(prompt)[:texts])

    def without(self, model: Any, head: Mapping[str, Array], texts: int | None = None) -> dict[str, Array]:
        """The same for none, but the same head."""
        before = load_head(model, head)
        try:
            return run(model, self.alone(None)[:texts])
        finally:
            restore_head(model, before)

    def gradient(self, engine: Engine, prompt: SoftPrompt) -> tuple[float, SoftPrompt]:
        """Loss of the first text and its gradient, in the prompt's own form."""
        return gradient(engine, self.model(), prompt, self.alone(prompt)[0])


def capture(
    bench: Bench,
    subject: Subject,
    engine: Engine,
    dtype: str,
    *,
    faults: bool = True,
    reference: bool = True,
    naive: SoftPrompt | None = None,
) -> Capture:
    """Run one side.

    Args:
        bench: what it is run on.
        subject: what is run.
        engine: one that runs it.
        dtype: the working precision, which is tried in addition to float64.
        faults: whether to measure how far deliberate faults move the outputs, which the target's side is asked.
        reference: whether to measure what the working precision does by itself, which the source's side is asked.
        naive: the other side's numbers as this engine would run them without position_ids, or None.
    """
    import torch

    prompt = subject.prompt
    regions = bench.float32_regions  # first: a model that does not even run alone is nobody's fault but its own
    probes = bench.probes(prompt)
    backwards = [reverse(probes)] if reference else []
    if dtype == "float64":  # it is the only precision
        rough, states = bench.own(subject, engine, more=backwards)
        exact = {name: found for name, found in rough.items() if name != REVERSED}
    else:
        exact, states = bench.own(subject, engine)
        rough, _ = bench.own(subject, engine, dtype, backwards)
    loss, grown = bench.gradient(engine, prompt)
    grown = _entering(replace(grown, head={}, training=None), bench.base.scale)
    scheme, rotated = bench.base.positions, grown
    if bench.frames and scheme.kind == "rotary":
        for stack, start in prompt.positions.start.items():
            rotated = rotate(rotated, stack, scheme.rotation(-start))
    moved: dict[str, float] = {}
    untried: dict[str, str] = {}
    spare = bench.spare() if faults or naive is not None else None
    first = [bench.alone(prompt)[0].name]
    for fault, wrong in faulty_prompts(prompt, scheme) if faults else ():
        obstacles = [] if wrong is None else obstacles_of(engine, wrong, spare)
        if obstacles:
            untried[fault] = f"{engine.name}: {'; '.join(obstacle.reason for obstacle in obstacles)}"
            continue
        found = bench.without(spare, prompt.head, 1) if wrong is None else bench.other(spare, engine, wrong, 1)
        moved[fault] = how_far(found, first, exact, first)
    copied = None
    if naive is not None and not obstacles_of(engine, naive, spare):
        copied = bench.other(spare, engine, naive)
    return Capture(
        engine=engine.name,
        left_pads=engine.capabilities.left_pads,
        float32_regions=(
            *regions,
            *float32_regions(engine, prompt, bench.base.geometry),
        ),
        longest=max(probe.inputs["input_ids"].shape[1] for probe in probes),
        exact=exact,
        rough=rough,
        unit=float(torch.finfo(getattr(torch, dtype)).eps),
        states=states,
        loss=loss,
        start={str(stack): start for stack, start in prompt.positions.start.items()},
        gradient=named_arrays(grown),
        rotated={} if rotated is grown else named_arrays(rotated),
        repeats=_repeats(prompt),
        faults=moved,
        untried=untried,
        stepwise=generate_fault(engine, prompt, bench.base.geometry) or "",
        naive=copied,
    )


def _entering(grown: SoftPrompt, scale: float | None) -> SoftPrompt:
    """A gradient with respect to vectors as they enter the first layer, which releases of transformers agree on."""
    if scale is None:
        return grown
    parts = (replace(p, vectors=p.vectors / scale) if isinstance(p, InputPrompt) else p for p in grown.parts)
    return replace(grown, parts=tuple(parts))


def _repeats(prompt: SoftPrompt) -> bool:
    """Whether two layers have the same numbers."""
    pairs: list[list[Any]] = [list(part.layers.values()) for part in prompt.layered]
    return any(pair in layers[:number] for layers in pairs for number, pair in enumerate(layers))


def _within(subject: Subject, running: Any, probes: Sequence[Probe]) -> dict[str, Array]:
    try:
        return run(running, probes)
    except IndexError as error:  # the model alone has run
        raise SoftbridgeError(
            f"{subject.path} has tokens stand from {dict(subject.prompt.positions.start)} on, and the model has no "
            "positions there",
            "a prompt and texts within the model's table of positions",
            "give a shorter --texts, or the base model that the prompt was trained for",
        ) from error


def _loaded(loader: Loader, model: Any, subject: Subject) -> Any:
    """The model with the files that the toolkit's own loader reads, which raises what it likes."""
    assert subject.directory is not None
    try:
        return loader.load(model, subject.prompt, subject.directory)
    except SoftbridgeError:
        raise
    except Exception as error:
        raise EngineError(
            f"{subject.engine}'s own loader fails on {subject.directory}: {type(error).__name__}: {error!s:.200}",
            "files that their own toolkit loads",
            "if softbridge wrote them, report this as a defect of softbridge, with the files; a path that is no UTF-8 "
            "is no defect: rename it",
        ) from error


def loader_of(subject: Subject, engine: Engine) -> Loader | None:
    """The engine as a loader, if it is the toolkit of the files and they are there."""
    if subject.directory is None or not subject.directory.is_dir() or engine.name != subject.engine:
        return None
    return able(engine, Loader)


def template_of(prompt: SoftPrompt) -> Template | None:
    """The template of its vectors, if they have one."""
    return next((part.template for part in prompt.inputs if part.template is not None), None)


def common_template(a: SoftPrompt, b: SoftPrompt) -> Template | None:
    """The template of the two, or of the one that has one.

    Raises:
        SoftbridgeError: both have a template, and the two differ.
    """
    first, second = template_of(a), template_of(b)
    if first is not None and second is not None and first.pieces != second.pieces:
        raise SoftbridgeError(
            "prompts with two different templates",
            "one template",
            "compare prompts that were trained with the same template",
        )
    return first or second


def how_far(a: Mapping[str, Array], names_a: Sequence[str], b: Mapping[str, Array], names_b: Sequence[str]) -> float:
    """The largest difference of logits. Rows of several probes follow one another."""
    left, right = np.concatenate([a[name] for name in names_a]), np.concatenate([b[name] for name in names_b])
    return float(np.abs(left - right).max())
