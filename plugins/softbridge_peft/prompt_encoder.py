"""What trained a prompt: PEFT's parameterisations in our words, and the file that keeps what PEFT throws away.

PEFT's files of P-tuning, of a projected prefix and of context-aware prompt tuning hold what the encoder evaluates to,
and no training goes on from that. So softbridge writes one more file beside PEFT's own, which PEFT does not open:
safetensors, with the tensors as `softbridge.methods` names them, and in its metadata the ``kind`` of the
parameterisation and its ``settings`` as JSON. Of a multitask prompt, whose tensors are in PEFT's own file, it says
which task is meant, if that is not the first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from softbridge import untrusted
from softbridge.arrays import Array, same_array
from softbridge.errors import CheckpointError
from softbridge.methods import KINDS, rematerialise
from softbridge.prompt import KeyValuePrefix, Part, SoftPrompt, Training
from softbridge_peft import facts

#: How far float32 may evaluate elsewhere, on a GPU say, relative to the largest number.
ROUNDING = 1e-5

#: Evaluating holds at most so many numbers for each that the file holds.
GROWTH = 8

#: The settings of a multitask prompt of which nobody says which task is meant.
FIRST_TASK = {"task": 0}


def described(training: Training, part: Part) -> tuple[str, dict[str, Any]] | None:
    """What PEFT calls this parameterisation: its peft_type, and the fields of its configuration that follow from it.

    None if PEFT does not have this parameterisation, or (context-aware) says more in its configuration than follows.
    """
    settings = training.settings
    prefix = f"{part.site}." if isinstance(part, KeyValuePrefix) else ""
    shapes = {name.removeprefix(prefix): array.shape for name, array in training.tensors.items()}
    match training.kind:
        case "multitask":
            tasks, _, ranks = shapes["columns"]
            return facts.MULTITASK, {"num_tasks": tasks, "num_ranks": ranks}
        case "cartridge":
            return facts.CARTRIDGE, {"num_frozen_tokens": settings["frozen"]}
        case "p-tuning-mlp" if settings["layers"] == 3 and settings.get("non_linearity", "relu") == "relu":
            fields = {"encoder_reparameterization_type": "MLP", "encoder_hidden_size": shapes["linear.0.bias"][0]}
            return facts.P_TUNING, fields
        case "p-tuning-lstm" if settings.get("non_linearity", "relu") == "relu":
            size = shapes["lstm.weight_hh_l0"][1]
            if shapes["linear.0.bias"][0] == 2 * size:
                return facts.P_TUNING, {
                    "encoder_reparameterization_type": "LSTM",
                    "encoder_hidden_size": size,
                    "encoder_num_layers": settings["layers"],
                    "encoder_dropout": settings.get("dropout", 0.0),
                }
        case "mlp" if settings.get("non_linearity", "tanh") == "tanh" and isinstance(part, KeyValuePrefix):
            kv_heads, _, head_dim = part.layers[0].keys.shape
            deep = settings.get("layers", 2) != 2
            if shapes["embedding"][1] == kv_heads * head_dim and not deep and not settings.get("dropout"):
                return facts.PREFIX_TUNING, {"prefix_projection": True, "encoder_hidden_size": shapes["hidden.bias"][0]}
    return None


def of_encoder(config: Mapping[str, Any], state: Mapping[str, Array], part: Part) -> Training | None:
    """What a live `PromptEncoder` of PEFT trains, where that is not the prompt itself and not in PEFT's own file.

    Args:
        config: the adapter's configuration.
        state: of the encoder, by PEFT's names.
        part: what it makes.
    """
    encoder = encoder_of(config)
    if encoder is None:
        return None
    kind, settings = encoder
    tensors = {
        ours + name.removeprefix(theirs): array
        for name, array in state.items()
        for theirs, ours in facts.ENCODERS[kind].items()
        if name.startswith(theirs)
    }
    if isinstance(part, KeyValuePrefix):
        layers, submodules = config["num_layers"], config["num_transformer_submodules"]
        blocks = [facts.stored_block(layer, layers, submodules) for layer in range(layers)]
        for name in ("output.weight", "output.bias"):
            tensors[name] = np.concatenate([np.split(tensors[name], layers)[block] for block in blocks])
        tensors = {f"{part.site}.{name}": array for name, array in tensors.items()}
    elif len(tensors["embedding"]) > part.length:  # two submodules: only the first rows are used
        if kind == "p-tuning-lstm":  # whose rows are not independent
            return None
        tensors["embedding"] = tensors["embedding"][: part.length]
    return Training(kind, settings, tensors)


def to_encoder(config: Mapping[str, Any], state: Mapping[str, Array], prompt: SoftPrompt) -> dict[str, Array]:
    """The inverse of `of_encoder`: the state of a live `PromptEncoder`, with the numbers that trained a prompt.

    What the training state does not hold (rows and blocks that PEFT never uses) stays as it is in `state`.

    Raises:
        ValueError: the prompt was trained through another parameterisation, or one of other sizes.
    """
    training, part = prompt.training, prompt.parts[0]
    if training is None or not _is_its(config, training, part):
        raise ValueError(f"it is {training}, and the adapter has {encoder_of(config)}")
    prefix = f"{part.site}." if isinstance(part, KeyValuePrefix) else ""
    again = {}
    for name, old in state.items():
        kinds = facts.ENCODERS[training.kind].items()
        ours = next(ours + name.removeprefix(theirs) for theirs, ours in kinds if name.startswith(theirs))
        if prefix + ours not in training.tensors:
            raise ValueError(f"it has no {ours}")
        new = training.tensors[prefix + ours]
        if prefix and ours.startswith("output."):
            layers, submodules = config["num_layers"], config["num_transformer_submodules"]
            chunks = np.split(old, layers)
            for layer, chunk in enumerate(np.split(new, layers)):
                chunks[facts.stored_block(layer, layers, submodules)] = chunk
            new = np.concatenate(chunks)
        elif ours == "embedding":
            new = np.concatenate([new, old[len(new) :]])
        if new.shape != old.shape:
            raise ValueError(f"{ours} is {list(new.shape)}, not {list(old.shape)}")
        again[name] = new
    return again


def _is_its(config: Mapping[str, Any], training: Training, part: Part) -> bool:
    """Whether an adapter's `prompt_encoder` is the parameterisation of a training state."""
    if (training.kind, training.settings) == encoder_of(config):
        return True
    found = described(training, part)
    return (
        found is not None
        and encoder_of(config) is not None
        and all(config.get(name) == value for name, value in {**found[1], "peft_type": found[0]}.items())
    )


