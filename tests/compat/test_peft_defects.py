"""Each defect of PEFT that compat/ records is shown where its record says that it applies, and nowhere else."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BambaConfig, BertConfig, RobertaConfig

from softbridge.base import build
from softbridge.base import cache as caches
from softbridge.testing import TINY, tiny_model
from softbridge_compat import peft_defects
from softbridge_compat.defects import Defect, installed

peft = pytest.importorskip("peft")

LENGTH = 3
ROW = torch.tensor([[5, 6, 7]])
PADDED = torch.tensor([[0, 0, 5, 6, 7]])
MASK = torch.tensor([[0, 0, 1, 1, 1]])


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        yield


def wrap(family: str, method: str, task: str = "CAUSAL_LM", **settings: Any) -> Any:
    kind = {
        "prompt": peft.PromptTuningConfig,
        "encoder": peft.PromptEncoderConfig,
        "prefix": peft.PrefixTuningConfig,
    }[method]
    config = kind(task_type=task, num_virtual_tokens=LENGTH, inference_mode=True, **settings)
    sizes = {"num_layers": 4, "num_decoder_layers": 4} if family == "t5" else {}
    model = peft.get_peft_model(tiny_model(family, **sizes), config).eval()
    model.prompt_encoder["default"].embedding.weight.data.normal_(0, 0.8)
    return model


def generated(model: Any, tokens: int = 12, **inputs: Any) -> list[int]:
    out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, eos_token_id=None)
    return list(out[0, -tokens:].tolist())


def logits(model: Any, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(**inputs).logits)


def differ(a: torch.Tensor, b: torch.Tensor) -> bool:
    return float((a - b).abs().max()) > 0.1


def left_padded_prompt(_: Path) -> bool:
    model = wrap("llama", "prompt")
    plain = generated(model, input_ids=ROW, attention_mask=torch.ones_like(ROW))
    return plain != generated(model, input_ids=PADDED, attention_mask=MASK)


def left_padded_prefix_forward(_: Path) -> bool:
    model = wrap("llama", "prefix")
    plain: dict[str, Any] = {"input_ids": ROW, "attention_mask": torch.ones_like(ROW)}
    padded: dict[str, Any] = {"input_ids": PADDED, "attention_mask": MASK}
    if not peft_defects.RENAMED_CACHE_GENERATE.applies():
        assert generated(model, **plain) == generated(model, **padded), "generate is right"
    return differ(logits(model, **plain), logits(model, **padded)[:, -3:])


def t5_prefix(submodules: int, blocks: torch.Tensor) -> Any:
    sizes = {"token_dim": 32, "num_attention_heads": 4, "num_transformer_submodules": submodules}
    model = wrap("t5", "prefix", "SEQ_2_SEQ_LM", **sizes)
    model.prompt_encoder["default"].embedding.weight.data.copy_(torch.cat(list(blocks), dim=-1))
    return model


def one_submodule(_: Path) -> bool:
    """The same prefix for each decoder layer, in both forms; only one of them lets cross-attention alone."""
    x, y = torch.randn(2, LENGTH, 2 * 32) * 0.8
    inputs = {"input_ids": ROW, "decoder_input_ids": torch.tensor([[0, 9, 10]])}
    right = logits(t5_prefix(2, torch.stack([x, torch.zeros_like(x), y, torch.zeros_like(x)])), **inputs)
    try:
        wrong = logits(t5_prefix(1, torch.stack([x, y, x, y])), **inputs)
    except RuntimeError:
        return True
    return differ(right, wrong)


def cached_t5_prefix(_: Path) -> bool:
    model = t5_prefix(2, torch.randn(4, LENGTH, 2 * 32) * 0.8)
    cached, uncached = generated(model, 6, input_ids=ROW), [0]
    for _step in range(6):
        out = logits(model, input_ids=ROW, decoder_input_ids=torch.tensor([uncached]))
        uncached.append(int(out[0, -1].argmax()))
    return cached != uncached[1:]


def hybrid_prefix(_: Path) -> bool:
    """A layer that keeps a state finds keys and values where its state is to be."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    mamba = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
    layers = {"num_hidden_layers": 2, "attn_layer_indices": [1], "vocab_size": 64}
    bare = build(BambaConfig(**sizes, **mamba, **layers, pad_token_id=0), "causal-lm", torch.float32, 0)
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, inference_mode=True)
    model = peft.get_peft_model(bare, config)
    logits(bare, input_ids=ROW)
    try:
        logits(model, input_ids=ROW)
    except (AttributeError, ValueError):
        return True
    return False


