"""The prediction head beside an adapter: `head_config.json`, and `pytorch_model_head.bin` or `model_head.safetensors`.

AdapterHub writes the head of a transformers class as it is. Models of its own classes have "flex" heads, built from a
configuration; one that computes what the head of a transformers class computes is read as that, too.

Whatever is trained, AdapterHub freezes the output embeddings. So of the head of a language model nothing but what
stands before them is read, and of most there is nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from softbridge.arrays import Array
from softbridge.errors import CheckpointError
from softbridge.untrusted import Files
from softbridge_adapterhub import facts

#: Type of a flex head -> the settings that say what it computes, with their defaults.
FLEX_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "classification": {"layers": 2, "activation_function": "tanh", "use_pooler": False, "bias": True},
    "multiple_choice": {"layers": 2, "activation_function": "tanh", "use_pooler": False},
    "tagging": {"layers": 1, "activation_function": "tanh"},
    "question_answering": {"layers": 1, "activation_function": "tanh"},
    "masked_lm": {"layers": 2, "activation_function": "gelu", "layer_norm": True, "bias": True},
    "causal_lm": {"layers": 1, "activation_function": None, "layer_norm": False, "bias": False},
    "seq2seq_lm": {"layers": 1, "activation_function": None, "layer_norm": False, "bias": False},
}
#: Types whose last layer is the output embeddings.
LANGUAGE_MODELS = frozenset(("causal_lm", "masked_lm", "seq2seq_lm"))
#: Another loss, and the same logits.
_SAME_LOGITS = {"multilabel_classification": "classification"}


class Counterpart(NamedTuple):
    """The head of a transformers class, and the flex head that computes the same.

    Attributes:
        model_class: the transformers class.
        head_type: of the flex head.
        layers: number in the flex head -> name in the transformers class, of its layers that are trained. The last has
            a row for each label, where it has labels.
        settings: of the flex head.
    """

    model_class: str
    head_type: str
    layers: Mapping[int, str]
    settings: Mapping[str, Any]

    def tensors(self, flex: str | None = None) -> dict[str, str]:
        """Names in a file -> names in the transformers class.

        Args:
            flex: the name of the flex head, or None where the file is of the transformers class.
        """
        return {
            f"{name if flex is None else f'heads.{flex}.{number}'}.{tensor}": f"{name}.{tensor}"
            for number, name in self.layers.items()
            for tensor in (("weight", "bias") if self.settings.get("bias", True) else ("weight",))
        }

    def labels(self, head: Mapping[str, Array]) -> int | None:
        """The number of labels of such a head, where that is what its last layer has rows for."""
        if self.head_type not in ("classification", "tagging"):
            return None
        return len(head[f"{list(self.layers.values())[-1]}.weight"])


#: Family -> its name in transformers' classes.
_NAMES = {
    **{family: family.capitalize() for family in ("albert", "bart", "bert", "electra", "llama", "mistral", "roberta")},
    "deberta-v2": "DebertaV2",
    "distilbert": "DistilBert",
    "gpt2": "GPT2",
    "gptj": "GPTJ",
    "mbart": "MBart",
    "mt5": "MT5",
    "plbart": "PLBart",
    "t5": "T5",
    "xlm-roberta": "XLMRoberta",
}
#: Type -> end of the name of the class.
_CLASSES = {
    "classification": "ForSequenceClassification",
    "tagging": "ForTokenClassification",
    "question_answering": "ForQuestionAnswering",
    "multiple_choice": "ForMultipleChoice",
    "masked_lm": "ForMaskedLM",
    "causal_lm": "ForCausalLM",
    "seq2seq_lm": "ForConditionalGeneration",
}
#: Classes with a name of their own.
_IRREGULAR = {
    ("bert", "causal_lm"): "BertLMHeadModel",
    ("bert-generation", "causal_lm"): "BertGenerationDecoder",
    ("gpt2", "causal_lm"): "GPT2LMHeadModel",
    ("whisper", "seq2seq_lm"): "WhisperForConditionalGeneration",
}


def _counterpart(family: str, head_type: str, *layers: str, **settings: Any) -> Counterpart:
    """The head of a family's class; `layers` are names of all but the output embeddings."""
    name = _IRREGULAR.get((family, head_type)) or f"{_NAMES[family]}{_CLASSES[head_type]}"
    if head_type in LANGUAGE_MODELS:  # linear, activation, norm, output embeddings
        return Counterpart(name, head_type, dict(zip((0, 2), layers, strict=False)), settings)
    # dropout, linear, activation, dropout, linear
    return Counterpart(name, head_type, dict(zip((1, 4), layers, strict=False)), {"layers": len(layers), **settings})