def encoder_of(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Kind and settings of the parameterisation that PEFT has between what is trained and the prompt."""
    peft_type = config["peft_type"]
    if peft_type == facts.P_TUNING and config["encoder_reparameterization_type"] == "LSTM":
        settings = {"layers": config["encoder_num_layers"], "dropout": config["encoder_dropout"]}
        return "p-tuning-lstm", {**settings, "non_linearity": "relu"}
    if peft_type == facts.P_TUNING:
        return "p-tuning-mlp", {"layers": 3, "non_linearity": "relu"}
    if peft_type == facts.PREFIX_TUNING and config["prefix_projection"]:
        settings = {"bottleneck_size": config["encoder_hidden_size"], "dropout": 0.0}
        return "mlp", {**settings, "non_linearity": "tanh"}
    if peft_type == facts.CPT:
        names = {"epsilon": "opt_projection_epsilon", "format_epsilon": "opt_projection_format_epsilon"}
        settings = {ours: config[theirs] for ours, theirs in names.items()}
        return "context-aware", {**settings, "token_types": config["cpt_tokens_type_mask"]}
    return None


def problem(prompt: SoftPrompt) -> str | None:
    """Why a prompt's training state does not stand for its parts, or None.

    What PEFT's own file holds is evaluated anew whenever it is read, and must agree bit for bit.
    """
    training = prompt.training
    if training is None:
        return None
    rows = max((len(a) for name, a in training.tensors.items() if name.endswith("embedding") and a.ndim), default=0)
    widths = (size for name, array in training.tensors.items() if "weight" in name for size in array.shape)
    if rows * max(widths, default=0) > GROWTH * sum(array.size for _, array in prompt.arrays()):
        return f"evaluating it takes far more room than it has itself: {training}"
    try:
        again = rematerialise(prompt)
    except (ValueError, RuntimeError) as error:  # RuntimeError: torch lacks the operation for the dtype
        return str(error)
    per_site = KINDS[training.kind].per_site
    if all(isinstance(part, KeyValuePrefix) != per_site for part in prompt.parts):
        return f"{training.kind} makes {'keys and values' if per_site else 'vectors in the input'}, it has none"
    for part, other in zip(prompt.parts, again.parts, strict=True):
        for (name, ours), (_, theirs) in zip(part.arrays(), other.arrays(), strict=True):
            if same_array(ours, theirs):
                continue
            if ours.shape != theirs.shape:
                return f"it evaluates to {name} {list(theirs.shape)}, the prompt has {list(ours.shape)}"
            wide = ours.astype(np.float64)
            distance = np.abs(wide - theirs.astype(np.float64)).max()
            allowed = 0.0 if training.kind in facts.STORED else ROUNDING * np.abs(wide).max()
            if not distance <= allowed or ours.dtype != theirs.dtype:
                return f"it evaluates to other {name} ({theirs.dtype}, {distance:.1e} away)"
    return None


def files(training: Training | None, peft_type: str) -> dict[str, untrusted.Content]:
    """The file of a training state; no file where a PEFT file of this type says the same."""
    if training is None:
        return {}
    if facts.STORED.get(training.kind) == peft_type:
        if training.kind != "multitask" or training.settings == FIRST_TASK:
            return {}
        training = replace(training, tensors={})
    metadata = {"format": "pt", "kind": training.kind, "settings": json.dumps(dict(training.settings), sort_keys=True)}
    return {facts.TRAINING_FILE: untrusted.safetensors_file(training.tensors, metadata)}


def read(files: untrusted.Files, name: str) -> Training:
    """The training state in a file that softbridge wrote.

    Raises:
        CheckpointError: the file is not a training state that softbridge wrote.
    """
    metadata = files.metadata(name)
    if "kind" not in metadata or "settings" not in metadata:
        raise refused(f"has no kind and settings, only {', '.join(metadata) or 'nothing'}")
    settings = untrusted.parse_json(metadata["settings"].encode(), f"{name}, settings")
    return Training(metadata["kind"], settings, files.tensors(name))


def refused(why: str) -> CheckpointError:
    """The error for a training file that does not belong to the prompt beside it."""
    return CheckpointError(
        f"{facts.TRAINING_FILE}: {why}",
        "the training state of the prompt beside it, as softbridge wrote it",
        f"convert with --drop training, or remove {facts.TRAINING_FILE}, if PEFT wrote the prompt anew; that takes "
        "nothing from the prompt",
    )
