"""Lowering of numbers: what is widened, what is rounded and by how much, and in which order."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import softbridge as sb
from softbridge.arrays import BFLOAT16, Array
from softbridge.base import BaseModel
from softbridge.errors import LoweringError, SoftbridgeError
from softbridge.lowering.planner import lower
from softbridge.lowering.precision import as_dtype
from softbridge.lowering.steps import Target
from softbridge.plugin.capabilities import Capabilities
from softbridge.prompt import KeyValue, KeyValuePrefix, Positions, SoftPrompt
from softbridge.testing import random_prefix, tiny_config

COUNTED = Capabilities(
    prefix_sites=frozenset({"self", "encoder"}), prefix_start="counted", relative_bias="plain", window="slides"
)
UNCOUNTED = Capabilities(
    prefix_sites=frozenset({"self", "encoder", "cross"}),
    prefix_start="zero",
    relative_bias="skewed",
    window="pinned",
    training=frozenset({"mlp"}),
)


def base(family: str, **changes: object) -> BaseModel:
    return BaseModel(tiny_config(family, **changes))


def obstacles(error: pytest.ExceptionInfo[LoweringError]) -> dict[str, bool]:
    return {obstacle.name: obstacle.acceptable for obstacle in error.value.obstacles}


def test_narrow_keys_are_widened_before_they_are_rotated() -> None:
    import ml_dtypes

    model = base("llama")
    prompt = random_prefix(model.geometry)
    part = prompt.prefixes[0]
    narrow = {
        layer: KeyValue(pair.keys.astype(ml_dtypes.bfloat16), pair.values.astype(ml_dtypes.bfloat16))
        for layer, pair in part.layers.items()
    }
    prompt = replace(prompt, parts=(KeyValuePrefix("self", narrow),))
    rotated = lower(prompt, Target("x", UNCOUNTED, model)).prompt.prefixes[0]
    back = lower(lower(prompt, Target("x", UNCOUNTED, model)).prompt, Target("y", COUNTED, model)).prompt.prefixes[0]
    for layer, pair in rotated.layers.items():
        assert pair.keys.dtype == pair.values.dtype == np.float32
        assert np.abs(back.layers[layer].keys - narrow[layer].keys.astype(np.float32)).max() < 1e-6


def test_what_a_target_would_round_is_a_condition_with_its_error() -> None:
    model = base("gpt2")
    prompt = as_dtype(random_prefix(model.geometry), np.dtype(np.float64))
    short = replace(COUNTED, dtypes=frozenset({"float32"}))
    fits = lower(prompt, Target("x", short, model))
    assert [(step.name, step.exactness) for step in fits.steps] == [("dtype", "exact")]
    assert {array.dtype for _, array in fits.prompt.arrays()} == {np.dtype(np.float32)}
    thirds = replace(
        prompt,
        parts=(
            KeyValuePrefix("self", {n: KeyValue(p.keys / 3, p.values) for n, p in prompt.prefixes[0].layers.items()}),
        ),
    )
    with pytest.raises(LoweringError, match=r"by \d\.\de-08 of themselves") as refused:
        lower(thirds, Target("x", short, model))
    assert obstacles(refused) == {"dtype": True}
    rounded = lower(thirds, Target("x", short, model), accept=["dtype"])
    assert [(step.name, step.exactness) for step in rounded.steps] == [("dtype", "conditional")]


def test_a_rounding_that_was_accepted_is_the_only_difference(tmp_path: Path) -> None:
    config = tiny_config("gpt2")
    prompt = as_dtype(random_prefix(BaseModel(config).geometry), np.dtype(np.float64))
    layers = {n: KeyValue(p.keys / 3, p.values) for n, p in prompt.prefixes[0].layers.items()}
    sb.save(replace(prompt, parts=(KeyValuePrefix("self", layers),)), tmp_path / "a", format="softbridge", base=config)
    with pytest.raises(LoweringError, match="--accept dtype"):
        sb.convert(tmp_path / "a", tmp_path / "b", "peft", base=config)
    report = sb.convert(tmp_path / "a", tmp_path / "b", "peft", base=config, accept=["dtype"], verify=True)
    assert report.certificate is not None
    assert report.certificate.verdict == "bitwise"
    assert report.certificate.conditions == ("dtype",)
    assert report.certificate.claim.dtype == "float32"
    assert report.certificate.source.path == str(tmp_path / "a")
    assert sb.verify(tmp_path / "a", tmp_path / "b", base=config).conditions == ("dtype",)
    (tmp_path / "b" / "softbridge.json").unlink()
    assert not sb.verify(tmp_path / "a", tmp_path / "b", base=config).same, "the rounding is seen if nobody accepted it"


def test_narrowing_is_done_on_request_and_says_its_error(tmp_path: Path) -> None:
    config = tiny_config("gpt2")
    prompt = random_prefix(base("gpt2").geometry)
    sb.save(prompt, tmp_path / "wide", format="softbridge", base=config)
    for dtype, bound in (("bfloat16", 2**-8), ("float16", 2**-10)):
        report = sb.convert(tmp_path / "wide", tmp_path / dtype, "peft", base=config, dtype=dtype, verify=True)
        (step,) = report.steps
        assert (step.name, step.exactness) == ("narrow", "rounding")
        worst = float(step.note.rpartition("by ")[2].split()[0])
        keys = sb.load(tmp_path / dtype, base=config).prefixes[0].layers[0].keys
        assert keys.dtype == (BFLOAT16 if dtype == "bfloat16" else np.float16)
        assert bound / 8 < worst <= bound
        assert report.certificate is not None
        assert report.certificate.verdict == "bitwise", "rounded alike, the two are the same"
        assert sb.verify(tmp_path / "wide", tmp_path / dtype, base=config).same
    big = replace(prompt.prefixes[0].layers[0], keys=np.full_like(prompt.prefixes[0].layers[0].keys, 1e6))
    huge = replace(prompt, parts=(replace(prompt.prefixes[0], layers={**prompt.prefixes[0].layers, 0: big}),))
    with pytest.raises(LoweringError, match="too large for float16"):
        sb.save(huge, tmp_path / "huge", format="peft", base=config, dtype="float16")
    with pytest.raises(SoftbridgeError, match="no dtype is called 'int8'"):
        sb.save(prompt, tmp_path / "int8", format="peft", base=config, dtype="int8")


def scaled(prompt: SoftPrompt, factor: float, dtype: type = np.float64) -> SoftPrompt:
    """A prefix with all but the first of its virtual tokens made smaller or larger."""

    def change(array: Array) -> Array:
        return np.concatenate([array[:, :1].astype(dtype), array[:, 1:].astype(dtype) * factor], 1)

    part = prompt.prefixes[0]
    layers = {n: KeyValue(change(pair.keys), change(pair.values)) for n, pair in part.layers.items()}
    return replace(prompt, parts=(replace(part, layers=layers),))


def test_numbers_that_become_nothing_are_a_condition_with_their_count(tmp_path: Path) -> None:
    config = tiny_config("gpt2")
    prompt = random_prefix(base("gpt2").geometry)
    sb.save(scaled(prompt, 1e-9, np.float32), tmp_path / "wide", format="softbridge", base=config)
    with pytest.raises(LoweringError, match=r"768 of 960 numbers, up to \d\.\de-09, become 0 in float16") as refused:
        sb.convert(tmp_path / "wide", tmp_path / "narrow", "softbridge", base=config, dtype="float16", verify=True)
    assert obstacles(refused) == {"underflow": True}
    given = {"base": config, "dtype": "float16", "verify": True, "accept": ["underflow"]}
    report = sb.convert(tmp_path / "wide", tmp_path / "narrow", "softbridge", **given)  # type: ignore[arg-type]
    assert report.certificate is not None
    assert report.certificate.conditions == ("underflow",)
    assert [(step.name, step.exactness) for step in report.steps] == [
        ("narrow", "rounding"),
        ("underflow", "conditional"),
    ]
    assert sb.verify(tmp_path / "wide", tmp_path / "narrow", base=config).conditions == ("underflow",)
    # A single one among thousands is what rounding is; its count stands in the step.
    wide = random_prefix(base("gpt2").geometry, 64).prefixes[0]
    keys = wide.layers[0].keys.copy()
    keys[0, 0, 0] = 1e-9
    few = replace(prompt, parts=(replace(wide, layers={**wide.layers, 0: replace(wide.layers[0], keys=keys)}),))
    few = replace(few, positions=Positions({"decoder": 64}))
    (step,) = lower(few, Target("x", COUNTED, base("gpt2"), "float16")).steps
    assert step.exactness == "rounding"
    assert step.note.endswith("; 1 of 12288 numbers, up to 1.0e-09, become 0 in float16")


@pytest.mark.parametrize("target", ["peft", "adapterhub"])
def test_numbers_that_no_float32_holds_are_named_as_such(target: str, tmp_path: Path) -> None:
    """And not as a training that has diverged."""
    config = tiny_config("llama")
    sb.save(scaled(random_prefix(base("llama").geometry), 1e300), tmp_path / "a", format="softbridge", base=config)
    for accept in ((), ("dtype",)):
        with pytest.raises(LoweringError, match=r"numbers, up to \d\.\de\+300, are too large for float32") as refused:
            sb.convert(tmp_path / "a", tmp_path / "b", target, base=config, accept=accept)
        assert obstacles(refused) == {"dtype": False}
        assert "diverged" not in str(refused.value)


def test_widening_is_exact(tmp_path: Path) -> None:
    config = tiny_config("gpt2")
    lowering = sb.save(
        random_prefix(base("gpt2").geometry), tmp_path / "x", format="softbridge", base=config, dtype="float64"
    )
    assert [(step.name, step.exactness) for step in lowering.steps] == [("dtype", "exact")]


def test_what_was_rotated_and_rounded_is_certified_before_the_rounding(tmp_path: Path) -> None:
    config = tiny_config("llama")
    sb.save(random_prefix(base("llama").geometry), tmp_path / "wide", format="softbridge", base=config)
    report = sb.convert(tmp_path / "wide", tmp_path / "out", "adapterhub", base=config, dtype="bfloat16", verify=True)
    assert [step.name for step in report.steps] == ["rotate", "narrow"]
    assert report.certificate is not None
    assert report.certificate.same
    assert report.certificate.rounded == ("rotate",)


def test_what_rounding_costs_in_memory_is_what_it_makes() -> None:
    """Half of the prompt's numbers, and no array of float64 of all of them."""
    generator = np.random.default_rng(0)
    flat = generator.standard_normal((256, 4 * 2 * 512), dtype=np.float32)
    prompt = SoftPrompt((KeyValuePrefix.from_flat("self", flat, (0, 1, 2, 3), 8, 64),), Positions({"decoder": 256}))
    tracemalloc.start()
    try:
        narrow = lower(prompt, Target("x", COUNTED, None, "float16")).prompt
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    made = sum(array.nbytes for _, array in narrow.arrays())
    assert made == flat.nbytes // 2
    assert peak < made + flat.nbytes // 2
