"""Cloze tasks: batches for a template, and the classes that its verbaliser reads out of a model's logits.

    >>> cloze = Cloze(template, mask=tokenizer.mask_token_id, pad=tokenizer.pad_token_id)
    >>> batch = cloze([{"text": ids, "label": 1}, ...])   # a collator for any Trainer
    >>> cloze.scores(model(**batch).logits, batch)         # [B, C]

A masked language model is asked for the word in the slot; a causal one, for the word with which it goes on from what
stands before the slot. Training minimises the model's own loss at the slot, over its whole vocabulary, with the first
label word of the right class as the answer (the paper's tasks have one word a class).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from softbridge.template import Slot, Template, Verbaliser

if TYPE_CHECKING:
    import torch

#: What transformers' losses leave out.
IGNORED = -100


@dataclass(frozen=True)
class Cloze:
    """A template with its verbaliser, on a model of one kind.

    Attributes:
        template: with a verbaliser.
        mask: the id of the mask token; None for a causal model.
        pad: the id of the padding token. Rows are padded on the right.
    """

    template: Template
    mask: int | None
    pad: int

    def __post_init__(self) -> None:
        if self.template.verbaliser is None:
            raise ValueError("cloze: a template with a verbaliser")
        if self.mask is None and not isinstance(self.template.pieces[-1], Slot):
            raise ValueError("cloze: a causal model answers at the end, and this template goes on behind the slot")

    @property
    def verbaliser(self) -> Verbaliser:
        """What answers mean."""
        assert self.template.verbaliser is not None
        return self.template.verbaliser

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """A batch: ``input_ids`` and ``attention_mask`` [B, T], ``labels`` [B, T] if all examples have one.

        Args:
            examples: field -> token ids for each field of the template, and ``label``: number or name of the class.

        Raises:
            ValueError: no examples; other fields than the template's; a label that the verbaliser does not have; or
                labels for some of the examples only.
        """
        import torch

        if not examples:
            raise ValueError("cloze: no examples")
        labelled = ["label" in example for example in examples]
        if any(labelled) and not all(labelled):
            raise ValueError("cloze: a label for every example, or for none")
        texts = [{name: ids for name, ids in example.items() if name != "label"} for example in examples]
        answers = [self._word(example["label"]) if "label" in example else None for example in examples]
        rows = [self._row(text, answer) for text, answer in zip(texts, answers, strict=True)]
        width = max(map(len, rows))
        shape = (len(rows), width)
        batch = {
            "input_ids": torch.full(shape, self.pad),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
        }
        labels = torch.full(shape, IGNORED)
        for number, (row, text, answer) in enumerate(zip(rows, texts, answers, strict=True)):
            batch["input_ids"][number, : len(row)] = torch.tensor(row)
            batch["attention_mask"][number, : len(row)] = 1
            if answer is not None:
                labels[number, self.template.slot(text)] = answer
        return {**batch, "labels": labels} if all(labelled) else batch

    def slots(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Where each row's slot stands: [B].

        Raises:
            ValueError: a row of a masked model has other than one mask token.
        """
        ids, mask = batch["input_ids"], batch["attention_mask"]
        if self.mask is None:
            return mask.sum(-1) - 1
        found = (ids == self.mask) & (mask != 0)
        if not bool((found.sum(-1) == 1).all()):
            raise ValueError("cloze: one mask token in every row")
        return found.int().argmax(-1)

    def _row(self, texts: Mapping[str, Sequence[int]], answer: int | None) -> list[int]:
        """A masked model must not see the answer; what a causal one has in the slot it does not see in time."""
        hidden = self.pad if self.mask is None else self.mask
        return self.template.fill(texts, hidden if self.mask is not None or answer is None else answer)

    def _word(self, label: int | str) -> int:
        """The label word that training asks for."""
        names = [name for name, _ in self.verbaliser.classes]
        number = names.index(label) if label in names else label
        if type(number) is not int or not 0 <= number < len(names):
            raise ValueError(f"cloze: a class of {', '.join(names)}, or its number, not {label!r:.40}")
        return self.verbaliser.classes[number][1][0]

    def scores(self, logits: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The score of each class: [B, C].

        Args:
            logits: [B, T, V], from this batch.
            batch: what the model was called with.
        """
        import torch

        rows = torch.arange(len(logits), device=logits.device)
        slots = self.slots(batch).to(logits.device) - int(self.mask is None)
        at_slot = logits[rows, slots]
        classes = [at_slot[:, list(words)].mean(-1) for _, words in self.verbaliser.classes]
        return torch.stack(classes, dim=-1)
