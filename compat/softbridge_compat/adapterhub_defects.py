"""AdapterHub's defects that softbridge's code steps around, or that its users must be told of.

All were met in 1.3.0; another release is assumed to have them until the test that shows each says otherwise.
"""

from __future__ import annotations

from softbridge_compat.defects import Defect, installed


def _installed() -> bool:
    return installed("adapters") is not None


DEFECTS: tuple[Defect, ...] = (
    Defect(
        "adapterhub-sdpa-causal",
        "adapters",
        "a prefix under SDPA attention on a decoder, no padding: the causal mask is aligned at the first key, so that "
        "token i sees the first i + 1 of prefix and tokens together",
        _installed,
    ),
    Defect(
        "adapterhub-sdpa-mask",
        "adapters",
        "a prefix under SDPA attention on a decoder, with a padding mask: the prefix's part of the boolean mask is "
        "inverted, so the prefix is ignored",
        _installed,
    ),
    Defect(
        "adapterhub-llama-cache",
        "adapters",
        "the key/value cache of Llama and Mistral models is never filled, so that cached decoding sees one token",
        _installed,
    ),
    Defect(
        "adapterhub-cache-tuples",
        "adapters",
        "ELECTRA and BertGeneration as decoders take the key/value cache for tensors, and fail with it",
        _installed,
    ),
    Defect(
        "adapterhub-eject-gqa",
        "adapters",
        "eject_prefix_tuning fails where key/value heads times head size is not the hidden size",
        _installed,
    ),
    Defect(
        "adapterhub-ejected-flat",
        "adapters",
        "an ejected prefix is saved with 'flat: false', and loading it gives random weights without a warning",
        _installed,
    ),
    Defect(
        "adapterhub-safetensors",
        "adapters",
        "saving a prefix with use_safetensors=True fails, because its tensors share memory",
        _installed,
    ),
    Defect(
        "adapterhub-t5-leave-out",
        "adapters",
        "T5: after a layer that is left out, the relative bias of the following layers is zero",
        _installed,
    ),
    Defect(
        "adapterhub-sdpa-attentions",
        "adapters",
        "BERT under SDPA attention, output_attentions=True: a prefix is ignored",
        _installed,
    ),
    Defect(
        "adapterhub-gate-padding",
        "adapters",
        "the gate of a prefix is a mean over all positions of a call, pads too: a padded batch differs from its rows",
        _installed,
    ),
    Defect(
        "adapterhub-gate-cache",
        "adapters",
        "the gate of a prefix is a mean over the positions of a call: cached decoding differs from uncached",
        _installed,
    ),
    Defect(
        "adapterhub-float32",
        "adapters",
        "load_adapter leaves gates and vectors in float32, and in a model of another precision gates then fail",
        _installed,
    ),
    Defect(
        "adapterhub-prompt-load-as",
        "adapters",
        "load_adapter(load_as=...) of another name gives prompt tuning random vectors, without a warning",
        _installed,
    ),
    Defect(
        "adapterhub-prompt-sdpa",
        "adapters",
        "prompt tuning under SDPA attention: virtual tokens attend to the padding",
        _installed,
    ),
    Defect(
        "adapterhub-prompt-deberta",
        "adapters",
        "prompt tuning of DeBERTa-v2, under eager attention, too: virtual tokens attend to the padding",
        _installed,
    ),
    Defect(
        "adapterhub-prompt-distilbert",
        "adapters",
        "prompt tuning of DistilBERT fails under eager attention",
        _installed,
    ),
    Defect(
        "adapterhub-prompt-left-padding",
        "adapters",
        "prompt tuning after the first token, padded on the left: it stands after a pad, and the mask is off by one",
        _installed,
    ),
    Defect(
        "adapterhub-prompt-decoder",
        "adapters",
        "prompt tuning of a BERT that is a decoder is accepted, and fails in the first call",
        _installed,
    ),
    Defect(
        "adapterhub-prompt-labels",
        "adapters",
        "prompt tuning of a transformers class with logits for each token: those of virtual tokens are among them, and "
        "labels do not fit",
        _installed,
    ),
    Defect(
        "adapterhub-split-lengths",
        "adapters",
        "BatchSplit and Parallel of prefixes of different lengths: the shorter is filled up with keys that tokens see",
        _installed,
    ),
    Defect(
        "adapterhub-split-prompts",
        "adapters",
        "BatchSplit and Parallel of prompt tuning: every row runs with the first prompt, and no row is repeated",
        _installed,
    ),
    Defect(
        "adapterhub-t5-head",
        "adapters",
        "the head file of a T5 classifier holds the whole model",
        _installed,
    ),
    Defect(
        "adapterhub-t5-flex-head",
        "adapters",
        "a flex head for questions on a T5 with tied embeddings sees hidden states scaled as for output embeddings",
        _installed,
    ),
    Defect(
        "adapterhub-xmod-languages",
        "adapters",
        "adapters.init takes the language adapters out of X-MOD: without any adapter it computes something else",
        _installed,
    ),
    Defect(
        "adapterhub-beit-bias",
        "adapters",
        "a prefix on a BEiT with a relative position bias fails: the bias has no columns for the prefix",
        _installed,
    ),
    Defect(
        "adapterhub-deberta-bias",
        "adapters",
        "adapters.init gives every DeBERTa (v1) attention a random bias: the model computes something else each time",
        _installed,
    ),
)
