"""thunlp/OpenDelta (Ding et al. 2023, doi 10.1038/s42256-023-00626-4): its soft prompt and its prefix.

`save_finetuned` writes config.json, and what was trained under the base model's own names. A soft prompt stands in
front of the embedded input (`delta_models/soft_prompt.py`). A prefix is a past that each attention module is given by
itself (`delta_models/prefix.py`): real tokens stay at 0, 1, ..., but for T5's layers. There the first layer computes
its bias with the virtual tokens counted, and every prefixed layer drops the bias that it would hand on: no later one
has any. Reparameterised, one MLP at the first module makes the rows of all, in the order in which the model names its
modules. A prefix of cross-attention is none that it can run.
"""

from __future__ import annotations

import re

from softbridge import untrusted
from softbridge.errors import few
from softbridge.geometry import Geometry
from softbridge.prompt import BaseId, InputPrompt, Origin, Part, Positions, SoftPrompt
from softbridge_archive import building, contents, frame, opendelta_prefix

#: The module that a tensor of it is at, and which it is.
NAME = re.compile(
    r"(?:(.+)\.)?(soft_prompt_layer\.soft_embeds|prefix\.past_(?:key|value)|reparams\.(?:wte|control_trans\.[02])\.\w+)"
)
#: Modules of a base model that are classifiers.
HEADS = ("classifier", "score", "qa_outputs")
#: What a configuration says that is worth keeping.
FACTS = ("delta_type", "modified_modules", "backbone_class", "backbone_hash", "opendelta_version")
TIED = "one MLP makes the prefixes of both stacks: it was evaluated, and is not kept for training"


def sniff(files: untrusted.Files) -> bool:
    """See `Format.sniff`."""
    return any(NAME.fullmatch(name) for name in contents.names(files))


def read(files: untrusted.Files, geometry: Geometry | None) -> SoftPrompt:
    """See `Format.read`."""
    geometry = building.geometry_of(files, geometry, "an OpenDelta prompt")
    facts = files.json("config.json") if "config.json" in files else {}
    found = contents.weights(files)
    own = {(match[1] or "", match[2]): found[name] for name in found if (match := NAME.fullmatch(name))}
    head = {name: found[name].array() for name in found if name.split(".")[0] in HEADS}
    others = [name for name in found if not NAME.fullmatch(name) and name not in head]
    parts: tuple[Part, ...]
    if [name for _, name in own] == ["soft_prompt_layer.soft_embeds"]:
        part = InputPrompt(contents.matrix(next(iter(own.values()))), "encoder" if geometry.encoder else "decoder")
        parts, training, positions = (part,), None, Positions({part.stack: part.length})
    else:
        parts, training = prefixes, _ = opendelta_prefix.prefixes(own, facts, geometry)
        positions = opendelta_prefix.positions(prefixes, geometry)
    tied = training is not None and len(parts) > 1
    partial = f"{len(others)} tensors of the base model were trained with the prompt: {few(others)}" if others else ""
    origin = Origin("opendelta", contents.plain(facts, FACTS), notes=(TIED,) if tied else (), partial=partial)
    name = facts.get("backbone_checkpoint_name")
    base = BaseId(name if isinstance(name, str) and name else None, geometry)
    return SoftPrompt(parts, positions, base, head, None if tied else training, origin)


FORMAT = frame.ArchiveFormat(
    name="opendelta",
    summary="thunlp/OpenDelta: soft prompts and prefixes, as save_finetuned writes them",
    files=("pytorch_model.bin", "*.bin", "*.pt", "config.json"),
    recognise=sniff,
    reader=read,
    reads="soft prompts; prefixes of GPT-2, BERT, RoBERTa, BART and T5, with their MLP or without",
    proven="logits of OpenDelta 0.3.2 itself, on GPT-2, BERT, BART and T5; RoBERTa by hand",
)
