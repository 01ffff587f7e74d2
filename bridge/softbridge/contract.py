"""The contract of an engine: seven promises, each a function that any engine can be run through.

    >>> from softbridge import contract
    >>> for outcome in contract.check(engine, make, prompt):
    ...     print(outcome)
    ...     assert not outcome.broken

`make` takes nothing and returns a fresh transformers model in float64 with eager attention, the same each time; it
takes token ids. A promise yields `Figure`s: what was compared, how far apart the two sides are, and how closely they
have to agree. It runs without a prompt, too, which is how `check` finds what the model itself does not keep (a base
model whose own left-padded rows differ, say): that is recorded beside the engine's figure, and never left out.

An engine that ignores its prompt would keep most promises. So the sixth also asks that the prompt is felt.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from softbridge.arrays import same_array
from softbridge.base import cache as caches
from softbridge.cloze import IGNORED
from softbridge.lowering.precision import as_dtype
from softbridge.plugin.hookspecs import Engine
from softbridge.prompt.soft_prompt import SoftPrompt
from softbridge.verification.padding import LENGTHS, make_labels, make_text, pad_text, pad_together, pad_token
from softbridge.verification.probes import Probe
from softbridge.verification.run import FLOAT32_LOSS, find_float32_regions

#: A callable that makes a fresh model.
Make: TypeAlias = Callable[[], Any]
Agreement = Literal["same", "close", "loss"]

STEPS = 3
NEW_TOKENS = 4

#: How closely figures agree, relative to the largest number, in float64 and beside a float32 region.
CLOSE, CLOSE_TO_FLOAT32 = 1e-12, 1e-5

#: A prompt that moves no logit by this part of the largest is not felt.
FELT = 1e-3

#: A promise that the model itself breaks may be broken this much more with a prompt: other numbers, the same fault.
EXCUSED = 10.0


@dataclass(frozen=True)
class Figure:
    """One comparison.

    Attributes:
        name: what was compared.
        value: the largest difference relative to the largest number expected, or how many things differ.
        agreement: ``same`` (nothing may differ: the sums are the same, or things are counted), ``close`` (two orders
            of summation) or ``loss`` (transformers computes losses in float32).
    """

    name: str
    value: float
    agreement: Agreement

    def kept(self, close: float) -> bool:
        """True if the value is within the bound; a NaN never is."""
        return self.value <= {"same": 0.0, "close": close, "loss": max(close, FLOAT32_LOSS)}[self.agreement]


@dataclass(frozen=True)
class Outcome:
    """What came of one promise.

    Attributes:
        promise: its name.
        figures: with the prompt.
        bare: the figures of the model without a prompt, by name; only if some figure with it is too large.
        float32_regions: where the model computes in float32, see `softbridge.verification.run.find_float32_regions`.
    """

    promise: str
    figures: tuple[Figure, ...]
    bare: Mapping[str, float]
    float32_regions: tuple[str, ...] = ()

    @property
    def close(self) -> float:
        return CLOSE_TO_FLOAT32 if self.float32_regions else CLOSE

    @property
    def unkept(self) -> tuple[Figure, ...]:
        """The figures that are too large, be it by the engine or by the model itself."""
        return tuple(figure for figure in self.figures if not figure.kept(self.close))

    @property
    def by_model(self) -> tuple[Figure, ...]:
        """Those of them that the model breaks without any prompt."""
        return tuple(figure for figure in self.unkept if self._excused(figure))

    @property
    def broken(self) -> tuple[Figure, ...]:
        """Those that the engine breaks."""
        return tuple(figure for figure in self.unkept if not self._excused(figure))

    def _excused(self, figure: Figure) -> bool:
        bare = self.bare.get(figure.name, 0.0)
        if Figure(figure.name, bare, figure.agreement).kept(self.close):
            return False
        return math.isnan(bare) or figure.value <= EXCUSED * bare

    def __str__(self) -> str:
        bare = {figure.name: f" (the model alone: {self.bare[figure.name]:.1e})" for figure in self.by_model}
        return f"{self.promise}: " + ", ".join(f"{f.name} {f.value:.1e}{bare.get(f.name, '')}" for f in self.figures)


Promise: TypeAlias = Callable[[Engine, Make, SoftPrompt | None], Iterator[Figure]]


def check(
    engine: Engine, make: Make, prompt: SoftPrompt, promises: Sequence[Promise] | None = None
) -> Iterator[Outcome]:
    """Run an engine through the contract (or some promises of it), with a prompt that it has no obstacle to.

    What raises instead of keeping a promise breaks it: the error is then a figure that no bound allows.
    """
    model = make()
    probe = Probe(
        "alone", {name: tensor.numpy() for name, tensor in make_text(model, 0).items()}, np.ones((1, 1), bool)
    )
    float32_regions = find_float32_regions(model, probe)
    for promise in promises or PROMISES:
        outcome = Outcome(promise.__name__, _run(promise, engine, make, prompt), {}, float32_regions)
        if outcome.unkept:
            bare = {figure.name: figure.value for figure in _run(promise, engine, make, None)}
            outcome = Outcome(outcome.promise, outcome.figures, bare, float32_regions)
        yield outcome


def _run(promise: Promise, engine: Engine, make: Make, prompt: SoftPrompt | None) -> tuple[Figure, ...]:
    found: list[Figure] = []
    try:
        found.extend(promise(engine, make, prompt))
    except Exception as error:  # an engine is foreign code, and so is the model
        found.append(Figure(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", 1.0, "same"))
    return tuple(found)


# --------------------------------------------------------------------------------------------------- the promises


def padding(engine: Engine, make: Make, prompt: SoftPrompt | None) -> Iterator[Figure]:
    """1. A row gives the same logits on its real tokens unpadded, padded on the right and padded on the left."""
    model = _running(engine, make(), prompt)
    inputs = make_text(model, 0)
    expected = _logits(model, inputs)
    padded = ("", "decoder_") if "decoder_input_ids" in inputs else ("",)
    for stack in padded:
        for side in ("right", "left"):
            given = {**inputs, **pad_text(model, inputs, stack, side)}
            logits = _logits(model, given)
            if stack or (len(padded) == 1 and logits.ndim == 3):
                logits = logits[:, -expected.shape[1] :] if side == "left" else logits[:, : expected.shape[1]]
            yield Figure(f"{stack}{side}", distance(logits, expected), "close")


def cache(engine: Engine, make: Make, prompt: SoftPrompt | None) -> Iterator[Figure]:
    """2. Decoding with a cache is decoding without one, greedy and with beams, and greedy is one beam.

    The logits are compared in the model's own precision, token by token; generated tokens must be the same, also when
    rows of different lengths are padded, as `generate` wants them.
    """
    model = _running(engine, make(), prompt)
    if not model.can_generate():
        return
    yield token_by_token(model, make_text(model, 0))

    texts = [make_text(model, row) for row in range(len(LENGTHS))]
    by_hand = torch.cat([greedy(model, text) for text in texts])
    # An encoder is padded on the right, as its own tokenizer does.
    together = pad_together(model, texts, "right" if model.config.is_encoder_decoder else "left")
    for name, found in (
        ("greedy", torch.cat([generate(model, text) for text in texts])),
        ("greedy, padded", generate(model, together)),
        ("greedy, uncached", generate(model, together, use_cache=False)),
    ):
        yield Figure(name, float((found != by_hand).sum()), "same")
    beams = torch.cat([generate(model, text, num_beams=2, use_cache=False) for text in texts])
    yield Figure("two beams", float((generate(model, together, num_beams=2) != beams).sum()), "same")


def token_by_token(model: Any, inputs: Mapping[str, Tensor], start: int = 3) -> Figure:
    """A caller's own loop, which hands the cache on: the first tokens together, the others one by one."""
    ids = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    expected, steps = _logits(model, inputs), []
    state: Any = None
    with torch.no_grad():
        for first, last in ((0, start), *((n, n + 1) for n in range(start, inputs[ids].shape[1]))):
            given = {**inputs, ids: inputs[ids][:, first:last], "use_cache": True}
            given |= caches.handed(model.forward, state)
            if ids == "input_ids":
                given["attention_mask"] = inputs["attention_mask"][:, :last]
            output = model(**given)
            state = caches.of(output)
            steps.append(output.logits)
    return Figure("token by token", distance(torch.cat(steps, dim=1), expected), "close")


