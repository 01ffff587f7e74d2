"""P-tuning v2 and ChatGLM, whose prefix encoder is one class: against both toolkits' models, written out by hand.

The references use torch and the modules of a bare transformers model, and nothing of softbridge's: the layout of
`get_prompt`, the projection, attention over prefix and text, the head that the toolkit puts on top.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import softbridge as sb
from softbridge import untrusted
from softbridge.arrays import same_arrays
from softbridge.base import build
from softbridge.checkpoint.read import read
from softbridge.errors import BaseModelError, CheckpointError, LoweringError, SoftbridgeError, UnknownFormatError
from softbridge.plugin.registry import engines
from softbridge.testing import agreement, apart, tiny_config
from softbridge_archive import chatglm, ptuning_v2

#: transformers compiles parts of DeBERTa with a compiler that torch is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

P = 4
FAR = 1e-2
CLASSES = {
    "sequence-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "question-answering": "ForQuestionAnswering",
}
NAMES = {"bert": "Bert", "roberta": "Roberta", "deberta": "Deberta", "deberta-v2": "DebertaV2"}
State = dict[str, torch.Tensor]


def drawn(*shape: int, seed: int = 0, std: float = 0.8) -> torch.Tensor:
    return std * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def encoder_state(width: int, embedding: int | None = None, hidden: int = 10) -> State:
    """The state of a `PrefixEncoder`, flat or (with the size of its embedding) projected."""
    if embedding is None:
        return {"embedding.weight": drawn(P, width)}
    return {
        "embedding.weight": drawn(P, embedding),
        "trans.0.weight": drawn(hidden, embedding, seed=1, std=0.4),
        "trans.0.bias": drawn(hidden, seed=2),
        "trans.2.weight": drawn(width, hidden, seed=3, std=0.4),
        "trans.2.bias": drawn(width, seed=4),
    }


def evaluated(state: State) -> torch.Tensor:
    """[P, W], as the class computes it for one row."""
    rows = torch.nn.functional.embedding(torch.arange(P)[None], state["embedding.weight"])
    if "trans.0.weight" in state:
        rows = torch.tanh(rows @ state["trans.0.weight"].T + state["trans.0.bias"])
        rows = rows @ state["trans.2.weight"].T + state["trans.2.bias"]
    return rows[0].double()


def pairs_of(flat: torch.Tensor, heads: int, width: int) -> torch.Tensor:
    """`get_prompt`: [2·L, K, P, D], each layer's keys before its values."""
    return flat.view(P, -1, heads, width).permute(1, 2, 0, 3)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, hidden: torch.Tensor, exact: bool = True
) -> torch.Tensor:
    """[B, T, H] of queries [B, heads, T, D] over keys that may be fewer; True in ``hidden`` is what is not seen."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).masked_fill(hidden, -torch.inf)
    weights = scores.softmax(-1) if exact else scores.float().softmax(-1).double()
    return (weights @ value).transpose(1, 2).flatten(2)


def save(folder: Path, state: State, config: dict[str, Any], name: str = "pytorch_model.bin") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / name)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def faults(pairs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Other prefixes of the same numbers. (The order of virtual tokens is none: they have no positions.)"""
    halves = pairs.unflatten(0, (-1, 2))
    return {
        "keys rolled against values": torch.stack([halves[:, 0].roll(1, 2), halves[:, 1]], 1).flatten(0, 1),
        "keys and values swapped": halves.flip(1).flatten(0, 1),
        "layers reversed": halves.flip(0).flatten(0, 1),
        "heads rolled": pairs.roll(1, 1),
    }


# --- P-tuning v2 ------------------------------------------------------------------------------------------------------


def bert_config(family: str, task: str = "sequence-classification", **changes: Any) -> Any:
    from transformers import AutoConfig

    sizes = tiny_config("bert").to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    facts = {name: sizes[name] for name in names}
    labels = 2 if task == "question-answering" else 3
    architecture = NAMES[family] + CLASSES[task]
    return AutoConfig.for_model(
        family, **{**facts, "pad_token_id": 0, "num_labels": labels, "architectures": [architecture], **changes}
    )


