"""The state of a whole PeftModel, as accelerate and FSDP save it: the base's weights, and the parameterisation's.

The names are those of `PeftModel.state_dict`: ``prompt_encoder.NAME.``... and ``base_model.``..., in which a head that
is trained stands as ``base_model.HEAD.modules_to_save.NAME.``...
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from softbridge import untrusted
from softbridge.arrays import Array
from softbridge.errors import CheckpointError
from softbridge_peft import facts

_ENCODER = re.compile(r"prompt_encoder\.([^.]+)\.(.+)")
_HEAD = re.compile(r"(base_model\..+)\.modules_to_save\.([^.]+)\.(.+)")


def file_in(files: untrusted.Files) -> str | None:
    """The file that holds such a state, if there is one and no file of PEFT's own.

    A pickle, of which the whole must be read to see, is looked at only where PEFT's configuration is beside it.
    """
    if any(name in files for name in facts.WEIGHTS_FILES):
        return None
    kinds = ("safetensors", "pickle") if facts.CONFIG_FILE in files else ("safetensors",)
    for name in files.names:
        if "/" not in name and files.kind(name) in kinds:
            try:
                header = files.header(name)
            except CheckpointError:  # another format's to say
                continue
            if any(_ENCODER.fullmatch(tensor) for tensor in header):
                return name
    return None


def taken_apart(state: Mapping[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
    """The tensors of the parameterisation, by its own names, and those of a head, by the names in PEFT's files.

    Raises:
        CheckpointError: the state holds several adapters.
    """
    found = [match for name in state if (match := _ENCODER.fullmatch(name))]
    adapters = sorted({match[1] for match in found})
    if len(adapters) != 1:
        raise CheckpointError(
            f"the state of a PeftModel with {len(adapters)} prompts: {', '.join(adapters)}",
            "one",
            "save the one that is wanted with PEFT's own save_pretrained(folder, selected_adapters=[name])",
        )
    encoder = {match[2]: state[match[0]] for match in found}
    heads = [match for name in state if (match := _HEAD.fullmatch(name)) and match[2] == adapters[0]]
    return encoder, {f"{match[1]}.{match[3]}": state[match[0]] for match in heads}
