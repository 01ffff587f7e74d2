"""All that is particular to AdapterHub's soft prompts, in one place: names, defaults, and what its config can say.

The source is the package itself (https://github.com/adapter-hub/adapters, `methods/prefix_tuning.py`,
`methods/prompt_tuning.py`, `configuration/adapter_config.py` and the `mixin_*.py` of each model); the tests compare
these tables with the installed package where there is one.

A configuration names what is prefixed by subtraction: every self-attention, unless its layer stands in `leave_out`;
the encoder's and the cross-attention's if `encoder_prefix` and `cross_prefix` say so. `sites_of` walks that forwards,
from a configuration to sites and layers; `config_of` walks it backwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from softbridge.errors import Obstacle
from softbridge.geometry import Geometry, Site, Stack, StackGeometry, stack_of
from softbridge.prompt import InputPrompt, Placement, SoftPrompt
from softbridge.untrusted import Files

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "pytorch_adapter.bin"
HEAD_CONFIG_FILE = "head_config.json"
HEAD_WEIGHTS_FILE = "pytorch_model_head.bin"
#: The same as safetensors.
SAFE = {WEIGHTS_FILE: "adapter.safetensors", HEAD_WEIGHTS_FILE: "model_head.safetensors"}
#: Names the composition of adapters, each of which lies in a folder of its name.
SETUP_FILE = "adapter_setup.json"

PREFIX, PROMPT, UNION = "prefix_tuning", "prompt_tuning", "union"

#: Architecture -> the fields of its configuration, with their defaults (`PrefixTuningConfig`, `PromptTuningConfig`).
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    PREFIX: {
        "architecture": PREFIX,
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
    },
    PROMPT: {
        "architecture": PROMPT,
        "combine": "prefix",
        "init_weights_seed": None,
        "prompt_init": "random_uniform",
        "prompt_init_text": None,
        "prompt_length": 10,
    },
}

#: Where the vectors of prompt tuning stand: its `combine`.
PLACEMENTS: Mapping[str, Placement] = {"prefix": "before-sequence", "prefix_after_bos": "after-first-token"}

#: A file that names no version is older than a renaming of activations (`ACTIVATION_RENAME` in the package's utils.py).
UNVERSIONED_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}

ENCODER_DECODERS = frozenset(("bart", "mbart", "mt5", "plbart", "t5", "whisper"))

#: Families whose virtual tokens AdapterHub can also put into the input, behind the embedding block (the others'
#: models say `support_prompt_tuning = False`).
PROMPT_MODEL_TYPES = frozenset(
    (
        "albert",
        "bert",
        "bert-generation",
        "deberta-v2",
        "distilbert",
        "electra",
        "roberta",
        "xlm-roberta",
    )
)

#: Of these, the ones that AdapterHub itself does not run right (see `softbridge_compat.adapterhub_defects`): why.
#: Their files are good: on unpadded texts, of DistilBERT under SDPA attention, AdapterHub computes what others do.
PROMPT_UNSOUND = {
    "deberta-v2": "lets virtual tokens attend to the padding",
    "distilbert": "fails under eager attention, and under SDPA lets virtual tokens attend to the padding",
}

#: Families which AdapterHub supports, and whose prefixes this plugin reads, writes and runs.
MODEL_TYPES = ENCODER_DECODERS | PROMPT_MODEL_TYPES | {"gpt2", "gptj", "llama", "mistral"}

#: Families which AdapterHub supports and this plugin does not: why not.
OTHER_MODEL_TYPES = {
    "beit": "with a prefix AdapterHub fails on BEiT's relative position bias",
    "clip": "two models in one, each with prefixes of its own",
    "deberta": "AdapterHub adds a random bias to every DeBERTa attention, so that no two runs agree",
    "encoder-decoder": "two models in one, each with prefixes of its own",
    "vit": "a model of images: it has no vocabulary, and softbridge's geometry is that of models of tokens",
    "xmod": "AdapterHub takes the language adapters out of X-MOD, which is another model without them",
}

#: Family -> the path of the attention in layer {} of its base model, for each of `model_sites`. A gate is stored there.
ATTENTIONS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(PROMPT_MODEL_TYPES, ("encoder.layer.{}.attention.self",)),
    "albert": ("encoder.albert_layer_groups.0.albert_layers.0.attention",),
    "distilbert": ("transformer.layer.{}.attention",),
    **dict.fromkeys(("gpt2", "gptj"), ("h.{}.attn",)),
    **dict.fromkeys(("llama", "mistral"), ("layers.{}.self_attn",)),
    **dict.fromkeys(
        ("bart", "mbart", "plbart", "whisper"),
        ("encoder.layers.{}.self_attn", "decoder.layers.{}.self_attn", "decoder.layers.{}.encoder_attn"),
    ),
    **dict.fromkeys(
        ("mt5", "t5"),
        (
            "encoder.block.{}.layer.0.SelfAttention",
            "decoder.block.{}.layer.0.SelfAttention",
            "decoder.block.{}.layer.1.EncDecAttention",
        ),
    ),
}

#: Families with a relative bias; see `unbiased_from`.
RELATIVE_BIAS = frozenset(("mt5", "t5"))

#: Families whose layers are one module, with one prefix and one gate for all. (ALBERT can be built with several groups
#: of layers. Its geometry does not say so, no published model has them, and the engine refuses them.)
SHARED_LAYERS = frozenset(("albert",))

#: Families whose key/value cache AdapterHub never fills (see `softbridge_compat.adapterhub_defects`). The engine
#: measures it; this is for advice where the toolkit is not installed, and a test compares the two.
CACHE_STAYS_EMPTY = frozenset(("llama", "mistral"))
#: Families that fail with a cache where they are decoders, for the cache is no longer what AdapterHub takes it for.
CACHE_FAILS = frozenset(("bert-generation", "electra"))

#: Family -> (end of the name of the modules that receive positions, index or name of that argument).
#: A pre-hook there moves the tokens whatever the caller, the padding and the cache make of their positions.
POSITION_INPUTS: Mapping[str, tuple[str, int | str]] = {
    **dict.fromkeys(
        ("albert", "bert", "bert-generation", "distilbert", "electra", "roberta", "xlm-roberta"),
        (".position_embeddings", 0),
    ),
    "gpt2": (".wpe", 0),
    "gptj": (".attn", "position_ids"),
    "llama": (".rotary_emb", 1),
    "mistral": (".rotary_emb", 1),
}

#: Of these, the ones whose models take no positions from their caller: the engine can move the tokens, a file cannot.
UNTOLD = frozenset(("distilbert",))


def weights_in(files: Files, folder: str, name: str) -> str | None:
    """The file of weights in a folder, or its safetensors twin, whichever is there."""
    return next((file for file in (folder + name, folder + SAFE[name]) if file in files), None)


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


def attention(geometry: Geometry, site: Site, layer: int) -> str:
    """The path of an attention module in the base model."""
    return ATTENTIONS[geometry.model_type][model_sites(geometry).index(site)].format(layer)


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


def copies(geometry: Geometry) -> int:
    """How many layers one stored layer stands for."""
    return _stack(geometry, "encoder").layers if geometry.model_type in SHARED_LAYERS else 1


def stored_layers(layers: Sequence[int], geometry: Geometry) -> tuple[int, ...]:
    """Of prefixed layers, those which AdapterHub stores: all, or one that stands for all."""
    return tuple(layers[:1] if geometry.model_type in SHARED_LAYERS else layers)


def partly_prefixed(layers: Mapping[Site, Sequence[int]], geometry: Geometry) -> str | None:
    """Why some layers cannot be left out, if some are and the family does not bear it."""
    if geometry.model_type not in SHARED_LAYERS or all(
        len(layers[site]) == _stack(geometry, site).layers for site in layers
    ):
        return None
    return "AdapterHub has one prefix for all layers, which share their weights"


def unbiased_from(layers: Mapping[Site, Sequence[int]], geometry: Geometry) -> dict[Stack, int]:
    """Stack -> the layer from which on AdapterHub's self-attention has no relative bias, where it loses it.

    A stack computes its bias in layer 0, which holds the table, for as many keys as that layer has. The first layer
    with another number of keys, prefixed where layer 0 is not or the reverse, computes it anew without a table: zeros,
    which all further layers take over, or replace by zeros. (`modeling_t5.py` in the package.)
    """
    found: dict[Stack, int] = {}
    for site, prefixed in layers.items():
        if geometry.model_type in RELATIVE_BIAS and site != "cross":
            all_layers = range(_stack(geometry, site).layers)
            changed = [layer for layer in all_layers if (layer in prefixed) != (0 in prefixed)]
            found |= {stack_of(site): changed[0]} if changed else {}
    return found


def obstacles(prompt: SoftPrompt, geometry: Geometry) -> list[Obstacle]:
    """What stands against expressing a prompt in AdapterHub, beyond what the capabilities say."""
    elsewhere = "choose another target, such as the native engine"
    kind = geometry.model_type
    if kind not in MODEL_TYPES:
        reason = f"AdapterHub has no soft prompts for models of type '{kind}'"
        if kind in OTHER_MODEL_TYPES:
            reason = f"prompts for '{kind}' are not written: {OTHER_MODEL_TYPES[kind]}"
        return [Obstacle("model", reason, elsewhere)]
    absent = sorted({part.site for part in prompt.prefixes} - set(model_sites(geometry)))
    if absent:
        reason = f"a '{kind}' model has no {' and no '.join(absent)} attention"
        return [Obstacle("sites", reason, elsewhere)]
    if prompt.adaptions:
        return [Obstacle("adaption", "AdapterHub has no vectors in a softmax of their own, behind a gate", elsewhere)]
    found = [("input-prompt", why) for part in prompt.inputs if (why := _no_input(part, kind)) is not None]
    found += _prefix_obstacles(prompt, geometry)

    moved = sorted(stack for stack, start in prompt.positions.start.items() if start != 0)
    biased = any(part.site != "cross" for part in prompt.prefixes)
    lost = unbiased_from({part.site: tuple(part.layers) for part in prompt.prefixes}, geometry)
    if kind in RELATIVE_BIAS and biased and (moved or prompt.positions.relative_bias != "skewed"):
        reason = "AdapterHub's relative bias counts queries from 0, and keys from the prefix's start"
        found.append(("relative-bias", reason))
    elif lost != prompt.positions.unbiased_from:
        reason = f"with these layers AdapterHub has no relative bias from {lost or 'none'} on, and the prompt has none "
        reason += f"from {dict(prompt.positions.unbiased_from) or 'none'} on"
        found.append(("relative-bias", reason))
    elif moved and kind not in POSITION_INPUTS and kind not in RELATIVE_BIAS:
        found.append(("positions", f"the {' and '.join(moved)} of '{kind}' takes no positions from its caller"))
    return [Obstacle(name, reason, elsewhere) for name, reason in found]


def _no_input(part: InputPrompt, kind: str) -> str | None:
    """Why AdapterHub cannot have these vectors in the input; None if it can."""
    if kind not in PROMPT_MODEL_TYPES:
        return f"AdapterHub has no prompt tuning for '{kind}', prefix tuning alone"
    if (part.stack, part.entry) != ("encoder", "after") or part.placement not in PLACEMENTS.values():
        return (
            "AdapterHub puts vectors into an encoder's input, behind the embedding block, in front or after the first "
            f"token; these are in the {part.stack}'s, {part.entry} the embedding block, {part.placement}"
        )
    return None


def _prefix_obstacles(prompt: SoftPrompt, geometry: Geometry) -> list[tuple[str, str]]:
    """Names and reasons."""
    found: list[tuple[str, str]] = []
    kv_heads, head_dim = toolkit_shape(geometry)
    for part in prompt.prefixes:
        shape = (kv_heads, part.length, head_dim)
        others = sorted({pair.keys.shape for pair in part.layers.values()} - {shape})
        if others:
            reason = (
                f"keys at site '{part.site}' are {others[0]} [K, P, D], AdapterHub has {shape} for this model "
                "(its head size is hidden size / heads, the same in all layers and stacks)"
            )
            found.append(("shape", reason))
        if geometry.model_type in SHARED_LAYERS and len(set(part.layers.values())) > 1:
            reason = "AdapterHub has one prefix for all layers, which share their weights, and these differ"
            found.append(("layers", reason))
    lengths = {part.site: part.length for part in prompt.prefixes}
    if len(set(lengths.values())) > 1:
        found.append(("length", f"AdapterHub has one length for all sites, not {lengths}"))
    gates = [pair.gate for part in prompt.prefixes for pair in part.layers.values()]
    shapes = {None if gate is None else gate.weight.shape for gate in gates}
    if len(shapes) > 1 or not shapes <= {None, (1, geometry.hidden), (2, geometry.hidden)}:
        reason = f"AdapterHub has a gate [1 or 2, {geometry.hidden}] in every prefixed layer, all alike, or none"
        found.append(("gates", reason))

    layers = {part.site: tuple(part.layers) for part in prompt.prefixes}
    said = sites_of({**DEFAULTS[PREFIX], **config_of(layers, geometry)}, geometry)
    if layers and said != layers:
        wanted = "; ".join(f"{site}: {list(numbers)}" for site, numbers in sorted(layers.items()))
        reason = (
            f"no 'leave_out' says the prefixed layers {wanted}: AdapterHub prefixes existing layers only, and "
            "cross-attention exactly where it prefixes the decoder's self-attention"
        )
        found.append(("layers", reason))
    elif (partly := partly_prefixed(layers, geometry)) is not None:
        found.append(("layers", partly))
    return found


def _stack(geometry: Geometry, site: Site) -> StackGeometry:
    stack = geometry.site(site)
    if stack is None:
        raise ValueError(f"{geometry.model_type} has no site '{site}'")
    return stack


def _first_index(geometry: Geometry, site: Site) -> int:
    if stack_of(site) == "decoder" and geometry.encoder is not None:
        return geometry.encoder.layers
    return 0