def batch(engine: Engine, make: Make, prompt: SoftPrompt | None) -> Iterator[Figure]:
    """3. A row alone gives the same logits as among others, of its own length and of other lengths."""
    model = _running(engine, make(), prompt)
    for name, lengths in (("equal lengths", LENGTHS[:1] * 3), ("mixed lengths", LENGTHS)):
        texts = [make_text(model, row, length) for row, length in enumerate(lengths)]
        together = _logits(model, pad_together(model, texts, "right"))
        rows = []
        for row, text in enumerate(texts):
            alone = _logits(model, text)
            rows.append(distance(together[row : row + 1, : alone.shape[1]], alone))
        yield Figure(name, max(rows), "close")


def labels(engine: Engine, make: Make, prompt: SoftPrompt | None) -> Iterator[Figure]:
    """4. There is one row of logits for each label, and the loss is the mean over the labels of real tokens.

    The loss is computed again from rows that run alone.
    """
    model = _running(engine, make(), prompt)
    texts = [make_text(model, row) for row in range(len(LENGTHS))]
    total, count = 0.0, 0
    for text in texts:
        aligned, wanted = _aligned(model, _labelled(model, text).logits, make_labels(model, text))
        total += float(cross_entropy(aligned, wanted, ignore_index=IGNORED, reduction="sum"))
        count += int((wanted != IGNORED).sum())
    for side in ("right", "left"):
        given = pad_together(model, texts, side)
        wanted, output = make_labels(model, given), _labelled(model, given)
        yield Figure(f"{side}, logits too many", float(output.logits.shape[: wanted.ndim] != wanted.shape), "same")
        yield Figure(f"{side}, loss", abs(float(output.loss) * count / total - 1), "loss")


