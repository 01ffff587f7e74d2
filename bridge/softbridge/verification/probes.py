"""The inputs on which two ways to run a prompt are compared: seeded, the same for both sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from softbridge.arrays import Array
from softbridge.base.build import Task
from softbridge.geometry import Geometry, text_part
from softbridge.template import PLACEHOLDER, Template

#: Lengths of the texts. They differ, so that a batch of them needs padding.
LENGTHS = (11, 7, 4)
DECODER_LENGTH = 5
GREEDY_TOKENS = 5
#: The name of the probe that generates.
GREEDY = "greedy"
#: A probe that is judged against the same side's ``right-padded``: its rows, run in the opposite order.
REVERSED = "reversed"


@dataclass(frozen=True)
class Probe:
    """One call of the model.

    Attributes:
        name: ``alone-0`` ..., ``batch``, ``right-padded``, ``left-padded``, ``greedy`` or ``reversed``.
        inputs: argument name -> integer array [B, T].
        real: [B, T] booleans: which of the outputs' positions belong to real tokens.
        greedy: whether tokens are generated rather than logits computed.
        pooled: whether the model gives one row of logits for a text, not one for each token.
        causal: whether the logits at a token are for the next one.
        spans: whether the model looks for the start and the end of a span.
        classes: how many classes a token has, where that is not the vocabulary.
        cached: whether generating may use the model's cache.
        stepwise: whether tokens are picked through the model's forward, where its `generate` is known to be wrong.
        backwards: whether the rows are run from the last to the first. What comes out is in their own order.
    """

    name: str
    inputs: Mapping[str, Array]
    real: Array
    greedy: bool = False
    pooled: bool = False
    causal: bool = False
    spans: bool = False
    classes: int | None = None
    cached: bool = True
    stepwise: bool = False
    backwards: bool = False


def make_probes(
    geometry: Geometry,
    config: Any,
    seed: int,
    task: Task,
    template: Template | None = None,
    *,
    placeholders: bool = True,
    texts: Sequence[Sequence[int]] | None = None,
    cached: bool = True,
) -> tuple[Probe, ...]:
    """Every text alone; all together, cut to one length, padded right and (decoders) left; greedy decoding of one.

    Args:
        geometry: of the base model.
        config: of the model that is run (its vocabulary may be shrunk); padding uses its `pad_token_id`.
        seed: of the texts.
        task: of the model that is run; a classifier does not generate.
        template: that of the prompt, if it has one: each field gets a text.
        placeholders: whether its virtual tokens stand in the rows. Without them the same real tokens are left, in the
            same order, for a prompt without a template and for none at all.
        cached: whether generating may use the model's cache.
        texts: token ids to run instead of random ones; of other lengths, so that a batch needs padding.
    """
    generator, config = np.random.default_rng(seed), text_part(config)
    special = {getattr(config, name, None) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    ordinary = np.array([token for token in range(config.vocab_size) if token not in special])
    given = texts or [generator.choice(ordinary, length).tolist() for length in LENGTHS]
    rows = [_row(template, placeholders, text, config.vocab_size) for text in given]
    shortest = min(map(len, given))
    even = [_row(template, placeholders, text[:shortest], config.vocab_size) for text in given]
    pooled, causal, spans = task == "sequence-classification", task == "causal-lm", task == "question-answering"
    classes = config.num_labels if task == "token-classification" else None
    answers = generator.choice(ordinary, (len(rows), DECODER_LENGTH)) if geometry.is_encoder_decoder else None
    pad = config.pad_token_id if isinstance(getattr(config, "pad_token_id", None), int) else 0

    def probe(name: str, chosen: list[int], side: str = "right", rows: list[Array] = rows) -> Probe:
        width = max(len(rows[row]) for row in chosen)
        ids = np.full((len(chosen), width), pad)
        mask = np.zeros((len(chosen), width), dtype=np.int64)
        for i, row in enumerate(chosen):
            where = slice(width - len(rows[row]), width) if side == "left" else slice(0, len(rows[row]))
            ids[i, where] = rows[row]
            mask[i, where] = 1
        inputs: dict[str, Array] = {"input_ids": ids, "attention_mask": mask}
        if answers is None:
            real = mask.astype(bool) & (ids != PLACEHOLDER)
            return Probe(name, inputs, real, pooled=pooled, causal=causal, spans=spans, classes=classes)
        inputs["decoder_input_ids"] = answers[chosen]
        return Probe(name, inputs, np.ones((len(chosen), DECODER_LENGTH), dtype=bool))

    everyone = list(range(len(rows)))
    probes = [probe(f"alone-{row}", [row]) for row in everyone]
    probes += [probe("batch", everyone, rows=even), probe("right-padded", everyone)]
    generates = geometry.decoder is not None and task in ("causal-lm", "seq2seq-lm")
    if generates and answers is None:
        probes.append(probe("left-padded", everyone, "left"))
    if generates:
        first = probes[0]
        inputs = {name: array for name, array in first.inputs.items() if name != "decoder_input_ids"}
        probes.append(Probe(GREEDY, inputs, first.real, greedy=True, cached=cached))
    return tuple(probes)


def reverse(probes: Sequence[Probe]) -> Probe:
    """The padded batch in another order, which shows what a working precision does by itself."""
    batch = next(probe for probe in probes if probe.name == "right-padded")
    return replace(batch, name=REVERSED, backwards=True)


def _row(template: Template | None, placeholders: bool, text: Sequence[int], vocabulary: int) -> Array:
    """The row of a text, which stands in every field; what a shrunk vocabulary lacks is another word in it."""
    row = list(text) if template is None else template.fill(dict.fromkeys(template.fields, text), text[0])
    ids = np.array([token if token == PLACEHOLDER else token % vocabulary for token in row])
    return ids if placeholders else ids[ids != PLACEHOLDER]
