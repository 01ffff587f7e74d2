"""Prompts that are the same are never called different: many of them, of every method, length and size of numbers.

A prompt too small to show makes a comparison insensitive, which is an answer of its own and no alarm.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import softbridge as sb
from softbridge.arrays import Array
from softbridge.base import BaseModel
from softbridge.errors import EngineError
from softbridge.lowering import examples
from softbridge.lowering.examples import METHODS, example
from softbridge.lowering.explain import explain
from softbridge.lowering.planner import lower, plan
from softbridge.lowering.steps import Target
from softbridge.methods import rematerialise
from softbridge.plugin.registry import format_named
from softbridge.prompt import AdaptionPrompt, InputPrompt, KeyValue, Part, SoftPrompt
from softbridge.testing import TINY, tiny_model
from softbridge.verification import Certificate, Claim, Subject, verify_prompts

FORMATS = ("softbridge", "peft", "adapterhub", "google")
#: Standard deviations: what training makes, and far beyond it on both sides.
SIZES = (0.01, 0.3, 0.8, 3.0)
#: Methods whose example has one length.
FIXED = {"p-tuning-template", "context-aware-prompt-tuning"}
#: Two layers do. T5 keeps three: of an even number PEFT uses half.
FEWER = {family: {"n_layer" if family == "gpt2" else "num_hidden_layers": 2} for family in TINY if family != "t5"}
#: It alone can say that two prompts are different, so that nothing is run beside it.
PRECISION = "float64"
#: Pairs in each family; a hundred on each stack in the long profile.
PAIRS = 17 if os.environ.get("SOFTBRIDGE_PROFILE") == "long" else 6
#: Every so many pairs one goes through files, and through the toolkits' own loaders.
ON_DISK = 3


@cache
def base_of(family: str) -> BaseModel:
    return BaseModel.resolve(tiny_model(family, **FEWER.get(family, {})))


def lossless(base: BaseModel, method: str, source: str, target: str) -> bool:
    """Whether the source can hold the method as it is, and the conversion asks nothing of anybody."""
    here = format_named(source)
    held = plan(
        example(method, base.geometry, here.capabilities),
        Target(source, here.capabilities, base.imagine()),
        here.obstacles,
    )
    return not held.obstacles and explain(source, target, method, base=base).outcome in ("exact", "rounding")


def made(
    method: str, base: BaseModel, source: str, length: int, size: float, generator: np.random.Generator
) -> SoftPrompt:
    """A prompt of the method with other numbers, of a given size."""
    with pytest.MonkeyPatch.context() as patch:
        if method not in FIXED:
            patch.setattr(examples, "LENGTH", length)
        prompt = example(method, base.geometry, format_named(source).capabilities)
    training = prompt.training
    if training is not None:
        noisy = {name: _noisy(array, size, generator) for name, array in training.tensors.items()}
        return rematerialise(replace(prompt, training=replace(training, tensors=noisy)))

    def drawn(array: Array) -> Array:
        return generator.normal(0, size, array.shape).astype(array.dtype)

    def other(part: Part) -> Part:
        if isinstance(part, InputPrompt):
            return replace(part, vectors=drawn(part.vectors))
        if isinstance(part, AdaptionPrompt):
            return replace(part, layers={n: replace(o, vectors=drawn(o.vectors)) for n, o in part.layers.items()})
        pairs = {n: KeyValue(drawn(pair.keys), drawn(pair.values), pair.gate) for n, pair in part.layers.items()}
        return replace(part, layers=pairs)

    return replace(prompt, parts=tuple(other(part) for part in prompt.parts))


def _noisy(array: Array, size: float, generator: np.random.Generator) -> Array:
    return (array * (1 + size * generator.normal(0, 1, array.shape))).astype(array.dtype)


def compared(prompt: SoftPrompt, source: str, target: str, base: BaseModel) -> Certificate:
    """In memory: what is read, and what would be written."""
    here, there = format_named(source), format_named(target)
    lowering = lower(prompt, Target(target, there.capabilities, base), (), there.obstacles)
    first, second = Subject("source", prompt, here.engine), Subject("target", lowering.prompt, there.engine)
    claim = Claim().about([prompt, lowering.prompt], lowering.steps)
    return verify_prompts(first, second, base, claim=claim, dtype=PRECISION)


def converted(prompt: SoftPrompt, source: str, target: str, base: BaseModel, directory: Path) -> Certificate:
    """Through files."""
    sb.save(prompt, directory / "source", format=source, base=base)
    sb.convert(directory / "source", directory / "target", target, base=base)
    return sb.verify(directory / "source", directory / "target", base=base, dtype=PRECISION)


@pytest.mark.parametrize("family", TINY)
def test_equal_prompts_are_never_called_different(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of the deliberate faults the verdict asks for one, and the others have tests of their own.
    monkeypatch.setattr("softbridge.verification.bench.faulty_prompts", lambda prompt, scheme: [("dropped", None)])
    base, generator = base_of(family), np.random.default_rng([2024, list(TINY).index(family)])
    cells = [
        (method, source, target)
        for method in METHODS
        for source, target in itertools.permutations(FORMATS, 2)
        if lossless(base, method, source, target)
    ]
    verdicts: list[str] = []
    order = [cells[n] for n in generator.permutation(len(cells))]
    for number, (method, source, target) in enumerate(itertools.chain.from_iterable(itertools.repeat(order, PAIRS))):
        length, size = int(generator.integers(2 if method == "cartridge" else 1, 10)), SIZES[number % len(SIZES)]
        prompt = made(method, base, source, length, size, generator)
        try:
            if number % ON_DISK:
                certificate = compared(prompt, source, target, base)
            else:
                certificate = converted(prompt, source, target, base, tmp_path / str(number))
        except EngineError as error:  # AdapterHub's alone to run, and it is not here
            if "AdapterHub is not installed" not in str(error):
                raise
            continue
        where = f"{method} of length {length} and size {size}, {source} to {target}: {certificate.summary()}"
        assert certificate.verdict != "different", where
        assert certificate.same or size < 0.1, where
        verdicts.append(certificate.verdict)
        if len(verdicts) == PAIRS:
            break
    assert len(verdicts) == PAIRS
    assert verdicts.count("insensitive") <= PAIRS // 4, "comparisons that prove nothing"
