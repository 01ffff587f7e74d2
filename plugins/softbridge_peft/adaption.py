"""LLaMA-Adapter (Zhang et al. 2023) as PEFT has it: its files, and what there is of it in a live model.

PEFT counts it as no prompt learning (tuners/adaption_prompt/): it wraps the attention modules of the last layers. A
wrapped one runs, projects `adaption_prompt` [1, P, H] with the projections of keys and values under it, attends to
them with queries that it computes anew, in a softmax of its own whose weights `adaption_gate` [1] multiplies, and adds
the sum to the module's output: through the output projection, or, of a GPT-2, past it. Both are parameters, saved
under the name of the module that they wrap.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from softbridge.arrays import Array
from softbridge.errors import BaseModelError, CheckpointError, Obstacle
from softbridge.geometry import Geometry
from softbridge.lowering.expressible import check_fits
from softbridge.prompt import Adaption, AdaptionPrompt, BaseId, Joins, Origin, Positions, SoftPrompt
from softbridge_peft import facts

TYPE = "ADAPTION_PROMPT"
_VECTORS, _GATE = "adaption_prompt", "adaption_gate"
_KEY = re.compile(rf"(base_model\.model\..+)\.(\d+)\.(\w+)\.({_VECTORS}|{_GATE})")
_ELSEWHERE = "choose a target that can hold it, such as --to softbridge"


@dataclass(frozen=True)
class Family:
    """What PEFT knows of a family (tuners/adaption_prompt/config.py, TRANSFORMERS_MODEL_CONFIG).

    Attributes:
        module: the name of its attention modules, which ``target_modules`` names.
        layers: where its layers are in a model with a head.
        wraps: the class of what PEFT wraps them in, whose softmax is in float32 whatever the model's precision.
        joins: where the sum is added.
    """

    module: str
    layers: str
    wraps: str
    joins: Joins


#: model_type -> `Family`: all that PEFT has.
FAMILIES: Mapping[str, Family] = {
    "llama": Family("self_attn", "model.layers", "AdaptedAttention", "module"),
    "mistral": Family("self_attn", "model.layers", "AdaptedAttention", "module"),
    "gpt2": Family("attn", "transformer.h", "AdaptedAttentionGPT", "output"),
}


def read(
    config: Mapping[str, Any], tensors: Mapping[str, Array], geometry: Geometry | None, notes: Sequence[str] = ()
) -> SoftPrompt:
    """The prompt of a configuration and its tensors; see `softbridge_peft.format.parse`.

    Raises:
        CheckpointError: configuration and tensors are malformed, incomplete, or do not agree.
        BaseModelError: the geometry is not that of a model which PEFT can run them on.
    """
    length, count, module = (config.get(name) for name in ("adapter_len", "adapter_layers", "target_modules"))
    name = config.get("base_model_name_or_path")
    joins = {family.module: family.joins for family in FAMILIES.values()}.get(module if isinstance(module, str) else "")
    if type(length) is not int or type(count) is not int or joins is None or not isinstance(name, str | None):
        raise CheckpointError(
            f"{facts.CONFIG_FILE} has adapter_len {length!r:.40}, adapter_layers {count!r:.40}, target_modules "
            f"{module!r:.40}, base_model_name_or_path {name!r:.40}",
            f"two whole numbers; {' or '.join(sorted({f.module for f in FAMILIES.values()}))}; a text or null",
            "restore the file as PEFT wrote it",
        )
    found, stems = _layers(tensors, module)
    layers = sorted(found)
    whole = all(one.keys() == {_VECTORS, _GATE} for one in found.values())
    if len(stems) != 1 or not whole or layers != list(range(layers[0], layers[0] + count)):
        raise CheckpointError(
            f"tensors of the layers {layers} of {module!r}: {', '.join(sorted(tensors)):.400}",
            f"'...N.{module}.{_VECTORS}' and '...N.{module}.{_GATE}' of {count} layers that follow one another",
            f"check that {facts.CONFIG_FILE} belongs to these tensors",
        )
    shapes = {(one[_VECTORS].shape, one[_GATE].shape) for one in found.values()}
    vectors, gate = next(iter(shapes))
    odd = [array.dtype.name for array in tensors.values() if array.dtype.name not in facts.FLOATS]
    if len(shapes) > 1 or odd or len(vectors) != 3 or vectors[:2] != (1, length) or gate != (1,) or 0 in vectors:
        raise CheckpointError(
            f"vectors and gates of shapes {sorted(shapes)}" + (f", of {odd[0]}" if odd else ""),
            f"[1, {length}, H] and [1] in every layer, by {facts.CONFIG_FILE}, floating point",
            f"check that {facts.CONFIG_FILE} belongs to these tensors",
        )
    part = AdaptionPrompt("self", {n: Adaption(one[_VECTORS][0], one[_GATE]) for n, one in found.items()}, joins)
    origin = Origin("peft", {"config": dict(config), "stem": next(iter(stems))}, notes=tuple(notes))
    prompt = SoftPrompt((part,), Positions(), BaseId(name or None, geometry), origin=origin)
    if geometry is not None:
        check_fits(prompt, geometry)
        against = refusals(part, geometry)
        if against:
            raise BaseModelError(
                "; ".join(obstacle.reason for obstacle in against),
                "the base model that the prompt was trained for",
                "check --base" + (f"; the file names '{name}'" if name else ""),
            )
    return prompt


def _layers(tensors: Mapping[str, Array], module: Any) -> tuple[dict[int, dict[str, Array]], set[str]]:
    """Layer number -> name -> array, and what stands before the numbers."""
    matches = {name: _KEY.fullmatch(name) for name in tensors}
    unexpected = sorted(name for name, match in matches.items() if match is None or match[3] != module)
    if unexpected or not matches:
        raise CheckpointError(
            f"unexpected tensors: {', '.join(unexpected):.400}" if unexpected else "no tensors",
            f"'base_model.model...N.{module}.{_VECTORS}' and '...{_GATE}', and nothing else",
            f"check that {facts.CONFIG_FILE} belongs to these tensors",
        )
    found: dict[int, dict[str, Array]] = {}
    for name, match in matches.items():
        if match is not None:
            found.setdefault(int(match[2]), {})[match[4]] = tensors[name]
    return found, {match[1] for match in matches.values() if match is not None}


def refusals(part: AdaptionPrompt, geometry: Geometry | None) -> list[Obstacle]:
    """What of the part PEFT cannot hold, beyond what the capabilities say."""
    return [Obstacle(name, reason, _ELSEWHERE) for name, reason in _against(part, geometry)]


def _against(part: AdaptionPrompt, geometry: Geometry | None) -> Iterator[tuple[str, str]]:
    gates = max(len(one.gate) for one in part.layers.values())
    if gates > 1:
        yield "gates", f"PEFT has one gate for all heads of a layer, this prompt {gates}"
    if geometry is None:
        return
    family = FAMILIES.get(geometry.model_type)
    if family is None or part.site != "self" or geometry.decoder is None:
        yield "family", f"PEFT's {TYPE} is for {', '.join(FAMILIES)}, not for {geometry.model_type}"
        return
    stack = geometry.decoder
    if part.joins != family.joins:
        yield "projection", f"PEFT's {geometry.model_type} adds the prompt's sum to: {family.joins}, not {part.joins}"
    last = list(range(stack.layers - len(part.layers), stack.layers))
    if list(part.layers) != last:
        yield "layers", f"PEFT wraps the last layers, {last}, and this prompt is in {list(part.layers)}"
    if geometry.hidden != stack.heads * stack.head_dim:
        reason = "PEFT takes hidden size / (key/value heads · head size) for query heads per key/value head, and the "
        yield "shape", reason + f"hidden size {geometry.hidden} is not that of {stack.heads} heads of {stack.head_dim}"


def config_of(
    prompt: SoftPrompt, geometry: Geometry | None, task: str | None, origin: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of adapter_config.json.

    Raises:
        BaseModelError: the geometry is needed and not known.
    """
    part = prompt.parts[0]
    given = origin if origin.get("peft_type") == TYPE else {**{n: origin.get(n) for n in ("auto_mapping", "revision")}}
    module = given.get("target_modules")
    if geometry is not None:
        module = FAMILIES[geometry.model_type].module
    if module is None:
        raise BaseModelError(
            "PEFT's files name the attention modules, which depend on the base model, and no base model was given",
            "the base model's configuration, directory or hub id",
            "give it with --base (base=... in Python)",
        )
    task = given.get("task_type", facts.CAUSAL_LM) if task is None else task
    said = {"base_model_name_or_path": prompt.base.name, "task_type": task, "inference_mode": True, "peft_type": TYPE}
    sizes = {"adapter_layers": len(_adaption(part).layers), "adapter_len": part.length, "target_modules": module}
    return {**given, **said, **sizes}