def training(engine: Engine, make: Make, prompt: SoftPrompt | None) -> Iterator[Figure]:
    """5. Training changes every array of the prompt and nothing of the model, and what is extracted is what runs."""
    if prompt is None:
        return
    given = make()
    own = {id(parameter) for parameter in given.parameters()}
    tensors = [*given.parameters(), *given.buffers()]
    model = engine.attach(given, prompt)
    before = [tensor.detach().clone() for tensor in tensors]
    trainable = _count(parameter.requires_grad for parameter in model.parameters() if id(parameter) in own)
    yield Figure("parameters of the model to train", trainable, "same")
    text = make_text(model, 0)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(STEPS):
        optimizer.zero_grad()
        _loss(model, text).backward()
        optimizer.step()
    gradients = _count(p.grad is not None for p in model.parameters() if id(p) in own)
    yield Figure("gradients of the model", gradients, "same")
    changed = _count(not torch.equal(now, then) for now, then in zip(tensors, before, strict=True))
    yield Figure("tensors of the model changed", changed, "same")
    trained = engine.extract(model)
    pairs = zip(prompt.arrays(), trained.arrays(), strict=True)
    yield Figure("arrays of the prompt not trained", _count(same_array(a, b) for (_, a), (_, b) in pairs), "same")
    again = _logits(engine.attach(make(), trained), text)
    yield Figure("extracted and attached again", distance(again, _logits(model, text)), "same")


