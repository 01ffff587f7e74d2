"""Each of AdapterHub's recorded defects, shown where the record says that it applies."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

adapters = pytest.importorskip("adapters")

import torch  # noqa: E402
from transformers import AutoConfig  # noqa: E402

from softbridge.base import build  # noqa: E402
from softbridge.testing import tiny_model  # noqa: E402
from softbridge_compat.adapterhub_defects import DEFECTS  # noqa: E402

pytestmark = [
    # AdapterHub's T5 passes transformers an argument under its old name.
    pytest.mark.filterwarnings("ignore:`past_key_value` is deprecated:FutureWarning"),
    # transformers compiles parts of DeBERTa with a compiler that torch is about to drop.
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]

TOKENS = torch.tensor([[5, 9, 17, 33, 21, 80, 4]])


def prefixed(family: str, attention: str = "eager", *, flat: bool = True, **settings: Any) -> Any:
    """A model with a large random prefix, the same one whatever the attention."""
    eager = tiny_model(family)
    config = copy.deepcopy(eager.config)
    config._attn_implementation = attention
    model = type(eager)(config).to(torch.float64).eval()
    model.load_state_dict(eager.state_dict())
    adapters.init(model)
    model.add_adapter("x", adapters.PrefixTuningConfig(flat=flat, prefix_length=5, bottleneck_size=6, **settings))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.base_model.prefix_tuning.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.set_active_adapters("x")
    return model.eval()


def logits(model: Any, **inputs: Any) -> Any:
    with torch.no_grad():
        return model(**{"input_ids": TOKENS, **inputs}).logits


def difference(a: Any, b: Any) -> float:
    return float((a - b).abs().max())


def sdpa_causal(folder: Path) -> bool:
    # As wrong as described: a prefix of 5 tokens hides the first token from the second.
    changed = TOKENS.clone()
    changed[:, 0] = 50
    model = prefixed("gpt2", "sdpa")
    blind = difference(logits(model)[:, 1], logits(model, input_ids=changed)[:, 1]) == 0
    return blind and difference(logits(model), logits(prefixed("gpt2"))) > 1


def sdpa_mask(folder: Path) -> bool:
    mask = torch.ones_like(TOKENS)
    mask[:, -1] = 0
    model = prefixed("llama", "sdpa")
    with_prefix = logits(model, attention_mask=mask)[:, :-1]
    eager = logits(prefixed("llama"), attention_mask=mask)[:, :-1]
    model.set_active_adapters(None)
    ignored = difference(with_prefix, logits(model, attention_mask=mask)[:, :-1]) < 1e-9
    return ignored and difference(with_prefix, eager) > 1


def llama_cache(folder: Path) -> bool:
    with torch.no_grad():
        filled = {f: prefixed(f)(input_ids=TOKENS, use_cache=True).past_key_values for f in ("llama", "gpt2")}
    assert filled["gpt2"].get_seq_length() == TOKENS.shape[1]
    return int(filled["llama"].get_seq_length()) == 0


def eject_gqa(folder: Path) -> bool:
    prefixed("gpt2", flat=False).eject_prefix_tuning("x")
    try:
        prefixed("llama", flat=False).eject_prefix_tuning("x")
    except RuntimeError as error:
        return "invalid for input of size" in str(error)
    return False


def ejected_flat(folder: Path) -> bool:
    model = prefixed("gpt2", flat=False)
    before = logits(model)
    model.eject_prefix_tuning("x")
    assert difference(logits(model), before) < 1e-5
    model.save_adapter(str(folder), "x", with_head=False)
    again = tiny_model("gpt2")
    adapters.init(again)
    again.load_adapter(str(folder), set_active=True)
    return difference(logits(again.eval()), before) > 0.1


def safetensors(folder: Path) -> bool:
    try:
        prefixed("gpt2").save_adapter(str(folder), "x", with_head=False, use_safetensors=True)
    except RuntimeError as error:
        return "share memory" in str(error)
    return False


def t5_leave_out(folder: Path) -> bool:
    """Whether the encoder's layers from the one that is left out on have no bias."""
    biases = []

    def remember(module: Any, inputs: Any, outputs: Any) -> None:
        biases.append(outputs[1])

    model = prefixed("t5", leave_out=[1])
    for block in model.encoder.block:
        block.layer[0].SelfAttention.register_forward_hook(remember)
    logits(model, decoder_input_ids=TOKENS)
    assert bool(biases[0].any())
    return not any(bool(bias.any()) for bias in biases[1:])


def deberta_bias(folder: Path) -> bool:
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    config = AutoConfig.for_model("deberta", **sizes, num_attention_heads=4, max_position_embeddings=64)
    model = build(config, "sequence-classification", torch.float32, seed=0)
    before = logits(model)
    adapters.init(model)
    return difference(logits(model), before) > 0.01


SHOWN: dict[str, Callable[[Path], bool]] = {
    "adapterhub-sdpa-causal": sdpa_causal,
    "adapterhub-sdpa-mask": sdpa_mask,
    "adapterhub-llama-cache": llama_cache,
    "adapterhub-eject-gqa": eject_gqa,
    "adapterhub-ejected-flat": ejected_flat,
    "adapterhub-safetensors": safetensors,
    "adapterhub-t5-leave-out": t5_leave_out,
    "adapterhub-deberta-bias": deberta_bias,
}


def test_every_record_has_its_test() -> None:
    assert [defect.id for defect in DEFECTS] == list(SHOWN)


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.id)
def test_is_shown_exactly_where_it_applies(defect: Any, tmp_path: Path) -> None:
    assert SHOWN[defect.id](tmp_path) == defect.applies()
