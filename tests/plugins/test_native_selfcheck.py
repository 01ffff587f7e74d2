"""The native engine checks itself where it runs: every fault that is put into it by hand is named, and nothing else is.

The suite runs with the check switched off (tests/conftest.py), but for this file.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import pickle
import random
import threading
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.models.llama.modeling_llama import LlamaConfig

import softbridge as sb
from softbridge.base import build
from softbridge.base import cache as caches
from softbridge.doctor import diagnose
from softbridge.errors import EngineError
from softbridge.geometry import read_geometry
from softbridge.lowering.examples import METHODS
from softbridge.plugin.prompt_bank import PromptBank
from softbridge.prompt import KeyValuePrefix, SoftPrompt
from softbridge.selfcheck import SWITCH, UnprovenWarning, miniature, proof
from softbridge.selfcheck import verdict as kept
from softbridge.selfcheck.miniature import Architecture
from softbridge.selfcheck.proof import prove
from softbridge.selfcheck.verdict import FOLDER, Verdict, decisive, folder, verdicts
from softbridge.testing import random_input_prompt, random_prefix, tiny_model
from softbridge_native import attention, input_prompt, wiring
from softbridge_native import bank as native_bank
from softbridge_native import layout as layouts
from softbridge_native.engine import ENGINE
from softbridge_native.prefix import LayerPrefix

KINDS = ("input", "prefix")


@pytest.fixture(autouse=True)
def _on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """The check is on, and knows nothing yet."""
    monkeypatch.setenv(SWITCH, "1")
    monkeypatch.setenv(FOLDER, str(tmp_path / "verdicts"))
    kept.forget()
    yield
    kept.forget()


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The classes of the copies that were built."""
    found: list[str] = []
    own = proof.build

    def counted(of: Any, small: Any) -> Any:
        found.append(of.kind.__name__)
        return own(of, small)

    monkeypatch.setattr(proof, "build", counted)
    return found


def prompt_for(model: Any, kind: str, length: int = 5) -> SoftPrompt:
    geometry = read_geometry(model.config)
    if kind == "input":
        return random_input_prompt(geometry, length)
    sites = tuple(site for site in ("encoder", "self", "cross") if geometry.site(site) is not None)  # type: ignore[arg-type]
    return random_prefix(geometry, length, sites=sites)  # type: ignore[arg-type]


def attached(family: str, kind: str, **settings: Any) -> Any:
    model = tiny_model(family)
    return sb.attach(model, prompt_for(model, kind), **settings)


def text(rows: int = 1, length: int = 9) -> dict[str, Tensor]:
    ids = torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def called(model: Any, **more: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**{**text(), **more}).logits
    return found


def made(model: Any, **settings: Any) -> Tensor:
    return model.generate(**text(), max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0, **settings)  # type: ignore[no-any-return]


def verdict_of(model: Any) -> Verdict:
    (found,) = model.softbridge.check.verdicts
    return found  # type: ignore[no-any-return]


# ----------------------------------------------------------------------------------------------- faults, by hand


def drops_the_prompt(patch: pytest.MonkeyPatch) -> None:
    own = input_prompt.StackHooks.__init__

    def without(self: Any, stack: Any, around: Any, vectors: Any = None, *more: Any) -> None:
        own(self, stack, around)

    patch.setattr(input_prompt.StackHooks, "__init__", without)
    patch.setattr(LayerPrefix, "join", lambda self, entered, like: None)


def shifts_by_one(patch: pytest.MonkeyPatch) -> None:
    own = input_prompt.StackHooks.__init__

    def moved(self: Any, stack: Any, around: Any, vectors: Any = None, start: Any = 0, *more: Any) -> None:
        own(self, stack, around, vectors, start + 1, *more)

    patch.setattr(input_prompt.StackHooks, "__init__", moved)


def forgets_the_cache(patch: pytest.MonkeyPatch) -> None:
    """As on transformers 5.24 when the engine looked for the cache under the name that it had before."""
    patch.setattr(input_prompt, "full_length", lambda cache: 0)


