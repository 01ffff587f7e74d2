"""Every pair of formats, for every family and method: what is copied, converted, conditional or refused.

The table is the claim; the test proves each cell. A positive cell is converted by the public function, run through the
toolkits themselves where they are installed, and compared; its negative twins (no prompt, shifted by one position, keys
and values swapped, layers swapped, and the naive copy where copying is wrong) must be noticed. Files of a toolkit are
written by that toolkit where it is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest

import softbridge as sb
from softbridge.base import BaseModel
from softbridge.errors import BaseModelError, EngineError, LoweringError
from softbridge.plugin.registry import engines
from softbridge.prompt import Positions, SoftPrompt
from softbridge.testing import random_input_prompt, random_prefix, tiny_config, tiny_model
from softbridge.verification import proof
from softbridge.verification.run import obstacles_of
from softbridge_compat import peft_defects

pytestmark = pytest.mark.usefixtures("remembered_runs")

FORMATS = ("softbridge", "peft", "adapterhub", "google")

#: Family -> the working precision that is run beside float64; none of the others, for float64 alone decides.
PRECISION = {"gpt2": "float32"}

# One row per family and method, one column per pair (source, target), both in the order of FORMATS.
#   b  the numbers as they are, and the positions: no bit differs. What they compute is as exact as e: in which order a
#      product is summed hangs on where a toolkit has its numbers in memory
#   e  exact: within 1e-12 of the largest logit in float64, or 1e-5 across a float32 region of the model
#   c  conditional: refused unless the caller accepts 'positions'; then as exact as e
#   .  refused, with the reason in REFUSALS
# A source that the format cannot hold is refused when that source is written.
TABLE = """
                        softbridge  peft        adapterhub  google
                        s p a g     s p a g     s p a g     s p a g
gpt2      prompt        b b c .     b b c .     . . . .     . . . .
llama     prompt        b b e .     b b e .     . . . .     . . . .
qwen3     prompt        b b . .     b b . .     . . . .     . . . .
gpt_neox  prompt        b b . .     b b . .     . . . .     . . . .
bert      prompt        b b c .     b b c .     b . b .     . . . .
t5        prompt        b b . b     b b . b     . . . .     b b . b
gpt2      prefix        b b c .     b b c .     b c b .     . . . .
llama     prefix        b b e .     b b e .     b e b .     . . . .
qwen3     prefix        b b . .     b b . .     . . . .     . . . .
gpt_neox  prefix        b b . .     b b . .     . . . .     . . . .
bert      prefix        b b c .     b b c .     b c b .     . . . .
t5        prefix        b b . .     b b . .     b . b .     . . . .
"""

#: (family, method, format that cannot be reached) -> the obstacle; "*" for any family.
REFUSALS = {
    ("*", "prompt", "adapterhub"): "part",
    ("bert", "prompt", "peft"): "part",
    ("*", "prefix", "google"): "part",
    ("qwen3", "prompt", "adapterhub"): "family",
    ("gpt_neox", "prompt", "adapterhub"): "family",
    ("qwen3", "prefix", "adapterhub"): "family",
    ("gpt_neox", "prefix", "adapterhub"): "family",
    ("t5", "prefix", "adapterhub"): "relative-bias",
    ("t5", "prefix", "peft"): "relative-bias",
    ("*", "prompt", "google"): "family",
}


def cells() -> list[Any]:
    rows = [line.split() for line in TABLE.strip().splitlines()[2:]]
    found = []
    for family, method, *outcomes in rows:
        assert len(outcomes) == len(FORMATS) ** 2
        pairs = [(source, target) for source in FORMATS for target in FORMATS]
        for (source, target), outcome in zip(pairs, outcomes, strict=True):
            found.append(
                pytest.param(family, method, source, target, outcome, id=f"{family}-{method}-{source}-{target}")
            )
    return found


def canonical(family: str, method: str, source: str) -> SoftPrompt:
    """A random prompt with the positions that files of this format imply."""
    geometry = BaseModel(tiny_config(family)).geometry
    if method == "prompt":
        prompt = random_input_prompt(geometry)
        if (family, source) != ("bert", "adapterhub"):
            return prompt
        part = replace(prompt.inputs[0], entry="after")
        return SoftPrompt((part,), Positions({"encoder": 0}, "skewed", "pinned"), prompt.base)
    prompt = random_prefix(geometry)
    if source != "adapterhub":
        return prompt
    start = dict.fromkeys(prompt.positions.start, 0)
    return SoftPrompt(prompt.parts, Positions(start, "skewed", "pinned"), prompt.base)


@cache
def base_of(family: str, method: str) -> BaseModel:
    """Vectors go behind the embedding block, and into a cache, with weights; else positions are all that matters."""
    weighted = method == "prompt" and family in ("bert", "gpt2", "llama")
    return BaseModel.resolve(tiny_model(family) if weighted else tiny_config(family))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, str], Path]:
    """(family, method, format) -> the directory of its files, written once and not to be changed."""

    @cache
    def written(family: str, method: str, source: str) -> Path:
        directory = tmp_path_factory.mktemp(f"{family}-{method}") / source
        write_source(family, method, source, directory)
        return directory

    return written


def write_source(family: str, method: str, source: str, directory: Path) -> None:
    """By the toolkit itself if it is installed, else by this project's writer."""
    engine = engines().get(source)
    if engine is not None and source != "native" and engine.unavailable() is None:
        import torch

        name = {"prompt": "prompt-tuning", "prefix": "prefix-tuning"}[method]
        # Where PEFT cannot run a prefix on a classifier, it saves what it starts with.
        fails = family == "bert" and method == "prefix" and peft_defects.RENAMED_CACHE_CLASSIFIER.applies()
        steps = 0 if fails else 2
        engine.train_example(tiny_model(family, torch.float32), name, directory, length=5, steps=steps, seed=0)
    else:
        sb.save(canonical(family, method, source), directory, format=source, base=tiny_config(family))


