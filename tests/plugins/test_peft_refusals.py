"""What PEFT cannot do with a prompt is refused by name, before it runs, and the way out that is named is one."""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, StaticCache

import softbridge as sb
from softbridge.base import build
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
    for given, said in ((lora, "which is not a PreTrainedModel"), (lora.get_base_model(), WAY_OUT)):
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


OPT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "word_embed_proj_dim": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
#: A text that repeats itself, so that looking it up finds something.
AGAIN = torch.tensor([[5, 9, 17, 33, 21, 9, 17, 33]])


def opt() -> Any:
    return build(AutoConfig.for_model("opt", **OPT), "causal-lm", torch.float64, 0)


def tokens_of(model: Any, **told: Any) -> list[int]:
    model.generation_config.eos_token_id = 200  # none that it has
    found = model.generate(
        input_ids=AGAIN,
        attention_mask=torch.ones_like(AGAIN),
        max_new_tokens=8,
        do_sample=False,
        pad_token_id=0,
        **told,
    )
    return list(found[0, AGAIN.shape[1] :].tolist())


def unguarded(model: Any, **told: Any) -> list[int] | None:
    """What PEFT itself makes of it: tokens, or an error."""
    bare = SimpleNamespace(generate=model.generate.run, generation_config=model.generation_config)
    try:
        return tokens_of(bare, **told)
    except Exception:
        return None


generates = pytest.mark.skipif(
    peft_defects.RENAMED_CACHE_GENERATE.applies(),
    reason="PEFT's generate is wrong here, and refused",
)


@generates
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["input", "prefix"])
@pytest.mark.parametrize("way", ["prefill_chunk_size", "prompt_lookup_num_tokens", "assistant_model"])
def test_a_text_in_pieces(way: str, kind: str) -> None:
    vectors, prefix = prompts("llama")
    prompt = prefix if kind == "prefix" else vectors
    attached = sb.attach(tiny_model("llama"), prompt, "peft")
    told = {way: tiny_model("llama") if way == "assistant_model" else 3}
    plain = tokens_of(attached)
    with pytest.raises(EngineError, match=WAY_OUT) as caught:
        tokens_of(attached, **told)
    assert way in caught.value.found
    assert unguarded(attached) == plain
    assert unguarded(attached, **told) != plain, "PEFT is right by now: no reason to refuse"
    if way != "assistant_model":
        setting = copy.deepcopy(attached.generation_config)
        setattr(setting, way, 3)
        with pytest.raises(EngineError, match=WAY_OUT):
            tokens_of(attached, generation_config=setting)
    assert tokens_of(sb.attach(tiny_model("llama"), prompt)) == plain
    assert tokens_of(sb.attach(tiny_model("llama"), prompt), **told) == plain


@generates
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "gpt_neox", "opt"])
def test_no_cache(family: str) -> None:
    """Refused exactly where PEFT fails or gives other tokens, which is where the model returns a cache all the same."""
    model = opt if family == "opt" else lambda: tiny_model(family)
    geometry = read_geometry(model().config)
    prefix = random_prefix(geometry)
    attached = sb.attach(model(), prefix, "peft")
    plain = tokens_of(attached)
    if unguarded(attached, use_cache=False) == plain:
        assert tokens_of(attached, use_cache=False) == plain
    else:
        with pytest.raises(EngineError, match=WAY_OUT) as caught:
            tokens_of(attached, use_cache=False)
        assert "use_cache=False" in caught.value.found
    vectors = sb.attach(model(), random_input_prompt(geometry), "peft")
    assert tokens_of(vectors, use_cache=False) == tokens_of(vectors)
