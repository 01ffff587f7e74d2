"""What an engine is held to on a small copy: figures, each a comparison of two computations in float64.

These are the promises of `softbridge.contract` that concern running a prompt, and two more: that the prompt is felt,
and that the outputs are those which the bare copy computes by hand, through nothing but its own arguments. All but
these two are functions of a running model and its texts, so that the bare copy can be asked the same: what it does not
keep by itself nobody can.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from softbridge import contract
from softbridge.arrays import to_torch
from softbridge.base import cache as caches
from softbridge.base.build import fresh
from softbridge.contract import Figure
from softbridge.errors import SoftbridgeError
from softbridge.geometry import Geometry, Site
from softbridge.prompt.part import InputPrompt, KeyValuePrefix, Part
from softbridge.prompt.soft_prompt import SoftPrompt
from softbridge.template import PLACEHOLDER
from softbridge.verification.padding import LENGTHS, make_text, pad_text, pad_together

Inputs = Mapping[str, Tensor]

#: Where the virtual tokens of `softbridge.selfcheck.miniature.TEMPLATE` stand: so many, then one after a token.
_BEFORE = 2
#: How many tokens the first call of a caller's own loop has: a template's virtual tokens among them.
FIRST = 4
#: Names under which attention modules keep the projections of keys and of values.
_PROJECTIONS = (("k_proj", "v_proj"), ("key", "value"), ("k_lin", "v_lin"), ("k", "v"))


class NotTried(Exception):  # noqa: N818
    """Why something cannot be computed by hand, or asked of this model."""


def texts(model: Any, template: bool = False) -> list[dict[str, Tensor]]:
    """Texts [1, T] of several lengths, with the places of a template's virtual tokens if there is one."""
    found = [make_text(model, row) for row in range(len(LENGTHS))]
    return [_placed(text) for text in found] if template else found


