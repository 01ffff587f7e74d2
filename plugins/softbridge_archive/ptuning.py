"""THUDM/P-tuning, LAMA (Liu et al. 2021, arXiv 2103.10385): vectors among the words of a template.

``torch.save`` of the encoder's state under ``embedding``, of scores, and of the program's arguments, an object of which
only the data are read (`LAMA/cli.py`). The encoder (`LAMA/p_tuning/prompt_encoder.py`) is an LSTM of two layers, H/2 in
each direction, and two linear layers. The arguments hold the template (a, b, c), numbers of virtual tokens v: BERT and
RoBERTa read ``[CLS] v·a [MASK] v·b head v·c [SEP]``, with a full stop where c is 0; GPT reads ``v·a head v·b`` and goes
on with the answer. ``head`` is a text, tokenised behind a space; the vectors stand in the place of word embeddings, and
are counted like words.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from softbridge import untrusted
from softbridge.errors import CheckpointError
from softbridge.geometry import Geometry
from softbridge.prompt import BaseId, Json, Origin, SoftPrompt, Training
from softbridge.template import Field, Slot, Template, Virtual, Words
from softbridge_archive import building, contents, frame

#: Masked language model that LAMA offers -> its tokens: the first, the last, a full stop.
TOKENS = {
    **dict.fromkeys(("bert-base-cased", "bert-large-cased"), (101, 102, 119)),
    **dict.fromkeys(("roberta-base", "roberta-large"), (0, 2, 4)),
}
#: The beginnings of their names of tensors -> of ours.
NAMES = {"embedding.weight": "embedding", "lstm_head.": "lstm.", "mlp_head.0.": "linear.0.", "mlp_head.2.": "linear.1."}
#: What the arguments and the checkpoint say that is worth keeping.
ARGUMENTS = ("model_name", "relation_id", "vocab_strategy", "template", "seed", "lr", "lstm_dropout")
SCORES = ("dev_hit@1", "test_hit@1", "test_size", "ckpt_name")
HALF = "LAMA runs the language model, and with it these vectors, in half precision"


def sniff(files: untrusted.Files) -> bool:
    """Whether a file holds such an encoder beside the arguments of the program."""
    return bool(contents.saved(files, _is_it))


def _is_it(tree: Mapping[Any, Any]) -> bool:
    encoder = contents.named(tree.get("embedding"))
    return "args" in tree and {"embedding.weight", "lstm_head.weight_ih_l0"} <= encoder.keys()


def read(files: untrusted.Files, geometry: Geometry | None) -> SoftPrompt:
    """See `Format.read`."""
    tree = contents.the_one(contents.saved(files, _is_it), files, "a checkpoint of LAMA")
    facts = getattr(tree["args"], "state", None)
    facts = facts if isinstance(facts, dict) else {}
    said = contents.plain(facts, ARGUMENTS)
    if facts.get("use_original_template"):
        raise _refused("a template of words alone (use_original_template)", "virtual tokens")
    model = said.get("model_name")
    if not isinstance(model, str):
        raise _refused(f"arguments that do not name the model: {said!r:.200}", "those of LAMA/cli.py")
    causal = "gpt" in model or "megatron" in model
    dropout = said.get("lstm_dropout") or 0.0
    settings = {"layers": 2, "dropout": dropout, "non_linearity": "relu"}
    training = Training("p-tuning-lstm", settings, contents.renamed(contents.named(tree["embedding"]), NAMES))
    vectors = building.made_vectors(training)
    template = _template(said.get("template"), model, causal, files)
    part, positions = building.infilled(vectors, "decoder" if causal else "encoder", template)
    tuned = bool(facts.get("use_lm_finetune"))  # then it is not halved
    partial = "the language model was trained, too (use_lm_finetune), and is not in the file" if tuned else ""
    details = {**said, **contents.plain(tree, SCORES)}
    origin = Origin("ptuning", details, notes=() if tuned else (HALF,), partial=partial)
    return SoftPrompt((part,), positions, BaseId(model, geometry), training=training, origin=origin)


def _template(counts: Json, model: str, causal: bool, files: untrusted.Files) -> Template:
    told = isinstance(counts, list) and len(counts) == 3 and all(type(count) is int and count >= 0 for count in counts)
    if not isinstance(counts, list) or not told or not any(counts[: 2 if causal else 3]):
        raise _refused(f"arguments with the template {counts!r:.80}", "three numbers of virtual tokens")
    before, between, behind = ((Virtual(count),) if count else () for count in counts)
    if causal:
        return Template((*before, Field("head"), *between, Slot()))
    tokens = TOKENS.get(model.rstrip("/").rpartition("/")[2])
    if tokens is None:
        return building.template_beside(files, f"a prompt for {model!r:.80}, whose tokens are not known here")
    first, last, stop = tokens
    end = (*behind, Words((last,))) if behind else (Words((stop, last)),)
    return Template((Words((first,)), *before, Slot(), *between, Field("head"), *end))


def _refused(found: str, expected: str) -> CheckpointError:
    return CheckpointError(found, expected, "give the path of a checkpoint that LAMA/cli.py wrote")


FORMAT = frame.ArchiveFormat(
    name="ptuning",
    summary="THUDM/P-tuning, LAMA: vectors in a template, with the LSTM that trained them",
    files=("*.ckpt",),
    recognise=sniff,
    reader=read,
    reads="LAMA's `.ckpt`: vectors, template and encoder",
    proven="word embeddings with the vectors put among them by hand, on BERT, RoBERTa and GPT-2",
)
