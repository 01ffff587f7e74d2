"""How training produced a prompt: the table of parameterisations, `KINDS`, and what each computes.

A model never sees any of this. Each is computed with the operations that the toolkits themselves use. `KINDS` says what
each `Training.kind` is, its tensors and their shapes. Sizes: P prompt length, H hidden
size, L prefixed layers, K key/value heads, D head size, W = 2·L·K·D (a row of a flat prefix); E embedding size, M width
of a hidden layer, S size of an LSTM per direction, N tasks, R ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from string import ascii_uppercase, digits
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from softbridge.arrays import Array
from softbridge.prompt.part import InputPrompt, KeyValuePrefix, Part
from softbridge.prompt.values import Json

if TYPE_CHECKING:
    import torch

Settings: TypeAlias = Mapping[str, Json]
Sizes: TypeAlias = Mapping[str, int]
Start: TypeAlias = Callable[[np.random.Generator, tuple[int, ...], Sizes], Array]

#: A depth beyond this is not believed: settings come from files.
MOST_LAYERS = 64


def normal(std: float) -> Start:
    """Draws from a normal distribution around 0."""
    return lambda generator, shape, sizes: generator.normal(0, std, shape)


def uniform(bound: float) -> Start:
    """Draws from a uniform distribution within ±bound."""
    return lambda generator, shape, sizes: generator.uniform(-bound, bound, shape)


def fan_in(size: str) -> Start:
    """Draws as torch's linear layers and LSTMs do: uniformly within ±1/sqrt(size)."""
    return lambda generator, shape, sizes: uniform(measure(size, sizes)[0] ** -0.5)(generator, shape, sizes)


class Tensor(NamedTuple):
    """One tensor of a parameterisation.

    Attributes:
        shape: sizes by name, each with an optional factor, or plain numbers: ``"4S H"``.
        start: draws its random start.
        trained: whether training changes it.
    """

    shape: str
    start: Start = normal(1.0)
    trained: bool = True


def measure(shape: str, sizes: Sizes) -> tuple[int, ...]:
    """The numbers of a `Tensor.shape`, 0 for a size that is not known."""
    return tuple(factor * (sizes.get(name, 0) if name else 1) for factor, name in dimensions(shape))


def dimensions(shape: str) -> list[tuple[int, str]]:
    """The factor and the name of each size of a `Tensor.shape`; the name is empty for a plain number."""
    return [(int(word.rstrip(ascii_uppercase) or 1), word.lstrip(digits)) for word in shape.split()]


@dataclass(frozen=True)
class Kind:
    """One parameterisation.

    Attributes:
        summary: what it computes, and which settings it takes.
        tensors: its tensors by name, for its settings. With `per_site`, every prefixed site has its own, under
            ``{site}.{name}``.
        function: (settings, tensors by name, train) -> [P, H], or [P, W] with `per_site`; differentiable.
        per_site: whether it makes prefixes; else it makes the vectors of one input prompt.
        computed: whether what it makes are other numbers than its own, which rounding shows in.
    """

    summary: str
    tensors: Callable[[Settings], dict[str, Tensor]]
    function: Callable[[Settings, Mapping[str, torch.Tensor], bool], torch.Tensor]
    per_site: bool
    computed: bool = True

    def makes(self, part: Part) -> bool:
        """Whether it made this part of a prompt, and not another part."""
        return isinstance(part, KeyValuePrefix if self.per_site else InputPrompt)


def activation(name: str) -> Any:
    """The function of that name.

    Raises:
        ValueError: `name` is neither leakyrelu nor an activation of transformers.
    """
    import torch
    from transformers.activations import ACT2FN

    if name == "leakyrelu":
        return torch.nn.functional.leaky_relu
    if name not in ACT2FN:
        raise ValueError(f"no activation is called {name!r}; known are leakyrelu, {', '.join(sorted(ACT2FN))}")
    return ACT2FN[name]


def _linear(name: str, rows: str, columns: str) -> dict[str, Tensor]:
    return {
        f"{name}.weight": Tensor(f"{rows} {columns}", fan_in(columns)),
        f"{name}.bias": Tensor(rows, fan_in(columns)),
    }


def _mlp_hidden(settings: Settings) -> list[str]:
    """The names of the linear layers before the last."""
    layers = _count({"layers": 2, **settings}, "layers", least=2)
    return ["hidden", *(f"hidden.{number}" for number in range(1, layers - 1))]


def _mlp_tensors(settings: Settings) -> dict[str, Tensor]:
    tensors = {"embedding": Tensor("P E")}
    for number, name in enumerate(_mlp_hidden(settings)):
        tensors.update(_linear(name, "M", "M" if number else "E"))
    return {**tensors, **_linear("output", "W", "M")}


def _mlp(settings: Settings, tensors: Mapping[str, torch.Tensor], train: bool) -> torch.Tensor:
    from torch.nn.functional import dropout, linear

    function = activation(_text(settings, "non_linearity", "tanh"))
    hidden = tensors["embedding"][None]
    for name in _mlp_hidden(settings):
        hidden = function(linear(hidden, tensors[f"{name}.weight"], tensors[f"{name}.bias"]))
    flat = linear(hidden, tensors["output.weight"], tensors["output.bias"])[0]
    return dropout(flat, _rate(settings), train)


