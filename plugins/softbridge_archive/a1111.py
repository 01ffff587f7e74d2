"""AUTOMATIC1111's embeddings: textual inversion of one token (see `learned_words` for what it means).

`modules/textual_inversion/textual_inversion.py`, `Embedding.save`: torch.save of string_to_token {"*": its id},
string_to_param {"*": vectors [n, H]}, name, step, sd_checkpoint and sd_checkpoint_name. The vectors stand in a
ParameterDict or a dictionary. A1111 calls the token as the file is called, diffusers by ``name``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from softbridge import untrusted
from softbridge.errors import CheckpointError, Obstacle
from softbridge.geometry import Geometry
from softbridge.prompt import SoftPrompt
from softbridge_archive import learned_words as shared
from softbridge_archive.contents import contained
from softbridge_archive.frame import ArchiveFormat

FILE, PARAMETERS = "embedding.pt", "string_to_param"
#: What a file says besides, and what it says if nobody knows.
FACTS: Mapping[str, object] = {"step": 0, "sd_checkpoint": None, "sd_checkpoint_name": None}


def sniff(files: untrusted.Files) -> bool:
    """Whether there is a dictionary with this entry."""
    return PARAMETERS in shared.tree_of(files)[1]


def read(files: untrusted.Files, geometry: Geometry | None) -> SoftPrompt:
    """See `Format.read`."""
    file, tree = shared.tree_of(files)
    found = list((contained(tree.get(PARAMETERS)) or {}).values())
    if len(found) != 1:
        raise CheckpointError(
            f"{files.path}: {len(found)} tensors under {PARAMETERS}",
            "one, of one token",
            "check that it is an embedding",
        )
    name, facts = tree.get("name"), {fact: tree[fact] for fact in FACTS if isinstance(tree.get(fact), (int, str))}
    token = name if isinstance(name, str) and name else Path(file).stem
    return shared.learned({token: found[0]}, FORMAT.name, geometry, facts)


def obstacles(prompt: SoftPrompt, geometry: Geometry | None) -> Sequence[Obstacle]:
    """See `Format.obstacles`."""
    return shared.obstacles(prompt, geometry, most=1)


def write(prompt: SoftPrompt, geometry: Geometry | None) -> Mapping[str, bytes]:
    """See `Format.write`."""
    ((token, vectors),) = shared.tokens_of(prompt).items()
    told = {} if prompt.origin is None else prompt.origin.details
    facts = {fact: told.get(fact, default) for fact, default in FACTS.items()}
    content = {"string_to_token": {"*": 265}, PARAMETERS: {"*": vectors}, "name": token, **facts}
    return {FILE: untrusted.pickle_bytes(content)}


FORMAT = ArchiveFormat(
    name="a1111",
    summary="AUTOMATIC1111: an embedding, .pt with string_to_param {'*': vectors [n, H]}",
    files=("*.pt",),
    recognise=sniff,
    reader=read,
    reads="`.pt`, of several vectors",
    writes="`.pt`, with the token's name",
    proven=shared.PROVEN,
    encodings=("pt",),
    capabilities=shared.CAPABILITIES,
    writer=write,
    obstacles_of=obstacles,
)
