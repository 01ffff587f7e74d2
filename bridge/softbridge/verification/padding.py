"""Texts and labels that are made up, and what pads make of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from softbridge.cloze import IGNORED

#: Lengths of the texts. They differ, and the longest is beyond the sliding window of a small model.
LENGTHS = (9, 6, 4)
PADS = 3
ANSWER = 5


def _ordinary(config: Any) -> Tensor:
    text = config.get_text_config()
    special = {getattr(text, name, None) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    return torch.tensor([token for token in range(text.vocab_size) if token not in special])


def make_text(model: Any, row: int, length: int | None = None) -> dict[str, Tensor]:
    """A text [1, T], its mask, and to an encoder-decoder an answer."""
    ordinary, generator = _ordinary(model.config), torch.Generator().manual_seed(row)

    def draw(count: int) -> Tensor:
        return ordinary[torch.randint(len(ordinary), (1, count), generator=generator)]

    ids = draw(length or LENGTHS[row])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**inputs, "decoder_input_ids": draw(ANSWER)} if model.config.is_encoder_decoder else inputs


def make_labels(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """The tokens, and nothing for pads, or for the first, which an engine may have predicted by a virtual token."""
    ids = inputs["input_ids"]
    if "decoder_input_ids" in inputs:
        return inputs["decoder_input_ids"]
    if type(model).__name__.endswith("ForSequenceClassification"):
        return torch.arange(len(ids)).remainder(int(model.config.num_labels))
    found = ids.masked_fill(inputs["attention_mask"] == 0, IGNORED)
    first = inputs["attention_mask"].argmax(-1, keepdim=True)
    return found.scatter(1, first, IGNORED)


def pad_token(model: Any) -> int:
    """What a model calls its pads, or 0."""
    found = getattr(model.config.get_text_config(), "pad_token_id", None)
    return found if isinstance(found, int) else 0


def pad_text(model: Any, inputs: Mapping[str, Tensor], stack: str, side: str) -> dict[str, Tensor]:
    """A stack's tokens with pads on one side, and their mask."""
    ids = inputs[f"{stack}input_ids"]
    pads = (0, PADS) if side == "right" else (PADS, 0)
    pad = partial(torch.nn.functional.pad, pad=pads)
    return {f"{stack}input_ids": pad(ids, value=pad_token(model)), f"{stack}attention_mask": pad(torch.ones_like(ids))}


def pad_together(model: Any, texts: Sequence[Mapping[str, Tensor]], side: str) -> dict[str, Tensor]:
    """All texts in one batch, padded to the longest."""
    width = max(text["input_ids"].shape[1] for text in texts)
    batched = {}
    for name in texts[0]:
        rows = []
        for text in texts:
            pads = 0 if name.startswith("decoder") else width - text[name].shape[1]
            value = pad_token(model) if name == "input_ids" else 0
            rows.append(torch.nn.functional.pad(text[name], (0, pads) if side == "right" else (pads, 0), value=value))
        batched[name] = torch.cat(rows)
    return batched
