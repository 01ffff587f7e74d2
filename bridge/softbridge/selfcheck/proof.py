"""How a verdict comes about: a copy is built, a prompt is attached to it, and the promises are asked one by one.

All of it happens in a thread of its own, which has none of the caller's modes (autocast, a default device, a graph that
is being traced), and leaves what all threads share as it was: random numbers, the default precision, warnings.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import math
import random
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import cache as once
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

import softbridge
from softbridge import contract
from softbridge.arrays import Array
from softbridge.base.build import fresh
from softbridge.contract import CLOSE, CLOSE_TO_FLOAT32, FELT, Figure, Outcome
from softbridge.errors import EngineError, SoftbridgeError
from softbridge.plugin.hookspecs import Banker, Engine, Insertable
from softbridge.plugin.optional import able
from softbridge.plugin.prompt_bank import PromptBank
from softbridge.prompt.part import Adaption, AdaptionPrompt, InputPrompt
from softbridge.prompt.soft_prompt import SoftPrompt
from softbridge.selfcheck import promises
from softbridge.selfcheck.miniature import Architecture, Miniature, build, like, miniatures
from softbridge.selfcheck.promises import NotTried
from softbridge.selfcheck.verdict import Finding, Key, Measured, Promise, Verdict, decisive, keep, recall
from softbridge.verification.padding import LENGTHS, make_text, pad_together
from softbridge.verification.run import find_float32_regions, threads

#: How many copies are tried to build.
TRIES = 6
#: An array of the prompt that moves nothing by this part of the largest number is not felt.
MOVED = 1e-6

#: Seconds of processor after which no further promise is tried, and for a pass of the copy, of which there are dozens.
PATIENCE, PASS = 5.0, 1.0
#: The figure of what raised an error.
RAISED = "raised"

_LOCK = threading.RLock()

Ask = Callable[[Any, Sequence[promises.Inputs]], Iterator[Figure]]


def prove(engine: Engine, of: Architecture, prompt: SoftPrompt, *, bank: bool = False) -> Verdict:
    """The verdict on an engine that runs a prompt of this kind on a model of this architecture.

    Args:
        engine: an engine.
        of: the architecture.
        prompt: of it counts what kind it is, not its numbers.
        bank: whether it is to be one of several, each for some rows.
    """
    with _LOCK:  # two threads come to one verdict
        try:
            smallest = next(miniatures(of, prompt), None)
            key = None if smallest is None else _key(engine, of, smallest, prompt, bank)
            verdict = None if key is None else recall(key)
            if verdict is None:
                with ThreadPoolExecutor(1, "softbridge-self-check") as apart:
                    verdict = apart.submit(_proven, engine, of, prompt, bank).result()
                if key is not None:
                    keep(key, verdict)
        except Exception as error:  # of foreign code, or of this check: neither may stop the model from running
            return unproven(of.kind, _line(error))
    return verdict


def unproven(kind: type, reason: str) -> Verdict:
    """The verdict where nothing could be tried."""
    return Verdict(kind.__name__, (), "", reason, decisive())


def _key(engine: Engine, of: Architecture, small: Miniature, prompt: SoftPrompt, bank: bool) -> Key:
    name, source = f"{of.kind.__module__}.{of.kind.__qualname__}", _source(of.kind)
    told = {
        "class": name,
        "source": source,
        "config": small.told(),
        "layers": dict(small.chosen),
        "attention": [of.implementation, of.named],
        "prompt": _kind(like(prompt, small)),
        "bank": bank,
        "engine": [engine.name, *_sources(inspect.getmodule(type(engine)))],
        "versions": dict(decisive()),
    }
    lasting = source is not None and "<locals>" not in of.kind.__qualname__ and of.kind.__module__ != "__main__"
    return Key(of.kind, _plain(told), lasting)


def _plain(value: Any) -> Any:
    """The value in JSON's types; of what JSON does not have, its text."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(item) for item in value]
    plain = value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value))
    return value if plain else repr(value)


def _kind(prompt: SoftPrompt) -> Any:
    """What a prompt is, but for its numbers."""
    parts = [
        [part.stack, part.entry, part.placement, part.length]
        if isinstance(part, InputPrompt)
        else [part.site, part.joins, {n: [one.vectors.shape, one.gate.shape] for n, one in part.layers.items()}]
        if isinstance(part, AdaptionPrompt)
        else [
            part.site,
            {n: [pair.keys.shape, pair.gate and pair.gate.weight.shape] for n, pair in part.layers.items()},
        ]
        for part in prompt.parts
    ]
    return [parts, prompt.positions.to_json()]


@once
def _source(kind: type) -> str | None:
    """The digest of the file that a class stands in, or None: of a remote model no version says what it is."""
    try:
        return hashlib.sha256(Path(inspect.getfile(kind)).read_bytes()).hexdigest()
    except (OSError, TypeError):
        return None