def detaching(engine: Engine, make: Make, prompt: SoftPrompt | None) -> Iterator[Figure]:
    """6. After attach, a backward pass and detach the model is the one before, bit for bit, and the prompt was felt."""
    model = make()
    next(model.parameters()).requires_grad_(False)
    text = make_text(model, 0)
    logits, state = _logits(model, text), {name: value.clone() for name, value in model.state_dict().items()}
    before = _fingerprint(model)
    if prompt is None:
        return
    running = engine.attach(model, prompt)
    found = _logits(running, text)
    shown = found[:, : logits.shape[1]] if found.shape != logits.shape else found
    yield Figure("prompts not felt", float(distance(shown, logits) < FELT), "same")
    loss = _loss(running, text)
    if loss.requires_grad:  # an engine may attach for running only
        loss.backward()
    restored = engine.detach(running)
    yield Figure("another model", float(restored is not model), "same")
    yield Figure("outputs", distance(_logits(model, text), logits), "same")
    now = model.state_dict()
    yield Figure("names in the state", float(now.keys() != state.keys()), "same")
    changed = (name not in now or not torch.equal(now[name], value) for name, value in state.items())
    yield Figure("numbers in the state", _count(changed), "same")
    after = _fingerprint(model)
    for name, value in before.items():
        yield Figure(name, float(after[name] != value), "same")


def attention(engine: Engine, make: Make, prompt: SoftPrompt | None) -> Iterator[Figure]:
    """7. Logits, loss and gradient are the same with gradient checkpointing, and in sdpa attention.

    Gradients are taken in float64, of a loss in float64. Checkpointing works in training mode only: every pass there
    starts from the same seed.
    """
    wide = None if prompt is None else as_dtype(prompt, np.dtype(np.float64))
    model = _training(engine, make(), wide)
    text = make_text(model, 1)
    eager = _gradient(model, text)

    model = _training(engine, make(), wide).train()
    if model.supports_gradient_checkpointing:
        plain = _gradient(model, text)
        for reentrant in (False, True):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            if prompt is None:  # what an engine has to do for itself
                model.enable_input_require_grads()
            name = "reentrant checkpointing" if reentrant else "checkpointing"
            for what, found, expected in zip(("loss", "gradient"), _gradient(model, text), plain, strict=False):
                # Reentrant, the gradients of what several layers read are added in another order.
                exact = what == "loss" or not reentrant
                yield Figure(f"{name}, {what}", distance(found, expected), "same" if exact else "close")

    other = make()
    other.set_attn_implementation("sdpa")
    if other.config._attn_implementation != "sdpa":
        raise NotImplementedError(f"{type(other).__name__} takes no other attention once it is built")
    sdpa = _gradient(_training(engine, other, wide), text)
    for what, found, expected in zip(("loss", "gradient", "logits"), sdpa, eager, strict=True):
        yield Figure(f"sdpa, {what}", distance(found, expected), "close")


PROMISES: tuple[Promise, ...] = (padding, cache, batch, labels, training, detaching, attention)


# ---------------------------------------------------------------------------------------------------------- running


def _running(engine: Engine, model: Any, prompt: SoftPrompt | None) -> Any:
    """The model with the prompt; or alone and given position_ids, as `generate` passes them."""
    return with_position_ids(model) if prompt is None else engine.attach(model, prompt)


def with_position_ids(model: Any) -> Any:
    """The model, given position_ids in each call, as `generate` passes them; in place."""
    if "position_ids" in inspect.signature(model.forward).parameters:
        model.register_forward_pre_hook(_pass_position_ids, with_kwargs=True)
    return model