def _table() -> dict[str, dict[str, Counterpart]]:
    """From `STATIC_TO_FLEX_HEAD_MAP` in the package's `head_utils.py`: type by type."""
    dense = ("classifier.dense", "classifier.out_proj")
    seq2seq = ("classification_head.dense", "classification_head.out_proj")
    transforms = {
        "albert": ("predictions.dense", "predictions.LayerNorm"),
        "bert": ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"),
        "deberta-v2": ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"),
        "distilbert": ("vocab_transform", "vocab_layer_norm"),
        "electra": ("generator_predictions.dense", "generator_predictions.LayerNorm"),
        **dict.fromkeys(("roberta", "xlm-roberta"), ("lm_head.dense", "lm_head.layer_norm")),
    }
    two = {
        "deberta-v2": ("pooler.dense", "classifier", "gelu"),
        "distilbert": ("pre_classifier", "classifier", "relu"),
        "electra": (*dense, "gelu"),
        **dict.fromkeys(("roberta", "xlm-roberta"), (*dense, "tanh")),
        **dict.fromkeys(("bart", "mbart", "mt5", "plbart", "t5"), (*seq2seq, "tanh")),
    }
    decoders, encoders = ("gpt2", "gptj", "llama", "mistral"), tuple(transforms)
    seq2seqs = ("bart", "mbart", "mt5", "plbart", "t5", "whisper")
    made: list[tuple[str, Counterpart]] = []

    def add(family: str, head_type: str, *layers: str, **settings: Any) -> None:
        made.append((family, _counterpart(family, head_type, *layers, **settings)))

    for family, (*layers, activation) in two.items():
        add(family, "classification", *layers, activation_function=activation, use_pooler=False, bias=True)
    for family in ("albert", "bert"):
        add(family, "classification", "classifier", use_pooler=True, bias=True)
    for family in decoders:
        add(family, "classification", "score", use_pooler=False, bias=False)
    for family in (*encoders, "gpt2", "llama", "mistral"):
        add(family, "tagging", "score" if family in ("llama", "mistral") else "classifier")
    for family in (*encoders, *decoders, "bart", "mbart", "mt5", "t5"):
        add(family, "question_answering", "qa_outputs")
    for family in ("albert", "bert", "roberta", "xlm-roberta"):
        add(family, "multiple_choice", "classifier", use_pooler=True)
    for family, (*layers, activation) in {
        **{family: two[family] for family in ("deberta-v2", "distilbert")},
        "electra": ("sequence_summary.summary", "classifier", "gelu"),
    }.items():
        add(family, "multiple_choice", *layers, activation_function=activation, use_pooler=False)
    for family, transform in transforms.items():
        said = {**FLEX_DEFAULTS["masked_lm"], "activation_function": "gelu_new" if family == "albert" else "gelu"}
        add(family, "masked_lm", *transform, **said)
        if family in ("bert", "electra", "roberta", "xlm-roberta"):
            add(family, "causal_lm", *transform, **said)
    for family in (*decoders, "bert-generation"):
        add(family, "causal_lm", layers=1)
    for family in seq2seqs:
        add(family, "seq2seq_lm", layers=1)

    table: dict[str, dict[str, Counterpart]] = {}
    for family, counterpart in made:
        table.setdefault(family, {})[counterpart.head_type] = counterpart
    return table


#: Family -> type of a flex head -> the head of a transformers class that computes the same.
HEADS: Mapping[str, Mapping[str, Counterpart]] = _table()


def counterpart_of(
    model_type: str, head: Mapping[str, Array], given: Mapping[str, Any] | None = None
) -> Counterpart | None:
    """The head that has such tensors: the one that was read, or the first in the table (of texts, before tokens).

    Args:
        given: what was read of the head, if it came from AdapterHub's files.
    """
    read = None if given is None else _counterpart_in(given, model_type)
    found = ([] if read is None else [read]) + list(HEADS.get(model_type, {}).values())
    return next((one for one in found if one.layers and head.keys() == set(one.tensors().values())), None)


