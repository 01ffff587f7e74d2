"""What PEFT writes and how it reads it again: every fact about PEFT that this plugin relies on, in one place.

Each fact is held by a test in tests/plugins/test_peft.py or test_peft_methods.py that asks the installed PEFT. Sources
are named by their path in https://github.com/huggingface/peft/tree/main/src/peft.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Kind = Literal["input", "prefix"]

CONFIG_FILE = "adapter_config.json"
#: In PEFT's own order of preference (utils/save_and_load.py, load_peft_weights).
WEIGHTS_FILES = ("adapter_model.safetensors", "adapter_model.bin")
#: The model card, which names the release that wrote it.
CARD_FILE = "README.md"
#: softbridge's own, beside PEFT's: what trained the prompt, which PEFT throws away. PEFT opens no file of this name.
TRAINING_FILE = "softbridge_training.safetensors"

#: What PEFT holds numbers in.
FLOATS = ("bfloat16", "float16", "float32", "float64")

#: The tensor that every prompt has: [P·S, H] of an input prompt, [P, L·2·K·D] of a prefix; S is
#: num_transformer_submodules.
PROMPT = "prompt_embeddings"
#: The two more of multitask prompt tuning: [N, P·S, R] and [N, R, H] for N tasks of R ranks. The prompt of a task is
#: PROMPT · (COLUMNS[task] @ ROWS[task]), where the caller names the task in every call (task_ids).
COLUMNS = "prefix_task_cols"
ROWS = "prefix_task_rows"
#: A head's tensors have the model's own names behind this.
HEAD = "base_model."
#: Modules of the model that PEFT takes for a head by itself, by task (peft_model.py, the PeftModelFor... classes).
HEAD_MODULES = ("classifier", "score", "qa_outputs")

PROMPT_TUNING = "PROMPT_TUNING"
P_TUNING = "P_TUNING"
MULTITASK = "MULTITASK_PROMPT_TUNING"
CPT = "CPT"
PREFIX_TUNING = "PREFIX_TUNING"
CARTRIDGE = "CARTRIDGE"

#: peft_type -> what a model sees of it: all that PEFT counts as prompt learning. Files of P_TUNING, of CPT and of
#: PREFIX_TUNING hold the prompt as it was evaluated when it was saved, and nothing of what trained it
#: (tuners/tuners_utils.py, BasePromptEncoder); those of the other types hold all that is trained.
KINDS: Mapping[str, Kind] = {
    PROMPT_TUNING: "input",
    P_TUNING: "input",
    MULTITASK: "input",
    CPT: "input",
    PREFIX_TUNING: "prefix",
    CARTRIDGE: "prefix",
}
#: Kind -> the peft_type of a prompt without more.
PEFT_TYPES: Mapping[Kind, str] = {"input": PROMPT_TUNING, "prefix": PREFIX_TUNING}
#: Our name of a parameterisation that PEFT's own file holds whole -> the peft_type.
STORED: Mapping[str, str] = {"multitask": MULTITASK, "cartridge": CARTRIDGE}
#: Why PEFT has no prefix for a hybrid model (peft_model.py, get_prompt).
STATES = (
    "PEFT starts a cache of keys and values with the prefix, in every layer, and some layers of this model keep a "
    "state of the text there: with such a cache it fails, or runs without the prefix, or goes on from an earlier text"
)

#: Our name of a parameterisation -> what PEFT's names in the state of a live `prompt_encoder` begin with, and ours
#: (tuners/p_tuning/model.py, tuners/prefix_tuning/model.py, tuners/cpt/model.py). An MLP of P-tuning has three linear
#: layers, whatever encoder_num_layers says.
ENCODERS: Mapping[str, Mapping[str, str]] = {
    "p-tuning-mlp": {
        "embedding.weight": "embedding",
        "mlp_head.0.": "linear.0.",
        "mlp_head.2.": "linear.1.",
        "mlp_head.4.": "linear.2.",
    },
    "p-tuning-lstm": {
        "embedding.weight": "embedding",
        "lstm_head.": "lstm.",
        "mlp_head.0.": "linear.0.",
        "mlp_head.2.": "linear.1.",
    },
    "mlp": {"embedding.weight": "embedding", "transform.0.": "hidden.", "transform.2.": "output."},
    "context-aware": {"embedding.weight": "embedding", "delta_embedding.weight": "delta"},
}

CAUSAL_LM = "CAUSAL_LM"
SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
SEQ_CLS = "SEQ_CLS"
QUESTION_ANS = "QUESTION_ANS"
FEATURE_EXTRACTION = "FEATURE_EXTRACTION"

#: task_type -> the class of transformers that has a model of it.
CLASSES: Mapping[str, str] = {
    CAUSAL_LM: "AutoModelForCausalLM",
    SEQ_2_SEQ_LM: "AutoModelForSeq2SeqLM",
    SEQ_CLS: "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    QUESTION_ANS: "AutoModelForQuestionAnswering",
    FEATURE_EXTRACTION: "AutoModel",
}

#: task_type -> the table in transformers.models.auto.modeling_auto that names the model classes of that task. PEFT
#: picks its PeftModelFor... class, and with it what happens to labels, masks and the head, by task_type alone.
TASKS: Mapping[str, str] = {
    CAUSAL_LM: "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    SEQ_2_SEQ_LM: "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    SEQ_CLS: "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    QUESTION_ANS: "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    FEATURE_EXTRACTION: "MODEL_MAPPING_NAMES",
}

#: Task of a prompt's head -> PEFT's task_type, where the geometry alone does not decide it.
TASK_OF_HEAD: Mapping[str | None, str] = {"token-classification": "TOKEN_CLS", "question-answering": QUESTION_ANS}

#: Tasks for whose models PEFT looks for the cache in a signature before it hands a prefix over (peft_model.py,
#: _prefix_tuning_forward); for the others it does without asking.
ASKING = (SEQ_CLS, "TOKEN_CLS", QUESTION_ANS)
#: Tasks in whose models PEFT does not hand task_ids on: see softbridge_compat.peft_defects, peft-multitask-task.
UNTOLD = (QUESTION_ANS, FEATURE_EXTRACTION)

#: Fields of adapter_config.json that every type has, with PEFT's defaults (config.py). They survive a change of type.
COMMON: Mapping[str, Any] = {"auto_mapping": None, "modules_to_save": None, "revision": None}
#: What the names of settings start with that say what training began with. PEFT opens the path in
#: ``prompt_tuning_init_state_dict_path`` each time that it loads a multitask prompt, and then overwrites what it found
#: there (tuners/multitask_prompt_tuning/model.py).
BEGINNINGS = ("prompt_tuning_init", "tokenizer_")
_PROMPT_TUNING: Mapping[str, Any] = {
    "prompt_tuning_init": "RANDOM",
    "prompt_tuning_init_text": None,
    "tokenizer_kwargs": None,
    "tokenizer_name_or_path": None,
}
#: peft_type -> its own fields with PEFT's defaults (tuners/*/config.py). What `config.config_of` computes comes on top.
#: CPT is not among them: its fields name tokens, which nobody but PEFT's own file knows.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    PROMPT_TUNING: _PROMPT_TUNING,
    P_TUNING: {"encoder_dropout": 0.0, "encoder_num_layers": 2, "encoder_reparameterization_type": "MLP"},
    MULTITASK: {**_PROMPT_TUNING, "prompt_tuning_init_state_dict_path": None, "prompt_tuning_init_task": 0},
    PREFIX_TUNING: {"init_weights": None, "prefix_projection": False},
    CARTRIDGE: {},
}


#: Families with one key/value head of whose prefix PEFT saved as many heads as the queries have, and handed the first
#: to the model, as long as their cache was one tensor for keys and values (utils/constants.py).
FIRST_HEAD = ("gpt_bigcode",)
#: The family whose prefix old releases order otherwise: see softbridge_compat.peft_releases, scrambles_bloom.
BLOOM = "bloom"


def stored_block(layer: int, layers: int, submodules: int) -> int:
    """Which stored block decoder layer `layer` attends to.

    With two submodules, the default for encoder-decoder models, PEFT repeats the L stored blocks, cuts the result into
    pairs of blocks and keeps the first of each pair (peft_model.py, get_prompt). For even L the odd blocks are
    dead, and the upper half of the decoder repeats the lower.
    """
    return layer if submodules == 1 else 2 * layer % layers
