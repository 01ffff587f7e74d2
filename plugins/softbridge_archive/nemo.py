"""NVIDIA NeMo (nemo-toolkit 1.x): prompt learning and the p-tuning adapter, in a ``.nemo`` archive or a folder of it.

Prompt learning fills vectors into the places of pseudo tokens that a template names, and adds learned positions to all
tokens (`megatron_gpt_prompt_learning_model.py`, forward). The adapter puts its vectors over the first P, which are
pads, when positions have been added: virtual tokens have none, and words stand at P, P + 1, ...
(`megatron/language_model.py`). The geometry is Megatron's: the base model is the one that is given. A table of zeros
was not made yet, and the encoder makes it. Megatron's distributed checkpoints are not read.
"""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np

from softbridge import untrusted
from softbridge.errors import CheckpointError
from softbridge.geometry import Geometry
from softbridge.prompt import BaseId, SoftPrompt
from softbridge_archive.building import several
from softbridge_archive.contents import below, matrix, weights
from softbridge_archive.frame import ArchiveFormat
from softbridge_archive.nemo_encoder import encoded
from softbridge_archive.nemo_template import placed, templates_of

CONFIG = "model_config.yaml"
TABLE = re.compile(r"(?:.*\.)?prompt_table\.(.+)\.prompt_embeddings\.weight")
ADAPTER = r"adapter_layer\.ptuning_adapter"


def opened(files: untrusted.Files) -> untrusted.Files:
    """The files of an archive, or those of a folder."""
    packed = len(files.names) == 1 and files.kind(files.names[0]) in ("tar", "gzip")
    return files.inside(files.names[0]) if packed else files


def sniff(files: untrusted.Files) -> bool:
    """Whether there is Megatron's configuration, and tensors under one of the two names."""
    try:
        inner = opened(files)
        return CONFIG in inner and any(TABLE.fullmatch(name) or re.search(ADAPTER, name) for name in weights(inner))
    except CheckpointError:
        return False


def read(files: untrusted.Files, geometry: Geometry | None) -> SoftPrompt:
    """See `Format.read`."""
    inner = opened(files)
    config, found = inner.yaml(CONFIG), weights(inner)
    adapter = below(found, ADAPTER)
    tables = {match[1]: matrix(found[name]) for name in found if (match := TABLE.fullmatch(name))}
    if "inference_table" in adapter:
        tables["taskname"] = matrix(adapter["inference_table"])
    tasks = {task: rows for task, rows in tables.items() if rows.any()}
    known = list(templates_of(config))  # NeMo numbers tasks in this order
    tasks = dict(sorted(tasks.items(), key=lambda task: known.index(task[0]) if task[0] in known else len(known)))
    made, training = encoded(adapter or found)
    if not tasks and made is None:
        raise CheckpointError(f"{files.path} holds neither a table nor an encoder", "one of them", "train, then save")
    notes = [
        f"task {task}: its table is zero, not made yet, and is left" for task in tables if tasks and task not in tasks
    ]
    if not tasks and made is not None:
        tasks = {next(iter(tables), "taskname"): made}
    encoder = "T5" in str(config.get("target")) if geometry is None else geometry.encoder is not None
    prompt = several(tasks, "encoder" if encoder else "decoder", geometry, FORMAT.name, tuple(notes))
    base, rows = config.get("language_model_path"), prompt.inputs[0].vectors
    prompt = replace(prompt, base=BaseId(base if isinstance(base, str) else None, geometry))
    if len(tasks) == 1 and made is not None and made.shape == rows.shape and np.allclose(made, rows, 1e-4):
        prompt = replace(prompt, training=training)
    if adapter:
        learned = config.get("position_embedding_type", "learned_absolute") == "learned_absolute"
        return replace(prompt, parts=(replace(prompt.inputs[0], entry="after" if learned else "before"),))
    return placed(prompt, tasks, config)


FORMAT = ArchiveFormat(
    name="nemo",
    summary="NVIDIA NeMo: prompt learning and the p-tuning adapter, a .nemo archive or a folder of it",
    files=("*.nemo", CONFIG, "model_weights.ckpt", "*/model_weights.ckpt"),
    recognise=sniff,
    reader=read,
    reads="`.nemo` (tar, in gzip or not) or its folder: the tables of all tasks with their templates, MLP and LSTM "
    "encoders, the p-tuning adapter",
    proven="GPT-2 by hand: in places of a template, in front with positions, and over pads without; T5 in front",
)