class Head(NamedTuple):
    """What was read of a head.

    Attributes:
        tensors: under their names in the transformers class.
        document: what its file says of it, if it was read.
        notes: what is not read, and does not change what the model computes.
        lost: why it is not read, if it is a part of what was trained.
    """

    tensors: Mapping[str, Array] = {}
    document: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()
    lost: str | None = None


def read(files: Files, folder: str, model_type: str) -> Head:
    """Read the head in a folder, if there is one.

    Raises:
        CheckpointError: its tensors are not those of such a head.
    """
    weights = facts.weights_in(files, folder, facts.HEAD_WEIGHTS_FILE)
    if weights is None:
        return Head()
    document = files.json(folder + facts.HEAD_CONFIG_FILE) if folder + facts.HEAD_CONFIG_FILE in files else {}
    counterpart, config = _counterpart_in(document, model_type), document.get("config")
    if counterpart is None:
        what = config.get("head_type") if isinstance(config, dict) else document.get("model_class")
        known = ", ".join(one.model_class for one in HEADS.get(model_type, {}).values())
        return Head(lost=f"the prediction head in {weights}, {what!r:.80}, computes what none of {known} does")
    if not counterpart.layers:
        return Head(notes=(f"the head in {weights} is the base model's output embeddings, which AdapterHub freezes",))
    names, tensors = counterpart.tensors(document.get("name")), files.tensors(weights)
    # Output embeddings stand in the file under several names; and a T5's holds the whole model.
    more = counterpart.head_type in LANGUAGE_MODELS or model_type in facts.RELATIVE_BIAS
    if not names.keys() <= tensors.keys() or not (more or tensors.keys() <= names.keys()):
        raise CheckpointError(
            f"the head in {weights} has the tensors {', '.join(sorted(tensors))}",
            ", ".join(sorted(names)),
            "save the adapter again with AdapterHub's save_adapter",
        )
    return Head({ours: tensors[theirs] for theirs, ours in names.items()}, document)


def _counterpart_in(document: Mapping[str, Any], model_type: str) -> Counterpart | None:
    """The transformers head that computes what a file's head does, if there is one."""
    known, config, name = HEADS.get(model_type, {}), document.get("config"), document.get("name")
    if config is None and name is None:
        return next((one for one in known.values() if one.model_class == document.get("model_class")), None)
    if not isinstance(config, dict) or not isinstance(name, str):
        return None
    kind = str(config.get("head_type"))
    counterpart = known.get(_SAME_LOGITS.get(kind, kind))
    if counterpart is None or (kind == "question_answering" and model_type in facts.RELATIVE_BIAS):
        return None  # of a T5's tokens a flex head may see a fraction (see `softbridge_compat.adapterhub_defects`)
    said = {**FLEX_DEFAULTS[counterpart.head_type], **config}
    return counterpart if all(said[key] == value for key, value in counterpart.settings.items()) else None


def write(
    head: Mapping[str, Array], document: Mapping[str, Any], given: Mapping[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Array]]:
    """What is written of a head of a transformers class, and its tensors by their names in the file.

    Of a language model's flex head the output embeddings were not read, so that one is written for the transformers
    class, which has them.

    Args:
        document: what is written of the adapter.
        given: what was read of the head, if it came from AdapterHub's files.

    Raises:
        ValueError: no head of AdapterHub has these tensors.
    """
    counterpart = counterpart_of(document["model_type"], head, given)
    if counterpart is None:
        raise ValueError(f"no head of '{document['model_type']}' has the tensors {', '.join(head)}")
    labels = counterpart.labels(head)
    said = {
        **{name: document[name] for name in ("hidden_size", "model_name", "model_type", "version")},
        "config": None,
        "label2id": None if labels is None else {f"LABEL_{number}": number for number in range(labels)},
        "model_class": counterpart.model_class,
        "name": None,
        **({} if labels is None else {"num_labels": labels}),
    }
    if given is not None and _counterpart_in(given, document["model_type"]) == counterpart:
        whole = given.get("name") is None or counterpart.head_type not in LANGUAGE_MODELS
        if whole and labels in (None, {**given, **(given.get("config") or {})}.get("num_labels")):
            said = dict(given)
    return said, {theirs: head[ours] for theirs, ours in counterpart.tensors(said.get("name")).items()}
