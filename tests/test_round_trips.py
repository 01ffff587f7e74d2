"""read(write(p)) is p, bit for bit: every format that is written, each method that it holds, in four dtypes.

The prompts are the made-up ones of every method, and those of the formats' own specimens, with numbers of hypothesis's.
A dtype that a format cannot hold is refused.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from specimens import geometries, specimens

from softbridge.base import BaseModel
from softbridge.errors import LoweringError, SoftbridgeError
from softbridge.lowering.examples import METHODS, example
from softbridge.lowering.explain import KINDS
from softbridge.lowering.planner import lower
from softbridge.lowering.steps import Target
from softbridge.methods import rematerialise
from softbridge.plugin.registry import format_named, formats
from softbridge.prompt import BaseId, SoftPrompt
from softbridge.prompt.container import refilled
from softbridge.testing import tiny_config
from softbridge.untrusted import Files

WRITTEN = sorted(name for name, form in formats().items() if form.encodings)
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float64": np.float64}
MOST = settings().max_examples


@dataclass(frozen=True)
class Case:
    """A prompt that a format holds as it is, in float32."""

    name: str
    prompt: SoftPrompt
    base: BaseModel | None

    def lowered(self, form: str, prompt: SoftPrompt) -> SoftPrompt | None:
        """What the format is given to write; None: another prompt, by one of lowering's steps."""
        known = format_named(form)
        lowering = lower(prompt, Target(form, known.capabilities, self.base), (), known.obstacles)
        return None if lowering.steps else lowering.prompt


@cache
def cases(form: str) -> list[Case]:
    found = []
    for family in KINDS:
        base = BaseModel(tiny_config(family)).imagine()
        for method in METHODS:
            try:
                prompt = example(method, base.geometry, format_named(form).capabilities)
            except (SoftbridgeError, ValueError):  # the model has no such place
                continue
            found.append(Case(f"{method}, {family}", replace(prompt, base=BaseId(None, base.geometry)), base))
    for one in specimens().values():
        if one.format != form or one.prompt is None:
            continue
        for geometry in (one.prompt.base.geometry, *geometries()):
            case = Case(one.name, replace(one.prompt, base=BaseId(None, geometry)), None)
            if geometry is not None and held(form, case):
                found.append(case)
                break
    return [case for case in found if held(form, case)]


def held(form: str, case: Case) -> bool:
    try:
        return case.lowered(form, renumbered(case.prompt, "float32", 0)) is not None
    except SoftbridgeError:
        return False


def renumbered(prompt: SoftPrompt, dtype: str, seed: int) -> SoftPrompt:
    """The prompt with other numbers: zeros of both signs among them, and the smallest and the largest of the dtype.

    One with a parameterisation has other numbers there, and what these make.
    """
    generator, made = np.random.default_rng(seed), DTYPES[dtype]
    limits = ml_dtypes.finfo(made)
    edges = np.array([0.0, -0.0, limits.smallest_subnormal, limits.tiny, limits.max, limits.min, limits.eps], made)
    arrays = {}
    for name, array in prompt.arrays():
        if array.dtype.kind in "iub":
            arrays[name] = array
            continue
        numbers = generator.normal(0, 0.8, array.shape).astype(made)
        if prompt.training is None and seed % 3:
            where = generator.random(array.shape) < 0.3
            numbers[where] = generator.choice(edges, int(where.sum()))
        arrays[name] = numbers
    new = refilled(prompt, arrays)
    return new if new.training is None else rematerialise(new)


def bits(prompt: SoftPrompt) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (a.dtype.name, a.shape, np.ascontiguousarray(a).tobytes()) for name, a in prompt.arrays()}


def came_back(form: str, case: Case, prompt: SoftPrompt, encoding: str) -> str:
    """'same', or why the format does not hold it as it is."""
    known = format_named(form)
    try:
        written = case.lowered(form, prompt)
    except LoweringError as error:
        return ", ".join(sorted(obstacle.name for obstacle in error.obstacles))
    if written is None:
        return "another prompt"
    geometry = prompt.base.geometry
    with tempfile.TemporaryDirectory() as folder:
        for name, content in known.write(written, geometry, encoding).items():
            (Path(folder) / name).write_bytes(bytes(content))
        found = known.read(Files(folder), geometry)
    theirs, ours = bits(found), bits(prompt)
    if prompt.training is None:  # some files say how every prompt in them was trained: its own rows are its parameters
        theirs = {name: one for name, one in theirs.items() if not name.startswith("training.")}
    assert theirs == ours
    assert found.positions == prompt.positions
    assert prompt.training is None or found.training == prompt.training
    return "same"


@pytest.mark.parametrize("form", WRITTEN)
@settings(max_examples=MOST if MOST > 1000 else MOST // 5)
@given(data=st.data())
def test_what_is_written_is_read(form: str, data: st.DataObject) -> None:
    case = data.draw(st.sampled_from(cases(form)))
    encoding = data.draw(st.sampled_from(list(format_named(form).encodings)))
    dtype = data.draw(st.sampled_from(list(DTYPES)))
    prompt = renumbered(case.prompt, dtype, data.draw(st.integers(0, 2**32)))
    outcome = came_back(form, case, prompt, encoding)
    kept = format_named(form).capabilities.dtypes
    if outcome != "same":
        assert dtype != "float32", (case.name, outcome)
        assert kept is None or dtype not in kept or prompt.training is not None, (case.name, outcome)


def test_each_format_holds_what_it_says() -> None:
    """Every case in float32, one in every dtype that the format keeps, and in no other without a word."""
    for form in WRITTEN:
        known = format_named(form)
        kept, tried = set(known.capabilities.dtypes or DTYPES), dict.fromkeys(DTYPES, 0)
        for case in cases(form):
            for dtype in DTYPES:
                same = came_back(form, case, renumbered(case.prompt, dtype, 1), known.encodings[0]) == "same"
                assert same or dtype != "float32", (form, case.name)
                tried[dtype] += same
        assert {dtype for dtype, count in tried.items() if count} == kept & DTYPES.keys(), (form, tried)
    assert len({case.name.split(",")[0] for case in cases("softbridge")}) >= len(METHODS)
