"""The classifier beside an adapter: `head_config.json` and `pytorch_model_head.bin`, or `model_head.safetensors`.

AdapterHub writes the head of a transformers class as it is. Models of its own classes have "flex" heads, built from a
configuration; one that computes what a transformers classifier computes is read as that, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from softbridge.errors import CheckpointError
from softbridge.prompt import Array
from softbridge.untrusted import Files
from softbridge_adapterhub import facts

#: Settings of a flex head that say what it computes, with their defaults.
FLEX_DEFAULTS: Mapping[str, Any] = {"layers": 2, "activation_function": "tanh", "use_pooler": False, "bias": True}


class Classifier(NamedTuple):
    """The classifier of a family.

    Attributes:
        model_class: the transformers class whose head it is.
        layers: number in a flex head -> name in the transformers class, of its linear layers. The last has a row for
            each label.
        settings: of the flex head that computes the same.
    """

    model_class: str
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
            for tensor in (("weight", "bias") if self.settings["bias"] else ("weight",))
        }

    def labels(self, head: Mapping[str, Array]) -> int:
        """The number of labels of such a head."""
        return len(head[f"{list(self.layers.values())[-1]}.weight"])


def _classifier(model_class: str, *layers: str, activation: str | None = None, **settings: bool) -> Classifier:
    # A flex head: dropout, linear, activation, dropout, linear.
    numbered = dict(zip((1, 4), layers, strict=False))
    said = {**FLEX_DEFAULTS, "layers": len(layers), "activation_function": activation, **settings}
    return Classifier(model_class, numbered, said)


_TWO = ("classifier.dense", "classifier.out_proj")

#: Family -> its classifier, from `STATIC_TO_FLEX_HEAD_MAP` in the package's `head_utils.py`. Encoder-decoders are left
#: out: they classify at the end token, which every text must then have exactly once.
CLASSIFIERS: Mapping[str, Classifier] = {
    "albert": _classifier("AlbertForSequenceClassification", "classifier", use_pooler=True),
    "bert": _classifier("BertForSequenceClassification", "classifier", use_pooler=True),
    "deberta-v2": _classifier("DebertaV2ForSequenceClassification", "pooler.dense", "classifier", activation="gelu"),
    "distilbert": _classifier("DistilBertForSequenceClassification", "pre_classifier", "classifier", activation="relu"),
    "electra": _classifier("ElectraForSequenceClassification", *_TWO, activation="gelu"),
    "gpt2": _classifier("GPT2ForSequenceClassification", "score", bias=False),
    "gptj": _classifier("GPTJForSequenceClassification", "score", bias=False),
    "llama": _classifier("LlamaForSequenceClassification", "score", bias=False),
    "mistral": _classifier("MistralForSequenceClassification", "score", bias=False),
    "roberta": _classifier("RobertaForSequenceClassification", *_TWO, activation="tanh"),
    "xlm-roberta": _classifier("XLMRobertaForSequenceClassification", *_TWO, activation="tanh"),
}


class Head(NamedTuple):
    """What was read of a head.

    Attributes:
        tensors: under their names in the transformers class; empty if it is none of a transformers classifier.
        document: what its file says of it, if it was read.
        notes: why it was not.
    """

    tensors: Mapping[str, Array] = {}
    document: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()


def read(files: Files, folder: str, model_type: str) -> Head:
    """Read the head in a folder, if there is one.

    Raises:
        CheckpointError: its tensors are not those of such a head.
    """
    weights = facts.weights_in(files, folder, facts.HEAD_WEIGHTS_FILE)
    if weights is None:
        return Head()
    document = files.json(folder + facts.HEAD_CONFIG_FILE) if folder + facts.HEAD_CONFIG_FILE in files else {}
    names = _names(document, model_type)
    if names is None:
        config = document.get("config")
        what = config.get("head_type") if isinstance(config, dict) else document.get("model_class")
        read = f"of a {CLASSIFIERS[model_type].model_class}" if model_type in CLASSIFIERS else f"of '{model_type}' none"
        return Head(notes=(f"the prediction head in {weights}, {what!r:.80}, is not read: {read} is",))
    tensors = files.tensors(weights)
    if tensors.keys() != names.keys():
        raise CheckpointError(
            f"the head in {weights} has the tensors {', '.join(sorted(tensors))}",
            ", ".join(sorted(names)),
            "save the adapter again with AdapterHub's save_adapter",
        )
    return Head({ours: tensors[theirs] for theirs, ours in names.items()}, document)


def _names(document: Mapping[str, Any], model_type: str) -> dict[str, str] | None:
    """Names in the file -> names in the transformers class, or None if it is no head of a transformers classifier."""
    classifier, config, name = CLASSIFIERS.get(model_type), document.get("config"), document.get("name")
    if classifier is None:
        return None
    if config is None and name is None and document.get("model_class") == classifier.model_class:
        return classifier.tensors()
    if not isinstance(config, dict) or not isinstance(name, str) or config.get("head_type") != "classification":
        return None
    said = {**FLEX_DEFAULTS, **config}
    return classifier.tensors(name) if all(said[key] == value for key, value in classifier.settings.items()) else None


def write(
    head: Mapping[str, Array], document: Mapping[str, Any], given: Mapping[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Array]]:
    """What is written of a transformers classifier's head, and its tensors by their names in the file.

    Args:
        document: what is written of the adapter.
        given: what was read of the head, if it came from AdapterHub's files.
    """
    classifier = CLASSIFIERS[document["model_type"]]
    labels = classifier.labels(head)
    said = {
        **{name: document[name] for name in ("hidden_size", "model_name", "model_type", "version")},
        "config": None,
        "label2id": {f"LABEL_{number}": number for number in range(labels)},
        "model_class": classifier.model_class,
        "name": None,
        "num_labels": labels,
    }
    if given is not None and {**given, **(given.get("config") or {})}.get("num_labels") == labels:
        said = dict(given)
    return said, {theirs: head[ours] for theirs, ours in classifier.tensors(said.get("name")).items()}