def _input_mlp_tensors(settings: Settings) -> dict[str, Tensor]:
    widths = ["H", *["M"] * (_count(settings, "layers", least=2) - 1), "H"]
    tensors = {"embedding": Tensor("P H")}
    for number, (columns, rows) in enumerate(pairwise(widths)):
        tensors.update(_linear(f"linear.{number}", rows, columns))
    return tensors


def _input_mlp(settings: Settings, tensors: Mapping[str, torch.Tensor], train: bool) -> torch.Tensor:
    return _linear_layers(settings, tensors, tensors["embedding"][None], _count(settings, "layers", least=2))


def _linear_layers(
    settings: Settings, tensors: Mapping[str, torch.Tensor], hidden: torch.Tensor, layers: int
) -> torch.Tensor:
    """[1, P, ...] -> [P, H], an activation between the layers."""
    from torch.nn.functional import linear

    function = activation(_text(settings, "non_linearity", "relu"))
    for number in range(layers):
        hidden = function(hidden) if number else hidden
        hidden = linear(hidden, tensors[f"linear.{number}.weight"], tensors[f"linear.{number}.bias"])
    return hidden[0]


def _lstm_weights(layers: int) -> dict[str, Tensor]:
    """The weights of a bidirectional LSTM, under torch's names and in torch's order."""
    return {
        f"lstm.{name}_l{layer}{direction}": Tensor(shape, fan_in("S"))
        for layer in range(layers)
        for direction in ("", "_reverse")
        for name, shape in {
            "weight_ih": f"4S {'2S' if layer else 'H'}",
            "weight_hh": "4S S",
            "bias_ih": "4S",
            "bias_hh": "4S",
        }.items()
    }


def _lstm_tensors(settings: Settings) -> dict[str, Tensor]:
    lstm = _lstm_weights(_count(settings, "layers"))
    return {"embedding": Tensor("P H"), **lstm, **_linear("linear.0", "M", "2S"), **_linear("linear.1", "H", "M")}


def _lstm(settings: Settings, tensors: Mapping[str, torch.Tensor], train: bool) -> torch.Tensor:
    import torch

    layers = _count(settings, "layers")
    embedding = tensors["embedding"][None]
    state = embedding.new_zeros(2 * layers, 1, tensors["lstm.weight_hh_l0"].shape[1])
    weights = [tensors[name] for name in _lstm_weights(layers)]
    hidden = torch.lstm(embedding, (state, state), weights, True, layers, _rate(settings), train, True, True)[0]
    return _linear_layers(settings, tensors, hidden, 2)


def _multitask_tensors(settings: Settings) -> dict[str, Tensor]:
    return {
        "embedding": Tensor("P H"),
        "columns": Tensor("N P R", normal(0.02)),
        "rows": Tensor("N R H", normal(0.02)),
    }


def _multitask(settings: Settings, tensors: Mapping[str, torch.Tensor], train: bool) -> torch.Tensor:
    columns, rows = tensors["columns"], tensors["rows"]
    task = _task(settings, columns.shape[0])
    # With the leading dimension of a batch of one: another product of matrices rounds otherwise.
    return (tensors["embedding"][None] * (columns[task : task + 1] @ rows[task : task + 1]))[0]


def _table_tensors(settings: Settings) -> dict[str, Tensor]:
    return {f"tasks.{number}": Tensor(f"{length} H") for number, length in enumerate(lengths_of(settings))}


def _table(settings: Settings, tensors: Mapping[str, torch.Tensor], train: bool) -> torch.Tensor:
    return tensors[f"tasks.{_task(settings, len(lengths_of(settings)))}"]


def lengths_of(settings: Settings) -> list[int]:
    """How many virtual tokens each task of a ``table`` has. Raises `ValueError` if its settings do not say it."""
    lengths = settings.get("lengths")
    if not isinstance(lengths, list) or not lengths or not all(type(n) is int and n > 0 for n in lengths):
        raise ValueError(f"lengths: a list with the number of virtual tokens of each task, not {lengths!r:.80}")
    return lengths


def _task(settings: Settings, tasks: int) -> int:
    task = settings.get("task", 0)
    if type(task) is not int or not 0 <= task < tasks:
        raise ValueError(f"task {task!r}: there are {tasks} tasks, numbered from 0")
    return task


def _token_types(settings: Settings) -> list[int]:
    types = settings.get("token_types")
    if not isinstance(types, list) or not types or not all(type(kind) is int for kind in types):
        raise ValueError(f"token_types: a list with a whole number for each virtual token, not {types!r:.80}")
    return types


def _context_aware_tensors(settings: Settings) -> dict[str, Tensor]:
    length = len(_token_types(settings))
    return {"embedding": Tensor(f"{length} H", trained=False), "delta": Tensor(f"{length} H", normal(0.0))}


