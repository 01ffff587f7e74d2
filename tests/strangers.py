"""A standing trial on models that nobody chose: every text architecture that the installed transformers has.

Of each causal, encoder and encoder-decoder class a small model is built (see `tiny`), and an input prompt and a prefix
are run on it by the native engine. What they must come to is done by hand on the bare model: rows of embeddings with
the vectors in front, a cache that starts with the keys and values, and keys and values which the model itself made of a
text. Logits are compared without a mask, with one, and under sdpa; greedy tokens with a cache and without; rows padded
on the right and on the left with the same rows alone, as far as the bare model keeps that itself.

Each cell ends as one of

- ``right``: all that is judged agrees; what is refused at its use (left padding, a cache) is listed;
- ``refused``: an obstacle is told before anything runs;
- ``not compared``: no reference can be run by hand, or the bare model gives another answer each time;
- ``not buildable``: no small model can be built, with transformers' reason;
- ``WRONG``: something else is computed silently;
- ``CRASH``: an error that is not one of softbridge's own.

    python tests/strangers.py [--only REGEX] [--resume] [--write] [--verbose]

Each cell runs in a process of its own, within bounds of time and memory. Exit status 1 if anything is wrong or crashes.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import multiprocessing
import re
import resource
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, DynamicCache, EncoderDecoderCache
from transformers.models.auto import modeling_auto

import softbridge as sb
from softbridge.base import cache as caches
from softbridge.base import draw_weights
from softbridge.errors import SoftbridgeError
from softbridge.geometry import Geometry, Site, read_geometry
from softbridge.plugin.registry import engine_named
from softbridge.prompt import BaseId, KeyValue, KeyValuePrefix, Positions, SoftPrompt
from softbridge.testing import random_input_prompt, random_prefix
from softbridge.verification.probes import Probe
from softbridge.verification.run import find_float32_regions

#: Virtual and real tokens, and new ones.
P, T, NEW = 3, 7, 5
#: Relative to the largest logit: in float64; beside a float32 region in the model; where it knows no float64.
EXACT, FLOAT32, SINGLE = 1e-12, 1e-5, 1e-4
#: A prompt that moves no logit by this part of the largest shows nothing.
FELT = 1e-3
#: More parameters than this are not small.
LARGEST = 4_000_000
SECONDS, MEMORY = 90, 8 * 2**30
COUNTS = Path(__file__).with_name("strangers.json")
DOCUMENT = Path(__file__).with_name("STRANGERS.md")
#: Between these it shows the counts.
BEGIN, END = "<!-- strangers -->", "<!-- /strangers -->"
#: Of what is compared, that which is done by hand on the bare model; the rest is the prompt's own under other settings.
BY_HAND = ("forward", "forward, mask", "natural", "cached tokens", "uncached tokens")
RESULTS = Path(__file__).resolve().parent.parent / "build"

KINDS: Mapping[str, str] = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "classifier": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
}
OUTCOMES = ("right", "refused", "not compared", "not buildable", "elsewhere", "WRONG", "CRASH")


class Unbuildable(Exception):  # noqa: N818
    """No small model of the class can be built, or it computes nothing to compare."""


@dataclass
class Cell:
    """One architecture under one method.

    Attributes:
        kind: a key of `KINDS`.
        model_type: transformers' name of the family.
        model_class: of the model.
        method: ``prompt`` or ``prefix``.
        outcome: one of `OUTCOMES`.
        reason: why.
        figures: what was compared, and by how much it differs; or what else came of it.
        seconds: how long it took.
    """

    kind: str
    model_type: str
    model_class: str
    method: str
    outcome: str = ""
    reason: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.kind} {self.model_type} {self.method}"


def cells() -> Iterator[Cell]:
    """All of them. A decoder's classifier is its causal model under another head."""
    tables = {kind: getattr(modeling_auto, table) for kind, table in KINDS.items()}
    for kind, table in tables.items():
        for model_type, classes in table.items():
            if kind == "classifier" and (model_type in tables["causal"] and model_type not in tables["masked"]):
                continue
            name = classes if isinstance(classes, str) else classes[0]
            for method in ("prompt", "prefix"):
                yield Cell(kind, model_type, name, method)


# --- a small model ---------------------------------------------------------------------------------------------------


def build(kind: str, model_type: str, model_class: str) -> Any:
    """A small model of the class, in float64 (float32 where it knows no other), with large weights, in eager attention.

    Raises:
        Unbuildable: there is none.
    """
    try:
        plain = CONFIG_MAPPING[model_type]()
    except Exception as error:
        raise Unbuildable(f"no default configuration: {_told(error)}") from error
    more = dict(tiny.PARTICULAR.get(model_type, {}))
    encoders = {*modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, "bert-generation"}
    if kind == "causal" and model_type in encoders and "is_decoder" in vars(plain):
        more["is_decoder"] = True
    reasons = []
    for make in tiny.tiny_configs(plain, **more):
        for dtype in (torch.float64, torch.float32):
            try:
                return _model(make(), getattr(transformers, model_class), dtype)
            except Exception as error:
                reasons.append(_told(error))
    raise Unbuildable(reasons[0])


