"""PEFT's files, without PEFT: adapter_config.json beside adapter_model.safetensors or .bin.

The same two pure functions serve the files and the engine: `parse` (configuration and tensors -> prompt) and, the other
way, `config_of` with `tensors_of`. So what the engine runs is what a file would hold.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from softbridge import untrusted
from softbridge.capabilities import UP_TO_FLOAT32, Capabilities
from softbridge.errors import BaseModelError, CheckpointError, Obstacle
from softbridge.geometry import Geometry, Site, Stack
from softbridge.lower import check_fits
from softbridge.prompt import (
    Array,
    BaseId,
    InputPrompt,
    KeyValue,
    KeyValuePrefix,
    Origin,
    Part,
    Positions,
    SoftPrompt,
)
from softbridge_peft import facts

_SHAPE = ("token_dim", "num_attention_heads", "num_layers")
_FLOATS = ("bfloat16", "float16", "float32", "float64")


class PeftFormat:
    """Prompt tuning, P-tuning (read; it is stored evaluated) and prefix tuning of PEFT."""

    name = "peft"
    summary = "Hugging Face PEFT: prompt tuning, P-tuning, prefix tuning"
    encodings = ("safetensors", "bin")
    engine = "peft"
    capabilities = Capabilities(
        inputs=frozenset((stack, "before", "before-sequence") for stack in get_args(Stack)),
        prefix_sites=frozenset(("self", "encoder")),
        input_start="counted",
        prefix_start="counted",
        positions_told=True,
        relative_bias="plain",
        window="slides",
        training=frozenset(),
        dtypes=UP_TO_FLOAT32,
        head=True,
    )

    def sniff(self, files: untrusted.Files) -> bool:
        if files.is_file or facts.CONFIG_FILE not in files:
            return False
        return "peft_type" in files.json(facts.CONFIG_FILE)

    def read(self, files: untrusted.Files, geometry: Geometry | None) -> SoftPrompt:
        weights = next((name for name in facts.WEIGHTS_FILES if name in files), None)
        if facts.CONFIG_FILE not in files or weights is None:
            raise CheckpointError(
                f"{files.path} holds {', '.join(files.names) or 'nothing'}",
                f"{facts.CONFIG_FILE} and one of {', '.join(facts.WEIGHTS_FILES)}",
                "pass the directory that save_pretrained wrote (an adapter with a name has its own subdirectory)",
            )
        return parse(files.json(facts.CONFIG_FILE), files.tensors(weights), geometry)

    def obstacles(self, prompt: SoftPrompt, geometry: Geometry | None) -> Sequence[Obstacle]:
        elsewhere = "choose a target that can hold it, such as --to softbridge"
        found = []
        if len(prompt.parts) > 1:
            found.append(Obstacle("parts", f"PEFT holds one part and this prompt has {len(prompt.parts)}", elsewhere))
        for part in prompt.parts:
            found += [Obstacle(name, reason, elsewhere) for name, reason in _refusals(part, geometry)]
        foreign = [name for name in prompt.head if name.split(".")[0] not in facts.HEAD_MODULES]
        if foreign and not _origin(prompt):
            reason = f"PEFT has heads named {', '.join(facts.HEAD_MODULES)}, this prompt has {', '.join(foreign)}"
            found.append(Obstacle("head", reason, "leave the head out: replace(prompt, head={})"))
        return found

    def write(self, prompt: SoftPrompt, geometry: Geometry | None, encoding: str | None = None) -> Mapping[str, bytes]:
        config = config_of(prompt, geometry or prompt.base.geometry)
        tensors = tensors_of(prompt, config)
        weights = (
            {facts.WEIGHTS_FILES[1]: untrusted.pickle_bytes(tensors)}
            if encoding == "bin"
            else {facts.WEIGHTS_FILES[0]: untrusted.safetensors_bytes(tensors, {"format": "pt"})}
        )
        return {facts.CONFIG_FILE: json.dumps(config, indent=2, sort_keys=True).encode(), **weights}

    def advice(self, prompt: SoftPrompt, geometry: Geometry | None) -> Sequence[str]:
        told = [
            f"pass position_ids = torch.arange(T) - {counted - start} for T unpadded tokens, in every call: PEFT adds "
            f"the prefix length {counted} to them, and the first real token stands at {start}"
            for stack, counted in prompt.counted().items()
            if prompt.prefixes and (start := prompt.positions.start[stack]) != counted
        ]
        return [*told, "pad batches on the right: PEFT puts virtual tokens before the pads of a left-padded row"]


FORMAT = PeftFormat()


@dataclass(frozen=True)
class _Config:
    """What parsing needs of an adapter_config.json, with its types checked."""

    kind: facts.Kind
    task: str | None
    name: str | None
    length: int
    submodules: int
    token_dim: int | None
    heads: int | None
    layers: int | None

    @classmethod
    def check(cls, config: Mapping[str, Any]) -> _Config:
        peft_type, task = config.get("peft_type"), config.get("task_type")
        if not isinstance(peft_type, str) or peft_type not in facts.KINDS:
            raise CheckpointError(
                f"{facts.CONFIG_FILE} has peft_type {peft_type!r}",
                f"one of {', '.join(facts.KINDS)}",
                "evaluate other prompt methods in PEFT and save them as one of these; LoRA and its kin are no prompts",
            )
        kind = facts.KINDS[peft_type]
        needed = ("num_virtual_tokens", *(_SHAPE if kind == "prefix" else ()))
        values: dict[str, Any] = {
            field: config.get(field) for field in ("num_virtual_tokens", "num_transformer_submodules", *_SHAPE)
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
        submodules = values["num_transformer_submodules"] or (2 if task == facts.SEQ_2_SEQ_LM else 1)
        if submodules > (2 if task == facts.SEQ_2_SEQ_LM else 1):
            problems.append(f"num_transformer_submodules is {submodules} with task_type {task!r}")
        token_dim, heads, layers = (values[field] for field in _SHAPE)
        if kind == "prefix" and token_dim % heads:
            problems.append(f"token_dim is {token_dim}, no multiple of num_attention_heads {heads}")
        if problems:
            raise _broken(problems, "numbers that PEFT can run (two submodules belong to encoder-decoder models)")
        if kind == "prefix" and task == facts.SEQ_2_SEQ_LM and submodules == 1:
            # DynamicCache instead of EncoderDecoderCache: see softbridge_compat.peft_defects, peft-one-submodule.
            raise CheckpointError(
                "an encoder-decoder prefix with num_transformer_submodules 1",
                "num_transformer_submodules 2, PEFT's default",
                "PEFT runs such a file with errors: cross-attention, too, sees the prefix; train it with the default",
            )
        name = config.get("base_model_name_or_path") or None
        return cls(kind, task, name, values["num_virtual_tokens"], submodules, token_dim, heads, layers)

    @property
    def remedy(self) -> str:
        return "give the right --base (base=... in Python)" + (f"; the file names '{self.name}'" if self.name else "")


def _broken(problems: list[str], expected: str) -> CheckpointError:
    found = f"{facts.CONFIG_FILE} is broken: {'; '.join(problems)}"
    return CheckpointError(found, expected, "restore the file as PEFT wrote it")


def parse(config: Mapping[str, Any], tensors: Mapping[str, Array], geometry: Geometry | None) -> SoftPrompt:
    """The prompt that PEFT runs for a configuration and its tensors.

    Args:
        config: what adapter_config.json holds.
        tensors: prompt_embeddings, and tensors of a head.
        geometry: of the base model, to check against and to say which stack is prompted; None if not known.

    Raises:
        CheckpointError: the two are malformed, incomplete, or do not agree.
        BaseModelError: they do not say which stack they are for and no geometry was given, or do not fit it.
    """
    fields = _Config.check(config)
    _check_tensors(fields, tensors)
    stack = _stack(fields, geometry)
    flat = tensors[facts.PROMPT]
    notes = []
    part: Part
    if fields.kind == "input":
        part = InputPrompt(flat[: fields.length], stack)
        if fields.submodules == 2:
            notes.append(f"rows {fields.length} to {2 * fields.length - 1}, which PEFT never uses, are left out")
    else:
        site: Site = "encoder" if stack == "encoder" else "self"
        part = _read_prefix(fields, flat, site)
        if fields.submodules == 2 and len(part.layers) % 2 == 0:
            notes.append("blocks of odd number, which PEFT never uses with two submodules, are left out")
    prompt = SoftPrompt(
        parts=(part,),
        positions=Positions({stack: fields.length}),
        base=BaseId(fields.name, geometry),
        head={name.removeprefix(facts.HEAD): array for name, array in tensors.items() if name != facts.PROMPT},
        origin=Origin("peft", {"config": dict(config), "notes": notes}),
    )
    if geometry is not None:
        check_fits(prompt, geometry)
        _check_layers(fields, geometry)
    return prompt


def _check_tensors(fields: _Config, tensors: Mapping[str, Array]) -> None:
    unexpected = sorted(name for name in tensors if name != facts.PROMPT and not name.startswith(facts.HEAD))
    missing = [facts.PROMPT] if facts.PROMPT not in tensors else []
    if unexpected or missing:
        raise CheckpointError(
            f"tensors are missing ({', '.join(missing) or 'none'}) or unexpected ({', '.join(unexpected) or 'none'})",
            f"'{facts.PROMPT}', and nothing else but a head's '{facts.HEAD}...'",
            f"check that {facts.CONFIG_FILE} belongs to these tensors",
        )
    array = tensors[facts.PROMPT]
    width = fields.token_dim
    rows = fields.length
    if fields.kind == "input":
        rows *= fields.submodules
    else:
        width = 2 * (fields.layers or 0) * (width or 0)
    columns = array.shape[1] if array.ndim == 2 else 0
    if columns == 0 or array.shape != (rows, width or columns):
        raise CheckpointError(
            f"'{facts.PROMPT}' has shape {list(array.shape)}",
            f"{[rows, width or 'token_dim']}, by {facts.CONFIG_FILE} (num_virtual_tokens, num_layers, token_dim)",
            f"check that {facts.CONFIG_FILE} belongs to these tensors",
        )
    odd = sorted(f"'{name}' is {a.dtype}" for name, a in tensors.items() if a.dtype.name not in _FLOATS)
    if odd:
        raise CheckpointError(", ".join(odd), f"one of {', '.join(_FLOATS)}", "save the tensors as floating point")


def _stack(fields: _Config, geometry: Geometry | None) -> Stack:
    """Which stack the prompt is for, by the base model if it is known, else by the task."""
    seq2seq, causal = fields.task == facts.SEQ_2_SEQ_LM, fields.task == facts.CAUSAL_LM
    if geometry is None:
        if not (seq2seq or causal):
            raise BaseModelError(
                f"task_type {fields.task!r} in the file does not say whether its base model is an encoder or a decoder",
                "the base model's configuration, directory or hub id",
                fields.remedy,
            )
        return "encoder" if seq2seq and fields.kind == "input" else "decoder"
    if seq2seq != geometry.is_encoder_decoder or (causal and geometry.decoder is None):
        raise BaseModelError(
            f"the file's task_type is {fields.task!r} and the base model ({geometry.model_type}) has "
            f"{'no' if geometry.encoder is None else 'an'} encoder and "
            f"{'no' if geometry.decoder is None else 'a'} decoder",
            "a base model of the kind that the prompt was trained for",
            fields.remedy,
        )
    if seq2seq:
        return "encoder" if fields.kind == "input" else "decoder"
    return "decoder" if geometry.encoder is None else "encoder"


def _check_layers(fields: _Config, geometry: Geometry) -> None:
    """Refuse a base model of another depth: PEFT prefixes every layer, and records the depth for prompt tuning too."""
    shape = geometry.site("self" if geometry.is_encoder_decoder and fields.kind == "prefix" else _first(geometry))
    if fields.layers is not None and shape is not None and fields.layers != shape.layers:
        raise BaseModelError(
            f"the file is for {fields.layers} layers, the base model ({geometry.model_type}) has {shape.layers}",
            "the base model that the prompt was trained for",
            fields.remedy,
        )


def _first(geometry: Geometry) -> Site:
    """The stack whose numbers PEFT records: the encoder's where there is one."""
    return "self" if geometry.encoder is None else "encoder"