def _pass_position_ids(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    mask = kwargs.get("attention_mask")
    if mask is None or kwargs.get("position_ids") is not None:
        return args, kwargs
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return args, {**kwargs, "position_ids": positions[:, -kwargs["input_ids"].shape[1] :]}


def _training(engine: Engine, model: Any, prompt: SoftPrompt | None) -> Any:
    """The same, with nothing trainable but what the engine brought, in float64."""
    own = [parameter for parameter in model.parameters() if prompt is not None]
    model = _running(engine, model, prompt).double().requires_grad_(True)
    for parameter in own:
        parameter.requires_grad_(False)
    return model


def _logits(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs).logits
    return found


def _labelled(model: Any, inputs: Mapping[str, Tensor]) -> Any:
    """The output with labels, of which an encoder-decoder makes its decoder's tokens itself."""
    given = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
    with torch.no_grad():
        return model(**given, labels=make_labels(model, inputs))


def _gradient(model: Any, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, its gradient with respect to whatever is trainable (in one row), and the logits."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.zero_grad()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        logits = model(**inputs, use_cache=False).logits if model.can_generate() else model(**inputs).logits
    loss = _of_labels(model, logits, inputs)
    loss.backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    return loss.detach(), torch.cat([grad.flatten() for grad in grads]), logits.detach()


def _loss(model: Any, inputs: Mapping[str, Tensor]) -> Any:
    return _of_labels(model, model(**inputs).logits, inputs)


def _of_labels(model: Any, logits: Tensor, inputs: Mapping[str, Tensor]) -> Any:
    aligned, wanted = _aligned(model, logits, make_labels(model, inputs))
    return cross_entropy(aligned, wanted, ignore_index=IGNORED)


def _aligned(model: Any, logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [n, classes] in float64 and the labels [n] that they are for."""
    logits = logits.double()
    if logits.ndim == 2:
        return logits, wanted
    if model.can_generate() and not model.config.is_encoder_decoder:
        logits, wanted = logits[:, -wanted.shape[1] : -1], wanted[:, 1:]
    return logits.flatten(0, 1), wanted.flatten()


def generate(model: Any, inputs: Mapping[str, Tensor], **settings: Any) -> Tensor:
    """NEW_TOKENS tokens for each row [B, NEW_TOKENS], greedy unless `settings` say otherwise."""
    given = {name: value for name, value in inputs.items() if not name.startswith("decoder")}
    lengths = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "pad_token_id": pad_token(model)}
    found: Tensor = model.generate(
        **given, do_sample=False, eos_token_id=None, **{"num_beams": 1, **lengths, **settings}
    )
    return found[:, -NEW_TOKENS:]


def greedy(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """The same for one row by hand: the whole text again for each token."""
    crossed = model.config.is_encoder_decoder
    grown = torch.tensor([[model.generation_config.decoder_start_token_id]]) if crossed else inputs["input_ids"]
    for _ in range(NEW_TOKENS):
        given = {**inputs, "decoder_input_ids": grown} if crossed else {"input_ids": grown}
        grown = torch.cat([grown, _logits(model, given)[:, -1:].argmax(-1)], dim=1)
    return grown[:, -NEW_TOKENS:]


# ------------------------------------------------------------------------------------------------------- the texts


# --------------------------------------------------------------------------------------------------------- figures


def distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the largest number; infinite if the shapes differ or one is NaN."""
    if found.shape != expected.shape:
        return math.inf
    largest = float(expected.abs().max())
    value = float((found.double() - expected.double()).abs().max())
    relative = value / largest if largest and value else value
    return math.inf if math.isnan(relative) else relative


def _count(differ: Iterable[bool]) -> float:
    return float(sum(map(bool, differ)))


def _fingerprint(model: Any) -> dict[str, Any]:
    """What else must be as before, apart from the numbers: each aspect, compared by value."""
    modules = dict(model.named_modules())
    hooks = [name for name in vars(torch.nn.Module()) if name.endswith("_hooks")]
    return {
        "modules": {name: type(module) for name, module in modules.items()},
        "hooks": {(name, kind): list(getattr(m, kind)) for name, m in modules.items() for kind in hooks},
        "attributes": {name: set(vars(module)) for name, module in modules.items()},
        "configuration": copy.deepcopy(model.config.to_dict()),
        "generation": copy.deepcopy(model.generation_config.to_dict()) if model.can_generate() else None,
        "attention": {name: m.config._attn_implementation for name, m in modules.items() if hasattr(m, "config")},
        "trainable": [name for name, parameter in model.named_parameters() if parameter.requires_grad],
        "training mode": {name: module.training for name, module in modules.items()},
        "gradients": [name for name, parameter in model.named_parameters() if parameter.grad is not None],
    }