def swaps_keys_and_values(patch: pytest.MonkeyPatch) -> None:
    own = LayerPrefix.forward
    patch.setattr(LayerPrefix, "forward", lambda self, like: own(self, like)[::-1])


def ignores_left_pads(patch: pytest.MonkeyPatch) -> None:
    for module in (input_prompt, layouts):
        patch.setattr(module, "left_pads", lambda mask: torch.zeros(len(mask), 1, dtype=torch.long))


def drops_the_prefix_behind_a_cache(patch: pytest.MonkeyPatch) -> None:
    own = attention._attend

    def attend(implementation: str, module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        bound = module.__dict__.get(attention._BINDING)
        if query.shape[2] < key.shape[2]:
            module.__dict__.pop(attention._BINDING, None)
        try:
            return own(implementation, module, query, key, *args, **kwargs)
        finally:
            if bound is not None:
                module.__dict__[attention._BINDING] = bound

    patch.setattr(attention, "_attend", attend)


@pytest.fixture
def _registered() -> Iterator[None]:
    yield
    attention.register()  # the right functions again


FAULTS = [
    (drops_the_prompt, "input", "effect"),
    (drops_the_prompt, "prefix", "effect"),
    (shifts_by_one, "input", "reference"),
    (shifts_by_one, "prefix", "reference"),
    (swaps_keys_and_values, "prefix", "reference"),
    (forgets_the_cache, "input", "cache"),
    (forgets_the_cache, "prefix", "cache"),
    (drops_the_prefix_behind_a_cache, "prefix", "cache"),
    (ignores_left_pads, "input", "left"),
    (ignores_left_pads, "prefix", "left"),
]


@pytest.mark.usefixtures("_registered")
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(("fault", "kind", "promise"), FAULTS)
def test_a_fault_is_named(family: str, fault: Any, kind: str, promise: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if (family, fault, kind) == ("llama", shifts_by_one, "input"):
        pytest.skip("a shift of all tokens is none with rotary positions")
    right = called(attached(family, kind, self_check=False))
    fault(monkeypatch)
    model = attached(family, kind)
    wrong = f"breaks the promise '{promise}'"
    if promise in ("effect", "reference"):
        for _ in range(2):  # at every call, with the figure, the versions and the ways out
            with pytest.raises(EngineError, match=wrong) as caught:
                called(model)
        assert f"transformers {decisive()['transformers']}" in caught.value.found
        assert "bound" in caught.value.found
        assert all(way in caught.value.remedy for way in ("detach", "self_check=False", f"{SWITCH}=0", "engine"))
        off = attached(family, kind, self_check=False)
        assert (called(off) - right).abs().max() > 1e-3  # and this is what it would have been
        return
    # What concerns a way of use is refused there, and nowhere else.
    assert torch.equal(called(model), right)
    padded = {"attention_mask": torch.tensor([[0, 0, *[1] * 7]])}
    if promise == "cache":
        with pytest.raises(EngineError, match=wrong) as caught:
            made(model)
        assert "use_cache=False" in caught.value.remedy
        made(model, use_cache=False)
    else:
        assert promise == "left"
        with pytest.raises(EngineError, match=wrong):
            called(model, **padded)
        called(model, attention_mask=torch.tensor([[*[1] * 7, 0, 0]]))


def test_a_fault_on_the_right_is_refused_there(monkeypatch: pytest.MonkeyPatch) -> None:
    own = input_prompt.extended
    monkeypatch.setattr(input_prompt, "extended", lambda vectors, mask: torch.ones_like(own(vectors, mask)))
    model = attached("bert", "input")
    called(model)
    with pytest.raises(EngineError, match="breaks the promise 'right'"):
        called(model, attention_mask=torch.tensor([[*[1] * 7, 0, 0]]))
    with torch.no_grad(), pytest.raises(EngineError, match="breaks the promise 'right'"):
        model.base_model(**{**text(), "attention_mask": torch.tensor([[*[1] * 7, 0, 0]])})  # past the top


def test_where_nothing_can_be_computed_by_hand_each_array_must_be_felt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers left out, and gates: the keys of one layer alone are dropped."""
    model = tiny_model("llama")
    prompt = prompt_for(model, "prefix")
    (part,) = prompt.prefixes
    some = replace(prompt, parts=(KeyValuePrefix("self", {n: part.layers[n] for n in (0, 2)}),))
    running = sb.attach(copy.deepcopy(model), some)
    called(running)
    found = {finding.promise: finding for finding in verdict_of(running).findings}
    assert not found["reference"].figures
    assert "some have no prefix" in found["reference"].reason
    assert [figure.name for figure in found["effect"].figures] == ["prompts not felt", "arrays not felt"]
    kept.forget()
    folder().rename(folder().with_name("before"))

    own = LayerPrefix.join

    def drops_the_second(self: Any, entered: Any, like: Tensor) -> Any:
        joined = own(self, entered, like)
        second = self is list(self.stand_in)[1] if hasattr(self, "stand_in") else False
        return None if second else joined

    monkeypatch.setattr(LayerPrefix, "join", drops_the_second)
    attach_own = ENGINE.attach

    def attach(model: Any, prompt: SoftPrompt) -> Any:
        running = attach_own(model, prompt)
        layers = list(running.softbridge.parts[0].layers.values())
        for layer in layers:
            object.__setattr__(layer, "stand_in", layers)
        return running

    monkeypatch.setattr(type(ENGINE), "attach", lambda self, model, prompt: attach(model, prompt))
    with pytest.raises(EngineError, match=r"'effect'.*arrays not felt: 2\.0"):
        called(sb.attach(copy.deepcopy(model), some))


# ------------------------------------------------------------------------------------------------------- no fault


def contract_tests() -> Any:
    """tests/plugins/test_contract.py, for its models."""
    spec = importlib.util.spec_from_file_location("contract_tests", Path(__file__).with_name("test_contract.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CONTRACT = contract_tests()
LONG = os.environ.get("SOFTBRIDGE_PROFILE") == "long"
SOME = ("gemma2", "opt", "gpt_oss", "roberta", "albert", "bart", "mt5")


@pytest.mark.filterwarnings("ignore")  # of transformers' models, about themselves
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", CONTRACT.FAMILIES if LONG else SOME)
def test_nothing_is_found_where_nothing_is_wrong(family: str, implementation: str) -> None:
    """On every architecture of the contract's tests, with each prompt that runs on it: all but what no one keeps."""
    model = CONTRACT.fresh(family)
    try:
        model.set_attn_implementation(implementation)
    except ValueError:
        pytest.skip(f"{family} has no {implementation} attention")
    if model.config._attn_implementation != implementation:
        pytest.skip(f"{family} stays with {model.config._attn_implementation} attention")
    for kind in KINDS:
        for prompt in CONTRACT.prompts(model, kind):
            if ENGINE.obstacles(prompt, model):
                continue
            found = prove(ENGINE, Architecture.of(model, implementation), prompt)
            assert found.status == "kept", found
            named = {finding.promise: finding for finding in found.findings}
            excused = [one.name for finding in found.findings for one in finding.figures if one.excused]
            assert all(name in ("left", "decoder_left") for name in excused)
            assert not excused or family in CONTRACT.OWN
            assert named["reference"].figures or named["reference"].reason
            if prompt == next(CONTRACT.prompts(model, kind)):  # what toolkits mean, virtual tokens counted
                assert [one.name[:7] for one in named["reference"].figures] == ["by hand"] * 3


@pytest.mark.parametrize("name", ["prompt-tuning", "p-tuning-template", "prefix-tuning-gated", "p-tuning-v2"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_kinds_of_prompts(family: str, name: str) -> None:
    if name not in METHODS:
        pytest.skip(f"no method {name}")
    model = tiny_model(family)
    prompt = METHODS[name](read_geometry(model.config))
    if ENGINE.obstacles(prompt, model):
        pytest.skip("refused: this BERT does not dispatch")
    architecture = Architecture.of(model, "eager")
    for bank in (False, True):
        found = prove(ENGINE, architecture, prompt, bank=bank)
        assert found.status == "kept", found
        tried = {finding.promise for finding in found.findings if finding.figures}
        # A gate is a mean over all tokens of a call, whatever they are.
        padded = set() if name == "prefix-tuning-gated" else {"right", "left"}
        assert tried >= {"effect"} | padded | ({"bank"} if bank else set())


def test_a_bank_checks_each_kind_when_it_is_loaded(builds: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gpt2")
    prompts = {"a": prompt_for(model, "input"), "b": prompt_for(model, "input", 7), "c": prompt_for(model, "prefix")}
    running = sb.attach(copy.deepcopy(model), PromptBank(prompts))
    bank = running.softbridge.bank
    with bank.rows(["a"]):
        called(running)
    assert len(builds) == 1
    with bank.rows(["b"]):  # of the same kind
        called(running)
    assert len(builds) == 1
    with bank.rows(["c"]):
        called(running)
    assert len(builds) == 2
    assert [found.status for found in running.softbridge.check.verdicts] == ["kept"] * 3
    assert all(found.findings[-1].promise == "bank" for found in running.softbridge.check.verdicts)

    kept.forget()
    folder().rename(folder().with_name("before"))
    own = native_bank.Chosen.__call__
    monkeypatch.setattr(native_bank.Chosen, "__call__", lambda self, like: own(self, like).flip(1))
    running = sb.attach(copy.deepcopy(model), PromptBank(prompts))
    for _ in range(2):
        with (
            running.softbridge.bank.rows(["a"]),
            pytest.raises(EngineError, match="breaks the promise 'bank'"),
        ):
            called(running)
    with running.softbridge.bank.rows(["c"]):
        called(running)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "t5"])
def test_nothing_is_touched(family: str, kind: str) -> None:
    """Neither random numbers nor modes nor the model, and a first call says what every call does."""
    model = tiny_model(family, torch.float32)
    prompt = prompt_for(model, kind)
    if ENGINE.obstacles(prompt, model):
        pytest.skip("this model does not dispatch")
    off = sb.attach(copy.deepcopy(model), prompt, self_check=False)
    on = sb.attach(model, prompt)
    more = {"decoder_input_ids": text()["input_ids"]} if family == "t5" else {}
    states = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[index]
    config, tensors = copy.deepcopy(on.config.to_dict()), {n: t.clone() for n, t in on.state_dict().items()}
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.autocast("cpu"), torch.inference_mode(), torch.device("meta"):
            found = on(**text_on_cpu(), **more).logits
            assert torch.is_inference_mode_enabled()
            assert torch.is_autocast_enabled("cpu")
        with torch.autocast("cpu"), torch.inference_mode():
            expected = off(**text(), **more).logits
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert verdict_of(on).status == "kept"
    assert torch.equal(found, expected)
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])  # type: ignore[index]
    assert on.config.to_dict() == config
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in on.state_dict().items())