def _context_aware(settings: Settings, tensors: Mapping[str, torch.Tensor], train: bool) -> torch.Tensor:
    import torch

    embedding, delta = tensors["embedding"], tensors["delta"]
    types = torch.tensor(_token_types(settings), device=delta.device)
    with torch.no_grad():
        scale = torch.sqrt(torch.tensor(delta.shape[1] / 2048, dtype=torch.float32, device=delta.device))
        bound = torch.full(types.shape, 1e-10, dtype=torch.float32, device=delta.device)
        for remainder, name in ((1, "format_epsilon"), (2, "epsilon"), (3, "format_epsilon")):
            bound[(types > 0) & (types % 4 == remainder)] = _number(settings, name, 0.1) * scale
        norm = torch.linalg.vector_norm(delta, dim=1)
        factor = torch.where(norm > 0, bound / norm.clamp(min=bound), torch.ones_like(norm))
        projected = (delta * factor[:, None]).to(delta.dtype)
    if delta.requires_grad:  # the projection is no part of the gradient, and labels (0 modulo 4) are not learned
        projected = projected + (delta - delta.detach()) * (types % 4 != 0)[:, None]
    return embedding.detach() + projected


def _cartridge_tensors(settings: Settings) -> dict[str, Tensor]:
    frozen = _count(settings, "frozen", least=0, most=2**31)
    held = {"frozen": Tensor(f"{frozen} W", trained=False)} if frozen else {}
    return {**held, "trained": Tensor("Q W")}


def _cartridge(settings: Settings, tensors: Mapping[str, torch.Tensor], train: bool) -> torch.Tensor:
    import torch

    return torch.cat([tensors[name] for name in ("frozen", "trained") if name in tensors])


KINDS: Mapping[str, Kind] = {
    "mlp": Kind(
        "prefix tuning (Li & Liang 2021): an MLP over a small embedding. layers: linear layers, with an activation "
        "between them (2); non_linearity: transformers' name of an activation, or leakyrelu (tanh); dropout: rate, on "
        "keys and values, in training only (0)",
        _mlp_tensors,
        _mlp,
        per_site=True,
    ),
    "p-tuning-mlp": Kind(
        "P-tuning (Liu 2021): an MLP over an embedding. layers: linear layers, with an activation between them; "
        "non_linearity (relu)",
        _input_mlp_tensors,
        _input_mlp,
        per_site=False,
    ),
    "p-tuning-lstm": Kind(
        "P-tuning (Liu 2021): a bidirectional LSTM, then two linear layers, over an embedding. layers: of the LSTM; "
        "dropout: rate between them, in training only (0); non_linearity (relu)",
        _lstm_tensors,
        _lstm,
        per_site=False,
    ),
    "multitask": Kind(
        "multitask prompt tuning (Wang 2023): embedding * (columns[task] @ rows[task]). task: number from 0 (0)",
        _multitask_tensors,
        _multitask,
        per_site=False,
    ),
    "table": Kind(
        "prompts of several tasks side by side, each whole. lengths: virtual tokens of each task; task: number from 0 "
        "(0); names: of the tasks, if they have any",
        _table_tensors,
        _table,
        per_site=False,
        computed=False,
    ),
    "context-aware": Kind(
        "context-aware prompt tuning (Blau 2024): the embedding of a text, frozen, plus a delta whose rows are scaled "
        "down to a norm. token_types: one for each virtual token; modulo 4 it is 1 (template of an input) or 3 (of a "
        "label): norm format_epsilon; 2 (input): norm epsilon; 0 (label): not learned. Both norms, 0.1 if they are not "
        "given, are times sqrt(H / 2048)",
        _context_aware_tensors,
        _context_aware,
        per_site=False,
    ),
    "cartridge": Kind(
        "cartridge (Eyuboglu 2025): keys and values themselves, the first ones frozen. frozen: how many",
        _cartridge_tensors,
        _cartridge,
        per_site=True,
        computed=False,
    ),
}


def _text(settings: Settings, name: str, default: str) -> str:
    value = settings.get(name, default)
    if not isinstance(value, str):
        raise ValueError(f"{name}: a text, not {value!r:.80}")
    return value


def _number(settings: Settings, name: str, default: float) -> float:
    value = settings.get(name, default)
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise ValueError(f"{name}: a number from 0, not {value!r:.80}")
    return float(value)


def _rate(settings: Settings) -> float:
    rate = _number(settings, "dropout", 0.0)
    if rate >= 1:
        raise ValueError(f"dropout: a rate below 1, not {rate}")
    return rate


def _count(settings: Settings, name: str, least: int = 1, most: int = MOST_LAYERS) -> int:
    value = settings.get(name)
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name}: a whole number from {least} to {most}, not {value!r:.80}")
    return value


#: The tensors that the kind ``mlp`` of two layers has for each site.
MLP_TENSORS = tuple(_mlp_tensors({}))


def kind_of(name: str) -> Kind:
    """The parameterisation of that name.

    Raises:
        ValueError: `name` is not one of `KINDS`.
    """
    if name not in KINDS:
        raise ValueError(f"no parameterisation is called {name!r}; known are {', '.join(KINDS)}")
    return KINDS[name]
