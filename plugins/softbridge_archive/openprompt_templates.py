"""The templates of OpenPrompt that are trained, by their tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from softbridge import untrusted
from softbridge.errors import CheckpointError
from softbridge.geometry import Site
from softbridge.prompt import Json, Training
from softbridge_archive import contents

#: `SoftTemplate`, `MixedTemplate` (row 0 is no soft token's), `PtuningTemplate`.
SOFT, MIXED, PTUNING = "soft_embeds", "soft_embedding.weight", "new_embedding.weight"
#: The number of each row of `PrefixTuningTemplate`'s embeddings.
ROWS = "input_tokens"
MARKS = {SOFT, MIXED, PTUNING, "control_trans.0.weight", "decoder_control_trans.0.weight"}
#: The base model's own embedding, which all of them but the last keep besides.
RAW = "raw_embedding.weight"
#: Site -> the beginning of the names of its network.
SITES: Mapping[Site, str] = {"encoder": "", "self": "decoder_"}
#: The beginnings of the names of tensors of a parameterisation -> of ours.
NETWORK = {"wte.weight": "embedding", "control_trans.0.": "hidden.", "control_trans.2.": "output."}
MLP = {f"{SITES[site]}{name}": f"{site}.{ours}" for site in SITES for name, ours in NETWORK.items()}
INFILL = {PTUNING: "embedding", "new_lstm_head.": "lstm."}
INFILL |= {f"new_mlp_head.{place}.": f"linear.{number}." for number, place in enumerate((0, 2))}


class Stems(NamedTuple):
    """What stands before names in a checkpoint: before all, before a prompt model's, and before a template's."""

    whole: str
    model: str
    template: str

    def below(self, found: Mapping[str, untrusted.Stored], *stems: str) -> dict[str, untrusted.Stored]:
        """The tensors whose names begin so, by the rest."""
        stem = "".join((self.whole, *stems))
        return {name.removeprefix(stem): tensor for name, tensor in found.items() if name.startswith(stem)}


#: Of a runner, of a whole model, of a prompt model, of a template alone.
STEMS = [Stems(*stems) for stems in (("state_dict.", "prompt_model.", "template."), ("", "prompt_model.", "template."))]
STEMS += [Stems("", "", "template."), Stems("", "", "")]


def stems_of(names: Collection[str]) -> Stems | None:
    """Where a template's tensors are; None: there are none."""
    for stems in STEMS:
        stem = "".join(stems)
        own = {name.removeprefix(stem) for name in names if name.startswith(stem)}
        if own & MARKS and (stem or own & {RAW, ROWS}):
            return stems
    return None


def is_of_prompt(name: str) -> bool:
    """Whether a template's tensor is part of what was trained."""
    return name.startswith((SOFT, MIXED, ROWS, "new_ids", *MLP, *INFILL))


def training_of(own: Mapping[str, untrusted.Stored], dropout: Json) -> Training | None:
    """The parameterisation that a template is; None: its vectors are all there is.

    Args:
        dropout: on a prefix in training, if it is known.

    Raises:
        CheckpointError: rows of an embedding in another order than their own.
    """
    if SOFT in own or (MIXED in own and PTUNING not in own):
        return None
    names = INFILL if PTUNING in own else MLP
    tensors = contents.renamed({name: own[name] for name in own if name.startswith(tuple(names))}, names)
    if PTUNING in own:
        kind = "p-tuning-lstm" if "new_lstm_head.weight_ih_l0" in own else "p-tuning-mlp"
        return Training(kind, {"layers": 2, "non_linearity": "relu"}, tensors)
    if ROWS in own and (rows := own[ROWS].array().ravel().tolist()) != list(range(len(rows))):
        raise CheckpointError(f"{ROWS} {rows!r:.80}", "0, 1, 2, ...", "check the file")
    return Training("mlp", {"non_linearity": "tanh", "dropout": dropout or 0.0}, tensors)