def text_on_cpu() -> dict[str, Tensor]:
    with torch.device("cpu"):
        return text()


class Rows(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, number: int) -> Any:
        ids = torch.randint(3, 90, (7,), generator=torch.Generator().manual_seed(number))
        return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_the_same_bit_for_bit(kind: str, tmp_path: Path) -> None:
    """With dropout, which random numbers drawn in between would change."""
    trained, losses = [], []
    for check in (False, True):
        torch.manual_seed(0)
        base = tiny_model("gpt2", torch.float32, resid_pdrop=0.2, embd_pdrop=0.2)
        model = sb.attach(base, prompt_for(base, kind), self_check=check)
        quiet: dict[str, Any] = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
        settings = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 0.05, "logging_steps": 1}
        trainer = Trainer(
            model, TrainingArguments(str(tmp_path / str(check)), **quiet, **settings), train_dataset=Rows()
        )
        trainer.train()
        assert (model.softbridge.check is not None) is check
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        trained.append(dict(sb.extract(model).arrays()))
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 3
    assert all(np.array_equal(array, trained[1][name]) for name, array in trained[0].items())


# --------------------------------------------------------------------------------------------------- what is kept


def test_a_verdict_is_kept(builds: list[str]) -> None:
    model = attached("llama", "input")
    called(model)
    called(model)
    assert builds == ["LlamaForCausalLM"]
    called(attached("llama", "input"))  # in memory
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    called(twin)
    assert builds == ["LlamaForCausalLM"]
    kept.forget()
    called(attached("llama", "input"))  # in the folder
    assert builds == ["LlamaForCausalLM"]
    assert verdict_of(twin).to_json() == verdict_of(attached_and_called("llama", "input")).to_json()