def unpooled_prefix(_: Path) -> bool:
    model = build(RobertaConfig(**TINY["bert"]), "sequence-classification", torch.float32, 0)
    model = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=LENGTH))
    try:
        logits(model, input_ids=ROW)
    except TypeError:
        return True
    except ValueError:
        assert peft_defects.RENAMED_CACHE_CLASSIFIER.applies()
    return False


def adapter_names(_: Path) -> bool:
    model = wrap("gpt2", "prompt")
    model.add_adapter("other", peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH))
    model.prompt_encoder["other"].embedding.weight.data.normal_(0, 0.8)
    rows = ROW.repeat(2, 1)
    both = logits(model, input_ids=rows, adapter_names=["default", "other"])
    model.set_adapter("other")
    assert differ(logits(model, input_ids=rows)[1], both[0]), "the two prompts differ"
    return torch.equal(both[0], both[1])


def missing_head(directory: Path) -> bool:
    wrap("bert", "prompt", "SEQ_CLS").save_pretrained(directory)
    file = directory / "adapter_model.safetensors"
    save_file({"prompt_embeddings": load_file(file)["prompt_embeddings"]}, file, metadata={"format": "pt"})
    try:
        peft.PeftModel.from_pretrained(tiny_model("bert"), directory)
    except KeyError:
        return True
    return False


def growing_config(directory: Path) -> bool:
    def count() -> int:
        return len(json.loads((directory / "adapter_config.json").read_text())["modules_to_save"])

    wrap("bert", "prompt", "SEQ_CLS").save_pretrained(directory)
    once = count()
    peft.PeftModel.from_pretrained(tiny_model("bert"), directory).save_pretrained(directory)
    return count() > once


def unasked_warning(_: Path) -> bool:
    model = wrap("gpt2", "prompt")
    return "Position ids" in warned(lambda: generated(model, 2, input_ids=ROW, attention_mask=torch.ones_like(ROW)))


def deprecated(_: Path) -> bool:
    return "is_gradient_checkpointing" in warned(lambda: wrap("gpt2", "prompt"))


def multitask(family: str, task: str, **settings: Any) -> Any:
    """A model under a multitask prompt of two tasks, with large numbers, in training mode."""
    sizes = {"num_virtual_tokens": LENGTH, "num_tasks": 2, "num_ranks": 2}
    config = peft.MultitaskPromptTuningConfig(task_type=task, **sizes, **settings)
    model = peft.get_peft_model(tiny_model(family), config)
    for parameter in model.prompt_encoder.parameters():
        parameter.data.normal_(0, 0.8)
    return model


def multitask_decoder(_: Path) -> bool:
    model = multitask("t5", "SEQ_2_SEQ_LM", num_transformer_submodules=1).eval()
    told = {"input_ids": ROW, "task_ids": torch.tensor([1])}
    assert logits(model, **told, labels=ROW).shape[1] == 3
    try:
        logits(model, **told, decoder_input_ids=ROW)
    except ValueError:
        return True
    return False


def multitask_half(_: Path) -> bool:
    """The decoder's half counts in the loss, and not in what is generated."""
    model = multitask("t5", "SEQ_2_SEQ_LM").eval()
    told = {"input_ids": ROW, "task_ids": torch.tensor([1])}
    before, generates = logits(model, **told, labels=ROW), generated(model, **told)
    model.prompt_encoder["default"].embedding.weight.data[LENGTH:] *= -3
    return differ(before, logits(model, **told, labels=ROW)) and generates == generated(model, **told)


