"""Textual inversion for Stable Diffusion XL, which has two text models: {"clip_l": [n, 768], "clip_g": [n, 1280]}.

So kohya's scripts, A1111 and ComfyUI have it; diffusers takes each tensor by itself (`text_encoder` and
`text_encoder_2`). Each is a prompt of its own, for a base model of its own: which one is read is decided by the width
of the base model's vectors. See `learned_words` for what it means. The token is called as the
file is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from softbridge import untrusted
from softbridge.errors import BaseModelError, CheckpointError, Obstacle
from softbridge.geometry import Geometry
from softbridge.prompt import SoftPrompt
from softbridge_archive import learned_words as shared
from softbridge_archive.contents import contained
from softbridge_archive.frame import ArchiveFormat

FILE = "embedding.safetensors"
#: The text models, by the name of their vectors -> their width.
ENCODERS = {"clip_l": 768, "clip_g": 1280}


def sniff(files: untrusted.Files) -> bool:
    """Whether there are vectors of these names, and nothing else."""
    tree = shared.tree_of(files)[1]
    return bool(tree) and tree.keys() <= ENCODERS.keys()


def read(files: untrusted.Files, geometry: Geometry | None) -> SoftPrompt:
    """See `Format.read`."""
    file, tree = shared.tree_of(files)
    found = contained({name: tree[name] for name in ENCODERS if name in tree}) or {}
    fit = {name: one for name, one in found.items() if geometry is None or one.shape[-1:] == (geometry.input_width,)}
    held = ", ".join(f"{name} {list(one.shape)}" for name, one in found.items()) or "no vectors"
    if not found or (geometry is not None and len(fit) > 1):
        raise CheckpointError(
            f"{files.path}: {held}", f"{' and '.join(ENCODERS)}, of two widths", "check that it is an SDXL embedding"
        )
    if len(fit) != 1:
        raise BaseModelError(
            f"{files.path} holds vectors of several text models: {held}" if fit else f"{files.path} holds {held}",
            "the text model whose vectors are meant",
            "give --base: the configuration of text_encoder for clip_l, of text_encoder_2 for clip_g",
        )
    ((name, vectors),) = fit.items()
    notes = [f"{other} is for the other text model, and is left" for other in found if other != name]
    return shared.learned({Path(file).stem: vectors}, FORMAT.name, geometry, {"encoder": name}, notes)


def obstacles(prompt: SoftPrompt, geometry: Geometry | None) -> Sequence[Obstacle]:
    """See `Format.obstacles`."""
    found = shared.obstacles(prompt, geometry, most=1)
    if _encoder(prompt) is None:
        width = prompt.inputs[0].vectors.shape[1]
        reason = f"SDXL's text models have words of {' and '.join(map(str, ENCODERS.values()))} numbers, these {width}"
        return [*found, Obstacle("width", reason, "write another format")]
    return found


def write(prompt: SoftPrompt, geometry: Geometry | None) -> Mapping[str, bytes]:
    """See `Format.write`."""
    return {FILE: untrusted.safetensors_bytes({str(_encoder(prompt)): prompt.inputs[0].vectors})}


def advise(prompt: SoftPrompt, geometry: Geometry | None, first: int) -> Sequence[str]:
    """See `Format.advice`."""
    others = [name for name in ENCODERS if name != _encoder(prompt)]
    return [
        f"the file has {_encoder(prompt)} alone: put {others[0]}, of the other text model, into the same dictionary"
    ]


def _encoder(prompt: SoftPrompt) -> str | None:
    """The text model that a prompt is for."""
    told = None if prompt.origin is None else prompt.origin.details.get("encoder")
    widths = (name for name, width in ENCODERS.items() if width == prompt.inputs[0].vectors.shape[1])
    return told if told in ENCODERS else next(widths, None)


FORMAT = ArchiveFormat(
    name="sdxl",
    summary="an embedding for Stable Diffusion XL: clip_l [n, 768] and clip_g [n, 1280]",
    files=("*.safetensors",),
    recognise=sniff,
    reader=read,
    reads="`.safetensors` (or a pickle) of one or both; the base model says which",
    writes="`.safetensors` of one",
    proven=shared.ADDED,
    encodings=("safetensors",),
    capabilities=shared.CAPABILITIES,
    writer=write,
    obstacles_of=obstacles,
    advise=advise,
)
