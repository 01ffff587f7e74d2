"""A server is held to what transformers answers, within its own noise; and a prompt that is not served is noticed.

The servers here are transformers itself in float32, with a fault each, so that no server need be installed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import softbridge as sb
from softbridge.base import BaseModel
from softbridge.errors import EngineError, Obstacle, OutputError
from softbridge.lowering.examples import random_input_prompt, random_prefix
from softbridge.lowering.planner import lower
from softbridge.lowering.steps import Target
from softbridge.plugin.serving import Answer, Ask, Request
from softbridge.testing import tiny_config, tiny_model
from softbridge.verification import serving
from softbridge.verification.recheck import verify_again
from softbridge.verification.serving import judge
from softbridge_peft.format import FORMAT

Change = Callable[[sb.SoftPrompt], sb.SoftPrompt | None]


def drop_first(prompt: sb.SoftPrompt) -> sb.SoftPrompt:
    part = prompt.inputs[0]
    start = {stack: n - 1 for stack, n in prompt.positions.start.items()}
    shorter = replace(part, vectors=part.vectors[1:])
    return replace(prompt, parts=(shorter,), positions=replace(prompt.positions, start=start))


class Fake:
    """transformers, with its own noise, and what it makes of a prompt."""

    name = "fake"
    summary = "transformers in float32"

    def __init__(self, change: Change = lambda prompt: prompt, noise: float = 0.0, mixed_up: bool = False) -> None:
        self.change, self.noise, self.mixed_up = change, noise, mixed_up

    def unavailable(self) -> str | None:
        return None

    def version(self) -> str:
        return "fake 1.0, float32"

    def obstacles(self, config: Any) -> Sequence[Obstacle]:
        if config.model_type != "gpt_neox":
            return []
        return [Obstacle("family", "fake serves no gpt_neox", "choose another base")]

    @contextmanager
    def open(self, base: Path, prompts: Mapping[str, Path], scratch: Path) -> Iterator[Ask]:
        assert not list(scratch.iterdir())
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
        generator = np.random.default_rng(0)

        def answer(request: Request, length: int) -> Answer:
            prompt = None
            if request.prompt is not None:
                prompt = self.change(sb.load(prompts[request.prompt], base=model.config))
            running = model if prompt is None else sb.attach(model, prompt, self_check=False)
            ids, rows = torch.tensor([request.tokens]), []
            with torch.no_grad():
                for _ in range(length):
                    logits = running(input_ids=ids).logits[0, -1]
                    ids = torch.cat([ids, logits.argmax()[None, None]], 1)
                    rows.append(logits.double().log_softmax(-1).numpy())
            if prompt is not None:
                sb.detach(running)
            steps = np.stack(rows)
            return Answer(ids[0, -length:].numpy(), steps + generator.normal(0, self.noise, steps.shape))

        def ask(requests: Sequence[Request], length: int) -> list[Answer]:
            if self.mixed_up and len(requests) > 1:
                requests = [replace(one, prompt=None) for one in requests]
            return [answer(request, length) for request in requests]

        yield ask


class Form:
    """PEFT's format, whose files the fake server reads."""

    server = "fake"

    def __getattr__(self, name: str) -> Any:
        return getattr(FORMAT, name)


@pytest.fixture
def served_by(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Any]:
    def serve(server: Any) -> Any:
        monkeypatch.setattr(serving, "servers", lambda: {"fake": server})
        return Form()

    return serve


MAKERS = {"prefix": random_prefix, "prompt": random_input_prompt}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_is_served_within_the_servers_own_noise_is_served(
    family: str, kind: str, served_by: Callable[[Any], Any]
) -> None:
    base = BaseModel.resolve(tiny_config(family))
    prompt = MAKERS[kind](base.geometry)
    found = judge(served_by(Fake()), prompt, base)
    assert found.verdict == "served", found.summary()
    assert found.noise < 1e-5
    assert 1 <= found.strain < 10
    assert found.effect > 1e4 * found.bound
    names = {fault.name for fault in found.faults}
    assert {"keys and values swapped", "two layers swapped"} <= names or kind == "prompt"
    # A prefix of GPT-2 has no positions in its file: its caller passes them, and a server does not.
    assert ("shifted by one position" in names) != ("shifted by one position" in found.untried)
    assert ("shifted by one position" in found.untried) == (family == "gpt2" and kind == "prefix")
    assert json.loads(json.dumps(found.to_json()))["verdict"] == "served"


@pytest.mark.parametrize(
    ("kind", "server"),
    [
        ("prefix", Fake(lambda prompt: None)),
        ("prompt", Fake(lambda prompt: None)),
        ("prompt", Fake(drop_first)),
        ("prefix", Fake(mixed_up=True)),
        ("prompt", Fake(mixed_up=True)),
    ],
    ids=["no prefix", "no prompt", "a vector too few", "bare prefixes in a batch", "bare prompts in a batch"],
)
def test_what_is_not_served_is_noticed(kind: str, server: Fake, served_by: Callable[[Any], Any]) -> None:
    base = BaseModel.resolve(tiny_config("llama"))
    found = judge(served_by(server), MAKERS[kind](base.geometry), base)
    assert found.verdict != "served"
    assert max(found.alone, found.batch) > 100 * found.bound


