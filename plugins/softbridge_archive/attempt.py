"""AkariAsai/ATTEMPT (Asai et al. 2022): a source prompt, a bare tensor [P, H] for a T5 encoder.

The vectors are put in front of the encoder's `inputs_embeds`, and the relative bias counts them. What a mixture of
prompts adds, the weights of its attention, is other files, which no soft prompt is: it weighs prompts by the text.
"""

from __future__ import annotations

from softbridge import untrusted
from softbridge.errors import BaseModelError
from softbridge.geometry import Geometry
from softbridge.prompt import Origin, SoftPrompt
from softbridge_archive.building import in_front
from softbridge_archive.contents import matrix
from softbridge_archive.frame import ArchiveFormat
from softbridge_archive.tensor import stored_in


def read(files: untrusted.Files, geometry: Geometry | None) -> SoftPrompt:
    """See `Format.read`."""
    stored = stored_in(files)
    if geometry is not None and not geometry.is_encoder_decoder:
        raise BaseModelError(f"a prompt of ATTEMPT for {geometry.model_type}", "a T5", "check --base, or --from tensor")
    return in_front({"encoder": matrix(stored)}, geometry, Origin("attempt"))


FORMAT = ArchiveFormat(
    name="attempt",
    summary="AkariAsai/ATTEMPT: a source prompt, a bare tensor [P, H] in front of a T5 encoder's text",
    files=("*.pt",),
    recognise=lambda files: False,
    reader=read,
    reads="a source prompt `*.pt`, if it is named; no mixtures",
    proven="a released prompt, in PEFT, against the vectors put in front by hand",
)
