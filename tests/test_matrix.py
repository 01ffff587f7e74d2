"""Every cell of MATRIX.md is proven.

What claims to be exact is converted by the public function, run on both sides and compared. What holds under a
condition is refused without it, is the same with the condition met, and is different with it unmet. What is impossible
is refused with every obstacle named, and the plain copy of the numbers is shown to compute something else, wherever
one can be run.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from functools import cache, partial
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

import softbridge as sb
from softbridge.arrays import Array
from softbridge.base import BaseModel
from softbridge.errors import EngineError, LoweringError
from softbridge.lowering.examples import METHODS, example
from softbridge.lowering.explain import KINDS, Explanation, explain
from softbridge.lowering.matrix import rows
from softbridge.lowering.planner import CONDITIONS
from softbridge.lowering.steps import Target
from softbridge.plugin.registry import engines, format_named
from softbridge.prompt import SoftPrompt
from softbridge.template import Template
from softbridge.testing import tiny_config, tiny_model
from softbridge.verification import bench, proof
from softbridge.verification.bench import template_of
from softbridge.verification.naive_copy import copied
from softbridge.verification.probes import make_probes
from softbridge.verification.run import attached, choose_engine, run

pytestmark = pytest.mark.usefixtures("remembered_runs")

FORMATS = ("softbridge", "peft", "adapterhub")
PAIRS = [(source, target) for source in FORMATS for target in FORMATS if source != target]
#: Of these test_conversions.py proves the same cells, on files that the toolkits wrote: here they are converted only.
PROVEN = ("prompt-tuning", "prefix-tuning")
#: Whose toolkit is not installed: what it computes is proven on the stack that has it.
ELSEWHERE = {name for name in FORMATS if engines()[format_named(name).engine].unavailable() is not None}


@cache
def base_of(family: str) -> BaseModel:
    """With weights where they move a prompt: behind an encoder's embedding block, or into a decoder's cache."""
    import torch

    labels = {"num_labels": 2} if family == "bert" else {}
    return BaseModel.resolve(tiny_config(family) if family == "t5" else tiny_model(family, torch.float32, **labels))


@pytest.fixture(autouse=True, scope="module")
def nothing_beside_the_verdict() -> Iterator[None]:
    """Leave out what a verdict does not ask for: a working precision, and all deliberate faults but one.

    That all of them are noticed is shown for each kind of prompt by test_conversions.py.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof, "verify_prompts", partial(proof.verify_prompts, dtype="float64"))
        patch.setattr(bench, "faulty_prompts", lambda prompt, scheme: [("dropped", None)])
        yield


# One test for all pairs: they are made of few sides, each of which is written and run once.
@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_every_pair(family: str, method: str, tmp_path: Path) -> None:
    for source, target in PAIRS:
        if {source, target} & ELSEWHERE:
            continue
        prove(explain(source, target, method, base=base_of(family)), family, tmp_path)


def test_the_matrix_is_whole() -> None:
    assert set(PAIRS) == set(permutations(rows(), 2))
    assert len(KINDS) * len(METHODS) * len(PAIRS) == 4 * 12 * 6


def test_what_is_proven_elsewhere_is_there() -> None:
    """And by what is explained here, says bridge/test_explain.py."""
    text = Path(__file__).with_name("test_conversions.py").read_text()
    for family in KINDS:
        for method in PROVEN:
            row = rf"^{family} +{method.removesuffix('-tuning')}( +[bce.])+$"
            assert re.search(row, text, re.MULTILINE), (family, method)


def prove(claim: Explanation, family: str, directory: Path) -> None:
    base = base_of(family)
    source, target = directory / claim.source, directory / f"{claim.source}-{claim.target}"
    prompt = example(claim.method, base.geometry, format_named(claim.source).capabilities)
    if not claim.held:
        with pytest.raises(LoweringError) as refused:
            sb.save(prompt, source, format=claim.source, base=base, accept=CONDITIONS)
        assert {o.name for o in claim.obstacles} <= {o.name for o in refused.value.obstacles}
        return
    if not source.exists():
        sb.save(prompt, source, format=claim.source, base=base, accept=CONDITIONS)
    if claim.outcome == "impossible":
        with pytest.raises(LoweringError) as refused:
            sb.convert(source, target, claim.target, base=base, accept=CONDITIONS)
        assert {o.name for o in refused.value.obstacles} == {o.name for o in claim.obstacles}
        assert not target.exists()
        counter_example(sb.load(source, base=base), claim, base)
        return
    conditions = [step.name for step in claim.steps if step.exactness == "conditional"]
    if conditions:
        with pytest.raises(LoweringError) as refused:
            sb.convert(source, target, claim.target, base=base)
        assert {o.name for o in refused.value.obstacles} == set(conditions)
        assert not target.exists()
    proven = claim.method in PROVEN
    report = sb.convert(source, target, claim.target, base=base, accept=conditions, verify=not proven)
    where = f"{claim.method} {claim.source} -> {claim.target} on {family}"
    assert {step.name for step in report.steps} >= {step.name for step in claim.steps}, where
    if not proven:
        certificate = report.certificate
        assert certificate is not None
        assert certificate.same, f"{where}: {certificate.summary()}"
        assert [(fault.name, fault.noticed) for fault in certificate.faults] == [("dropped", True)], where
    if conditions:
        unmet(claim, conditions, source, target, base)


def unmet(claim: Explanation, conditions: list[str], source: Path, target: Path, base: BaseModel) -> None:
    """With the condition not met, the same files are another function."""
    if conditions == ["task"]:  # the other task
        shutil.rmtree(target)
        sb.convert(source, target, claim.target, base=base, task=1)
    # Nobody says which task it is, or tells the positions, and the head is left as the base model has it.
    (target / "softbridge.json").unlink()
    assert not sb.verify(source, target, base=base, dtype="float64").same, (claim, conditions)


def counter_example(prompt: SoftPrompt, claim: Explanation, base: BaseModel) -> None:
    """The plain copy, where there is one that runs, is another function."""
    here, there = format_named(claim.source), format_named(claim.target)
    naive = copied(prompt, Target(there.name, there.capabilities, base))
    if naive is None:
        return
    try:
        right = outputs(prompt, here.engine, base, template_of(prompt), placeholders=True)
        wrong = outputs(naive, there.engine, base, template_of(prompt), placeholders=template_of(naive) is not None)
    except EngineError:  # on this stack no engine runs one of them, such as a prefix in T5 on transformers 4
        return
    apart = float(np.abs(right - wrong).max() / np.abs(right).max())
    assert apart > 0.01, (claim.method, claim.source, claim.target, apart)


def outputs(
    prompt: SoftPrompt, engine: str, base: BaseModel, template: Template | None, *, placeholders: bool
) -> Array:
    """Logits of one text in float64, at the real tokens."""
    import torch

    model = base.structure(torch.float64)
    chosen, _ = choose_engine(prompt, engine, model)
    probe = make_probes(base.geometry, model.config, 0, base.task, template, placeholders=placeholders)[0]
    with attached(chosen, model, prompt) as running:
        return run(running, [probe])[probe.name]
