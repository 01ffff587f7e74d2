"""diffusers' textual inversion: {"<token>": vectors [n, H] or [H]}, perhaps of several tokens.

`learned_embeds.safetensors` or `.bin` (`diffusers/loaders/textual_inversion.py`). ``emb_params`` in the place of a
token is how others write one, who call it as the file is called. See `learned_words` for what it means.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from softbridge import untrusted
from softbridge.geometry import Geometry
from softbridge.prompt import Array, SoftPrompt
from softbridge_archive import learned_words as shared
from softbridge_archive.contents import contained
from softbridge_archive.frame import ArchiveFormat

#: A tensor of this name is of the token that the file is called after.
UNNAMED = "emb_params"
WRITERS: Mapping[str, Callable[[Mapping[str, Array]], bytes]] = {
    "safetensors": untrusted.safetensors_bytes,
    "bin": untrusted.pickle_bytes,
}


def sniff(files: untrusted.Files) -> bool:
    """Whether there are vectors of tokens, and nothing else: in angle brackets, or in a file of diffusers' name."""
    name, tree = shared.tree_of(files)
    tokens = contained(tree) or {}
    bracketed = all(token == UNNAMED or (token[:1], token[-1:]) == ("<", ">") for token in tokens)
    return bool(tokens) and (bracketed or name in shared.FILES.values())


def read(files: untrusted.Files, geometry: Geometry | None) -> SoftPrompt:
    """See `Format.read`."""
    name, tree = shared.tree_of(files)
    tokens = contained(tree) or {}
    return shared.learned(
        {Path(name).stem if t == UNNAMED else t: one for t, one in tokens.items()}, FORMAT.name, geometry
    )


def write(prompt: SoftPrompt, geometry: Geometry | None, encoding: str) -> Mapping[str, bytes]:
    """See `Format.write`."""
    return {shared.FILES[encoding]: WRITERS[encoding](shared.tokens_of(prompt))}


FORMAT = ArchiveFormat(
    name="textual-inversion",
    summary='diffusers: {"<token>": vectors [n, H]}, for a text model of CLIP',
    files=tuple(shared.FILES.values()),
    recognise=sniff,
    reader=read,
    reads="`learned_embeds.safetensors` and `.bin`, of several vectors, of several tokens",
    writes="both, with the tokens' names",
    proven=shared.PROVEN,
    encodings=tuple(WRITERS),
    capabilities=shared.CAPABILITIES,
    writer=write,
    obstacles_of=shared.obstacles,
)
