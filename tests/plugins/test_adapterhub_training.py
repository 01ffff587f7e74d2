"""A prefix that AdapterHub's own trainer trained goes on in the native engine, from the same loss."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import softbridge as sb
from softbridge.plugin.registry import engines
from softbridge.prompt import KeyValue, KeyValuePrefix, SoftPrompt

adapters = pytest.importorskip("adapters")

import torch  # noqa: E402
from transformers import AutoConfig, TrainingArguments  # noqa: E402

from softbridge.base import build  # noqa: E402

ADAPTERHUB, NATIVE = engines()["adapterhub"], engines()["native"]
P, STEPS, RATE = 4, 4, 0.5
_BART = {"vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2}
_BART |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 20, "decoder_ffn_dim": 20, "max_position_embeddings": 32}
_LLAMA = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "pad_token_id": 0}
_GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "resid_pdrop": 0.0}
#: Nothing is dropped, so that both sides train the same function; output embeddings are tied, and so not trained.
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {**_GPT2, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2},
    "llama": {**_LLAMA, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "bart": {**_BART, "dropout": 0.0, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}


def model_of(family: str) -> Any:
    config = AutoConfig.for_model(family, **CONFIGS[family])
    return build(config, "seq2seq-lm" if family == "bart" else "causal-lm", torch.float64, 0)


def rows() -> list[dict[str, torch.Tensor]]:
    """Texts, one of them padded. The first token is no label: transformers' trainer counts it, and no model uses it."""
    tokens = torch.randint(3, 40, (4, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[-1, -2:] = 0
    labels = torch.where(mask.bool(), tokens, -100)
    labels[:, 0] = -100
    return [
        {"input_ids": ids, "attention_mask": ones, "labels": wanted}
        for ids, ones, wanted in zip(tokens, mask, labels, strict=True)
    ]


def batch() -> dict[str, torch.Tensor]:
    texts = rows()
    return {name: torch.stack([text[name] for text in texts]) for name in texts[0]}


class Toolkit:
    """AdapterHub with an adapter ``mine``, and its own trainer, which sees all texts in every step."""

    def __init__(self, family: str, folder: Path) -> None:
        self.family, self.folder, self.model = family, folder, model_of(family)
        self.model.config._attn_implementation = "eager"
        adapters.init(self.model)

    def add(self, **settings: Any) -> Toolkit:
        with torch.random.fork_rng():
            torch.manual_seed(2)
            config = adapters.PrefixTuningConfig(prefix_length=P, bottleneck_size=6, **settings)
            self.model.add_adapter("mine", config)
        return self.start()

    def load(self, folder: Path) -> Toolkit:
        self.model.load_adapter(str(folder), load_as="mine")
        return self.start()

    def start(self) -> Toolkit:
        self.model.adapter_to("mine", dtype=torch.float64)
        self.model.train_adapter("mine")
        return self

    def trainer(self) -> Any:
        settings = {"optim": "sgd", "learning_rate": RATE, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
        quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no"}
        arguments = TrainingArguments(
            str(self.folder), max_steps=STEPS, per_device_train_batch_size=4, use_cpu=True, **settings, **quiet
        )
        texts: Any = rows()
        return adapters.AdapterTrainer(model=self.model, args=arguments, train_dataset=texts, eval_dataset=texts)

    def train(self) -> Toolkit:
        self.trainer().train()
        return self

    def loss(self) -> float:
        return loss_of(self.model.eval())

    def save(self, folder: Path) -> SoftPrompt:
        self.model.save_adapter(str(folder), "mine", with_head=False)
        return sb.load(folder, base=model_of(self.family))


def loss_of(model: Any) -> float:
    with torch.no_grad():
        return float(model(**batch(), use_cache=False).loss)


def train(model: Any) -> list[float]:
    """Plain gradient descent. Returns the loss before each step, and after the last."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=RATE)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(**batch(), use_cache=False).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
    return [*losses, loss_of(model)]


def apart(a: Iterable[KeyValuePrefix], b: Iterable[KeyValuePrefix]) -> float:
    return max(float(np.abs(x.flat() - y.flat()).max()) for x, y in zip(a, b, strict=True))


def swapped(prompt: SoftPrompt) -> SoftPrompt:
    parts = tuple(
        KeyValuePrefix(part.site, {n: KeyValue(pair.values, pair.keys) for n, pair in part.layers.items()})
        for part in prompt.prefixes
    )
    return replace(prompt, parts=parts, training=None)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_flat_prefix_trains_on_exactly(family: str, tmp_path: Path) -> None:
    toolkit = Toolkit(family, tmp_path).add(flat=True)
    untrained = toolkit.loss()
    prompt = toolkit.train().save(tmp_path / "a")
    start = toolkit.loss()
    assert start < untrained - 0.05
    assert toolkit.trainer().evaluate()["eval_loss"] == pytest.approx(start, rel=1e-6)  # the trainer's own is rounded

    ours = NATIVE.attach(model_of(family), prompt)
    assert abs(loss_of(NATIVE.attach(model_of(family), swapped(prompt))) - start) > 0.01
    losses = train(ours)
    after = toolkit.train().save(tmp_path / "b")
    assert losses[0] == pytest.approx(start, rel=1e-12)
    assert losses[-1] < start - 0.05
    assert losses[-1] == pytest.approx(toolkit.loss(), rel=1e-12)
    ours_after = NATIVE.extract(ours)
    assert apart(ours_after.prefixes, prompt.prefixes) > 0.01
    assert apart(ours_after.prefixes, after.prefixes) < 1e-12

    # And back: AdapterHub goes on from what the native engine trained. Its loader holds float32.
    sb.save(ours_after, tmp_path / "c", format="adapterhub", base=model_of(family), accept=["dtype"])
    assert Toolkit(family, tmp_path).load(tmp_path / "c").loss() == pytest.approx(losses[-1], rel=1e-6)


def test_a_parameterisation_trains_on_exactly_and_ejected_from_the_same_loss(tmp_path: Path) -> None:
    toolkit = Toolkit("gpt2", tmp_path).add()
    untrained = toolkit.loss()
    prompt = toolkit.train().save(tmp_path / "a")
    assert prompt.training is not None
    start = toolkit.loss()
    assert abs(start - untrained) > 1e-3

    ejected = train(NATIVE.attach(model_of("gpt2"), replace(prompt, training=None)))
    assert ejected[0] == pytest.approx(start, rel=1e-12)
    assert ejected[-1] < start - 0.02

    ours = NATIVE.attach(model_of("gpt2"), prompt)
    losses = train(ours)
    after = toolkit.train().save(tmp_path / "b")
    assert losses[0] == pytest.approx(start, rel=1e-12)
    assert losses[-1] == pytest.approx(toolkit.loss(), rel=1e-12)
    assert abs(losses[-1] - ejected[-1]) > 1e-4, "another parameterisation takes other steps"
    trained = NATIVE.extract(ours).training
    assert trained is not None
    assert after.training is not None
    for name, array in after.training.tensors.items():
        np.testing.assert_allclose(trained.tensors[name], array, rtol=0, atol=1e-12)
        assert np.abs(array - prompt.training.tensors[name]).max() > 1e-6, name

    # And from the file, in AdapterHub's float32.
    again = Toolkit("gpt2", tmp_path).load(tmp_path / "a")
    assert again.loss() == pytest.approx(start, rel=1e-6)
    assert again.train().loss() == pytest.approx(losses[-1], rel=1e-6)
