"""The native engine trains a prompt through its parameterisation, as long as that makes the prompt's numbers."""

from __future__ import annotations

import copy
import io
import logging
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import softbridge as sb
from softbridge.arrays import to_torch
from softbridge.errors import EngineError
from softbridge.geometry import read_geometry
from softbridge.initialisation import random_uniform
from softbridge.lowering.examples import as_if_trained
from softbridge.lowering.precision import as_dtype
from softbridge.methods import (
    MLP,
    Cartridge,
    ContextAwarePromptTuning,
    Method,
    MultitaskPromptTuning,
    PrefixTuning,
    PromptTuning,
    PTuning,
    PTuningV2,
    TaskHead,
    evaluate,
    rematerialise,
    trained,
)
from softbridge.prompt import SoftPrompt
from softbridge.testing import agreement, tiny_model

METHODS: dict[str, Method] = {
    "prefix": PrefixTuning(4, MLP(8), ("self",)),
    "lstm": PTuning(4, "lstm", hidden_size=6),
    "mlp": PTuning(4, "mlp", hidden_size=6),
    "multitask": MultitaskPromptTuning(3, length=4),
    "context-aware": ContextAwarePromptTuning([1, 2, 2, 4]),
    "cartridge": Cartridge(4, sites=("self",)),
}
QUIET = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("gpt2", **QUIET)


def prompt_of(model: Any, name: str, **settings: Any) -> SoftPrompt:
    """Large, in float64, with its training state."""
    prompt = as_if_trained(METHODS[name], read_geometry(model.config))
    state = prompt.training
    assert state is not None
    wide = {name: array.astype(np.float64) for name, array in state.tensors.items()}
    state = replace(state, tensors=wide, settings={**state.settings, **settings})
    return rematerialise(replace(prompt, training=state))


def tokens(rows: int = 2) -> Tensor:
    return torch.randint(3, 96, (rows, 7), generator=torch.Generator().manual_seed(0))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=tokens()).logits
    return found


def loss(model: Any) -> Tensor:
    """In float64, which the model's own is not."""
    ids = tokens()
    scores = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(scores.reshape(-1, scores.shape[-1]), ids[:, 1:].reshape(-1))


def gradients(model: Any) -> dict[str, Tensor]:
    """Of what is trained, by its local name."""
    model.zero_grad()
    loss(model).backward()
    return {
        name.rpartition("parameterisation.")[2]: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("name", METHODS)
def test_its_gradient_is_the_chain_rule(model: Any, name: str) -> None:
    """The gradient in the prompt's own numbers, sent back through the parameterisation by hand."""
    prompt = prompt_of(model, name)
    state = prompt.training
    assert state is not None
    through = sb.attach(copy.deepcopy(model), prompt)
    direct = sb.attach(copy.deepcopy(model), replace(prompt, training=None))
    assert relative(logits(through), logits(direct)) <= agreement(model)
    assert float((logits(through) - logits(model)).abs().max()) > 0.1
    found = gradients(through)
    assert found.keys() == {name.replace(".", "_") for name in trained(state)}

    of_parts = list(gradients(direct).values())
    (part,) = prompt.parts
    if prompt.prefixes:  # keys and values of each layer [K, P, D], to rows of [layer, key or value, head, channel]
        of_parts = [torch.cat([g.transpose(0, 1).flatten(1) for g in of_parts], dim=1)]
    leaves = {n: to_torch(array).requires_grad_(n in trained(state)) for n, array in state.tensors.items()}
    made = evaluate(state.kind, state.settings, leaves, part.site if prompt.prefixes else None)
    made.backward(of_parts[0])
    for n in trained(state):
        expected = leaves[n].grad
        if expected is not None and float(expected.abs().max()) > 0:
            assert relative(found[n.replace(".", "_")], expected) <= agreement(model), n
        else:  # LSTMs have two biases; tasks that are not run have no gradient
            assert float(found[n.replace(".", "_")].abs().max()) == 0
    assert max(float(g.abs().max()) for g in found.values()) > 1e-4


@pytest.mark.parametrize("name", METHODS)
def test_it_is_trained_saved_and_trained_on(model: Any, name: str, tmp_path: Any) -> None:
    """Six steps are three steps, a file, and three steps: the parameterisation comes along."""
    prompt = prompt_of(model, name)
    state = prompt.training
    assert state is not None

    def steps(running: Any, number: int) -> list[float]:
        optimizer = torch.optim.SGD([p for p in running.parameters() if p.requires_grad], lr=0.1)
        losses = []
        for _ in range(number):
            optimizer.zero_grad()
            value = loss(running)
            losses.append(value.item())
            value.backward()
            optimizer.step()
        return losses

    whole = sb.attach(copy.deepcopy(model), prompt)
    before = {n: p.clone() for n, p in whole.named_parameters() if "softbridge" not in n}
    expected = steps(whole, 6)
    assert all(torch.equal(p, before[n]) for n, p in whole.named_parameters() if n in before)
    first = sb.attach(copy.deepcopy(model), prompt)
    found = steps(first, 3)
    half = sb.extract(first)
    assert half.training is not None
    assert half.origin is None
    for n, array in half.training.tensors.items():
        untouched = np.array_equal(array, state.tensors[n])
        assert untouched == (n not in trained(state)), n
    sb.save(half, tmp_path, format="softbridge")
    found += steps(sb.attach(copy.deepcopy(model), sb.load(tmp_path)), 3)
    assert found == pytest.approx(expected, rel=agreement(model))
    assert expected[-1] < expected[0] - 1e-3
    # Without it, training goes on otherwise from the same loss.
    second = steps(sb.attach(copy.deepcopy(model), replace(half, training=None)), 3)
    assert second[0] == pytest.approx(expected[3], rel=agreement(model))
    assert second[-1] != pytest.approx(expected[-1], rel=1e-6)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["prefix", "lstm"])