def multitask_task(_: Path) -> bool:
    told = {"input_ids": ROW, "task_ids": torch.tensor([1])}
    assert logits(multitask("bert", "SEQ_CLS"), **told).shape == (1, 5)
    config = peft.MultitaskPromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=LENGTH, num_tasks=2)
    model = peft.get_peft_model(tiny_model("bert").base_model, config)
    try:
        model(**told)
    except ValueError as error:
        return "task_ids" in str(error)
    return False


def encoder(method: Any, name: str = "default", **settings: Any) -> Any:
    """GPT-2 as PEFT trains it through an encoder."""
    return peft.get_peft_model(tiny_model("gpt2"), method(task_type="CAUSAL_LM", **settings), name)


def saved_dropout(directory: Path) -> bool:
    lstm = {"encoder_reparameterization_type": "LSTM", "encoder_dropout": 0.5, "encoder_hidden_size": 16}
    model = encoder(peft.PromptEncoderConfig, num_virtual_tokens=LENGTH, **lstm)
    model.prompt_encoder["default"].embedding.weight.data.normal_(0, 8)

    def saved() -> torch.Tensor:
        model.save_pretrained(directory)
        return load_file(directory / "adapter_model.safetensors")["prompt_embeddings"]

    drawn = [saved() for _ in range(2)]
    model.eval()
    assert torch.equal(saved(), saved())
    return not torch.equal(*drawn)


def lost_training(directory: Path) -> bool:
    """Nothing of the encoder is in the file, and PEFT does not train what it loads."""
    model = encoder(peft.PrefixTuningConfig, num_virtual_tokens=LENGTH, prefix_projection=True)
    model.save_pretrained(directory)
    assert list(load_file(directory / "adapter_model.safetensors")) == ["prompt_embeddings"]
    try:
        peft.PeftModel.from_pretrained(tiny_model("gpt2"), directory, is_trainable=True)
    except ValueError:
        return True
    return False


def lost_encoder(directory: Path) -> bool:
    def loss() -> float:
        return float(model.eval()(input_ids=ROW, labels=ROW).loss)

    model = encoder(peft.PromptEncoderConfig, num_virtual_tokens=LENGTH)
    model.save_pretrained(directory / "mlp")
    before = loss()
    model.load_adapter(directory / "mlp", "default", is_trainable=True)
    other = encoder(peft.PrefixTuningConfig, num_virtual_tokens=LENGTH, prefix_projection=True)
    other.save_pretrained(directory / "projected")
    try:
        other.load_adapter(directory / "projected", "default", is_trainable=True)
    except RuntimeError:
        return loss() != before
    return False


def cpt_default(_: Path) -> bool:
    text = {"cpt_token_ids": [5, 6, 7, 8], "cpt_tokens_type_mask": [1, 2, 3, 4]}
    assert encoder(peft.CPTConfig, **text)(input_ids=ROW, labels=ROW).loss > 0
    try:
        encoder(peft.CPTConfig, "other", **text)(input_ids=ROW, labels=ROW)
    except KeyError:
        return True
    return False


def prefix_checkpointing(_: Path) -> bool:
    model = encoder(peft.PrefixTuningConfig, num_virtual_tokens=LENGTH).train()
    model.prompt_encoder["default"].embedding.weight.data.normal_(0, 0.8)
    before = model(input_ids=ROW, labels=ROW).loss
    model.gradient_checkpointing_enable()
    try:
        loss = model(input_ids=ROW, labels=ROW).loss
        loss.backward()
    except RuntimeError:
        return True
    return differ(loss, before)


def static_cache(_: Path) -> bool:
    model = wrap("llama", "prompt")
    told: dict[str, Any] = {"input_ids": ROW, "attention_mask": torch.ones_like(ROW)}
    expected = generated(model, **told)
    try:
        return generated(model, **told, cache_implementation="static") != expected
    except (KeyError, IndexError, RuntimeError):
        return True


def greedy(forward: Callable[[torch.Tensor], torch.Tensor]) -> list[int]:
    """Tokens picked by hand, the whole text again for each; `forward` gives the logits [1, T, V] of ids [1, T]."""
    ids = ROW
    for _ in range(12):
        ids = torch.cat([ids, forward(ids)[:, -1:].argmax(-1)], dim=1)
    return list(ids[0, 3:].tolist())