def checkpoint(folder: Path, family: str, task: str, projected: bool) -> tuple[Path, Any, State]:
    """A checkpoint as `save_pretrained` of the toolkit's model writes it, its base model, and what it holds."""
    config = bert_config(family, task)
    model = build(config, task, torch.float32, 0)
    stem = family.partition("-")[0]
    backbone = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(f"{stem}.")}
    hidden, labels = config.hidden_size, config.num_labels
    module = "qa_outputs" if task == "question-answering" else "classifier"
    if task == "sequence-classification":
        for number, end in enumerate(("weight", "bias")):
            name = f"{'' if stem == 'deberta' else stem + '.'}pooler.dense.{end}"
            backbone.setdefault(name, drawn(*[hidden] * (2 - number), seed=7 + number, std=0.3))
    width = 2 * config.num_hidden_layers * hidden
    encoder = encoder_state(width, hidden if projected else None)
    state = {
        **backbone,
        **{f"prefix_encoder.{name}": tensor for name, tensor in encoder.items()},
        f"{module}.weight": drawn(labels, hidden, seed=5),
        f"{module}.bias": drawn(labels, seed=6),
    }
    facts = config.to_dict()
    facts |= {"pre_seq_len": P, "prefix_projection": projected, "prefix_hidden_size": 10, "hidden_dropout_prob": 0.1}
    facts |= {
        "architectures": [NAMES[family] + CLASSES[task].replace("For", "PrefixFor")],
        "_name_or_path": "some/base",
    }
    return save(folder, state, facts), model.double(), state


def by_hand(
    model: Any, state: State, pairs: torch.Tensor | None, ids: torch.Tensor, mask: torch.Tensor, start: int
) -> torch.Tensor:
    """The logits of the toolkit's model: its backbone over prefix and text, and its head."""
    stack, config = model.base_model, model.config
    heads, batch = config.num_attention_heads, len(ids)
    if config.model_type == "roberta":  # counts what is no pad, from the padding's own number on
        places = (mask.cumsum(1) + start) * mask + config.pad_token_id
    else:
        places = torch.arange(start, start + ids.shape[1]).expand_as(ids)
    hidden = stack.embeddings(input_ids=ids, position_ids=places)
    front = 0 if pairs is None else pairs.shape[2]
    unseen = torch.cat([torch.ones(batch, front), mask], 1)[:, None, None].eq(0)
    for number, layer in enumerate(stack.encoder.layer):
        own = layer.attention.self
        query, key, value = (
            part(hidden).unflatten(-1, (heads, -1)).transpose(1, 2) for part in (own.query, own.key, own.value)
        )
        if pairs is not None:
            key, value = (
                torch.cat([pairs[2 * number + half].expand(batch, -1, -1, -1), real], 2)
                for half, real in enumerate((key, value))
            )
        attended = layer.attention.output(attend(query, key, value, unseen), hidden)
        hidden = layer.output(layer.intermediate(attended), attended)
    head = {name: tensor.double() for name, tensor in state.items()}
    if "qa_outputs.weight" in head:
        return hidden @ head["qa_outputs.weight"].T + head["qa_outputs.bias"]
    pooler = next((name.removesuffix(".weight") for name in head if name.endswith("pooler.dense.weight")), None)
    if pooler is not None:
        hidden = torch.tanh(hidden[:, 0] @ head[f"{pooler}.weight"].T + head[f"{pooler}.bias"])
    return hidden @ head["classifier.weight"].T + head["classifier.bias"]


def text(model: Any) -> dict[str, torch.Tensor]:
    """Two rows, one padded on the right."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, model.config.vocab_size, (2, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def logits_of(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        out = model(**inputs)
    logits: torch.Tensor = torch.stack([out.start_logits, out.end_logits], -1) if "start_logits" in out else out.logits
    return logits


def real(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Without what stands on pads, where the logits are of tokens."""
    return logits[mask.bool()] if logits.ndim == 3 else logits


def running(prompt: sb.SoftPrompt, model: Any) -> list[str]:
    """The engines that run it here: of encoders, releases of transformers differ in that, and one does in each."""
    able = [e for e in engines().values() if e.unavailable() is None and not e.obstacles(prompt, model)]
    assert able
    return [engine.name for engine in able]


