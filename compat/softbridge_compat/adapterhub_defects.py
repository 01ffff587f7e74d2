"""AdapterHub's defects that softbridge's code steps around, or that its users must be told of.

All were met in 1.3.0; another release is assumed to have them until the test that shows each says otherwise.
"""

from __future__ import annotations

from softbridge_compat.defects import Defect, installed


def _defect(id: str, summary: str) -> Defect:
    return Defect(id, "adapters", "adapterhub", summary, lambda: installed("adapters") is not None)


DEFECTS: tuple[Defect, ...] = (
    _defect(
        "adapterhub-sdpa-causal",
        "a prefix under SDPA attention on a decoder, no padding: the causal mask is aligned at the first key, so that "
        "token i sees the first i + 1 of prefix and tokens together",
    ),
    _defect(
        "adapterhub-sdpa-mask",
        "a prefix under SDPA attention on a decoder, with a padding mask: the prefix's part of the boolean mask is "
        "inverted, so the prefix is ignored",
    ),
    _defect(
        "adapterhub-llama-cache",
        "the key/value cache of Llama and Mistral models is never filled, so that cached decoding sees one token",
    ),
    _defect(
        "adapterhub-cache-tuples",
        "ELECTRA and BertGeneration as decoders take the key/value cache for tensors, and fail with it",
    ),
    _defect(
        "adapterhub-eject-gqa",
        "eject_prefix_tuning fails where key/value heads times head size is not the hidden size",
    ),
    _defect(
        "adapterhub-ejected-flat",
        "an ejected prefix is saved with 'flat: false', and loading it gives random weights without a warning",
    ),
    _defect(
        "adapterhub-safetensors",
        "saving a prefix with use_safetensors=True fails, because its tensors share memory",
    ),
    _defect(
        "adapterhub-t5-leave-out",
        "T5: after a layer that is left out, the relative bias of the following layers is zero",
    ),
    _defect(
        "adapterhub-sdpa-attentions",
        "BERT under SDPA attention, output_attentions=True: a prefix is ignored",
    ),
    _defect(
        "adapterhub-gate-padding",
        "the gate of a prefix is a mean over all positions of a call, pads too: a padded batch differs from its rows",
    ),
    _defect(
        "adapterhub-gate-cache",
        "the gate of a prefix is a mean over the positions of a call: cached decoding differs from uncached",
    ),
    _defect(
        "adapterhub-float32",
        "load_adapter leaves gates and vectors in float32, and in a model of another precision gates then fail",
    ),
    _defect(
        "adapterhub-prompt-load-as",
        "load_adapter(load_as=...) of another name gives prompt tuning random vectors, without a warning",
    ),
    _defect(
        "adapterhub-prompt-sdpa",
        "prompt tuning under SDPA attention: virtual tokens attend to the padding",
    ),
    _defect(
        "adapterhub-prompt-deberta",
        "prompt tuning of DeBERTa-v2, under eager attention, too: virtual tokens attend to the padding",
    ),
    _defect(
        "adapterhub-prompt-distilbert",
        "prompt tuning of DistilBERT fails under eager attention",
    ),
    _defect(
        "adapterhub-prompt-left-padding",
        "prompt tuning after the first token, padded on the left: it stands after a pad, and the mask is off by one",
    ),
    _defect(
        "adapterhub-prompt-decoder",
        "prompt tuning of a BERT that is a decoder is accepted, and fails in the first call",
    ),
    _defect(
        "adapterhub-prompt-labels",
        "prompt tuning of a transformers class with logits for each token: those of virtual tokens are among them, and "
        "labels do not fit",
    ),
    _defect(
        "adapterhub-split-lengths",
        "BatchSplit and Parallel of prefixes of different lengths: the shorter is filled up with keys that tokens see",
    ),
    _defect(
        "adapterhub-split-prompts",
        "BatchSplit and Parallel of prompt tuning: every row runs with the first prompt, and no row is repeated",
    ),
    _defect(
        "adapterhub-t5-head",
        "the head file of a T5 classifier holds the whole model",
    ),
    _defect(
        "adapterhub-t5-flex-head",
        "a flex head for questions on a T5 with tied embeddings sees hidden states scaled as for output embeddings",
    ),
    _defect(
        "adapterhub-xmod-languages",
        "adapters.init takes the language adapters out of X-MOD: without any adapter it computes something else",
    ),
    _defect(
        "adapterhub-beit-bias",
        "a prefix on a BEiT with a relative position bias fails: the bias has no columns for the prefix",
    ),
    _defect(
        "adapterhub-deberta-bias",
        "adapters.init gives every DeBERTa (v1) attention a random bias: the model computes something else each time",
    ),
)
