"""An input prompt in one stack of the model: what happens before and after the stack runs.

Hooks put the virtual tokens into the sequence, pass the real ones' position_ids, and take the virtual ones out of
the last hidden state. What is built on the stack - heads, losses, `generate`, trainers - therefore never meets a
virtual token: logits and labels keep their length, and the loss is the model's own. Where the vectors enter after the
embedding block, that block never meets one either. The virtual tokens of a template have places in the caller's own
rows: there the vectors are put, and nothing else changes.

A stack inside a model of several modalities gets embeddings, in which images are, and often positions and masks that
were made of the whole sequence: positions of three dimensions, masks that let the tokens of an image see each other.
There the model around the stack is given a word of text in the place of each virtual token, and the stack then gets the
vectors: so all that the model makes is what it makes of so many words more.

The file is longer than others because the hooks of one stack share what is known of a call (`Call`), in the order in
which the model runs them: they read as one text.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from softbridge.arrays import from_torch, to_torch
from softbridge.base import cache as caches
from softbridge.errors import EngineError
from softbridge.geometry import Site, Stack
from softbridge.prompt import InputPrompt, Placement
from softbridge_native import tables
from softbridge_native.anatomy import padding_row, position_offset, takes_embeddings
from softbridge_native.cache_view import READ, begin, check_begun, check_foreign, full_length, hide, hides, running
from softbridge_native.call import Entry as Opened
from softbridge_native.call import Own
from softbridge_native.call_checks import (
    all_real,
    check_no_pads_ahead,
    check_onward,
    check_others,
    check_unpacked,
    kept_within,
    ready_made,
)
from softbridge_native.layout import (
    Inserted,
    Layout,
    counted,
    extended,
    filled,
    given_tokens,
    layout,
    left_pads,
    places_of,
    take,
)
from softbridge_native.parameterisation import Making

if TYPE_CHECKING:
    from softbridge_native.cache_prefix import Seed


class Used:
    """The vectors [P, H] that a parameterisation made for the running call, or None."""

    def __init__(self) -> None:
        self.vectors: Tensor | None = None


class Vectors(nn.Module):
    """An input prompt: vectors [P, H], a parameter, or what a parameterisation made (see `parameterisation.Made`)."""

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
        """The part as it is now; what a parameterisation makes, as it was given."""
        return replace(part, vectors=from_torch(self.vectors)) if isinstance(self.vectors, nn.Parameter) else part

    @property
    def device(self) -> torch.device:
        return self.vectors.device


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
        knows_pads: whether the stack finds pads by their token ids, and is passed no position_ids.
        prefixed: whether attention has prefixes, which caches do not hold.
        keep: lets a cache keep them for the running call; see `joined_cache`.
    """

    implementation: str | None
    keeps: bool
    pools: bool
    shows: Callable[[], bool]
    off: Callable[[nn.Module], bool]
    owner: str
    word: int
    counts_pads: bool = False
    knows_pads: bool = False
    prefixed: bool = False
    keep: Callable[[Any], None] = lambda cache: None


@dataclass(frozen=True, eq=False)
class Outer:
    """The arguments of the model around a stack, from which it makes the arguments of the stack.

    Attributes:
        mask: of the real tokens [B, N], or None.
        layout: where the virtual tokens stand among them, or None: they are in the cache, or the row has none.
        passed: whether it was passed position_ids, and makes none itself.
        cache: its cache, or None.
    """

    mask: Tensor | None
    layout: Layout | None
    passed: bool
    cache: Any


class Call:
    """The running call of a stack.

    Attributes:
        vectors: its input prompt, or None.
        start: where its first real token stands, in each row [B, 1] or in all; see `Positions`.
        layout: where the virtual tokens stand that were put into its sequence, or None.
        places: those of a template's virtual tokens [B, T], if the word embedding has to fill them, or None.
        width: P + T.
        cache: its cache, or None.
        outer: what the model around it was called with, if there is one, until the stack runs.
    """

    def __init__(self) -> None:
        self.outer: Outer | None = None
        self.vectors: Inserted | None = None
        self.start: int | Tensor = 0
        self.layout: Layout | None = None
        self.places: Tensor | None = None
        self.width = 0
        self.cache: Any = None


