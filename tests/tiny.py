"""A small configuration of any architecture that transformers has, by what its settings are called.

No architecture is known by name. A setting is lowered by the kind of thing that its name says it is (a width, a number
of heads, of layers, of experts ...), and a list with an entry for each layer is cut to the layers that are left, of
each kind at least one.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from transformers import PretrainedConfig

LAYERS, HEADS, HEAD_WIDTH, VOCABULARY = 4, 4, 16, 96
HIDDEN = HEADS * HEAD_WIDTH

#: The first pattern that a setting's whole name matches -> what it is lowered to if it is larger. None: it is left.
SIZES: tuple[tuple[str, int | None], ...] = (
    (r".*_token_id|.*_token_index|.*_pad_id|seed|.*_id|rms_norm.*|.*_theta|.*eps|.*factor|num_labels", None),
    (r".*initializer.*|mm_tokens.*|hidden_size_per_layer_input", 16),
    (r".*vocab.*|num_hash_buckets|.*vocab_size_base", VOCABULARY),
    (r"max_position_embeddings|n_positions|max_seq_len|context_length|max_(target|source)_positions|n_ctx", 128),
    (r"max_(en|de)coder_position_embeddings|original_max_position_embeddings|model_max_length", 128),
    (r"(sliding_window|attention_window|local_attention|window|keep_window)(_size|_len)?|attention_chunk_size", 64),
    (r"local_attention_window_len|sliding_window_size|block_size|local_radius", 64),
    (r"rotary_dim", 8),
    (r"qk_head_dim", 2 * HEAD_WIDTH),
    (r"(.*_)?head_dim|headdim|.*headdim|d_kv|dim_head|d_head|kv_channels|.*_d_head|.*head_size|attention_head_dim", 16),
    (r"num_key_value_heads|num_kv_heads|.*_num_key_value_heads|num_query_groups|linear_num_key_heads", 2),
    (r".*(mamba|ssm).*(n_heads|num_heads)|linear_num_value_heads|mamba2_num_heads", 2 * HEADS),
    (r"(.*_)?n?(attention_|_)?heads?|n_heads?|.*_attention_heads|.*num_heads|index_n_heads", HEADS),
    (r"query_pre_attn_scalar|.*_rank|d_rel|index_topk|dt_rank|time_step_rank", 16),
    (r"(.*_)?(num_)?(hidden_|encoder_|decoder_|self_attention_)?layers(_per_stack)?|n_layers?|num_layers?", LAYERS),
    (r"num_blocks|max_window_layers|num_kv_shared_layers", 2),
    (r"n_group|topk_group|num_expert_groups?", 1),
    (r".*(per_tok|per_token|top_?k(_experts)?|moe_k)|num_selected_experts", 2),
    (r".*num.*experts|n_routed_experts|n_shared_experts|num_experts.*|zero_expert_num|num_local_experts", 4),
    (r".*(intermediate|ffn|feed_forward|_ff|inner|mlp_hidden|hidden_dim).*(size|dim|d_ff|dff)?|d_ff|dff|dim_ff", 48),
    (r"(input_|output_)?embedding_size|word_embed_proj_dim", HIDDEN // 2),
    (r"(.*_)?(hidden_size|d_model|n_embd|emb_dim|embed_dim|embedding_size|proj_dim|lru_width|embedding_dim)", HIDDEN),
    (r"dim|d_model|emb_size|.*_emb_size|d_latents|.*_embed_dim|true_hidden_size|intra_bottleneck_size", HIDDEN),
    (r".*(d_state|state_size|ssm_state)", 16),
    (r"mamba_d_ssm", 2 * HIDDEN),
    (r".*chunk_size|.*chunk_length|num_latents|.*block_size", 16),
    (r"num_self_attends_per_block|encoder_hash_byte_group_size", 2),
)


def lowered(name: str, value: Any) -> Any:
    """What a setting of that name and value is lowered to."""
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    for pattern, size in SIZES:
        if re.fullmatch(pattern, name):
            return value if size is None else min(value, size)
    return value


#: What a setting without a value is given: what its architecture reads a size from has none by default.
GIVEN = {"num_key_value_heads": HEADS, "head_dim": HEAD_WIDTH, "vocab_size": VOCABULARY, "pad_token_id": 0}
#: What cannot be lowered by its name alone.
PARTICULAR: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 2 * HEADS, "head_dim": HEAD_WIDTH},
    "reformer": {"axial_pos_embds_dim": (HIDDEN // 4, HIDDEN - HIDDEN // 4), "axial_pos_shape": (8, 16)},
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "zamba": {"attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 2 * HEAD_WIDTH},
    "zamba2": {"attention_hidden_size": 2 * HIDDEN, "mamba_headdim": 2 * HEAD_WIDTH},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "attention_layers": ["global", "local"] * 2},
}
#: What is tried, in this order, where an architecture does not take what its settings were lowered to.
OTHERWISE: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": HEADS},
    {"num_key_value_heads": 2, "num_heads": 2 * HEADS},
    {"d_head": HEAD_WIDTH},
    {"encoder_layers": LAYERS},
    {"default_language": "en_XX"},
    {"embedding_size": HIDDEN},
    {"num_hidden_layers": 8},
    {"num_key_value_heads": None},
    {"use_mamba_kernels": False},
)


def settings_of(config: Any) -> dict[str, Any]:
    """The configuration's own settings."""
    return {name: value for name, value in vars(config).items() if not name.startswith("_")}


