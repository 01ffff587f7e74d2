"""google-research/prompt-tuning (Lester et al. 2021): one NumPy array [P, H], and nothing else.

The vectors are concatenated in front of the embedded encoder input of a T5 (`prompt_tuning/train/prompts.py`,
`prefix_prompt`), unscaled; real tokens stand at P, P + 1, ... The file names neither the model nor the placement; the
pretrained prompts of that repository all stand before the sequence. Its own checkpoints carry no suffix
(``encoder.prompt.prompt.prompt``), its published prompts end in ``.npy``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from softbridge import untrusted
from softbridge.checkpoint.manifest import CERTIFICATE, MANIFEST
from softbridge.errors import CheckpointError, Obstacle
from softbridge.geometry import Geometry
from softbridge.plugin.capabilities import Capabilities
from softbridge.prompt import BaseId, InputPrompt, Origin, Positions, SoftPrompt
from softbridge_archive.frame import ArchiveFormat

FILE = "prompt.npy"


def sniff(files: untrusted.Files) -> bool:
    """Whether an array is all there is: one that lies among a model's files is somebody's labels or scores."""
    others = set(files.names) - {MANIFEST, CERTIFICATE}
    return len(others) == 1 and files.kind(others.pop()) == "npy"


def read(files: untrusted.Files, geometry: Geometry | None) -> SoftPrompt:
    """See `Format.read`."""
    name = _array_of(files)
    if name is None:
        raise CheckpointError(
            f"{files.path} holds {', '.join(files.names) or 'nothing'}",
            "one NumPy file (.npy, or no suffix)",
            "give the path of the array itself",
        )
    vectors = files.array(name)
    if vectors.ndim != 2 or (vectors.dtype.kind != "f" and vectors.dtype.name != "bfloat16") or 0 in vectors.shape:
        raise CheckpointError(
            f"{name} holds an array {list(vectors.shape)} of {vectors.dtype}",
            "a floating-point array [P, H]",
            "check that this is a prompt, not another parameter of the checkpoint",
        )
    part = InputPrompt(vectors, "encoder")
    return SoftPrompt((part,), Positions({"encoder": part.length}), BaseId(None, geometry), origin=Origin("google"))


def obstacles(prompt: SoftPrompt, geometry: Geometry | None) -> Sequence[Obstacle]:
    """See `Format.obstacles`."""
    if len(prompt.parts) == 1:
        return ()
    return [Obstacle("parts", f"the file holds one array, the prompt has {len(prompt.parts)} parts", "split it")]


def write(prompt: SoftPrompt, geometry: Geometry | None) -> Mapping[str, bytes]:
    """See `Format.write`."""
    return {FILE: untrusted.npy_bytes(prompt.inputs[0].vectors)}


def _array_of(files: untrusted.Files) -> str | None:
    arrays = [name for name in files.names if files.kind(name) == "npy"]
    return arrays[0] if len(arrays) == 1 else None


FORMAT = ArchiveFormat(
    name="google",
    summary="google-research/prompt-tuning: one .npy array [P, H] for a T5 encoder",
    files=("*.npy", "*.prompt"),
    recognise=sniff,
    reader=read,
    reads="`.npy`, or the file without suffix of its own checkpoints",
    writes="`.npy`",
    proven="two released prompts, in PEFT, against the vectors put in front by hand",
    encodings=("npy",),
    capabilities=Capabilities(
        inputs=frozenset({("encoder", "before", "before-sequence")}),
        input_start="counted",
        model_types=frozenset({"t5", "mt5", "umt5"}),
    ),
    writer=write,
    obstacles_of=obstacles,
)
