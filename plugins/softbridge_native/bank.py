"""A bank of prompts in a transformers model: what joins each row of a call. See `softbridge.plugin.prompt_bank`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from softbridge.arrays import to_torch
from softbridge.errors import EngineError
from softbridge.geometry import Site, Stack, read_geometry
from softbridge.plugin.prompt_bank import Entry, PromptBank, Recent
from softbridge.prompt import Entry as PartEntry
from softbridge.prompt import InputPrompt, Placement, SoftPrompt
from softbridge_native.anatomy import stacks_of, tellable
from softbridge_native.attention_wiring import attention_modules
from softbridge_native.call import Own
from softbridge_native.injection import Injection, injection, install
from softbridge_native.input_prompt import Circumstances, StackHooks
from softbridge_native.layout import Inserted, counted, home, origin_of
from softbridge_native.obstacles import check
from softbridge_native.prefix import Joined, LayerGate, Source, Stand, stand_of
from softbridge_native.shared_prefix import Group

#: Gives the prompt that an entry of the bank stands for, as this engine can express it on this model.
Fetch = Callable[[Entry], SoftPrompt]


def attach(model: Any, bank: PromptBank, fetch: Fetch) -> Any:
    """Attach in place. See `softbridge.plugin.hookspecs.Banker`."""
    geometry = read_geometry(model.config)
    modules = {
        site: heard
        for site, heard in attention_modules(model, geometry).items()
        if (shape := geometry.site(site)) is not None and tuple(heard) == shape.attending
    }
    shared = Shared(bank, partial(_ready, model, fetch, modules), modules)
    return install(model, shared, geometry, bool(modules), ())


@dataclass(frozen=True, eq=False)
class Numbers:
    """What one layer has of a prompt: keys [K, P, D], values [K, P, D], how they stand, and a gate or None."""

    keys: Tensor
    values: Tensor
    stand: Stand
    gate: LayerGate | None

    @property
    def nbytes(self) -> int:
        gate = 0 if self.gate is None else self.gate.weight.nbytes + self.gate.bias.nbytes
        return self.keys.nbytes + self.values.nbytes + gate


class Ready:
    """One prompt, ready to join: where its modules are, and never trained."""

    def __init__(
        self, prompt: SoftPrompt, modules: Mapping[Site, Mapping[int, nn.Module]], device: torch.device
    ) -> None:
        self.start = dict(prompt.positions.start)
        self.inputs = {part.stack: Held.of(part, device) for part in prompt.inputs}
        self.layers: dict[tuple[Site, int], Numbers] = {}
        for part in prompt.prefixes:
            stand = stand_of(prompt, part.site)
            for layer, pair in part.layers.items():
                place = home(next(modules[part.site][layer].parameters()).device)
                gate = None if pair.gate is None else LayerGate(pair.gate, place).requires_grad_(False)
                keys, values = (to_torch(array).to(place) for array in (pair.keys, pair.values))
                self.layers[part.site, layer] = Numbers(keys, values, stand, gate)
        self.gated = any(numbers.gate is not None for numbers in self.layers.values())
        self.nbytes = sum(held.vectors.nbytes for held in self.inputs.values())
        self.nbytes += sum(numbers.nbytes for numbers in self.layers.values())


@dataclass(frozen=True, eq=False)
class Held:
    """An input prompt: vectors [P, H], and what `softbridge_native.layout.Inserted` asks of them."""

    vectors: Tensor
    entry: PartEntry
    placement: Placement
    counted: int

    @classmethod
    def of(cls, part: InputPrompt, device: torch.device) -> Held:
        return cls(to_torch(part.vectors).to(device), part.entry, part.placement, counted(part))


def _ready(model: Any, fetch: Fetch, modules: Mapping[Site, Mapping[int, nn.Module]], entry: Entry) -> Ready:
    prompt = fetch(entry)
    if prompt.adaptions:
        raise EngineError(
            "an adaption prompt, whose vectors every token of a call sees in its layers",
            "input prompts and prefixes in a bank",
            "attach it alone",
        )
    check(prompt, model)
    missing = [part.site for part in prompt.prefixes if part.site not in modules]
    if missing:
        raise EngineError(
            f"prefixes at the site {', '.join(missing)}, where {type(model).__name__} does not dispatch through "
            "transformers' attention interface",
            "input prompts in a bank for this model",
            "attach it alone",
        )
    moved = [
        name
        for name, stack in stacks_of(model, read_geometry(model.config)).items()
        if origin_of(prompt, name) and not tellable(stack)
    ]
    if moved:
        raise EngineError(
            f"a prompt that moves the tokens of the {' and '.join(moved)}, and {type(model).__name__} can move them "
            "for all rows only",
            "prompts in a bank whose positions this model counts by itself",
            "attach it alone",
        )
    if prompt.positions.unbiased_from:
        raise EngineError(
            f"a prompt without a relative position bias in some layers: {dict(prompt.positions.unbiased_from)}",
            "prompts in a bank under which all rows have the model's own bias",
            "attach it alone",
        )
    if prompt.head:
        raise EngineError(
            f"a prompt of the bank brings a head of its own: {', '.join(prompt.head)}",
            "prompts without heads in a bank, as all rows of a batch go through one head",
            "attach it alone, or leave its head out: dataclasses.replace(prompt, head={})",
        )
    checking = injection(model).check
    if checking is not None:
        checking.learn(prompt)
    return Ready(prompt, modules, home(model.device))


class Rows:
    """What each row of a call runs with. It is kept as long as calls have the same rows.

    Args:
        entries: what the bank has under each row's name.
        rows: the same, ready to join.

    Attributes:
        prompts: those that are ready, each once.
        of: for each row, the number of its prompt among them, or None.
        plain: whether no gate is on any of them.
        lasting: whether a cache may keep what joins: there is something, and it depends on no call.
        joined: what joins the keys and values of layers that were asked for.
        plans: how the prompts of a layer come to stand in the rows.
        chosen: what was chosen for a stack; see `RowHooks`.
    """

    def __init__(self, entries: Sequence[Entry | None] = (), rows: Sequence[Ready | None] = ()) -> None:
        self.entries = tuple(entries)
        self.rows = tuple(rows)
        self.prompts = tuple(dict.fromkeys(row for row in rows if row is not None))
        numbers = {prompt: number for number, prompt in enumerate(self.prompts)}
        self.of = tuple(None if row is None else numbers[row] for row in rows)
        self.plain = not any(prompt.gated for prompt in self.prompts)
        self.lasting = self.plain and any(prompt.layers for prompt in self.prompts)
        self.joined: dict[Any, Joined | None] = {}
        self.plans: dict[Any, Plan] = {}
        self.chosen: dict[Any, tuple[Inserted | None, int | Tensor]] = {}


class Running:
    """The rows of the running call, or of the thread's last."""

    def __init__(self) -> None:
        self.rows = Rows()


