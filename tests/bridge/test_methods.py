"""The methods without a toolkit: parameterisations written out by hand, starts, counts, refusals.

Comparison with the toolkits' own modules is in `test_methods_toolkits.py`.
"""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest
import torch

from softbridge import methods
from softbridge.arrays import BFLOAT16, Array, to_torch
from softbridge.geometry import Geometry, Site, StackGeometry
from softbridge.methods import (
    KINDS,
    METHODS,
    MLP,
    MLP_TENSORS,
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
    materialise,
    materialise_tasks,
    materialise_vectors,
    rematerialise,
    trained,
)
from softbridge.prompt import KeyValuePrefix, SoftPrompt, Training, digest_of

H = 12
DECODER = Geometry("decoder", H, 96, None, StackGeometry(3, 4, 2, 5))
ENCODER = Geometry("encoder", H, 96, StackGeometry(4, 3, 3, 4), None)
BOTH = Geometry("both", H, 96, StackGeometry(2, 4, 4, 3), StackGeometry(3, 4, 2, 6))

P, E, M, LAYERS, K, D = 5, 12, 7, (0, 2), 2, 3


def training(dtype: type = np.float64, non_linearity: str = "tanh", kind: str = "mlp") -> Training:
    generator = np.random.default_rng(3)
    width = len(LAYERS) * 2 * K * D
    sizes = ((P, E), (M, E), (M,), (width, M), (width,))
    tensors = {
        f"self.{name}": generator.normal(0, 0.7, size).astype(dtype)
        for name, size in zip(MLP_TENSORS, sizes, strict=True)
    }
    return Training(kind, {"non_linearity": non_linearity, "dropout": 0.1}, tensors)


def large(prompt: SoftPrompt, dtype: Any = np.float64, std: float = 0.7) -> Training:
    """The training state of a prompt with large random numbers, so that every change shows."""
    assert prompt.training is not None
    generator = np.random.default_rng(11)
    tensors = {
        name: generator.normal(0, std, array.shape).astype(dtype) for name, array in prompt.training.tensors.items()
    }
    return replace(prompt.training, tensors=tensors)


def difference(a: Array, b: Array) -> float:
    return float(np.abs(a - b).max())


def vectors(prompt: SoftPrompt) -> Array:
    return prompt.inputs[0].vectors


# --- parameterisations -----------------------------------------------------------------------------------------------


def by_hand(given: Training, function: object = np.tanh) -> Array:
    embedding, weight, bias, output, output_bias = (given.tensors[f"self.{name}"] for name in MLP_TENSORS)
    return np.asarray(function(embedding @ weight.T + bias) @ output.T + output_bias)  # type: ignore[operator]


def test_equals_the_parameterisation_written_out() -> None:
    given = training()
    prefix = materialise(given, "self", LAYERS, K, D)
    assert tuple(prefix.layers) == LAYERS
    assert prefix.layers[2].keys.shape == (K, P, D)
    np.testing.assert_allclose(prefix.flat(), by_hand(given), atol=1e-14)


@pytest.mark.parametrize("layers", [3, 4])
def test_an_mlp_of_more_layers_equals_it_written_out(layers: int) -> None:
    given, generator = training(), np.random.default_rng(4)
    more = {f"self.hidden.{n}.weight": generator.normal(size=(M, M)) for n in range(1, layers - 1)}
    more |= {name.replace("weight", "bias"): generator.normal(size=M) for name in more}
    deep = replace(given, settings={**given.settings, "layers": layers}, tensors={**given.tensors, **more})
    found = materialise(deep, "self", LAYERS, K, D).flat()
    t = deep.tensors
    rows = np.tanh(t["self.embedding"] @ t["self.hidden.weight"].T + t["self.hidden.bias"])
    for n in range(1, layers - 1):
        rows = np.tanh(rows @ t[f"self.hidden.{n}.weight"].T + t[f"self.hidden.{n}.bias"])
    np.testing.assert_allclose(found, rows @ t["self.output.weight"].T + t["self.output.bias"], atol=1e-14)
    assert difference(found, by_hand(given)) > 0.1
    assert trained(deep) == set(deep.tensors)


