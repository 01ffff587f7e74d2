"""adapter_config.json for a prompt that is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from softbridge.errors import BaseModelError
from softbridge.geometry import Geometry, Site
from softbridge.prompt import AdaptionPrompt, InputPrompt, KeyValuePrefix, SoftPrompt
from softbridge_compat import peft_releases
from softbridge_peft import adaption, facts
from softbridge_peft.origin import config_of_origin, unused
from softbridge_peft.prompt_encoder import described


def config_of(
    prompt: SoftPrompt, geometry: Geometry | None, task: str | None = None, *, fresh: bool = False
) -> dict[str, Any]:
    """The content of adapter_config.json for a prompt.

    Args:
        prompt: one that `PeftFormat.obstacles` lets through.
        geometry: of the base model; None if not known.
        task: PEFT's task_type; by the prompt's origin and the geometry if None.
        fresh: do not give back the configuration that the prompt was read with.

    Raises:
        BaseModelError: the geometry is needed and not known.
    """
    part = prompt.parts[0]
    origin = {} if fresh else config_of_origin(prompt)
    if isinstance(part, AdaptionPrompt):
        return adaption.config_of(prompt, geometry, task, origin)
    if task is None:
        task = origin["task_type"] if "task_type" in origin else _task(prompt, geometry)
    peft_type, implied = _method(prompt, origin, task)
    sizes: dict[str, Any] = {"num_virtual_tokens": part.length}
    if isinstance(part, InputPrompt):
        shape = None if geometry is None else geometry.site(first_site(geometry))
        sizes["token_dim"] = part.vectors.shape[1]
        sizes["num_layers"] = origin.get("num_layers") if shape is None else shape.layers
        sizes["num_attention_heads"] = origin.get("num_attention_heads") if shape is None else shape.heads
        sizes["num_transformer_submodules"] = 1 if fresh or not unused(prompt, peft_type) else 2
    else:
        kv_heads, head_dim = provision(part)
        sizes["token_dim"] = kv_heads * head_dim
        sizes["num_layers"] = len(part.layers)
        sizes["num_attention_heads"] = kv_heads
        sizes["num_transformer_submodules"] = 2 if task == facts.SEQ_2_SEQ_LM else 1
    if origin.get("peft_type") == peft_type:
        given = origin
    else:
        given = {**facts.COMMON, **{name: origin[name] for name in facts.COMMON if name in origin}}
        given |= facts.DEFAULTS[peft_type]
        if peft_type == facts.PREFIX_TUNING:
            given["encoder_hidden_size"] = sizes["token_dim"]
        if prompt.head and given["modules_to_save"] is None:
            given["modules_to_save"] = sorted({name.split(".")[0] for name in prompt.head})
    name = prompt.base.name or ("" if given.get("base_model_name_or_path") == "" else None)  # as old releases write
    named = {"base_model_name_or_path": name, "task_type": task, "inference_mode": True}
    said = {**given, **implied, **named, **sizes, "peft_type": peft_type}
    bloom = geometry is not None and geometry.model_type == facts.BLOOM
    if bloom and peft_releases.scrambles_bloom(peft_releases.release(said, None)):
        # What is written has today's order: no reader shall take it for that of the release it came from.
        said = {**facts.COMMON, **said}
        said.pop("peft_version", None)
    return said


def _method(prompt: SoftPrompt, origin: Mapping[str, Any], task: str | None) -> tuple[str, dict[str, Any]]:
    """The peft_type of a prompt: what trained it, else what it was read as; and what follows for the configuration."""
    part = prompt.parts[0]
    kind: facts.Kind = "input" if isinstance(part, InputPrompt) else "prefix"
    found = None if prompt.training is None else described(prompt.training, part)
    if found is not None and (found[0] != facts.MULTITASK or task not in facts.UNTOLD):
        return found
    read = origin.get("peft_type", "")
    if facts.KINDS.get(read) != kind or read == facts.MULTITASK:  # which is nothing without its tasks
        read = facts.PEFT_TYPES[kind]
    return read, {}


def _task(prompt: SoftPrompt, geometry: Geometry | None) -> str:
    if geometry is None:
        raise BaseModelError(
            "PEFT's files name a task, which depends on the base model, and no base model was given",
            "the base model's configuration, directory or hub id",
            "give it with --base (base=... in Python)",
        )
    if geometry.is_encoder_decoder:
        return facts.SEQ_2_SEQ_LM
    if geometry.encoder is None and not prompt.head:
        return facts.CAUSAL_LM
    if prompt.base.task in facts.TASK_OF_HEAD:
        return facts.TASK_OF_HEAD[prompt.base.task]
    # Without a classifier in the file PEFT refuses SEQ_CLS: see softbridge_compat.peft_defects, peft-missing-head.
    return facts.SEQ_CLS if prompt.head else facts.FEATURE_EXTRACTION


def first_site(geometry: Geometry) -> Site:
    """The stack whose numbers PEFT records: the encoder's where there is one."""
    return "self" if geometry.encoder is None else "encoder"


def provision(part: KeyValuePrefix) -> tuple[int, int]:
    """(K, D) that PEFT holds for every layer: as many heads and as wide ones as any has. A layer takes the first."""
    shapes = [pair.keys.shape for pair in part.layers.values()]
    return max(heads for heads, _, _ in shapes), max(width for _, _, width in shapes)
