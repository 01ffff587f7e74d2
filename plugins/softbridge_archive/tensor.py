"""A bare tensor [P, H] that torch.save wrote: how many repositories publish a prompt, and nothing says where it stands.

Recognised, and refused until the caller says it: ``--from tensor`` (in front of the text), ``--from
tensor:after-first-token``, or the repository whose prompt it is. The vectors go to the encoder, if the base model has
one. Read so, real tokens stand behind the virtual ones in the numbering of positions, as behind words.
"""

from __future__ import annotations

from functools import partial

from softbridge import untrusted
from softbridge.errors import BaseModelError, CheckpointError
from softbridge.geometry import Geometry, Stack
from softbridge.prompt import Origin, Placement, SoftPrompt
from softbridge_archive import tgis
from softbridge_archive.building import in_front
from softbridge_archive.contents import matrix
from softbridge_archive.frame import ArchiveFormat

#: The formats that read such a file if they are named.
CHOICES = ("tensor", "tensor:after-first-token", "attempt", "prompt-transferability", "prompt-transferability:2.0")


def bare(files: untrusted.Files) -> bool:
    """Whether one tensor of two axes is all there is, under a name that says nothing."""
    if len(files.names) != 1 or files.kind(files.names[0]) != "pickle" or files.names[0] in tgis.FILES:
        return False
    try:
        tree = files.tree(files.names[0])
    except CheckpointError:
        return False
    return isinstance(tree, untrusted.Stored) and len(tree.shape) == 2 and "float" in tree.dtype.name


def stored_in(files: untrusted.Files) -> untrusted.Stored:
    """The one tensor of the one file.

    Raises:
        CheckpointError: there is something else.
    """
    found = [name for name in files.names if files.kind(name) == "pickle"]
    tree = files.tree(found[0]) if len(found) == 1 else None
    if not isinstance(tree, untrusted.Stored):
        raise CheckpointError(
            f"{files.path} holds {', '.join(files.names[:6]) or 'nothing'}",
            "one file of torch.save, with a tensor [P, H] and nothing else",
            "give the path of the tensor itself, or leave --from out",
        )
    return tree


def refuse(files: untrusted.Files, geometry: Geometry | None) -> SoftPrompt:
    """Say what is missing.

    Raises:
        BaseModelError: always.
    """
    raise BaseModelError(
        f"a bare tensor {list(stored_in(files).shape)}, of which nothing says for which base model it is and where it "
        f"stands: give --base and one of --from {', '.join(CHOICES)}",
        "a stated base model and a stated place",
        "give --base and --from (base=... and format=... in Python)",
    )


def read(files: untrusted.Files, geometry: Geometry | None, placement: Placement, name: str) -> SoftPrompt:
    """See `Format.read`."""
    stored = stored_in(files)
    if geometry is None:
        raise BaseModelError(f"a tensor {list(stored.shape)} for any stack", "the base model", "give --base")
    stack: Stack = "decoder" if geometry.encoder is None else "encoder"
    return in_front({stack: matrix(stored)}, geometry, Origin(name), placement)


def _named(name: str, placement: Placement, where: str) -> ArchiveFormat:
    return ArchiveFormat(
        name=name,
        summary=f"a bare tensor [P, H] of torch.save, {where}: as the caller says, with --base",
        files=("*.pt", "*.bin", "*.pth"),
        recognise=lambda files: False,
        reader=partial(read, placement=placement, name=name),
        reads=f"a bare tensor, {where}; with `--base`, never unless it is named",
        proven="released prompts, against the vectors put there by hand",
    )


FORMAT = ArchiveFormat(
    name="bare-tensor",
    summary="a bare tensor [P, H] of torch.save, of which nothing says where it stands: refused with what to give",
    files=("*.pt", "*.bin", "*.pth"),
    recognise=bare,
    reader=refuse,
    reads="nothing: recognised, and refused with the formats to choose from",
    proven="every released prompt of this kind is refused",
)
FRONT = _named("tensor", "before-sequence", "in front of the text")
AFTER = _named("tensor:after-first-token", "after-first-token", "behind the first token of the text")
