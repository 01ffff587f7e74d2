"""The prefix encoder of P-tuning v2 (Liu et al. 2022), which ChatGLM took over as it is: `PrefixEncoder`.

An embedding [P, W] is the prefix itself, in the flat layout of `KeyValuePrefix.from_flat`; or it is an embedding [P, E]
behind a projection: Linear(E, M), tanh, Linear(M, W), with W = 2·L·K·D. Training has a dropout on keys and values.
Its numbers stand in a checkpoint of the whole model, or alone, and config.json beside them says how many there are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from typing import Any

from softbridge import untrusted
from softbridge.arrays import Array
from softbridge.errors import BaseModelError, CheckpointError
from softbridge.geometry import Geometry, Site, StackGeometry
from softbridge.plugin.capabilities import UP_TO_FLOAT32, Capabilities, Start
from softbridge.prompt import BaseId, KeyValuePrefix, Origin, SoftPrompt, Training
from softbridge.prompt.values import Json
from softbridge_archive.building import made_prefix
from softbridge_archive.contents import matrix

CONFIG, WEIGHTS = "config.json", "pytorch_model.bin"
EMBEDDING = "embedding.weight"
#: The toolkits' names -> ours in the parameterisation ``mlp``.
PROJECTED = {
    EMBEDDING: "embedding",
    "trans.0.weight": "hidden.weight",
    "trans.0.bias": "hidden.bias",
    "trans.2.weight": "output.weight",
    "trans.2.bias": "output.bias",
}


def capabilities(site: Site, start: Start, families: Set[str], *, head: bool = False) -> Capabilities:
    """What a toolkit can hold and run: one prefix of all layers, flat. Its trainer passes no position_ids."""
    return Capabilities(
        prefix_sites=frozenset({site}),
        prefix_start=start,
        every_layer=True,
        parts=1,
        positions_told=False,
        dtypes=UP_TO_FLOAT32,
        head=head,
        model_types=frozenset(families),
    )


def config(files: untrusted.Files) -> dict[str, Any]:
    """The config.json beside the weights, empty if there is none."""
    return files.json(CONFIG) if CONFIG in files else {}


def vectors(embedding: untrusted.Stored, facts: Mapping[str, Any]) -> Array:
    """The embedding, after checking its shape and its length.

    Raises:
        CheckpointError: it is no matrix of numbers, or the configuration tells another length.
    """
    rows, said = matrix(embedding), facts.get("pre_seq_len")
    if said not in (None, len(rows)):
        raise CheckpointError(
            f"an embedding {list(rows.shape)}, and pre_seq_len {said!r:.40}",
            f"{len(rows)} virtual tokens in the {CONFIG} beside the weights",
            "put the configuration of this training beside the weights",
        )
    return rows


def read(
    tensors: Mapping[str, untrusted.Stored], facts: Mapping[str, Any], geometry: Geometry, site: Site, dropout: Json
) -> tuple[KeyValuePrefix, Training | None]:
    """The prefix at a site, and its projection if it has one.

    Args:
        tensors: of the encoder, by its own names.
        facts: the configuration beside it; what it says of the encoder has to be so.
        dropout: rate of the dropout of training.

    Raises:
        CheckpointError: tensors are missing, or do not agree with each other or with the configuration.
        BaseModelError: they are for a base model of another size.
    """
    projected = tensors.keys() == PROJECTED.keys()
    said = facts.get("prefix_projection")
    if not (projected or tensors.keys() == {EMBEDDING}) or said not in (None, projected):
        raise CheckpointError(
            f"a prefix encoder with the tensors {', '.join(sorted(tensors))[:200]}, and prefix_projection {said!r:.40}",
            f"{EMBEDDING}, and with a projection {', '.join([*PROJECTED][1:])}, too",
            "save the whole prefix encoder, with the configuration of its training",
        )
    rows, stack, layers = vectors(tensors[EMBEDDING], facts), geometry.site(site), geometry.attending(site)
    assert stack is not None  # or no layer attends
    width = 2 * len(layers) * stack.kv_heads * stack.head_dim
    found = tensors["trans.2.weight"].shape[:1] if projected else rows.shape[1:]
    if found != (width,):
        raise BaseModelError(
            f"{found[0] if found else 0} numbers for each virtual token",
            f"{width}: keys and values of {len(layers)} layers with {stack.kv_heads} heads of {stack.head_dim}, as "
            f"{geometry.model_type} has them",
            "check --base, or the config.json beside the weights",
        )
    if not projected:
        return KeyValuePrefix.from_flat(site, rows, layers, stack.kv_heads, stack.head_dim), None
    arrays = {f"{site}.{ours}": tensors[theirs].array() for theirs, ours in PROJECTED.items()}
    try:
        training = Training("mlp", {"dropout": dropout, "non_linearity": "tanh"}, arrays)
    except ValueError as error:
        raise CheckpointError(str(error), "a rate", "correct the dropout in the config.json") from error
    return made_prefix(training, site, geometry), training


def source(
    form: str, facts: Mapping[str, Any], geometry: Geometry, left: int, partial: str = ""
) -> tuple[BaseId, Origin]:
    """Where a prompt is from: a checkpoint with so many other tensors, and a configuration."""
    name = facts.get("_name_or_path")
    notes = [f"{left} tensors of the base model, which the toolkit freezes, are left"] if left else []
    notes += [f"in the base model this is another function: {partial}"] if partial else []
    origin = Origin(form, {"config": dict(facts)}, notes=tuple(notes), partial=partial)
    return BaseId(name if isinstance(name, str) and name else None, geometry), origin


def sizes(prompt: SoftPrompt, geometry: Geometry | None) -> tuple[Geometry, StackGeometry]:
    """The base model, and its attention that the prefix joins; known of every format that names its families."""
    stack = None if geometry is None else geometry.site(prompt.prefixes[0].site)
    assert geometry is not None
    assert stack is not None
    return geometry, stack


def write(stem: str, prompt: SoftPrompt, facts: Mapping[str, Json], head: Mapping[str, Array] = {}) -> dict[str, bytes]:
    """The files of a flat prefix: the encoder's tensor behind ``stem``, with those of a head, and the configuration."""
    prefix = prompt.prefixes[0]
    told = {**facts, "pre_seq_len": prefix.length, "prefix_projection": False}
    weights = untrusted.pickle_bytes({f"{stem}.{EMBEDDING}": prefix.flat(), **head})
    return {WEIGHTS: weights, CONFIG: json.dumps(told, indent=2, sort_keys=True).encode()}
