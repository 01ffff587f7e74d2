"""What AdapterHub computes runs where AdapterHub cannot be installed, with the numbers that it computed.

The golden files hold base models, the files that AdapterHub's `save_adapter` wrote (in one of them: prompts that it was
given by hand), and AdapterHub's own logits (eager, float64); see `tests/golden/make_adapterhub.py`. Where the native
engine can run them it does, whatever else is installed; T5 under transformers 4 does not dispatch its attention, and
there AdapterHub itself is the only engine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig

import softbridge as sb
from softbridge.base import BaseModel, auto_class
from softbridge.prompt import KeyValuePrefix, Positions, SoftPrompt
from softbridge.registry import engines
from softbridge.testing import agreement
from softbridge.verification.comparison import ISLAND_BOUND
from softbridge.verification.mutations import mutations
from softbridge.verification.run import attached, choose_engine
from softbridge_native.engine import ENGINE

GOLDEN = Path(__file__).resolve().parent.parent / "golden"

FAMILIES = ("gpt2", "llama", "bert", "t5")
TASKS: dict[str, Any] = {"bert": "sequence-classification", "t5": "seq2seq-lm"}


class Golden:
    def __init__(self, family: str, directory: Path) -> None:
        with safe_open(GOLDEN / f"adapterhub_{family}.safetensors", "pt") as file:
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            settings = json.loads(file.metadata()["config"])
        for name, tensor in self.tensors.items():
            if name.startswith("file."):
                (directory / name.removeprefix("file.")).write_bytes(tensor.numpy().tobytes())
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        config._attn_implementation = "eager"
        with torch.random.fork_rng(devices=[]):
            self.model = auto_class(TASKS.get(family, "causal-lm"), config).from_config(config).double().eval()
        weights = {name: tensor for name, tensor in self.tensors.items() if name.startswith("weights.")}
        self.model.load_state_dict({name.removeprefix("weights."): tensor for name, tensor in weights.items()})
        self.prompt = sb.load(directory, self.model)

    def logits(self, prompt: SoftPrompt | None, masked: bool = False) -> torch.Tensor:
        inputs = {name: self.tensors[name] for name in ("input_ids", "decoder_input_ids") if name in self.tensors}
        if masked:
            inputs["attention_mask"] = self.tensors["attention_mask"]
        engine = choose_engine(self.prompt, "native", self.model)[0]
        here = nullcontext(self.model) if prompt is None else attached(engine, self.model, prompt)
        with here as running, torch.no_grad():
            out: torch.Tensor = running(**inputs).logits
        return out


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_numbers_as_adapterhub(family: str, tmp_path: Path) -> None:
    golden = Golden(family, tmp_path)
    expected = golden.tensors["logits"]
    scale = float(expected.abs().max())

    def apart(prompt: SoftPrompt | None, name: str = "logits") -> float:
        found = golden.logits(prompt, masked=name == "logits.masked")
        wanted = golden.tensors[name]
        real = golden.tensors["attention_mask"].bool()
        if name == "logits.masked" and found.shape[:2] == real.shape:
            found, wanted = found[real], wanted[real]
        return float((found - wanted).abs().max()) / scale

    assert golden.prompt.training is None or golden.prompt.training.kind == "mlp"
    close = agreement(golden.model)
    assert apart(None, "logits.base") <= close, "the base model is the same"
    if golden.prompt.training is not None:  # both multiply the perceptron's matrices in float32
        close = max(close, ISLAND_BOUND)
    assert apart(golden.prompt) <= close
    assert apart(golden.prompt, "logits.masked") <= close
    for name, wrong in mutations(golden.prompt, BaseModel.resolve(golden.model).positions):
        assert apart(wrong) * scale > 0.1, name
    start = {
        stack: part.length for stack, part in zip(golden.prompt.positions.start, golden.prompt.parts, strict=False)
    }
    counted = replace(golden.prompt, positions=replace(golden.prompt.positions, start=start, relative_bias="plain"))
    if not choose_engine(golden.prompt, "native", golden.model)[0].obstacles(counted, golden.model):
        assert apart(counted) * scale > 0.1, "run as a toolkit that counts the prefix runs it"


def test_without_adapterhub_it_is_the_native_engine_that_runs_them(tmp_path: Path) -> None:
    if engines()["adapterhub"].unavailable() is None:
        pytest.skip("AdapterHub is installed here; this is about where it is not")
    for family in FAMILIES:
        (tmp_path / family).mkdir()
        golden = Golden(family, tmp_path / family)
        assert choose_engine(golden.prompt, "adapterhub", golden.model)[0].name == "native"


# --------------------------------------- sites, left-out layers, gates, and prompts after the embedding block, by hand

#: Families whose attention dispatches in every supported transformers, and those where it does in newer ones.
EVERYWHERE = {"gpt2", "llama", "mistral", "bart"}
NEWER = {"bert", "roberta", "distilbert", "t5"}
PREFIXES = {"plain", "shared", "own", "some"}


def by_hand() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors, and family -> settings of its configuration."""
    with safe_open(GOLDEN / "adapterhub_gates_and_entries.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, {family: json.loads(settings) for family, settings in file.metadata().items()}


def wrong_ones(prompt: SoftPrompt) -> Iterator[tuple[str, SoftPrompt]]:
    """Neighbours with other numbers: entering elsewhere, turned round, without gates, or in another layer."""
    for part in prompt.inputs:
        start = Positions({part.stack: part.length})
        yield "before", replace(prompt, parts=(replace(part, entry="before"),), positions=start)
        yield "turned", replace(prompt, parts=(replace(part, vectors=-part.vectors),))
    if any(part.gated for part in prompt.prefixes):
        yield "no gates", with_pairs(prompt, lambda pair: replace(pair, gate=None))
        yield (
            "other gates",
            with_pairs(prompt, lambda pair: replace(pair, gate=replace(pair.gate, bias=pair.gate.bias[::-1] - 1))),
        )
    elif prompt.prefixes:
        yield "swapped", with_pairs(prompt, lambda pair: replace(pair, keys=pair.values, values=pair.keys))
        moved = [replace(part, layers={1 - n: pair for n, pair in part.layers.items()}) for part in prompt.prefixes]
        yield "other layers", replace(prompt, parts=tuple(moved))


def with_pairs(prompt: SoftPrompt, change: Callable[[Any], Any]) -> SoftPrompt:
    def part(prefix: KeyValuePrefix) -> KeyValuePrefix:
        return replace(prefix, layers={n: change(pair) for n, pair in prefix.layers.items()})

    return replace(prompt, parts=tuple(part(prefix) for prefix in prompt.prefixes))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_prefixes_gates_and_entries_are_those_of_adapterhub(implementation: str, tmp_path: Path) -> None:
    tensors, configs = by_hand()
    ran = set()
    for family, settings in configs.items():
        own = {name.removeprefix(f"{family}."): t for name, t in tensors.items() if name.startswith(f"{family}.")}
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        auto = auto_class(BaseModel(config).task, config)
        with torch.random.fork_rng(devices=[]):
            try:
                model = auto.from_config(config, attn_implementation=implementation).double().eval()
            except ValueError:  # no such attention in this family
                continue
        weights = {name: tensor for name, tensor in own.items() if name.startswith("weights.")}
        model.load_state_dict({name.removeprefix("weights."): tensor for name, tensor in weights.items()})
        inputs = {name: own[name] for name in ("input_ids", "decoder_input_ids") if name in own}
        padded = {}
        for stack in ("", "decoder_") if "decoder_input_ids" in inputs else ("",):
            mask = own["attention_mask"][:, -inputs[f"{stack}input_ids"].shape[1] :]
            padded |= {f"{stack}input_ids": inputs[f"{stack}input_ids"] * mask, f"{stack}attention_mask": mask}
        close = agreement(model)
        for case in sorted(name.removesuffix(".prompt") for name in own if name.endswith(".prompt")):
            (tmp_path / "prompt.safetensors").write_bytes(own[f"{case}.prompt"].numpy().tobytes())
            prompt = sb.load(tmp_path / "prompt.safetensors")
            if ENGINE.obstacles(prompt, model):
                continue
            ran.add((family, case))
            for name, given in (("logits", inputs), ("masked", padded)):
                expected = own[f"{case}.{name}"]
                real = mask.bool() if expected.shape[:2] == mask.shape and name == "masked" else slice(None)

                def apart(prompt: SoftPrompt, given: Any = given, expected: Any = expected, real: Any = real) -> float:
                    with attached(ENGINE, model, prompt) as running, torch.no_grad():  # noqa: B023
                        return float((running(**given).logits - expected)[real].abs().max())

                bound = close * float(expected.abs().max())
                assert apart(prompt) <= bound, (family, case, name)
                for what, wrong in wrong_ones(prompt):
                    assert apart(wrong) > 0.01, (family, case, name, what)
    prefixed = {family for family, case in ran if case in PREFIXES}
    assert prefixed in (EVERYWHERE, EVERYWHERE | NEWER)
    assert {(family, case) for family, case in ran if case in PREFIXES} == {
        (family, case) for family in prefixed for case in PREFIXES
    }
    assert {family for family, case in ran if "prefix" in case} >= {"bert", "roberta", "albert"}
