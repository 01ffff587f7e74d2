"""Defects of PEFT that our code steps around or that verification meets.

Measured on every stack of compat/matrix.toml; tests/compat/test_peft_defects.py shows each one where it applies.
"""

from __future__ import annotations

from collections.abc import Callable

from packaging.version import Version

from softbridge.geometry import Geometry
from softbridge.prompt.soft_prompt import SoftPrompt
from softbridge_compat.defects import Defect, every_prompt, installed


def _peft() -> bool:
    return installed("peft") is not None


def _transformers_4() -> bool:
    found = installed("transformers")
    return _peft() and found is not None and found < Version("5")


def _deprecated() -> bool:
    found = installed("transformers")
    return _peft() and found is not None and found.release >= (5, 23)


def _renamed_cache() -> bool:
    """transformers 5.24 calls `cache` what it called `past_key_values`, and PEFT before 0.22 looks for the old name."""
    toolkit, found = installed("peft"), installed("transformers")
    return toolkit is not None and found is not None and toolkit.release < (0, 22) and found.release >= (5, 24)


def _loses_the_cache() -> bool:
    found = installed("transformers")
    return _renamed_cache() or (_peft() and found is not None and found.release < (5, 4))


def _input(prompt: SoftPrompt, geometry: Geometry | None) -> bool:
    return bool(prompt.inputs)


def _prefix(prompt: SoftPrompt, geometry: Geometry | None) -> bool:
    return bool(prompt.prefixes)


def _both_stacks(prompt: SoftPrompt, geometry: Geometry | None) -> bool:
    return geometry is None or geometry.is_encoder_decoder


def _hybrid_prefix(prompt: SoftPrompt, geometry: Geometry | None) -> bool:
    shapes = [None if geometry is None else geometry.site(part.site) for part in prompt.prefixes]
    return any(shape is not None and shape.stateful for shape in shapes)


def _seq2seq_prefix(prompt: SoftPrompt, geometry: Geometry | None) -> bool:
    return any(part.site == "self" for part in prompt.prefixes) and _both_stacks(prompt, geometry)


def _classifier(prompt: SoftPrompt, geometry: Geometry | None) -> bool:
    return bool(prompt.head) or geometry is None or geometry.decoder is None


def _classifier_prefix(prompt: SoftPrompt, geometry: Geometry | None) -> bool:
    return _prefix(prompt, geometry) and _classifier(prompt, geometry)


def _encoder_prefix(prompt: SoftPrompt, geometry: Geometry | None) -> bool:
    return _prefix(prompt, geometry) and (geometry is None or geometry.decoder is None)


def _generates(prompt: SoftPrompt, geometry: Geometry | None) -> bool:
    return _input(prompt, geometry) and (geometry is None or geometry.decoder is not None)


def _in_decoder(prompt: SoftPrompt, geometry: Geometry | None) -> bool:
    return "decoder" in prompt.counted()


def _trained_by(*kinds: str) -> Callable[[SoftPrompt, Geometry | None], bool]:
    return lambda prompt, geometry: prompt.training is not None and prompt.training.kind in kinds


_multitask = _trained_by("multitask")
_thrown_away = _trained_by("p-tuning-mlp", "p-tuning-lstm", "mlp", "context-aware")


def _multitask_seq2seq(prompt: SoftPrompt, geometry: Geometry | None) -> bool:
    return _multitask(prompt, geometry) and _both_stacks(prompt, geometry)


def _multitask_encoder(prompt: SoftPrompt, geometry: Geometry | None) -> bool:
    return _multitask(prompt, geometry) and (geometry is None or geometry.decoder is None)


def _dropout(prompt: SoftPrompt, geometry: Geometry | None) -> bool:
    return _trained_by("p-tuning-lstm")(prompt, geometry) and bool(
        prompt.training is not None and prompt.training.settings.get("dropout")
    )


def _defect(
    id: str,
    summary: str,
    applies: Callable[[], bool],
    concerns: Callable[[SoftPrompt, Geometry | None], bool] = every_prompt,
) -> Defect:
    return Defect(id, "peft", "peft", summary, applies, concerns)