class Loading:
    """Of several threads, one loads. Each bank in a model has a lock of its own, and so has a copy.

    An engine that checks itself while one loads (`SelfCheck.learn`) loads into the bank of a copy, in another thread.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[Any, ...]:
        return Loading, ()


class Shared(Injection):
    """Many prompts: each row of a batch runs with its own.

    Attributes:
        bank: says which.
        ready: those that were asked for.
        call: the rows of the running call, or of the thread's last.
        loading: held while prompts are made ready.
    """

    def __init__(
        self, bank: PromptBank, make: Callable[[Entry], Ready], modules: Mapping[Site, Mapping[int, nn.Module]]
    ) -> None:
        super().__init__()
        self.bank = bank
        self.ready: Recent[Ready] = Recent(bank.limit)
        self.call: Own[Running] = Own(Running)
        self.loading = Loading()
        self._make = make
        self._layers = {site: tuple(heard) for site, heard in modules.items()}

    def sources(self) -> Iterator[tuple[Site, int, Source, bool]]:
        for site, layers in self._layers.items():
            for layer in layers:
                yield site, layer, Layer(self, site, layer), True

    def hooks(self, name: Stack, stack: nn.Module, around: Circumstances) -> StackHooks:
        return RowHooks(self, name, stack, around)

    def choose(self, batch: int) -> None:
        """Let these be the rows: as many as the batch has, as the bank names them."""
        entries = tuple(None if name is None else self.bank.entry(name) for name in self.bank.names(batch))
        if entries == self.call.now.rows.entries:
            return
        chosen: dict[Entry, Ready] = {}
        with self.loading:
            for entry in entries:
                if entry is not None and entry not in chosen:
                    chosen[entry] = self.ready.get(entry) or self.ready.put(entry, self._make(entry))
            self.ready.shrink(chosen, self.bank.entries())
        self.call.now.rows = Rows(entries, [None if entry is None else chosen[entry] for entry in entries])

    def mark(self) -> object:
        rows = self.call.now.rows
        return rows if rows.lasting else None

    def join(self, site: Site, layer: int, entered: Tensor | None, like: Tensor) -> Joined | None:
        """What joins the keys and values of this layer; see `Source`."""
        rows = self.call.now.rows
        if like.shape[0] != len(rows.rows):
            raise EngineError(
                f"attention with {like.shape[0]} rows, in a call of {len(rows.rows)}",
                "as many rows in a model's layers as it was called with",
                "attach one prompt instead of a bank",
            )
        place = (site, layer, like.dtype, like.device)
        if place not in rows.joined:
            rows.joined[place] = _join(rows, (site, layer), like)
        joined = rows.joined[place]
        if joined is None or entered is None or rows.plain:
            return joined
        gates = entered.new_ones(len(rows.rows), 2)
        for number, prompt in enumerate(rows.prompts):
            own = prompt.layers.get((site, layer))
            if own is not None and own.gate is not None:
                mine = torch.tensor([row for row, found in enumerate(rows.of) if found == number], device=like.device)
                g = own.gate(entered[mine])
                gates = gates.index_copy(0, mine, torch.cat([g[:, :1], g[:, -1:]], dim=1))
        of_keys, of_values = gates.to(like.dtype).unbind(1)
        return Joined(joined.stand, joined.groups, (of_keys, of_values), joined.lengths, joined.index)


@dataclass(frozen=True)
class Layer:
    """One layer of a bank; see `Source`."""

    shared: Shared
    site: Site
    layer: int

    @property
    def gated(self) -> bool:
        return not self.shared.call.now.rows.plain

    def join(self, entered: Tensor | None, like: Tensor) -> Joined | None:
        return self.shared.join(self.site, self.layer, entered, like)


@dataclass(frozen=True, eq=False)
class Plan:
    """How the prompts of a layer come to stand in the rows of a batch: the same for all layers that they are alike in.

    Attributes:
        stand: how they stand to the sequence.
        rows: the numbers of each prompt's rows; None: one prompt has all rows.
        lengths: how many virtual tokens each row has, [B, 1]; None: all that there are.
        index: which of all prompts' tokens, one prompt after the other, a row has, [B, P]; any behind those it has.
    """

    stand: Stand
    rows: tuple[Tensor, ...] | None
    lengths: Tensor | None
    index: Tensor | None


def _join(rows: Rows, place: tuple[Site, int], like: Tensor) -> Joined | None:
    """The keys and values of each row's prompt at this site and layer, without gates."""
    own = [prompt.layers.get(place) for prompt in rows.prompts]
    found = [numbers for numbers in own if numbers is not None]
    if not found:
        return None
    kind = (like.device, *((None, None) if one is None else (one.keys.shape[1], one.stand) for one in own))
    if kind not in rows.plans:
        rows.plans[kind] = _plan(rows.of, own, like.device)
    plan = rows.plans[kind]
    pairs = [(numbers.keys.to(like), numbers.values.to(like)) for numbers in found]
    if plan.rows is None:
        return Joined(plan.stand, (Group(*pairs[0]),))
    groups = tuple(Group(*pair, mine) for pair, mine in zip(pairs, plan.rows, strict=True))
    return Joined(plan.stand, groups, lengths=plan.lengths, index=plan.index)


