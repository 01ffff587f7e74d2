"""thunlp/Prompt-Transferability (Su et al. 2022): ``task_prompt``, a bare tensor [P, H] for T5, RoBERTa or BERT.

The released prompts were trained by 1.0. For T5 they stand in front of the encoder's text (`model/modeling_t5.py`,
`T5Stack.forward`), which had no end token, and pads that were attended to. RoBERTa and BERT read the class at the first
place, where the mask's embedding replaces the first vector, and the first 100 places have no position embedding, in
BERT no token type either (`modelling_roberta.py`, `modelling_bert.py`): no transformers model computes this, so that
it is read as [<mask>, the other vectors, text] with positions, and only if that is accepted.

2.0 runs the same files as another function, on RoBERTa (its BERT calls what is not there): [<mask>, all vectors, text],
with positions from 0, two places earlier than RoBERTa's own, whose table begins with the row of the padding token and
one more (`prompt_hub/models/base.py`).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from softbridge import untrusted
from softbridge.errors import BaseModelError
from softbridge.geometry import Geometry
from softbridge.prompt import Origin, Positions, SoftPrompt
from softbridge_archive.building import in_front
from softbridge_archive.contents import matrix
from softbridge_archive.frame import ArchiveFormat
from softbridge_archive.tensor import stored_in

NAME, SECOND_NAME = "prompt-transferability", "prompt-transferability:2.0"
MASK = "the caller's text begins with the mask token, where the class is read"
PLAIN = "in training, texts had no end token, and pads that were attended to"
BARE = (
    "release 1.0 gives the first 100 places no position embedding, which no transformers model does: the vectors are "
    "read as if they had them"
)
#: How far position 0 of 2.0 is before the first word of RoBERTa.
EARLIER = 2


def read(files: untrusted.Files, geometry: Geometry | None) -> SoftPrompt:
    """See `Format.read`."""
    stored, base = stored_in(files), _one_of({"t5", "roberta", "bert"}, geometry)
    if base.model_type == "t5":
        return in_front({"encoder": matrix(stored)}, base, Origin(NAME, notes=(PLAIN,)))
    origin = Origin(NAME, notes=(MASK, "the first vector, which the mask replaces, is not read"), partial=BARE)
    return in_front({"encoder": matrix(stored, first=1)}, base, origin, "after-first-token")


def read_second(files: untrusted.Files, geometry: Geometry | None) -> SoftPrompt:
    """See `Format.read`."""
    vectors, base = matrix(stored_in(files)), _one_of({"roberta"}, geometry)
    prompt = in_front({"encoder": vectors}, base, Origin(SECOND_NAME, notes=(MASK,)), "after-first-token")
    return replace(prompt, positions=Positions({"encoder": len(vectors) - EARLIER}))


def _one_of(families: Collection[str], geometry: Geometry | None) -> Geometry:
    if geometry is None or geometry.model_type not in families:
        raise BaseModelError(
            f"a prompt of Prompt-Transferability for {geometry.model_type if geometry else 'any base model'}",
            f"one of {', '.join(sorted(families))}, which that release runs",
            "give --base, or say where the vectors stand with --from tensor",
        )
    return geometry


FORMAT = ArchiveFormat(
    name=NAME,
    summary="thunlp/Prompt-Transferability 1.0: a bare tensor [P, H], in front of T5's text, or behind a mask",
    files=("task_prompt",),
    recognise=lambda files: False,
    reader=read,
    reads="`task_prompt`, if it is named; of RoBERTa and BERT, whose first 100 places have no positions, only in part",
    proven="nine released prompts for T5, in PEFT, against the vectors put in front by hand",
)
SECOND = ArchiveFormat(
    name=SECOND_NAME,
    summary="thunlp/Prompt-Transferability 2.0: a bare tensor [P, H] behind RoBERTa's mask, positions from 0",
    files=("task_prompt",),
    recognise=lambda files: False,
    reader=read_second,
    reads="`task_prompt` for RoBERTa, if it is named",
    proven="nine released prompts, on RoBERTa, against the vectors put behind the mask by hand",
)
