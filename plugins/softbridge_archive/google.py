"""google-research/prompt-tuning (Lester et al. 2021): one array [P, H] for a T5 encoder, and nothing else.

The vectors are concatenated in front of the embedded encoder input (`prompt_tuning/train/prompts.py`, `prefix_prompt`),
unscaled; real tokens stand at P, P + 1, ... `prefix_prompt_after_bos` puts them behind the first token. No file names
the model or the placement: the prompts that the repository publishes stand in front, the other placement has a name.

NumPy files are the published prompts (``.npy``) and the repository's own checkpoints (no suffix: the file is called as
the variable, ``encoder.prompt.prompt.prompt``). T5X keeps that variable in a folder of zarr's, beside those of the
frozen model, and flax in a msgpack file. `PromptDecoder` (``decoder.prompt...``) is refused: who sees its prompt, its
mask decides, and transformers has no decoder with that mask.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial

from softbridge import untrusted
from softbridge.errors import CheckpointError, few
from softbridge.geometry import Geometry
from softbridge.plugin.capabilities import Capabilities
from softbridge.prompt import Origin, Placement, SoftPrompt
from softbridge_archive.building import in_front
from softbridge_archive.contents import matrix, named, only_array, unread
from softbridge_archive.frame import ArchiveFormat

PLAIN = "encoder.prompt.prompt.prompt"
FILES = {"npy": "prompt.npy", "plain": PLAIN}
VARIABLE = re.compile(r"(?:(?:target|params|optimizer)[./])*(encoder|decoder)[./]prompt[./]prompt[./]prompt")
ZARR = "/.zarray"


def sniff(files: untrusted.Files) -> bool:
    """Whether an array is all there is (among a model's files it is somebody's labels or scores), or it is named so."""
    axes = only_array(files)
    if axes is not None:
        return axes not in (1, 3)  # labels; tasks of TensorRT-LLM
    states = [name for name in files.names if files.kind(name) == "msgpack"]
    variables = [name.removesuffix(ZARR) for name in files.names if f"/{name}".endswith(ZARR)]
    told = variables == [ZARR[1:]] or any(map(VARIABLE.fullmatch, variables))
    return told or any("prompt" in files.text(name) for name in states)


def read(files: untrusted.Files, geometry: Geometry | None, placement: Placement, name: str) -> SoftPrompt:
    """See `Format.read`."""
    arrays = {name: files.tree(name) for name in files.names if files.kind(name) == "npy"}
    arrays |= {name.removesuffix(ZARR): files.zarr(name) for name in files.names if f"/{name}".endswith(ZARR)}
    for name in files.names if not arrays else ():
        arrays |= named(files.tree(name)) if files.kind(name) == "msgpack" else {}
    prompts = {name: array for name, array in arrays.items() if VARIABLE.fullmatch(name)}
    prompts = prompts or (arrays if len(arrays) == 1 else {})
    if len(prompts) != 1:
        raise CheckpointError(
            f"{files.path} holds {few(list(prompts or files.names))}",
            f"one NumPy file (.npy, or no suffix), or one variable {PLAIN} in zarr or msgpack",
            "give the path of the array itself",
        )
    ((variable, stored),) = prompts.items()
    found = VARIABLE.fullmatch(variable)
    if found and found[1] == "decoder":
        raise CheckpointError(
            f"{variable}, a prompt of PromptDecoder, whose own mask says which tokens see it",
            f"a prompt of an encoder, {PLAIN}",
            "if your decoder sees it as it sees words in front, save the array as .pt and read it --from tensor",
        )
    notes = unread([other for other in arrays if other != variable])
    return in_front({"encoder": matrix(stored)}, geometry, Origin(name, notes=notes), placement)


def write(prompt: SoftPrompt, geometry: Geometry | None, encoding: str) -> Mapping[str, bytes]:
    """See `Format.write`."""
    return {FILES[encoding]: untrusted.npy_bytes(prompt.inputs[0].vectors)}


def _format(name: str, where: str, placement: Placement, *, sniffed: bool) -> ArchiveFormat:
    return ArchiveFormat(
        name=name,
        summary=f"google-research/prompt-tuning: one array [P, H] for a T5 encoder, {where}",
        files=("*.npy", "*.prompt", "*/.zarray", "*/[0-9].[0-9]", "checkpoint", "*.msgpack"),
        recognise=sniff if sniffed else lambda files: False,
        reader=partial(read, placement=placement, name=name),
        reads="`.npy`, or the file without suffix of its own checkpoints; T5X's variable in zarr; flax's msgpack",
        writes="`.npy`, or the file without suffix (`--encoding plain`)",
        proven="two released prompts, in PEFT, against the vectors put in front by hand; files of flax and TensorStore",
        encodings=tuple(FILES),
        writer=write,
        capabilities=Capabilities(
            inputs=frozenset({("encoder", "before", placement)}),
            input_start="counted",
            parts=1,
            model_types=frozenset({"t5", "mt5", "umt5"}),
        ),
    )


FORMAT = _format("google", "in front of the text", "before-sequence", sniffed=True)
AFTER = _format("google:after-first-token", "behind its first token", "after-first-token", sniffed=False)
