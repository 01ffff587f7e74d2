"""Where PEFT's own `generate` is wrong: it is refused, named, and not blamed on a conversion."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig
from typer.testing import CliRunner

import softbridge as sb
from softbridge.base import BaseModel
from softbridge.cli.console import app
from softbridge.errors import EngineError
from softbridge.geometry import read_geometry
from softbridge.plugin.hookspecs import Misgenerating
from softbridge.prompt import SoftPrompt
from softbridge.testing import random_input_prompt, random_prefix, tiny_config, tiny_model
from softbridge.verification import Subject
from softbridge.verification.bench import Bench
from softbridge.verification.probes import GREEDY, Probe
from softbridge.verification.run import attached, run
from softbridge_compat import peft_defects
from softbridge_native.engine import ENGINE as NATIVE
from softbridge_peft.engine import ENGINE as PEFT

pytest.importorskip("peft")

BROKEN = peft_defects.RENAMED_CACHE_GENERATE.applies()
ROW = torch.tensor([[5, 6, 7, 8]])


def prompt_for(family: str, kind: str) -> SoftPrompt:
    geometry = read_geometry(tiny_config(family))
    return random_input_prompt(geometry) if kind == "prompt" else random_prefix(geometry)


def generate(model: Any, **more: Any) -> list[int]:
    told = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, **more}
    return list(model.generate(input_ids=ROW, attention_mask=torch.ones_like(ROW), **told)[0, -8:].tolist())


def test_which_prompts_it_concerns() -> None:
    assert isinstance(PEFT, Misgenerating)
    assert not isinstance(NATIVE, Misgenerating)
    for family, kind, concerned in (
        ("llama", "prompt", True),
        ("gpt2", "prefix", True),
        ("t5", "prefix", True),
        ("t5", "prompt", False),
        ("bert", "prefix", False),
    ):
        fault = PEFT.generate_fault(prompt_for(family, kind), read_geometry(tiny_config(family)))
        assert (fault is not None) == (BROKEN and concerned), (family, kind)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_attached_model_generates_right_or_not_at_all(family: str, kind: str) -> None:
    prompt = prompt_for(family, kind)
    expected = generate(sb.attach(tiny_model(family), prompt))
    model = sb.attach(tiny_model(family), prompt, "peft")
    assert expected != generate(tiny_model(family)), "the prompt is felt"
    if kind == "prompt":
        assert generate(model, use_cache=False) == expected
    if not BROKEN:
        assert generate(model) == expected
        return
    with pytest.raises(EngineError, match="renamed the cache") as caught:
        generate(model)
    assert "native" in caught.value.remedy
    assert ("use_cache=False" in caught.value.remedy) == (kind == "prompt")
    model.generation_config.use_cache = False
    if kind == "prompt":
        assert generate(model) == expected
        return
    with pytest.raises(EngineError, match="renamed the cache"):
        generate(model)


def test_a_prompt_in_the_encoder_generates_everywhere() -> None:
    prompt = prompt_for("t5", "prompt")
    assert generate(sb.attach(tiny_model("t5"), prompt, "peft")) == generate(sb.attach(tiny_model("t5"), prompt))


@pytest.mark.parametrize(("family", "forced"), [("llama", {}), ("t5", {"forced_bos_token_id": 9})])
def test_tokens_picked_through_the_forward_are_those_that_generate_picks(family: str, forced: dict[str, int]) -> None:
    """On a model whose `generate` is right. The end of the text is the likeliest token, and is not picked."""
    bench = Bench(BaseModel.resolve(tiny_config(family)), False, 0, None, None, None)
    prompt = prompt_for(family, "prompt")
    (probe,) = (probe for probe in bench.probes(prompt) if probe.greedy)

    def picked(one: Probe, **settings: Any) -> Any:
        model = bench.model()
        model.generation_config.update(**{**forced, **settings})
        with attached(NATIVE, model, prompt) as running:
            return run(running, [one])[GREEDY]

    stepwise = replace(probe, stepwise=True)
    free = picked(probe, eos_token_id=None)
    likely = int(free[0, 2])
    for settings in ({"eos_token_id": None}, {"eos_token_id": likely}, {"eos_token_id": [likely, 1]}):
        expected = picked(probe, **settings)
        assert np.array_equal(picked(stepwise, **settings), expected)
        assert (likely in expected) == (settings["eos_token_id"] is None)
    last = {"eos_token_id": likely, "forced_eos_token_id": 11}
    assert np.array_equal(picked(stepwise, **last), picked(probe, **last))
    assert picked(probe, **last)[0, -1] == 11


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_a_conversion_is_judged_by_itself(kind: str, tmp_path: Path) -> None:
    """PEFT's own loader runs PEFT's files, and the verdict is that of the conversion, which is the same function."""
    config = tiny_config("llama")
    config.save_pretrained(tmp_path / "base")
    method = {"prompt": "prompt-tuning", "prefix": "prefix-tuning"}[kind]
    PEFT.train_example(tiny_model("llama", torch.float32), method, tmp_path / "peft", length=4, steps=2, seed=0)
    arguments = ["convert", str(tmp_path / "peft"), str(tmp_path / "out"), "--to", "softbridge", "--json"]
    done = CliRunner().invoke(app, [*arguments, "--base", str(tmp_path / "base"), "--verify"])
    assert done.exit_code == 0, done.output
    certificate = json.loads(done.stdout)["certificate"]
    assert certificate["verdict"] in ("bitwise", "exact")
    assert certificate["source"]["engine"] == "peft"
    assert certificate["source"]["loaded"]
    (greedy,) = (figure for figure in certificate["figures"] if figure["probe"] == GREEDY)
    assert greedy["judged"]
    assert greedy["float64"] == 0
    assert ("token by token through its forward" in greedy["note"]) == BROKEN
    assert all(fault["noticed"] for fault in certificate["faults"])
    assert "defect of softbridge" not in done.output


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_another_prompt_is_still_another(kind: str) -> None:
    """Tokens that are picked through the forward differ, too, where the prompt does."""
    bench = Bench(BaseModel.resolve(tiny_config("llama")), False, 0, None, None, None)
    geometry = read_geometry(tiny_config("llama"))
    make = random_input_prompt if kind == "prompt" else random_prefix
    a, b = (Subject("", make(geometry, 4, seed=seed), "peft", None) for seed in (0, 1))
    runs = [bench.own(one, PEFT)[0] for one in (a, b)]
    native = bench.own(a, NATIVE)[0]
    assert np.array_equal(runs[0][GREEDY], native[GREEDY])
    assert not np.array_equal(runs[0][GREEDY], runs[1][GREEDY])


SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
OTHERS: dict[str, dict[str, Any]] = {
    "bart": {
        "vocab_size": 96,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
    },
    "roberta": SMALL,
    "electra": SMALL,
    "distilbert": {"vocab_size": 96, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
}


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "bart", "bert", "roberta", "electra", "distilbert"])
def test_a_prefix_runs_or_is_refused_with_the_true_reason(family: str) -> None:
    """Whatever a model calls its cache; one that takes none is told so, and a toolkit's fault is called that."""
    base = BaseModel(AutoConfig.for_model(family, **OTHERS[family]) if family in OTHERS else tiny_config(family))
    model = base.structure(torch.float64, 0)
    prompt = random_prefix(base.geometry)
    if base.geometry.is_encoder_decoder:  # PEFT gives its layers one block each only where their number is odd
        (part,) = prompt.parts
        prompt = replace(prompt, parts=(replace(part, layers=dict.fromkeys(part.layers, part.layers[0])),))
    expected = ""
    if family == "distilbert":
        expected = "takes no past key values"
    elif base.task == "sequence-classification" and peft_defects.RENAMED_CACHE_CLASSIFIER.applies():
        expected = "does not know what the installed transformers calls the cache"
    elif family in ("roberta", "electra") and peft_defects.UNPOOLED_PREFIX.applies():
        expected = "PEFT fails with a prefix on"
    if expected:
        with pytest.raises(EngineError, match=expected):
            sb.attach(model, prompt, "peft")
        return
    ids = {"input_ids": ROW, **({"decoder_input_ids": ROW} if base.geometry.is_encoder_decoder else {})}
    with torch.no_grad():
        bare = model(**ids).logits
        running = sb.attach(model, prompt, "peft")(**ids).logits
    assert (running - bare).abs().max() > 0.1, "the prefix is felt"
    try:
        native = sb.attach(base.structure(torch.float64, 0), prompt)
    except EngineError:
        assert family in ("t5", "bert"), "the two that do not dispatch on transformers 4"
        return
    with torch.no_grad():
        apart = (native(**ids).logits - running).abs().max() / running.abs().max()
    assert apart < (1e-5 if family in ("llama", "t5") else 1e-12), "a float32 region of the model"
