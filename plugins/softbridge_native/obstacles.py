"""Why a prompt cannot run in a model, all reasons at once."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers.modeling_flash_attention_utils import flash_attn_supports_top_left_mask

from softbridge.errors import BaseModelError, EngineError, Obstacle
from softbridge.geometry import Geometry, read_geometry, stack_of
from softbridge.lowering.expressible import check_fits
from softbridge.prompt import KeyValuePrefix, SoftPrompt
from softbridge_native import cache_prefix as seed
from softbridge_native import wiring
from softbridge_native.anatomy import (
    bias_table,
    embedding_block,
    has_tokens,
    hears_scores,
    looks_back,
    outer_of,
    position_offset,
    position_table,
    stacks_of,
    takes_embeddings,
    tellable,
)
from softbridge_native.attention import FLASH, FLEX, UNDERLYING, underlying
from softbridge_native.attention_wiring import attention_modules, taken_in_turn, wired_otherwise, wiring_of
from softbridge_native.layout import origin_of
from softbridge_native.projection import adaption_obstacles


def check(prompt: SoftPrompt, model: Any) -> None:
    """Raise an `EngineError` with all obstacles to this prompt on this model."""
    found = obstacles(prompt, model)
    if found:
        raise EngineError(
            f"engine 'native' cannot run this prompt on this {type(model).__name__}: "
            + "; ".join(f"[{obstacle.name}] {obstacle.reason}" for obstacle in found),
            "a prompt that the engine can run on this model",
            "; ".join(dict.fromkeys(obstacle.remedy for obstacle in found)),
        )


def obstacles(prompt: SoftPrompt, model: Any) -> list[Obstacle]:
    """What stands against running this prompt on this model. See `Engine.obstacles`."""
    try:
        geometry = read_geometry(model.config)
        check_fits(prompt, geometry)
    except BaseModelError as error:
        return [Obstacle("base-model", error.found, error.remedy)]
    found = []
    stacks = stacks_of(model, geometry)
    for name, stack in stacks.items():
        if not has_tokens(stack):
            reason = f"{type(stack).__name__} has no token embeddings, or does not say which they are"
            others = [other for other in stacks if other != name and has_tokens(stacks[other])]
            remedy = f"use a prompt of the {others[0]}" if others else "use another engine"
            if any(part.stack == name for part in prompt.inputs) or not hasattr(stack, "config"):
                found.append(Obstacle("entry", reason, remedy))
    if found:
        return found
    for part in prompt.inputs:
        stack = stacks[part.stack]
        if part.entry == "after" and embedding_block(stack) is None:
            reason = f"{type(stack).__name__} has no module that is its embedding block and keeps its width"
            found.append(Obstacle("entry", reason, "use a prompt whose vectors enter before the embedding block"))
        if part.template is not None and outer_of(model, geometry) is not None:
            reason = "a template's places are token ids, and this model makes embeddings of them before its stack runs"
            found.append(Obstacle("entry", reason, "use a prompt in front of the sequence"))
        width = stack.get_input_embeddings().weight.shape[1]
        if part.entry == "before" and part.vectors.shape[1] != width:
            given = part.vectors.shape[1]
            reason = f"tokens of {type(stack).__name__} have embeddings of {width} numbers, and a vector {given}"
            found.append(Obstacle("entry", reason, "use a prompt of that width, or a prefix"))
        within = part.template is not None and not takes_embeddings(stack)
        why = wiring.looks_up(stack) if within else wiring.embeds(stack)
        if why is not None and (part.stack == "decoder" or "something else" not in why):
            reason = f"{type(stack).__name__} {why}, and a vector is of no token"
            found.append(Obstacle("entry", reason, "use a prefix"))
        elif looks_back(stack):
            reason = f"{type(stack).__name__} looks up which token each embedding is of, and a vector is of none"
            found.append(Obstacle("entry", reason, "use a prefix"))
    if prompt.prefixes:
        found += _attention_obstacles(prompt, model, geometry)
    for beside in prompt.adaptions:
        found += adaption_obstacles(beside, model, geometry)
    for name, stack in stacks.items():
        origin = origin_of(prompt, name)
        if name == "decoder" and seeded(prompt, model, geometry) is not None:
            continue  # see `_seed_obstacles`
        # Reserved rows of a table of positions can be told, too: some toolkits number RoBERTa's tokens from 0.
        told = tellable(stack) and origin >= -position_offset(stack)
        if not told and (origin < 0 or (origin > 0 and position_table(stack) is None)):
            reason = f"the {name}'s first token would stand at {origin}, and this model takes no position_ids"
            found.append(Obstacle("positions", reason, "use a prompt whose positions the model counts by itself"))
    return found


def _attention_obstacles(prompt: SoftPrompt, model: Any, geometry: Geometry) -> list[Obstacle]:
    implementation = underlying(model.config._attn_implementation)
    found = []
    if implementation not in UNDERLYING:
        *most, last = UNDERLYING
        reason = f"a prefix runs in {', '.join(most)} or {last} attention, the model has '{implementation}'"
        found.append(Obstacle("attention", reason, f"model.set_attn_implementation('{UNDERLYING[0]}')"))
    if (part := seeded(prompt, model, geometry)) is not None:
        return _seed_obstacles(part, prompt, model, geometry)
    modules, text = attention_modules(model, geometry), model.config.get_text_config()
    if implementation == FLASH:
        found += _flash_obstacles(prompt, model, geometry)
    for part in prompt.prefixes:
        shape, numbered = geometry.site(part.site), modules[part.site]
        heard, layers = list(numbered.values()), 0 if shape is None else len(shape.attending)
        if (turns := taken_in_turn(model, geometry, part.site)) is not None:
            found.append(Obstacle("attention", turns, "use an input prompt"))
        elif len(heard) != layers or any(getattr(m, "layer_idx", -1) not in (None, -1, i) for i, m in numbered.items()):
            reason = (
                f"attention layers at the site '{part.site}' of {type(model).__name__}: {layers} by its configuration, "
                f"{len(heard)} dispatch through transformers' attention interface"
            )
            found.append(
                Obstacle("attention", reason, "use an input prompt, a toolkit's engine, or other transformers")
            )
        table = bias_table(nn.ModuleList(heard))
        biased = range(prompt.positions.unbiased_from.get(stack_of(part.site), layers))
        some = 0 < len(part.layers.keys() & biased) < len(biased)
        if table is not None and prompt.positions.relative_bias == "skewed" and some:
            reason = "a skewed relative bias is known only where every layer that has it has a prefix"
            found.append(Obstacle("relative-bias", reason, "use the engine of the prompt's own toolkit"))
        if table is not None and implementation == FLEX:
            reason = "a relative bias of virtual tokens is not known to flex attention"
            found.append(Obstacle("relative-bias", reason, "model.set_attn_implementation('sdpa')"))
        if table is not None and "bidirectional" not in inspect.signature(table._relative_position_bucket).parameters:
            reason = f"{type(table).__name__} computes its relative bias in a way of its own"
            found.append(Obstacle("relative-bias", reason, "use an input prompt"))
        if prompt.positions.window == "slides" and part.site == "encoder" and shape is not None and shape.window:
            reason = "what a window that looks both ways drops is not known"
            found.append(Obstacle("window", reason, "use a prompt whose window is 'pinned'"))
        slides = prompt.positions.window == "slides" and part.site == "self" and shape is not None and shape.window
        if slides and getattr(text, "attention_chunk_size", None):
            reason = f"attention in chunks of {text.attention_chunk_size} tokens drops virtual tokens otherwise"
            found.append(Obstacle("window", reason, "use the engine of the prompt's own toolkit"))
        elif slides and (wired := wiring_of(model, geometry)) is not None and not wired.placed:
            reason = "its attention layers do not learn where their queries stand, so a prefix cannot slide"
            found.append(Obstacle("window", reason, "use a prompt whose window is 'pinned'"))
        latent = [name for name in ("kv_lora_rank", "qk_nope_head_dim") if getattr(text, name, None)]
        if latent or (shape is not None and getattr(text, "v_head_dim", None) not in (None, shape.head_dim)):
            reason = f"keys and values of this attention are no pair of one width ({', '.join(latent) or 'v_head_dim'})"
            found.append(Obstacle("attention", reason, "use an input prompt"))
        elif part.site == "self" and turns is None:
            for reason in wired_otherwise(model, geometry, numbered):
                found.append(Obstacle("attention", reason, "use an input prompt, or a toolkit's engine"))
    if any(getattr(module, "reorder_and_upcast_attn", False) for module in model.modules()):
        reason = "this model's attention upcasts only under the name 'eager'"
        found.append(Obstacle("attention", reason, "set reorder_and_upcast_attn to false in its configuration"))
    if (getattr(model, "_tp_size", None) or 1) > 1:
        reason = f"a tensor parallel plan gives each of {model._tp_size} processes its own heads, and a prefix has all"
        found.append(Obstacle("tensor-parallel", reason, "use an input prompt, or FSDP2, which shards and gathers it"))
    return found


def _flash_obstacles(prompt: SoftPrompt, model: Any, geometry: Geometry) -> list[Obstacle]:
    """What flash attention does otherwise: it knows which keys are padding, and their order, and nothing else."""
    found, remedy = [], "model.set_attn_implementation('sdpa')"
    if flash_attn_supports_top_left_mask():
        reason = "this build of flash attention aligns the past to the first key, which is virtual"
        found.append(Obstacle("attention", reason, remedy))
    modules, stacks = attention_modules(model, geometry), stacks_of(model, geometry)
    for part in prompt.prefixes:
        shape, heard = geometry.site(part.site), list(modules[part.site].values())
        if heard and hears_scores(model, stacks[stack_of(part.site)], heard[0]):
            reason = f"{type(model).__name__} makes the mask of flash attention under that very name only"
            found.append(Obstacle("attention", reason, remedy))
        if part.site == "cross":
            reason = "flash attention takes the padding of the encoder's states for that of the queries"
            found.append(Obstacle("attention", reason, remedy))
        elif shape is not None and shape.window:
            # The window counts keys as they lie. That is their distance, if positions count the prefix.
            pinned, start = prompt.positions.window == "pinned", origin_of(prompt, stack_of(part.site))
            if pinned or start != part.length:
                why = "is pinned" if pinned else f"moves the tokens by {start} instead of {part.length} places"
                reason = f"flash attention counts the virtual tokens into its window, and the prefix {why}"
                found.append(Obstacle("window", reason, remedy))
    return found


def seeded(prompt: SoftPrompt, model: Any, geometry: Geometry) -> KeyValuePrefix | None:
    """The prefix that has no way into the model but its cache, or None."""
    part = prompt.prefix("self")
    alone = part is not None and geometry.decoder is not None and not geometry.is_encoder_decoder and not prompt.inputs
    return part if alone and not attention_modules(model, geometry)["self"] else None


def _seed_obstacles(part: KeyValuePrefix, prompt: SoftPrompt, model: Any, geometry: Geometry) -> list[Obstacle]:
    stack, shape = stacks_of(model, geometry)["decoder"], geometry.site("self")
    if shape is None:
        return []
    if outer_of(model, geometry) is not None:
        reason = f"{type(stack).__name__} has no way to a prefix but its cache, and the model around it makes the mask"
        return [Obstacle("attention", reason, "use an input prompt")]
    start = prompt.positions.start.get("decoder", 0)
    return [
        Obstacle(
            "attention",
            f"{type(model).__name__} does not dispatch through transformers' attention interface, and {reason}",
            "use an input prompt, a toolkit's engine, or other transformers",
        )
        for reason in seed.reasons(stack, shape, part, start, tellable(stack) or position_table(stack) is not None)
    ]