@pytest.mark.parametrize(
    ("family", "task", "projected"),
    [
        ("bert", "sequence-classification", False),
        ("bert", "token-classification", True),
        ("bert", "question-answering", False),
        ("roberta", "sequence-classification", True),
        ("roberta", "token-classification", False),
        ("roberta", "question-answering", True),
    ],
)
def test_a_prefix_of_ptuning_v2_under_the_toolkits_head(
    family: str, task: str, projected: bool, tmp_path: Path
) -> None:
    path, model, state = checkpoint(tmp_path / "theirs", family, task, projected)
    loaded = read(path)
    prompt = loaded.prompt
    assert loaded.format.name == "ptuning-v2"
    assert prompt.base.name == "some/base"
    assert (prompt.training is not None) == projected
    assert prompt.origin is not None
    assert ["tensors of the base model" in note for note in prompt.origin.notes or ()] == [True]

    inputs = text(model)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    encoder = {n.removeprefix("prefix_encoder."): tensor for n, tensor in state.items() if n.startswith("prefix_")}
    pairs = pairs_of(evaluated(encoder), model.config.num_attention_heads, model.config.hidden_size // 4)
    with torch.no_grad():
        expected = real(by_hand(model, state, pairs, ids, mask, P), mask)
        wrong = {name: by_hand(model, state, other, ids, mask, P) for name, other in faults(pairs).items()}
        wrong["dropped"] = by_hand(model, state, None, ids, mask, 0)
        wrong |= {f"tokens at {start}": by_hand(model, state, pairs, ids, mask, start) for start in (0, P - 1)}
    for engine in running(prompt, model):
        attached = sb.attach(copy.deepcopy(model), prompt, engine=engine, accept={"positions"})
        assert apart(real(logits_of(attached, inputs), mask), expected) <= agreement(model), engine
    for name, other in wrong.items():
        assert apart(real(other, mask), expected) > FAR, name


def test_written_files_are_the_toolkits_own(tmp_path: Path) -> None:
    """To PEFT and back: what the toolkit's loader would find beside the base model's weights is the same prompt."""
    path, model, state = checkpoint(tmp_path / "theirs", "roberta", "sequence-classification", True)
    sb.convert(path, tmp_path / "peft", "peft", base=model.config, verify=True)
    report = sb.convert(tmp_path / "peft", tmp_path / "back", "ptuning-v2", base=model.config, verify=True)
    assert "base model's weights are not here" in report.advice[0]
    written = torch.load(tmp_path / "back" / "pytorch_model.bin", weights_only=True)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["pre_seq_len"], config["prefix_projection"], config["num_labels"]) == (P, False, 3)
    encoder = {n.removeprefix("prefix_encoder."): tensor for n, tensor in state.items() if n.startswith("prefix_")}
    assert torch.equal(written.pop("prefix_encoder.embedding.weight").double(), evaluated(encoder))
    heads = {"classifier.weight", "classifier.bias", "roberta.pooler.dense.weight", "roberta.pooler.dense.bias"}
    assert written.keys() == heads
    assert all(torch.equal(written[name], state[name]) for name in heads)
    (tmp_path / "back" / "softbridge.json").unlink()
    assert sb.load(tmp_path / "back").parts == sb.load(path).parts
    assert same_arrays(sb.load(tmp_path / "back").head, sb.load(path).head)


def prompt_variant(folder: Path) -> Path:
    path, model, state = checkpoint(folder, "bert", "sequence-classification", False)
    del state["prefix_encoder.embedding.weight"]
    embeddings = {f"embeddings.{n}": tensor.float() for n, tensor in model.bert.embeddings.named_parameters()}
    state |= {"prefix_encoder.weight": drawn(P, model.config.hidden_size), **embeddings}
    return save(path, state, json.loads((path / "config.json").read_text()))


def test_what_is_another_function_than_the_base_model_runs_nowhere(tmp_path: Path) -> None:
    double = sb.load(prompt_variant(tmp_path / "prompt"))
    assert double.inputs[0].vectors.shape == (P, 32)
    path, model, _ = checkpoint(tmp_path / "deberta", "deberta-v2", "sequence-classification", False)
    deberta = sb.load(path)
    assert set(deberta.head) == {f"{m}.{end}" for m in ("pooler.dense", "classifier") for end in ("weight", "bias")}
    for prompt, base, why in ((double, bert_config("bert"), "twice"), (deberta, model.config, "no relative bias")):
        assert prompt.origin is not None
        assert [why in note for note in prompt.origin.notes or ()] == [False, True]
        with pytest.raises(LoweringError, match=why):
            sb.save(prompt, tmp_path / "out", format="peft", base=base)
        with pytest.raises(SoftbridgeError, match=why):
            sb.attach(build(base, "sequence-classification", torch.float64, 0), prompt)