def _placed(text: Inputs) -> dict[str, Tensor]:
    ids = text["input_ids"]
    virtual = ids.new_full((1, _BEFORE), PLACEHOLDER)
    ids = torch.cat([virtual, ids[:, :1], virtual[:, :1], ids[:, 1:]], dim=1)
    return {**text, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def scores(output: Any) -> Tensor:
    """What a model says: logits [B, T, V] or [B, classes], of spans [B, T, 2]; without a head, states [B, T, H]."""
    if getattr(output, "logits", None) is not None:
        found: Tensor = output.logits
    elif getattr(output, "start_logits", None) is not None:
        found = torch.stack((output.start_logits, output.end_logits), dim=-1)
    else:
        found = output[0]
    return found


def said(model: Any, inputs: Inputs) -> Tensor:
    """The `scores` of a text."""
    with torch.no_grad():
        return scores(model(**inputs))


def generates(model: Any, geometry: Geometry) -> bool:
    """Whether `generate` makes tokens with this model, from the past alone."""
    return geometry.decoder is not None and bool(model.can_generate()) and model.get_output_embeddings() is not None


# ----------------------------------------------------------------------------------- of a running model or a bare one


def right(model: Any, given: Sequence[Inputs]) -> Iterator[Figure]:
    """A row with pads on the right is the row alone."""
    return _padded(model, given[0], "right")


def left(model: Any, given: Sequence[Inputs]) -> Iterator[Figure]:
    """A row with pads on the left is the row alone."""
    return _padded(model, given[0], "left")


def left_generated(model: Any, given: Sequence[Inputs]) -> Iterator[Figure]:
    """What is generated from rows with pads on the left is what is generated from each alone."""
    if not model.config.is_encoder_decoder:  # an encoder is padded on the right, as its own tokenizer does
        alone = torch.cat([contract.generate(model, text) for text in given])
        together = contract.generate(model, pad_together(model, given, "left"))
        yield Figure("generated", float((together != alone).sum()), "same")


def _padded(model: Any, inputs: Inputs, side: str) -> Iterator[Figure]:
    expected = said(model, inputs)
    stacks = ("", "decoder_") if "decoder_input_ids" in inputs else ("",)
    for stack in stacks:
        found = said(model, {**inputs, **pad_text(model, inputs, stack, side)})
        if stack or (len(stacks) == 1 and found.ndim == 3):
            found = found[:, -expected.shape[1] :] if side == "left" else found[:, : expected.shape[1]]
        yield Figure(f"{stack}{side}", contract.distance(found, expected), "close")


def generation(model: Any, given: Sequence[Inputs]) -> Iterator[Figure]:
    """`generate` without a cache is greedy decoding by hand, which reads the whole text for each token."""
    by_hand = contract.greedy(model, given[0])
    found = contract.generate(model, given[0], use_cache=False)
    yield Figure("greedy, uncached", float((found != by_hand).sum()), "same")


def cache(model: Any, given: Sequence[Inputs]) -> Iterator[Figure]:
    """Decoding with a cache is decoding without, in a caller's own loop."""
    yield contract.token_by_token(model, given[0], FIRST)


def cache_generated(model: Any, given: Sequence[Inputs]) -> Iterator[Figure]:
    """What `generate` makes with a cache is greedy decoding by hand."""
    by_hand = contract.greedy(model, given[0])
    yield Figure("greedy", float((contract.generate(model, given[0]) != by_hand).sum()), "same")


# --------------------------------------------------------------------------------------------------------- by hand


def by_hand(bare: Any, geometry: Geometry, prompt: SoftPrompt, text: Inputs) -> Tensor:
    """What the bare copy says with the prompt, through its own arguments alone.

    Vectors are rows among those of `inputs_embeds`. The prefix of a decoder is what its cache holds before the first
    token. Elsewhere (encoders, cross-attention) it is what the projections of keys and values give for tokens in front
    whose own outputs nobody looks at.

    Returns:
        The scores of real tokens, as `said` of a running `view`.

    Raises:
        NotTried: it cannot be computed so.
    """
    if prompt.inputs and prompt.prefixes:
        raise NotTried("vectors and a prefix in one prompt are not computed by hand")
    if any(part.gated for part in prompt.prefixes):
        raise NotTried("a gate depends on what enters the layer, and no cache holds it")
    if prompt.adaptions:
        raise NotTried("no argument of the model takes vectors into a softmax of their own")
    if prompt.positions.relative_bias == "skewed" or prompt.positions.unbiased_from:
        raise NotTried("no model skews its relative bias by itself, or loses it")
    compute = _with_vectors if prompt.inputs else _with_prefixes
    try:
        with torch.no_grad():
            return compute(bare, geometry, prompt, text)
    except SoftbridgeError as error:
        raise NotTried(error.found) from error


def view(model: Any, geometry: Geometry, prompt: SoftPrompt) -> Any:
    """Whose scores `by_hand` gives: an encoder's own under a prefix, as a head may look at the first token, which by
    hand is a virtual one."""
    return model.base_model if geometry.decoder is None and prompt.prefixes else model


def _with_vectors(bare: Any, geometry: Geometry, prompt: SoftPrompt, text: Inputs) -> Tensor:
    given, embed, cut = dict(text), bare.get_input_embeddings(), 0
    for part in prompt.inputs:
        if part.entry == "after":
            raise NotTried("vectors behind the embedding block have no argument of the model")
        name = "decoder_input_ids" if geometry.is_encoder_decoder and part.stack == "decoder" else "input_ids"
        table = bare.get_decoder().get_input_embeddings() if name.startswith("decoder") else embed
        rows, length = _among(part, given.pop(name), table), given_length(part)
        given[name.replace("input_ids", "inputs_embeds")] = rows
        mask = name.replace("input_ids", "attention_mask")
        given[mask] = torch.ones(rows.shape[:2], dtype=torch.long)
        origin = prompt.positions.start[part.stack] - length
        if origin:
            if geometry.is_encoder_decoder or geometry.decoder is None:
                raise NotTried("its first token cannot be moved by hand: the model takes no position_ids")
            given |= _position_ids(bare, origin, rows.shape[1])
        if part.stack == "decoder" or not geometry.is_encoder_decoder:
            cut, placement = length, part.placement
    found = scores(bare(**given))
    if not cut or found.ndim < 3:
        return found
    front = int(placement == "after-first-token")
    return torch.cat([found[:, :front], found[:, front + cut :]], dim=1)


def given_length(part: InputPrompt) -> int:
    """How many virtual tokens are added to those that the text already holds."""
    return 0 if part.template is not None else part.length


def _among(part: InputPrompt, ids: Tensor, table: nn.Module) -> Tensor:
    """The embeddings of a text [1, T] with the vectors in their places: [1, P + T, H]."""
    vectors = to_torch(part.vectors)[None]
    if part.template is not None:
        embedded: Tensor = table(ids.clamp(min=0))
        embedded[0, ids[0] == PLACEHOLDER] = vectors[0].to(embedded.dtype)
        return embedded
    embedded = table(ids)
    front = int(part.placement == "after-first-token")
    return torch.cat([embedded[:, :front], vectors.to(embedded.dtype), embedded[:, front:]], dim=1)


def _position_ids(model: Any, first: int, count: int) -> dict[str, Tensor]:
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise NotTried("its first token cannot be moved by hand: the model takes no position_ids")
    first += _row(model, make_text(model, 0))
    return {"position_ids": torch.arange(first, first + count)[None]}


def _row(model: Any, text: Inputs) -> int:
    """The position id of a token that stands at 0: its row of a table, the first of which may be for pads."""
    expected, columns = said(model, text), torch.arange(text["input_ids"].shape[1])[None]
    for row in range(4):
        found = said(model, {**text, "position_ids": columns + row})
        if contract.distance(found, expected) <= contract.CLOSE_TO_FLOAT32:
            return row
    raise NotTried("with position_ids, the bare model computes something else than when it counts its tokens")


def _with_prefixes(bare: Any, geometry: Geometry, prompt: SoftPrompt, text: Inputs) -> Tensor:
    if geometry.is_encoder_decoder:
        return _crossed(bare, geometry, prompt, text)
    (part,) = prompt.prefixes
    start = prompt.positions.start[_stack(part)]
    if part.site == "encoder":
        return _in_encoder(bare.base_model, geometry, part, start, text)
    _check_window(geometry, prompt, text["input_ids"].shape[1])
    ids = text["input_ids"]
    given: dict[str, Any] = {**text, "attention_mask": torch.ones(1, part.length + ids.shape[1], dtype=torch.long)}
    if start != part.length or "position_ids" in inspect.signature(bare.forward).parameters:
        given |= _position_ids(bare, start, ids.shape[1])
    if geometry.decoder is not None and geometry.decoder.stateful:
        return _one_by_one(bare, geometry, part, start, text)
    given |= caches.handed(bare.forward, _seeded(bare, part, geometry))
    if bare.config.get_text_config() is not bare.config:
        _check_continues(bare, text, "position_ids" in given)
    return scores(bare(**given))


def _one_by_one(bare: Any, geometry: Geometry, part: KeyValuePrefix, start: int, text: Inputs) -> Tensor:
    """The scores of a text behind a prefix in the cache of a hybrid model, whose states have read nothing.

    Token by token: on older transformers some hybrid models go on from a cache in no other way.
    """
    ids, takes = text["input_ids"], inspect.signature(bare.forward).parameters

    def read(cache: Any, rest: Tensor, held: int, first: int) -> Tensor:
        found, model = [], fresh(bare)  # some keep the state of what they read in their layers, and not in their cache
        for at in range(rest.shape[1]):
            mask = torch.ones(1, held + at + 1, dtype=torch.long)
            given: dict[str, Any] = {"input_ids": rest[:, at : at + 1], "attention_mask": mask}
            if first != held or "position_ids" in takes:
                given |= _position_ids(bare, first + at, 1)
            if "cache_position" in takes:
                given["cache_position"] = torch.tensor([held + at])
            found.append(scores(model(**given, **caches.handed(model.forward, cache), use_cache=True)))
        return torch.cat(found, dim=1)

    whole = scores(fresh(bare)(**text))
    if contract.distance(read(caches.empty(fresh(bare), 1), ids, 0, 0), whole) > contract.CLOSE_TO_FLOAT32:
        raise NotTried("the bare model reads a text token by token in another way than as a whole")
    return read(_seeded(bare, part, geometry), ids, part.length, start)


def _check_continues(bare: Any, text: Inputs, passed: bool) -> None:
    """A filled cache says nothing of a model that makes masks and positions of its own for the first call of a text.

    PaliGemma does: there its words see those behind them, and its positions begin with 1.
    """
    ids, begun = text["input_ids"], text["input_ids"].shape[1] // 2
    rest: dict[str, Any] = {"input_ids": ids[:, begun:], "attention_mask": torch.ones_like(ids)}
    if passed:
        rest |= _position_ids(bare, begun, ids.shape[1] - begun)
    first = bare(input_ids=ids[:, :begun], attention_mask=torch.ones_like(ids[:, :begun]), use_cache=True)
    on = scores(bare(**rest, **caches.handed(bare.forward, caches.of(first))))
    whole = scores(bare(**text))
    if contract.distance(on, whole[:, begun:]) > contract.CLOSE_TO_FLOAT32:
        raise NotTried("the bare model reads on from a cache in another way than it reads a text as a whole")


def _check_window(geometry: Geometry, prompt: SoftPrompt, length: int) -> None:
    """A cache's content slides out of a window, and is counted as it lies."""
    shape = geometry.decoder
    if shape is None or shape.window is None:
        return
    counted, window = prompt.counted()["decoder"], prompt.positions.window
    if (window == "pinned" or prompt.positions.start["decoder"] != counted) and counted + length > shape.window:
        raise NotTried("a text beyond the window, which a cache does not slide out of as this prefix does")


def _stack(part: KeyValuePrefix) -> Any:
    return "encoder" if part.site == "encoder" else "decoder"


def _seeded(bare: Any, part: KeyValuePrefix, geometry: Geometry) -> Any:
    from transformers import DynamicCache

    shape = geometry.site(part.site)
    if shape is None or set(part.layers) != set(shape.attending):
        raise NotTried("a cache holds as many tokens in each layer, and some have no prefix")
    cache = caches.empty(fresh(bare), 1) if shape.stateful else DynamicCache()
    for layer, pair in part.layers.items():
        cache.update(to_torch(pair.keys)[None], to_torch(pair.values)[None], layer)
    return cache


def _crossed(bare: Any, geometry: Geometry, prompt: SoftPrompt, text: Inputs) -> Tensor:
    from transformers import DynamicCache, EncoderDecoderCache
    from transformers.modeling_outputs import BaseModelOutput

    own, encoder, cross = (prompt.prefix(site) for site in _SITES)
    given: dict[str, Any] = {"decoder_input_ids": text["decoder_input_ids"]}
    ids, start = text["input_ids"], prompt.positions.start
    if encoder is None:
        states = bare.get_encoder()(input_ids=ids, attention_mask=text["attention_mask"])[0]
    else:
        states = _in_encoder(bare.get_encoder(), geometry, encoder, start["encoder"], text)
    handles = []
    if cross is not None:
        handles = _replace(bare.get_decoder(), geometry, cross)
        states = torch.cat([states.new_zeros(1, cross.length, states.shape[-1]), states], dim=1)
    if own is not None:
        if start["decoder"] != own.length:
            raise NotTried("its first token cannot be moved by hand: the model takes no position_ids")
        seeded = EncoderDecoderCache(_seeded(bare, own, geometry), DynamicCache())
        given |= caches.handed(bare.forward, seeded)
    given["encoder_outputs"] = BaseModelOutput(last_hidden_state=states)
    given["attention_mask"] = torch.ones(states.shape[:2], dtype=torch.long)
    try:
        return scores(bare(**given))
    finally:
        for handle in handles:
            handle.remove()


_SITES: tuple[Site, ...] = ("self", "encoder", "cross")


def _in_encoder(stack: nn.Module, geometry: Geometry, part: KeyValuePrefix, start: int, text: Inputs) -> Tensor:
    """The states of a text [1, T, H] in an encoder behind P tokens whose keys and values are the prefix."""
    if start != part.length:
        raise NotTried("its first token cannot be moved by hand: the model takes no position_ids")
    ids = text["input_ids"]
    length = part.length + ids.shape[1]
    given = {"attention_mask": torch.ones(1, length, dtype=torch.long)}
    if "position_ids" in inspect.signature(stack.forward).parameters:
        # Where keys are rotated, those at 0 are not, as those of a prefix.
        plain = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        given["position_ids"] = torch.arange(length)[None] + _row(stack, plain)
        given["position_ids"][:, : part.length] = given["position_ids"][:, :1].clone()
    handles = _replace(stack, geometry, part)
    try:
        one, other = (
            stack(input_ids=torch.cat([filler.expand(-1, part.length), ids], dim=1), **given)[0][:, part.length :]
            for filler in (ids[:, :1], ids[:, 1:2])
        )
    finally:
        for handle in handles:
            handle.remove()
    if contract.distance(one, other) > contract.CLOSE_TO_FLOAT32:
        raise NotTried("what tokens stand in front shows elsewhere than in keys and values")
    found: Tensor = one
    return found


def _replace(stack: nn.Module, geometry: Geometry, part: Part) -> list[Any]:
    """Let the projections of keys and values give the prefix for the first P tokens."""
    if not isinstance(part, KeyValuePrefix):
        return []
    pairs = _projections(stack)
    if geometry.is_encoder_decoder and part.site != "encoder":
        pairs = pairs[part.site == "cross" :: 2]
    shape = geometry.site(part.site)
    if shape is None or len(pairs) != shape.layers or set(part.layers) != set(range(shape.layers)):
        raise NotTried("the projections of its keys and values were not found, one of each in a layer")
    handles = []
    for pair, modules in zip(part.layers.values(), pairs, strict=True):
        for module, numbers in zip(modules, (pair.keys, pair.values), strict=True):
            rows = to_torch(numbers).transpose(0, 1).flatten(1)  # [P, K·D]

            def instead(module: Any, args: Any, output: Tensor, rows: Tensor = rows) -> Tensor:
                return torch.cat([rows[None].to(output.dtype), output[:, len(rows) :]], dim=1)

            handles.append(module.register_forward_hook(instead))
    return handles


def _projections(stack: nn.Module) -> list[tuple[nn.Linear, nn.Linear]]:
    found = []
    for module in stack.modules():
        for names in _PROJECTIONS:
            pair = [getattr(module, name, None) for name in names]
            if all(isinstance(one, nn.Linear) for one in pair):
                found.append((pair[0], pair[1]))
                break
    return found  # type: ignore[return-value]
