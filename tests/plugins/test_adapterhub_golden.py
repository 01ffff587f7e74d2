"""What AdapterHub computes runs where AdapterHub cannot be installed, with the numbers that it computed.

The golden files hold base models, the files that AdapterHub's `save_adapter` wrote (in one of them: prompts that it was
given by hand), and AdapterHub's own logits (eager, float64); see `tests/golden/make_adapterhub.py`. Where the native
engine can run them it does, whatever else is installed; T5 under transformers 4 does not dispatch its attention, and
there AdapterHub itself is the only engine.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
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
from softbridge.errors import EngineError, LoweringError
from softbridge.geometry import Stack, stack_of
from softbridge.plugin.registry import engines
from softbridge.prompt import BaseId, KeyValue, KeyValuePrefix, Positions, SoftPrompt
from softbridge.testing import agreement, as_bytes
from softbridge.verification.faults import faulty_prompts
from softbridge.verification.judge import FLOAT32_BOUND
from softbridge.verification.run import attached, choose_engine
from softbridge_adapterhub import facts
from softbridge_adapterhub.format import FORMAT
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
        self.prompt = sb.load(directory, base=self.model)

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
    if golden.prompt.training is not None:  # both multiply the parameterisation's matrices in float32
        close = max(close, FLOAT32_BOUND)
    assert apart(golden.prompt) <= close
    assert apart(golden.prompt, "logits.masked") <= close
    for name, wrong in faulty_prompts(golden.prompt, BaseModel.resolve(golden.model).positions):
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
    """Neighbours with other numbers: entering elsewhere, negated, without gates, or in another layer."""
    for part in prompt.inputs:
        start = Positions({part.stack: part.length})
        yield "before", replace(prompt, parts=(replace(part, entry="before"),), positions=start)
        yield "negated", replace(prompt, parts=(replace(part, vectors=-part.vectors),))
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


# ---------------------------------------- layers that a T5's `leave_out` names, and the bias that is lost behind them

#: Case of the golden file -> from which layer on AdapterHub has no relative bias.
LOST: dict[str, dict[Stack, int]] = {
    "encoder first": {"encoder": 1},
    "encoder middle": {"encoder": 1},
    "encoder last": {"encoder": 2},
    "encoder": {},
    "decoder first": {"decoder": 1},
    "decoder middle": {"decoder": 1},
    "decoder last": {"decoder": 2},
    "both": {"encoder": 2, "decoder": 2},
}


class LeftOut:
    """A T5 and the prefixes of some of its layers, as AdapterHub's files say which."""

    def __init__(self, implementation: str, folder: Path) -> None:
        with safe_open(GOLDEN / "adapterhub_t5_leave_out.safetensors", "pt") as file:
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            told = {name: json.loads(text) for name, text in file.metadata().items()}
        config = AutoConfig.for_model(told["config"].pop("model_type"), **told["config"])
        auto = auto_class("seq2seq-lm", config)
        with torch.random.fork_rng(devices=[]):
            self.model = auto.from_config(config, attn_implementation=implementation).double().eval()
        weights = {name: tensor for name, tensor in self.tensors.items() if name.startswith("weights.")}
        self.model.load_state_dict({name.removeprefix("weights."): tensor for name, tensor in weights.items()})
        (folder / "whole.safetensors").write_bytes(self.tensors["prompt"].numpy().tobytes())
        geometry = BaseModel.resolve(self.model).geometry
        whole = replace(sb.load(folder / "whole.safetensors"), base=BaseId(None, geometry))
        (folder / "whole").mkdir(exist_ok=True)
        self.prompts = {}
        for case, leave_out in told["cases"].items():
            layers = facts.sites_of({**facts.DEFAULTS[facts.PREFIX], "leave_out": leave_out}, geometry)
            parts = tuple(
                replace(part, layers={layer: part.layers[layer] for layer in layers[part.site]})
                for part in whole.prefixes
                if part.site in layers
            )
            start = {stack_of(part.site): 0 for part in parts}
            prompt = replace(whole, parts=parts, positions=Positions(start, "skewed", "pinned", LOST[case]))
            assert not FORMAT.obstacles(prompt, None)
            for name, content in as_bytes(FORMAT.write(prompt, None)).items():
                (folder / "whole" / name).write_bytes(content)
            written = json.loads((folder / "whole" / facts.CONFIG_FILE).read_text())["config"]
            assert case == "encoder" or written["leave_out"] == leave_out
            self.prompts[case] = replace(sb.load(folder / "whole", base=self.model), origin=None)
            assert self.prompts[case] == prompt, "the file says from which layer on"

    def inputs(self, masked: bool = False) -> dict[str, torch.Tensor]:
        given = {name: self.tensors[name] for name in ("input_ids", "decoder_input_ids")}
        if masked:
            for stack in ("", "decoder_"):
                mask = self.tensors["attention_mask"][:, -given[f"{stack}input_ids"].shape[1] :]
                given |= {f"{stack}input_ids": given[f"{stack}input_ids"] * mask, f"{stack}attention_mask": mask}
        return given

    def apart(self, case: str, prompt: SoftPrompt | None, masked: bool = False) -> float:
        """How far logits are from AdapterHub's, relative to the largest."""
        expected = self.tensors[f"{case}.{'masked' if masked else 'logits'}"]
        real = self.inputs(True)["decoder_attention_mask"].bool() if masked else slice(None)
        here = nullcontext(self.model) if prompt is None else attached(ENGINE, self.model, prompt)
        with here as running, torch.no_grad():
            found = running(**self.inputs(masked)).logits
        return float((found - expected)[real].abs().max() / expected.abs().max())


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_bias_that_adapterhub_loses_where_layers_are_left_out(
    implementation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        golden = LeftOut(implementation, tmp_path)
    except ValueError:  # transformers 4 has T5 in eager attention alone
        golden = LeftOut("eager", tmp_path)
    model, prompts = golden.model, golden.prompts
    assert prompts.keys() == LOST.keys()
    if not model._can_set_attn_implementation():
        reasons = [obstacle.name for prompt in prompts.values() for obstacle in ENGINE.obstacles(prompt, model)]
        assert set(reasons) == {"attention"}, "T5 does not dispatch here; no other reason"
        return
    for case, prompt in prompts.items():
        for masked in (False, True):
            assert golden.apart(case, prompt, masked) <= FLOAT32_BOUND, (case, masked)
        with attached(ENGINE, model, prompt) as running:
            tokens = running.generate(golden.tensors["input_ids"], max_new_tokens=5, do_sample=False)
            assert torch.equal(tokens, golden.tensors[f"{case}.tokens"]), case
            labels = golden.tensors["decoder_input_ids"]
            loss = running(input_ids=golden.tensors["input_ids"], labels=labels).loss
            wanted = golden.tensors[f"{case}.loss"]
            assert float((loss.detach() - wanted).abs() / wanted) <= FLOAT32_BOUND, case
            loss.backward()
            for part, module in zip(prompt.prefixes, running.softbridge.parts, strict=True):
                pairs = {int(n): KeyValue(layer.keys.grad, layer.values.grad) for n, layer in module.layers.items()}
                gradient = KeyValuePrefix(part.site, pairs).flat()
                wanted = golden.tensors[f"{case}.gradient.{part.site}"].numpy()
                assert abs(gradient - wanted).max() <= FLOAT32_BOUND * abs(wanted).max(), (case, part.site)
                module.zero_grad()

    # The neighbours are far away, the one without the fact as well.
    monkeypatch.setattr("softbridge_native.obstacles._attention_obstacles", lambda prompt, model, geometry: [])
    for case, prompt in prompts.items():
        wrong = dict(faulty_prompts(prompt, BaseModel.resolve(model).positions))
        assert {"dropped", "keys and values swapped", "two layers swapped", "shifted by one position"} <= wrong.keys()
        own = prompt.prefix("self")
        shorter = replace(own, layers=dict(list(own.layers.items())[1:]))
        wrong["a layer dropped"] = replace(prompt, parts=tuple(shorter if p is own else p for p in prompt.parts))
        for name, other in others(prompt.positions.unbiased_from):
            wrong[name] = replace(prompt, positions=replace(prompt.positions, unbiased_from=other))
        for name, neighbour in wrong.items():
            assert golden.apart(case, neighbour) > 1000 * FLOAT32_BOUND, (case, name)


def others(unbiased_from: Mapping[Stack, int]) -> Iterator[tuple[str, dict[Stack, int]]]:
    """No bias is lost, or it is from another layer on."""
    for stack, layer in unbiased_from.items():
        without = {name: number for name, number in unbiased_from.items() if name != stack}
        yield f"{stack}: every layer has the bias", without
        yield f"{stack}: lost a layer too early", {**without, stack: layer - 1}
        yield f"{stack}: lost a layer too late", {**without, stack: layer + 1}


def test_a_lost_bias_comes_back_with_the_prompt_off_and_the_self_check_bears_it(tmp_path: Path) -> None:
    golden = LeftOut("eager", tmp_path)
    model, prompt = golden.model, golden.prompts["encoder middle"]
    if ENGINE.obstacles(prompt, model):
        pytest.skip("T5 does not dispatch here")
    inputs = golden.inputs()
    with torch.no_grad():
        bare = model(**inputs).logits
        running = sb.attach(model, prompt, engine="native", self_check=True)
        wanted = golden.tensors["encoder middle.logits"]
        assert float((running(**inputs).logits - wanted).abs().max() / wanted.abs().max()) <= FLOAT32_BOUND
        with running.softbridge.off():
            assert torch.equal(running(**inputs).logits, bare)
        copied = copy.deepcopy(running)
        assert torch.equal(copied(**inputs).logits, running(**inputs).logits)
        assert torch.equal(ENGINE.detach(running)(**inputs).logits, bare)
        bank = sb.PromptBank({"a": prompt})
        running = sb.attach(model, bank)
        with pytest.raises(EngineError, match="without a relative position bias in some layers"), bank.rows(["a", "a"]):
            running(**inputs)


def test_a_conversion_there_and_back_keeps_a_lost_bias(tmp_path: Path) -> None:
    golden = LeftOut("eager", tmp_path)
    files = as_bytes(FORMAT.write(golden.prompts["both"], None))
    (tmp_path / "theirs").mkdir()
    for name, content in files.items():
        (tmp_path / "theirs" / name).write_bytes(content)
    report = sb.convert(tmp_path / "theirs", tmp_path / "ours", to="softbridge", base=golden.model.config, verify=True)
    assert report.certificate is not None
    assert report.certificate.verdict == "bitwise"
    sb.convert(tmp_path / "ours", tmp_path / "back", to="adapterhub", base=golden.model.config)
    assert {name: (tmp_path / "back" / name).read_bytes() for name in files} == files
    assert sb.load(tmp_path / "back", base=golden.model).positions == golden.prompts["both"].positions
    without = r"(?s)leaves out \[0, 1\].*without a relative position bias in the decoder"
    with pytest.raises(LoweringError, match=without):
        sb.convert(tmp_path / "theirs", tmp_path / "peft", to="peft", base=golden.model.config)
