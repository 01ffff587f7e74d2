"""Run a prompt through an engine on the probes, and look at what a model computes in less than its own precision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from softbridge.arrays import Array
from softbridge.base.build import first_line
from softbridge.base.head import load_head, restore_head
from softbridge.base.model import BaseModel
from softbridge.cloze import IGNORED
from softbridge.errors import BaseModelError, EngineError, Obstacle
from softbridge.geometry import Geometry
from softbridge.lowering.expressible import inexpressible
from softbridge.lowering.precision import as_dtype
from softbridge.plugin.hookspecs import Engine, Misgenerating, Narrowing
from softbridge.plugin.optional import able
from softbridge.plugin.registry import engines
from softbridge.prompt.soft_prompt import SoftPrompt
from softbridge.verification.probes import GREEDY_TOKENS, Probe

#: How closely a loss that is computed in float32 agrees with the same in float64.
FLOAT32_LOSS = 1e-5


def choose_engine(prompt: SoftPrompt, preferred: str, model: Any) -> tuple[Engine, str]:
    """The engine to run a prompt with, and why not the preferred one, if it is another.

    The preferred engine is the prompt's own toolkit. Where that is not installed or cannot run the prompt, the native
    engine is next, then any other that can.

    Raises:
        EngineError: no installed engine can run the prompt on this model; it says why for each.
    """
    known = engines()
    reasons: list[str] = []
    for name in dict.fromkeys((preferred, "native", *known)):
        if name not in known:
            reasons.append(f"{name}: no engine of this name is installed")
            continue
        reason = known[name].unavailable()
        if reason is None:
            obstacles = obstacles_of(known[name], prompt, model)
            if not obstacles:
                return known[name], "; ".join(reasons)
            reason = "; ".join(obstacle.reason for obstacle in obstacles)
        reasons.append(f"{name}: {reason}")
    raise EngineError(
        "no installed engine can run this prompt on this model: " + " | ".join(reasons),
        "an engine that can run it",
        "run it in an environment where the prompt's own toolkit is installed",
    )


def obstacles_of(engine: Engine, prompt: SoftPrompt, model: Any) -> list[Obstacle]:
    """What stands against running a prompt: what the engine declares, and what it finds."""
    declared = inexpressible(prompt, engine.capabilities, BaseModel.resolve(model))
    return declared or list(engine.obstacles(prompt, model))


def generate_fault(engine: Engine, prompt: SoftPrompt, geometry: Geometry) -> str | None:
    """Why an engine's `generate` cannot be trusted with a prompt here, or None."""
    misgenerating = able(engine, Misgenerating)
    return None if misgenerating is None else misgenerating.generate_fault(prompt, geometry)


def float32_regions(engine: Engine, prompt: SoftPrompt, geometry: Geometry) -> Sequence[str]:
    """The modules in which an engine's toolkit computes in float32 whatever the model's precision, by their class."""
    narrowing = able(engine, Narrowing)
    return () if narrowing is None else narrowing.float32_regions(prompt, geometry)


