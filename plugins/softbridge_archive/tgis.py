"""IBM's text-generation-inference (TGIS) and caikit-nlp: ``encoder.pt`` and ``decoder.pt``, a bare tensor [P, H] each.

TGIS puts a prompt between a row's pads and its tokens, with positions that count no pads, and in an encoder-decoder the
decoder's prompt in front of its start token, which then stands at P (`prompt_cache.py`, `models/causal_lm.py`). Of a
PEFT folder it reads the weights alone: ``prompt_embeddings``, of decoders. caikit trains with PEFT and writes the same
files for TGIS, with ``config.yml`` beside them; an encoder-decoder trained with both it runs itself without the
decoder's (`modules/text_generation/peft_prompt_tuning.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from softbridge import untrusted
from softbridge.checkpoint.manifest import BESIDE
from softbridge.errors import BaseModelError, CheckpointError
from softbridge.geometry import Geometry, Stack
from softbridge.plugin.capabilities import Capabilities
from softbridge.prompt import BaseId, Origin, SoftPrompt
from softbridge_archive.building import in_front
from softbridge_archive.contents import matrix, plain
from softbridge_archive.frame import ArchiveFormat

FILES: Mapping[str, Stack] = {"encoder.pt": "encoder", "decoder.pt": "decoder"}
WEIGHTS, TENSOR = ("adapter_model.safetensors", "adapter_model.bin"), "prompt_embeddings"
CONFIG = "config.yml"
#: What caikit says of a prompt that no place of ours has.
DETAILS = ("verbalizer", "tuning_type", "task_type", "eos_token", "trained_torch_dtype", "output_model_types")


def sniff(files: untrusted.Files) -> bool:
    """Whether there are files of these names, each of one bare tensor; or PEFT's weights without its configuration."""
    prompts = [name for name in FILES if name in files]
    if prompts:
        bare = (files.kind(name) == "pickle" and isinstance(files.tree(name), untrusted.Stored) for name in prompts)
        return all(bare) and not _weights(files)
    return bool(_weights(files))


def _weights(files: untrusted.Files) -> list[str]:
    if set(files.names) - {*WEIGHTS, *BESIDE}:
        return []
    named = [name for name in WEIGHTS if name in files and files.kind(name) in ("safetensors", "pickle")]
    return [name for name in named if isinstance(tree := files.tree(name), dict) and list(tree) == [TENSOR]]


def read(files: untrusted.Files, geometry: Geometry | None) -> SoftPrompt:
    """See `Format.read`."""
    stored = {stack: files.tree(name) for name, stack in FILES.items() if name in files}
    if not stored and (names := _weights(files)):
        stored = {"decoder": files.tree(names[0])[TENSOR]}
    if not stored or not all(isinstance(tensor, untrusted.Stored) for tensor in stored.values()):
        raise CheckpointError(
            f"{files.path} holds {', '.join(files.names[:6]) or 'nothing'}",
            f"{' or '.join(FILES)}, each of one tensor [P, H]; or {TENSOR} in {' or '.join(WEIGHTS)}",
            "give the folder that TGIS would be given",
        )
    missing = [stack for stack in stored if geometry is not None and geometry.stack(stack) is None]
    if missing and geometry is not None:
        raise BaseModelError(
            f"vectors for the {missing[0]} that {geometry.model_type} lacks", "its base", "check --base"
        )
    config = files.yaml(CONFIG) if CONFIG in files else {}
    notes: tuple[str, ...] = ()
    if config and len(stored) == 2:
        notes = ("read as TGIS runs it; caikit itself leaves the decoder's vectors out: --part encoder-input",)
    details = plain(config, DETAILS)
    prompt = in_front(
        {stack: matrix(tensor) for stack, tensor in stored.items()}, geometry, Origin("tgis", details, notes=notes)
    )
    name = config.get("base_model_name")
    return replace(prompt, base=BaseId(name if isinstance(name, str) and name else None, geometry))


def write(prompt: SoftPrompt, geometry: Geometry | None) -> Mapping[str, bytes]:
    """See `Format.write`."""
    names = {stack: name for name, stack in FILES.items()}
    return {names[part.stack]: untrusted.tensor_bytes(part.vectors) for part in prompt.inputs}


FORMAT = ArchiveFormat(
    name="tgis",
    summary="IBM's TGIS and caikit-nlp: encoder.pt and decoder.pt, a tensor [P, H] each",
    files=(*FILES, CONFIG, *WEIGHTS),
    recognise=sniff,
    reader=read,
    reads="`encoder.pt`, `decoder.pt`, with caikit's `config.yml`; PEFT's weights without their configuration",
    writes="`encoder.pt`, `decoder.pt`",
    proven="three released prompts, in PEFT, against the vectors put in front by hand; T5 with both by hand",
    encodings=("pt",),
    capabilities=Capabilities(
        inputs=frozenset({("encoder", "before", "before-sequence"), ("decoder", "before", "before-sequence")}),
        input_start="counted",
        positions_told=False,
    ),
    writer=write,
)