def attached_and_called(family: str, kind: str) -> Any:
    model = attached(family, kind)
    called(model)
    return model


def test_of_what_a_verdict_is_a_function(builds: list[str]) -> None:
    """Sizes that shrink are no other architecture; another prompt, attention, head or rotary setting is."""

    def check(kind: str = "input", length: int = 5, attention: str = "eager", **changes: Any) -> int:
        before = len(builds)
        model = tiny_model("llama", **{"hidden_size": 64, "head_dim": 8, **changes})
        model.set_attn_implementation(attention)
        called(sb.attach(model, prompt_for(model, kind, length)))
        return len(builds) - before

    assert check() == 1
    assert check(length=9, hidden_size=96, num_hidden_layers=5, vocab_size=120, intermediate_size=96) == 0
    assert check("prefix") == 1
    assert check(attention="sdpa") == 1
    assert check(head_dim=12) == 1
    assert check(num_key_value_heads=1) == 1
    assert check(rms_norm_eps=1e-3) == 1


@pytest.fixture(scope="module")
def verdict_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, bytes]:
    """The name and the content of the file in which the verdict of one check is kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SWITCH, "1")
        patch.setenv(FOLDER, str(tmp_path_factory.mktemp("checked") / "verdicts"))
        kept.forget()
        called(attached("gpt2", "input"))
        (path,) = folder().glob("*.json")
        return path.name, path.read_bytes()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_text("{"),
        lambda path: path.write_bytes(b"\xff\x00"),
        lambda path: path.write_text("[]"),
        lambda path: change(path, lambda told: told.update(schema="other/1")),
        lambda path: change(path, lambda told: told["verdict"].update(status="broken")),
        lambda path: change(path, lambda told: told["verdict"].update(findings=[], reason="")),
        lambda path: change(path, lambda told: told["verdict"]["findings"][0].update(promise="none")),
        lambda path: change(path, lambda told: told["verdict"]["findings"][0]["figures"][0].update(bound="1")),
        lambda path: change(path, lambda told: told["verdict"]["findings"][1]["figures"][0].update(value=7.5)),
        lambda path: change(path, lambda told: told["key"].update(attention=["sdpa", "sdpa"])),
        lambda path: (path.unlink(), path.mkdir()),
    ],
)
def test_what_is_malformed_is_passed_over(spoil: Any, verdict_file: tuple[str, bytes], builds: list[str]) -> None:
    name, content = verdict_file
    path = folder() / name
    path.parent.mkdir()
    path.write_bytes(content)
    called(attached("gpt2", "input"))
    assert builds == []
    spoil(path)
    kept.forget()
    called(attached("gpt2", "input"))
    assert len(builds) == 1
    kept.forget()
    called(attached("gpt2", "input"))  # and written anew, if it is no folder
    assert len(builds) == (2 if path.is_dir() else 1)


def change(path: Path, how: Any) -> None:
    told = json.loads(path.read_text())
    how(told)
    path.write_text(json.dumps(told))


def test_a_folder_that_cannot_be_written_is_no_fault(
    builds: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(FOLDER, str(tmp_path / "file" / "verdicts"))
    called(attached("gpt2", "input"))
    called(attached("gpt2", "input"))
    assert len(builds) == 1
    assert list(verdicts()) == []


def test_where_verdicts_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(FOLDER)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert folder() == tmp_path / "softbridge" / "self-check"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the specification has it ignored
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folder() == tmp_path / ".cache" / "softbridge" / "self-check"


def test_two_threads_come_to_one_verdict(builds: list[str]) -> None:
    models = [attached("llama", kind) for kind in ("prefix", "prefix")]
    found: list[Tensor] = [torch.empty(0)] * 2

    def run(number: int) -> None:
        found[number] = called(models[number])

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(*found)
    assert verdict_of(models[0]) == verdict_of(models[1])
    assert builds == ["LlamaForCausalLM"]


def test_it_can_be_switched_off(builds: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    called(attached("gpt2", "input", self_check=False))
    monkeypatch.setenv(SWITCH, "0")
    called(attached("gpt2", "input"))
    assert builds == []
    called(attached("gpt2", "input", self_check=True))  # whoever calls has the last word
    assert len(builds) == 1


def test_a_prompt_that_is_switched_off_is_not_checked(builds: list[str]) -> None:
    model = attached("gpt2", "input")
    with model.softbridge.off():
        called(model)
    assert builds == []
    called(model)
    assert len(builds) == 1


def test_an_engine_that_cannot_check_itself_is_asked_for_nothing() -> None:
    from softbridge.attachment.attach import _check_itself

    third_party = SimpleNamespace(name="other", attach=None)
    _check_itself(third_party, tiny_model("gpt2"), None)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's, of its own vmap
def test_a_compiled_call_does_not_trace_the_check(builds: list[str]) -> None:
    model = attached("gpt2", "input")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = compiled(**text()).logits
    assert builds == []
    assert torch.allclose(called(model), expected)
    assert len(builds) == 1


def test_doctor_lists_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    called(attached("gpt2", "input"))
    ignores_left_pads(monkeypatch)
    called(attached("llama", "input"))
    found = diagnose().to_json()["self_checks"]
    assert [(one["model"], one["status"]) for one in found] == [
        ("GPT2LMHeadModel", "kept"),
        ("LlamaForCausalLM", "broken"),
    ]
    (path, *_) = folder().glob("*.json")
    told = json.loads(path.read_text())
    told["verdict"]["versions"]["transformers"] = "1.0"
    path.write_text(json.dumps(told))
    assert len(diagnose().self_checks) == 1  # of the installed versions


# ---------------------------------------------------------------------------------------------- what nobody has met


@pytest.mark.filterwarnings("ignore")  # of transformers' models, about themselves
@pytest.mark.parametrize("family", ["doge", "diffllama"])
def test_attention_that_computes_with_all_keys_is_refused(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Doge makes a mask of the values, DiffLlama rearranges their heads, both before a prefix joins in attention.

    It is refused at once, for what attention was seen to be called with; if that had not been seen, before the call.
    Where DiffLlama does not dispatch (transformers 4), the prefix is in its cache, and right.
    """
    sizes = {**CONTRACT.SIZES, "num_key_value_heads": 2}
    model = build(AutoConfig.for_model(family, **sizes), "causal-lm", torch.float64, 0)
    joins = any(attention.dispatches(module) for module in model.modules())
    assert joins or family == "diffllama"
    for kind in ("input", *(() if joins else ("prefix",))):
        running = sb.attach(copy.deepcopy(model), prompt_for(model, kind))
        called(running)
        assert verdict_of(running).status == "kept"
    if joins:
        with pytest.raises(EngineError, match=r"\[attention\]"):
            sb.attach(copy.deepcopy(model), prompt_for(model, "prefix"))
        monkeypatch.setattr(wiring, "wiring", lambda *args, **settings: None)
        with pytest.raises(EngineError, match="breaks the promise 'reference'"):
            called(sb.attach(copy.deepcopy(model), prompt_for(model, "prefix")))