@contextmanager
def threads(most: int | None) -> Iterator[None]:
    """Let torch use no more threads than this (None: as many as it likes) for the length of a block.

    Small products gain nothing from a second thread, and where other programs want the cores each of them waits for
    it: with two threads on two busy cores the same forward passes took five times as long as with one.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(most or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def attached(engine: Engine, model: Any, prompt: SoftPrompt) -> Iterator[Any]:
    """The model with the prompt and its head attached, for the length of a block."""
    before = load_head(model, prompt.head)
    try:
        running = engine.attach(model, prompt)
        try:
            yield running
        finally:
            engine.detach(running)
    finally:
        restore_head(model, before)


def run(model: Any, probes: Sequence[Probe]) -> dict[str, Array]:
    """Probe name -> logits at the real tokens, [N, V] (or [B, classes]), or generated token ids [B, tokens].

    Logits of virtual positions, where an engine returns them, stand before the real ones and are left out.
    """
    model.eval()
    return {probe.name: _greedy(model, probe) if probe.greedy else _logits(model, probe) for probe in probes}


def _logits(model: Any, probe: Probe) -> Array:
    import torch

    inputs = _tensors(model, probe.inputs)
    if probe.backwards:
        inputs = {name: tensor.flip(0) for name, tensor in inputs.items()}
    with torch.no_grad():
        logits = _scores(model(**inputs))
    if probe.backwards:
        logits = logits.flip(0)
    if logits.ndim == 2:
        return np.asarray(logits.double().cpu().numpy())
    real = torch.from_numpy(probe.real).to(logits.device)
    return np.asarray(logits[:, -probe.real.shape[1] :][real].double().cpu().numpy())


def gradient(engine: Engine, model: Any, prompt: SoftPrompt, probe: Probe) -> tuple[float, SoftPrompt]:
    """The loss of a text, and its gradient with respect to the prompt, in the form of that prompt.

    The text is its own label. The first token's is left out: a toolkit that returns logits of virtual tokens has it
    predicted by the last of them, and one that does not, by nobody. transformers computes losses in float32; the one
    that is returned and differentiated is computed here in float64, unless the toolkit's own is another.

    Args:
        engine: one that runs the prompt.
        model: used up.
        prompt: its numbers are taken in float64, and so are the toolkit's parameters.
        probe: of one text.
    """
    import torch

    own = {id(parameter) for parameter in model.parameters()}
    with attached(engine, model, as_dtype(prompt, np.dtype(np.float64))) as running:
        running.to(torch.float64).eval()
        trained = [parameter for parameter in running.parameters() if id(parameter) not in own]
        for parameter in running.parameters():
            parameter.requires_grad_(id(parameter) not in own)
        with torch.enable_grad():
            labels = _tensors(model, _labels(probe, model.config))
            output = running(**_tensors(model, probe.inputs), **labels)
            loss = _loss(_scores(output).double(), labels, probe)
            if loss.requires_grad:  # else nothing that is run depends on the prompt
                loss.backward()
        with torch.no_grad():
            for parameter in trained:
                parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        theirs, ours = float(output.loss.detach()), float(loss.detach())
        agree = abs(theirs - ours) <= FLOAT32_LOSS * abs(ours)
        return ours if agree else theirs, engine.extract(running)


def check_loss(model: Any, probe: Probe) -> None:
    """Compute the loss of a text once, as `gradient` will with a prompt.

    Raises:
        BaseModelError: the model alone cannot: its configuration says something that transformers does not do.
    """
    import torch

    try:
        labels = _tensors(model, _labels(probe, model.config))
        with torch.no_grad():
            output = model(**_tensors(model, probe.inputs), **labels)
        float(output.loss), float(_loss(_scores(output), labels, probe))
    except Exception as error:  # models of transformers raise what they like
        raise BaseModelError(
            f"a {type(model).__name__} of this configuration has no loss: {type(error).__name__}: {error!s:.200}",
            "a model that transformers itself can train",
            "check the base model's config.json, above all problem_type and the number of labels",
        ) from error


def _scores(output: Any) -> Any:
    """Logits [B, T, V] or [B, classes]; where a span is looked for, of its start and its end, [B, T, 2]."""
    import torch

    if hasattr(output, "start_logits"):
        return torch.stack((output.start_logits, output.end_logits), dim=-1)
    return output.logits


def _loss(logits: Any, given: Mapping[str, Any], probe: Probe) -> Any:
    """What transformers' models compute of their logits and labels."""
    from torch.nn.functional import cross_entropy, mse_loss

    if probe.spans:
        ends = zip(logits[:, -probe.real.shape[1] :].unbind(-1), given.values(), strict=True)
        return sum(cross_entropy(scores, place) for scores, place in ends) / 2
    labels = given["labels"]
    if probe.pooled:
        return mse_loss(logits[:, 0], labels) if labels.is_floating_point() else cross_entropy(logits, labels)
    logits = logits[:, -labels.shape[1] :]
    if probe.causal:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def _labels(probe: Probe, config: Any) -> dict[str, Array]:
    """Labels for the inputs of a probe: its own tokens, their number as a class, the first class, or a span."""
    answers = probe.inputs.get("decoder_input_ids")
    labels = np.array(probe.inputs["input_ids"] if answers is None else answers)
    if probe.spans:
        return {"start_positions": np.full(len(labels), 1), "end_positions": np.full(len(labels), 2)}
    if probe.classes is not None:
        labels %= probe.classes
    if answers is None:
        labels[:, :1] = IGNORED
        labels[~probe.real] = IGNORED
    if probe.pooled:
        regression = getattr(config, "num_labels", 2) == 1
        labels = np.zeros(len(labels), np.float64 if regression else np.int64)
    return {"labels": labels}


