"""A bank of prompts in a transformers model: what joins each row of a call. See `softbridge.plugin.prompt_bank`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
from softbridge_native.prefix import Joined, LayerPrefix, Source, Stand, stand_of
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


class Ready:
    """One prompt, ready to join: where its modules are, and never trained."""

    def __init__(
        self, prompt: SoftPrompt, modules: Mapping[Site, Mapping[int, nn.Module]], device: torch.device
    ) -> None:
        self.start = dict(prompt.positions.start)
        self.inputs = {part.stack: Held.of(part, device) for part in prompt.inputs}
        self.layers: dict[tuple[Site, int], LayerPrefix] = {}
        for part in prompt.prefixes:
            stand = stand_of(prompt, part.site)
            for layer, pair in part.layers.items():
                place = home(next(modules[part.site][layer].parameters()).device)
                self.layers[part.site, layer] = LayerPrefix(pair, stand, place, made=False).requires_grad_(False)
        numbers = [held.vectors for held in self.inputs.values()]
        numbers += [tensor for layer in self.layers.values() for tensor in layer.parameters()]
        self.nbytes = sum(tensor.nbytes for tensor in numbers)


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
    """What each row of a call runs with.

    Attributes:
        entries: what the bank has under each row's name.
        rows: the same, ready to join.
        joined: what joins the keys and values of layers that were asked for.
    """

    def __init__(self) -> None:
        self.entries: tuple[Entry | None, ...] = ()
        self.rows: tuple[Ready | None, ...] = ()
        self.joined: dict[Any, Joined | None] = {}


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
        self.call: Own[Rows] = Own(Rows)
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
        call = self.call.now
        if entries == call.entries:
            return
        chosen: dict[Entry, Ready] = {}
        with self.loading:
            for entry in entries:
                if entry is not None and entry not in chosen:
                    chosen[entry] = self.ready.get(entry) or self.ready.put(entry, self._make(entry))
            self.ready.shrink(chosen, self.bank.entries())
        call.rows = tuple(None if entry is None else chosen[entry] for entry in entries)
        call.entries = entries
        call.joined = {}

    def join(self, site: Site, layer: int, entered: Tensor | None, like: Tensor) -> Joined | None:
        """What joins the keys and values of this layer; see `Source`."""
        call = self.call.now
        if like.shape[0] != len(call.rows):
            raise EngineError(
                f"attention with {like.shape[0]} rows, in a call of {len(call.rows)}",
                "as many rows in a model's layers as it was called with",
                "attach one prompt instead of a bank",
            )
        own = [None if row is None else row.layers.get((site, layer)) for row in call.rows]
        place = (site, layer, like.dtype, like.device)
        if place not in call.joined:
            call.joined[place] = _join(own, like)
        joined = call.joined[place]
        gated = {module for module in own if module is not None and module.gate is not None}
        if joined is None or entered is None or not gated:
            return joined
        gates = entered.new_ones(len(own), 2)
        for module in gated:
            rows = torch.tensor([row for row, found in enumerate(own) if found is module], device=entered.device)
            g = module.gate(entered[rows]) if module.gate is not None else gates[rows]
            gates = gates.index_copy(0, rows, torch.cat([g[:, :1], g[:, -1:]], dim=1))
        key_gates, value_gates = gates.to(like.dtype)[:, :, None, None, None].unbind(1)
        keys, values = joined.whole
        return Joined(joined.stand, each=(keys * key_gates, values * value_gates), lengths=joined.lengths)


@dataclass(frozen=True)
class Layer:
    """One layer of a bank; see `Source`."""

    shared: Shared
    site: Site
    layer: int

    def join(self, entered: Tensor | None, like: Tensor) -> Joined | None:
        return self.shared.join(self.site, self.layer, entered, like)


def _join(own: Sequence[LayerPrefix | None], like: Tensor) -> Joined | None:
    """The keys and values of each row's module, without gates, as long as the longest."""
    modules = list(dict.fromkeys(module for module in own if module is not None))
    if not modules:
        return None
    numbers = [(module.keys.to(like), module.values.to(like)) for module in modules]
    skewed = {module.stand.skewed for module in modules}
    if len(skewed) > 1:
        raise EngineError(
            "rows with a skewed relative bias and rows with a plain one",
            "prompts in one batch that see the relative bias in one way",
            "call the model for each kind",
        )
    stand = Stand(
        _each([0 if module is None else module.stand.origin for module in own], like.device),
        skewed.pop(),
        _each([module is not None and module.stand.slides for module in own], like.device),
    )
    if len(modules) == 1 and None not in own:
        return Joined(stand, (Group(*numbers[0]),))
    groups = tuple(
        Group(keys, values, torch.tensor([row for row, mine in enumerate(own) if mine is module], device=like.device))
        for module, (keys, values) in zip(modules, numbers, strict=True)
    )
    lengths = _each([0 if module is None else module.keys.shape[1] for module in own], like.device)
    return Joined(stand, groups, lengths=lengths if isinstance(lengths, Tensor) else None)


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
        self._index = [0 if row is None else held.index(row) for row in rows]

    def __call__(self, like: Tensor) -> Tensor:
        """[1 or B, P, H], as they enter a sequence of such embeddings."""
        vectors = [nn.functional.pad(v.to(like), (0, 0, 0, self.length - len(v))) for v in self._vectors]
        return vectors[0][None] if len(vectors) == 1 else torch.stack(vectors)[self._index]


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
        rows = self.shared.call.now.rows
        held = [None if row is None else row.inputs.get(self.name) for row in rows]
        vectors = Chosen(held, given.device, self.name == "encoder") if any(held) else None
        if vectors is not None and isinstance(vectors.lengths, Tensor) and self.name == "decoder" and not self.tellable:
            raise EngineError(
                "rows with different numbers of virtual tokens, and a decoder that takes no position_ids",
                "the same number of virtual tokens in each row",
                "call the model for each length",
            )
        return vectors, _each([0 if row is None else row.start.get(self.name, 0) for row in rows], given.device)
