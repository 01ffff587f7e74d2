"""THUDM/P-tuning-v2 (Liu et al. 2022; transformers 4.11): a checkpoint of a whole model around BERT, RoBERTa, DeBERTa.

The prefix stands in the cache (`model/sequence_classification.py`, `get_prompt`), so real tokens stand at P, P + 1, ...
and the first real one is pooled. DeBERTa's attention has it in front of the keys, without a relative bias
(`model/deberta.py`, `DisentangledSelfAttention.forward`). The backbone is frozen, its pooler, too; beside the prefix a
head of one Linear is trained. RoBERTa's for whole texts stands on that pooler: the two are what transformers has there,
by other names. DeBERTa's pooler is no part of its backbone.

The variant ``--prompt`` has an Embedding [P, H], and embeds real tokens whole (words, positions, types, LayerNorm)
before they enter the embedding block once more: no base model does this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from softbridge import untrusted
from softbridge.errors import Obstacle
from softbridge.geometry import Geometry
from softbridge.prompt import InputPrompt, Part, Positions, SoftPrompt, Training
from softbridge_archive import prefix_encoder
from softbridge_archive.building import geometry_of
from softbridge_archive.contents import below, holds, weights
from softbridge_archive.frame import ArchiveFormat

STEM = "prefix_encoder"
#: The head's tensors in a checkpoint -> in the transformers class of the task; the second where RoBERTa pools.
HEAD, POOLED = (
    {f"{theirs}.{end}": f"{ours}.{end}" for theirs, ours in modules.items() for end in ("weight", "bias")}
    for modules in (
        {"pooler.dense": "pooler.dense", "classifier": "classifier", "qa_outputs": "qa_outputs"},
        {"roberta.pooler.dense": "classifier.dense", "classifier": "classifier.out_proj"},
    )
)
#: Why the same vectors, or keys and values, are another function in the toolkit's model than in the base model.
TWICE = "P-tuning v2's variant --prompt embeds real tokens twice, each time with positions, types and LayerNorm"
UNBIASED = "in P-tuning v2's DeBERTa virtual tokens have no relative bias, which a prompt cannot say"
OWN_ATTENTION = {"deberta": UNBIASED, "deberta-v2": UNBIASED}


def sniff(files: untrusted.Files) -> bool:
    """Whether there is a prefix encoder at the top of a checkpoint."""
    return holds(files, f"{STEM}.{prefix_encoder.EMBEDDING}") or holds(files, f"{STEM}.weight")


def read(files: untrusted.Files, geometry: Geometry | None) -> SoftPrompt:
    """See `Format.read`."""
    found, facts = weights(files), prefix_encoder.config(files)
    geometry = geometry_of(files, geometry, "a prompt of P-tuning v2")
    encoder = below(found, STEM)
    part: Part
    training: Training | None = None
    if encoder.keys() == {"weight"}:
        part, partial = InputPrompt(prefix_encoder.vectors(encoder["weight"], facts), "encoder"), TWICE
    else:
        dropout, partial = facts.get("hidden_dropout_prob", 0.1), OWN_ATTENTION.get(geometry.model_type, "")
        part, training = prefix_encoder.read(encoder, facts, geometry, "encoder", dropout)
    names = POOLED if POOLED.keys() <= found.keys() else HEAD
    head = {ours: found[theirs].array() for theirs, ours in names.items() if theirs in found}
    others = len(found) - len(encoder) - len(head)
    base, origin = prefix_encoder.source("ptuning-v2", facts, geometry, others, partial)
    return SoftPrompt((part,), Positions({"encoder": part.length}), base, head, training, origin)


def obstacles(prompt: SoftPrompt, geometry: Geometry | None) -> Sequence[Obstacle]:
    """See `Format.obstacles`."""
    foreign = ", ".join(sorted(prompt.head.keys() - {*HEAD.values(), *POOLED.values()}))
    reason = f"P-tuning v2 has heads of one linear layer, and this prompt's has {foreign}"
    return [Obstacle("head", reason, "leave the head out: replace(prompt, head={})")] if foreign else ()


def write(prompt: SoftPrompt, geometry: Geometry | None) -> Mapping[str, bytes]:
    """See `Format.write`."""
    base, stack = prefix_encoder.sizes(prompt, geometry)
    names = POOLED if "classifier.out_proj.weight" in prompt.head else HEAD
    head = {theirs: prompt.head[ours] for theirs, ours in names.items() if ours in prompt.head}
    facts = {"model_type": base.model_type, "hidden_size": base.hidden, "vocab_size": base.vocabulary}
    facts |= {"num_hidden_layers": stack.layers, "num_attention_heads": stack.heads, "prefix_hidden_size": 512}
    facts |= {"num_labels": len(head["classifier.bias"])} if "classifier.bias" in head else {}
    return prefix_encoder.write(STEM, prompt, facts, head)


FORMAT = ArchiveFormat(
    name="ptuning-v2",
    summary="THUDM/P-tuning-v2: a prefix in a whole checkpoint of BERT, RoBERTa or DeBERTa",
    files=("*.bin", "*.safetensors", "*.json"),
    recognise=sniff,
    reader=read,
    reads="prefix, projected or not, with its head; vectors of `--prompt`, and DeBERTa's prefix: shown, run nowhere",
    writes="prefix, not projected, with the head",
    proven="BERT and RoBERTa with the toolkit's own heads, written out by hand, in every engine; in PEFT and back",
    encodings=("bin",),
    capabilities=prefix_encoder.capabilities("encoder", "counted", {"bert", "roberta"}, head=True),
    writer=write,
    obstacles_of=obstacles,
    advise=lambda prompt, geometry, first: (
        "the base model's weights are not here: make P-tuning v2's model of the task with from_pretrained(base, "
        "config=AutoConfig.from_pretrained(folder)); then load_state_dict(torch.load('pytorch_model.bin'), "
        "strict=False)",
    ),
)