class StackHooks:
    """What happens before and after one stack of the model, and its embedding block, run.

    Args:
        stack: the module.
        around: of the model around it.
        vectors: its input prompt, or None.
        start: where its first real token stands; see `Positions`.
        making: what a parameterisation makes for this stack, or None.
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
        self.offset = position_offset(stack)
        self.padding = padding_row(stack)
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
        passed, past = kwargs.get("position_ids") is not None, full_length(cache)
        call = self.call.now
        call.outer = Outer(plain, None, passed, cache)
        vectors, _ = self.chosen(tokens)
        if vectors is None:
            return (), kwargs
        if mask is not plain:
            raise ready_made()
        check_begun(cache, self.around.owner, past)
        check_unpacked(kwargs, plain)
        if plain is None and isinstance(vectors.lengths, Tensor):
            plain = all_real(tokens, past, vectors)
        rows = layout(vectors, plain)
        if plain is not None:
            kwargs["attention_mask"] = extended(vectors, plain)
        if past == 0:
            call.outer = Outer(plain, rows, passed, cache)
            if passed:
                check_onward(kwargs["position_ids"], plain)
            kwargs.update(_with_words(rows, vectors.placement, self.around.word, kwargs))
            hide(cache, rows.length, self.around.owner)
        elif passed:
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
        """Put the virtual tokens into the sequence, and pass position_ids for the real ones."""
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
        call.layout = call.places = call.cache = None
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
        passed = outer is not None and kwargs.get("position_ids") is not None
        positions = self._positions(kwargs, plain, past, passed)
        if positions is not None:
            kwargs["position_ids"] = positions
        self._within(stack, kwargs, plain, past)
        if self.seed is not None:
            check_begun(cache, self.around.owner, past)
            self.seed.plant(stack, kwargs, plain, past, self.around.owner)
        if call.vectors is not None and self.around.knows_pads and plain is not None:
            check_no_pads_ahead(stack, plain)
        if call.vectors is not None and call.vectors.placement == "template":
            self._fill(call, stack, kwargs, past)
        elif call.vectors is not None and outer is not None:
            if outer.layout is not None:
                call.layout = outer.layout
                hide(cache, call.vectors.length, self.around.owner)
                self._insert(call, outer.layout, stack, kwargs, None if passed else positions)
        elif call.vectors is not None:
            if mask is not plain:
                raise ready_made()
            if self.cache_name is None and kwargs.get("use_cache"):
                raise kept_within(stack)
            check_begun(cache, self.around.owner, past)
            check_unpacked(kwargs, plain)
            counted_without = kwargs.pop("cache_position", None)
            if plain is None and isinstance(call.vectors.lengths, Tensor):
                plain = all_real(given_tokens(kwargs), past, call.vectors)
            if plain is not None:
                kwargs["attention_mask"] = extended(call.vectors, plain)
            if past == 0:
                call.layout = rows = layout(call.vectors, plain)
                hide(cache, call.vectors.length, self.around.owner)
                check_others(kwargs)
                self._insert(call, rows, stack, kwargs, positions)
            if counted_without is not None:  # not every model counts its cache by itself
                length = given_tokens(kwargs).shape[1]
                kwargs["cache_position"] = torch.arange(past, past + length, device=counted_without.device)
        call.cache = caches.given(kwargs)
        if self.around.prefixed and not torch.compiler.is_compiling():
            begin(call.cache, self.around.owner, past)
            self.around.keep(call.cache)
        if hides(call.cache):
            running(call.cache, True)
            vars(call.cache)[READ] = past + given_tokens(kwargs).shape[1]
        self.entry.now.open = True
        return (), kwargs

    def after(self, stack: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Take the virtual tokens out of the hidden states; and forget the call, also one that failed (None)."""
        self.entry.now.open = False
        if self.making is not None:
            self.making.leave()
        call = self.call.now
        layout, vectors, cache = call.layout, call.vectors, call.cache
        call.layout = call.places = call.vectors = call.cache = None
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
            vars(made)[READ] = call.width
        if self.around.keeps or self.around.shows():
            return output
        pooled = self.around.pools and vectors.placement == "before-sequence"
        return _without_virtual(output, layout, call.width, pooled)

    def embedded(self, embedding: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Give a stack that takes token ids alone the vectors of a template."""
        output, call = self._gathered(embedding, output), self.call.now
        return output if call.vectors is None or call.places is None else filled(call.vectors, call.places, output)

    def _gathered(self, embedding: nn.Module, output: Tensor) -> Tensor:
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
        if mask is not None and mask.shape[1] + vectors.length == states.shape[1]:
            kwargs["encoder_attention_mask"] = extended(vectors, mask)
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
        if mask is not None and self.around.counts_pads and not outer.passed:
            kwargs["position_ids"] = (positions - left_pads(mask)).clamp(min=0)
        moved = self._moved(True)
        if not isinstance(moved, int) or moved != 0:
            check_onward(positions, mask)

    def _moved(self, passed: bool) -> int | Tensor:
        """By how many places given positions are moved; see `_positions`."""
        call = self.call.now
        return call.start - (call.vectors.counted if passed and call.vectors is not None else 0)

    def _positions(self, kwargs: Mapping[str, Any], mask: Tensor | None, past: int, passed: bool) -> Tensor | None:
        """Where the real tokens stand, [B or 1, T]; None if the model would say the same, or takes no position_ids.

        Positions that a model around has `passed` count the virtual tokens of an input prompt, and are of those, too.
        """
        given, call = kwargs.get("position_ids"), self.call.now
        if given is not None:
            moved = self._moved(passed)
            return given if isinstance(moved, int) and moved == 0 else given + moved  # type: ignore[no-any-return]
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
        passed = mask if "position_ids" in self.names and not self.counts_pads else None
        tables.check(stack, self.reach, count, self.call.now.start, passed)

    def _virtual(self, past: int) -> tuple[int, int | Tensor]:
        """How many virtual tokens are in a cache of this length, and how many the model counts by itself."""
        call = self.call.now
        if self.seed is not None:
            return self.seed.length if past else 0, self.seed.length
        if call.vectors is None:
            return 0, 0
        cached = call.vectors.length if past and call.vectors.placement != "template" else 0
        return cached, cached or call.vectors.counted

    def _fill(self, call: Call, stack: Any, kwargs: dict[str, Any], past: int) -> None:
        """Put the vectors in the places of a template's virtual tokens.

        A stack that takes token ids alone (CLIP's) is given a word of text there, and its word embedding gives it the
        vectors: see `embedded`.
        """
        assert call.vectors is not None
        places = places_of(call.vectors, kwargs, past)
        words = kwargs["input_ids"].masked_fill(places, self.around.word)
        if takes_embeddings(stack):
            embedded = stack.get_input_embeddings()(words)
            kwargs["input_ids"], kwargs["inputs_embeds"] = None, filled(call.vectors, places, embedded)
        else:
            kwargs["input_ids"], call.places = words, places

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
    first = take(each, (rows.front - ahead).clamp(max=each.shape[1] - 1)) + ahead
    virtual = first + torch.arange(rows.length, device=each.device).view(-1, *more)
    return rows.insert(torch.where(behind, each + lengths, each), virtual).movedim((0, 1), (-2, -1))


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
