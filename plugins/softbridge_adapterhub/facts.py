"""All that is particular to AdapterHub's prefix tuning, in one place: names, defaults, and what its config can say.

The source is the package itself (https://github.com/adapter-hub/adapters, `methods/prefix_tuning.py`,
`configuration/adapter_config.py` and the `mixin_*.py` of each model); the tests compare these tables with the
installed package where there is one.

A configuration names what is prefixed by subtraction: every self-attention, unless its layer stands in `leave_out`;
the encoder's and the cross-attention's if `encoder_prefix` and `cross_prefix` say so. `sites_of` walks that forwards,
from a configuration to sites and layers; `config_of` walks it backwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from softbridge.errors import Obstacle
from softbridge.geometry import Geometry, Site, StackGeometry, stack_of
from softbridge.prompt import KeyValuePrefix, SoftPrompt

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "pytorch_adapter.bin"
SAFE_WEIGHTS_FILE = "adapter.safetensors"
HEAD_FILES = ("head_config.json", "model_head.safetensors", "pytorch_model_head.bin")

#: `PrefixTuningConfig`, with its defaults.
DEFAULTS: Mapping[str, Any] = {
    "architecture": "prefix_tuning",
    "bottleneck_size": 512,
    "cross_prefix": True,
    "dropout": 0.0,
    "encoder_prefix": True,
    "flat": False,
    "init_weights_seed": None,
    "leave_out": [],
    "non_linearity": "tanh",
    "prefix_length": 30,
    "shared_gating": True,
    "use_gating": False,
}

#: A file that names no version is older than a renaming of activations (`ACTIVATION_RENAME` in the package's utils.py).
UNVERSIONED_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}

ENCODER_DECODERS = frozenset(("bart", "mbart", "mt5", "plbart", "t5"))

#: Families which AdapterHub supports, and whose prefixes this plugin reads, writes and runs.
MODEL_TYPES = ENCODER_DECODERS | {
    "bert",
    "bert-generation",
    "deberta-v2",
    "distilbert",
    "electra",
    "gpt2",
    "gptj",
    "llama",
    "mistral",
    "roberta",
    "xlm-roberta",
    "xmod",
}

#: Families which AdapterHub supports and this plugin does not: why not.
OTHER_MODEL_TYPES = {
    "albert": "AdapterHub shares one prefix among ALBERT layers that share their weights",
    "beit": "a vision model",
    "clip": "a vision model",
    "deberta": "AdapterHub adds a random bias to every DeBERTa attention, so that no two runs agree",
    "encoder-decoder": "two models in one, each with prefixes of its own",
    "vit": "a vision model",
    "whisper": "a speech model",
}

#: Families with a relative bias. The bias is computed in a stack's first layer; where the number of keys changes
#: between two layers (one prefixed, the next left out), AdapterHub computes it anew in a layer that has no table, and
#: it is zero from there on. No canonical prompt says that, so a stack is prefixed in all layers or in none.
RELATIVE_BIAS = frozenset(("mt5", "t5"))

#: Families whose key/value cache AdapterHub never fills (see `softbridge_compat.adapterhub_defects`). The engine
#: measures it; this is for advice where the toolkit is not installed, and a test compares the two.
CACHE_STAYS_EMPTY = frozenset(("llama", "mistral"))

#: Family -> (end of the name of the modules that receive positions, index or name of that argument).
#: A pre-hook there moves the tokens whatever the caller, the padding and the cache make of their positions.
POSITION_INPUTS: Mapping[str, tuple[str, int | str]] = {
    **dict.fromkeys(
        ("bert", "bert-generation", "distilbert", "electra", "roberta", "xlm-roberta", "xmod"),
        (".position_embeddings", 0),
    ),
    "gpt2": (".wpe", 0),
    "gptj": (".attn", "position_ids"),
    "llama": (".rotary_emb", 1),
    "mistral": (".rotary_emb", 1),
}


def location(model_type: str, site: Site) -> str:
    """AdapterHub's name for a site. One self-attention, of whichever stack, is ``self_prefix``."""
    if model_type in ENCODER_DECODERS:
        return f"{site}_prefix"
    return "self" if model_type == "distilbert" else "self_prefix"


def model_sites(geometry: Geometry) -> tuple[Site, ...]:
    """The sites at which AdapterHub can prefix a model, in its own order."""
    if geometry.is_encoder_decoder:
        return ("encoder", "self", "cross")
    return ("encoder",) if geometry.decoder is None else ("self",)


def toolkit_shape(geometry: Geometry) -> tuple[int, int]:
    """(K, D) as AdapterHub computes them, for all sites alike: from the encoder's heads, never from `head_dim`."""
    stack = _stack(geometry, model_sites(geometry)[0])
    return stack.kv_heads, stack.head_dim if geometry.model_type in RELATIVE_BIAS else geometry.hidden // stack.heads


def sites_of(config: Mapping[str, Any], geometry: Geometry) -> dict[Site, tuple[int, ...]]:
    """Site -> the layers (numbered within their stack) that a configuration prefixes. A site without any is absent.

    `leave_out` counts an encoder's layers first and a decoder's after them, in one index.
    """
    found: dict[Site, tuple[int, ...]] = {}
    for site in model_sites(geometry):
        if not geometry.is_encoder_decoder or site == "self" or config[f"{site}_prefix"]:
            first = _first_index(geometry, site)
            layers = range(_stack(geometry, site).layers)
            found[site] = tuple(layer for layer in layers if first + layer not in config["leave_out"])
    return {site: layers for site, layers in found.items() if layers}