def renamed_cache_generate(_: Path) -> bool:
    wrong = {generates_wrong(*case) for case in product(("llama", "gpt2"), ("prompt", "encoder", "prefix"))}
    assert len(wrong) == 1, "all six, or none"
    return wrong.pop()


def generates_wrong(family: str, method: str) -> bool:
    """Rows embedded by hand, or a cache seeded by hand, in float64: PEFT's forward agrees, and `generate` is judged."""
    model = wrap(family, method).double()
    base = model.get_base_model()

    def by_hand(ids: torch.Tensor) -> torch.Tensor:
        told: dict[str, Any] = {"attention_mask": torch.ones(1, LENGTH + ids.shape[1], dtype=torch.long)}
        if method == "prefix":
            told |= {"input_ids": ids, **caches.handed(base.forward, model.get_prompt(1))}
        else:
            told["inputs_embeds"] = torch.cat([model.get_prompt(1), base.get_input_embeddings()(ids)], dim=1)
        return logits(base, **told)

    right = greedy(by_hand)
    assert right == greedy(lambda ids: logits(model, input_ids=ids, attention_mask=torch.ones_like(ids)))
    assert right != greedy(lambda ids: logits(base, input_ids=ids)), "the prompt is felt"
    told: dict[str, Any] = {"input_ids": ROW, "attention_mask": torch.ones_like(ROW)}
    if method != "prefix":
        assert generated(model, **told, use_cache=False) == right, "without a cache it is right, too"
    return generated(model, **told) != right


def renamed_cache_classifier(_: Path) -> bool:
    model = build(BertConfig(**TINY["bert"]), "sequence-classification", torch.float32, 0)
    model = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=LENGTH))
    try:
        assert logits(model, input_ids=ROW).isfinite().all()
    except ValueError as error:
        return "past key values" in str(error)
    return False


def warned(run: Callable[[], Any]) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return "\n".join(str(warning.message) for warning in caught)


SHOWN: dict[Defect, Callable[[Path], bool]] = {
    peft_defects.LEFT_PADDED_PROMPT: left_padded_prompt,
    peft_defects.LEFT_PADDED_PREFIX_FORWARD: left_padded_prefix_forward,
    peft_defects.ONE_SUBMODULE: one_submodule,
    peft_defects.CACHED_T5_PREFIX: cached_t5_prefix,
    peft_defects.UNPOOLED_PREFIX: unpooled_prefix,
    peft_defects.HYBRID_PREFIX: hybrid_prefix,
    peft_defects.ADAPTER_NAMES: adapter_names,
    peft_defects.MISSING_HEAD: missing_head,
    peft_defects.GROWING_CONFIG: growing_config,
    peft_defects.UNASKED_WARNING: unasked_warning,
    peft_defects.DEPRECATED: deprecated,
    peft_defects.MULTITASK_DECODER: multitask_decoder,
    peft_defects.MULTITASK_HALF: multitask_half,
    peft_defects.MULTITASK_TASK: multitask_task,
    peft_defects.SAVED_DROPOUT: saved_dropout,
    peft_defects.LOST_TRAINING: lost_training,
    peft_defects.LOST_ENCODER: lost_encoder,
    peft_defects.CPT_DEFAULT: cpt_default,
    peft_defects.PREFIX_CHECKPOINTING: prefix_checkpointing,
    peft_defects.STATIC_CACHE: static_cache,
    peft_defects.RENAMED_CACHE_GENERATE: renamed_cache_generate,
    peft_defects.RENAMED_CACHE_CLASSIFIER: renamed_cache_classifier,
}


def test_every_defect_is_shown() -> None:
    assert tuple(SHOWN) == peft_defects.DEFECTS
    assert len({defect.id for defect in SHOWN}) == len(SHOWN)
    assert installed("no-such-distribution") is None


@pytest.mark.parametrize("defect", SHOWN, ids=lambda defect: defect.id)
def test_defect_is_there_exactly_where_it_applies(defect: Defect, tmp_path: Path) -> None:
    assert SHOWN[defect](tmp_path) == defect.applies(), defect.summary
