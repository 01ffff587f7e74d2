"""The methods against the toolkits' own modules, bit for bit, and against a paper's own code where that is another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from softbridge.arrays import Array, from_torch, to_torch
from softbridge.geometry import Geometry, StackGeometry
from softbridge.methods import (
    MLP,
    Cartridge,
    ContextAwarePromptTuning,
    MultitaskPromptTuning,
    PrefixTuning,
    PromptTuning,
    PTuning,
    PTuningV2,
    TaskHead,
    evaluate,
    materialise,
    materialise_tasks,
    materialise_vectors,
)
from softbridge.prompt import SoftPrompt, Training
from softbridge.testing import apart, tiny_config, tiny_model

H, P = 32, 7
BASE = Geometry("llama", H, 96, None, StackGeometry(3, 4, 2, 8))
KV = 16  # K·D
LAYERS = (0, 1, 2)

State = Mapping[str, Array]


def large(prompt: SoftPrompt) -> Training:
    """The training state of a prompt with large random numbers, so that every difference shows."""
    assert prompt.training is not None
    generator = np.random.default_rng(11)
    numbers = {
        name: generator.normal(0, 0.7, a.shape).astype(np.float32) for name, a in prompt.training.tensors.items()
    }
    return replace(prompt.training, tensors=numbers)


def load(module: Any, state: State) -> Any:
    module.load_state_dict({name: to_torch(array) for name, array in state.items()})
    return module


def rows(module: Any) -> Any:
    """What a toolkit's module makes of its virtual tokens in a batch of one, as the toolkits save it: gradients on."""
    return module(torch.arange(P)[None])[0]


def same(ours: Array, theirs: Any, rtol: float = 0.0) -> None:
    theirs = from_torch(theirs)
    assert ours.dtype == theirs.dtype
    assert np.abs(ours).max() > 0.5, "the effect must be large"
    assert apart(ours, theirs) <= rtol


def learned(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


@pytest.fixture
def peft() -> Any:
    return pytest.importorskip("peft")


SIZES = {"num_virtual_tokens": P, "token_dim": H, "num_transformer_submodules": 1, "num_attention_heads": 4}


def p_tuning_state(training: Training, lstm: str = "lstm_head", mlp: str = "mlp_head") -> dict[str, Array]:
    """Under PEFT's names, which are LAMA's too: the linear layers are numbered with the activations between them."""
    names = {"embedding": "embedding.weight"}
    for name in training.tensors:
        kind, _, rest = name.partition(".")
        if kind == "lstm":
            names[name] = f"{lstm}.{rest}"
        elif kind == "linear":
            number, _, what = rest.partition(".")
            names[name] = f"{mlp}.{2 * int(number)}.{what}"
    return {names[name]: array for name, array in training.tensors.items()}


def prompt_encoder(peft: Any, kind: str, size: int = H, layers: int = 2) -> Any:
    config = peft.PromptEncoderConfig(
        **SIZES,
        num_layers=3,
        encoder_reparameterization_type=kind,
        encoder_hidden_size=size,
        encoder_num_layers=layers,
    )
    return peft.PromptEncoder(config)


@pytest.mark.parametrize(
    ("method", "kind", "size", "layers"),
    [
        (PTuning(P, "mlp"), "MLP", H, 2),
        (PTuning(P, "mlp", hidden_size=20), "MLP", 20, 2),
        (PTuning(P, "lstm"), "LSTM", H, 2),
        (PTuning(P, "lstm", hidden_size=20), "LSTM", 20, 2),
        (PTuning(P, "lstm", layers=1), "LSTM", H, 1),
        (PTuning(P, "lstm", layers=3, hidden_size=12), "LSTM", 12, 3),
    ],
)
def test_p_tuning_is_pefts(peft: Any, method: PTuning, kind: str, size: int, layers: int) -> None:
    training = large(method.initialise(BASE))
    module = load(prompt_encoder(peft, kind, size, layers), p_tuning_state(training))
    same(materialise_vectors(training), rows(module))
    assert method.parameters(BASE) == learned(module)


def test_p_tuning_is_what_peft_saves(peft: Any) -> None:
    training = large(PTuning(P, "lstm", hidden_size=20).initialise(BASE))
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=P,
        encoder_reparameterization_type="LSTM",
        encoder_hidden_size=20,
    )
    model = peft.get_peft_model(tiny_model("llama", torch.float32), config)
    load(model.prompt_encoder["default"], p_tuning_state(training))
    saved = model.get_prompt_embedding_to_save("default")
    same(materialise_vectors(training), saved)
    with (
        torch.no_grad()
    ):  # where torch takes other kernels for the LSTM: what is evaluated may not depend on the caller
        same(materialise_vectors(training), saved)
    with torch.inference_mode():
        same(materialise_vectors(training), saved)


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_p_tuning_has_pefts_gradient(peft: Any, encoder: Any) -> None:
    training = large(PTuning(P, encoder).initialise(BASE))
    module = load(prompt_encoder(peft, encoder.upper()), p_tuning_state(training))
    upstream = torch.randn(P, H, generator=torch.Generator().manual_seed(0))
    (rows(module) * upstream).sum().backward()
    tensors = {name: to_torch(array).requires_grad_() for name, array in training.tensors.items()}
    (evaluate(training.kind, training.settings, tensors) * upstream).sum().backward()
    theirs = dict(module.named_parameters())
    for name, key in zip(training.tensors, p_tuning_state(training), strict=True):
        assert torch.equal(tensors[name].grad, theirs[key].grad), name  # type: ignore[arg-type]


