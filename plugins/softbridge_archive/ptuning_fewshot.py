"""THUDM/P-tuning, PT-Fewshot (Liu et al. 2021, arXiv 2103.10385): vectors among the words of a pattern.

A folder with the language model, which was trained with the prompt, and ``embeddings.pth``: the state of an embedding,
and of an LSTM of two layers, H in each direction, with two linear layers behind it, or of two linear layers alone
(`PT-Fewshot/pet/wrapper.py`). Where the vectors stand (`block_flag`) is part of each task's pattern in the program. No
file has it, so that whoever reads one says it: ``template.json`` beside it. What answers mean (PET's verbalisers) goes
the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from softbridge import untrusted
from softbridge.geometry import Geometry, Stack
from softbridge.prompt import BaseId, Json, Origin, SoftPrompt, Training
from softbridge_archive import building, contents, frame

#: What the file holds -> the parameterisation that it is, and its settings.
KINDS: Mapping[frozenset[str], tuple[str, dict[str, Json]]] = {
    frozenset(("prompt_embeddings", "lstm_head", "mlp_head")): (
        "p-tuning-lstm",
        {"layers": 2, "non_linearity": "relu", "dropout": 0.0},
    ),
    frozenset(("prompt_embeddings", "mlp")): ("p-tuning-mlp", {"layers": 2, "non_linearity": "relu"}),
}
#: The beginnings of their names of tensors -> of ours.
NAMES = {
    "prompt_embeddings.weight": "embedding",
    "lstm_head.": "lstm.",
    **dict.fromkeys(("mlp_head.0.", "mlp.0."), "linear.0."),
    **dict.fromkeys(("mlp_head.2.", "mlp.2."), "linear.1."),
}
WRAPPER = "wrapper_config.json"
#: What it says that is worth keeping.
TASK = ("model_type", "model_name_or_path", "task_name", "pattern_id", "prompt_encoder_type", "embed_size")
WHAT = "vectors of PT-Fewshot"


def sniff(files: untrusted.Files) -> bool:
    """Whether a file holds such an encoder and nothing else."""
    return bool(contents.saved(files, _is_it))


def _is_it(tree: Mapping[Any, Any]) -> bool:
    return frozenset(tree) in KINDS and "prompt_embeddings.weight" in contents.named(tree)


def read(files: untrusted.Files, geometry: Geometry | None) -> SoftPrompt:
    """See `Format.read`."""
    tree = contents.the_one(contents.saved(files, _is_it), files, "an encoder of PT-Fewshot")
    geometry = building.geometry_of(files, geometry, WHAT)
    kind, settings = KINDS[frozenset(tree)]
    training = Training(kind, settings, contents.renamed(contents.named(tree), NAMES))
    stack: Stack = "decoder" if geometry.encoder is None else "encoder"
    part, positions = building.infilled(building.made_vectors(training), stack, building.template_beside(files, WHAT))
    said = contents.plain(files.json(WRAPPER) if WRAPPER in files else {}, TASK)
    model = said.get("model_name_or_path")
    partial = "the language model, which was trained with it: give its folder as the base"
    origin = Origin("ptuning-fewshot", said, notes=(), partial=partial)
    base = BaseId(model if isinstance(model, str) else None, geometry)
    return SoftPrompt((part,), positions, base, training=training, origin=origin)


FORMAT = frame.ArchiveFormat(
    name="ptuning-fewshot",
    summary="THUDM/P-tuning, PT-Fewshot: embeddings.pth, with a template.json beside it",
    files=("embeddings.pth", "config.json", WRAPPER, building.TEMPLATE),
    recognise=sniff,
    reader=read,
    reads="`embeddings.pth` (LSTM or MLP), with a `template.json` that says where its vectors stand",
    proven="word embeddings with the vectors put among them by hand, on BERT and ALBERT",
)
