"""Hooks around a model in which AdapterHub runs a prompt: its tokens moved, its virtual tokens hidden."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

from softbridge.base import cache as caches
from softbridge.base.snapshot import holders
from softbridge.errors import EngineError
from softbridge.prompt import InputPrompt

log = logging.getLogger(__name__)


def once(forward: Callable[[int], tuple[Any, ...]], dtype: Any) -> Callable[[int], tuple[Any, ...]]:
    """A prefix that is computed for one row and repeated, so that its rounding is the same in every batch."""
    return lambda rows: tuple(pair.to(dtype).expand(-1, rows, -1, -1, -1) for pair in forward(1))


def make_eager(model: Any) -> bool:
    """Switch a model to eager attention, and say whether that changed anything.

    Older modelling code picks the attention's class when the model is built: there, too, the class is changed to the
    eager one that it is derived from.
    """
    changed = False
    for holder in holders(model):
        if getattr(holder, "_attn_implementation", None) not in (None, "eager"):
            holder._attn_implementation = "eager"
            changed = True
        if getattr(holder, "attn_implementation", None) == "sdpa":
            holder.attn_implementation = "eager"
        if "Sdpa" in type(holder).__name__:
            holder.__class__ = type(holder).__mro__[1]
    return changed


def move_tokens(model: Any, suffix: str, argument: int | str, start: int) -> None:
    """Add `start` to the positions that reach the modules whose name ends in `suffix`."""

    def move(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if isinstance(argument, int):
            return (*args[:argument], args[argument] + start, *args[argument + 1 :]), kwargs
        return args, {**kwargs, argument: kwargs[argument] + start}

    modules = [module for name, module in model.named_modules() if f".{name}".endswith(suffix)]
    if not modules:
        raise EngineError(
            f"a model without any module called '*{suffix}'",
            "one that receives the tokens' positions",
            "report this as a defect of softbridge",
        )
    for module in modules:
        module.register_forward_pre_hook(move, with_kwargs=True)


def hide_virtual_tokens(model: Any, part: InputPrompt) -> None:
    """Let the model take labels, and give logits, of real tokens alone."""
    import torch

    first = 0 if part.placement == "before-sequence" else 1

    def label(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        labels = kwargs.get("labels")
        if labels is None or labels.ndim < 2 or labels.is_floating_point():  # of texts
            return args, kwargs
        ignored = labels.new_full((len(labels), part.length), -100)
        return args, {**kwargs, "labels": torch.cat([labels[:, :first], ignored, labels[:, first:]], 1)}

    def drop(module: Any, args: tuple[Any, ...], output: Any) -> Any:
        logits = getattr(output, "logits", None)
        if logits is not None and logits.ndim == 3:
            output.logits = torch.cat([logits[:, :first], logits[:, first + part.length :]], 1)
        return output

    model.register_forward_pre_hook(label, with_kwargs=True)
    model.register_forward_hook(drop)


def refuse_cache(model: Any) -> bool:
    """Whether a call with a key/value cache fails, or returns one that holds nothing: tried with two tokens."""
    import torch

    tokens = torch.zeros((1, 2), dtype=torch.long, device=model.device)
    inputs: dict[str, Any] = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if model.config.is_encoder_decoder:
        if not model.can_generate():  # a classifier is called once for a text
            return False
        # The encoder's input may be no tokens, and is not what this is about.
        states = torch.zeros((1, 2, model.config.hidden_size), dtype=model.dtype, device=model.device)
        inputs = {"encoder_outputs": (states,), "decoder_input_ids": tokens}
    with torch.random.fork_rng(), torch.no_grad():
        try:
            past = caches.of(model(**inputs, use_cache=True))
        except TypeError:  # AdapterHub concatenates tensors to a cache that holds none
            return True
    if past is None or isinstance(past, tuple):  # no cache at all, or one of tensors
        return False
    return int(past.get_seq_length()) == 0


@cache
def say_once(message: str) -> None:
    """Log a warning, the first time."""
    log.warning(message)