class PaperEncoder(torch.nn.Module):
    """P-tuning's encoder written down from the paper's code for LAMA: half the width per direction, two layers."""

    def __init__(self, hidden: int, length: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(length, hidden)
        self.recurrent = torch.nn.LSTM(hidden, hidden // 2, 2, bidirectional=True, batch_first=True)
        self.first, self.second = torch.nn.Linear(hidden, hidden), torch.nn.Linear(hidden, hidden)

    def forward(self, tokens: torch.Tensor) -> Any:
        return self.second(self.first(self.recurrent(self.embedding(tokens))[0]).relu())


class FewshotEncoder(torch.nn.Module):
    """The one of the same authors' PT-Fewshot: the full width per direction, narrowed by the first linear layer."""

    def __init__(self, hidden: int, length: int, *, recurrent: bool) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(length, hidden)
        if recurrent:
            self.recurrent = torch.nn.LSTM(hidden, hidden, 2, bidirectional=True, batch_first=True)
        self.first = torch.nn.Linear(2 * hidden if recurrent else hidden, hidden)
        self.second = torch.nn.Linear(hidden, hidden)

    def forward(self, tokens: torch.Tensor) -> Any:
        states = self.embedding(tokens)
        if hasattr(self, "recurrent"):
            states = self.recurrent(states)[0]
        return self.second(self.first(states).relu())


def paper_state(training: Training) -> dict[str, Array]:
    names = {"embedding": "embedding.weight"}
    words = {"lstm.": "recurrent.", "linear.0.": "first.", "linear.1.": "second."}
    for name in training.tensors:
        for ours, theirs in words.items():
            if name.startswith(ours):
                names[name] = theirs + name.removeprefix(ours)
    return {names[name]: array for name, array in training.tensors.items()}


@pytest.mark.parametrize(
    ("encoder", "module"),
    [
        ("lstm-paper", PaperEncoder(H, P)),
        ("lstm-fewshot", FewshotEncoder(H, P, recurrent=True)),
        ("mlp-fewshot", FewshotEncoder(H, P, recurrent=False)),
    ],
)
def test_p_tuning_is_the_papers(encoder: Any, module: Any) -> None:
    method = PTuning(P, encoder)
    training = large(method.initialise(BASE))
    same(materialise_vectors(training), rows(load(module, paper_state(training))))
    assert method.parameters(BASE) == learned(module)


def test_the_papers_encoders_are_not_pefts(peft: Any) -> None:
    pefts = {kind: prompt_encoder(peft, kind) for kind in ("MLP", "LSTM")}
    for encoder, kind in (("lstm-paper", "LSTM"), ("lstm-fewshot", "LSTM"), ("mlp-fewshot", "MLP")):
        method = PTuning(P, encoder)  # type: ignore[arg-type]
        assert method.parameters(BASE) != learned(pefts[kind])
        with pytest.raises(RuntimeError, match="Error"):
            load(pefts[kind], p_tuning_state(large(method.initialise(BASE))))
    prompts = [PTuning(P, encoder).initialise(BASE) for encoder in ("mlp", "lstm", "lstm-paper", "lstm-fewshot")]  # type: ignore[arg-type]
    made = [materialise_vectors(large(prompt)) for prompt in prompts]
    assert min(np.abs(a - b).max() for n, a in enumerate(made) for b in made[:n]) > 0.1
    # PEFT can hold LAMA's, if it is told the width.
    training = large(PTuning(P, "lstm-paper").initialise(BASE))
    same(materialise_vectors(training), rows(load(prompt_encoder(peft, "LSTM", H // 2), p_tuning_state(training))))


PROJECTION = {
    "embedding": "embedding.weight",
    "hidden.weight": "transform.0.weight",
    "hidden.bias": "transform.0.bias",
    "output.weight": "transform.2.weight",
    "output.bias": "transform.2.bias",
}


def prefix_encoder(peft: Any, projection: bool, size: int = 20) -> Any:
    config = peft.PrefixTuningConfig(
        **{**SIZES, "token_dim": KV, "num_attention_heads": 2},
        num_layers=3,
        prefix_projection=projection,
        encoder_hidden_size=size,
    )
    return peft.PrefixEncoder(config)


def test_prefix_tuning_is_pefts(peft: Any) -> None:
    method = PrefixTuning(P, MLP(bottleneck_size=20, embedding_size=KV))
    training = large(method.initialise(BASE))
    module = load(
        prefix_encoder(peft, True), {theirs: training.tensors[f"self.{o}"] for o, theirs in PROJECTION.items()}
    )
    prefix = materialise(training, "self", LAYERS, 2, 8)
    same(prefix.flat(), rows(module))
    assert method.parameters(BASE) == learned(module)
    flat = PrefixTuning(P, None)
    assert flat.parameters(BASE) == PTuningV2(P).parameters(BASE) == learned(prefix_encoder(peft, False))
    swapped = materialise(training, "self", (1, 0, 2), 2, 8)
    assert np.abs(swapped.flat() - prefix.flat()).max() > 0.1
    assert np.abs(from_torch(rows(prefix_encoder(peft, True))) - prefix.flat()).max() > 0.1


@pytest.mark.parametrize("non_linearity", ["tanh", "relu", "leakyrelu", "gelu_new"])
def test_prefix_tuning_is_adapterhubs(non_linearity: str) -> None:
    pytest.importorskip("adapters")
    from adapters.configuration import PrefixTuningConfig
    from adapters.methods import prefix_tuning

    config = PrefixTuningConfig(prefix_length=P, bottleneck_size=20, non_linearity=non_linearity)
    method = PrefixTuning(P, MLP(bottleneck_size=20, non_linearity=non_linearity))
    training = large(method.initialise(BASE))
    module = prefix_tuning.PrefixTuning(3, 2, H, config, n_embd_per_head=8)
    names = {ours: key.replace("transform", "control_trans") for ours, key in PROJECTION.items()}
    names["embedding"] = "wte.weight"
    load(module, {theirs: training.tensors[f"self.{ours}"] for ours, theirs in names.items()}).eval()
    prefix = materialise(training, "self", LAYERS, 2, 8)
    for pair, theirs in zip(prefix.layers.values(), module(1), strict=True):
        same(pair.keys, theirs[0, 0])
        same(pair.values, theirs[1, 0])
    assert method.parameters(BASE) == learned(module)
    flat = prefix_tuning.FlatPrefixTuning(3, 2, H, config, n_embd_per_head=8)
    assert PrefixTuning(P, None).parameters(BASE) == learned(flat)


@pytest.mark.parametrize("ranks", [1, 3])
def test_multitask_prompts_are_pefts(peft: Any, ranks: int) -> None:
    method = MultitaskPromptTuning(tasks=4, ranks=ranks, length=P)
    training = large(method.initialise(BASE))
    config = peft.MultitaskPromptTuningConfig(**SIZES, num_tasks=4, num_ranks=ranks, num_layers=3)
    module = peft.tuners.multitask_prompt_tuning.MultitaskPromptEmbedding(config, torch.nn.Embedding(96, H))
    keys = {"embedding.weight": "embedding", "prefix_task_cols": "columns", "prefix_task_rows": "rows"}
    load(module, {theirs: training.tensors[ours] for theirs, ours in keys.items()})
    tasks = materialise_tasks(training)
    for task, prompt in tasks.items():
        # It multiplies batches, in float32.
        same(prompt, module(torch.arange(P)[None], torch.tensor([task]))[0], rtol=1e-6)
        together = module(torch.arange(P).expand(4, -1), torch.arange(4))[task]
        same(prompt, together, rtol=1e-6)
        assert all(np.abs(prompt - other).max() > 0.1 for number, other in tasks.items() if number != task)
    assert method.parameters(BASE) == learned(module)


@pytest.mark.parametrize("types", [[1, 2, 3, 4, 5, 6, 8], [0, 1, 1, 2, 2, 4, 3], [1, -3, -2, 2, 2, 7, -4]])
@pytest.mark.parametrize(("std", "format_epsilon"), [(0.7, 14.0), (0.7, 0.0), (0.0, 14.0), (1e-3, 14.0)])
def test_context_aware_prompts_are_pefts(peft: Any, types: list[int], std: float, format_epsilon: float) -> None:
    method = ContextAwarePromptTuning(types, epsilon=9.0, format_epsilon=format_epsilon)
    training = large(method.initialise(BASE))
    tensors = {**training.tensors, "delta": (training.tensors["delta"] * np.float32(std / 0.7))}
    if std:
        tensors["delta"][0] = 0  # a row that has not moved has no norm to divide by
    training = replace(training, tensors=tensors)
    config = peft.CPTConfig(
        task_type="CAUSAL_LM",
        cpt_token_ids=list(range(P)),
        cpt_tokens_type_mask=types,
        opt_projection_epsilon=9.0,
        opt_projection_format_epsilon=format_epsilon,
    )
    config.token_dim = H
    module = peft.tuners.cpt.CPTEmbedding(config, torch.nn.Embedding(96, H))
    load(
        module,
        {"embedding.weight": training.tensors["embedding"], "delta_embedding.weight": training.tensors["delta"]},
    )
    prompt = materialise_vectors(training)
    projected = module.get_projection() + module.embedding.weight
    same(prompt, projected)
    same(prompt, rows(module))  # which replaces the delta by its projection
    assert method.parameters(BASE) == learned(module)

    stored = {**training.tensors, "delta": from_torch(module.delta_embedding.weight)}
    same(materialise_vectors(replace(training, tensors=stored)), rows(module))
    upstream = torch.randn(P, H, generator=torch.Generator().manual_seed(0))
    (rows(module) * upstream).sum().backward()
    ours = {name: to_torch(array) for name, array in stored.items()}
    delta = ours["delta"].requires_grad_()
    (evaluate(training.kind, training.settings, ours) * upstream).sum().backward()
    assert torch.equal(delta.grad, module.delta_embedding.weight.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("frozen", [0, 1, 3])
def test_cartridges_are_pefts(peft: Any, frozen: int) -> None:
    pytest.importorskip("peft.tuners.cartridge")
    method = Cartridge(P, frozen=frozen)
    training = large(method.initialise(BASE))
    config = peft.CartridgeConfig(
        **{**SIZES, "token_dim": KV, "num_attention_heads": 2}, num_layers=3, num_frozen_tokens=frozen
    )
    module = peft.tuners.cartridge.CartridgeEncoder(config)
    keys = {"frozen_embedding": "self.frozen", "trainable_embedding": "self.trained"}
    load(module, {theirs: training.tensors[o] for theirs, o in keys.items() if o in training.tensors})
    same(materialise(training, "self", LAYERS, 2, 8).flat(), rows(module))
    assert method.parameters(BASE) == learned(module)


def test_prompt_tuning_is_pefts(peft: Any) -> None:
    config = peft.PromptTuningConfig(**SIZES, num_layers=3)
    module = peft.PromptEmbedding(config, torch.nn.Embedding(96, H))
    assert PromptTuning(P).parameters(BASE) == learned(module)


@pytest.mark.parametrize(
    ("family", "task", "head"),
    [
        ("bert", "SequenceClassification", TaskHead("sequence-classification", 3)),
        ("bert", "TokenClassification", TaskHead("token-classification", 3)),
        ("bert", "QuestionAnswering", TaskHead("question-answering")),
        ("llama", "SequenceClassification", TaskHead(labels=3, module="score", bias=False)),
        ("llama", "TokenClassification", TaskHead("token-classification", 3, module="score")),
    ],
)
def test_heads_are_the_models_own(family: str, task: str, head: TaskHead) -> None:
    import transformers

    config = tiny_config(family, num_labels=head.labels)
    model = getattr(transformers, f"AutoModelFor{task}").from_config(config)
    names = [name for name, _ in model.named_parameters() if not name.startswith(model.base_model_prefix)]
    shapes = {name: tuple(model.get_parameter(name).shape) for name in names}
    assert head.shapes(BASE) == shapes
    prompt = PTuningV2(P, head).initialise(BASE)
    assert {name: array.shape for name, array in prompt.head.items()} == shapes