def _model(config: Any, model_class: Any, dtype: torch.dtype) -> Any:
    for one in _configs(config):
        one._attn_implementation = "eager"
        if hasattr(one, "_experts_implementation"):
            one._experts_implementation = "eager"  # grouped matrix products know no float64
    torch.manual_seed(0)
    model = model_class(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    if count > LARGEST:
        raise Unbuildable(f"{count:,} parameters are left of it")
    own = copy.deepcopy(model.state_dict())
    draw_weights(model, 0)
    model = model.to(dtype).eval()
    if not bool(torch.isfinite(_scores(model, **_text(model))).all()):  # states need eigenvalues of their own
        model.load_state_dict(own)
        if not bool(torch.isfinite(_scores(model, **_text(model))).all()):
            raise Unbuildable("its outputs are no numbers")
    if getattr(model, "generation_config", None) is not None:
        start = getattr(config, "decoder_start_token_id", None)
        model.generation_config = transformers.GenerationConfig(pad_token_id=0, decoder_start_token_id=start)
    return model


def _configs(config: Any) -> Iterator[Any]:
    yield config
    for value in vars(config).values():
        if isinstance(value, transformers.PretrainedConfig):
            yield from _configs(value)


def tokens(rows: int = 2, length: int = T, seed: int = 0) -> Tensor:
    """Token ids that mean nothing particular."""
    return torch.randint(8, 80, (rows, length), generator=torch.Generator().manual_seed(seed))


def _text(model: Any, ids: Tensor | None = None, **more: Any) -> dict[str, Any]:
    """What a model is called with for a text."""
    given: dict[str, Any] = {"input_ids": tokens() if ids is None else ids, **more}
    if model.config.is_encoder_decoder:
        rows, length = given["input_ids"].shape
        whole = "ForSequenceClassification" in type(model).__name__
        given["decoder_input_ids"] = tokens(rows, length if whole else 4, seed=9)
        if whole:  # where the text ends, the decoder's state is that of all
            given["input_ids"][:, -1] = model.config.eos_token_id
    return given


@torch.no_grad()
def _scores(model: Any, **given: Any) -> Tensor:
    """Logits [B, T, V] or [B, labels]."""
    output = model(**given)
    logits = getattr(output, "logits", None)
    if logits is None:
        logits = getattr(output, "prediction_logits", None)
    return logits if logits is not None else output[0]  # type: ignore[no-any-return]


# --- by hand ---------------------------------------------------------------------------------------------------------


class Hand:
    """What a prompt must come to, done on the bare model: its logits for a text, after `P` virtual tokens."""

    def __init__(self, model: Any, prompt: SoftPrompt) -> None:
        self.model = model
        self.prompt = prompt

    def scores(self, ids: Tensor, masked: bool, decoder: Tensor | None = None) -> Tensor:
        """Logits of the real tokens."""
        more: dict[str, Any] = {} if decoder is None else {"decoder_input_ids": decoder}
        if masked:
            more["attention_mask"] = torch.ones(len(ids), P + ids.shape[1], dtype=torch.long)
        return self._run(ids, more)

    def _run(self, ids: Tensor, more: dict[str, Any]) -> Tensor:
        raise NotImplementedError


class Rows(Hand):
    """An input prompt: rows of embeddings with the vectors in front."""

    def _run(self, ids: Tensor, more: dict[str, Any]) -> Tensor:
        found = _scores(self.model, inputs_embeds=self._embeds(ids), **more)
        return found[:, P:] if found.shape[1:2] == (P + ids.shape[1],) and found.ndim == 3 else found

    def _embeds(self, ids: Tensor) -> Tensor:
        vectors = torch.from_numpy(self.prompt.inputs[0].vectors)
        embedded = self.model.get_input_embeddings()(ids)
        return torch.cat([vectors.to(embedded)[None].expand(len(ids), -1, -1), embedded], dim=1)


class Seeded(Hand):
    """A prefix of a decoder: a cache that starts with it."""

    def __init__(self, model: Any, prompt: SoftPrompt) -> None:
        super().__init__(copy.deepcopy(model), prompt)  # some keep a state of what they read, and not in their cache
        self.like = next(model.parameters())
        shape = read_geometry(model.config).decoder
        self.stateful = shape is not None and (shape.stateful or not self._plain())

    def _plain(self) -> bool:
        """Whether the model reads a token into a cache of keys and values alone."""
        cache = caches.handed(self.model.forward, DynamicCache())
        try:
            _scores(copy.deepcopy(self.model), **_text(self.model, tokens(1, 1)), **cache, use_cache=True)
        except Exception:  # it asks its cache for more
            return self.model.config.is_encoder_decoder
        return True

    def _run(self, ids: Tensor, more: dict[str, Any]) -> Tensor:
        cache: Any = self._cache(len(ids))
        if "decoder_input_ids" in more:
            cache, length = EncoderDecoderCache(cache, DynamicCache()), more["decoder_input_ids"].shape[1]
            more["decoder_attention_mask"] = torch.ones(len(ids), P + length, dtype=torch.long)
            more["attention_mask"] = torch.ones_like(ids)
        # PEFT gives a mask, too; some models make a wrong one for a cache that begins in mid-text.
        more.setdefault("attention_mask", torch.ones(len(ids), P + ids.shape[1], dtype=torch.long))
        if self.stateful:
            return self._one_by_one(ids, cache)
        return _scores(self.model, input_ids=ids, **caches.handed(self.model.forward, cache), use_cache=True, **more)

    def _one_by_one(self, ids: Tensor, cache: Any) -> Tensor:
        """Token by token: some models that keep states go on from their cache in no other way."""
        if self.apart > FLOAT32:
            raise ArithmeticError(f"the bare model reads on token by token otherwise than at once, by {self.apart:.1e}")
        return self._read(copy.deepcopy(self.model), ids, cache, P)

    @cached_property
    def apart(self) -> float:
        """How far what the bare model reads on, token by token, is from what it reads at once."""
        ids = tokens()
        whole = _scores(copy.deepcopy(self.model), input_ids=ids)
        return min(_difference(whole[:, begun:], self._reads_on(ids, begun)) for begun in (0, P))

    def _reads_on(self, ids: Tensor, begun: int) -> Tensor:
        """The bare model's own scores of the tokens behind so many."""
        model, empty = copy.deepcopy(self.model), caches.empty(copy.deepcopy(self.model), len(ids))
        if begun:
            _scores(model, input_ids=ids[:, :begun], use_cache=True, **caches.handed(model.forward, empty))
        return self._read(model, ids[:, begun:], empty, begun)

    def _read(self, model: Any, ids: Tensor, cache: Any, held: int) -> Tensor:
        """The scores of tokens behind so many in the cache."""
        found = []
        takes = inspect.signature(model.forward).parameters
        for at in range(ids.shape[1]):
            place = torch.tensor([held + at])  # not all count what a cache of their own kind holds
            told = {"position_ids": place[None], "cache_position": place}
            more = {name: value for name, value in told.items() if name in takes}
            more["attention_mask"] = torch.ones(len(ids), held + at + 1, dtype=torch.long)
            more |= caches.handed(model.forward, cache)
            found.append(_scores(model, input_ids=ids[:, at : at + 1], use_cache=True, **more))
        return torch.cat(found, 1)

    def _cache(self, rows: int) -> Any:
        """A cache with the prefix; of the model's own kind, where it keeps more of a text than keys and values."""
        cache, like = caches.empty(copy.deepcopy(self.model), rows) if self.stateful else DynamicCache(), self.like
        for layer, pair in self.prompt.prefixes[0].layers.items():
            numbers = (
                torch.from_numpy(part).to(like)[None].expand(rows, -1, -1, -1) for part in (pair.keys, pair.values)
            )
            cache.update(*numbers, layer)
        return cache


class Overwritten(Hand):
    """A prefix of an encoder: the keys and values of as many tokens in front, overwritten in every layer.

    Real tokens then stand behind them wherever the model itself has them. What these tokens are must be no matter.
    """

    def _run(self, ids: Tensor, more: dict[str, Any]) -> Tensor:
        try:
            return self._twice(ids, more, self._front)
        except ArithmeticError:  # a head that takes the first state for all
            return self._twice(ids, more, self._last)

    def _twice(self, ids: Tensor, more: dict[str, Any], run: Callable[..., Tensor]) -> Tensor:
        one, other = (run(ids, tokens(len(ids), P, seed), more) for seed in (5, 6))
        if _difference(one, other) > FLOAT32:
            raise ArithmeticError("the tokens in front show elsewhere than in keys and values")
        return one

    def _front(self, ids: Tensor, filler: Tensor, more: dict[str, Any]) -> Tensor:
        def joined(given: Tensor, ours: Tensor) -> Tensor:
            return torch.cat([ours, given[:, :, P:]], 2)

        found = self._overwritten(joined, input_ids=torch.cat([filler, ids], 1), **more)
        return found[:, P:] if found.ndim == 3 else found

    def _last(self, ids: Tensor, filler: Tensor, more: dict[str, Any]) -> Tensor:
        """The same with these tokens behind all, told that they stand in front."""

        def joined(given: Tensor, ours: Tensor) -> Tensor:
            return torch.cat([given[:, :, :-P], ours], 2)

        rows = (row for module in self.model.modules() if (row := _padding(module)) is not None)
        places = torch.arange(P + ids.shape[1])[None] + max(rows, default=-1) + 1
        more = {**more, "position_ids": places.roll(-P, 1).expand(len(ids), -1)}
        found = self._overwritten(joined, input_ids=torch.cat([ids, filler], 1), **more)
        return found[:, :-P] if found.ndim == 3 else found

    def _overwritten(self, joined: Callable[[Tensor, Tensor], Tensor], **given: Any) -> Tensor:
        pairs = list(self.prompt.prefixes[0].layers.values())

        def overwrite(number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            numbers = ((pairs[number].keys, key), (pairs[number].values, value))
            ours = (torch.from_numpy(part).to(like)[None].expand(len(like), -1, -1, -1) for part, like in numbers)
            keys, values = ours
            return joined(key, keys), joined(value, values)

        with heard(self.model, overwrite):
            return _scores(self.model, **given)


def _padding(module: torch.nn.Module) -> int | None:
    """The row of a table of positions that pads have, if there is one."""
    table = getattr(module, "position_embeddings", None)
    return getattr(table, "padding_idx", None)


def by_hand(method: str, geometry: Geometry) -> type[Hand]:
    """How a prompt of this method is run by hand."""
    if method == "prompt":
        return Rows
    return Overwritten if geometry.decoder is None else Seeded


def greedy(scores: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    """The next tokens [B, NEW], each from logits of all that was written so far."""
    for _ in range(NEW):
        ids = torch.cat([ids, scores(ids)[:, -1:].argmax(-1)], dim=1)
    return ids[:, -NEW:]


@torch.no_grad()
def generated(model: Any, given: Mapping[str, Any], cached: bool, logits: bool = False) -> Tensor:
    """What `generate` writes, greedily: [B, NEW]; or the logits that it writes it by: [B, NEW, V]."""
    settings = {"do_sample": False, "num_beams": 1, "max_new_tokens": NEW, "min_new_tokens": NEW, "use_cache": cached}
    found = model.generate(**given, **settings, return_dict_in_generate=True, output_logits=True)
    return torch.stack(found.logits, dim=1) if logits else found.sequences[:, -NEW:]


@contextmanager
def heard(
    model: Any, change: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The keys and values that eager attention is called with, in the order of the calls, and with which instead."""
    names = {type(m).__module__ for m in model.modules()}
    modules = [sys.modules[name] for name in names if hasattr(sys.modules.get(name), "eager_attention_forward")]
    before: list[tuple[Any, Any]] = [(module, module.eager_attention_forward) for module in modules]
    found: list[tuple[Tensor, Tensor]] = []

    def listen(function: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **more: Any) -> Any:
        found.append((key, value))
        if change is not None:
            key, value = change(len(found) - 1, key, value)
        return function(module, query, key, value, *args, **more)

    for module, function in before:
        module.eager_attention_forward = partial(listen, function)
    try:
        yield found
    finally:
        for module, function in before:
            module.eager_attention_forward = function


def natural(model: Any, geometry: Geometry, site: Site) -> tuple[SoftPrompt, Tensor, Tensor] | None:
    """A prefix that the model made of a text, the text behind it, and the logits of that, read after the other.

    The first tokens of a decoder know nothing of the others; of an encoder they do, and keys and values are those which
    they have in the whole text.
    """
    ids = tokens(1, P + T, seed=3)
    shape = geometry.site(site)
    if shape is None or (site == "encoder") != (geometry.decoder is None):
        return None
    with heard(model) as calls:
        expected = _scores(model, input_ids=ids)
    if len(calls) != len(shape.attending):
        return None
    layers = {}
    for number, (keys, values) in zip(shape.attending, calls, strict=True):
        sizes = [(part.shape[1], part.shape[3]) for part in (keys, values)]
        if sizes != [shape.shape(number)] * 2:
            return None
        layers[number] = KeyValue(*(part[0, :, :P].float().numpy() for part in (keys, values)))
    start: dict[Any, int] = {"encoder" if site == "encoder" else "decoder": P}
    prompt = SoftPrompt((KeyValuePrefix(site, layers),), Positions(start), BaseId(None, geometry))
    return prompt, ids[:, P:], expected[:, P:] if expected.ndim == 3 else expected


# --- the trial -------------------------------------------------------------------------------------------------------


class Judge:
    """Compares, and keeps what came of it."""

    def __init__(self, bound: float) -> None:
        self.bound = bound
        self.figures: dict[str, Any] = {}
        self.wrong: list[str] = []
        self.crashed: list[str] = []
        self.refused: list[str] = []

    @contextmanager
    def within(self, bound: float) -> Iterator[None]:
        """Judge by another bound."""
        before, self.bound = self.bound, bound
        try:
            yield
        finally:
            self.bound = before

    def close(self, name: str, expected: Callable[[], Tensor], found: Callable[[], Tensor]) -> None:
        """Whether two tensors agree. What cannot be run by hand is not judged, but must not crash either."""
        try:
            theirs = expected()
            if not bool(torch.isfinite(theirs).all()):
                raise ArithmeticError("no numbers")
        except Exception as error:
            theirs, why = None, _told(error)
        try:
            ours = found()
        except SoftbridgeError as error:
            self.refused.append(name)
            self.figures[name] = f"refused: {error.found}"
            return
        except Exception as error:
            self.crashed.append(name)
            self.figures[name] = f"CRASH: {_told(error)} at {_place(error)}"
            return
        if theirs is None:
            self.figures[name] = f"not judged: by hand {why}"
            return
        if theirs.shape != ours.shape:
            value: float = float("inf")
        elif theirs.is_floating_point():
            value = float((theirs - ours).abs().max() / theirs.abs().max())
        else:
            value = float((theirs != ours).sum())
        self.figures[name] = value
        if not value <= self.bound:
            self.wrong.append(name)


def _difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / one.abs().max().clamp(min=1e-30))


def padded(model: Any, ids: Tensor, pads: int, left: bool) -> tuple[Tensor, Tensor]:
    """Rows with so many pads, and the mask."""
    pad = getattr(model.config, "pad_token_id", None)
    zeros, ones = torch.zeros(len(ids), pads, dtype=torch.long), torch.ones_like(ids)
    filler = zeros + (pad if type(pad) is int and pad >= 0 else 0)
    order = (filler, ids) if left else (ids, filler)
    masks = (zeros, ones) if left else (ones, zeros)
    return torch.cat(order, 1), torch.cat(masks, 1)


def real(scores: Tensor, pads: int, left: bool, length: int) -> Tensor:
    """Of logits for padded tokens those of real ones."""
    if scores.ndim != 3 or scores.shape[1] != pads + length:
        return scores
    return scores[:, pads:] if left else scores[:, :length]


def run(cell: Cell, others: list[Cell]) -> None:
    """Fill the cells of one model in."""
    every = [cell, *others]

    def all_are(outcome: str, reason: str) -> None:
        for one in every:
            one.outcome, one.reason = outcome, reason

    try:
        plain = CONFIG_MAPPING[cell.model_type]()
        text = plain.is_encoder_decoder or plain.get_text_config() is plain
        if not text or (cell.kind == "seq2seq" and not plain.is_encoder_decoder):
            return all_are("elsewhere", "it reads images or sounds, too")
    except Exception:  # `build` says why
        pass
    try:
        model = build(cell.kind, cell.model_type, cell.model_class)
    except Unbuildable as error:
        return all_are("not buildable", str(error))
    bare, again = (_scores(model, **_text(model)) for _ in range(2))
    if not torch.equal(bare, again) and _difference(bare, again) > 1e-9:
        differ = _difference(bare, again)
        return all_are("not compared", f"run twice on the same text, the bare model differs by {differ:.1e}")
    bound = _bound(model)
    for one in every:
        began = time.process_time()
        try:
            _try(one, model, bare, bound)
        except Exception as error:
            one.outcome, one.reason = "CRASH", f"{_told(error)} at {_place(error)}"
        one.seconds = round(time.process_time() - began, 1)
    return None


def _try(cell: Cell, model: Any, bare: Tensor, bound: float) -> None:
    try:
        geometry = read_geometry(model.config)
        prompt = random_input_prompt(geometry, P) if cell.method == "prompt" else random_prefix(geometry, P)
        found = engine_named("native").obstacles(prompt, model)
    except SoftbridgeError as error:
        cell.outcome, cell.reason = "refused", f"geometry: {error.found}"
        return
    if found:
        cell.outcome = "refused"
        cell.reason = "; ".join(f"{obstacle.name}: {obstacle.reason}" for obstacle in found)
        return
    judge = Judge(bound)
    _compare(cell, model, geometry, prompt, bare, judge)
    cell.figures = judge.figures
    if judge.crashed:
        cell.outcome, cell.reason = "CRASH", ", ".join(judge.crashed)
        if judge.wrong:
            cell.reason += "; wrong: " + ", ".join(judge.wrong)
    elif judge.wrong:
        cell.outcome, cell.reason = "WRONG", ", ".join(judge.wrong)
    elif any(isinstance(judge.figures.get(name), float) for name in BY_HAND):
        cell.outcome, cell.reason = "right", "refused at its use: " * bool(judge.refused) + ", ".join(judge.refused)
    elif "forward" in judge.refused:
        cell.outcome, cell.reason = "refused", "at each use: " + str(judge.figures["forward"])
    else:
        cell.outcome, cell.reason = "not compared", "nothing could be run by hand"


def _bound(model: Any) -> float:
    if model.dtype != torch.float64:
        return SINGLE
    probe = Probe("alone", {name: value.numpy() for name, value in _text(model).items()}, np.ones((1, 1), bool))
    try:
        return FLOAT32 if find_float32_regions(model, probe) else EXACT
    except Exception:  # it has logits of another name
        return FLOAT32


def _compare(cell: Cell, model: Any, geometry: Geometry, prompt: SoftPrompt, bare: Tensor, judge: Judge) -> None:
    text, crossed = _text(model), geometry.is_encoder_decoder
    ids, decoder = text["input_ids"], text.get("decoder_input_ids")
    hand = by_hand(cell.method, geometry)(model, prompt)
    try:
        running = sb.attach(copy.deepcopy(model), prompt)
    except Exception as error:
        judge.crashed.append("attach")
        judge.figures["attach"] = f"CRASH: {_told(error)} at {_place(error)}"
        return
    ours = partial(_scores, running)
    for name, masked in (("forward", False), ("forward, mask", True)):
        mask = {"attention_mask": torch.ones_like(ids)} if masked else {}
        judge.close(name, partial(hand.scores, ids, masked, decoder), partial(ours, **text, **mask))
    try:
        felt = _difference(bare, hand.scores(ids, True, decoder))
    except Exception:  # then nothing is compared with it either
        felt = 1.0
    if felt < FELT:
        judge.figures["effect"] = f"not judged: by hand the prompt moves logits by {felt:.1e} only"
    if cell.method == "prefix" and not crossed:
        _naturally(model, geometry, judge)
    _sdpa(model, cell.method, prompt, text, judge)
    _pads(model, running, prompt, text, judge)
    if cell.kind in ("causal", "seq2seq"):
        _generation(model, running, prompt, hand, ids, crossed, judge)
    _table(model, running, judge)


def _naturally(model: Any, geometry: Geometry, judge: Judge) -> None:
    """With keys and values that the model itself made of the tokens in front."""
    try:
        made = natural(model, geometry, "encoder" if geometry.decoder is None else "self")
    except Exception as error:
        judge.figures["natural"] = f"not judged: {_told(error)}"
        return
    if made is None:
        return
    prompt, rest, expected = made
    try:
        own = _difference(expected, by_hand("prefix", geometry)(model, prompt).scores(rest, True))
    except Exception as error:
        judge.figures["natural"] = f"not judged: by hand {_told(error)}"
        return
    if not own <= max(judge.bound, FLOAT32):  # a text leaves more behind than keys and values
        judge.figures["natural"] = f"not judged: by hand it differs by {own:.1e}"
        return
    with judge.within(max(judge.bound, FLOAT32)):  # keys and values are stored in float32
        judge.close(
            "natural", lambda: expected, lambda: _scores(sb.attach(copy.deepcopy(model), prompt), input_ids=rest)
        )


def _sdpa(model: Any, method: str, prompt: SoftPrompt, text: Mapping[str, Any], judge: Judge) -> None:
    other = copy.deepcopy(model)
    try:
        other.set_attn_implementation("sdpa")
        expected = _scores(other, **text)
        if other.config._attn_implementation != "sdpa" or _difference(_scores(model, **text), expected) > judge.bound:
            return
    except Exception:  # it has none
        return
    if engine_named("native").obstacles(prompt, other):
        return
    ids, mask = text["input_ids"], torch.ones_like(text["input_ids"])
    hand = by_hand(method, read_geometry(model.config))
    if hand is Overwritten:  # it listens to eager attention
        eager = sb.attach(copy.deepcopy(model), prompt)
        expected_of = partial(_scores, eager, **text, attention_mask=mask)
    else:
        expected_of = partial(hand(copy.deepcopy(other), prompt).scores, ids, True, text.get("decoder_input_ids"))
    judge.close("sdpa", expected_of, lambda: _scores(sb.attach(other, prompt), **text, attention_mask=mask))


def _pads(model: Any, running: Any, prompt: SoftPrompt, text: Mapping[str, Any], judge: Judge) -> None:
    """Padded rows are the rows alone, wherever they are in the bare model."""
    ids, crossed = text["input_ids"], "decoder_input_ids" in text
    for name, left in (("right pads", False), ("left pads", True)):
        rows, mask = padded(model, ids, 2, left)

        def alone(of: Any) -> Tensor:
            return _scores(of, **{**text, "attention_mask": torch.ones_like(ids)})

        def among(of: Any, rows: Tensor = rows, mask: Tensor = mask, left: bool = left) -> Tensor:
            found = _scores(of, **{**text, "input_ids": rows, "attention_mask": mask})
            return found if crossed else real(found, 2, left, ids.shape[1])

        bare, ours, bound = model, running, judge.bound
        try:
            own = _difference(alone(bare), among(bare))
            if own != own:
                bare, ours, bound = _single(model, prompt)
                own = _difference(alone(bare), among(bare))
        except Exception as error:
            judge.figures[name] = f"not judged: the bare model {_told(error)}"
            continue
        if not own <= bound:
            judge.figures[name] = f"not judged: the bare model's own differ by {own:.1e}"
            continue
        with judge.within(bound):
            judge.close(name, lambda ours=ours: alone(ours), lambda among=among, ours=ours: among(ours))


def _single(model: Any, prompt: SoftPrompt) -> tuple[Any, Any, float]:
    """The model in float32, bare and with the prompt, and the bound.

    A softmax in float32 takes float64's lowest number for minus infinity, and a pad that sees nothing is no number.
    """
    bare = copy.deepcopy(model).float()
    return bare, sb.attach(copy.deepcopy(bare), prompt), SINGLE


def _generation(
    model: Any, running: Any, prompt: SoftPrompt, hand: Hand, ids: Tensor, crossed: bool, judge: Judge
) -> None:
    if not hasattr(model, "generate") or not model.can_generate():
        return
    mask = torch.ones_like(ids)
    start = torch.full((len(ids), 1), getattr(model.config, "decoder_start_token_id", None) or 0)
    given = {"input_ids": ids, "attention_mask": mask}

    def steps_of(of: Any) -> Callable[[Tensor], Tensor]:
        if crossed:
            return lambda answer: of(ids, answer)  # type: ignore[no-any-return]
        return lambda written: of(written, None)  # type: ignore[no-any-return]

    def plain(text: Tensor, decoder: Tensor | None) -> Tensor:
        more = {} if decoder is None else {"decoder_input_ids": decoder}
        return _scores(model, input_ids=text, attention_mask=torch.ones_like(text), **more)

    if crossed:
        given["decoder_start_token_id"] = int(start[0, 0])  # type: ignore[assignment]
    for name, cached in (("cached tokens", True), ("uncached tokens", False)):
        try:
            own = generated(model, given, cached)
            expected = greedy(steps_of(plain), start if crossed else ids)
        except Exception as error:
            judge.figures[name] = f"not judged: the bare model {_told(error)}"
            continue
        written = torch.cat([start if crossed else ids, expected[:, :-1]], dim=1)
        apart = _difference(steps_of(plain)(written)[:, -NEW:], generated(model, given, cached, True))
        if not torch.equal(own, expected) or apart > FLOAT32:  # tokens may agree by chance
            judge.figures[name] = f"not judged: the bare model's logits, token by token, differ by {apart:.1e}"
            continue
        steps = steps_of(lambda text, decoder: hand.scores(text, True, decoder))
        judge.close(
            name,
            partial(greedy, steps, start if crossed else ids),
            partial(generated, running, given, cached),
        )

    rows, mask = padded(model, ids, 2, True)
    left = {**given, "input_ids": rows, "attention_mask": mask}
    bound = judge.bound
    try:
        own = _difference(generated(model, given, True, True), generated(model, left, True, True))
        if own != own:
            model, running, bound = _single(model, prompt)
            own = _difference(generated(model, given, True, True), generated(model, left, True, True))
    except Exception as error:
        judge.figures["left-padded tokens"] = f"not judged: the bare model {_told(error)}"
        return
    if not own <= bound:
        judge.figures["left-padded tokens"] = f"not judged: the bare model's own logits differ by {own:.1e}"
        return
    with judge.within(bound):
        judge.close(
            "left-padded tokens",
            lambda: generated(running, given, True, True),
            lambda: generated(running, left, True, True),
        )


def _table(model: Any, running: Any, judge: Judge) -> None:
    """Texts that fit the model's table of positions, and do not with a prompt."""
    most = getattr(model.config, "max_position_embeddings", None)
    if type(most) is not int or not 8 < most <= 1024:
        return
    text = _text(model, tokens(1, most + 1))
    try:
        _scores(model, **text)
    except Exception:
        fitting = _text(model, tokens(1, most - 1))
        judge.close(
            "beyond the table",
            lambda: _scores(model, **fitting)[:, :1] * float("nan"),
            lambda: _scores(running, **fitting),
        )


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: " + " ".join(str(error).split())[:300]


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames[-3:]))


# --- each in a process of its own ------------------------------------------------------------------------------------


def _child(cells: list[Cell], connection: Any) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        run(cells[0], cells[1:])
    except BaseException as error:  # whatever it is, it is what came of the cells
        for cell in cells:
            cell.outcome, cell.reason = "CRASH", f"{_told(error)} at {_place(error)}"
    connection.send([asdict(cell) for cell in cells])


def tried(cells: list[Cell]) -> list[Cell]:
    """The cells of one model, filled in by a process of its own."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(cells, theirs))
    process.start()
    theirs.close()
    reason = f"not done within {SECONDS} s"
    try:
        done = [Cell(**cell) for cell in ours.recv()] if ours.poll(SECONDS) else []
    except EOFError:
        done, reason = [], "the process ended"
    if not done:
        done = [Cell(cell.kind, cell.model_type, cell.model_class, cell.method, "CRASH", reason) for cell in cells]
        process.kill()
    process.join()
    return done


def counts(done: list[Cell]) -> dict[str, dict[str, int]]:
    """For each kind and method, how many cells ended how."""
    found: dict[str, Counter[str]] = {}
    for cell in done:
        found.setdefault(f"{cell.kind}, {cell.method}", Counter())[cell.outcome] += 1
    return {
        name: {outcome: number[outcome] for outcome in OUTCOMES if number[outcome]} for name, number in found.items()
    }


def table(kept: Mapping[str, Mapping[str, Mapping[str, int]]]) -> str:
    """The counts of each version that was tried, as STRANGERS.md shows them."""
    if not kept:
        return "(no version was tried to the end yet)"
    lines = ["transformers | class, method | " + " | ".join(OUTCOMES), "---|---|" + "---|" * len(OUTCOMES)]
    for version, found in kept.items():
        for name, numbers in found.items():
            lines.append(" | ".join([version, name, *(str(numbers.get(outcome, 0)) for outcome in OUTCOMES)]))
    return "\n".join(lines)


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--only", default="", help="a pattern of 'kind model_type method'")
    arguments.add_argument("--resume", action="store_true", help="leave out what the last run has")
    arguments.add_argument("--write", action="store_true", help="write the counts that STRANGERS.md shows")
    arguments.add_argument("--verbose", action="store_true", help="show all figures")
    told = arguments.parse_args()
    transformers.logging.set_verbosity_error()
    version = transformers.__version__
    RESULTS.mkdir(exist_ok=True)
    results = RESULTS / f"strangers-{version}.jsonl"
    known: dict[str, Cell] = {}
    if told.resume and results.exists():
        known = {cell.name: cell for cell in (Cell(**json.loads(line)) for line in results.read_text().splitlines())}
    build("causal", "llama", "LlamaForCausalLM")  # what every process would import anew
    transformers.GenerationMixin, sb.attach, engine_named("native")
    done: list[Cell] = []
    chosen: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells():
        if re.search(told.only, cell.name):
            chosen.setdefault((cell.kind, cell.model_type), []).append(cell)
    with results.open("a" if told.resume or told.only else "w") as file:
        for group in chosen.values():
            if all(cell.name in known for cell in group):
                finished = [known[cell.name] for cell in group]
            else:
                finished = tried(group)
                file.writelines(json.dumps(asdict(cell)) + "\n" for cell in finished)
                file.flush()
            done += finished
            for cell in finished:
                print(f"{cell.name:48} {cell.outcome:14} {cell.reason}", flush=True)
                for name, figure in cell.figures.items() if told.verbose else ():
                    print(f"    {name:20} {figure:.1e}" if isinstance(figure, float) else f"    {name:20} {figure}")
    found = counts(done)
    print(f"\ntransformers {version}")
    for name, numbers in found.items():
        print(f"{name:22} " + ", ".join(f"{number} {outcome}" for outcome, number in numbers.items()))
    if told.write and not told.only:
        kept = json.loads(COUNTS.read_text()) if COUNTS.exists() else {}
        kept[version] = found
        kept = dict(sorted(kept.items()))
        COUNTS.write_text(json.dumps(kept, indent=1) + "\n")
        before, _, rest = DOCUMENT.read_text().partition(f"{BEGIN}\n")
        DOCUMENT.write_text(f"{before}{BEGIN}\n{table(kept)}\n{END}{rest.partition(END)[2]}")
    return int(any(cell.outcome in ("WRONG", "CRASH") for cell in done))


if __name__ == "__main__":
    sys.exit(main())