def cut(values: Any, length: int) -> Any:
    """So many entries of a list: each kind in turn."""
    kinds = [value for index, value in enumerate(values) if value not in values[:index]]
    return type(values)(kinds[index % len(kinds)] for index in range(length))


def layers_of(settings: Mapping[str, Any]) -> set[int]:
    """The numbers of layers that the settings name."""
    names = re.compile(r"(.*_)?(num_)?(hidden_|encoder_|decoder_)?layers(_per_stack)?|n_layers?|num_layers?")
    return {value for name, value in settings.items() if names.fullmatch(name) and type(value) is int and value > 2}


def tiny_configs(config: Any, **more: Any) -> Iterator[Callable[[], Any]]:
    """Small configurations like this one, the first of which that can be built is the one to take.

    Args:
        config: of transformers.
        more: settings that are to be as given.
    """
    names = settings_of(config)
    for change in OTHERWISE:
        if all(name in names for name in change):
            yield partial(_made, type(config), shrunk(config, **{**change, **more}))


def _made(config_class: Any, settings: dict[str, Any]) -> Any:
    """A configuration of these settings, whose parts some classes take as they are and some as mappings."""
    try:
        return config_class(**settings)
    except TypeError:
        parts = {name: value.to_dict() for name, value in settings.items() if isinstance(value, PretrainedConfig)}
        return config_class(**{**settings, **parts})


def _part(config: Any) -> Any:
    """A small part of a configuration. Some classes do not take all that they have."""
    settings = shrunk(config)
    try:
        return type(config)(**settings)
    except (TypeError, ValueError):
        small = copy.deepcopy(config)
        vars(small).update(settings)
        return small


def shrunk(config: Any, **more: Any) -> dict[str, Any]:
    """The settings of a configuration like this one, made small."""
    before = settings_of(config)
    layers = layers_of(before)
    depth = more.get("num_hidden_layers", LAYERS)
    found: dict[str, Any] = {}
    for name, value in before.items():
        if name in ("id2label", "label2id", "architectures", "transformers_version", "dtype"):
            continue
        if isinstance(value, PretrainedConfig):
            found[name] = _part(value)
        elif isinstance(value, list | tuple) and len(value) in layers and len(value) > depth:
            found[name] = type(value)(lowered(name, one) for one in cut(value, depth))
        elif name.endswith(("_token_id", "_token_index")) and type(value) is int and not 0 <= value < VOCABULARY:
            found[name] = VOCABULARY - 1 - len(found) % 8
        elif (small := GIVEN.get(name) if value is None else lowered(name, value)) != value:
            found[name] = small
    return {**found, **more}
