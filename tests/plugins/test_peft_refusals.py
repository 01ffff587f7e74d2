"""What PEFT cannot do with a prompt is refused by name, before it runs, and the way out that is named is one."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from transformers import StaticCache

import softbridge as sb
from softbridge.errors import EngineError
from softbridge.geometry import read_geometry
from softbridge.prompt import SoftPrompt
from softbridge.testing import random_input_prompt, random_prefix, tiny_model
from softbridge_compat import peft_defects
from softbridge_peft.engine import ENGINE

peft = pytest.importorskip("peft")

pytestmark = [
    # Defects of PEFT, held by tests/compat: peft-deprecated and peft-position-warning.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
]

ROW = torch.tensor([[5, 17, 40, 8]])
WAY_OUT = r"softbridge\.attach\(model, prompt, engine='native'\)"


def prompts(family: str) -> tuple[SoftPrompt, SoftPrompt]:
    geometry = read_geometry(tiny_model(family).config)
    return random_input_prompt(geometry), random_prefix(geometry)


def generate(model: Any, **more: Any) -> list[int]:
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    out = model.generate(input_ids=ROW, attention_mask=torch.ones_like(ROW), **settings, **more)
    return list(out[0, -5:].tolist())


def step(model: Any) -> torch.Tensor:
    """The gradient of a loss with respect to what is attached, in training mode."""
    model.train().zero_grad()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("prompt_encoder" in name or "softbridge" in name)
    model(input_ids=ROW, attention_mask=torch.ones_like(ROW), labels=ROW).loss.backward()
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def enable(model: Any, yes: bool = True) -> None:
    """Under a name that transformers 5 warns of."""
    what = "enable" if yes else "disable"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        getattr(model, f"gradient_checkpointing_{what}")()


def test_a_prefix_under_gradient_checkpointing() -> None:
    vectors, prefix = prompts("llama")
    attached = sb.attach(tiny_model("llama"), prefix, "peft")
    plain = step(attached)
    enable(attached)
    with pytest.raises(EngineError, match=WAY_OUT) as caught:
        step(attached)
    assert "gradient checkpointing" in caught.value.found
    enable(attached, False)
    assert torch.equal(step(attached), plain)

    model = sb.detach(attached)
    enable(model)
    model.is_quantized = True
    with pytest.raises(EngineError, match=WAY_OUT) as caught:
        sb.attach(model, prefix, "peft")
    assert "prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)" in caught.value.remedy
    found = step(sb.attach(model, prefix))
    assert torch.allclose(found.norm(), plain.norm(), rtol=1e-6)  # PEFT's is one tensor, in another order
    assert not torch.allclose(found.norm(), 0 * plain.norm())

    attached = sb.attach(tiny_model("llama"), vectors, "peft")
    plain = step(attached)
    enable(attached)
    assert torch.equal(step(attached), plain)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_static_caches(family: str) -> None:
    for prompt in prompts(family):
        attached = sb.attach(tiny_model(family), prompt, "peft")
        wrong = peft_defects.RENAMED_CACHE_GENERATE.applies()  # and refused for that, where nothing else is asked
        expected = [] if wrong else generate(attached)
        config = attached.generation_config
        told: list[dict[str, Any]] = [
            {"cache_implementation": "static"},
            {"past_key_values": StaticCache(config=attached.config, max_cache_len=32)},
            {"generation_config": type(config)(**{**config.to_diff_dict(), "cache_implementation": "hybrid"})},
        ]
        for more in told:
            with pytest.raises(EngineError, match=r"leave .* out, for a cache that grows") as caught:
                generate(attached, **more)
            assert ("native" in caught.value.remedy) == bool(prompt.prefixes)
        with pytest.raises(EngineError, match="StaticCache"):
            attached(input_ids=ROW, **told[1])
        config.cache_implementation = "static"
        with pytest.raises(EngineError, match="'static'"):
            generate(attached)
        if not wrong:
            assert generate(attached, cache_implementation="dynamic") == expected
        config.cache_implementation = None
        if not wrong:
            assert generate(attached) == expected
    native = sb.attach(tiny_model(family), prompts(family)[1])
    expected = expected or generate(native)
    assert generate(native, cache_implementation="static") == expected


def test_a_prompt_in_the_encoder_takes_a_static_cache() -> None:
    attached = sb.attach(tiny_model("t5"), prompts("t5")[0], "peft")
    assert generate(attached, cache_implementation="static") == generate(attached)


def test_mixed_batches() -> None:
    for prompt in prompts("gpt2"):
        attached = sb.attach(tiny_model("gpt2"), prompt, "peft")
        for call in (attached, attached.generate):
            with pytest.raises(EngineError, match=WAY_OUT) as caught:
                call(input_ids=ROW, adapter_names=["default"])
            assert "every row the active one" in caught.value.found
        assert attached(input_ids=ROW, adapter_names=None).logits.isfinite().all()


def test_a_model_that_carries_an_adapter() -> None:
    """The native engine lets the layers of LoRA be."""
    model = tiny_model("llama")
    settings = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lora = peft.get_peft_model(tiny_model("llama"), settings).eval()
    prefix = prompts("llama")[1]
    for given, said in ((lora, "which is no PreTrainedModel"), (lora.get_base_model(), WAY_OUT)):
        assert [obstacle.name for obstacle in ENGINE.obstacles(prefix, given)] == ["attached"]
        with pytest.raises(EngineError, match=said):
            sb.attach(given, prefix, "peft")
    with torch.no_grad():
        alone = lora(input_ids=ROW).logits
        both = sb.attach(lora.get_base_model(), prefix)(input_ids=ROW).logits
        prompted = sb.attach(model, prefix)(input_ids=ROW).logits
    sb.detach(lora.get_base_model())
    with torch.no_grad():
        assert torch.equal(lora(input_ids=ROW).logits, alone)
    assert min(float((both - other).abs().max()) for other in (alone, prompted)) > 0.1
