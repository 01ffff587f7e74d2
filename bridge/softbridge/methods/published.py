"""The methods as they were published: values that start a new prompt for a base model.

A method is one frozen dataclass: its settings with the defaults of the paper or of its code, its paper, and a plan of
what it comes to on a base model. A plan is data (which parameterisation, of which sizes, for which parts), so that
counting and drawing a random start are written once, in `Method`. Sizes have the names of
`softbridge.methods.parameterisations`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, TypeAlias

import numpy as np

from softbridge.arrays import Array
from softbridge.geometry import Geometry, Stack
from softbridge.methods.kinds import uniform
from softbridge.methods.method import (
    Method,
    Paper,
    Plan,
    Sites,
    TaskHead,
    draw,
    freeze,
    head_shapes,
    input_slot,
    need_counts,
    prefix_slots,
)
from softbridge.prompt.soft_prompt import SoftPrompt
from softbridge.prompt.values import Json


@dataclass(frozen=True)
class PromptTuning(Method):
    """Prompt tuning: the vectors [P, H] in the input are trained themselves. P·H numbers.

    They start uniformly within ±0.5, as in the paper's ablation; vectors of vocabulary or labels learn faster.

    Attributes:
        length: P; the paper's default.
        stack: which input; None: the encoder's, where there is one.
        head: a task head that is trained with it, where the model's own is not.
    """

    paper: ClassVar = Paper(
        "The Power of Scale for Parameter-Efficient Prompt Tuning", "Lester, Al-Rfou, Constant", 2021, "2104.08691"
    )
    learning_rate: ClassVar = 3e-2

    length: int = 100
    stack: Stack | None = None
    head: TaskHead | None = None

    def __post_init__(self) -> None:
        need_counts(self, "length")

    def plan(self, geometry: Geometry) -> Plan:
        head = head_shapes(self.head, geometry)
        return Plan(input_slot(geometry, self.stack), {"P": self.length}, start=uniform(0.5), head=head)


Encoder: TypeAlias = Literal["mlp", "lstm", "lstm-paper", "mlp-fewshot", "lstm-fewshot"]


class _Network(NamedTuple):
    """One of P-tuning's parameterisations, for its width h.

    Attributes:
        kind: its parameterisation.
        middle: M is so many times h.
        narrow: h is H divided by this, unless it is given.
        linear: linear layers, where that is what the kind's setting ``layers`` counts.
    """

    kind: str
    middle: int = 1
    narrow: int = 1
    linear: int | None = None


_ENCODERS: Mapping[Encoder, _Network] = {
    "mlp": _Network("p-tuning-mlp", linear=3),
    "lstm": _Network("p-tuning-lstm", middle=2),
    "lstm-paper": _Network("p-tuning-lstm", middle=2, narrow=2),
    "mlp-fewshot": _Network("p-tuning-mlp", linear=2),
    "lstm-fewshot": _Network("p-tuning-lstm"),
}


@dataclass(frozen=True)
class PTuning(Method):
    """P-tuning (v1): a parameterisation over an embedding [P, H] makes the vectors [P, H] in the input.

    Five parameterisations go by this name, ReLU between all linear layers. h is `hidden_size`, by default H:

    - ``mlp``: linear H -> h -> h -> H, as PEFT has it. P·H + H·h + h + h² + h + h·H + H numbers.
    - ``lstm``: a bidirectional LSTM with h per direction, linear 2h -> 2h -> H, as PEFT has it.
    - ``lstm-paper``: the same with h = H / 2, as the paper's own experiments (THUDM/P-tuning, LAMA).
    - ``mlp-fewshot``: linear H -> h -> H (the same repository, PT-Fewshot).
    - ``lstm-fewshot``: a bidirectional LSTM with h per direction, linear 2h -> h -> H (PT-Fewshot).

    An LSTM of n layers has 2·(4h·(H + h) + 8h) + (n - 1)·2·(4h·3h + 8h) numbers, and the P·H of the embedding and the
    linear layers come on top.

    Attributes:
        length: P; by default that of LAMA's template, three times three.
        encoder: one of the five.
        hidden_size: h.
        layers: of the LSTM.
        dropout: rate between the layers of the LSTM, in training only.
        stack: which input; None: the encoder's, where there is one.
        head: a task head that is trained with it, where the model's own is not.
    """

    paper: ClassVar = Paper("GPT Understands, Too", "Liu, Zheng, Du, Ding, Qian, Yang, Tang", 2021, "2103.10385")
    learning_rate: ClassVar = 3e-3

    length: int = 9
    encoder: Encoder = "mlp"
    hidden_size: int | None = None
    layers: int = 2
    dropout: float = 0.0
    stack: Stack | None = None
    head: TaskHead | None = None

    def __post_init__(self) -> None:
        need_counts(self, "length", "layers", *(["hidden_size"] if self.hidden_size is not None else []))
        if self.encoder not in _ENCODERS:
            raise ValueError(f"encoder: one of {', '.join(_ENCODERS)}, not {self.encoder!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: a rate below 1, not {self.dropout}")
        if _ENCODERS[self.encoder].linear and (self.layers != 2 or self.dropout):
            raise ValueError(f"layers and dropout are the LSTM's, and {self.encoder!r} has none")

    def plan(self, geometry: Geometry) -> Plan:
        chosen, hidden = _ENCODERS[self.encoder], geometry.input_width
        if self.hidden_size is None and hidden % chosen.narrow:
            raise ValueError(f"{self.encoder}: the hidden size {hidden} is no multiple of {chosen.narrow}")
        size = self.hidden_size or hidden // chosen.narrow
        sizes = {"P": self.length, "H": hidden, "S": size, "M": chosen.middle * size}
        settings: dict[str, Json] = {"non_linearity": "relu", "layers": chosen.linear or self.layers}
        if not chosen.linear:
            settings["dropout"] = self.dropout
        head = head_shapes(self.head, geometry)
        return Plan(input_slot(geometry, self.stack), sizes, chosen.kind, settings, head=head)


@dataclass(frozen=True)
class MLP:
    """The parameterisation of a prefix: an embedding [P, E], linear E -> M -> W.

    Attributes:
        bottleneck_size: M; 512 is the paper's, and AdapterHub's default. PEFT's is K·D.
        embedding_size: E; None: H, as in the paper and AdapterHub. PEFT's is K·D.
        non_linearity: transformers' name of an activation, or ``leakyrelu``.
        dropout: rate, on the keys and values, in training only.
    """

    bottleneck_size: int = 512
    embedding_size: int | None = None
    non_linearity: str = "tanh"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        need_counts(self, "bottleneck_size", *(["embedding_size"] if self.embedding_size is not None else []))
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: a rate below 1, not {self.dropout}")


@dataclass(frozen=True)
class PrefixTuning(Method):
    """Prefix tuning: keys and values of every layer that attends, made by an MLP or trained themselves.

    For each site, with W = 2·L·K·D: P·W numbers if flat; P·E + M·E + M + W·M + W with the MLP (its E, M).

    Attributes:
        length: P; the paper's for table-to-text.
        reparameterisation: the MLP, as in the paper, or None for a flat prefix.
        sites: where; see `Sites`. The paper prefixes all sites of an encoder-decoder model, PEFT ``("self",)``.
        head: a task head that is trained with it, where the model's own is not.
    """

    paper: ClassVar = Paper(
        "Prefix-Tuning: Optimizing Continuous Prompts for Generation", "Li, Liang", 2021, "2101.00190"
    )
    learning_rate: ClassVar = 1e-3

    length: int = 10
    reparameterisation: MLP | None = MLP()
    sites: Sites = None
    head: TaskHead | None = None

    def __post_init__(self) -> None:
        need_counts(self, "length")
        freeze(self)

    def plan(self, geometry: Geometry) -> Plan:
        slots, mlp = prefix_slots(geometry, self.sites), self.reparameterisation
        head = head_shapes(self.head, geometry)
        if mlp is None:
            return Plan(slots, {"P": self.length}, head=head)
        sizes = {"P": self.length, "E": mlp.embedding_size or geometry.hidden, "M": mlp.bottleneck_size}
        names = ("non_linearity", "dropout", "bottleneck_size")
        return Plan(slots, sizes, "mlp", {name: getattr(mlp, name) for name in names}, head=head)


@dataclass(frozen=True)
class PTuningV2(Method):
    """P-tuning v2: keys and values of every layer are trained themselves, and a task head with them.

    Σ P·2·L·K·D over the sites, and C·H + C for the head, which rides in `SoftPrompt.head`.

    Attributes:
        length: P; the published code's default. The paper uses up to 20 for classification, 100 for labelling.
        head: the task head, or None where the model's own does (a language model's).
        sites: where; see `Sites`.
    """

    paper: ClassVar = Paper(
        "P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally Across Scales and Tasks",
        "Liu, Ji, Fu, Tam, Du, Yang, Tang",
        2022,
        "2110.07602",
    )
    learning_rate: ClassVar = 5e-2

    length: int = 4
    head: TaskHead | None = None
    sites: Sites = None

    def __post_init__(self) -> None:
        need_counts(self, "length")
        freeze(self)

    def plan(self, geometry: Geometry) -> Plan:
        return Plan(prefix_slots(geometry, self.sites), {"P": self.length}, head=head_shapes(self.head, geometry))


@dataclass(frozen=True)
class MultitaskPromptTuning(Method):
    """Multitask prompt tuning: a shared prompt times a low-rank matrix for each task, elementwise.

    P·H + N·R·(P + H) numbers. The prompt is that of task 0 at first; `rematerialise` gives the others. The matrices
    start with standard deviation 0.02, as PEFT's do, so that every prompt starts near 0.

    Attributes:
        tasks: N.
        ranks: R; the paper's.
        length: P; the paper's.
        stack: which input; None: the encoder's, where there is one.
    """

    paper: ClassVar = Paper(
        "Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning",
        "Wang, Panda, Karlinsky, Feris, Sun, Kim",
        2023,
        "2303.02861",
    )

    tasks: int
    ranks: int = 1
    length: int = 100
    stack: Stack | None = None

    def __post_init__(self) -> None:
        need_counts(self, "tasks", "ranks", "length")

    def plan(self, geometry: Geometry) -> Plan:
        sizes = {"P": self.length, "H": geometry.input_width, "N": self.tasks, "R": self.ranks}
        return Plan(input_slot(geometry, self.stack), sizes, "multitask", {"task": 0})


@dataclass(frozen=True)
class ContextAwarePromptTuning(Method):
    """Context-aware prompt tuning (CPT): the embedding of examples in text, frozen, plus a bounded delta.

    P·H numbers (the delta; rows of labels are among them, though they get no gradient). The row of a virtual token is
    scaled down to a norm by its type, times sqrt(H / 2048). A trainer stores the projected delta after each step.

    Attributes:
        token_types: one for each of the P tokens of the text. Modulo 4: 1 template of an input, 2 input, 3 template of
            a label, 0 label, whose delta vanishes (1e-10). The n-th example counts on from 4·(n - 1).
        epsilon: the largest norm of an input's delta.
        format_epsilon: the largest norm of a template's.
        stack: which input; None: the encoder's, where there is one.
    """

    paper: ClassVar = Paper(
        "Context-aware Prompt Tuning: Advancing In-Context Learning with Adversarial Methods",
        "Blau, Kimhi, Belinkov, Bronstein, Baskin",
        2024,
        "2410.17222",
    )

    token_types: Sequence[int]
    epsilon: float = 0.1
    format_epsilon: float = 0.1
    stack: Stack | None = None

    def __post_init__(self) -> None:
        freeze(self, "token_types")
        if not self.token_types or not all(type(kind) is int for kind in self.token_types):
            raise ValueError(f"token_types: at least one whole number, not {self.token_types!r:.80}")
        for name in ("epsilon", "format_epsilon"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: a number from 0, not {getattr(self, name)}")

    def plan(self, geometry: Geometry) -> Plan:
        names = ("epsilon", "format_epsilon")
        settings = {name: getattr(self, name) for name in names} | {"token_types": list(self.token_types)}
        return Plan(input_slot(geometry, self.stack), {"H": geometry.input_width}, "context-aware", settings)

    def initialise(self, geometry: Geometry, seed: int = 0, text: SoftPrompt | None = None) -> SoftPrompt:
        """See `Method.initialise`. The delta starts at 0.

        Args:
            geometry: of the base model.
            seed: of the random embedding that stands in for the text's, if that is not given.
            text: the word embeddings of the text as an input prompt of the same length; taken in float32.

        Raises:
            ValueError: the method does not fit the base model, or the text is of another length or no input prompt.
        """
        if text is not None and len(text.inputs) != 1:
            raise ValueError("text: a prompt with vectors in one input")
        given = {} if text is None else {"embedding": text.inputs[0].vectors.astype(np.float32)}
        return draw(self.plan(geometry), geometry, seed, given)


@dataclass(frozen=True)
class Cartridge(Method):
    """Cartridges: keys and values of every layer, which start as those of a text; the first positions stay frozen.

    Σ (P - frozen)·2·L·K·D numbers over the sites.

    Attributes:
        length: P; the paper's go from 128 to 8192.
        frozen: how many positions at the beginning are not trained; one, as an attention sink, in the paper.
        sites: where; see `Sites`.
    """

    paper: ClassVar = Paper(
        "Cartridges: Lightweight and general-purpose long context representations via self-study",
        "Eyuboglu, Ehrlich, Arora, Guha, Zinsley, Liu, Tennien, Rudra, Zou, Mirhoseini, Ré",
        2025,
        "2506.06266",
    )

    length: int
    frozen: int = 1
    sites: Sites = None

    def __post_init__(self) -> None:
        need_counts(self, "length")
        need_counts(self, "frozen", least=0)
        freeze(self)
        if self.frozen >= self.length:
            raise ValueError(f"Cartridge: frozen is {self.frozen} of {self.length} positions, nothing would be trained")

    def plan(self, geometry: Geometry) -> Plan:
        sizes = {"Q": self.length - self.frozen}
        return Plan(prefix_slots(geometry, self.sites), sizes, "cartridge", {"frozen": self.frozen})

    def initialise(self, geometry: Geometry, seed: int = 0, text: SoftPrompt | None = None) -> SoftPrompt:
        """See `Method.initialise`.

        Args:
            geometry: of the base model.
            seed: of random keys and values, if no text is given.
            text: a prefix of the same length, sites and layers: the cache of a text.

        Raises:
            ValueError: the method does not fit the base model, or the text's prefix is another.
        """
        given: dict[str, Array] = {}
        for part in () if text is None else text.prefixes:
            flat = part.flat()
            given[f"{part.site}.frozen"], given[f"{part.site}.trained"] = flat[: self.frozen], flat[self.frozen :]
        prompt = draw(self.plan(geometry), geometry, seed, given)
        if text is not None and {p.site: p for p in prompt.prefixes} != {p.site: p for p in text.prefixes}:
            raise ValueError("text: its prefix is for other sites or layers than the cartridge")
        return prompt


#: All of them, in the order of their papers.
METHODS: tuple[type[Method], ...] = (
    PrefixTuning,
    PTuning,
    PromptTuning,
    PTuningV2,
    MultitaskPromptTuning,
    ContextAwarePromptTuning,
    Cartridge,
)
