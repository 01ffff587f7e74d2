"""thunlp/Prompt-Transferability (Su et al. 2022): ``task_prompt``, a bare tensor [P, H] for RoBERTa or BERT.

A row is [<mask>, prompt, text], and the class is read at the mask (`base.py`): so the caller's text begins with the
mask token. Release 1.0 has RoBERTa's own positions; 2.0 numbers them from 0, where RoBERTa's table begins with the row
of the padding token and one more, so that every token stands two places earlier. The same file is another function in
each, and which release trained it no file says. How the T5 classes of the repository place a prompt was not looked up:
for T5 it has to be said (``--from tensor``).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from softbridge import untrusted
from softbridge.errors import BaseModelError
from softbridge.geometry import Geometry
from softbridge.prompt import Origin, Positions, SoftPrompt
from softbridge_archive.frame import ArchiveFormat, in_front, matrix_of
from softbridge_archive.tensor import stored_in

#: By how many places 2.0 has the tokens of a family earlier than the family's own numbering (transformers'
#: create_position_ids_from_input_ids: RoBERTa's begins behind its padding token, which is 1).
EARLIER = {"roberta": 2, "bert": 0}


def read(files: untrusted.Files, geometry: Geometry | None, name: str, *, renumbered: bool) -> SoftPrompt:
    """See `Format.read`."""
    stored = stored_in(files)
    if geometry is None or geometry.model_type not in EARLIER:
        raise BaseModelError(
            f"a prompt [<mask>, {stored.shape[0]} vectors, text] for {geometry.model_type if geometry else 'any base'}",
            f"one of {', '.join(EARLIER)}",
            "give --base; for T5 say where it stands with --from tensor",
        )
    note = "the caller's text begins with the mask token, where the class is read"
    prompt = in_front({"encoder": matrix_of(stored)}, geometry, Origin(name, notes=(note,)), "after-first-token")
    start = prompt.inputs[0].length - EARLIER[geometry.model_type] * renumbered
    return replace(prompt, positions=Positions({"encoder": start}))


def _release(name: str, positions: str, *, renumbered: bool) -> ArchiveFormat:
    return ArchiveFormat(
        name=name,
        summary=f"thunlp/Prompt-Transferability: a bare tensor [P, H] behind the mask token, {positions}",
        files=("task_prompt",),
        recognise=lambda files: False,
        reader=partial(read, name=name, renumbered=renumbered),
        reads=f"`task_prompt` for RoBERTa or BERT, if it is named; {positions}",
        proven="nine released prompts, on RoBERTa, against the vectors put there by hand",
    )


FORMAT = _release("prompt-transferability", "positions as the model has them (1.0)", renumbered=False)
SECOND = _release("prompt-transferability:2.0", "positions from 0 (2.0)", renumbered=True)
