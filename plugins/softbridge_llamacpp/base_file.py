"""A base model in llama.cpp's own file (GGUF), in float32, made of a directory of transformers'.

Names of tensors are those of the package ``gguf``; keys of the header, and what is done to tensors, are those of
llama.cpp's conversion (conversion/base.py, llama.py, qwen.py, gemma.py, gpt2.py). No tokenizer is written: texts come
as token ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from softbridge.arrays import Array, from_torch
from softbridge.errors import EngineError, Obstacle
from softbridge.geometry import read_geometry
from softbridge_llamacpp.families import FAMILIES, Family, paired

#: Scalings of rotary frequencies that are a factor for each of them, whatever the text's length is.
_FACTORS = ("linear", "llama3")
_ELSEWHERE = "choose another server"


def obstacles(config: Any) -> list[Obstacle]:
    """What stands against a file of this model. Empty if nothing does."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        reason = f"no conversion of {config.model_type} to llama.cpp's files: there is one of {', '.join(FAMILIES)}"
        return [Obstacle("family", reason, _ELSEWHERE)]
    reasons = [f"llama.cpp's {family.architecture} has no {what}" for what in _unknown(config, family)]
    return [Obstacle("family", reason, _ELSEWHERE) for reason in reasons]


def _unknown(config: Any, family: Family) -> Iterator[str]:
    """What of a configuration the graph of a family does not compute."""
    told = (getattr(config, name, None) for name in ("hidden_activation", "hidden_act", "activation_function"))
    activation = next((name for name in told if name), None)
    if activation not in family.activation:
        yield f"{activation} in its feed-forward, but {family.activation[0]}"
    scaling = rope(config)["rope_type"]
    if family.rotary and scaling != "default" and not (family.rescaled and scaling in _FACTORS):
        yield f"rotary frequencies of the kind '{scaling}' here"
    if float(rope(config).get("partial_rotary_factor") or 1) != 1:
        yield "heads that are rotated in part"
    for name in family.without:
        if getattr(config, name, False):
            yield name
    if not getattr(config, "scale_attn_weights", True):
        yield "scores that are not divided by the root of the head size"
    shape = read_geometry(config).decoder
    assert shape is not None  # each of these families is one
    if family.square and shape.heads * shape.head_dim != config.hidden_size:
        yield f"{shape.heads} heads of size {shape.head_dim} in a hidden size of {config.hidden_size}"


def rope(config: Any) -> dict[str, Any]:
    """What a configuration says of its rotary frequencies, under the names of transformers 5."""
    told = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    base = getattr(config, "rope_theta", None) or 10_000.0
    kind = told.get("rope_type") or told.get("type") or "default"
    return {"rope_theta": base, **{name: value for name, value in told.items() if value is not None}, "rope_type": kind}


def located(base: Path) -> Path | None:
    """The one file of llama.cpp's in a directory, or None."""
    found = sorted(base.glob("*.gguf"))
    return found[0] if len(found) == 1 else None


def write(base: Path, path: Path) -> None:
    """Write the file of a directory's model.

    Raises:
        EngineError: it is of another family, or has tensors that llama.cpp has no place for.
    """
    import gguf
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = model.config
    found = obstacles(config)
    if found:
        raise EngineError("; ".join(one.reason for one in found), f"one of {', '.join(FAMILIES)}", _ELSEWHERE)
    family = FAMILIES[config.model_type]
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture)
    writer = gguf.GGUFWriter(str(path), family.architecture)
    _describe(writer, config, family)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for theirs, array in _tensors(model, config, family):
        name = "rope_freqs.weight" if theirs == _RESCALED else names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise EngineError(
                f"{config.model_type} with the tensor {theirs}", "tensors that llama.cpp has a name for", _ELSEWHERE
            )
        writer.add_tensor(name, np.ascontiguousarray(array, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


_RESCALED = "rotary factors"


def _describe(writer: Any, config: Any, family: Family) -> None:
    shape = read_geometry(config).decoder
    assert shape is not None  # each of these families is one
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    if family.rotary:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(shape.head_dim)
        writer.add_rope_freq_base(float(rope(config)["rope_theta"]))
    else:
        writer.add_layer_norm_eps(config.layer_norm_epsilon)


def _tensors(model: Any, config: Any, family: Family) -> Iterator[tuple[str, Array]]:
    """transformers' name of each tensor, and the numbers that llama.cpp has under its own name for it."""
    shape = read_geometry(config).decoder
    assert shape is not None
    for name, tensor in model.state_dict().items():
        array = from_torch(tensor)
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if family.paired and ".q_proj." in name:
            array = _paired_rows(array, shape.heads)
        if family.paired and ".k_proj." in name:
            array = _paired_rows(array, shape.kv_heads)
        if family.unit_norms and name.endswith("norm.weight"):
            array = array + 1
        if family.columns and array.ndim == 2 and ".c_" in name:
            array = array.T
        yield name, array
    if family.rotary and rope(config)["rope_type"] != "default":
        rotary = model.model.rotary_emb
        # transformers' own frequencies say by what each is divided: one definition, not a second one of ours.
        plain = float(rope(config)["rope_theta"]) ** -(np.arange(0, shape.head_dim, 2) / shape.head_dim)
        yield _RESCALED, plain / from_torch(rotary.inv_freq).astype(np.float64)


def _paired_rows(array: Array, heads: int) -> Array:
    """Rows [heads·D, ...] of a projection in the order in which llama.cpp has channels."""
    rows = array.reshape(heads, -1, array.size // len(array)).swapaxes(-1, -2)
    return paired(rows).swapaxes(-1, -2).reshape(array.shape)