LEFT_PADDED_PROMPT = _defect(
    "peft-left-padded-prompt",
    "prompt tuning puts the virtual tokens before the pads of a left-padded row, and counts the pads as positions: "
    "such a row generates other tokens than without its pads",
    _peft,
    _input,
)
LEFT_PADDED_PREFIX_FORWARD = _defect(
    "peft-left-padded-prefix-forward",
    "the forward of a prefix counts the pads of a left-padded row as positions, unlike generate",
    _peft,
    _prefix,
)
ONE_SUBMODULE = _defect(
    "peft-one-submodule",
    "an encoder-decoder prefix with num_transformer_submodules=1 is put into a cache without a cross-attention half: "
    "transformers 4.57 fails, and in 5.23 cross-attention, without a word, sees the prefix and the decoder's tokens",
    _peft,
    _seq2seq_prefix,
)
CACHED_T5_PREFIX = _defect(
    "peft-t5-cached-prefix",
    "on transformers before 5.4, and from 5.24 on, cached generation of T5 and BART with a prefix differs from the "
    "uncached forward",
    _loses_the_cache,
    _seq2seq_prefix,
)
UNPOOLED_PREFIX = _defect(
    "peft-unpooled-prefix",
    "on transformers 4, a prefix on a sequence classifier without a pooler (RoBERTa, ELECTRA) fails: PEFT hands the "
    "classifier the cache instead of the hidden states",
    _transformers_4,
    _encoder_prefix,
)
HYBRID_PREFIX = _defect(
    "peft-hybrid-prefix",
    "a prefix on a hybrid model, some of whose layers keep a state of the text, is put into a cache of keys and values "
    "of every layer: with it the model fails, or (RecurrentGemma) runs on what it kept of an earlier text, or without "
    "the prefix",
    _peft,
    _hybrid_prefix,
)
ADAPTER_NAMES = _defect(
    "peft-adapter-names",
    "adapter_names, one soft prompt for each row of a batch, is ignored without a word",
    _peft,
)
MISSING_HEAD = _defect(
    "peft-missing-head",
    "a classification checkpoint without a classifier, as PEFT 0.15 and 0.16 wrote them, ends in a KeyError",
    _peft,
    _classifier,
)
GROWING_CONFIG = _defect(
    "peft-growing-config",
    "every load and save of a classification checkpoint doubles entries of modules_to_save",
    _peft,
    _classifier,
)
UNASKED_WARNING = _defect(
    "peft-position-warning",
    "generate with prompt tuning warns that position ids are ignored, although the caller gave none",
    _peft,
    _generates,
)
DEPRECATED = _defect(
    "peft-deprecated",
    "wrapping a model asks for is_gradient_checkpointing, of which transformers 5.23 warns that it is deprecated",
    _deprecated,
)
MULTITASK_DECODER = _defect(
    "peft-multitask-decoder",
    "multitask prompt tuning of an encoder-decoder model drops decoder_input_ids: its forward runs with labels only",
    _peft,
    _multitask_seq2seq,
)
MULTITASK_HALF = _defect(
    "peft-multitask-half",
    "multitask prompt tuning of an encoder-decoder model with two submodules, the default, trains vectors in the "
    "decoder's input, too, and generate leaves them out",
    _peft,
    _multitask_seq2seq,
)
MULTITASK_TASK = _defect(
    "peft-multitask-task",
    "models for question answering and feature extraction take task_ids and do not hand them to a multitask prompt, "
    "which fails",
    _peft,
    _multitask_encoder,
)
SAVED_DROPOUT = _defect(
    "peft-saved-dropout",
    "P-tuning with dropout, saved while the model is in training mode (as the Trainer does), saves one random draw",
    _peft,
    _dropout,
)
LOST_TRAINING = _defect(
    "peft-lost-training",
    "P-tuning, a projected prefix and CPT are saved as what they evaluate to: no training goes on from the file",
    _peft,
    _thrown_away,
)
LOST_ENCODER = _defect(
    "peft-lost-encoder",
    "a checkpoint that is loaded into a model in training (the Trainer does it to resume, and to load the best) puts "
    "what a prompt encoder evaluated to into its input: another loss for P-tuning, an error for a projected prefix",
    _peft,
    _thrown_away,
)
CPT_DEFAULT = _defect(
    "peft-cpt-default",
    "the loss of a CPT adapter with another name than 'default' ends in a KeyError",
    _peft,
    _trained_by("context-aware"),
)
PREFIX_CHECKPOINTING = _defect(
    "peft-prefix-checkpointing",
    "a prefix under gradient checkpointing that is switched on after PEFT has wrapped the model, as the Trainer does, "
    "fails in the middle of the first step, or, on transformers 5.0, is left out without a word",
    _peft,
    _prefix,
)
STATIC_CACHE = _defect(
    "peft-static-cache",
    "generate of a decoder with cache_implementation='static' fails: the cache has no room for virtual tokens, or, on "
    "transformers 5, PEFT asks for an argument that is no longer there",
    _peft,
    _in_decoder,
)
RENAMED_CACHE_GENERATE = _defect(
    "peft-renamed-cache-generate",
    "transformers 5.24 renamed the cache, and PEFT before 0.22 does not find it: generate puts a prompt in front of "
    "every token, or a prefix in the place of the text so far, and gives other tokens than the same model's forward",
    _renamed_cache,
    _in_decoder,
)
RENAMED_CACHE_CLASSIFIER = _defect(
    "peft-renamed-cache-classifier",
    "transformers 5.24 renamed the cache, and PEFT before 0.22 looks for the old name in the signature of a model that "
    "classifies: with a prefix, its forward ends in a ValueError",
    _renamed_cache,
    _classifier_prefix,
)

DEFECTS: tuple[Defect, ...] = (
    LEFT_PADDED_PROMPT,
    LEFT_PADDED_PREFIX_FORWARD,
    ONE_SUBMODULE,
    CACHED_T5_PREFIX,
    UNPOOLED_PREFIX,
    HYBRID_PREFIX,
    ADAPTER_NAMES,
    MISSING_HEAD,
    GROWING_CONFIG,
    UNASKED_WARNING,
    DEPRECATED,
    MULTITASK_DECODER,
    MULTITASK_HALF,
    MULTITASK_TASK,
    SAVED_DROPOUT,
    LOST_TRAINING,
    LOST_ENCODER,
    CPT_DEFAULT,
    PREFIX_CHECKPOINTING,
    STATIC_CACHE,
    RENAMED_CACHE_GENERATE,
    RENAMED_CACHE_CLASSIFIER,
)
