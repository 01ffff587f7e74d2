"""TensorRT-LLM's ``prompt_table.npy`` [tasks, P, H], or [P, H] of one task: vectors for a decoder's input.

A virtual token is an id from the vocabulary's size on, and the engine reads its vector from the rows of its task
(`PromptTuningEmbedding` in layers/embedding.py). By custom these ids stand in front of the text; they have positions
like words, and rows are packed without pads. `nemo_prompt_convert.py` fills short prompts up with rows of zeros, and
nothing says how long a prompt was: rows of zeros at its end are taken for filling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from softbridge import untrusted
from softbridge.arrays import Array
from softbridge.errors import BaseModelError, CheckpointError, Obstacle
from softbridge.geometry import Geometry
from softbridge.methods import materialise_tasks
from softbridge.plugin.capabilities import Capabilities
from softbridge.prompt import SoftPrompt
from softbridge_archive.building import several
from softbridge_archive.contents import only_array
from softbridge_archive.frame import ArchiveFormat

FILE = "prompt_table.npy"


def sniff(files: untrusted.Files) -> bool:
    """Whether an array of three axes is all there is; one of two axes may be anybody's."""
    return only_array(files) == 3


def read(files: untrusted.Files, geometry: Geometry | None) -> SoftPrompt:
    """See `Format.read`."""
    names = [name for name in files.names if files.kind(name) == "npy"]
    table = files.array(names[0]) if len(names) == 1 else np.empty(0)
    if geometry is not None and geometry.encoder is not None:
        raise BaseModelError(f"a table for {geometry.model_type}", "a model of a decoder alone", "check --base")
    if table.ndim not in (2, 3) or 0 in table.shape or (table.dtype.kind != "f" and table.dtype.name != "bfloat16"):
        raise CheckpointError(
            f"{files.path} holds {len(names)} arrays, {list(table.shape)} of {table.dtype}",
            "one floating-point array [tasks, P, H] or [P, H]",
            "give the path of the table itself",
        )
    tasks, notes = {}, []
    for number, rows in enumerate(table[None] if table.ndim == 2 else table):
        used = np.flatnonzero(rows.any(axis=1))
        if len(used) == 0:
            raise CheckpointError(
                f"task {number} of {list(table.shape)} is zero throughout", "vectors", "save the table without it"
            )
        tasks[str(number)] = rows[: used[-1] + 1]
        filling = len(rows) - used[-1] - 1
        if filling:
            notes.append(f"task {number}: rows of zeros at its end, {filling}, are taken for filling up")
    return several(tasks, "decoder", geometry, FORMAT.name, tuple(notes))


def _tasks(prompt: SoftPrompt) -> Sequence[Array]:
    return [prompt.inputs[0].vectors] if prompt.training is None else [*materialise_tasks(prompt.training).values()]


def obstacles(prompt: SoftPrompt, geometry: Geometry | None) -> Sequence[Obstacle]:
    """See `Format.obstacles`."""
    if geometry is not None and geometry.is_encoder_decoder:
        return [Obstacle("family", "tables are for models of a decoder alone", "choose another target")]
    ended = [number for number, rows in enumerate(_tasks(prompt)) if not rows[-1].any()]
    reason = f"the last vector of task {ended[:1]} is zero, which a table cannot tell from filling"
    return [Obstacle("zeros", reason, "choose another target")] if ended else []


def write(prompt: SoftPrompt, geometry: Geometry | None) -> Mapping[str, bytes]:
    """See `Format.write`."""
    tasks = _tasks(prompt)
    table = np.zeros((len(tasks), max(map(len, tasks)), tasks[0].shape[1]), tasks[0].dtype)
    for number, rows in enumerate(tasks):
        table[number, : len(rows)] = rows
    return {FILE: untrusted.npy_bytes(table)}


FORMAT = ArchiveFormat(
    name="tensorrt-llm",
    summary="TensorRT-LLM: prompt_table.npy, vectors [tasks, P, H] in front of a decoder's text",
    files=(FILE,),
    recognise=sniff,
    reader=read,
    reads="`prompt_table.npy` of one task or several; one task of it with `--task`; [P, H] with `--from tensorrt-llm`",
    writes="`prompt_table.npy`, with all tasks that there are",
    proven="GPT-2 on a vocabulary that the table continues, ids of virtual tokens in front",
    encodings=("npy",),
    capabilities=Capabilities(
        inputs=frozenset({("decoder", "before", "before-sequence")}),
        input_start="counted",
        positions_told=False,
        parts=1,
        training=frozenset({"table"}),
    ),
    writer=write,
    obstacles_of=obstacles,
)
