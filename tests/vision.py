"""Tiny vision-language models, built from their configurations alone, and inputs with images.

Sub-configurations are shrunk by the names that their sizes have. How many tokens an image is, is asked of the model.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from softbridge.base import draw_weights

#: Names of sizes, and what they are made. Images have 16 times 16 pixels in patches of 4.
TEXT: Mapping[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "full_attention_interval": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION: Mapping[str, Any] = {
    "hidden_size": 16,
    "embed_dim": 16,
    "intermediate_size": 24,
    "mlp_ratio": 2,
    "num_hidden_layers": 2,
    "depth": 2,
    "num_attention_heads": 2,
    "num_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
#: Tokens that mean something to the model around the text stack, under the names that configurations have for them.
IMAGE, VIDEO, START, END = 90, 91, 92, 93
TOKENS: Mapping[str, int] = {
    "image_token_id": IMAGE,
    "image_token_index": IMAGE,
    "video_token_id": VIDEO,
    "video_token_index": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "boi_token_index": START,
    "eoi_token_index": END,
}
#: Family -> what else its configuration needs at these sizes.
MORE: Mapping[str, Mapping[str, Any]] = {
    "gemma3": {
        "mm_tokens_per_image": 4,
        "text_config": {
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "query_pre_attn_scalar": 8,
        },
    },
    "shieldgemma2": {"mm_tokens_per_image": 4},
    "qwen2_vl": {"vision_config": {"hidden_size": 32}},
    "qwen2_5_vl": {"vision_config": {"window_size": 16, "fullatt_block_indexes": [1]}},
    "exaone4_5": {"vision_config": {"window_size": 16, "fullatt_block_indexes": [1]}},
    "glm4v_moe": {"text_config": {"partial_rotary_factor": 1.0}},
    "vipllava": {"vision_feature_layers": [-1, -2]},
}


def vision_config(family: str, **changes: Any) -> Any:
    """The configuration of a tiny model of a family, with three text layers.

    Args:
        family: transformers' name of it.
        changes: of the configuration itself, and dictionaries of changes of its parts (``text_config={...}``).
    """
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[family]
    default = kind()
    settings = {name: value for name, value in TOKENS.items() if hasattr(default, name)}
    width, words = TEXT["hidden_size"], TEXT["vocab_size"]
    settings.update(_those_of(default, {"projection_dim": width, "hidden_size": width, "vocab_size": words}))
    vision = {**VISION, "out_hidden_size": width, "projection_dim": width}
    for name, sizes in (("text_config", TEXT), ("vision_config", vision)):
        part = getattr(default, name) or kind.sub_configs[name]()
        shrunk = _those_of(part, sizes)
        if name == "text_config" and _asks(type(part), "mrope_section"):
            shrunk["rope_scaling"] = {"rope_type": "default", "mrope_section": [1, 1, 2]}
        more = {**MORE.get(family, {}).get(name, {}), **changes.pop(name, {})}
        settings[name] = {"model_type": part.model_type, **shrunk, **more}
    own = {name: value for name, value in MORE.get(family, {}).items() if not isinstance(value, Mapping)}
    return kind(**{**settings, **own, **changes})


def _those_of(config: Any, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes that a configuration knows, of the kinds that it has them in."""
    known = {*config.to_dict(), *getattr(config, "attribute_map", ())}
    found = {}
    for name, size in sizes.items():
        now = getattr(config, name, None) if name in known else None
        if isinstance(now, (list, tuple)):
            found[name] = [size] * len(now)
        elif name in known:
            found[name] = float(size) if isinstance(now, float) else size
    return found


def _asks(config: type, name: str) -> bool:
    """Whether the modelling code beside a configuration class has a name in it."""
    module = importlib.import_module(config.__module__.replace(".configuration_", ".modeling_"))
    return name in inspect.getsource(module)


def vision_model(family: str, attention: str = "eager", seed: int = 0, **changes: Any) -> Any:
    """A model of that configuration in float64, with large random weights; see `softbridge.base.build.draw_weights`."""
    from transformers import AutoModelForImageTextToText

    config = vision_config(family, **changes)
    for part in (config, config.get_text_config()):
        if hasattr(part, "_experts_implementation"):
            part._experts_implementation = "eager"  # grouped matrix products know no float64
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForImageTextToText.from_config(config, attn_implementation=attention)
    draw_weights(model, seed)
    model = model.double().eval()
    model.generation_config.pad_token_id = TEXT["pad_token_id"]
    model.generation_config.eos_token_id = None
    return model