def test_another_activation_is_another_prefix() -> None:
    relu = materialise(training(non_linearity="relu"), "self", LAYERS, K, D).flat()
    np.testing.assert_allclose(relu, by_hand(training(), lambda x: np.maximum(x, 0)), atol=1e-14)
    leaky = materialise(training(non_linearity="leakyrelu"), "self", LAYERS, K, D).flat()
    np.testing.assert_allclose(leaky, by_hand(training(), lambda x: np.where(x > 0, x, 0.01 * x)), atol=1e-14)
    assert difference(relu, leaky) > 1e-3
    assert difference(relu, by_hand(training())) > 0.1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_keeps_the_stored_dtype(dtype: type) -> None:
    assert materialise(training(dtype), "self", LAYERS, K, D).layers[0].values.dtype == dtype


def sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


def lstm_by_hand(given: Training, layers: int) -> Array:
    """Hochreiter & Schmidhuber 1997 in NumPy: gates in torch's order, forwards and backwards through each layer."""
    t = given.tensors
    rows = t["embedding"]
    for layer in range(layers):
        both = []
        for direction in ("", "_reverse"):
            names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            w, u, b, c = (t[f"lstm.{name}_l{layer}{direction}"] for name in names)
            hidden = cell = np.zeros(u.shape[1])
            outputs = []
            for row in rows[::-1] if direction else rows:
                forget_in, forget, candidate, out = np.split(w @ row + b + u @ hidden + c, 4)
                cell = sigmoid(forget) * cell + sigmoid(forget_in) * np.tanh(candidate)
                hidden = sigmoid(out) * np.tanh(cell)
                outputs.append(hidden)
            both.append(outputs[::-1] if direction else outputs)
        rows = np.concatenate([np.stack(half) for half in both], axis=1)
    rows = np.maximum(rows @ t["linear.0.weight"].T + t["linear.0.bias"], 0)
    return np.asarray(rows @ t["linear.1.weight"].T + t["linear.1.bias"])


@pytest.mark.parametrize(("encoder", "layers"), [("lstm", 1), ("lstm", 3), ("lstm-paper", 2), ("lstm-fewshot", 2)])
def test_equals_the_lstm_written_out(encoder: Any, layers: int) -> None:
    given = large(PTuning(6, encoder, layers=layers).initialise(DECODER))
    np.testing.assert_allclose(materialise_vectors(given), lstm_by_hand(given, layers), atol=1e-13)


@pytest.mark.parametrize(("encoder", "layers"), [("mlp", 3), ("mlp-fewshot", 2)])
def test_equals_the_input_parameterisation_written_out(encoder: Any, layers: int) -> None:
    given = large(PTuning(6, encoder, hidden_size=7).initialise(DECODER))
    rows = given.tensors["embedding"]
    for number in range(layers):
        rows = np.maximum(rows, 0) if number else rows
        rows = rows @ given.tensors[f"linear.{number}.weight"].T + given.tensors[f"linear.{number}.bias"]
    np.testing.assert_allclose(materialise_vectors(given), rows, atol=1e-13)


def test_equals_the_low_rank_product_written_out_for_every_task() -> None:
    given = large(MultitaskPromptTuning(tasks=3, ranks=2, length=6).initialise(DECODER))
    shared, columns, rows = (given.tensors[name] for name in ("embedding", "columns", "rows"))
    tasks = materialise_tasks(given)
    assert list(tasks) == [0, 1, 2]
    for task, prompt in tasks.items():
        np.testing.assert_allclose(prompt, shared * (columns[task] @ rows[task]), atol=1e-14)
        assert np.array_equal(prompt, materialise_vectors(given, task))
        assert all(difference(prompt, other) > 0.1 for number, other in tasks.items() if number != task)
    assert np.array_equal(materialise_vectors(given), tasks[0])


TYPES = [1, 2, 3, 4, 5, 6, 7, 8]
BOUNDED = ContextAwarePromptTuning(TYPES, epsilon=9.0, format_epsilon=14.0)