def _plan(of: Sequence[int | None], own: Sequence[Numbers | None], device: torch.device) -> Plan:
    """`of` each row the number of its prompt, and what the layer has of each prompt."""
    each = [None if number is None else own[number] for number in of]
    skewed = {numbers.stand.skewed for numbers in own if numbers is not None}
    if len(skewed) > 1:
        raise EngineError(
            "rows with a skewed relative bias and rows with a plain one",
            "prompts in one batch that see the relative bias in one way",
            "call the model for each kind",
        )
    stand = Stand(
        _each([0 if one is None else one.stand.origin for one in each], device),
        skewed.pop(),
        _each([one is not None and one.stand.slides for one in each], device),
    )
    there = [number for number, one in enumerate(own) if one is not None]
    if len(there) == 1 and None not in each:
        return Plan(stand, None, None, None)
    mine = tuple(
        torch.tensor([row for row, found in enumerate(of) if found == number], device=device) for number in there
    )
    lengths = [0 if one is None else int(one.keys.shape[1]) for one in each]
    differ = _each(lengths, device)
    index = _index(of, [0 if one is None else int(one.keys.shape[1]) for one in own], device)
    return Plan(stand, mine, differ if isinstance(differ, Tensor) else None, index)


def _index(of: Sequence[int | None], sizes: Sequence[int], device: torch.device) -> Tensor:
    """Which of all prompts' tokens, one prompt of these sizes after the other, each row has: [B, P]; see `Plan`.

    Args:
        of: for each row, the number of its prompt, or None.
        sizes: of the prompts.
        device: of the index.
    """
    first = list(accumulate(sizes, initial=0))
    start = torch.tensor([0 if number is None else first[number] for number in of])[:, None]
    length = torch.tensor([0 if number is None else sizes[number] for number in of])[:, None]
    column = torch.arange(max(sizes))
    return torch.where(column < length, start + column, 0).to(device)