def _read_prefix(fields: _Config, flat: Array, site: Site) -> KeyValuePrefix:
    heads, layers = fields.heads or 0, fields.layers or 0
    stored = KeyValuePrefix.from_flat(site, flat, tuple(range(layers)), heads, (fields.token_dim or 0) // heads)
    used = {layer: stored.layers[facts.stored_block(layer, layers, fields.submodules)] for layer in range(layers)}
    return KeyValuePrefix(site, used)


def _refusals(part: Part, geometry: Geometry | None) -> list[tuple[str, str]]:
    """(name, reason) of everything in one part that PEFT cannot hold, beyond what the capabilities say."""
    found = []
    composite = geometry is not None and geometry.is_encoder_decoder
    wide = [name for name, array in part.arrays() if not _fits_float32(array)]
    if wide:
        found.append(("precision", f"PEFT holds prompts in float32, which would round {', '.join(wide)}"))
    if isinstance(part, InputPrompt):
        if part.stack == "decoder" and composite:
            found.append(("stack", "PEFT puts vectors into the encoder of an encoder-decoder model, not the decoder"))
        return found
    if part.site == "encoder" and composite:
        return [*found, ("stack", "PEFT prefixes the decoder of an encoder-decoder model, not its encoder")]
    shape = None if geometry is None else geometry.site(part.site)
    count = max(part.layers) + 1 if shape is None else shape.layers
    absent = sorted(set(range(count)) - set(part.layers))
    if absent:
        reason = f"PEFT prefixes every layer and this prompt leaves out {absent}; zeros would take attention, too"
        found.append(("layers", reason))
    if len({(pair.keys.shape, pair.keys.dtype) for pair in part.layers.values()}) > 1:
        found.append(("ragged", "PEFT holds one head size, number of heads and precision for all layers"))
    elif composite and not absent and _stored_blocks(part) is None:
        found.append(
            (
                "repeated-layers",
                "PEFT gives decoder layer i of an encoder-decoder model block 2i mod L, so that with an even number of "
                "layers the upper half must repeat the lower, and here it does not",
            )
        )
    return found


def _fits_float32(array: Array) -> bool:
    return array.dtype.itemsize <= 4 or bool((array.astype(np.float32).astype(array.dtype) == array).all())


def _stored_blocks(prefix: KeyValuePrefix) -> dict[int, KeyValue] | None:
    """Stored block -> its content with two submodules, dead blocks left out, or None if the layers do not allow it."""
    blocks: dict[int, KeyValue] = {}
    for layer, pair in prefix.layers.items():
        if blocks.setdefault(facts.stored_block(layer, len(prefix.layers), 2), pair) != pair:
            return None
    return blocks


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
    kind: facts.Kind = "input" if isinstance(part, InputPrompt) else "prefix"
    origin = {} if fresh else _origin(prompt)
    if facts.KINDS.get(origin.get("peft_type", "")) != kind:
        origin = {}
    if task is None:
        task = origin["task_type"] if "task_type" in origin else _task(prompt, geometry)
    sizes: dict[str, Any] = {"num_virtual_tokens": part.length}
    if isinstance(part, InputPrompt):
        shape = None if geometry is None else geometry.site(_first(geometry))
        sizes["token_dim"] = part.vectors.shape[1]
        sizes["num_layers"] = origin.get("num_layers") if shape is None else shape.layers
        sizes["num_attention_heads"] = origin.get("num_attention_heads") if shape is None else shape.heads
        sizes["num_transformer_submodules"] = 1
    else:
        kv_heads, _, head_dim = part.layers[0].keys.shape
        sizes["token_dim"] = kv_heads * head_dim
        sizes["num_layers"] = len(part.layers)
        sizes["num_attention_heads"] = kv_heads
        sizes["num_transformer_submodules"] = 2 if task == facts.SEQ_2_SEQ_LM else 1
    defaults = dict(facts.DEFAULTS[kind])
    if kind == "prefix":
        defaults["encoder_hidden_size"] = sizes["token_dim"]
    if prompt.head:
        defaults["modules_to_save"] = sorted({name.split(".")[0] for name in prompt.head})
    named = {"base_model_name_or_path": prompt.base.name, "task_type": task, "inference_mode": True}
    return {"peft_type": facts.PEFT_TYPES[kind], **(origin or defaults), **named, **sizes}


def _origin(prompt: SoftPrompt) -> Mapping[str, Any]:
    """The configuration of the PEFT file that the prompt was read from, if it was."""
    origin = prompt.origin
    config: Mapping[str, Any] = {}
    if origin is not None and origin.format == "peft":
        config = origin.details.get("config", {})
    return config


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
    # Without a classifier in the file PEFT refuses SEQ_CLS: see softbridge_compat.peft_defects, peft-missing-head.
    return facts.SEQ_CLS if prompt.head else facts.FEATURE_EXTRACTION


def tensors_of(prompt: SoftPrompt, config: Mapping[str, Any]) -> dict[str, Array]:
    """The tensors of a prompt in the layout that its `config_of` announces."""
    part = prompt.parts[0]
    head = {facts.HEAD + name: array for name, array in prompt.head.items()}
    if isinstance(part, InputPrompt):
        return {facts.PROMPT: part.vectors, **head}
    if config["num_transformer_submodules"] == 2:
        blocks = _stored_blocks(part)
        if blocks is None:
            raise ValueError("the prompt has obstacles")
        zeros = np.zeros_like(part.layers[0].keys)
        dead = KeyValue(zeros, zeros)
        part = KeyValuePrefix(part.site, {block: blocks.get(block, dead) for block in range(len(part.layers))})
    return {facts.PROMPT: part.flat(), **head}