def images(model: Any, count: int, seed: int = 0) -> dict[str, Tensor]:
    """So many random images, as the model takes them, each with as many tokens as `features` has of it."""
    generator, dtype, vision = torch.Generator().manual_seed(seed), model.dtype, model.config.vision_config
    asked = inspect.signature(model.forward).parameters
    size, patch = _side(getattr(vision, "image_size", None) or VISION["image_size"]), _side(vision.patch_size)
    if "image_grid_thw" in asked:
        grid = torch.tensor([[1, 4, 6]]).expand(count, -1)
        values = 3 * getattr(vision, "temporal_patch_size", 1) * patch**2
        pixels = torch.randn(count * 24, values, generator=generator, dtype=dtype)
        return {"pixel_values": pixels, "image_grid_thw": grid}
    found = {"pixel_values": torch.randn(count, 3, size, size, generator=generator, dtype=dtype)}
    try:
        features(model, found)
    except TypeError:  # the sizes of images before they were padded
        found["image_sizes"] = torch.tensor([[size, size]]).expand(count, -1)
    except ValueError:  # as many images for each row
        found["pixel_values"] = found["pixel_values"][:, None]
    return found


def _side(size: Any) -> int:
    return int(size[0] if isinstance(size, (list, tuple)) else size)


def features(model: Any, given: Mapping[str, Tensor]) -> Tensor:
    """What the text stack sees of images [tokens, H]."""
    with torch.no_grad():
        found = getattr(model, "model", model).get_image_features(**given)
    found = getattr(found, "pooler_output", found)
    while isinstance(found, tuple) and isinstance(found[0], (list, tuple)):  # and more, of single layers
        found = found[0]
    found = torch.cat(tuple(found)) if isinstance(found, (list, tuple)) else found
    return found.flatten(0, -2)


def vision_inputs(
    model: Any, texts: Sequence[tuple[int, int]], side: str = "left", image: bool = True, kind: int = 1, seed: int = 0
) -> dict[str, Tensor]:
    """A padded batch of rows with one image each, or none.

    Args:
        model: that it is for.
        texts: how many words each row has in front of its image and behind.
        side: of the pads.
        image: whether there are images.
        kind: of the tokens of an image, where the model is told which are.
        seed: of words and pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    seen = images(model, len(texts), seed) if image else {}
    length = len(features(model, seen)) // len(texts) if image else 0
    rows = []
    for before, behind in texts:
        words = torch.randint(3, IMAGE, (before + behind,), generator=generator).tolist()
        shown = [START, *[IMAGE] * length, END] if image else []
        rows.append([*words[:before], *shown, *words[before:]])
    width = max(map(len, rows))
    pads = [width - len(row) for row in rows]
    padded = [[0] * n + row if side == "left" else row + [0] * n for n, row in zip(pads, rows, strict=True)]
    mask = [[0] * n + [1] * (width - n) if side == "left" else [1] * (width - n) + [0] * n for n in pads]
    ids = torch.tensor(padded)
    found = {"input_ids": ids, "attention_mask": torch.tensor(mask), **seen}
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in inspect.signature(model.forward).parameters:
            found[name] = (ids == IMAGE).long() * kind
    return found


def with_words(model: Any, given: Mapping[str, Tensor], words: Tensor) -> dict[str, Tensor]:
    """The same batch with words [P] in front of each row's first token, where an input prompt has its vectors."""
    pads = (given["attention_mask"].cumsum(-1) == 0).sum(-1).tolist()

    def put(real: Tensor, virtual: Tensor) -> Tensor:
        rows = zip(real, pads, strict=True)
        return torch.stack([torch.cat([row[:front], virtual, row[front:]]) for row, front in rows])

    found = dict(given)
    found["input_ids"] = put(given["input_ids"], words)
    found["attention_mask"] = put(given["attention_mask"], torch.ones_like(words))
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in given:
            found[name] = put(given[name], torch.zeros_like(words))
    return found