# --- ChatGLM ----------------------------------------------------------------------------------------------------------

CHATGLM2 = {
    "_name_or_path": "THUDM/chatglm2-6b",
    "architectures": ["ChatGLMForConditionalGeneration"],
    "model_type": "chatglm",
    "num_layers": 3,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "kv_channels": 12,
    "num_attention_heads": 4,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "padded_vocab_size": 96,
    "pre_seq_len": P,
}
CHATGLM = {
    "_name_or_path": "THUDM/chatglm-6b",
    "architectures": ["ChatGLMForConditionalGeneration"],
    "model_type": "chatglm",
    "num_layers": 3,
    "hidden_size": 32,
    "inner_hidden_size": 48,
    "num_attention_heads": 4,
    "position_encoding_2d": True,
    "vocab_size": 96,
    "pre_seq_len": P,
}


def glm_config() -> Any:
    from transformers import GlmConfig

    return GlmConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=128,
        pad_token_id=0,
        eos_token_id=2,
    )


def glm_checkpoint(folder: Path, config: dict[str, Any], projected: bool, files: int = 0) -> tuple[Path, State]:
    """What the toolkit's trainer saves in as many files of the whole model, or (0) of what was trained alone."""
    heads = config.get("multi_query_group_num", config["num_attention_heads"])
    width = 2 * config["num_layers"] * heads * config.get("kv_channels", 8)
    embedding = (width if "kv_channels" in config else config["hidden_size"]) if projected else None
    encoder = encoder_state(width, embedding, config["hidden_size"])
    state = {f"transformer.prefix_encoder.{name}": tensor for name, tensor in encoder.items()}
    if files:
        state |= {
            "transformer.embedding.word_embeddings.weight": drawn(96, 32),
            "transformer.encoder.layers.0.self_attention.query_key_value.weight": drawn(96, 32),
            "transformer.rotary_pos_emb.inv_freq": drawn(3),
            "transformer.output_layer.weight": drawn(96, 32),
        }
    names = (
        [f"pytorch_model-0000{n + 1}-of-0000{files}.bin" for n in range(files)] if files > 1 else ["pytorch_model.bin"]
    )
    for number, name in enumerate(names):
        share = dict(list(state.items())[number :: len(names)])
        save(folder, share, {**config, "prefix_projection": projected}, name)
    index = {"weight_map": {name: names[number % len(names)] for number, name in enumerate(state)}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder, encoder


def beside_training(folder: Path, state: State) -> None:
    """What transformers' trainer saves beside a model."""
    parameters = [torch.nn.Parameter(tensor.clone()) for tensor in state.values()]
    optimiser = torch.optim.AdamW(parameters)
    sum(parameter.sum() for parameter in parameters).backward()
    optimiser.step()
    torch.save(optimiser.state_dict(), folder / "optimizer.pt")
    torch.save({"last_epoch": 3, "_last_lr": [0.02]}, folder / "scheduler.pt")
    random = {
        "python": (3, (1, 2, 3), None),
        "numpy": np.random.RandomState(0).get_state(),
        "cpu": torch.get_rng_state(),
    }
    torch.save(random, folder / "rng_state.pth")
    torch.save(SimpleNamespace(learning_rate=0.02), folder / "training_args.bin")
    (folder / "trainer_state.json").write_text("{}")


@pytest.mark.parametrize("projected", [False, True], ids=["flat", "projected"])
@pytest.mark.parametrize("files", [0, 1, 2], ids=["trained", "whole", "sharded"])
@pytest.mark.parametrize("config", [CHATGLM, CHATGLM2], ids=["ChatGLM", "ChatGLM2"])
def test_a_prefix_of_chatglm_is_what_get_prompt_makes(
    config: dict[str, Any], files: int, projected: bool, tmp_path: Path
) -> None:
    path, encoder = glm_checkpoint(tmp_path / "checkpoint-3000", config, projected, files)
    beside_training(path, encoder)
    loaded = read(path)
    prompt = loaded.prompt
    assert loaded.format.name == "chatglm"
    assert prompt.base.name == config["_name_or_path"]
    assert prompt.positions.start == {"decoder": 0}
    groups, width = config.get("multi_query_group_num", 4), config.get("kv_channels", 8)
    pairs = pairs_of(evaluated(encoder), groups, width).float().numpy()
    (prefix,) = prompt.prefixes
    assert list(prefix.layers) == [0, 1, 2]
    for layer, pair in prefix.layers.items():
        assert np.array_equal(pair.keys, pairs[2 * layer])
        assert np.array_equal(pair.values, pairs[2 * layer + 1])
    assert (prompt.training is not None) == projected
    assert prompt.origin is not None
    note = "4 tensors of the base model, which the toolkit freezes, are left"
    assert prompt.origin.notes == ((note,) if files else ())


def glm_by_hand(model: Any, pairs: torch.Tensor | None, ids: torch.Tensor, start: int = 0) -> torch.Tensor:
    """The logits of ChatGLM2's model from its definition, on the weights of transformers' GLM."""
    config, stack = model.config, model.model
    batch, length = ids.shape
    half = config.head_dim // 2
    rates = 1 / 10000 ** (torch.arange(0, half, 2).float() / half)
    angles = torch.outer(torch.arange(start, start + length).float(), rates)
    cos, sin = angles.cos().double(), angles.sin().double()

    def split(states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(-1, (-1, config.head_dim)).transpose(1, 2)

    def rotated(states: torch.Tensor) -> torch.Tensor:
        """Neighbours are a pair, in the first half of each head."""
        one, other = states[..., 0:half:2], states[..., 1:half:2]
        turned = torch.stack([one * cos - other * sin, other * cos + one * sin], -1).flatten(-2)
        return torch.cat([turned, states[..., half:]], -1)

    def norm(module: Any, states: torch.Tensor) -> torch.Tensor:
        return module.weight * states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps)

    hidden = stack.embed_tokens(ids)
    front = 0 if pairs is None else pairs.shape[2]
    unseen = torch.ones(length, front + length).tril(front).eq(0)
    for number, layer in enumerate(stack.layers):
        own, states = layer.self_attn, norm(layer.input_layernorm, hidden)
        query, key, value = (split(part(states)) for part in (own.q_proj, own.k_proj, own.v_proj))
        query, key = rotated(query), rotated(key)
        if pairs is not None:  # behind the rotation
            key, value = (
                torch.cat([pairs[2 * number + half_].expand(batch, -1, -1, -1), real_], 2)
                for half_, real_ in enumerate((key, value))
            )
        hidden = hidden + own.o_proj(attend(query, key, value, unseen))
        gate, up = layer.mlp.gate_up_proj(norm(layer.post_attention_layernorm, hidden)).chunk(2, -1)
        hidden = hidden + layer.mlp.down_proj(torch.nn.functional.silu(gate) * up)
    logits: torch.Tensor = model.lm_head(norm(stack.norm, hidden))
    return logits


def test_a_prefix_of_chatglm2_runs_in_transformers_glm(tmp_path: Path) -> None:
    """In the native engine as it is; in PEFT, whose tokens stand at P, P + 1, ..., with its keys rotated."""
    path, encoder = glm_checkpoint(tmp_path / "theirs", CHATGLM2, True)
    model = build(glm_config(), "causal-lm", torch.float64, 0)
    ids = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(1))
    pairs = pairs_of(evaluated(encoder), 2, 12)
    with torch.no_grad():
        expected = glm_by_hand(model, pairs, ids)
        wrong = {name: glm_by_hand(model, other, ids) for name, other in faults(pairs).items()}
        wrong["dropped"] = glm_by_hand(model, None, ids)
        wrong |= {f"tokens at {start}": glm_by_hand(model, pairs, ids, start) for start in (1, P)}
        bare = model(ids).logits
    bound = agreement(model)
    assert apart(wrong["dropped"], bare) <= bound  # the two models are one
    attached = sb.attach(copy.deepcopy(model), sb.load(path))
    assert apart(logits_of(attached, {"input_ids": ids}), expected) <= bound
    for name, other in wrong.items():
        assert apart(other, expected) > FAR, name

    report = sb.convert(path, tmp_path / "peft", "peft", base=glm_config(), verify=True)
    assert [step.name for step in report.steps] == ["rotate", "eject"]
    report = sb.convert(tmp_path / "peft", tmp_path / "back", "chatglm", base=glm_config(), verify=True)
    assert "--pre_seq_len 4" in report.advice[0]
    (tmp_path / "back" / "softbridge.json").unlink()
    again = sb.load(tmp_path / "back")
    assert again.positions.start == {"decoder": 0}
    assert apart(again.prefixes[0].flat(), evaluated(encoder)) < 1e-6
    # What is written is what the toolkit's loader reads, and its configuration says the same sizes.
    written = torch.load(tmp_path / "back" / "pytorch_model.bin", weights_only=True)
    assert [*written] == ["transformer.prefix_encoder.embedding.weight"]
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {name: config[name] for name in CHATGLM2.keys() & config.keys()} == {
        name: CHATGLM2[name] for name in CHATGLM2.keys() & config.keys()
    }