def _greedy(model: Any, probe: Probe) -> Array:
    import torch

    inputs = _tensors(model, probe.inputs)
    with torch.no_grad():
        if probe.stepwise:
            tokens = _stepwise(model, inputs)
        else:
            tokens = model.generate(
                **inputs,
                do_sample=False,
                num_beams=1,
                min_new_tokens=GREEDY_TOKENS,
                max_new_tokens=GREEDY_TOKENS,
                **({} if probe.cached else {"use_cache": False}),
            )
    return np.asarray(tokens[:, -GREEDY_TOKENS:].cpu().numpy())


def _stepwise(model: Any, inputs: dict[str, Any]) -> Any:
    """What `generate` picks with the model's own settings, by the whole text through the forward for each token.

    Returns:
        Token ids [B, T + GREEDY_TOKENS]; of an encoder-decoder those of the decoder.
    """
    import torch
    from transformers import generation

    settings = model.generation_config
    name, ids = "input_ids", inputs["input_ids"]
    if model.config.is_encoder_decoder:
        start = settings.decoder_start_token_id
        name, ids = "decoder_input_ids", ids.new_full((len(ids), 1), settings.bos_token_id if start is None else start)
    length = ids.shape[1]
    rules = generation.LogitsProcessorList()
    if settings.eos_token_id is not None:
        ends = generation.MinNewTokensLengthLogitsProcessor(length, GREEDY_TOKENS, settings.eos_token_id, model.device)
        rules.append(ends)
    if settings.forced_bos_token_id is not None:
        rules.append(generation.ForcedBOSTokenLogitsProcessor(settings.forced_bos_token_id))
    if settings.forced_eos_token_id is not None:
        last = generation.ForcedEOSTokenLogitsProcessor(
            length + GREEDY_TOKENS, settings.forced_eos_token_id, model.device
        )
        rules.append(last)
    for _ in range(GREEDY_TOKENS):
        scores = model(**{**inputs, name: ids}).logits[:, -1]
        ids = torch.cat([ids, rules(ids, scores).argmax(-1, keepdim=True)], dim=1)
        if name == "input_ids":
            mask = inputs["attention_mask"]
            inputs["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return ids


def _tensors(model: Any, inputs: Mapping[str, Array]) -> dict[str, Any]:
    import torch

    return {name: torch.from_numpy(np.ascontiguousarray(array)).to(model.device) for name, array in inputs.items()}


def find_float32_regions(model: Any, probe: Probe | Mapping[str, Any]) -> tuple[str, ...]:
    """Where a float64 model computes in less than float64: names of modules' classes, sorted.

    Such a region bounds how closely two ways of running a prompt can agree: a rotary table or a softmax in float32
    rounds to 1e-7. It is found by watching every operator for narrower floating-point inputs that come out as float64.

    Args:
        model: is called once.
        probe: what with; or the model's own arguments, for one that takes no text.

    Raises:
        BaseModelError: the model cannot be called.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    narrow = (torch.float32, torch.float16, torch.bfloat16)
    found: set[str] = set()
    inside: list[str] = []

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
            # A zero-dimensional tensor is a constant, not something that was computed.
            if any(t.dtype in narrow and t.ndim for t in given) and any(t.dtype == torch.float64 for t in made):
                found.add(inside[-1] if inside else type(model).__name__)
            return out

    def enter(module: Any, args: Any) -> None:
        inside.append(type(module).__name__)

    def leave(module: Any, args: Any, out: Any) -> None:
        inside.pop()

    handles = []
    for module in model.modules():
        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        with Watch():  # type: ignore[no-untyped-call]
            if isinstance(probe, Probe):
                _logits(model, probe)
            else:
                model(**probe)
    except Exception as error:  # models of transformers raise what they like
        raise BaseModelError(
            f"{type(model).__name__} does not run by itself: {type(error).__name__}: {first_line(error)}",
            "a base model that transformers can run",
            "check the base model's config.json",
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return tuple(sorted(found))