def test_equals_the_bounded_delta_written_out() -> None:
    given = large(BOUNDED.initialise(DECODER))
    embedding, delta = (given.tensors[name] for name in ("embedding", "delta"))
    scale = np.sqrt(np.float32(H / 2048))
    bounds = np.array([14.0 * scale, 9.0 * scale, 14.0 * scale, 1e-10] * 2)
    norms = np.linalg.norm(delta, axis=1)
    assert (norms > bounds).sum() >= 4, "most rows must be cut"
    expected = embedding + delta * np.minimum(1, bounds / norms)[:, None]
    np.testing.assert_allclose(materialise_vectors(given), expected, atol=1e-6)  # the bounds are float32
    assert difference(expected, embedding + delta) > 0.1
    shorter = replace(given, tensors={**given.tensors, "delta": delta * 1e-3})
    cut = [3, 7]
    inside = np.delete(materialise_vectors(shorter) - embedding - delta * 1e-3, cut, axis=0)
    assert np.abs(inside).max() < 1e-15, "what is within the bound stays as it is"


def test_the_bounded_delta_learns_straight_through_the_projection_and_labels_do_not() -> None:
    given = large(BOUNDED.initialise(DECODER))
    tensors = {name: to_torch(array) for name, array in given.tensors.items()}
    delta = tensors["delta"].requires_grad_()
    result = evaluate("context-aware", given.settings, tensors)
    assert np.array_equal(result.detach().numpy(), materialise_vectors(given))
    result.sum().backward()
    expected = np.repeat([[1.0], [1.0], [1.0], [0.0]] * 2, H, axis=1).reshape(8, H)
    assert np.array_equal(np.asarray(delta.grad), expected)


def test_a_cartridge_is_its_frozen_and_its_trained_positions() -> None:
    given = large(Cartridge(6, frozen=2).initialise(DECODER))
    assert trained(given) == {"self.trained"}
    frozen, rest = given.tensors["self.frozen"], given.tensors["self.trained"]
    prefix = materialise(given, "self", (0, 1, 2), 2, 5)
    assert np.array_equal(prefix.flat(), np.concatenate([frozen, rest]))
    assert difference(prefix.flat(), np.concatenate([rest, frozen])) > 0.1


def swapped(first: str, second: str) -> Callable[[Training], Training]:
    def change(given: Training) -> Training:
        names = {first: second, second: first}
        return replace(given, tensors={name: given.tensors[names.get(name, name)] for name in given.tensors})

    return change


def without(name: str) -> Callable[[Training], Training]:
    return lambda given: replace(given, tensors={**given.tensors, name: np.zeros_like(given.tensors[name])})


def setting(**settings: Any) -> Callable[[Training], Training]:
    return lambda given: replace(given, settings={**given.settings, **settings})


@pytest.mark.parametrize(
    ("method", "change"),
    [
        (PTuning(encoder="mlp"), swapped("linear.0.weight", "linear.1.weight")),
        (PTuning(encoder="mlp"), without("linear.0.bias")),
        (PTuning(encoder="mlp"), without("linear.2.bias")),
        (PTuning(encoder="mlp"), setting(non_linearity="tanh")),
        (PTuning(encoder="mlp-fewshot"), swapped("linear.0.weight", "linear.1.weight")),
        (PTuning(encoder="mlp-fewshot"), without("linear.0.bias")),
        (PTuning(encoder="lstm"), swapped("lstm.weight_ih_l0", "lstm.weight_ih_l0_reverse")),
        (PTuning(encoder="lstm"), swapped("lstm.weight_hh_l0", "lstm.weight_hh_l1")),
        (PTuning(encoder="lstm"), without("lstm.bias_ih_l1_reverse")),
        (PTuning(encoder="lstm"), without("linear.0.bias")),
        (PTuning(encoder="lstm"), setting(non_linearity="gelu")),
        (PTuning(encoder="lstm-paper"), swapped("linear.0.weight", "linear.1.weight")),
        (MultitaskPromptTuning(2), setting(task=1)),
        (BOUNDED, setting(epsilon=0.1)),
        (BOUNDED, setting(format_epsilon=0.1)),
        (BOUNDED, setting(token_types=[2, *TYPES[1:]])),
        (BOUNDED, without("delta")),
    ],
)
def test_negative_twins_make_other_prompts(method: Method, change: Callable[[Training], Training]) -> None:
    given = large(method.initialise(DECODER), std=1.0)
    changed = change(given)
    assert changed != given
    assert difference(materialise_vectors(given), materialise_vectors(changed)) > 0.1


