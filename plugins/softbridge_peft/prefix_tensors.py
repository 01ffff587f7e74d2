"""The one tensor in which PEFT stores the keys and values of all layers."""

from __future__ import annotations

from collections.abc import Mapping

from packaging.version import Version

from softbridge.arrays import Array
from softbridge.errors import BaseModelError
from softbridge.geometry import Geometry, Site, StackGeometry
from softbridge.prompt import KeyValue, KeyValuePrefix
from softbridge_compat import peft_releases
from softbridge_peft import facts
from softbridge_peft.config import Config
from softbridge_peft.written_config import first_site


def check_layers(fields: Config, geometry: Geometry) -> None:
    """Refuse a base model of another depth: PEFT prefixes every layer, and records the depth for prompt tuning too."""
    shape = geometry.site("self" if geometry.is_encoder_decoder and fields.kind == "prefix" else first_site(geometry))
    if fields.layers is not None and shape is not None and fields.layers != shape.layers:
        raise BaseModelError(
            f"the file is for {fields.layers} layers, the base model ({geometry.model_type}) has {shape.layers}",
            "the base model that the prompt was trained for",
            fields.remedy,
        )


def read_prefix(
    fields: Config, flat: Array, site: Site, geometry: Geometry | None, written_by: Version | None
) -> tuple[KeyValuePrefix, list[str]]:
    """The prefix that the release which wrote it hands to the model, and notes on that for the user."""
    heads, layers = fields.heads or 0, fields.layers or 0
    family, shape = (None, None) if geometry is None else (geometry.model_type, geometry.site(site))
    if shape is not None and shape.stateful:
        raise BaseModelError(
            f"a prefix by PEFT for {family}, and {facts.STATES}",
            "a base model whose layers keep keys and values, and nothing else",
            f"{fields.remedy}; train the prefix with softbridge's native engine, which runs it on this one",
        )
    old, notes = peft_releases.scrambles_bloom(written_by), []
    if geometry is None and old and facts.BLOOM in (fields.name or "").lower():
        raise BaseModelError(f"a prefix of {fields.name} by an old release of PEFT", "its base model", fields.remedy)
    if family == facts.BLOOM and old:
        notes.append("written by a release of PEFT that orders a Bloom prefix otherwise than today's: reordered")
        return scrambled(fields, flat, site), notes
    if family == facts.BLOOM and written_by is None:
        notes.append(peft_releases.UNKNOWN_BLOOM)
    stored = KeyValuePrefix.from_flat(site, flat, tuple(range(layers)), heads, (fields.token_dim or 0) // heads)
    used = {layer: stored.layers[facts.stored_block(layer, layers, fields.submodules)] for layer in range(layers)}
    if family in facts.FIRST_HEAD and shape is not None and shape.kv_heads == 1 < heads:
        used = {layer: KeyValue(pair.keys[:1], pair.values[:1]) for layer, pair in used.items()}
        notes.append(f"heads 1 to {heads - 1} of each layer, which PEFT never used, are left out")
    if shape is not None:
        used, said = cut(used, shape)
        notes += said
    return KeyValuePrefix(site, used), notes


def cut(stored: Mapping[int, KeyValue], shape: StackGeometry) -> tuple[dict[int, KeyValue], list[str]]:
    """What PEFT hands to a model whose layers differ, or attend to each other's keys, and notes for the user.

    A file holds as many heads, and as wide ones, for every layer. A layer takes the first of them, as many as it has,
    and none where it has more; one that attends to another's keys finds that one's prefix among them (peft_model.py,
    get_prompt).
    """
    sources = shape.sources or tuple(range(shape.layers))
    if (shape.shapes is None and shape.sources is None) or len(stored) != shape.layers:
        return dict(stored), []
    used: dict[int, KeyValue] = {}
    for layer, source in enumerate(sources):
        pair, (heads, width) = stored[source], shape.shape(source)
        if pair.keys.shape[0] >= heads and pair.keys.shape[2] >= width:
            used[layer] = KeyValue(pair.keys[:heads, :, :width], pair.values[:heads, :, :width])
    if not used:
        return dict(stored), []
    notes = []
    if shape.shapes is not None:
        notes.append("of each layer's heads PEFT uses the first, as many and as wide as the layer has")
    if len(used) < shape.layers:
        without = sorted(set(range(shape.layers)) - used.keys())
        notes.append(f"layers {without} have more or wider heads than the file, and no prefix: so PEFT runs it")
        if 0 in without:
            notes.append("real tokens stand at 0, as in PEFT's forward, by which it was trained; its generate counts")
    if shape.sources is not None:
        shared = [layer for layer, source in enumerate(sources) if layer != source]
        notes.append(f"layers {shared} attend to the keys of earlier ones, and find their prefix there")
    return used, notes


def scrambled(fields: Config, flat: Array, site: Site) -> KeyValuePrefix:
    """A Bloom prefix as old releases read it: keys of all layers first, and theirs in a strange order.

    Such a release swaps heads and virtual tokens of the keys, [P, K, D], and takes the result for [K, D, P] (their
    bloom_model_postprocess_past_key_value).
    """
    length, layers, heads = fields.length, fields.layers or 0, fields.heads or 0
    blocks = flat.reshape(length, 2 * layers, heads, -1).transpose(1, 0, 2, 3)
    return KeyValuePrefix(
        site,
        {
            layer: KeyValue(
                blocks[layer].reshape(heads, -1, length).transpose(0, 2, 1), blocks[layers + layer].transpose(1, 0, 2)
            )
            for layer in range(layers)
        },
    )


def stored_blocks(prefix: KeyValuePrefix) -> dict[int, KeyValue] | None:
    """Stored block -> its content with two submodules, dead blocks left out, or None if the layers do not allow it."""
    blocks: dict[int, KeyValue] = {}
    for layer, pair in prefix.layers.items():
        if blocks.setdefault(facts.stored_block(layer, len(prefix.layers), 2), pair) != pair:
            return None
    return blocks
