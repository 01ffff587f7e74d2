"""What PEFT writes and how it reads it again: every fact about PEFT that this plugin relies on, in one place.

Each fact is held by a test in tests/plugins/test_peft.py that asks the installed PEFT. Sources are named by their path
in https://github.com/huggingface/peft/tree/main/src/peft.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Kind = Literal["input", "prefix"]

CONFIG_FILE = "adapter_config.json"
#: In PEFT's own order of preference (utils/save_and_load.py, load_peft_weights).
WEIGHTS_FILES = ("adapter_model.safetensors", "adapter_model.bin")

#: The one tensor of a prompt: [P·S, H] of an input prompt, [P, L·2·K·D] of a prefix; S is num_transformer_submodules.
PROMPT = "prompt_embeddings"
#: A head's tensors have the model's own names behind this.
HEAD = "base_model."
#: Modules of the model that PEFT takes for a head by itself, by task (peft_model.py, the PeftModelFor... classes).
HEAD_MODULES = ("classifier", "score", "qa_outputs")

#: peft_type -> what a model sees of it. P_TUNING files hold the output of its encoder, evaluated when it was saved, and
#: nothing of the encoder (tuners/tuners_utils.py, BasePromptEncoder): they are prompt tuning files by another name.
KINDS: Mapping[str, Kind] = {"PROMPT_TUNING": "input", "P_TUNING": "input", "PREFIX_TUNING": "prefix"}
#: Kind -> the peft_type that is written.
PEFT_TYPES: Mapping[Kind, str] = {"input": "PROMPT_TUNING", "prefix": "PREFIX_TUNING"}

CAUSAL_LM = "CAUSAL_LM"
SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
SEQ_CLS = "SEQ_CLS"
FEATURE_EXTRACTION = "FEATURE_EXTRACTION"

#: task_type -> the table in transformers.models.auto.modeling_auto that names the model classes of that task. PEFT
#: picks its PeftModelFor... class, and with it what happens to labels, masks and the head, by task_type alone.
TASKS: Mapping[str, str] = {
    CAUSAL_LM: "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    SEQ_2_SEQ_LM: "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    SEQ_CLS: "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    FEATURE_EXTRACTION: "MODEL_MAPPING_NAMES",
}

#: Fields of adapter_config.json with PEFT's defaults (config.py, tuners/prompt_tuning/config.py and
#: tuners/prefix_tuning/config.py), for each kind. What `format.config_of` computes comes on top.
DEFAULTS: Mapping[Kind, Mapping[str, Any]] = {
    "input": {
        "auto_mapping": None,
        "modules_to_save": None,
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "revision": None,
        "tokenizer_kwargs": None,
        "tokenizer_name_or_path": None,
    },
    "prefix": {
        "auto_mapping": None,
        "init_weights": None,
        "modules_to_save": None,
        "prefix_projection": False,
        "revision": None,
    },
}


def stored_block(layer: int, layers: int, submodules: int) -> int:
    """Which stored block decoder layer `layer` attends to.

    With two submodules, the default for encoder-decoder models, PEFT repeats the L stored blocks, cuts the result into
    pairs of blocks and keeps the first of each pair (peft_model.py, get_prompt). For even L the odd blocks are
    dead, and the upper half of the decoder repeats the lower.
    """
    return layer if submodules == 1 else 2 * layer % layers
