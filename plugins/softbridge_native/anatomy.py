"""What a model is made of, found by looking and by running it: stacks, attention modules, position tables."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softbridge.base import cache as caches
from softbridge.geometry import Geometry, Site, Stack
from softbridge_native.attention import FLASH, register, registered
from softbridge_native.call import past_hooks


def embedding_block(stack: Any) -> nn.Module | None:
    """The module of the stack that adds positions to the word embedding and keeps its width (BERT's `embeddings`)."""
    words = stack.get_input_embeddings()
    for block in stack.children():
        if block is not words and words in block.modules():
            tables = (module for name, module in block.named_modules() if name.endswith("position_embeddings"))
            return block if any(getattr(table, "embedding_dim", 0) == words.embedding_dim for table in tables) else None
    return None


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


def position_table(stack: Any) -> nn.Module | None:
    """The module of a stack that counts positions from a cache's length, and would from any other number (BART's)."""
    table = getattr(stack, "embed_positions", None)
    counts = isinstance(table, nn.Module) and caches.length_argument(table.forward) is not None
    return table if counts else None


def padding_row(stack: nn.Module) -> int | None:
    """The row of the position embedding where padding tokens stand, whatever their place, or None (RoBERTa)."""
    tables = (module for name, module in stack.named_modules() if name.endswith("position_embeddings"))
    return max((row for table in tables if (row := getattr(table, "padding_idx", None)) is not None), default=None)


def position_offset(stack: nn.Module) -> int:
    """The row of the position embedding for position 0: behind the padding tokens', or where the stack counts from."""
    row = padding_row(stack)
    counted = (buffer for name, buffer in stack.named_buffers() if name.endswith("position_ids"))
    first = (int(buffer.flatten()[0]) for buffer in counted if buffer.numel() and not buffer.is_meta)
    return max(first, default=0) if row is None else row + 1


#: The submodule of the model that holds the prompt.
NAME = "softbridge"


def has_tokens(stack: Any) -> bool:
    """Whether a stack reads tokens, and says by which embedding."""
    try:
        weight = getattr(stack.get_input_embeddings(), "weight", None)
        return isinstance(weight, Tensor) and weight.ndim == 2  # a convolution has 3
    except (AttributeError, NotImplementedError):
        return False


def takes_embeddings(stack: Any) -> bool:
    """Whether a stack can be given embeddings in the place of token ids."""
    return "inputs_embeds" in inspect.signature(stack.forward).parameters


def looks_back(stack: Any) -> bool:
    """Whether the stack has further embeddings, of each layer, and finds token ids for them in the embeddings given."""
    look = getattr(stack, "get_per_layer_inputs", None) if getattr(stack, "hidden_size_per_layer_input", 0) else None
    return look is not None and "inputs_embeds" in inspect.signature(look).parameters


def tellable(stack: Any) -> bool:
    """Whether a stack takes position_ids, or depends on nothing but the tokens' distances."""
    if getattr(stack.config, "alibi", False):  # Falcon takes positions then, too, and looks at none
        return False
    return "position_ids" in inspect.signature(stack.forward).parameters or bias_table(stack) is not None


class _Reached(Exception):  # noqa: N818
    """A module was reached; with its arguments, and those that have names."""


def _reached(model: Any, stack: Any, attention: nn.Module, implementation: str) -> _Reached | None:
    """The arguments that attention of that name gets, watched with a pad and a token that go no further.

    None where the stack cannot be run so; then an argument that is missing raises when it is needed.
    """

    thread = threading.get_ident()

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == thread:  # a bank that is running loads further prompts
            raise _Reached(args, kwargs)

    handle = attention.register_forward_pre_hook(look, with_kwargs=True)
    before = [] if NAME in model._modules else name_attention(model, implementation)
    tokens = torch.tensor([[0, 1]], device=stack.get_input_embeddings().weight.device)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            past_hooks(stack)(tokens, attention_mask=tokens)  # of a bank
    except _Reached as reached:
        return reached
    except Exception:  # foreign code; nothing is known
        return None
    finally:
        handle.remove()
        restore_names(before)
    return None


def counts_pads(outer: Any, stack: Any) -> bool:
    """Whether a model that is passed no position_ids makes some for its stack, from the first column on, be it a pad.

    It is watched with a pad and two tokens that go no further than the stack.
    """
    thread = threading.get_ident()

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == thread:
            raise _Reached(args, kwargs)

    handle, state = stack.register_forward_pre_hook(look, with_kwargs=True, prepend=True), dict(vars(outer))
    token = word(outer.config)
    tokens = torch.tensor([[0, token, token]], device=stack.get_input_embeddings().weight.device)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            outer.forward(input_ids=tokens, attention_mask=(torch.arange(3, device=tokens.device) > 0).long()[None])
    except _Reached as reached:
        made = reached.args[1].get("position_ids")
        return made is not None and bool((made[..., 1] - made[..., 0] == 1).all())
    except Exception:  # foreign code; nothing is known
        return False
    finally:
        handle.remove()
        vars(outer).update(state)  # Qwen2-VL keeps what it found of the last sequence
    return False


def hears_scores(model: Any, stack: Any, attention: nn.Module) -> bool:
    """True if the model builds a 4-d additive mask, and not a padding mask, for flash attention under our name.

    So do models that recognise flash attention by its own name only.
    """
    reached = _reached(model, stack, attention, registered(FLASH))
    if reached is None:
        return False
    args, kwargs = reached.args
    return any(isinstance(one, Tensor) and one.ndim == 4 for one in (*args, *kwargs.values()))


def arguments_of(model: Any, stack: Any, attention: nn.Module) -> dict[str, Any] | None:
    """What an attention module is called with for two tokens, by name; None where the stack cannot be run so."""
    reached = _reached(model, stack, attention, registered("eager"))
    if reached is None:
        return None
    args, kwargs = reached.args
    return {**dict(zip(inspect.signature(attention.forward).parameters, args, strict=False)), **kwargs}


def stacks_of(model: Any, geometry: Geometry) -> dict[Stack, Any]:
    """The module that runs each stack: embeddings, layers, last norm; no head."""
    if geometry.is_encoder_decoder:
        both = model if hasattr(model, "get_encoder") else model.base_model  # a classifier of BART's has none itself
        return {"encoder": both.get_encoder(), "decoder": both.get_decoder()}
    if geometry.decoder is None:
        return {"encoder": model.base_model}
    return {"decoder": _text_decoder(model)}


def _text_decoder(model: Any) -> Any:
    """The decoder of a model, which among several parts is the one of the text; not all say which that is."""
    base, text = model.base_model, model.config.get_text_config()
    found = base.get_decoder()
    if found is model:  # whose class names no base, though it has a head
        return next((child for child in model.children() if isinstance(child, PreTrainedModel)), found)
    if type(getattr(found, "config", None)) is type(text):
        return found
    parts = (module for module in base.modules() if isinstance(module, PreTrainedModel))
    part = next((module for module in parts if type(module.config) is type(text)), None)
    return found if part is None else part.base_model.get_decoder()


def outer_of(model: Any, geometry: Geometry) -> Any:
    """The module that makes a decoder's embeddings of several modalities, positions and masks, or None."""
    if geometry.encoder is not None or model.config.get_text_config() is model.config:
        return None
    return None if model.base_model is _text_decoder(model) else model.base_model


def layer_numbers(geometry: Geometry, site: Site, count: int) -> Sequence[int]:
    """The layer of each of this many attention modules, as the configuration numbers those that attend."""
    shape = geometry.site(site)
    return range(count) if shape is None or len(shape.attending) != count else shape.attending


def pools_first_token(model: Any, geometry: Geometry) -> bool:
    """Whether the head of an encoder takes the first state for the whole sequence: with a prompt, a virtual token's.

    So do PEFT and the published classes, and BERT's own pooler, which is part of the stack.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

    return geometry.decoder is None and type(model).__name__ in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values()


def name_attention(model: Any, name: str) -> list[tuple[Any, str]]:
    """Let every configuration in the model name this attention; each of them, with the name that it had."""
    register()
    held = (getattr(module, "config", None) for module in model.modules())
    configs = {id(config): config for config in held if config is not None}  # some modules are given none
    before = [(config, config._attn_implementation) for config in configs.values()]
    for config in configs.values():
        config._attn_implementation_internal = name
    return before


@contextmanager
def attention_named(model: Any, name: str) -> Iterator[None]:
    """Every configuration in the model names this attention."""
    before = name_attention(model, name)
    try:
        yield
    finally:
        restore_names(before)


def restore_names(before: Iterable[tuple[Any, str]]) -> None:
    """Undo `name_attention`."""
    for config, name in before:
        config._attn_implementation_internal = name


def bias_table(module: nn.Module) -> Any:
    """The first module that holds the table of a T5-like relative bias, or None."""
    return next((found for found in module.modules() if hasattr(found, "relative_attention_bias")), None)