def test_a_server_that_is_noisier_than_the_prompts_effect_judges_nothing(served_by: Callable[[Any], Any]) -> None:
    base = BaseModel.resolve(tiny_config("llama"))
    found = judge(served_by(Fake(noise=5.0)), random_prefix(base.geometry), base)
    assert found.verdict == "insensitive"


@pytest.mark.parametrize("encoding", [None, *FORMAT.encodings])
def test_what_was_asked_for_is_judged(encoding: str | None, served_by: Callable[[Any], Any]) -> None:
    """In that encoding, and with faults in the dtype of the prompt: a server may have one for all."""
    base = BaseModel.resolve(tiny_config("llama"))
    prompt = lower(
        random_prefix(base.geometry), Target(FORMAT.name, FORMAT.capabilities, base, "float16"), (), FORMAT.obstacles
    ).prompt
    form, files = served_by(Fake()), []

    def write(prompt: sb.SoftPrompt, geometry: Any, encoding: str | None = None) -> Mapping[str, bytes]:
        dtypes = {array.dtype.name for _, array in prompt.arrays()}
        files.append((encoding, dtypes))
        return FORMAT.write(prompt, geometry, encoding)

    form.write = write
    found = judge(form, prompt, base, encoding=encoding)
    assert "shifted by one position" in {fault.name for fault in found.faults}  # which rotates keys, in float32
    assert files == [(encoding, {"float16"})] * (1 + len(found.faults))


def test_wrong_prompts_are_tried_under_the_conditions_of_the_right_one(served_by: Callable[[Any], Any]) -> None:
    base = BaseModel.resolve(tiny_config("llama"))

    class Conditional(Form):
        def obstacles(self, prompt: sb.SoftPrompt, geometry: Any) -> Sequence[Obstacle]:
            return [Obstacle("window", "the same only for short texts", "accept it", acceptable=True)]

    served_by(Fake())
    found = judge(Conditional(), random_prefix(base.geometry), base)  # type: ignore[arg-type]
    assert found.verdict == "served"
    assert {fault.name for fault in found.faults} >= {"keys and values swapped", "two layers swapped"}
    assert not found.untried


def test_a_base_that_is_not_served_is_refused(served_by: Callable[[Any], Any]) -> None:
    base = BaseModel.resolve(tiny_config("gpt_neox"))
    with pytest.raises(EngineError, match=r"fake serves no gpt_neox(.|\n)*to do: +choose another base"):
        judge(served_by(Fake()), random_prefix(base.geometry), base)


def test_a_conversion_is_judged_by_the_server_that_reads_its_files(
    tmp_path: Path, served_by: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_model("llama", torch.float32)
    sb.save(random_prefix(BaseModel.resolve(base).geometry), tmp_path / "source", format="softbridge", base=base)
    form = served_by(Fake())
    monkeypatch.setattr("softbridge.conversion.format_named", lambda name: form)
    report = sb.convert(tmp_path / "source", tmp_path / "served", "peft", base=base, verify=True)
    assert report.served is not None
    assert report.served.verdict == "served"
    assert report.certificate is not None
    recorded = json.loads((tmp_path / "served" / "certificate.json").read_text())
    assert recorded["served"]["verdict"] == "served"
    assert (recorded["served"]["server"], recorded["served"]["version"]) == ("fake", "fake 1.0, float32")
    assert verify_again(tmp_path / "served" / "certificate.json", base).holds
    served_by(Fake(lambda prompt: None))
    with pytest.raises(OutputError, match=r"found the converted prompt different by fake(.|\n)*report this"):
        sb.convert(tmp_path / "source", tmp_path / "bad", "peft", base=base, verify=True)
    served_by(Fake(noise=5.0))
    with pytest.raises(OutputError, match=r"converted prompt insensitive by fake(.|\n)*in which fake rounds less"):
        sb.convert(tmp_path / "source", tmp_path / "bad", "peft", base=base, verify=True)
    assert not (tmp_path / "bad").exists()
    assert sb.convert(tmp_path / "source", tmp_path / "quick", "peft", base=base).served is None


def test_a_base_of_many_words_is_served_as_a_smaller_one(served_by: Callable[[Any], Any]) -> None:
    """Files are written for the model that is served, of which a server may ask how many words it has."""
    base = BaseModel.resolve(tiny_config("llama", vocab_size=5000))
    written = []

    class Recording(Form):
        def write(self, prompt: sb.SoftPrompt, geometry: Any, encoding: str | None = None) -> Mapping[str, bytes]:
            written.append((prompt.base.geometry, geometry))
            return FORMAT.write(prompt, geometry, encoding)

    served_by(Fake())
    assert judge(Recording(), random_prefix(base.geometry), base).verdict == "served"  # type: ignore[arg-type]
    assert {geometry.vocabulary for pair in written for geometry in pair if geometry is not None} == {512}
