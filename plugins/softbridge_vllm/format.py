"""What vLLM can serve, in softbridge's own container (``vllm_prompt.safetensors``): no layout of vLLM's is invented.

vLLM has no file for soft prompts. Its connectors hand numbers over in memory, and its ``prompt_embeds`` are part of a
request. So a prompt is stored as the canonical form is. What makes it this format is that it is lowered to what vLLM
computes: one part, counted positions, and a prefix in every layer. In a folder the file's name says so. The bytes do
not, so the file alone is recognised as `softbridge`'s, which it is. `softbridge_vllm.shelf` asks again whether a prompt
is servable, whoever wrote it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from softbridge.errors import EngineError, Obstacle
from softbridge.geometry import Geometry
from softbridge.lowering.planner import lower
from softbridge.lowering.steps import Target
from softbridge.plugin.capabilities import UP_TO_FLOAT32, Capabilities
from softbridge.prompt import SoftPrompt, file_of, unpack
from softbridge.prompt.container import KEY
from softbridge.untrusted import Content, Files
from softbridge_compat import embedding_scales
from softbridge_native.format import FORMAT as CONTAINER

FILE = "vllm_prompt.safetensors"


class VllmFormat:
    """softbridge's container, of the prompts that vLLM can serve."""

    name = "vllm"
    summary = "vLLM: softbridge's container, of key/value prefixes and vectors in front of a decoder's text"
    encodings = ("safetensors",)
    engine = "native"
    server = "vllm"
    files = (FILE,)
    reads = "`vllm_prompt.safetensors`, and what is `softbridge`'s"
    writes = "`vllm_prompt.safetensors`: a prefix of all layers, or vectors in front"
    proven = "vLLM itself answers, alone and in a batch, as transformers does within vLLM's own noise"
    capabilities = Capabilities(
        inputs=frozenset({("decoder", "before", "before-sequence")}),
        input_start="counted",
        prefix_sites=frozenset({"self"}),
        prefix_start="counted",
        every_layer=True,
        parts=1,
        positions_told=False,
        relative_bias="plain",
        window="slides",
        dtypes=UP_TO_FLOAT32,
    )

    def sniff(self, files: Files) -> bool:
        """Whether there is a folder with that file. By itself the file is recognised as `softbridge`'s own."""
        here = not files.is_file and FILE in files
        return here and files.kind(FILE) == "safetensors" and KEY in files.metadata(FILE)

    def read(self, files: Files, geometry: Geometry | None) -> SoftPrompt:
        return unpack(files, FILE) if FILE in files else CONTAINER.read(files, geometry)

    def obstacles(self, prompt: SoftPrompt, geometry: Geometry | None) -> Sequence[Obstacle]:
        known = geometry or prompt.base.geometry
        if known is None:
            reason = "a request names its prompt in token ids, and nothing says how many there are"
            return [Obstacle("vocabulary", reason, "give the base model")]
        if known.decoder is None or known.encoder is not None:
            reason = f"vLLM's connectors serve models of a decoder alone, and {known.model_type} is none"
            return [Obstacle("family", reason, "choose another target, such as --to softbridge")]
        if prompt.prefixes and (known.decoder.stateful or known.decoder.sources is not None):
            what = "keep a state beside keys and values" if known.decoder.stateful else "share another layer's keys"
            reason = f"layers of {known.model_type} {what}: vLLM keeps their caches in groups that nobody tried"
            return [Obstacle("layers", reason, "choose another target, such as --to softbridge")]
        if known.model_type in embedding_scales.MOVED and any(part.told_scale != 1 for part in prompt.inputs):
            reason = (
                "vLLM multiplies the words of this family alone, and these vectors are for a model that scales them"
            )
            return [Obstacle("scale", reason, "convert with a transformers that does not (5), and with the base model")]
        return ()

    def write(
        self, prompt: SoftPrompt, geometry: Geometry | None, encoding: str | None = None
    ) -> Mapping[str, Content]:
        known = replace(prompt.base, geometry=geometry or prompt.base.geometry)
        return {FILE: file_of(replace(prompt, base=known))}

    def advice(self, prompt: SoftPrompt, geometry: Geometry | None, first: int = 0) -> Sequence[str]:
        if prompt.inputs:
            return ["start vLLM with --enable-prompt-embeds, and let softbridge_vllm.client make the requests"]
        return [
            "put it into the server's directory of prompts, as a folder or as NAME.safetensors, and start vLLM with "
            "the connector of softbridge_vllm (plugins/README.md); softbridge_vllm.client makes the requests"
        ]


FORMAT = VllmFormat()


def check_servable(prompt: SoftPrompt, geometry: Geometry | None, where: str) -> None:
    """Refuse a prompt that is not, as it is, one that vLLM computes.

    Args:
        where: it comes from.

    Raises:
        LoweringError: it cannot be made one.
        EngineError: it must be converted first.
        BaseModelError: it does not fit the base model, or must be converted first, with the base model at hand.
    """
    known = prompt if geometry is None else replace(prompt, base=replace(prompt.base, geometry=geometry))
    steps = lower(known, Target(FORMAT.name, FORMAT.capabilities), (), FORMAT.obstacles).steps
    if steps:
        raise EngineError(
            f"{where} is a prompt that vLLM computes otherwise: " + "; ".join(step.note for step in steps),
            "a prompt as vLLM computes it",
            "softbridge convert ... --to vllm --base ...",
        )
