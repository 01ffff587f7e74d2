"""adapter_config.json: what it says, checked, and what is written into it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from softbridge.errors import BaseModelError, CheckpointError
from softbridge.geometry import Geometry, Site
from softbridge.prompt import InputPrompt, KeyValuePrefix, SoftPrompt
from softbridge_compat import peft_releases
from softbridge_peft import facts
from softbridge_peft.origin import config_of_origin, unused
from softbridge_peft.training import described

_SHAPE = ("token_dim", "num_attention_heads", "num_layers")
_TASKS = ("num_tasks", "num_ranks")


@dataclass(frozen=True)
class Config:
    """What parsing needs of an adapter_config.json, with its types checked."""

    peft_type: str
    task: str | None
    name: str | None
    length: int
    submodules: int
    token_dim: int | None
    heads: int | None
    layers: int | None
    tasks: int = 1
    ranks: int = 1
    frozen: int = 0

    @property
    def kind(self) -> facts.Kind:
        return facts.KINDS[self.peft_type]

    @classmethod
    def check(cls, config: Mapping[str, Any]) -> Config:
        peft_type, task = config.get("peft_type"), config.get("task_type")
        if not isinstance(peft_type, str) or peft_type not in facts.KINDS:
            why = facts.OTHERS.get(peft_type) if isinstance(peft_type, str) else None
            raise CheckpointError(
                f"{facts.CONFIG_FILE} has peft_type {peft_type!r}" + (f": {why}" if why else ""),
                f"one of {', '.join(facts.KINDS)}",
                "LoRA and its kin, which change weights or layers, are no soft prompts; keep them in PEFT",
            )
        prefix, several = facts.KINDS[peft_type] == "prefix", _TASKS if peft_type == facts.MULTITASK else ()
        needed = ("num_virtual_tokens", *(_SHAPE if prefix else ()), *several)
        values: dict[str, Any] = {
            field: config.get(field)
            for field in ("num_virtual_tokens", "num_transformer_submodules", *_SHAPE, *several)
        }
        problems = [
            f"{field} is {value!r}"
            for field, value in values.items()
            if (field in needed if value is None else type(value) is not int or value < 1)
        ]
        problems += [
            f"{field} is {config[field]!r}"
            for field in ("base_model_name_or_path", "task_type")
            if not isinstance(config.get(field), str | None)
        ]
        if isinstance(task, str) and task not in facts.TASKS:
            problems.append(f"task_type is {task!r}")
        if problems:
            raise _broken(problems, f"whole numbers above 0, names as text, a task_type of {', '.join(facts.TASKS)}")
        length, submodules = values["num_virtual_tokens"], values["num_transformer_submodules"]
        most = 2 if task == facts.SEQ_2_SEQ_LM else 1
        submodules = submodules or most
        if submodules > most:
            problems.append(f"num_transformer_submodules is {submodules} with task_type {task!r}")
        token_dim, heads, layers = (values[field] for field in _SHAPE)
        if prefix and token_dim % heads:
            problems.append(f"token_dim is {token_dim}, no multiple of num_attention_heads {heads}")
        frozen = config.get("num_frozen_tokens", 1) if peft_type == facts.CARTRIDGE else 0
        if type(frozen) is not int or not 0 <= frozen <= length:
            problems.append(f"num_frozen_tokens is {frozen!r} of {length}")
        if peft_type == facts.CPT:
            lists = {field: config.get(field) for field in ("cpt_token_ids", "cpt_mask", "cpt_tokens_type_mask")}
            problems += [
                f"{field} is {value!r:.80}"
                for field, value in lists.items()
                if not isinstance(value, list) or len(value) != length or not all(type(item) is int for item in value)
            ]
            if task != facts.CAUSAL_LM:
                problems.append(f"task_type is {task!r}")
        if problems:
            raise _broken(problems, f"what PEFT itself can run as {peft_type}")
        if prefix and task == facts.SEQ_2_SEQ_LM and submodules == 1:
            # DynamicCache instead of EncoderDecoderCache: see softbridge_compat.peft_defects, peft-one-submodule.
            raise CheckpointError(
                "an encoder-decoder prefix with num_transformer_submodules 1",
                "num_transformer_submodules 2, PEFT's default",
                "PEFT runs such a file with errors: cross-attention, too, sees the prefix; train it with the default",
            )
        name = config.get("base_model_name_or_path") or None
        tasks, ranks = (values.get(field, 1) for field in _TASKS)
        return cls(peft_type, task, name, length, submodules, token_dim, heads, layers, tasks, ranks, frozen)

    @property
    def remedy(self) -> str:
        return "give the right --base (base=... in Python)" + (f"; the file names '{self.name}'" if self.name else "")


def _broken(problems: list[str], expected: str) -> CheckpointError:
    found = f"{facts.CONFIG_FILE} is broken: {'; '.join(problems)}"
    return CheckpointError(found, expected, "restore the file as PEFT wrote it")


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
            "PEFT's files name a task, which depends on the base model, and that is not known",
            "the base model's configuration, directory or hub id",
            "give it with --base (base=... in Python)",
        )
    if geometry.is_encoder_decoder:
        return facts.SEQ_2_SEQ_LM
    if geometry.encoder is None:
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