def refusal(family: str, method: str, unreachable: str) -> str:
    for key in ((family, method, unreachable), ("*", method, unreachable)):
        if key in REFUSALS:
            return REFUSALS[key]
    raise KeyError((family, method, unreachable))


@pytest.mark.parametrize(("family", "method", "source", "target", "outcome"), cells())
def test_cell(
    family: str,
    method: str,
    source: str,
    target: str,
    outcome: str,
    sources: Callable[[str, str, str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = base_of(family, method)
    holds = [f for f in FORMATS if cell_of(family, method, f, f) != "."]
    if source not in holds:
        assert outcome == "."
        if cell_of(family, method, "softbridge", source) != ".":  # what it holds of these vectors is a prefix
            vectors, bare = canonical(family, method, "softbridge"), tiny_config(family)
            with pytest.raises(BaseModelError, match="a configuration only"):
                sb.save(vectors, tmp_path / "source", format=source, base=bare, accept=["positions"])
            return
        with pytest.raises(LoweringError) as refused:
            sb.save(canonical(family, method, "softbridge"), tmp_path / "source", format=source, base=base)
        assert refusal(family, method, source) in {obstacle.name for obstacle in refused.value.obstacles}
        assert not (tmp_path / "source").exists()
        return

    directory = sources(family, method, source)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    if outcome in ".c":
        with pytest.raises(LoweringError) as refused:
            sb.convert(directory, tmp_path / "target", target, base=base, verify=True)
        obstacles = {obstacle.name: obstacle for obstacle in refused.value.obstacles}
        assert not (tmp_path / "target").exists(), "a refused conversion writes nothing"
        if outcome == ".":
            assert refusal(family, method, target) in obstacles
            assert not all(obstacle.acceptable for obstacle in obstacles.values())
            return
        assert list(obstacles) == ["positions"]
        assert all(obstacle.acceptable for obstacle in obstacles.values())
        assert "position_ids" in str(refused.value)
        assert "--accept positions" in str(refused.value)

    accept = ["positions"] if outcome == "c" else []
    if not anybody_runs(directory, family, base):
        # AdapterHub is not installed, and T5 does not dispatch in this transformers: nothing proven, nothing written.
        assert (family, method, source) == ("t5", "prefix", "adapterhub")
        with pytest.raises(EngineError, match=r"no installed engine can run .* dispatch"):
            sb.convert(directory, tmp_path / "target", target, base=base, accept=accept, verify=True)
        assert not (tmp_path / "target").exists()
        return
    precision = PRECISION.get(family, "float64")
    monkeypatch.setattr(proof, "verify_prompts", partial(proof.verify_prompts, dtype=precision))
    report = sb.convert(directory, tmp_path / "target", target, base=base, accept=accept, verify=True)
    certificate = report.certificate
    assert certificate is not None
    print(certificate.summary())
    assert certificate.same, certificate.summary()
    if outcome == "b":
        assert certificate.naive is None
        assert numbers(tmp_path / "target", base) == numbers(directory, base)
    elif "prefill" in {step.name for step in report.steps}:
        assert certificate.naive is None, "vectors cannot be copied into a prefix"
    else:
        assert certificate.naive is not None
        assert certificate.naive * certificate.scale > 0.1, "copying as it is must be visibly wrong here"
    faults = {fault.name: fault for fault in certificate.faults}
    expected = {"dropped", "shifted by one position"}
    if method == "prefix" or "prefill" in {step.name for step in report.steps}:
        expected |= {"keys and values swapped", "two layers swapped"}
    assert set(faults) == expected
    for fault in faults.values():
        assert fault.noticed, fault
        assert fault.moved * certificate.scale > 0.1, fault

    after = {path.name: path.read_bytes() for path in directory.iterdir()}
    assert after == before, "the input is not modified"
    if "head" not in {step.name for step in report.steps}:
        again = sb.verify(directory, tmp_path / "target", base=base, dtype=precision)
        assert again.same, "the files, read back by someone else, are still the same function"


def anybody_runs(directory: Path, family: str, base: BaseModel) -> bool:
    prompt, model = sb.load(directory, base=base), tiny_model(family)
    able = [engine for engine in engines().values() if engine.unavailable() is None]
    return any(not obstacles_of(engine, prompt, model) for engine in able)


def numbers(path: Path, base: BaseModel) -> tuple[Any, ...]:
    """Of the prompt in these files: places, bytes, and where real tokens are."""
    prompt = sb.load(path, base=base)
    arrays = [
        (name, array.dtype, array.shape, array.tobytes()) for part in prompt.parts for name, array in part.arrays()
    ]
    return prompt.positions, *arrays


def cell_of(family: str, method: str, source: str, target: str) -> str:
    for cell in cells():
        if cell.values[:4] == (family, method, source, target):
            return str(cell.values[4])
    raise KeyError((family, method, source, target))


def test_the_table_is_whole() -> None:
    outcomes = [cell.values[4] for cell in cells()]
    assert len(outcomes) == 6 * 2 * len(FORMATS) ** 2
    assert sum(outcome in "be" for outcome in outcomes) >= 60
    assert sum(outcome == "c" for outcome in outcomes) == 10