def test_chatglm_6b_has_no_base_model_here(tmp_path: Path) -> None:
    path, _ = glm_checkpoint(tmp_path / "theirs", CHATGLM, False)
    with pytest.raises(BaseModelError, match="another base model"):
        sb.convert(path, tmp_path / "out", "peft", base=glm_config())
    with pytest.raises(BaseModelError, match="base model"):
        sb.convert(path, tmp_path / "out", "peft")
    sb.convert(path, tmp_path / "again", "chatglm")
    assert sb.load(tmp_path / "again").parts == sb.load(path).parts
    trained = glm_checkpoint(tmp_path / "glm2", CHATGLM2, False)[0] / "pytorch_model.bin"
    assert sb.load(trained, base=glm_config()).parts == sb.load(trained.parent).parts
    (path / "config.json").unlink()
    with pytest.raises(BaseModelError, match="unknown base model"):
        sb.load(path)
    with pytest.raises(BaseModelError, match="for llama"):
        sb.load(path, base=tiny_config("llama"))


# --- what is refused, and what is not taken for theirs ----------------------------------------------------------------

Edit = Callable[[State, dict[str, Any]], None]
EMBEDDING, LAST = "prefix_encoder.embedding.weight", "prefix_encoder.trans.2.bias"


def without(name: str) -> Edit:
    return lambda state, config: (state.pop(name, None), config.pop(name, None), None)[-1]