@once
def _sources(module: Any) -> tuple[str, ...]:
    """Digests of the sources of this package and the engine's: during development a version does not identify them."""
    found = []
    for path in (softbridge.__file__, getattr(module, "__file__", None)):
        if path is not None:
            digest = hashlib.sha256()
            for source in sorted(Path(path).parent.rglob("*.py")):
                digest.update(source.read_bytes())
            found.append(digest.hexdigest())
    return tuple(found)


# ------------------------------------------------------------------------------------------------------ the verdict


def _proven(engine: Engine, of: Architecture, prompt: SoftPrompt, bank: bool) -> Verdict:
    reasons: list[str] = []
    raised: Verdict | None = None
    with _leaving_all_as_it_was():
        for small in islice(miniatures(of, prompt), TRIES):
            try:
                bare = build(of, small)
                told = like(prompt, small)
                obstacles = engine.obstacles(told, bare)
                if not bool(promises.said(bare, promises.texts(bare)[0]).isfinite().all()):
                    raise NotTried(
                        "without a prompt, the model's outputs in float64 are not finite"
                    )  # ProphetNet under a mask
                began = time.thread_time()
                promises.said(bare, promises.texts(bare)[0])
                if (took := time.thread_time() - began) > PASS:
                    return unproven(of.kind, f"a pass of a small copy ({small.note}) takes {took:.1f} s")
            except Exception as error:  # foreign code
                reasons.append(f"{small.note}: {_line(error)}")
                continue
            if obstacles:
                reasons.append(f"{small.note}: {'; '.join(obstacle.reason for obstacle in obstacles)}")
                continue
            instead = "" if of.named == of.implementation else f" for {of.named}, which runs elsewhere"
            note = f"{small.note}; {of.implementation} attention{instead}"
            try:
                found = _Trial(engine, bare, small, told).findings(bank)
            except _Raised as error:
                raised = raised or Verdict(of.kind.__name__, error.args, note, "", decisive())
                continue
            except Exception as error:
                reasons.append(f"{small.note}: {_line(error)}")
                continue
            return Verdict(of.kind.__name__, found, note, "", decisive())
    if raised is not None:
        return raised
    reason = "; ".join(dict.fromkeys(reasons)) or "no configuration of a small copy is taken"
    return unproven(of.kind, f"no small copy of it runs ({reason})")


def _line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"


class _Raised(Exception):  # noqa: N818
    """The copy raises with the prompt what it does not raise without; with the finding."""