def config_of(layers: Mapping[Site, Sequence[int]], geometry: Geometry) -> dict[str, Any]:
    """The part of a configuration that says what is prefixed: the inverse of `sites_of`, where one exists."""
    leave_out = []
    for site in model_sites(geometry):
        if site == "self" or (site == "encoder" and site in layers):
            first, kept = _first_index(geometry, site), layers.get(site, ())
            leave_out += [first + layer for layer in range(_stack(geometry, site).layers) if layer not in kept]
    flags = {f"{site}_prefix": site in layers for site in ("encoder", "cross")} if geometry.is_encoder_decoder else {}
    return {"leave_out": leave_out, **flags}


def partly_prefixed(layers: Mapping[Site, Sequence[int]], geometry: Geometry) -> list[Site]:
    """Sites of a family with a relative bias at which some layers, but not all, are prefixed (see `RELATIVE_BIAS`)."""
    if geometry.model_type not in RELATIVE_BIAS:
        return []
    return [site for site in layers if site != "cross" and len(layers[site]) < _stack(geometry, site).layers]


def obstacles(prompt: SoftPrompt, geometry: Geometry) -> list[Obstacle]:
    """What stands against expressing a prefix in AdapterHub, beyond what the capabilities say."""
    found: list[Obstacle] = []
    elsewhere = "choose another target, such as the native engine"
    kind = geometry.model_type
    if kind not in MODEL_TYPES:
        reason = f"AdapterHub has no prefix tuning for models of type '{kind}'"
        if kind in OTHER_MODEL_TYPES:
            reason = f"prefixes of '{kind}' are not written yet: {OTHER_MODEL_TYPES[kind]}"
        return [Obstacle("model", reason, elsewhere)]
    if not prompt.prefixes or prompt.inputs:
        found.append(Obstacle("input-prompt", "only key/value prefixes are written for AdapterHub", elsewhere))
    absent = sorted({part.site for part in prompt.prefixes} - set(model_sites(geometry)))
    if absent:
        found.append(Obstacle("sites", f"a '{kind}' model has no {' and no '.join(absent)} attention", elsewhere))
        return found

    kv_heads, head_dim = toolkit_shape(geometry)
    for part in prompt.prefixes:
        shape = (kv_heads, part.length, head_dim)
        others = sorted({pair.keys.shape for pair in part.layers.values()} - {shape})
        if others:
            found.append(
                Obstacle(
                    "shape",
                    f"keys at site '{part.site}' are {others[0]} [K, P, D], AdapterHub has {shape} for this model "
                    "(its head size is hidden size / heads, the same in all layers and stacks)",
                    elsewhere,
                )
            )
    lengths = {part.site: part.length for part in prompt.prefixes}
    if len(set(lengths.values())) > 1:
        found.append(Obstacle("length", f"AdapterHub has one length for all sites, not {lengths}", elsewhere))

    layers = {part.site: tuple(part.layers) for part in prompt.prefixes}
    said = sites_of({**DEFAULTS, **config_of(layers, geometry)}, geometry)
    if said != layers:
        wanted = "; ".join(f"{site}: {list(numbers)}" for site, numbers in sorted(layers.items()))
        found.append(
            Obstacle(
                "layers",
                f"no 'leave_out' says the prefixed layers {wanted}: AdapterHub prefixes existing layers only, and "
                "cross-attention exactly where it prefixes the decoder's self-attention",
                elsewhere,
            )
        )
    found += [
        Obstacle(
            "layers",
            f"AdapterHub loses the relative bias after a layer that is left out, and site '{site}' leaves some out",
            elsewhere,
        )
        for site in partly_prefixed(layers, geometry)
    ]
    moved = sorted(stack for stack, start in prompt.positions.start.items() if start != 0)
    biased = any(site != "cross" for site in layers)
    if kind in RELATIVE_BIAS and biased and (moved or prompt.positions.relative_bias != "skewed"):
        found.append(
            Obstacle(
                "relative-bias",
                "AdapterHub's relative bias counts queries from 0, and keys from the prefix's start",
                elsewhere,
            )
        )
    elif moved and kind not in POSITION_INPUTS and kind not in RELATIVE_BIAS:
        found.append(
            Obstacle(
                "positions", f"the {' and '.join(moved)} of '{kind}' takes no positions from its caller", elsewhere
            )
        )
    return found


def prefixes_by_location(prompt: SoftPrompt, geometry: Geometry) -> dict[str, KeyValuePrefix]:
    """Location -> prefix."""
    return {location(geometry.model_type, part.site): part for part in prompt.prefixes}


def _stack(geometry: Geometry, site: Site) -> StackGeometry:
    stack = geometry.site(site)
    if stack is None:
        raise ValueError(f"{geometry.model_type} has no site '{site}'")
    return stack


def _first_index(geometry: Geometry, site: Site) -> int:
    if stack_of(site) == "decoder" and geometry.encoder is not None:
        return geometry.encoder.layers
    return 0