def test_checkpointing_and_dropout_keep_the_gradient(model: Any, name: str, reentrant: bool) -> None:
    running = sb.attach(copy.deepcopy(model), prompt_of(model, name, dropout=0.5)).train()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            running.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        torch.manual_seed(3)
        found.append(gradients(running))
    plain, checkpointed = found
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(plain[n], checkpointed[n]) for n in plain)
    assert max(float(g.abs().max()) for g in plain.values()) > 1e-3
    if name == "prefix":  # an LSTM of one layer drops nothing
        torch.manual_seed(4)
        assert relative(gradients(running)["self_output_weight"], plain["self_output_weight"]) > 0.1
    copy.deepcopy(running)
    if name == "prefix":
        first = loss(running)
        loss(running)
        with pytest.raises(EngineError, match="after the model had been called again"):
            first.backward()
        assert gradients(running).keys() == plain.keys()


def test_dropout_is_for_training_alone(model: Any) -> None:
    prompt = prompt_of(model, "prefix", dropout=0.5)
    running = sb.attach(copy.deepcopy(model), prompt)
    still = sb.attach(copy.deepcopy(model), replace(prompt, training=None))
    assert loss(running).item() == pytest.approx(loss(still).item(), rel=agreement(model))
    running.train()
    first, second = loss(running).item(), loss(running).item()
    assert len({first, second, loss(still).item()}) == 3
    assert relative(logits(running.eval()), logits(still)) <= agreement(model)
    assert sb.extract(running) == prompt


def test_numbers_change_with_the_tensors_that_make_them(model: Any) -> None:
    running = sb.attach(copy.deepcopy(model), prompt_of(model, "prefix"))
    before = logits(running)
    tensors = running.softbridge.parameterisation
    with torch.no_grad():
        tensors.self_output_bias.add_(0.5)
    after = logits(running)
    assert relative(after, before) > 1e-3
    fresh = sb.attach(copy.deepcopy(model), sb.extract(running))
    assert relative(logits(fresh), after) <= agreement(model)
    fresh.load_state_dict(sb.attach(copy.deepcopy(model), prompt_of(model, "prefix")).state_dict())
    assert relative(logits(fresh), before) <= agreement(model)


def test_a_copy_and_a_pickle_train_on_their_own(model: Any) -> None:
    running = sb.attach(copy.deepcopy(model), prompt_of(model, "prefix"))
    expected = gradients(running)
    file = io.BytesIO()
    torch.save(running, file)
    file.seek(0)
    for twin in (copy.deepcopy(running), torch.load(file, weights_only=False)):
        found = gradients(twin)
        assert all(relative(found[n], expected[n]) <= agreement(model) for n in expected)
        with torch.no_grad():
            for parameter in twin.softbridge.parameters():
                parameter.zero_()
        assert relative(logits(twin), logits(running)) > 1e-2
        assert torch.equal(logits(sb.detach(twin)), logits(model))
    assert all(torch.equal(gradients(running)[n], expected[n]) for n in expected)


@pytest.mark.parametrize("name", ["prefix", "mlp"])
def test_compiles_in_one_graph(model: Any, name: str) -> None:
    running = sb.attach(copy.deepcopy(model), prompt_of(model, name))
    expected = logits(running)
    compiled = torch.compile(running, backend="eager", fullgraph=True)
    assert torch.equal(logits(compiled), expected)