@pytest.mark.parametrize("method", [PTuning(encoder="lstm", dropout=0.5), PrefixTuning(4, MLP(6, dropout=0.5))])
def test_dropout_is_for_training_only(method: Method) -> None:
    prompt = method.initialise(DECODER)
    given = large(prompt)
    tensors = {name: to_torch(array) for name, array in given.tensors.items()}
    site: Site | None = "self" if prompt.prefixes else None
    torch.manual_seed(0)
    still = evaluate(given.kind, given.settings, tensors, site)
    assert torch.equal(still, evaluate(given.kind, {**given.settings, "dropout": 0.0}, tensors, site))
    first, second = (evaluate(given.kind, given.settings, tensors, site, train=True) for _ in range(2))
    assert float((first - second).abs().max()) > 0.1
    assert float((first - still).abs().max()) > 0.1


# --- refusals --------------------------------------------------------------------------------------------------------


def changed_tensor(name: str, array: Array | None) -> Training:
    given = large(PTuning(5, "lstm").initialise(DECODER))
    tensors = {**given.tensors, name: array} if array is not None else dict(given.tensors)
    if array is None:
        del tensors[name]
    return replace(given, tensors=tensors)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (training(kind="lstm"), "no parameterisation is called 'lstm'; known are mlp, "),
        (training(non_linearity="os.system"), "os.system"),
        (setting(non_linearity=3)(training()), "non_linearity: a text, not 3"),
        (setting(dropout=1.0)(training()), "dropout: a rate below 1"),
        (setting(dropout="x")(training()), "dropout: a number from 0, not 'x'"),
        (replace(training(), tensors={}), "mlp: missing self.embedding, missing self.hidden.weight"),
        (replace(training(), tensors={**training().tensors, "x": np.ones(1)}), "mlp: unexpected x"),
        (
            replace(training(), tensors={**training().tensors, "self.hidden.bias": np.ones(6)}),
            r"mlp: self.hidden.bias has the shape \[6\], expected \[M\] with M = 7",
        ),
        (
            replace(training(), tensors={**training().tensors, "self.embedding": np.ones(6)}),
            r"mlp: self.embedding has the shape \[6\], expected \[P, E\]",
        ),
        (
            replace(training(), tensors={**training().tensors, "self.embedding": np.ones((0, E))}),
            r"self.embedding has the shape \[0, 12\]",
        ),
        (
            replace(training(), tensors={**training().tensors, "self.embedding": np.ones((P, E), np.float32)}),
            "mlp: tensors of float32, float64, expected one floating-point type",
        ),
        (
            replace(training(), tensors={name: a.astype(np.int64) for name, a in training().tensors.items()}),
            "mlp: tensors of int64",
        ),
        (Cartridge(4).initialise(DECODER).training, "rows of 60 numbers at site self, expected 24"),
        (PTuning(4).initialise(DECODER).training, "p-tuning-mlp: it makes vectors in the input, which have no site"),
    ],
)
def test_refuses_what_makes_no_prefix(given: Training, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        materialise(given, "self", LAYERS, K, D)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (training(), "mlp: it makes prefixes, one for each site; site: None"),
        (changed_tensor("lstm.bias_hh_l1", None), "p-tuning-lstm: missing lstm.bias_hh_l1"),
        (changed_tensor("lstm.bias_hh_l2", np.ones(48)), "p-tuning-lstm: unexpected lstm.bias_hh_l2"),
        (changed_tensor("lstm.bias_hh_l1", np.ones(47)), r"\[47\], expected \[4S\] with S = 12"),
        (changed_tensor("lstm.weight_ih_l0", np.ones((46, H))), r"lstm.weight_ih_l0 has the shape \[46, 12\]"),
        (changed_tensor("linear.1.weight", np.ones((H + 1, 2 * H))), r"linear.1.weight has the shape \[13, 24\]"),
        (setting(layers=10**9)(changed_tensor("embedding", None)), "layers: a whole number from 1 to 64"),
        (setting(layers=True)(changed_tensor("embedding", None)), "layers: a whole number from 1 to 64"),
        (replace(large(PTuning(4).initialise(DECODER)), settings={}), "layers: a whole number from 2 to 64, not None"),
        (setting(task=2)(large(MultitaskPromptTuning(2).initialise(DECODER))), "task 2: there are 2 tasks"),
        (setting(task=-1)(large(MultitaskPromptTuning(2).initialise(DECODER))), "task -1: there are 2 tasks"),
        (setting(task=True)(large(MultitaskPromptTuning(2).initialise(DECODER))), "task True"),
        (setting(token_types=None)(large(BOUNDED.initialise(DECODER))), "token_types: a list"),
        (setting(token_types=TYPES[1:])(large(BOUNDED.initialise(DECODER))), r"has the shape \[8, 12\], expected \[7"),
        (setting(epsilon=-1)(large(BOUNDED.initialise(DECODER))), "epsilon: a number from 0, not -1"),
    ],
)
def test_refuses_what_makes_no_vectors(given: Training, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        materialise_vectors(given)


def test_refuses_tasks_where_there_are_none() -> None:
    for refused in (materialise_tasks, lambda given: materialise_vectors(given, 0)):
        with pytest.raises(
            ValueError, match="only the parameterisations 'multitask' and 'table' have tasks, this is 'p-tuning-mlp'"
        ):
            refused(large(PTuning(4).initialise(DECODER)))
    with pytest.raises(ValueError, match="frozen: a whole number from 0"):
        materialise(setting(frozen=-1)(large(Cartridge(4).initialise(DECODER))), "self", (0, 1, 2), 2, 5)
    with pytest.raises(ValueError, match="no training state"):
        rematerialise(PromptTuning(4).initialise(DECODER))


# --- methods ---------------------------------------------------------------------------------------------------------

#: Method, base model, trained numbers by the formula of its docstring.
CASES: list[tuple[Method, Geometry, int]] = [
    (PromptTuning(7), DECODER, 7 * H),
    (PromptTuning(7), BOTH, 7 * H),
    (PromptTuning(7, stack="decoder"), BOTH, 7 * H),
    (PTuning(7, "mlp"), DECODER, 7 * H + H * H + H + H * H + H + H * H + H),
    (PTuning(7, "mlp", hidden_size=5), ENCODER, 7 * H + H * 5 + 5 + 25 + 5 + 5 * H + H),
    (PTuning(7, "mlp-fewshot"), DECODER, 7 * H + 2 * (H * H + H)),
    (
        PTuning(7, "lstm"),
        DECODER,
        7 * H + 2 * (4 * H * 2 * H + 8 * H) + 2 * (4 * H * 3 * H + 8 * H) + 4 * H * H + 2 * H + 2 * H * H + H,
    ),
    (
        PTuning(7, "lstm-paper"),
        DECODER,
        7 * H + 2 * (24 * (H + 6) + 48) + 2 * (24 * 18 + 48) + 2 * (H * H + H),
    ),
    (
        PTuning(7, "lstm-fewshot", hidden_size=3, layers=1),
        DECODER,
        7 * H + 2 * (12 * (H + 3) + 24) + (6 * 3 + 3) + (3 * H + H),
    ),
    (PrefixTuning(7, None), DECODER, 7 * 2 * 3 * 2 * 5),
    (PrefixTuning(7, None), BOTH, 7 * 2 * (2 * 4 * 3 + 3 * 2 * 6 + 3 * 2 * 6)),
    (PrefixTuning(7, None, sites={"cross": (1,), "encoder": [1, 0]}), BOTH, 7 * 2 * (2 * 4 * 3 + 1 * 2 * 6)),
    (PrefixTuning(7, MLP(4)), DECODER, 7 * H + 4 * H + 4 + 60 * 4 + 60),
    (PrefixTuning(7, MLP(4, 10)), DECODER, 7 * 10 + 4 * 10 + 4 + 60 * 4 + 60),
    (PrefixTuning(7, MLP(4), sites={"self": [2]}), DECODER, 7 * H + 4 * H + 4 + 20 * 4 + 20),
    (PrefixTuning(7, MLP(4), sites=("self",)), BOTH, 7 * H + 4 * H + 4 + 72 * 4 + 72),
    (PTuningV2(7), ENCODER, 7 * 2 * 4 * 3 * 4),
    (PTuningV2(7, TaskHead("sequence-classification", 3)), ENCODER, 7 * 96 + 3 * H + 3),
    (PTuningV2(7, TaskHead("token-classification", 9)), ENCODER, 7 * 96 + 9 * H + 9),
    (PTuningV2(7, TaskHead("question-answering")), ENCODER, 7 * 96 + 2 * H + 2),
    (PTuningV2(7, TaskHead(labels=3, module="score", bias=False)), DECODER, 7 * 60 + 3 * H),
    (MultitaskPromptTuning(3, 2, 7), DECODER, 7 * H + 3 * 2 * (7 + H)),
    (BOUNDED, DECODER, 8 * H),
    (Cartridge(7), DECODER, 6 * 60),
    (Cartridge(7, frozen=0), DECODER, 7 * 60),
    (Cartridge(7, frozen=3, sites=("self",)), BOTH, 4 * 72),
]
IDS = [f"{type(method).__name__}-{number}" for number, (method, _, _) in enumerate(CASES)]


def test_the_cases_hold_every_method_and_every_kind() -> None:
    assert {type(method) for method, _, _ in CASES} == set(METHODS)
    files_only = {"table"}  # prompts of several tasks side by side: no way to train one
    assert {method.plan(geometry).kind for method, geometry, _ in CASES} == {None, *KINDS} - files_only


@pytest.mark.parametrize(("method", "geometry", "numbers"), CASES, ids=IDS)
def test_counts_what_it_trains(method: Method, geometry: Geometry, numbers: int) -> None:
    prompt = method.initialise(geometry, seed=1)
    if prompt.training is None:
        tensors = [array for part in prompt.parts for _, array in part.arrays()]
    else:
        tensors = [prompt.training.tensors[name] for name in trained(prompt.training)]
    assert sum(array.size for array in [*tensors, *prompt.head.values()]) == numbers
    assert method.parameters(geometry) == numbers


@pytest.mark.parametrize(("method", "geometry", "numbers"), CASES, ids=IDS)
def test_starts_by_its_seed(method: Method, geometry: Geometry, numbers: int) -> None:
    prompt = method.initialise(geometry, seed=1)
    again, other = method.initialise(geometry, seed=1), method.initialise(geometry, seed=2)
    assert (prompt, digest_of(prompt)) == (again, digest_of(again))
    assert prompt != other
    assert digest_of(prompt) != digest_of(other)
    assert {array.dtype for _, array in prompt.arrays()} == {np.dtype(np.float32)}
    assert prompt.positions.start == prompt.counted()
    assert prompt.base.geometry == geometry
    assert len({part.length for part in prompt.parts}) == 1
    if prompt.training is not None:
        assert rematerialise(prompt) == prompt
        assert rematerialise(replace(prompt, training=large(prompt, np.float32))) != prompt


@pytest.mark.parametrize("dtype", [np.float64, np.float32, BFLOAT16])
@pytest.mark.parametrize(("method", "geometry", "numbers"), CASES, ids=IDS)
def test_evaluates_in_the_stored_dtype(method: Method, geometry: Geometry, numbers: int, dtype: Any) -> None:
    prompt = method.initialise(geometry)
    if prompt.training is not None:
        parts = rematerialise(replace(prompt, training=large(prompt, dtype))).parts
        assert {array.dtype for part in parts for _, array in part.arrays()} == {np.dtype(dtype)}


def test_prefixes_the_sites_and_layers_that_it_is_told() -> None:
    prompt = PrefixTuning(4, MLP(5), sites={"cross": (1,), "encoder": [1, 0]}).initialise(BOTH)
    assert {part.site: list(part.layers) for part in prompt.prefixes} == {"cross": [1], "encoder": [0, 1]}
    assert prompt.prefix("cross") is not None
    assert prompt.positions.start == {"encoder": 4}
    everywhere = PrefixTuning(4, None).initialise(BOTH)
    shapes = {part.site: [pair.keys.shape for pair in part.layers.values()] for part in everywhere.prefixes}
    assert shapes == {"encoder": [(4, 4, 3)] * 2, "self": [(2, 4, 6)] * 3, "cross": [(2, 4, 6)] * 3}
    assert [part.site for part in PTuningV2(4).initialise(ENCODER).prefixes] == ["encoder"]


def test_prompts_the_stack_that_it_is_told() -> None:
    assert PromptTuning(4).initialise(BOTH).inputs[0].stack == "encoder"
    assert PTuning(4, stack="decoder").initialise(BOTH).inputs[0].stack == "decoder"
    assert PromptTuning(4).initialise(DECODER).inputs[0].stack == "decoder"
    assert np.abs(vectors(PromptTuning(4).initialise(DECODER))).max() <= 0.5


def test_another_task_is_another_prompt() -> None:
    prompt = MultitaskPromptTuning(3, 2, 6).initialise(DECODER)
    prompt = rematerialise(replace(prompt, training=large(prompt)))
    second = rematerialise(prompt, task=1)
    assert difference(vectors(prompt), vectors(second)) > 0.1
    assert rematerialise(second) == second, "the prompt remembers its task"
    assert rematerialise(second, task=0) == prompt
    with pytest.raises(ValueError, match="task 3: there are 3 tasks"):
        rematerialise(prompt, task=3)


def test_a_cartridge_starts_as_the_cache_of_a_text() -> None:
    text = PrefixTuning(6, None).initialise(DECODER, seed=8)
    prompt = Cartridge(6, frozen=2).initialise(DECODER, text=text)
    assert prompt.parts == text.parts
    assert prompt.training is not None
    assert prompt.training.tensors["self.frozen"].shape == (2, 60)
    for wrong in (PrefixTuning(5, None), PrefixTuning(6, None, sites={"self": [0, 1]})):
        with pytest.raises(ValueError, match="a start of the shape"):
            Cartridge(6).initialise(DECODER, text=wrong.initialise(DECODER))
    other = PrefixTuning(6, None, sites={"self": [0, 1]}).initialise(DECODER)
    with pytest.raises(ValueError, match="other sites or layers"):
        Cartridge(6, sites={"self": [0, 2]}).initialise(DECODER, text=other)


def test_context_awareness_starts_as_the_embedding_of_a_text() -> None:
    text = PromptTuning(8).initialise(DECODER, seed=8)
    prompt = BOUNDED.initialise(DECODER, text=text)
    assert prompt.parts == text.parts, "the delta starts at 0"
    assert prompt.training is not None
    assert trained(prompt.training) == {"delta"}
    with pytest.raises(ValueError, match=r"a start of the shape \[7, 12\] for embedding, expected \[8, 12\]"):
        BOUNDED.initialise(DECODER, text=PromptTuning(7).initialise(DECODER))
    with pytest.raises(ValueError, match="vectors in one input"):
        BOUNDED.initialise(DECODER, text=PrefixTuning(8, None).initialise(DECODER))


def test_names_its_paper() -> None:
    found = {
        method.__name__: (method.paper.authors.split(",")[0], method.paper.year, method.paper.arxiv)
        for method in METHODS
    }
    assert found == {
        "PromptTuning": ("Lester", 2021, "2104.08691"),
        "PTuning": ("Liu", 2021, "2103.10385"),
        "PrefixTuning": ("Li", 2021, "2101.00190"),
        "PTuningV2": ("Liu", 2022, "2110.07602"),
        "MultitaskPromptTuning": ("Wang", 2023, "2303.02861"),
        "ContextAwarePromptTuning": ("Blau", 2024, "2410.17222"),
        "Cartridge": ("Eyuboglu", 2025, "2506.06266"),
    }
    assert PromptTuning.paper.url == "https://arxiv.org/abs/2104.08691"
    assert all(inspect.getdoc(method) for method in METHODS)


def test_is_a_value() -> None:
    assert PrefixTuning(20, MLP(512), sites=["self"]) == PrefixTuning(20, MLP(), sites=("self",))
    assert PrefixTuning(20) != PrefixTuning(21)
    layers = [0]
    method = Cartridge(4, sites={"self": layers})
    layers.append(1)
    assert [list(part.layers) for part in method.initialise(DECODER).prefixes] == [[0]]
    with pytest.raises(FrozenInstanceError):
        method.length = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PromptTuning(0), "PromptTuning: length is 0"),
        (lambda: PromptTuning(True), "PromptTuning: length is True"),
        (lambda: PTuning(4, "bert"), "encoder: one of mlp, lstm, lstm-paper, mlp-fewshot, lstm-fewshot, not 'bert'"),
        (lambda: PTuning(4, hidden_size=0), "hidden_size is 0"),
        (lambda: PTuning(4, "lstm", dropout=1.0), "dropout"),
        (lambda: PTuning(4, "mlp", layers=3), "'mlp' has none"),
        (lambda: PrefixTuning(4, MLP(0)), "bottleneck_size is 0"),
        (lambda: PrefixTuning(4, MLP(dropout=-0.1)), "dropout"),
        (lambda: TaskHead("regression"), "task: one of sequence-classification, "),
        (lambda: TaskHead("question-answering", 3), "question answering has 2"),
        (lambda: MultitaskPromptTuning(0), "tasks is 0"),
        (lambda: ContextAwarePromptTuning([]), "token_types: at least one"),
        (lambda: ContextAwarePromptTuning([1], epsilon=-1.0), "epsilon: a number from 0"),
        (lambda: Cartridge(4, frozen=4), "frozen is 4 of 4 positions"),
        (lambda: Cartridge(4, frozen=-1), "frozen is -1"),
        (lambda: PromptTuning(4, stack="encoder").plan(DECODER), "decoder has no 'encoder'"),
        (lambda: PromptTuning(4, stack="middle").plan(DECODER), "decoder has no 'middle'"),
        (lambda: PrefixTuning(4, sites=("cross",)).plan(DECODER), "decoder has no site 'cross'"),
        (lambda: PrefixTuning(4, sites=("selfish",)).plan(DECODER), "decoder has no site 'selfish'"),
        (lambda: PrefixTuning(4, sites=()).plan(DECODER), "at least one"),
        (lambda: PrefixTuning(4, sites=("self", "self")).plan(DECODER), "each of them once"),
        (
            lambda: PrefixTuning(4, sites={"self": [3]}).plan(DECODER),
            r"layers \[3\] at site 'self', which has layers 0",
        ),
        (lambda: PrefixTuning(4, sites={"self": [1, 1]}).plan(DECODER), r"layers \[1, 1\]"),
        (lambda: PrefixTuning(4, sites={"self": []}).plan(DECODER), r"layers \[\]"),
        (lambda: PTuning(4, "lstm-paper").plan(replace(DECODER, hidden=13)), "13 is no multiple of 2"),
        (lambda: PrefixTuning(4, MLP(5, non_linearity="nope")).initialise(DECODER), "no activation is called 'nope'"),
    ],
)
def test_refuses_what_is_no_such_method(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_all_is_exported_and_importing_needs_no_framework() -> None:
    assert all(hasattr(methods, name) for name in methods.__all__)
    code = "import sys, softbridge.methods; print([n for n in ('torch', 'transformers') if n in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_a_part_is_never_another_kind() -> None:
    for method, geometry, _ in CASES:
        prompt = method.initialise(geometry)
        kind = method.plan(geometry).kind
        assert (prompt.training is None) == (kind is None)
        if kind is not None:
            assert all(isinstance(part, KeyValuePrefix) == KINDS[kind].per_site for part in prompt.parts)
