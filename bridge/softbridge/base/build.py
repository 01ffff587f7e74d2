"""Base models built in process from a configuration: the class of a task, a smaller copy, drawn weights."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Literal

from softbridge.arrays import Array
from softbridge.errors import BaseModelError
from softbridge.geometry import read_geometry

Task = Literal[
    "causal-lm",
    "seq2seq-lm",
    "sequence-classification",
    "token-classification",
    "question-answering",
    "masked-lm",
]

#: The tasks whose models have a head that may come with a prompt, the commonest first, with transformers' list of them.
HEADED: Mapping[Task, str] = {
    "sequence-classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "token-classification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "question-answering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "masked-lm": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
}

#: What the shrunk model keeps of its vocabulary and its feed-forward width. Attention is not touched.
SMALL_VOCABULARY = 512
SMALL_FEED_FORWARD = 64


def first_line(error: Exception) -> str:
    """Transformers lists the names of all its classes below."""
    return (str(error) or repr(error)).splitlines()[0]


def label_count(head: Mapping[str, Array], hidden: int) -> int | None:
    """The number of labels of a head: its last matrix has a row for each, and those before it have the hidden size."""
    rows = [len(array) for array in head.values() if array.ndim == 2]
    return next((count for count in rows if count != hidden), rows[-1]) if rows else None


def usual_task(config: Any) -> Task:
    """The head that verification puts on a model of this configuration, where no prompt brings one."""
    geometry = read_geometry(config)
    if geometry.is_encoder_decoder:
        return "seq2seq-lm"
    return "sequence-classification" if geometry.decoder is None and has_classifier(config) else "causal-lm"


def has_classifier(config: Any) -> bool:
    """Whether transformers has a sequence classifier of this family."""
    return config.model_type in classes_of("sequence-classification")


def classes_of(task: Task) -> Mapping[str, str]:
    """Family -> the name of its class for a task that has a head."""
    from transformers.models.auto import modeling_auto

    names: Mapping[str, str] = getattr(modeling_auto, HEADED[task])
    return names


def auto_class(task: Task, config: Any) -> Any:
    """The transformers class that builds a model for a task.

    What goes on with a text, having seen images, say, is a causal model, and most of them are in a table of their own.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    kind = config.model_type
    seeing = kind in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    if task == "causal-lm" and seeing and kind not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return transformers.AutoModelForImageTextToText

    names = {
        "causal-lm": "AutoModelForCausalLM",
        "seq2seq-lm": "AutoModelForSeq2SeqLM",
        "sequence-classification": "AutoModelForSequenceClassification",
        "token-classification": "AutoModelForTokenClassification",
        "question-answering": "AutoModelForQuestionAnswering",
        "masked-lm": "AutoModelForMaskedLM",
    }
    return getattr(transformers, names[task])


def shrink(config: Any, **sizes: int) -> None:
    """Lower every named size that the configuration has and that is larger, in place."""
    for name, size in sizes.items():
        value = getattr(config, name, None)
        if isinstance(value, int) and value > size:
            setattr(config, name, size)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
        token = getattr(config, name, None)
        if isinstance(token, int) and not 0 <= token < getattr(config, "vocab_size", 0):
            setattr(config, name, 0)


def build(config: Any, task: Task, dtype: Any, seed: int) -> Any:
    """A model from a configuration alone, with weights large enough for attention to be far from uniform.

    Matrices are drawn with standard deviation 1.5 / sqrt(fan in) (0.3-0.4 at the sizes of the tests), embeddings with
    0.5; scales of norms around 1, everything else around 0. All seeded and independent of the model's own
    initialisation, in inference mode, with eager attention.
    """
    import torch

    config = copy.deepcopy(config)
    config._attn_implementation = "eager"
    if hasattr(config, "_experts_implementation"):
        config._experts_implementation = "eager"  # grouped matrix products know no float64
    try:
        with torch.random.fork_rng(devices=[]):  # the model's own initialisation, which is thrown away
            model = auto_class(task, config).from_config(config, trust_remote_code=False)
    except Exception as error:  # models of transformers raise what they like
        raise BaseModelError(
            f"transformers builds no model for {task} from this {config.model_type} configuration: {first_line(error)}",
            "a configuration of a text model that can be built",
            "check the base model's config.json",
        ) from error
    draw_weights(model, seed)
    return model.to(dtype).eval()


def fresh(model: Any) -> Any:
    """A copy of a model that shares nothing with it, as `copy.deepcopy` makes it, in less than half the time.

    Most of what a module holds are tables of hooks, and most of these are empty: they are copied beforehand, without
    the detour through `__reduce_ex__`.
    """
    empty: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if type(value) in (dict, OrderedDict, set) and not value:
                empty[id(value)] = type(value)()
    return copy.deepcopy(model, empty)


def draw_weights(model: Any, seed: int) -> None:
    """Draw every parameter anew, in place; see `build`."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            if parameter.ndim >= 2:
                embedding = isinstance(model.get_submodule(name.rpartition(".")[0]), torch.nn.Embedding)
                noise *= 0.5 if embedding else 1.5 / parameter.shape[-1] ** 0.5
            else:
                noise = noise * 0.1 + (1.0 if name.endswith("weight") else 0.0)
            parameter.copy_(noise)