@pytest.mark.parametrize("name", ["prefix", "mlp", "lstm", "multitask"])
def test_it_trains_as_peft_does(model: Any, name: str) -> None:
    """From PEFT's own random start, with PEFT's own parameterisation on the other side: the same losses, by step."""
    import peft

    common = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    config = {
        "prefix": lambda: peft.PrefixTuningConfig(**common, prefix_projection=True, encoder_hidden_size=8),
        "mlp": lambda: peft.PromptEncoderConfig(**common, encoder_hidden_size=6, encoder_dropout=0.0),
        "lstm": lambda: peft.PromptEncoderConfig(
            **common, encoder_reparameterization_type="LSTM", encoder_hidden_size=6, encoder_dropout=0.0
        ),
        "multitask": lambda: peft.MultitaskPromptTuningConfig(**common, num_tasks=3, num_ranks=2),
    }[name]()
    torch.manual_seed(0)
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    if name != "multitask":  # which PEFT multiplies in float32, as its files do
        theirs.double()
    prompt = sb.extract(theirs)
    assert prompt.training is not None
    ours = sb.attach(copy.deepcopy(model), prompt)
    tasks = {"task_ids": torch.zeros(2, dtype=torch.long)} if name == "multitask" else {}
    ids, curves = tokens(), []
    for running, more in ((theirs, tasks), (ours, {})):
        running.train()
        optimizer = torch.optim.SGD([p for p in running.parameters() if p.requires_grad], lr=0.5)
        losses = []
        for _ in range(5):
            optimizer.zero_grad()
            scores = running(input_ids=ids, **more).logits[:, -ids.shape[1] : -1]
            value = torch.nn.functional.cross_entropy(scores.reshape(-1, scores.shape[-1]), ids[:, 1:].reshape(-1))
            value.backward()
            losses.append(value.item())
            optimizer.step()
        curves.append(losses)
    assert curves[1] == pytest.approx(curves[0], rel=agreement(model) if name != "multitask" else 1e-6)
    assert curves[0][-1] < curves[0][0] - 1e-6


def test_numbers_that_it_does_not_make_are_trained_themselves(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    prompt = prompt_of(model, "prefix")
    other = replace(prompt, parts=as_dtype(prompt_of(model, "cartridge"), np.dtype(np.float32)).parts)
    with caplog.at_level(logging.WARNING):
        running = sb.attach(copy.deepcopy(model), other)
    assert "no longer what its parameterisation 'mlp' makes" in caplog.text
    assert all("parameterisation" not in name for name, p in running.named_parameters() if p.requires_grad)
    gradients(running)
    with torch.no_grad():
        for parameter in running.softbridge.parameters():
            parameter.add_(0.1)
    assert sb.extract(running).training is None
    # A file in half the precision is what the parameterisation makes, to rounding.
    caplog.clear()
    halved = as_dtype(prompt, np.dtype(np.float16))
    with caplog.at_level(logging.WARNING):
        running = sb.attach(copy.deepcopy(model), replace(halved, training=prompt.training))
    assert not caplog.text
    assert "self_embedding" in gradients(running)


def test_a_method_starts_a_prompt_and_a_head() -> None:
    base = tiny_model("bert")
    torch.manual_seed(0)
    one = sb.extract(sb.attach(copy.deepcopy(base), PromptTuning(4)))
    torch.manual_seed(0)
    two = sb.extract(sb.attach(copy.deepcopy(base), PromptTuning(4)))
    three = sb.extract(sb.attach(copy.deepcopy(base), PromptTuning(4)))
    assert one == two != three
    assert sb.extract(sb.attach(copy.deepcopy(base), PromptTuning(4), seed=5)) == PromptTuning(4).initialise(
        read_geometry(base.config), 5
    )
    assert random_uniform(base, 4, seed=1) != one


def test_a_head_is_trained_with_the_prompt() -> None:
    base = tiny_model("bert")
    if not base._can_set_attn_implementation():
        pytest.skip("bert does not dispatch here")
    running = sb.attach(copy.deepcopy(base), PTuningV2(4, head=TaskHead(labels=5)), seed=0)
    head = {"classifier.weight", "classifier.bias"}
    trainable = {name for name, p in running.named_parameters() if p.requires_grad}
    assert {name for name in trainable if not name.startswith("softbridge.")} == head
    before = sb.extract(running)
    running(input_ids=tokens(), labels=torch.tensor([1, 4])).loss.backward()
    torch.optim.SGD([p for p in running.parameters() if p.requires_grad], lr=1.0).step()
    after = sb.extract(running)
    assert after.head.keys() == head
    assert all(not np.array_equal(after.head[name], before.head[name]) for name in head)
    detached = sb.detach(running)
    assert all(torch.equal(p, q) for p, q in zip(detached.parameters(), base.parameters(), strict=True))
    assert all(p.requires_grad for p in detached.parameters())