def told(**facts: Any) -> Edit:
    return lambda state, config: config.update(facts)


def other(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    return lambda state, config: state.update({name: change(state[name])})


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.index_fill(0, torch.tensor([1]), torch.nan)


EDITS: dict[str, tuple[Edit, type[SoftbridgeError], str]] = {
    "no last layer": (without("prefix_encoder.trans.2.weight"), CheckpointError, "trans.0.bias"),
    "no bias": (without(LAST), CheckpointError, "trans.0.bias"),
    "no embedding": (without(EMBEDDING), UnknownFormatError, "no soft prompt"),
    "nan": (other(EMBEDDING, with_nan), CheckpointError, "finite"),
    "nan in the projection": (other(LAST, with_nan), CheckpointError, "finite"),
    "three axes": (other(EMBEDDING, lambda t: t[None]), CheckpointError, r"\[1, 4, 32\]"),
    "no rows": (other(EMBEDDING, lambda t: t[:0]), CheckpointError, r"\[0, 32\]"),
    "integers": (other(EMBEDDING, lambda t: t.long()), CheckpointError, "int64"),
    "two dtypes": (other(LAST, lambda t: t.half()), CheckpointError, "float16"),
    "another embedding": (other(EMBEDDING, lambda t: t[:, :20]), CheckpointError, "has the shape"),
    "another bias": (other(LAST, lambda t: t[:20]), CheckpointError, "has the shape"),
    "a scalar": (other("prefix_encoder.trans.2.weight", lambda t: t[0, 0]), BaseModelError, "^0 numbers"),
    "far too many rows": (
        lambda state, config: (
            state.update({EMBEDDING: drawn(20000, 1), "prefix_encoder.trans.0.weight": drawn(1, 1)}),
            state.update({"prefix_encoder.trans.0.bias": drawn(1), "prefix_encoder.trans.2.weight": drawn(192, 1)}),
            config.update(pre_seq_len=20000),
        )[-1],
        CheckpointError,
        "far more than it is",
    ),
    "another length": (told(pre_seq_len=5), CheckpointError, "pre_seq_len 5"),
    "a length that is none": (told(pre_seq_len="4"), CheckpointError, "pre_seq_len '4'"),
    "flat, it says": (told(prefix_projection=False), CheckpointError, "prefix_projection False"),
    "fewer layers": (told(num_hidden_layers=2), BaseModelError, "192 numbers"),
    "layers without end": (told(num_hidden_layers=2**31 - 1), CheckpointError, "2147483647 layers"),
    "another family": (told(model_type="gpt2"), BaseModelError, "of gpt2"),
    "no family": (told(model_type="unheard-of"), BaseModelError, "which base model"),
    "a size that is none": (told(hidden_size="wide"), CheckpointError, "config.json of bert"),
    "a dropout that is none": (told(hidden_dropout_prob="much"), CheckpointError, "dropout|config.json of bert"),
    "two of them": (
        lambda state, config: state.update({f"other.{EMBEDDING}": state[EMBEDDING]}),
        CheckpointError,
        "tensors below",
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_what_does_not_agree_is_refused(edit: str, tmp_path: Path) -> None:
    path, _, state = checkpoint(tmp_path / "theirs", "bert", "token-classification", True)
    config = json.loads((path / "config.json").read_text())
    change, error, found = EDITS[edit]
    change(state, config)
    save(path, state, config)
    with pytest.raises(error, match=found) as refused:
        sb.load(path)
    assert refused.value.expected
    assert refused.value.remedy


OTHER_SIZES: list[dict[str, Any]] = [
    {"num_layers": 2},
    {"num_layers": 2**31},
    {"num_layers": True},
    {"kv_channels": 6},
    {"kv_channels": None},
    {"multi_query_group_num": -2},
]


@pytest.mark.parametrize("change", OTHER_SIZES, ids=str)
def test_a_configuration_of_another_chatglm_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    path, _ = glm_checkpoint(tmp_path / "theirs", CHATGLM2, True)
    (path / "config.json").write_text(json.dumps({**CHATGLM2, **change}))
    with pytest.raises(BaseModelError) as refused:
        sb.load(path)
    assert refused.value.remedy


def bert(folder: Path, task: str = "sequence-classification", *, projected: bool = False, family: str = "bert") -> Path:
    return checkpoint(folder, family, task, projected)[0]


def in_safetensors(folder: Path) -> Path:
    path, _, state = checkpoint(folder, "bert", "sequence-classification", True)
    (path / "pytorch_model.bin").unlink()
    safetensors.torch.save_file(state, path / "model.safetensors")
    return path


#: Makes such a file or folder below a path, and says what to open: for the table of all formats.
FILES: dict[str, Callable[[Path], Path]] = {
    "chatglm flat": lambda folder: glm_checkpoint(folder, CHATGLM2, False)[0],
    "chatglm projected": lambda folder: glm_checkpoint(folder, CHATGLM, True)[0],
    "chatglm sharded": lambda folder: glm_checkpoint(folder, CHATGLM2, False, 2)[0],
    "chatglm whole": lambda folder: glm_checkpoint(folder, CHATGLM, False, 1)[0],
    "ptuning-v2 flat": bert,
    "ptuning-v2 projected": lambda folder: bert(folder, projected=True, family="roberta"),
    "ptuning-v2 questions": lambda folder: bert(folder, "question-answering"),
    "ptuning-v2 safetensors": in_safetensors,
    "ptuning-v2 vectors": prompt_variant,
}


@pytest.mark.parametrize("name", FILES)
def test_both_are_recognised_by_what_they_hold(name: str, tmp_path: Path) -> None:
    assert read(FILES[name](tmp_path)).format.name == name.partition(" ")[0]


def test_models_and_states_without_a_prefix_are_nobodys(tmp_path: Path) -> None:
    path, _, state = checkpoint(tmp_path / "model", "bert", "sequence-classification", False)
    config = json.loads((path / "config.json").read_text())
    others = {
        "fine-tuned": {name: tensor for name, tensor in state.items() if "prefix_encoder" not in name},
        "peft's state": {"prompt_encoder.default.embedding.weight": drawn(P, 8), "base_model.bias": drawn(3)},
        "lora": {"base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight": drawn(2, 32)},
        "optimiser": {"state.0.exp_avg": drawn(P, 8)},
        "a name that ends so": {"my_prefix_encoder.embedding.weight": drawn(P, 8)},
    }
    for name, tensors in others.items():
        files = untrusted.Files(save(tmp_path / name, tensors, config))
        assert not any(form.sniff(files) for form in (chatglm.FORMAT, ptuning_v2.FORMAT)), name
