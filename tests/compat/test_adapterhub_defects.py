"""Each of AdapterHub's recorded defects, shown where the record says that it applies."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

adapters = pytest.importorskip("adapters")

import torch  # noqa: E402
from adapters.composition import BatchSplit, Parallel  # noqa: E402
from transformers import AutoConfig, AutoModel  # noqa: E402

from softbridge.base import build  # noqa: E402
from softbridge.testing import tiny_model  # noqa: E402
from softbridge.untrusted import Files  # noqa: E402
from softbridge_compat.adapterhub_defects import DEFECTS  # noqa: E402

pytestmark = [
    # AdapterHub's T5 passes transformers an argument under its old name.
    pytest.mark.filterwarnings("ignore:`past_key_value` is deprecated:FutureWarning"),
    # transformers compiles parts of DeBERTa with a compiler that torch is about to drop.
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]

TOKENS = torch.tensor([[5, 9, 17, 33, 21, 80, 4]])


PADDED = torch.nn.functional.pad(TOKENS, (0, 3))
SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
SPECIAL = {"max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def tiny(family: str, task: Any = "sequence-classification", **settings: Any) -> Any:
    """A model of a family that `tiny_model` does not have."""
    config = AutoConfig.for_model(family, **{**SIZES, **SPECIAL, **settings})
    return build(config, task, torch.float64, seed=0)


def adapted(model: Any, attention: str, config: Any) -> Any:
    """A model with an adapter of large random numbers, the same ones whatever the attention."""
    settings = copy.deepcopy(model.config)
    settings._attn_implementation = attention
    adapting = type(model)(settings).to(torch.float64).eval()
    adapting.load_state_dict(model.state_dict())
    adapters.init(adapting)
    adapting.add_adapter("x", config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapting.named_parameters():
            if ".x." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    adapting.adapter_to("x", dtype=torch.float64)
    adapting.set_active_adapters("x")
    return adapting.eval()


def prefixed(family: str, attention: str = "eager", *, flat: bool = True, **settings: Any) -> Any:
    config = adapters.PrefixTuningConfig(flat=flat, prefix_length=5, bottleneck_size=6, **settings)
    return adapted(tiny_model(family), attention, config)


def prompted(model: Any, attention: str = "eager", **settings: Any) -> Any:
    return adapted(model, attention, adapters.PromptTuningConfig(prompt_length=5, **settings))


def padding_shows(model: Any) -> float:
    """How far padding moves what a model computes of a text."""
    padded = logits(model, input_ids=PADDED, attention_mask=(PADDED != 0).long())
    return difference(padded[:, : TOKENS.shape[1]] if padded.ndim == 3 else padded, logits(model))


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


def cache_tuples(folder: Path) -> bool:
    def fails(family: str) -> bool:
        config = adapters.PrefixTuningConfig(flat=True, prefix_length=5)
        model = adapted(tiny(family, "causal-lm", is_decoder=True), "eager", config)
        logits(model, use_cache=False)
        try:
            logits(model, use_cache=True)
        except TypeError as error:
            return "expected Tensor" in str(error)
        return False

    assert not fails("bert")
    return fails("electra") and fails("bert-generation")


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


def sdpa_attentions(folder: Path) -> bool:
    model = prefixed("bert", "sdpa")
    right, found = logits(model), logits(model, output_attentions=True)
    model.set_active_adapters(None)
    return difference(found, logits(model)) < 1e-12 and difference(found, right) > 0.1


def gate_padding(folder: Path) -> bool:
    return padding_shows(prefixed("bert")) < 1e-12 and padding_shows(prefixed("bert", use_gating=True)) > 0.01


def gate_cache(folder: Path) -> bool:
    def steps_differ(model: Any) -> float:
        with torch.no_grad():
            start = model(input_ids=TOKENS[:, :-1], use_cache=True).past_key_values
            last = model(input_ids=TOKENS[:, -1:], past_key_values=start, use_cache=True).logits
        return difference(last[:, -1], logits(model)[:, -1])

    return steps_differ(prefixed("gpt2")) < 1e-12 and steps_differ(prefixed("gpt2", use_gating=True)) > 0.1


def float32(folder: Path) -> bool:
    prefixed("bert", use_gating=True).save_adapter(str(folder), "x", with_head=False)
    model = tiny_model("bert")
    adapters.init(model)
    model.load_adapter(str(folder), set_active=True)
    try:
        logits(model)
    except RuntimeError as error:
        return "must have the same dtype" in str(error)
    return False


def prompt_load_as(folder: Path) -> bool:
    model = prompted(tiny_model("bert"))
    model.adapter_to("x", dtype=torch.float32)
    model.save_adapter(str(folder), "x", with_head=False)
    found = []
    for name in (None, "x", "y"):
        again = tiny_model("bert")
        adapters.init(again)
        again.load_adapter(str(folder), load_as=name, set_active=True)
        found.append(logits(again.eval()))
    return difference(found[0], found[1]) == 0 and difference(found[0], found[2]) > 0.1


def prompt_sdpa(folder: Path) -> bool:
    model = tiny_model("bert")
    assert padding_shows(prompted(model)) < 1e-12
    return padding_shows(prompted(model, "sdpa")) > 0.1


def prompt_deberta(folder: Path) -> bool:
    model = tiny("deberta-v2")
    assert padding_shows(model) < 1e-12
    return padding_shows(prompted(model)) > 0.1


def prompt_distilbert(folder: Path) -> bool:
    sizes = {"vocab_size": 96, "dim": 32, "hidden_dim": 40, "n_layers": 2, "n_heads": 4}
    model = build(AutoConfig.for_model("distilbert", **sizes), "sequence-classification", torch.float64, seed=0)
    logits(prompted(model, "sdpa"))
    try:
        logits(prompted(model))
    except IndexError:
        return True
    return False


def prompt_left_padding(folder: Path) -> bool:
    def left_padding_shows(model: Any) -> float:
        tokens = torch.nn.functional.pad(TOKENS, (3, 0))
        positions = torch.tensor([[0, 0, 0, *range(TOKENS.shape[1])]])
        found = logits(model, input_ids=tokens, attention_mask=(tokens != 0).long(), position_ids=positions)
        return difference(found, logits(model))

    model = tiny_model("bert")
    after = prompted(model, combine="prefix_after_bos")
    assert padding_shows(after) < 1e-12
    # In front of the first token, the model's classifier looks at a virtual one, wherever the pads are.
    return left_padding_shows(prompted(model)) < 1e-12 and left_padding_shows(after) > 0.1


def prompt_decoder(folder: Path) -> bool:
    model = prompted(tiny("bert", "causal-lm", is_decoder=True))
    try:
        logits(model)
    except RuntimeError as error:
        return "must match the size" in str(error)
    return False


def prompt_labels(folder: Path) -> bool:
    model = prompted(tiny("bert-generation", "causal-lm"))
    assert logits(model).shape[1] == TOKENS.shape[1] + 5
    try:
        logits(model, labels=TOKENS)
    except ValueError as error:
        return "to match target batch_size" in str(error)
    return False


def composed(configs: list[Any], family: str = "gpt2") -> Any:
    """A model with an adapter of each configuration: a, b, ..., of large random numbers."""
    model = tiny_model(family)
    adapters.init(model)
    generator = torch.Generator().manual_seed(3)
    for name, config in zip("ab", configs, strict=False):
        model.add_adapter(name, config)
        model.adapter_to(name, dtype=torch.float64)
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if f".{name}." in path:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


def split_apart(model: Any) -> float:
    """How far the second of two rows under a split is from the second prompt alone."""
    two = {"input_ids": TOKENS.repeat(2, 1)}
    model.set_active_adapters("b")
    alone = logits(model, **two)[1]
    model.set_active_adapters(BatchSplit("a", "b", batch_sizes=[1, 1]))
    split = logits(model, **two)[1]
    return difference(split, alone)


def split_lengths(folder: Path) -> bool:
    def apart(*lengths: int) -> float:
        configs = [adapters.PrefixTuningConfig(flat=True, prefix_length=length) for length in lengths]
        return split_apart(composed(configs))

    assert apart(4, 4) < 1e-12
    return apart(5, 3) > 0.1


def split_prompts(folder: Path) -> bool:
    model = composed([adapters.PromptTuningConfig(prompt_length=4) for _ in "ab"], "bert")
    model.set_active_adapters(Parallel("a", "b"))
    return len(logits(model)) == 1 and split_apart(model) > 0.1


def t5_head(folder: Path) -> bool:
    model = build(tiny_model("t5").config, "sequence-classification", torch.float32, seed=0)
    adapters.init(model)
    model.add_adapter("x", adapters.PrefixTuningConfig(flat=True, prefix_length=5))
    model.save_adapter(str(folder), "x")
    held = Files(folder).tensors("pytorch_model_head.bin")
    return set(held) > {name for name, _ in model.named_parameters() if not name.startswith("classification_head")}


def t5_flex_head(folder: Path) -> bool:
    def scaled(tied: bool) -> bool:
        config = copy.deepcopy(tiny_model("t5").config)
        config.tie_word_embeddings = tied
        model = adapters.AutoAdapterModel.from_config(config)
        model.add_qa_head("x")
        model = model.double().eval()
        with torch.no_grad():
            head, inputs = model.heads["x"][-1], {"input_ids": TOKENS, "decoder_input_ids": TOKENS}
            plain = head(model.base_model(**inputs).last_hidden_state)[..., 0]
            return difference(model(**inputs).start_logits, plain) > 0.01

    assert not scaled(False)
    return scaled(True)


def xmod_languages(folder: Path) -> bool:
    model = tiny("xmod", languages=["en_XX"], default_language="en_XX")
    before = logits(model)
    adapters.init(model)
    return difference(logits(model), before) > 0.1


def beit_bias(folder: Path) -> bool:
    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}

    def runs(**settings: Any) -> bool:
        model = AutoModel.from_config(AutoConfig.for_model("beit", **sizes, image_size=8, patch_size=4, **settings))
        adapters.init(model)
        model.add_adapter("x", adapters.PrefixTuningConfig(flat=True, prefix_length=3), set_active=True)
        try:
            model(pixel_values=torch.ones(1, 3, 8, 8))
        except RuntimeError as error:
            return "must match the size" not in str(error)
        return True

    assert runs()
    return not runs(use_relative_position_bias=True) and not runs(use_shared_relative_position_bias=True)


def deberta_bias(folder: Path) -> bool:
    model = tiny("deberta").float()
    before = logits(model)
    adapters.init(model)
    return difference(logits(model), before) > 0.01


SHOWN: dict[str, Callable[[Path], bool]] = {
    "adapterhub-sdpa-causal": sdpa_causal,
    "adapterhub-sdpa-mask": sdpa_mask,
    "adapterhub-llama-cache": llama_cache,
    "adapterhub-cache-tuples": cache_tuples,
    "adapterhub-eject-gqa": eject_gqa,
    "adapterhub-ejected-flat": ejected_flat,
    "adapterhub-safetensors": safetensors,
    "adapterhub-t5-leave-out": t5_leave_out,
    "adapterhub-sdpa-attentions": sdpa_attentions,
    "adapterhub-gate-padding": gate_padding,
    "adapterhub-gate-cache": gate_cache,
    "adapterhub-float32": float32,
    "adapterhub-prompt-load-as": prompt_load_as,
    "adapterhub-prompt-sdpa": prompt_sdpa,
    "adapterhub-prompt-deberta": prompt_deberta,
    "adapterhub-prompt-distilbert": prompt_distilbert,
    "adapterhub-prompt-left-padding": prompt_left_padding,
    "adapterhub-prompt-decoder": prompt_decoder,
    "adapterhub-prompt-labels": prompt_labels,
    "adapterhub-split-lengths": split_lengths,
    "adapterhub-split-prompts": split_prompts,
    "adapterhub-t5-head": t5_head,
    "adapterhub-t5-flex-head": t5_flex_head,
    "adapterhub-xmod-languages": xmod_languages,
    "adapterhub-beit-bias": beit_bias,
    "adapterhub-deberta-bias": deberta_bias,
}


def test_every_record_has_its_test() -> None:
    assert [defect.id for defect in DEFECTS] == list(SHOWN)


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.id)
def test_is_shown_exactly_where_it_applies(defect: Any, tmp_path: Path) -> None:
    assert SHOWN[defect.id](tmp_path) == defect.applies()
