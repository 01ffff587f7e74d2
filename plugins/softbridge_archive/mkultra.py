"""mkultra (corolla-johnson): one JSON file, {"metadata": {...}, "tensor": base64 of pickle.dumps(tensor)}.

The vectors [P, H], or [1, P, H], stand in the place of a tag's tokens, at the word embedding, so that positions are
added to them as to words (`mkultra/soft_prompt.py`, `to_file`, and `mkultra/tuning.py`). A user writes the tag
where he likes, nearly always in front, which is how they are read here. Nothing names the base model. The pickle is
walked as data, like every pickle.
"""

from __future__ import annotations

import base64
import binascii

from softbridge import untrusted
from softbridge.errors import CheckpointError
from softbridge.geometry import Geometry
from softbridge.prompt import BaseId, InputPrompt, Origin, Positions, SoftPrompt
from softbridge_archive.contents import alone, only, vectors_of
from softbridge_archive.frame import ArchiveFormat


def sniff(files: untrusted.Files) -> bool:
    """Whether a JSON file with the two keys is all there is."""
    name = alone(files)
    found = files.json(name) if name is not None and files.kind(name) == "json" else {}
    begins = "gA"  # a pickle's first byte, 0x80, in base64
    return found.keys() == {"metadata", "tensor"} and isinstance(text := found["tensor"], str) and text[:2] == begins


def read(files: untrusted.Files, geometry: Geometry | None) -> SoftPrompt:
    """See `Format.read`."""
    name = only(files)
    found = files.json(name)
    what = f"{files.path}: the tensor of {name}"
    try:
        content = base64.b64decode(found.get("tensor", ""), validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{what}: not readable as base64: {error}", "a pickle in base64", "get it anew"
        ) from error
    tensor = untrusted.pickled(content, what)
    if not isinstance(tensor, untrusted.Stored):
        raise CheckpointError(f"{what}: a pickle of {tensor!r:.80}", "a pickle of one tensor", "check the file")
    part = InputPrompt(vectors_of(tensor), "decoder")
    metadata = found.get("metadata")
    notes = ("mkultra puts the vectors where the tag is written; they are read as standing in front of the text",)
    origin = Origin("mkultra", {"metadata": metadata} if isinstance(metadata, dict) else {}, notes=notes)
    return SoftPrompt((part,), Positions({"decoder": part.length}), BaseId(None, geometry), origin=origin)


FORMAT = ArchiveFormat(
    name="mkultra",
    summary="mkultra: one JSON file with a tensor [P, H] in it, for GPT-2 and GPT-Neo",
    files=("*.json",),
    recognise=sniff,
    reader=read,
    reads="`.json` with a pickle in base64",
    proven="a released prompt, in PEFT, against the vectors put in front by hand",
)
