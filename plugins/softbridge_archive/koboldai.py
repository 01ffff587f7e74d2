"""KoboldAI's soft prompts (mtj-softtuner, henk717's softtuner): vectors [P, H] in front of the text.

- ``.zip``: ``tensor.npy`` (LZMA; float16, float32, or bfloat16 as NumPy's V2) and ``meta.json`` (name, author,
  supported models, description). KoboldAI takes it if it is a matrix of fewer than 2048 rows (`fileops.py`, `checksp`)
  of the model's width (`aiserver.py`).
- ``.mtjsp``, an .npz, and ``.mkusp``, of torch.save, are states of the two tuners in the middle of training: ``tensor``
  is the prompt so far; the optimiser's state (of the first a pickle within) is not opened.

Ids from the vocabulary's size on stand in front of all others, and the word embedding gives them the vectors
(`aiserver.py`): positions 0 to P - 1 are theirs, and there is one row and no padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from softbridge import untrusted
from softbridge.errors import CheckpointError, Obstacle
from softbridge.geometry import Geometry
from softbridge.plugin.capabilities import UP_TO_FLOAT32, Capabilities
from softbridge.prompt import BaseId, InputPrompt, Origin, Positions, SoftPrompt
from softbridge_archive.contents import alone, dictionary, only, vectors_of
from softbridge_archive.frame import ArchiveFormat

FILE, TENSOR, META = "prompt.zip", "tensor.npy", "meta.json"
#: `checksp` refuses as many.
MOST = 2048
STATE = "a state in the middle of training: the optimiser's part of it is left"


def sniff(files: untrusted.Files) -> bool:
    """Whether an archive with KoboldAI's two files, or a tuner's state, is all there is."""
    name = alone(files)
    if name is not None and files.kind(name) == "zip":
        names = set(files.inside(name).names)
        return {TENSOR, META} <= names or {TENSOR, "opt_state.npy"} <= names
    return {"tensor", "opt_state", "step"} <= dictionary(files, name).keys()


def read(files: untrusted.Files, geometry: Geometry | None) -> SoftPrompt:
    """See `Format.read`."""
    name = only(files)
    if files.kind(name) == "pickle":
        tensor, meta = dictionary(files, name).get("tensor"), None
    else:
        inside = files.inside(name)
        tensor, meta = inside.tree(TENSOR), inside.json(META) if META in inside else None
    if not isinstance(tensor, untrusted.Stored):
        raise CheckpointError(f"{files.path}: a tensor that is {tensor!r:.80}", "a plain tensor", "check the file")
    part = InputPrompt(vectors_of(tensor), "decoder")
    origin = Origin("koboldai", {} if meta is None else {"meta": meta}, notes=(STATE,) if meta is None else ())
    return SoftPrompt((part,), Positions({"decoder": part.length}), BaseId(None, geometry), origin=origin)


def obstacles(prompt: SoftPrompt, geometry: Geometry | None) -> Sequence[Obstacle]:
    """See `Format.obstacles`."""
    length = prompt.inputs[0].length
    reason = f"KoboldAI takes fewer than {MOST} vectors, the prompt has {length}"
    return [Obstacle("length", reason, "use a shorter prompt")] if length >= MOST else []


def write(prompt: SoftPrompt, geometry: Geometry | None) -> Mapping[str, bytes]:
    """See `Format.write`."""
    own = (
        prompt.origin.details.get("meta") if prompt.origin is not None and prompt.origin.format == "koboldai" else None
    )
    supported = [prompt.base.name or (geometry.model_type if geometry is not None else "")]
    meta = own or {"name": "softbridge", "supported": supported, "description": "converted by softbridge"}
    members = {TENSOR: untrusted.npy_bytes(prompt.inputs[0].vectors), META: untrusted.json_bytes(meta)}
    return {FILE: untrusted.zip_bytes(members, compressed=(TENSOR,))}


FORMAT = ArchiveFormat(
    name="koboldai",
    summary="KoboldAI: one .zip of tensor.npy [P, H] and meta.json; .mtjsp and .mkusp are read",
    files=("*.zip", "*.mtjsp", "*.mkusp"),
    recognise=sniff,
    reader=read,
    reads="`.zip`, `.mtjsp`, `.mkusp`",
    writes="`.zip`",
    proven="against the vectors put in front by hand, GPT-2, natively and in PEFT",
    encodings=("npy",),
    capabilities=Capabilities(
        inputs=frozenset({("decoder", "before", "before-sequence")}),
        input_start="counted",
        parts=1,
        dtypes=UP_TO_FLOAT32,
        positions_told=False,
    ),
    writer=write,
    obstacles_of=obstacles,
)
