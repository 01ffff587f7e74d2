"""Calls that PEFT answers with a shape error in the middle, or with another function: refused before they run.

See softbridge_compat.peft_defects: peft-prefix-checkpointing, peft-static-cache, peft-adapter-names and
peft-renamed-cache-generate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from softbridge.base import cache as caches
from softbridge.errors import EngineError
from softbridge.geometry import Geometry, read_geometry, stack_of
from softbridge.prompt import InputPrompt, SoftPrompt
from softbridge_compat import peft_defects

#: The way out that each refusal names.
NATIVE = "run the prompt with the native engine: softbridge.attach(model, prompt, engine='native')"

#: What `_check_way` looks at.
_PIECES = ("prefill_chunk_size", "prompt_lookup_num_tokens", "assistant_model")
_SETTINGS = (*_PIECES, "use_cache")


def guard(adapted: Any, prompt: SoftPrompt) -> None:
    """Look at every call of a PeftModel from now on, before PEFT does. The model under it is not touched."""
    adapted.register_forward_pre_hook(_Forward(prompt), with_kwargs=True)
    adapted.generate = _Generate(adapted.generate, prompt)  # PEFT's does not come by the hook


def checkpointing(model: Any) -> bool:
    """Whether any part of the model computes its activations anew in the backward pass."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def checkpointing_remedy(model: Any) -> str:
    """The way out for a prefix on a model with gradient checkpointing."""
    way = f"{NATIVE}, which takes gradient checkpointing; or switch it off: model.gradient_checkpointing_disable()"
    if getattr(model, "is_quantized", False):
        way += ", and prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)"
    return way


def generate_fault(prompt: SoftPrompt, geometry: Geometry) -> str | None:
    """Why PEFT's `generate` gives other tokens than its forward with this prompt, or None."""
    defect = peft_defects.RENAMED_CACHE_GENERATE
    return defect.summary if defect.applies() and defect.concerns(prompt, geometry) else None


def _check_generate(prompt: SoftPrompt, geometry: Geometry, arguments: Mapping[str, Any]) -> None:
    """Refuse to generate where PEFT gives other tokens than its forward; see `_check` for the rest."""
    fault = generate_fault(prompt, geometry)
    # Without a cache PEFT has nothing to find but a prefix, which is one.
    if fault is None or (arguments.get("use_cache") is False and not prompt.prefixes):
        return
    raise EngineError(
        fault,
        "a release of PEFT that knows the installed transformers, or an older transformers",
        NATIVE if prompt.prefixes else f"{NATIVE}; or generate with use_cache=False",
    )


def _check(model: Any, prompt: SoftPrompt, arguments: Mapping[str, Any]) -> None:
    """Refuse what a call asks for.

    Args:
        model: the PeftModel that is called.
        prompt: what is attached.
        arguments: the arguments by name; a generation_config comes apart into its settings.
    """
    if arguments.get("adapter_names") is not None:
        raise EngineError(
            "adapter_names, a prompt for each row of the batch: PEFT silently gives every row the active one",
            "one prompt for all rows",
            f"call it for the rows of each prompt in turn; or {NATIVE}, where a softbridge.PromptBank in the "
            "place of the prompt gives each row its own",
        )
    stacks = {part.stack if isinstance(part, InputPrompt) else stack_of(part.site) for part in prompt.parts}
    if "decoder" in stacks and (name := _static(arguments)):
        ways = f"leave {name} out, for a cache that grows"
        raise EngineError(
            f"{name}: PEFT's virtual tokens do not fit into a cache of fixed size",
            "a cache that grows, transformers' default",
            f"{ways}; or {NATIVE}, which takes static caches with a prefix" if prompt.prefixes else ways,
        )
    if prompt.prefixes and model.training and checkpointing(model):
        raise EngineError(
            "a prefix under gradient checkpointing: PEFT fails with it, in the middle of a step",
            "a model without gradient checkpointing",
            checkpointing_remedy(model),
        )


def _static(arguments: Mapping[str, Any]) -> str | None:
    """Which argument asks for a cache of fixed size, or None."""
    from transformers import StaticCache

    if isinstance(caches.given(arguments), StaticCache):
        return f"{caches.name_given(arguments)}, a StaticCache"
    asked = arguments.get("cache_implementation")
    fixed = isinstance(asked, str) and any(word in asked for word in ("static", "sliding", "hybrid"))
    return f"cache_implementation={asked!r}" if fixed else None


def _check_way(model: Any, prompt: SoftPrompt, arguments: Mapping[str, Any]) -> None:
    """Refuse ways to generate in which PEFT fails or gives other tokens; see `_check` for the arguments."""
    seq2seq = model.config.is_encoder_decoder
    for name in () if seq2seq else _PIECES:
        if arguments.get(name):
            raise EngineError(
                f"{name}, with which the model is called on pieces of the text: PEFT takes the virtual tokens for such "
                "a piece, and fails or gives other tokens",
                "the text as a whole, and one token at a time",
                f"leave {name} out; or {NATIVE}",
            )
    if prompt.prefixes and arguments.get("use_cache") is False and (seq2seq or _returns_cache(model.get_base_model())):
        raise EngineError(
            "use_cache=False with a prefix: the model returns the cache that PEFT gives it, in which the next step "
            "finds the prefix and all tokens, and has them once more",
            "generating with a cache",
            f"leave use_cache out; or {NATIVE}",
        )


def _returns_cache(base: Any) -> bool:
    """Whether a decoder that is called with use_cache=False returns the one that it was given."""
    import torch
    from transformers import DynamicCache

    token = torch.zeros((1, 1), dtype=torch.long, device=base.device)
    with torch.no_grad():
        out = base(input_ids=token, use_cache=False, **caches.handed(base.forward, DynamicCache()))
    return caches.of(out) is not None


class _Forward:
    """A forward pre-hook of a PeftModel."""

    def __init__(self, prompt: SoftPrompt) -> None:
        self.prompt = prompt

    def __call__(self, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        _check(model, self.prompt, kwargs)


class _Generate:
    """`generate` of a PeftModel, behind the check."""

    def __init__(self, run: Callable[..., Any], prompt: SoftPrompt) -> None:
        self.run, self.prompt = run, prompt

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self.run.__self__  # type: ignore[attr-defined]
        # The model's own settings, under those of the call's generation_config, under its arguments.
        arguments: dict[str, Any] = {}
        for config in (getattr(model, "generation_config", None), kwargs.get("generation_config")):
            for name in ("cache_implementation", *_SETTINGS):
                asked = getattr(config, name, None)
                arguments |= {} if asked is None else {name: asked}
        arguments |= kwargs
        _check(model, self.prompt, arguments)
        _check_generate(self.prompt, read_geometry(model.config), arguments)
        _check_way(model, self.prompt, arguments)
        return self.run(*args, **kwargs)