def _each(numbers: Sequence[Any], device: torch.device) -> Any:
    """One number if all rows have the same, else [B, 1]."""
    return numbers[0] if len(set(numbers)) == 1 else torch.tensor(numbers, device=device)[:, None]


class Chosen:
    """The input prompts of the rows of one call; see `Inserted`."""

    def __init__(self, rows: Sequence[Held | None], device: torch.device, behind: bool) -> None:
        held = list(dict.fromkeys(row for row in rows if row is not None))
        kinds = {(row.entry, row.placement) for row in held}
        if len(kinds) > 1:
            raise EngineError(
                "rows whose vectors enter in different ways: "
                + " and ".join(sorted(f"{entry} the embedding block, {placement}" for entry, placement in kinds)),
                "prompts in one batch whose vectors enter in one way",
                "call the model for each kind",
            )
        ((self.entry, self.placement),) = kinds
        self.length = max(len(row.vectors) for row in held)
        self.lengths: int | Tensor = _each([0 if row is None else len(row.vectors) for row in rows], device)
        self.counted: int | Tensor = _each([0 if row is None else row.counted for row in rows], device)
        self.behind = behind
        self.device = device
        self._vectors = [row.vectors for row in held]
        numbers = {one: number for number, one in enumerate(held)}
        of = [None if row is None else numbers[row] for row in rows]
        self._index = None if len(held) == 1 else _index(of, [len(one) for one in self._vectors], device)

    def __call__(self, like: Tensor) -> Tensor:
        """[1 or B, P, H], as they enter a sequence of such embeddings."""
        vectors = torch.cat(self._vectors).to(like)
        return vectors[None] if self._index is None else vectors[self._index]


class RowHooks(StackHooks):
    """`StackHooks` for the rows that the bank names."""

    def __init__(self, shared: Shared, name: Stack, stack: nn.Module, around: Circumstances) -> None:
        super().__init__(stack, around)
        self.shared = shared
        self.name = name
        self.tellable = tellable(stack)

    def chosen(self, given: Tensor | None) -> tuple[Inserted | None, int | Tensor]:
        if given is None:
            raise EngineError(
                "a stack that was given no tokens",
                "'input_ids' or 'inputs_embeds'",
                "attach one prompt instead of a bank",
            )
        self.shared.choose(given.shape[0])
        chosen, place = self.shared.call.now.rows.chosen, (self.name, given.device)
        if place not in chosen:
            chosen[place] = self._chosen(self.shared.call.now.rows.rows, given.device)
        return chosen[place]

    def _chosen(self, rows: Sequence[Ready | None], device: torch.device) -> tuple[Inserted | None, int | Tensor]:
        held = [None if row is None else row.inputs.get(self.name) for row in rows]
        vectors = Chosen(held, device, self.name == "encoder") if any(held) else None
        if vectors is not None and isinstance(vectors.lengths, Tensor) and self.name == "decoder" and not self.tellable:
            raise EngineError(
                "rows with different numbers of virtual tokens, and a decoder that takes no position_ids",
                "the same number of virtual tokens in each row",
                "call the model for each length",
            )
        return vectors, _each([0 if row is None else row.start.get(self.name, 0) for row in rows], device)
