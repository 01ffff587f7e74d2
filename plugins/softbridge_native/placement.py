"""An input prompt in one stack of the model: what happens before and after the stack runs.

Hooks put the virtual tokens into the sequence, tell the real ones where they stand, and take the virtual ones out of
the last hidden state. What is built on the stack - heads, losses, `generate`, trainers - therefore never meets a
virtual token: logits and labels keep their length, and the loss is the model's own. Where the vectors enter after the
embedding block, that block never meets one either. The virtual tokens of a template have places in the caller's own
rows: there the vectors are put, and nothing else changes.

A stack inside a model of several modalities gets embeddings, in which images are, and often positions and masks that
were made of the whole sequence: positions of three dimensions, masks that let the tokens of an image see each other.
There the model around the stack is given a word of text in the place of each virtual token, and the stack then gets the
vectors: so all that the model makes is what it makes of so many words more.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from softbridge import cache as caches
from softbridge.errors import EngineError
from softbridge.geometry import Site, Stack
from softbridge.prompt import Entry, InputPrompt, Placement
from softbridge.template import PLACEHOLDER
from softbridge.tensors import from_torch, to_torch
from softbridge_native import tables
from softbridge_native.call import Entry as Opened
from softbridge_native.call import Own
from softbridge_native.kernels import PACKED
from softbridge_native.parameterisation import Making

if TYPE_CHECKING:
    from softbridge_native.seed import Seed


def counted(part: InputPrompt) -> int:
    """By how many places the virtual tokens move the tokens behind them, as far as positions are concerned.

    By none where they enter after the positions, or where the caller's rows have places for them.
    """
    return part.length if part.entry == "before" and part.template is None else 0


def embedding_block(stack: Any) -> nn.Module | None:
    """The module of the stack that adds positions to the word embedding and keeps its width (BERT's `embeddings`)."""
    words = stack.get_input_embeddings()
    for block in stack.children():
        if block is not words and words in block.modules():
            tables = (module for name, module in block.named_modules() if name.endswith("position_embeddings"))
            return block if any(getattr(table, "embedding_dim", 0) == words.embedding_dim for table in tables) else None
    return None


class Inserted(Protocol):
    """The virtual tokens of one call of a stack.

    Attributes:
        length: P.
        lengths: how many of them each row has, [B, 1], or P where all have the same.
        entry: as in `InputPrompt`.
        placement: as in `InputPrompt`.
        counted: by how many places they move the tokens behind them, [B, 1] or one number; see `counted`.
        behind: whether rows with fewer virtual tokens have their pads behind all; see `Layout`.
        device: where they are.
    """

    length: int
    lengths: int | Tensor
    entry: Entry
    placement: Placement
    counted: int | Tensor
    behind: bool

    @property
    def device(self) -> torch.device: ...

    def __call__(self, like: Tensor) -> Tensor:
        """[1 or B, P, H], as they enter a sequence of such embeddings."""


class Used:
    """The vectors [P, H] that a network made for the running call, or None."""

    def __init__(self) -> None:
        self.vectors: Tensor | None = None


class Vectors(nn.Module):
    """An input prompt: vectors [P, H], a parameter, or what a network made (see `parameterisation.Made`)."""

    site: Site | None = None
    vectors: Tensor

    def __init__(self, part: InputPrompt, device: torch.device, made: bool) -> None:
        super().__init__()
        tensor = to_torch(part.vectors).to(device)
        if made:
            self.register_buffer("vectors", tensor, persistent=False)
        else:
            self.register_parameter("vectors", nn.Parameter(tensor))
        self.used = Own(Used)
        self.stack: Stack = part.stack
        self.length = part.length
        self.lengths: int | Tensor = part.length
        self.entry = part.entry
        self.placement = part.placement
        self.counted: int | Tensor = counted(part)
        self.behind = False

    def forward(self, like: Tensor) -> Tensor:
        """[1, P, H], as they enter a sequence of such embeddings."""
        used = self.used.now.vectors
        now = self.vectors if used is None else used
        return now.to(like.device, like.dtype)[None]

    def hold(self, flat: Tensor) -> None:
        self.vectors.copy_(flat)

    def use(self, flat: Tensor | None) -> Sequence[Tensor]:
        self.used.now.vectors = flat
        return () if flat is None else (flat,)

    def branch(self) -> Sequence[Tensor]:
        return ()  # vectors enter before the layers, and no layer needs them again

    def extract(self, part: InputPrompt) -> InputPrompt:
        """The part as it is now; what a network makes, as it was given."""
        return replace(part, vectors=from_torch(self.vectors)) if isinstance(self.vectors, nn.Parameter) else part

    @property
    def device(self) -> torch.device:
        return self.vectors.device


def layout(inserted: Inserted, mask: Tensor | None) -> Layout:
    """Where the virtual tokens stand in rows with this mask [B, T]; without one no row has pads."""
    first = int(inserted.placement == "after-first-token")
    if mask is None:
        front = torch.full((1, 1), first, device=inserted.device)
    else:
        front = (left_pads(mask) + first).clamp(max=mask.shape[1])
    return Layout(front, inserted.length, inserted.lengths, inserted.behind)


@dataclass(eq=False)
class Layout:
    """The order of virtual and real tokens in each row.

    Of a row's own columns the first `front` stand in front, then come its virtual tokens, then the others. Rows with
    fewer virtual tokens than P have pads in their stead: in front of all, where a cache grows at the other end, or
    behind all.

    Attributes:
        front: [B or 1, 1]: a row's pads on the left, and its first real token where that comes first.
        length: P.
        lengths: how many virtual tokens each row has, [B, 1], or P.
        behind: whether the pads are behind.
    """

    front: Tensor
    length: int
    lengths: Tensor | int
    behind: bool = False

    @property
    def shift(self) -> Tensor | int:
        """How many pads come before all."""
        return 0 if self.behind else self.length - self.lengths

    def insert(self, real: Tensor, virtual: Tensor) -> Tensor:
        """[B, P + T, ...] from what belongs to real tokens [B or 1, T, ...] and to virtual ones [B or 1, P, ...].

        In pads there is anything valid.
        """
        rows = max(real.shape[0], virtual.shape[0])
        both = torch.cat([part.expand(rows, *part.shape[1:]) for part in (virtual, real)], dim=1)
        column = torch.arange(both.shape[1], device=both.device) - self.shift
        ahead, behind = column < self.front, column >= self.front + self.lengths
        order = column + self.length * ahead - self.front * ~(ahead | behind) + (self.length - self.lengths) * behind
        if isinstance(self.lengths, Tensor):
            order = order.clamp(0, both.shape[1] - 1)
        return _take(both, order)

    def mask(self, mask: Tensor) -> Tensor:
        """The mask [B, P + T] from that of the real tokens [B, T]."""
        both = self.insert(mask, mask.new_ones(1, self.length))
        if not isinstance(self.lengths, Tensor):
            return both
        column = torch.arange(both.shape[1], device=both.device) - self.shift
        return both * ((column >= 0) & (column < self.lengths + mask.shape[1]))

    def reserve(self, real: Tensor) -> Tensor:
        """[B, P + T, ...] with anything valid in the places of the virtual tokens: the row's first."""
        return self.insert(real, real[:, :1].expand(-1, self.length, *real.shape[2:]))

    def real(self, both: Tensor) -> Tensor:
        """[B, T, ...] of [B, P + T, ...]: without what belongs to virtual tokens."""
        column = torch.arange(both.shape[1] - self.length, device=both.device)
        return _take(both, column + self.lengths * (column >= self.front) + self.shift)


def home(device: torch.device) -> torch.device:
    """Where a tensor is to be that belongs to one on this device: weights that are loaded when needed have none."""
    return torch.device("cpu") if device.type == "meta" else device


def left_pads(mask: Tensor) -> Tensor:
    """How many columns each row has in front of its first real token, [B, 1], from a mask [B, T]."""
    return (mask.cumsum(-1) == 0).sum(-1, keepdim=True)


def _take(both: Tensor, order: Tensor) -> Tensor:
    """The columns of [B or 1, N, ...] in the order [B or 1, n]."""
    rows, rest = max(both.shape[0], order.shape[0]), both.shape[2:]
    index = order.view(*order.shape, *[1] * len(rest)).expand(rows, -1, *rest)
    return both.expand(rows, *both.shape[1:]).gather(1, index)  # `take_along_dim` fixes the shapes of an exported graph


#: Of a cache: whether the stack that filled it is running, and counts all that it holds; and by whom it was begun.
_RUNNING, _BEGUN = "_softbridge_running", "_softbridge_begun"
#: And how many tokens it has read.
_READ = "_softbridge_read"


def hide(cache: Any, length: int, owner: str) -> None:
    """Let a cache that holds so many virtual tokens count, and be cropped to, real ones; but not while its stack runs.

    What `generate` knows are real tokens: assisted decoding compares their number with the cache's, and crops.
    """
    if cache is not None:
        running(cache, hides(cache) and vars(cache)[_RUNNING])
        vars(cache)[_BEGUN] = owner
        if hasattr(cache, "get_seq_length"):
            cache.get_seq_length = partial(_real_length, cache, length)
        if hasattr(cache, "crop"):
            cache.crop = partial(_crop, cache, length)


def running(cache: Any, now: bool) -> None:
    """Say whether the stack runs; see `hide`."""
    vars(cache)[_RUNNING] = now


def check_begun(cache: Any, owner: str, past: int) -> None:
    """Refuse a cache that holds tokens, and no prompt, or another's: the tokens behind would not see ours.

    Raises:
        EngineError: no call with the prompt of this owner began it.
    """
    if past and vars(cache).get(_BEGUN) != owner:
        raise EngineError(
            f"a cache of {past} tokens that no call with this prompt began",
            "a cache that the model filled with this prompt attached, or an empty one",
            "begin it with this model, from the first token on",
        )


def begin(cache: Any, owner: str, past: int) -> None:
    """Say who begins a cache, where it is no matter how many tokens it holds; see `check_begun`."""
    if cache is not None:
        check_begun(cache, owner, past)
        vars(cache)[_BEGUN] = owner


def check_foreign(cache: Any, past: int) -> None:
    """Refuse a cache that a prompt is in, where there is to be none.

    Raises:
        EngineError: it is.
    """
    if past and _BEGUN in vars(cache):
        raise EngineError(
            f"a cache of {past} tokens that a call with a prompt began, and the prompt is switched off",
            "a cache that the model filled without a prompt, or an empty one",
            "begin it anew where the prompt is off",
        )


def hides(cache: Any) -> bool:
    """Whether a cache was told to hide virtual tokens."""
    return cache is not None and _RUNNING in vars(cache)


def full_length(cache: Any) -> int:
    """How many tokens a cache holds, virtual ones included; or has read, where it keeps states of them only."""
    if cache is None or _blank(cache):
        return 0
    try:
        return int(type(cache).get_seq_length(cache))
    except (AttributeError, ValueError):  # states alone do not say
        return int(vars(cache).get(_READ, 0))


def _blank(cache: Any) -> bool:
    """Whether a cache of a model's own kind, which may count what it has no keys of (Jamba's), has no number yet."""
    keys = vars(cache).get("key_cache")
    return isinstance(keys, list) and all(isinstance(each, Tensor) and each.numel() == 0 for each in keys)


def _real_length(cache: Any, virtual: int, *args: Any, **kwargs: Any) -> int:
    full = 0 if _blank(cache) else int(type(cache).get_seq_length(cache, *args, **kwargs))
    return full if vars(cache)[_RUNNING] else max(full - virtual, 0)


def _crop(cache: Any, virtual: int, length: int) -> None:
    """A number of tokens to keep counts real ones; a negative number is of those to drop."""
    type(cache).crop(cache, length + virtual if length > 0 else length)


@dataclass(frozen=True)
class Circumstances:
    """What a stack's hooks must know of the model around it.

    Attributes:
        implementation: ours, which the stack's configuration names, or None where the model keeps its own.
        keeps: whether the last hidden state keeps the virtual tokens: cross-attention is to see them.
        pools: whether the model's head takes the first state for the whole sequence.
        shows: says whether logits of virtual tokens are wanted.
        off: says whether a module is to run without the prompt.
        owner: a name that no other attachment has.
        word: a token id that is a word of text; see `word`.
        counts_pads: whether a model around the stack makes positions that count pads on the left.
        knows_pads: whether the stack finds pads by their token ids, and is told no positions.
        prefixed: whether attention has prefixes, which caches do not hold.
    """

    implementation: str | None
    keeps: bool
    pools: bool
    shows: Callable[[], bool]
    off: Callable[[nn.Module], bool]
    owner: str
    word: int = 0
    counts_pads: bool = False
    knows_pads: bool = False
    prefixed: bool = False


#: How the names of token ids in a configuration end.
_TOKENS = ("token_id", "token_ids", "token_index")


def word(config: Any) -> int:
    """A token id that is a word of text: the first that the configuration gives no meaning of its own."""
    named = list(_token_ids(config.to_dict()))
    special = {token for value in named for token in (value if isinstance(value, (list, tuple)) else [value])}
    return next(token for token in range(len(special) + 1) if token not in special)


def _token_ids(settings: Mapping[Any, Any]) -> Iterator[Any]:
    """What a configuration, and those in it, have under the name of a token id."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _token_ids(value)
        elif str(name).endswith(_TOKENS):
            yield value


@dataclass(frozen=True, eq=False)
class Outer:
    """What the model around a stack was called with, of which it makes what the stack is called with.

    Attributes:
        mask: of the real tokens [B, N], or None.
        layout: where the virtual tokens stand among them, or None: they are in the cache, or there are none.
        told: whether it was told positions, and makes none itself.
        cache: its cache, or None.
    """

    mask: Tensor | None
    layout: Layout | None
    told: bool
    cache: Any


class Call:
    """The running call of a stack.

    Attributes:
        vectors: its input prompt, or None.
        start: where its first real token stands, in each row [B, 1] or in all; see `Positions`.
        layout: where the virtual tokens stand that were put into its sequence, or None.
        width: P + T.
        cache: its cache, or None.
        outer: what the model around it was called with, if there is one, until the stack runs.
    """

    def __init__(self) -> None:
        self.outer: Outer | None = None
        self.vectors: Inserted | None = None
        self.start: int | Tensor = 0
        self.layout: Layout | None = None
        self.width = 0
        self.cache: Any = None


class StackHooks:
    """What happens before and after one stack of the model, and its embedding block, run.

    Args:
        stack: the module.
        around: of the model around it.
        vectors: its input prompt, or None.
        start: where its first real token stands; see `Positions`.
        making: what a network makes for this stack, or None.
        seed: the prefix that its cache starts with, or None.
    """

    def __init__(
        self,
        stack: nn.Module,
        around: Circumstances,
        vectors: Inserted | None = None,
        start: int = 0,
        making: Making | None = None,
        seed: Seed | None = None,
    ) -> None:
        self.around = around
        self.entry: Own[Opened] = Own(Opened)
        self.outer_entry: Own[Opened] = Own(Opened)
        self.outer_names: tuple[str, ...] = ()
        self.call: Own[Call] = Own(Call)
        self.making = making
        self.seed = seed
        self.names = tuple(inspect.signature(stack.forward).parameters)
        self.cache_name = caches.argument(stack.forward)
        self.offset = _position_offset(stack)
        self.padding = _padding_row(stack)
        self.reach = tables.reach(stack, self.offset)
        self.counts_pads = tables.counts_pads(stack)
        self._fixed = vectors, start

    def chosen(self, given: Tensor | None) -> tuple[Inserted | None, int | Tensor]:
        """The vectors of a call and where its first real token stands, for the rows of tokens or states [B, ...]."""
        return self._fixed

    def surround(self, outer: Any, entry: Own[Opened]) -> None:
        """Say which module is around the stack, and whether its hooks ran."""
        self.outer_names, self.outer_entry = tuple(inspect.signature(outer.forward).parameters), entry

    def before_outer(self, outer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], Any]:
        """Give the model around the stack a word in the place of each virtual token."""
        kwargs = {**dict(zip(self.outer_names, args, strict=False)), **kwargs}
        self.outer_entry.now.open = True
        if self.around.off(outer):  # the stack sees to the rest
            return (), kwargs
        mask, cache, tokens = kwargs.get("attention_mask"), caches.given(kwargs), given_tokens(kwargs)
        plain = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        told, past = kwargs.get("position_ids") is not None, full_length(cache)
        call = self.call.now
        call.outer = Outer(plain, None, told, cache)
        vectors, _ = self.chosen(tokens)
        if vectors is None:
            return (), kwargs
        if mask is not plain:
            raise _ready_made()
        check_begun(cache, self.around.owner, past)
        check_unpacked(kwargs, plain)
        if plain is None and isinstance(vectors.lengths, Tensor):
            plain = _all_real(tokens, past, vectors)
        rows = layout(vectors, plain)
        if plain is not None:
            kwargs["attention_mask"] = rows.mask(plain)
        if past == 0:
            call.outer = Outer(plain, rows, told, cache)
            if told:
                check_onward(kwargs["position_ids"], plain)
            kwargs.update(_with_words(rows, vectors.placement, self.around.word, kwargs))
            hide(cache, rows.length, self.around.owner)
        elif told:
            kwargs["position_ids"] = kwargs["position_ids"] + rows.lengths
        if kwargs.get("cache_position") is not None:
            columns = torch.arange(tokens.shape[1] + (0 if past else rows.length), device=tokens.device)
            kwargs["cache_position"] = columns + past
        if hides(cache):
            running(cache, True)
        return (), kwargs

    def after_outer(self, outer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """The model around the stack has run, or failed."""
        self.outer_entry.now.open = False
        call = self.call.now
        if call.outer is not None and hides(call.outer.cache):
            running(call.outer.cache, False)
        call.outer = None

    def before(self, stack: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        """Put the virtual tokens into the sequence, and tell the real ones where they stand."""
        if self.around.implementation not in (None, stack.config._attn_implementation):
            raise EngineError(
                f"the attention implementation became '{stack.config._attn_implementation}' with a prompt attached",
                f"'{self.around.implementation}', in which the prompt lives",
                "detach the prompt, set the implementation, and attach again",
            )
        kwargs = {**dict(zip(self.names, args, strict=False)), **kwargs}
        caches.rename(kwargs, self.cache_name)
        mask, cache = kwargs.get("attention_mask"), caches.given(kwargs)
        past = full_length(cache)
        if self.around.off(stack):
            check_foreign(cache, past)
            self.entry.now.open = True
            return (), kwargs
        call = self.call.now
        call.layout = call.cache = None
        tokens = kwargs.get("inputs_embeds")
        call.vectors, call.start = self.chosen(kwargs.get("input_ids") if tokens is None else tokens)
        if self.making is not None:
            self.making.enter(stack)
            if tokens is not None:  # then the embedding is not called
                kwargs["inputs_embeds"] = self.making.gather(tokens)
        plain = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        outer, call.outer = call.outer, None
        if outer is not None:
            plain = outer.mask  # of which the mask that arrives was made
            self._receive(outer, kwargs)
        told = outer is not None and kwargs.get("position_ids") is not None
        positions = self._positions(kwargs, plain, past, told)
        if positions is not None:
            kwargs["position_ids"] = positions
        self._within(stack, kwargs, plain, past)
        if self.seed is not None:
            check_begun(cache, self.around.owner, past)
            self.seed.plant(stack, kwargs, plain, past, self.around.owner)
        if call.vectors is not None and self.around.knows_pads and plain is not None:
            _check_no_pads_ahead(stack, plain)
        if call.vectors is not None and call.vectors.placement == "template":
            _fill(call.vectors, stack, kwargs, past)
        elif call.vectors is not None and outer is not None:
            if outer.layout is not None:
                call.layout = outer.layout
                hide(cache, call.vectors.length, self.around.owner)
                self._insert(call, outer.layout, stack, kwargs, None if told else positions)
        elif call.vectors is not None:
            if mask is not plain:
                raise _ready_made()
            if self.cache_name is None and kwargs.get("use_cache"):
                raise _kept_within(stack)
            check_begun(cache, self.around.owner, past)
            check_unpacked(kwargs, plain)
            counted_without = kwargs.pop("cache_position", None)
            if plain is None and isinstance(call.vectors.lengths, Tensor):
                plain = _all_real(given_tokens(kwargs), past, call.vectors)
            rows = layout(call.vectors, plain)
            if plain is not None:
                kwargs["attention_mask"] = rows.mask(plain)
            if past == 0:
                call.layout = rows
                hide(cache, call.vectors.length, self.around.owner)
                check_others(kwargs)
                self._insert(call, rows, stack, kwargs, positions)
            if counted_without is not None:  # not every model counts its cache by itself
                length = given_tokens(kwargs).shape[1]
                kwargs["cache_position"] = torch.arange(past, past + length, device=counted_without.device)
        call.cache = caches.given(kwargs)
        if self.around.prefixed and not torch.compiler.is_compiling():
            begin(call.cache, self.around.owner, past)
        if hides(call.cache):
            running(call.cache, True)
            vars(call.cache)[_READ] = past + given_tokens(kwargs).shape[1]
        self.entry.now.open = True
        return (), kwargs

    def after(self, stack: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Take the virtual tokens out of the hidden states; and forget the call, also one that failed (None)."""
        self.entry.now.open = False
        if self.making is not None:
            self.making.leave()
        call = self.call.now
        layout, vectors, cache = call.layout, call.vectors, call.cache
        call.layout = call.vectors = call.cache = None
        if self.seed is not None:
            self.seed.take_back(output)
        if hides(cache):
            running(cache, False)
        unwatched = self.around.off(stack) or torch.compiler.is_compiling()
        if output is not None and cache is None and self.around.prefixed and not unwatched:
            begin(_cache_of(output), self.around.owner, 0)  # the stack made it
        if output is None or layout is None or vectors is None:
            return output
        if cache is None and (made := _cache_of(output)) is not None:  # by the stack
            hide(made, vectors.length, self.around.owner)
            vars(made)[_READ] = call.width
        if self.around.keeps or self.around.shows():
            return output
        pooled = self.around.pools and vectors.placement == "before-sequence"
        return _without_virtual(output, layout, call.width, pooled)

    def embedded(self, embedding: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Reentrant gradient checkpointing drops a layer's gradients if no input of the layer requires one."""
        if not (embedding.training and torch.is_grad_enabled()):
            return output
        if self.making is None or self.call.now.outer is not None:  # the stack gets embeddings, and gathers then
            return output.requires_grad_(True)
        return self.making.gather(output.requires_grad_(True))

    def before_block(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Give the embedding block the real tokens only, as without a prompt."""
        call = self.call.now
        layout = None if call.vectors is None or call.vectors.entry == "before" else call.layout

        def real(value: Any) -> Any:
            if layout is None or not isinstance(value, Tensor) or value.shape[1:2] != (call.width,):
                return value
            return layout.real(value)

        return tuple(real(value) for value in args), {name: real(value) for name, value in kwargs.items()}

    def after_block(self, block: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Put the vectors among what the embedding block made of the real tokens."""
        call = self.call.now
        if call.layout is None or call.vectors is None or call.vectors.entry == "before":
            return output
        return call.layout.insert(output, call.vectors(output))

    def before_decoder(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Let cross-attention see the virtual tokens, which are in the encoder's output."""
        mask, states = kwargs.get("encoder_attention_mask"), kwargs.get("encoder_hidden_states")
        if states is None or self.around.off(decoder):
            return args, kwargs
        vectors, _ = self.chosen(states)  # of more rows, with beams, than the encoder ran with
        if vectors is None or vectors.placement == "template":
            return args, kwargs
        if mask is None and isinstance(vectors.lengths, Tensor):
            mask = states.new_ones(states.shape[0], states.shape[1] - vectors.length, dtype=torch.long)
        if mask is not None:
            rows = layout(vectors, mask)
            if mask.shape[1] + rows.length == states.shape[1]:
                kwargs["encoder_attention_mask"] = rows.mask(mask)
        return args, kwargs

    def _receive(self, outer: Outer, kwargs: dict[str, Any]) -> None:
        """Take the words out that stood in the places of virtual tokens, and the pads that the model counted."""
        if outer.layout is not None:
            name = "input_ids" if kwargs.get("inputs_embeds") is None else "inputs_embeds"
            kwargs[name] = outer.layout.real(kwargs[name])
        positions, mask = kwargs.get("position_ids"), outer.mask
        if positions is None:
            return
        if mask is not None and outer.layout is not None:
            mask = outer.layout.mask(mask)
        if mask is not None and self.around.counts_pads and not outer.told:
            kwargs["position_ids"] = (positions - left_pads(mask)).clamp(min=0)
        moved = self._moved(True)
        if not isinstance(moved, int) or moved != 0:
            check_onward(positions, mask)

    def _moved(self, told: bool) -> int | Tensor:
        """By how many places given positions are moved; see `_positions`."""
        call = self.call.now
        return call.start - (call.vectors.counted if told and call.vectors is not None else 0)

    def _positions(self, kwargs: Mapping[str, Any], mask: Tensor | None, past: int, told: bool) -> Tensor | None:
        """Where the real tokens stand, [B or 1, T]; None if the model would say the same, or cannot be told.

        Positions that a model around has `told` count the virtual tokens of an input prompt, and are of those, too.
        """
        given, call = kwargs.get("position_ids"), self.call.now
        if given is not None:
            return given + self._moved(told)  # type: ignore[no-any-return]
        cached, ahead = self._virtual(past)
        same = isinstance(call.start, int) and isinstance(ahead, int) and call.start == ahead
        if "position_ids" not in self.names or (mask is None and same):
            return None
        tokens = given_tokens(kwargs)
        column = torch.arange(past - cached, past - cached + tokens.shape[1], device=tokens.device)[None]
        if mask is None:
            return column + call.start + self.offset
        # Where a pad stands shows in the mean of a gate: on the right, where the model itself has it.
        positions = (column - left_pads(mask)).clamp(min=0) + call.start + self.offset
        if self.padding is not None and tokens.ndim == 2:
            positions = torch.where(tokens == self.padding, self.padding, positions)
        return positions

    def _within(self, stack: Any, kwargs: Mapping[str, Any], mask: Tensor | None, past: int) -> None:
        """Refuse tokens beyond the stack's table of positions."""
        if self.reach is None or all(kwargs.get(name) is None for name in ("input_ids", "inputs_embeds")):
            return
        count = given_tokens(kwargs).shape[1] + past - self._virtual(past)[0]
        told = mask if "position_ids" in self.names and not self.counts_pads else None
        tables.check(stack, self.reach, count, self.call.now.start, told)

    def _virtual(self, past: int) -> tuple[int, int | Tensor]:
        """How many virtual tokens are in a cache of this length, and how many the model counts by itself."""
        call = self.call.now
        if self.seed is not None:
            return self.seed.length if past else 0, self.seed.length
        if call.vectors is None:
            return 0, 0
        cached = call.vectors.length if past and call.vectors.placement != "template" else 0
        return cached, cached or call.vectors.counted

    def _insert(self, call: Call, layout: Layout, stack: Any, kwargs: dict[str, Any], positions: Tensor | None) -> None:
        """Insert the virtual tokens into whatever is given for each token."""
        vectors = call.vectors
        assert vectors is not None
        name = "input_ids" if kwargs.get("inputs_embeds") is None else "inputs_embeds"
        real, types = kwargs[name], kwargs.get("token_type_ids")
        call.width = real.shape[1] + layout.length
        if vectors.entry == "after":
            if types is None and "token_type_ids" in self.names:  # the model's own are as many as its positions
                types = torch.zeros(real.shape[:2], dtype=torch.long, device=real.device)
            given = {name: real, "token_type_ids": types, "position_ids": positions}
            kwargs.update({name: layout.reserve(value) for name, value in given.items() if value is not None})
            return
        embedded = stack.get_input_embeddings()(real) if name == "input_ids" else real
        kwargs["input_ids"] = None
        kwargs["inputs_embeds"] = layout.insert(embedded, vectors(embedded))
        if types is not None:
            kwargs["token_type_ids"] = layout.insert(types, types.new_zeros(1, layout.length))
        if positions is not None:
            ahead = int(vectors.placement == "after-first-token")
            first = call.start - layout.lengths + self.offset + ahead
            virtual = torch.arange(layout.length, device=real.device)[None] + first
            if ahead:
                column = torch.arange(real.shape[1], device=real.device)
                moved = (positions - layout.lengths).clamp(min=0)
                positions = torch.where(column == layout.front - 1, moved, positions)
            kwargs["position_ids"] = layout.insert(positions, virtual)


def _without_virtual(output: Any, layout: Layout, width: int, pooled: bool) -> Any:
    """A stack's output without the virtual tokens' states, also those of single layers; `pooled`: but in the last."""

    def real(states: Any) -> Any:
        if isinstance(states, Tensor) and states.ndim == 3 and states.shape[1] == width:
            return layout.real(states)
        return states

    def each(found: Any) -> Any:
        return tuple(real(states) for states in found) if isinstance(found, tuple) else found

    if isinstance(output, tuple):
        return (output[0] if pooled else real(output[0]), *(each(found) for found in output[1:]))
    if not pooled:
        output.last_hidden_state = real(output.last_hidden_state)
    if output.get("hidden_states") is not None:
        output.hidden_states = each(output.hidden_states)
    return output


def _cache_of(output: Any) -> Any:
    if isinstance(output, tuple):
        return next((found for found in output if hasattr(found, "get_seq_length")), None)
    return caches.of(output)


def check_unpacked(kwargs: Mapping[str, Any], mask: Tensor | None) -> None:
    """Refuse several texts in one row, where only the first of them would have the prompt, or all would be one.

    Raises:
        EngineError: positions [B, T] start again among a row's real tokens, or the texts' lengths are given.
    """
    positions = kwargs.get("position_ids")
    packed = [name for name in (*PACKED, "seq_idx") if kwargs.get(name) is not None]
    if isinstance(positions, Tensor) and positions.ndim == 2 and positions.shape[-1] > 1:
        again = (positions.diff(dim=-1) <= 0) & _pairs(positions, mask)
        if torch.compiler.is_compiling():  # a graph has no words for it
            torch._assert_async(~again.any(), "several texts in one row, with a prompt")
        elif bool(again.any()):
            packed.append("position_ids that start again")
    if packed:
        raise EngineError(
            f"several texts in one row ({', '.join(packed)}), and a prompt that only the first of them would have",
            "one text in each row",
            "leave the texts unpacked (packing=False, padding_free=False), or use a prefix on a model that dispatches "
            "through transformers' attention interface: there each text has it",
        )


#: What is given for each token, and can be for virtual ones.
_INSERTED = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids")


def check_others(kwargs: Mapping[str, Any]) -> None:
    """Refuse what is given for each token, and virtual ones have none of.

    Raises:
        EngineError: so much is given (Longformer's classifiers say which tokens attend to all).
    """
    size = given_tokens(kwargs).shape[:2]
    others = [
        name
        for name, value in kwargs.items()
        if isinstance(value, Tensor)
        and value.shape[:2] == size
        and name not in _INSERTED
        # Of another stack, of layers and heads, or for a loss.
        and not name.startswith("encoder_")
        and name != "labels"
        and not name.endswith("head_mask")
    ]
    if others:
        raise EngineError(
            f"{', '.join(others)} for each token, and an input prompt, whose virtual tokens have none",
            f"nothing for each token but {', '.join(_INSERTED)}",
            "use a prefix, or another model",
        )


def check_onward(positions: Tensor, mask: Tensor | None) -> None:
    """Refuse positions of several dimensions that a prompt in front would not move all alike.

    Raises:
        EngineError: in the first of them some token stands before the one in front of it (HunYuan-VL's images do, and
            texts in a row that is packed).
    """
    if positions.ndim < 3:
        return
    back = (positions[0].diff(dim=-1) < 0) & _pairs(positions, mask)
    if torch.compiler.is_compiling():  # a graph has no words for it
        torch._assert_async(~back.any(), "positions that go back")
    elif bool(back.any()):
        raise EngineError(
            f"positions of {len(positions)} dimensions that go back within a row: of an image that is placed by "
            "itself, or of several texts",
            "positions that go on from token to token, all of which a prompt in front moves alike",
            "an input prompt, and no position_ids, so that the model makes its own; generate passes some",
        )


def _pairs(positions: Tensor, mask: Tensor | None) -> Tensor:
    """Of which tokens [B or 1, T - 1] both they and the one in front are real."""
    length = positions.shape[-1]
    if mask is None:
        return torch.ones(1, length - 1, dtype=torch.bool, device=positions.device)
    real = mask[:, -length:] != 0
    return real[:, 1:] & real[:, :-1]


def _ready_made() -> EngineError:
    return EngineError(
        "the attention mask came ready-made, with an input prompt attached",
        "a mask of shape [B, T], or none",
        "pass the tokens' own mask, and use a cache that grows",
    )


def _check_no_pads_ahead(stack: Any, mask: Tensor) -> None:
    if not torch.compiler.is_compiling() and bool(left_pads(mask).any()):
        raise EngineError(
            f"rows padded on the left, with an input prompt, and {type(stack).__name__} finds pads by their token ids, "
            "which embeddings have not",
            "rows padded on the right, or not at all",
            "pad on the right, or run the rows one by one",
        )


def _kept_within(stack: Any) -> EngineError:
    return EngineError(
        f"use_cache=True, and {type(stack).__name__} takes no cache that a call could hand on (it keeps its own), and "
        "does not say which calls go on with a text that has the prompt",
        "calls that read the whole text",
        "use_cache=False",
    )


def _all_real(tokens: Tensor, past: int, vectors: Inserted) -> Tensor:
    """The mask [B, N] of these tokens, and of the real ones in a cache of this length, without pads."""
    real = tokens.shape[1] + max(past - vectors.length, 0)
    return torch.ones(tokens.shape[0], real, dtype=torch.long, device=tokens.device)


def _with_words(rows: Layout, placement: Placement, word: int, given: Mapping[str, Any]) -> dict[str, Tensor]:
    """What is given for each token, with a word of text in the place of each virtual token."""
    found, length = {}, rows.length
    for name, value in given.items():
        if not isinstance(value, Tensor):
            continue
        if name == "input_ids":
            found[name] = rows.insert(value, value.new_full((1, length), word))
        elif name == "inputs_embeds":  # the embedding of no token: images are found by that of theirs
            found[name] = rows.insert(value, value.new_zeros(1, length, value.shape[-1]))
        elif name.endswith("token_type_ids"):
            found[name] = rows.insert(value, value.new_zeros(1, length))
        elif name == "position_ids":
            found[name] = _with_positions(rows, int(placement == "after-first-token"), value)
    return found


def _with_positions(rows: Layout, ahead: int, positions: Tensor) -> Tensor:
    """Positions [..., B or 1, P + T] from those of the real tokens [..., B or 1, T], as many for each as M-RoPE has.

    A virtual token stands behind the one in front of it, in every dimension alike, as a word does. So many real ones
    are `ahead` of all.
    """
    each = positions.movedim((-2, -1), (0, 1))  # [B or 1, T, ...]
    more = [1] * (each.ndim - 2)
    lengths = rows.lengths.view(-1, 1, *more) if isinstance(rows.lengths, Tensor) else rows.lengths
    column = torch.arange(each.shape[1], device=each.device)
    behind = (column >= rows.front).view(-1, each.shape[1], *more)
    first = _take(each, (rows.front - ahead).clamp(max=each.shape[1] - 1)) + ahead
    virtual = first + torch.arange(rows.length, device=each.device).view(-1, *more)
    return rows.insert(torch.where(behind, each + lengths, each), virtual).movedim((0, 1), (-2, -1))


def given_tokens(kwargs: Mapping[str, Any]) -> Tensor:
    """The token ids [B, T], or their embeddings [B, T, H], whichever are given."""
    given: Tensor = kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
    return given


def _fill(vectors: Inserted, stack: Any, kwargs: dict[str, Any], past: int) -> None:
    """Put the vectors in the places of a template's virtual tokens, all of them in the first call of a text."""
    ids = kwargs.get("input_ids")
    if ids is None:
        raise EngineError(
            "'inputs_embeds' were given, and the prompt is a template, whose virtual tokens have no embedding",
            f"'input_ids' with {PLACEHOLDER} in the places of the virtual tokens",
            "fill the template (softbridge.template.Template.fill) and pass the token ids",
        )
    virtual = ids == PLACEHOLDER
    expected = 0 if past else vectors.lengths
    wrong = virtual.sum(-1, keepdim=True) != expected
    if torch.compiler.is_compiling():  # a graph has no words for it
        torch._assert_async(~wrong.any(), "the rows do not have the virtual tokens of the template")
    elif bool(wrong.any()):
        numbers = expected.flatten().tolist() if isinstance(expected, Tensor) else [expected]
        raise EngineError(
            f"rows with {', '.join(map(str, virtual.sum(-1).tolist()))} virtual tokens (token id {PLACEHOLDER})",
            f"{', '.join(map(str, numbers))} in each row" + (", as the cache holds the template" if past else ""),
            "fill the template (softbridge.template.Template.fill) for each row",
        )
    embedded = stack.get_input_embeddings()(ids.masked_fill(virtual, 0))
    every = vectors(embedded)
    filled = _take(every.expand(len(ids), -1, -1), (virtual.cumsum(-1) - 1).clamp(0, vectors.length - 1))
    kwargs["input_ids"], kwargs["inputs_embeds"] = None, torch.where(virtual[..., None], filled, embedded)


def position_table(stack: Any) -> nn.Module | None:
    """The module of a stack that counts positions from a cache's length, and would from any other number (BART's)."""
    table = getattr(stack, "embed_positions", None)
    counts = isinstance(table, nn.Module) and caches.length_argument(table.forward) is not None
    return table if counts else None


class Shift:
    """Lets a `position_table` count from elsewhere.

    Args:
        table: the module.
        places: by how many places all tokens are moved.
        off: says whether a call is to be left alone.
    """

    def __init__(self, table: nn.Module, places: int, off: Callable[[nn.Module], bool]) -> None:
        self.names = tuple(inspect.signature(table.forward).parameters)
        self.length = caches.length_argument(table.forward) or caches.LENGTHS[0]
        self.places = places
        self.off = off

    def before(
        self, table: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]]:
        """What the table is called with, moved."""
        if self.off(table):
            return args, kwargs
        kwargs = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"] + self.places
        else:
            kwargs[self.length] = kwargs.get(self.length, 0) + self.places
        return (), kwargs


def _padding_row(stack: nn.Module) -> int | None:
    """The row of the position embedding where padding tokens stand, whatever their place, or None (RoBERTa)."""
    tables = (module for name, module in stack.named_modules() if name.endswith("position_embeddings"))
    return max((row for table in tables if (row := getattr(table, "padding_idx", None)) is not None), default=None)


def _position_offset(stack: nn.Module) -> int:
    """The row of the position embedding for position 0: behind the padding tokens', or where the stack counts from."""
    row = _padding_row(stack)
    counted = (buffer for name, buffer in stack.named_buffers() if name.endswith("position_ids"))
    first = (int(buffer.flatten()[0]) for buffer in counted if buffer.numel() and not buffer.is_meta)
    return max(first, default=0) if row is None else row + 1