class _Trial:
    """A copy with a prompt attached, and the same without one, to ask the promises of."""

    def __init__(self, engine: Engine, bare: Any, small: Miniature, prompt: SoftPrompt) -> None:
        self.engine, self.bare, self.geometry, self.prompt = engine, bare, small.geometry, prompt
        self.template = any(part.template is not None for part in prompt.inputs)
        self.gated = any(part.gated for part in prompt.prefixes)
        self.texts = promises.texts(bare, self.template)
        self.plain = promises.texts(bare)
        self.began, self.generates = time.thread_time(), promises.generates(bare, small.geometry)
        self.float32_regions = find_float32_regions(bare, self.plain[0])
        self.running = engine.attach(fresh(bare), prompt)

    def findings(self, bank: bool) -> tuple[Finding, ...]:
        try:
            promises.said(self.running, self.texts[0])
        except SoftbridgeError:
            raise
        except Exception as error:  # which the bare copy does not raise: a head weighs P + T states by a mask of T
            raise _Raised(self._judged("effect", [Figure(f"raised {_line(error)}", math.inf, "same")], {})) from error
        reference = self._reference()
        found = [self._effect(reference), reference]
        asks: list[tuple[Promise, Ask, Ask | None]] = [
            ("generation", _nothing, promises.generation),
            ("cache", promises.cache if self.generates else _nothing, promises.cache_generated),
            ("right", promises.right, None),
            ("left", promises.left, promises.left_generated),
        ]
        for promise, ask, generated in asks:
            found.append(self._asked(promise, ask, generated))
        return (*found, self._rows()) if bank else tuple(found)

    def _effect(self, reference: Finding) -> Finding:
        """The prompt is felt, and leaves numbers; where nothing says that these are right, each array of it is felt."""
        expected, found = promises.said(self.bare, self.plain[0]), promises.said(self.running, self.texts[0])
        if self.template:
            real = self.texts[0]["input_ids"][0] >= 0
            found = found[:, real] if found.ndim == 3 else found
        moved = contract.distance(found, expected)
        figures = [Figure("prompts not felt", float(not FELT <= moved < math.inf), "same")]
        insertable = able(self.engine, Insertable)
        if not reference.figures and insertable is not None:
            whole = promises.said(self.running, self.texts[0])
            still = []
            for name, changed in _changes(self.prompt):
                insertable.insert(self.running, changed)
                if contract.distance(promises.said(self.running, self.texts[0]), whole) < MOVED:
                    still.append(name)
            insertable.insert(self.running, self.prompt)
            figures.append(Figure("arrays not felt", float(len(still)), "same"))
        return self._judged("effect", figures, {})

    def _reference(self) -> Finding:
        figures: list[Figure] = []
        reason = ""
        for text in self.texts:
            if figures and time.thread_time() - self.began > PATIENCE:
                break
            length = (text.get("decoder_input_ids") if self.geometry.encoder is None else None) or text["input_ids"]
            try:
                expected = promises.by_hand(self.bare, self.geometry, self.prompt, text)
                if not bool(expected.isfinite().all()):
                    raise NotTried("computed by hand, the answer is not finite")
            except Exception as error:  # the bare copy may refuse what only a hand would ask of it
                reason = str(error) if isinstance(error, NotTried) else _line(error)
                continue
            found = promises.said(promises.view(self.running, self.geometry, self.prompt), text)
            name = f"by hand, {length.shape[1]} tokens"
            figures.append(Figure(name, contract.distance(found, expected), "close"))
        return self._judged("reference", figures, {}, reason)

    def _asked(self, promise: Promise, ask: Ask, generated: Ask | None = None) -> Finding:
        """The figures of a promise, and those of what is generated where the model by itself keeps the others.

        Tokens may be the same by chance where scores are not, so that a model is not to be excused by them.
        """
        if self.gated and promise != "generation":
            return Finding(promise, (), "a gate is a mean over all tokens of a call: pads, and what is in no cache")
        if time.thread_time() - self.began > PATIENCE:
            return Finding(promise, (), f"the promises before it took more than {PATIENCE:.0f} s")
        found = self._judged_beside(promise, ask)
        if generated is None or found.reason or any(figure.excused for figure in found.figures):
            return found
        if not self.generates:
            return found if found.figures else replace(found, reason="it generates nothing")
        more = self._judged_beside(promise, generated)
        return replace(more, figures=(*found.figures, *more.figures))

    def _judged_beside(self, promise: Promise, ask: Ask) -> Finding:
        """The figures, and those of the bare copy beside what is beyond its bound.

        In float64 a model may compute what is no number where in float32 it is right: a query that sees nothing, a pad
        on the left, has a softmax of the lowest float64, which in a softmax of float32 is minus infinity. What the bare
        copy loses so is asked of both in float32.
        """
        # A copy for each: Qwen2-VL keeps what it found of the last sequence that it generated from.
        figures, reason = _answers(ask, fresh(self.running), self.texts)
        alone: dict[str, float] = {}
        if Outcome(promise, tuple(figures), {}, self.float32_regions).unkept:
            alone = self._alone(ask, torch.float64)
            lost = {name for name, value in alone.items() if not math.isfinite(value)}
            if lost:
                alone |= {name: value for name, value in self._alone(ask, torch.float32).items() if name in lost}
                again = {one.name: one for one in _answers(ask, fresh(self.running).to(torch.float32), self.texts)[0]}
                lost -= {one.name for one in figures if math.isfinite(one.value)}
                figures = [again.get(one.name, one) if one.name in lost else one for one in figures]
        return self._judged(promise, figures, alone, reason)

    def _alone(self, ask: Ask, dtype: torch.dtype) -> dict[str, float]:
        """The figures of the bare copy."""
        passed, _ = _answers(ask, contract.with_position_ids(fresh(self.bare).to(dtype)), self.plain)
        without, _ = _answers(ask, fresh(self.bare).to(dtype), self.plain)  # what that cannot run, nobody can
        return {one.name: one.value for one in [*passed, *(one for one in without if one.name == RAISED)]}

    def _rows(self) -> Finding:
        """Rows of a bank with this prompt and with none are what each is alone, in a call and in `generate`."""

        def ask(model: Any, given: Sequence[promises.Inputs]) -> Iterator[Figure]:
            texts = [self.texts[0], self.texts[1] if self.template else self.plain[1]]
            if self.gated:
                texts[1] = make_text(model, 1, LENGTHS[0])
            others = self.running if self.template else contract.with_position_ids(fresh(self.bare))
            names = ["kind", "kind" if self.template else None]
            models = (self.running, others)
            with bank.rows(names):
                together = promises.said(model, pad_together(model, texts, "right"))
            for row, (single, text) in enumerate(zip(models, texts, strict=True)):
                alone = promises.said(single, text)
                found = together[row : row + 1]
                found = found[:, : alone.shape[1]] if found.ndim == 3 else found
                yield Figure(f"row {row}", contract.distance(found, alone), "close")
            if self.generates and not self.gated:
                side = "right" if model.config.is_encoder_decoder else "left"
                with bank.rows(names):
                    made = contract.generate(model, pad_together(model, texts, side))
                alone = torch.cat([contract.greedy(single, text) for single, text in zip(models, texts, strict=True)])
                yield Figure("generated", float((made != alone).sum()), "same")

        banker = able(self.engine, Banker)
        if banker is None:
            return self._judged("bank", (), {}, "the engine gives all rows of a batch one prompt")
        bank = PromptBank({"kind": self.prompt})
        model = banker.attach_bank(fresh(self.bare), bank, lambda entry: self.prompt)
        figures, reason = _answers(ask, model, self.texts)
        return self._judged("bank", figures, {}, reason)

    def _judged(
        self, promise: Promise, figures: Sequence[Figure], alone: dict[str, float], reason: str = ""
    ) -> Finding:
        outcome = Outcome(promise, tuple(figures), alone, self.float32_regions)
        close = CLOSE_TO_FLOAT32 if self.float32_regions else CLOSE
        return Finding(
            promise,
            tuple(
                Measured(
                    figure.name,
                    figure.value,
                    0.0 if figure.agreement == "same" else close,
                    alone.get(figure.name) if figure in outcome.unkept else None,
                    figure in outcome.by_model,
                )
                for figure in figures
            ),
            reason,
        )