def tensors_of(prompt: SoftPrompt, config: Mapping[str, Any]) -> dict[str, Array]:
    """The tensors in the layout that `config_of` announces."""
    module, stem = config["target_modules"], None
    if prompt.origin is not None and prompt.origin.format == "peft":
        stem = prompt.origin.details.get("stem")
    if not isinstance(stem, str):
        path = next(family.layers for family in FAMILIES.values() if family.module == module)
        headless = config["task_type"] == facts.FEATURE_EXTRACTION
        stem = f"base_model.model.{path.split('.')[-1] if headless else path}"
    tensors = {}
    for layer, one in _adaption(prompt.parts[0]).layers.items():
        tensors[f"{stem}.{layer}.{module}.{_VECTORS}"] = one.vectors[None]
        tensors[f"{stem}.{layer}.{module}.{_GATE}"] = one.gate
    return tensors


def _adaption(part: Any) -> AdaptionPrompt:
    if not isinstance(part, AdaptionPrompt):
        raise TypeError("an adaption prompt is asked for")
    return part


def under_names_of(state: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors under the names that a live model's state has for the same layers."""
    names = {match.groups()[1:]: name for name in state if (match := _KEY.fullmatch(name)) is not None}
    return {names[match.groups()[1:]]: t for name, t in tensors.items() if (match := _KEY.fullmatch(name)) is not None}


def float32_regions(geometry: Geometry) -> Sequence[str]:
    """The classes of the modules that compute in float32 in a model of float64."""
    family = FAMILIES.get(geometry.model_type)
    return () if family is None else (family.wraps,)


def is_parameter(name: str) -> bool:
    """Whether a parameter of a live model is one of these."""
    return name.endswith((_VECTORS, _GATE))


def unwrap(model: Any) -> None:
    """Put the attention modules of a live model back where PEFT wrapped them."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if hasattr(child, _GATE):
                setattr(module, name, child.model)