class RemoteConfig(LlamaConfig):  # type: ignore[misc]
    """As a hub's repository would bring it: registered nowhere."""


class RemoteForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    config_class = RemoteConfig


class CountsItsCache(RemoteForCausalLM):
    """Logits that depend on how many tokens the cache holds: a prefix that is not in it is not counted."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **{**kwargs, "use_cache": True})
        cache = caches.of(output)
        output.logits = output.logits * (1 + 0.1 * cache.get_seq_length())
        return output


class NeedsMore(RemoteForCausalLM):
    """Cannot be built from its configuration alone."""

    def __init__(self, config: Any, table: Any = None) -> None:
        if table is None:
            raise RuntimeError("where is the table?")
        super().__init__(config)


def remote(kind: Any, *more: Any) -> Any:
    settings = tiny_model("llama").config.to_dict()
    settings.pop("model_type")
    config = RemoteConfig(**settings)
    config._attn_implementation = "eager"
    return kind(config, *more).double().eval()


def test_remote_code_is_checked_as_well(builds: list[str]) -> None:
    for kind in KINDS:
        model = remote(RemoteForCausalLM)
        running = sb.attach(model, prompt_for(model, kind))
        called(running)
        assert verdict_of(running).status == "kept"
        assert verdict_of(running).model == "RemoteForCausalLM"
    assert builds == ["RemoteForCausalLM"] * 2


def test_remote_code_that_is_another_function_is_loud() -> None:
    model = remote(CountsItsCache)
    with pytest.raises(EngineError, match=r"breaks the promise 'reference'.*CountsItsCache"):
        called(sb.attach(model, prompt_for(model, "prefix")))


def test_two_classes_of_one_name_are_two(builds: list[str]) -> None:
    """Those that a function makes may differ in what the function knows: nothing of them outlives the process."""

    def made_by(scale: float) -> Any:
        class Made(RemoteForCausalLM):
            def forward(self, *args: Any, **kwargs: Any) -> Any:
                output = super().forward(*args, **kwargs)
                output.logits = output.logits * scale
                return output

        return Made

    for number in (2.0, 3.0):
        model = remote(made_by(number))
        called(sb.attach(model, prompt_for(model, "input")))
    assert builds == ["Made"] * 2
    assert not folder().exists()


def test_what_cannot_be_tried_is_a_warning_once(builds: list[str]) -> None:
    model = remote(NeedsMore, object())
    running = sb.attach(model, prompt_for(model, "input"))
    with pytest.warns(UnprovenWarning, match="could not check its engine 'native' on NeedsMore: .*where is the table"):
        called(running)
    assert verdict_of(running).status == "unproven"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        called(running)


def test_what_cannot_be_described_runs_unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(*args: Any) -> Any:
        raise RuntimeError("no words for it")

    monkeypatch.setattr(Architecture, "of", of)
    running = attached("gpt2", "input")
    with pytest.warns(UnprovenWarning, match="no words for it"):
        called(running)
    called(running)


def test_a_large_model_is_not_built() -> None:
    """What shrinks by no name that is known is counted before it has memory."""

    class Wide(RemoteForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.more = torch.nn.Linear(1 << 16, 1 << 16, bias=False, device="meta")

    model = remote(Wide)
    found = prove(ENGINE, Architecture.of(model, "eager"), prompt_for(model, "input"))
    assert found.status == "unproven"
    assert "BaseModelError: 4294" in found.reason


def test_layers_of_each_kind_are_kept() -> None:
    """Windows in every sixth layer but one; a layer without rotary positions; a prompt that leaves layers out."""
    config = AutoConfig.for_model(
        "gemma3_text",
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=512,
    )
    model = build(config, "causal-lm", torch.float64, 0)
    prompt = prompt_for(model, "prefix")
    architecture = Architecture.of(model, "eager")
    first = next(miniature.miniatures(architecture, prompt))
    assert first.chosen == {"decoder": (0, 5)}
    assert first.geometry.decoder is not None
    assert first.geometry.decoder.window == miniature.WINDOW
    (part,) = prompt.prefixes
    some = replace(prompt, parts=(KeyValuePrefix("self", {n: part.layers[n] for n in (0, 5, 6, 11)}),))
    assert next(miniature.miniatures(architecture, some)).chosen == {"decoder": (0, 1, 5)}
    assert list(miniature.like(some, next(miniature.miniatures(architecture, some))).prefixes[0].layers) == [0, 2]
    lost = replace(prompt, positions=replace(prompt.positions, unbiased_from={"decoder": 3}))
    small = next(miniature.miniatures(architecture, lost))
    assert small.chosen == {"decoder": (0, 3, 5)}
    assert miniature.like(lost, small).positions.unbiased_from == {"decoder": 1}
    whole = replace(lost, positions=replace(prompt.positions, unbiased_from={"decoder": 12}))
    assert miniature.like(whole, next(miniature.miniatures(architecture, whole))).positions.unbiased_from == {}
    assert prove(ENGINE, architecture, prompt).status == "kept"