def _nothing(model: Any, texts: Sequence[promises.Inputs]) -> Iterator[Figure]:
    yield from ()


def _answers(ask: Ask, model: Any, texts: Sequence[promises.Inputs]) -> tuple[list[Figure], str]:
    """The figures of a promise, and why there are no more: what an engine refuses by itself it does not get wrong.

    What is raised otherwise is a figure that no bound allows, but for a model that raises by itself.
    """
    figures: list[Figure] = []
    try:
        for figure in ask(model, texts):
            figures.append(figure)
    except EngineError as error:
        return figures, error.found
    except MemoryError:
        raise
    except Exception as error:  # foreign code, and an engine's hooks in it
        figures.append(Figure(RAISED, math.inf, "same"))
        return figures, _line(error)
    return figures, ""


def _changes(prompt: SoftPrompt) -> Iterator[tuple[str, SoftPrompt]]:
    """The prompt with one of its arrays negated, for each of them."""
    for at, part in enumerate(prompt.parts):
        if isinstance(part, InputPrompt):
            others: list[tuple[str, Any]] = [("vectors", replace(part, vectors=-part.vectors))]
        else:
            others = [
                (f"{part.site}.{layer}.{name}", replace(part, layers=cast("Any", {**part.layers, layer: changed})))
                for layer, pair in part.layers.items()
                for name, changed in (_of_adaption(pair) if isinstance(pair, Adaption) else _of_layer(pair))
            ]
        for name, other in others:
            yield name, replace(prompt, parts=(*prompt.parts[:at], other, *prompt.parts[at + 1 :]))


def _of_adaption(one: Adaption) -> Iterator[tuple[str, Any]]:
    yield "vectors", replace(one, vectors=-one.vectors)
    yield "gate", replace(one, gate=-one.gate)


def _of_layer(pair: Any) -> Iterator[tuple[str, Any]]:
    def negated(array: Array) -> Array:
        return np.asarray(-array)

    yield "keys", replace(pair, keys=negated(pair.keys))
    yield "values", replace(pair, values=negated(pair.values))
    if pair.gate is not None:
        yield "gate", replace(pair, gate=replace(pair.gate, weight=negated(pair.gate.weight), bias=-pair.gate.bias))


# ---------------------------------------------------------------------------------------------------------- apart


@contextmanager
def _leaving_all_as_it_was() -> Iterator[None]:
    """What all threads share stays as it was: random numbers, the default precision, warnings given and not given."""
    ours, theirs = random.getstate(), np.random.get_state()
    before, default = torch.random.get_rng_state(), torch.get_default_dtype()
    with _silence(), threads(1), torch.no_grad():
        torch.set_default_dtype(torch.float32)
        torch.default_generator.manual_seed(0)  # and no other device's
        try:
            yield
        finally:
            torch.set_default_dtype(default)
            torch.random.set_rng_state(before)
            random.setstate(ours)
            np.random.set_state(theirs)


@contextmanager
def _silence() -> Iterator[None]:
    """No word of the copy reaches the user, and none that is said once only is used up."""
    log, said_once = logging.getLogger("transformers"), getattr(logging.Logger, "warning_once", None)
    level = log.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        log.setLevel(logging.CRITICAL)
        if said_once is not None:
            logging.Logger.warning_once = lambda *args, **kwargs: None  # type: ignore[attr-defined]
        try:
            yield
        finally:
            log.setLevel(level)
            if said_once is not None:
                logging.Logger.warning_once = said_once  # type: ignore[attr-defined]
