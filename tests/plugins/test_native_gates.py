"""Gates of the native engine against AdapterHub, run here; for its numbers elsewhere see test_adapterhub_golden.py.

A gate is a mean over whatever is in the call, so it depends on pads and on a cache. That is the toolkit's function.
"""

from __future__ import annotations

import copy
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from softbridge.prompt import SoftPrompt
from softbridge.testing import agreement, apart
from softbridge_native.engine import ENGINE

FAR = 0.1
NEW = 5


@pytest.fixture(scope="module")
def maker() -> Any:
    """The functions of the script that makes the golden files."""
    pytest.importorskip("adapters")
    return runpy.run_path(str(Path(__file__).parent.parent / "golden" / "make_adapterhub.py"))


def attached(model: Any, prompt: SoftPrompt) -> Any:
    return ENGINE.attach(copy.deepcopy(model), prompt)


def changed(prompt: SoftPrompt, change: Any) -> SoftPrompt:
    """The prompt with every gate changed."""

    def part(prefix: Any) -> Any:
        return replace(prefix, layers={n: replace(pair, gate=change(pair.gate)) for n, pair in prefix.layers.items()})

    return replace(prompt, parts=tuple(part(prefix) for prefix in prompt.prefixes))


def difference(a: Tensor, b: Tensor) -> float:
    return float((a.detach() - b.detach()).abs().max())


def generate(model: Any, ids: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    settings |= {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), output_logits=True, return_dict_in_generate=True, **settings
    )
    return made.sequences, torch.stack(made.logits)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["shared", "own"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "bart"])
def test_is_adapterhub(family: str, case: str, maker: Any) -> None:
    """Logits, unpadded and padded on the right, and every gradient. BART has all three sites."""
    model = maker["small"](family)
    prompt = dict(maker["cases"](model, "prefixes"))[case]
    inputs, mask = maker["inputs_for"](model)
    ours, toolkit = attached(model, prompt), maker["with_adapterhub"](model, prompt)
    wrong = {"no gates": attached(model, changed(prompt, lambda gate: None))}
    if case == "own":
        reversed_gates = changed(prompt, lambda gate: replace(gate, weight=gate.weight[::-1], bias=gate.bias[::-1]))
        wrong["keys' for values'"] = attached(model, reversed_gates)
    for given in (inputs, maker["padded"](inputs, mask)):
        queries = given.get("decoder_attention_mask", given.get("attention_mask"))
        keep = slice(None) if queries is None else queries.bool()
        expected = toolkit(**given).logits[keep]
        assert apart(ours(**given).logits[keep], expected) <= agreement(model, **given)
        for name, other in wrong.items():
            assert difference(other(**given).logits[keep], expected) > FAR, name

    for running in (toolkit, ours):
        running(**inputs).logits.square().mean().backward()
    theirs = {name: p.grad for name, p in toolkit.named_parameters() if ".prefix_gates." in name}
    for kind in ("weight", "bias"):
        gradients = [p.grad for name, p in ours.named_parameters() if name.endswith(f"gate.{kind}")]
        norms = sorted(float(gradient.norm()) for gradient in gradients)
        other = sorted(float(grad.norm()) for name, grad in theirs.items() if name.endswith(kind))
        assert norms == pytest.approx(other, rel=1e-6)
        assert min(norms) > 0


@pytest.mark.filterwarnings("ignore")
def test_generates_as_adapterhub_does(maker: Any) -> None:
    """With a cache and without: two functions, for with one the mean goes over the one new token."""
    model = maker["small"]("gpt2")
    prompt = dict(maker["cases"](model, "prefixes"))["own"]
    ours, toolkit = attached(model, prompt), maker["with_adapterhub"](model, prompt)
    ids = maker["inputs_for"](model)[0]["input_ids"]
    found = [generate(ours, ids, use_cache=use_cache) for use_cache in (True, False)]
    for made, use_cache in zip(found, (True, False), strict=True):
        for mine, theirs in zip(made, generate(toolkit, ids, use_cache=use_cache), strict=True):
            assert apart(mine, theirs) <= agreement(model, **maker["inputs_for"](model)[0])
    (_, cached), (_, uncached) = found
    assert torch.equal(cached[0], uncached[0])
    assert difference(cached[1:], uncached[1:]) > FAR
