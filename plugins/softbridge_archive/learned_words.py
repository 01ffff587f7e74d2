"""What textual inversion means (Gal et al. 2022, arXiv 2208.01618), for the formats that have it: learned words.

A toolkit gives the text model of CLIP n words more, and wherever a user writes the token, these stand: they get
positions like any words, and <bos> is in front (`diffusers/loaders/textual_inversion.py`). So the vectors are those of
a template, ``{before}`` n virtual tokens ``{after}``, the fields of which are all that the tokenizer makes of the rest:
<bos>, words, <eos>, padding. In front of the sequence they would stand before <bos>, which no causal model has seen.
Several tokens have a field between each two.

All states are the toolkits'. diffusers' pooled state is not where `eos_token_id` is 2, as in old configurations: for
that of <eos> transformers then takes that of the largest id, which an added word has. The native engine adds no ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from softbridge import untrusted
from softbridge.errors import CheckpointError, Obstacle
from softbridge.geometry import Geometry
from softbridge.plugin.capabilities import Capabilities
from softbridge.prompt import Array, BaseId, InputPrompt, Json, Origin, Positions, SoftPrompt
from softbridge.template import Field, Piece, Template, Virtual
from softbridge_archive.contents import alone, dictionary, vectors_of

#: diffusers' names, in its order of preference.
FILES = {"safetensors": "learned_embeds.safetensors", "bin": "learned_embeds.bin"}
CAPABILITIES = Capabilities(inputs=frozenset({("encoder", "before", "template")}), parts=1, positions_told=False)
ADDED = "in `CLIPTextModel` and `CLIPTextModelWithProjection`, against words added to the vocabulary"
PROVEN = f"{ADDED}, and against diffusers' own loader"


def tree_of(files: untrusted.Files) -> tuple[str, Mapping[str, Any]]:
    """The one file, or that of diffusers' name among a concept's images and texts; and what it holds."""
    name = alone(files) or next((name for name in FILES.values() if name in files), None)
    return name or "", dictionary(files, name)


def learned(
    tokens: Mapping[str, untrusted.Stored],
    form: str,
    geometry: Geometry | None,
    facts: Mapping[str, Json] = {},
    notes: Sequence[str] = (),
) -> SoftPrompt:
    """The prompt of these tokens, each with its vectors [n, H] or [H].

    Raises:
        CheckpointError: there are none, or they are no vectors of one width.
    """
    vectors = {token: vectors_of(stored) for token, stored in tokens.items()}
    if len({array.shape[1] for array in vectors.values()}) != 1:
        found = ", ".join(f"{token!r:.40} {list(array.shape)}" for token, array in vectors.items()) or "none"
        raise CheckpointError(f"learned words: {found}", "vectors [n, H] of each token", "check the file")
    template = _template(list(map(len, vectors.values())))
    part = InputPrompt(np.concatenate(list(vectors.values())), "encoder", placement="template", template=template)
    origin = Origin(form, {**facts, "tokens": list(tokens)}, notes=tuple(notes))
    return SoftPrompt((part,), Positions({"encoder": 0}), BaseId(None, geometry), origin=origin)


def tokens_of(prompt: SoftPrompt) -> dict[str, Array]:
    """Token -> its vectors. A prompt that was not read from such a file has tokens of softbridge's naming."""
    lengths, told = _lengths(prompt), None if prompt.origin is None else prompt.origin.details.get("tokens")
    names = list(dict.fromkeys(map(str, told))) if isinstance(told, list) else []
    if len(names) != len(lengths):
        names = [f"<softbridge-{number}>" for number in range(1, len(lengths) + 1)]
    return dict(zip(names, np.split(prompt.inputs[0].vectors, np.cumsum(lengths)[:-1]), strict=True))


def obstacles(prompt: SoftPrompt, geometry: Geometry | None, most: int | None = None) -> Sequence[Obstacle]:
    """What stands against writing a prompt's tokens, of which a file holds so many."""
    lengths, remedy = _lengths(prompt), "write it in softbridge's own format"
    if prompt.inputs[0].template != _template(lengths):
        reason = "a token stands for its vectors wherever it is written, and this template has places of its own"
        return [Obstacle("template", reason, remedy)]
    if most is not None and len(lengths) > most:
        return [Obstacle("tokens", f"a file holds {most} token, and the prompt has {len(lengths)}", remedy)]
    return ()


def _lengths(prompt: SoftPrompt) -> list[int]:
    """How many vectors each token has."""
    template = prompt.inputs[0].template
    return [] if template is None else [piece.count for piece in template.pieces if isinstance(piece, Virtual)]


def _template(lengths: Sequence[int]) -> Template:
    pieces: list[Piece] = [Field("before")]
    for number, length in enumerate(lengths, 1):
        pieces += [Virtual(length), Field("after" if number == len(lengths) else f"between_{number}")]
    return Template(tuple(pieces))
