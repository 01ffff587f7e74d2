"""ChatGLM-6B and ChatGLM2-6B (THUDM, Apache-2.0), `ptuning/`: the prefix encoder of P-tuning v2.

A checkpoint holds what was trained alone (`ptuning/trainer.py`), older ones the whole model, in one or several files.
`modeling_chatglm.py`: `get_prompt` reads the flat layout; attention puts the prefix in front of the keys after the
rotation, and all tokens see it; real tokens stand at 0, 1, ... . Keys and values are in half precision when they are
used, and their dropout in training is 0.1.

ChatGLM2's model is what transformers calls GLM: a rotation of interleaved pairs in the first half of each head, and a
few groups of keys and values. ChatGLM-6B's, whose positions have two dimensions, it does not have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from softbridge import untrusted
from softbridge.errors import BaseModelError
from softbridge.geometry import Geometry, StackGeometry
from softbridge.prompt import Positions, SoftPrompt
from softbridge_archive import prefix_encoder
from softbridge_archive.contents import below, holds, weights
from softbridge_archive.frame import ArchiveFormat

STEM = "transformer.prefix_encoder"
#: What we call the family of ChatGLM-6B, and transformers that of ChatGLM2.
FIRST, SECOND = "chatglm", "glm"


def sniff(files: untrusted.Files) -> bool:
    """Whether there is a prefix encoder in the module that ChatGLM calls its transformer."""
    return holds(files, f"{STEM}.{prefix_encoder.EMBEDDING}")


def read(files: untrusted.Files, geometry: Geometry | None) -> SoftPrompt:
    """See `Format.read`."""
    found, facts = weights(files), prefix_encoder.config(files)
    geometry = geometry_in(facts) or geometry
    if geometry is None or geometry.model_type not in (FIRST, SECOND):
        raise BaseModelError(
            f"a prefix of ChatGLM, for {'an unknown base model' if geometry is None else geometry.model_type}",
            f"the config.json of its training beside it, or a base model of the family {SECOND}, as ChatGLM2's is",
            "put that config.json there, or give --base such a configuration",
        )
    encoder = below(found, STEM)
    prefix, training = prefix_encoder.read(encoder, facts, geometry, "self", 0.1)
    base, origin = prefix_encoder.source("chatglm", facts, geometry, len(found) - len(encoder))
    return SoftPrompt((prefix,), Positions({"decoder": 0}), base, training=training, origin=origin)


def geometry_in(facts: Mapping[str, Any]) -> Geometry | None:
    """The geometry in a configuration of ChatGLM's own, or None if that is not all there."""
    layers, heads, hidden = (_count(facts.get(name)) for name in ("num_layers", "num_attention_heads", "hidden_size"))
    groups = _count(facts.get("multi_query_group_num")) if facts.get("multi_query_attention") else heads
    width = _count(facts.get("kv_channels", hidden // heads if heads else 0))
    vocabulary = _count(facts.get("padded_vocab_size", facts.get("vocab_size")))
    if not all((layers, heads, hidden, groups, width, vocabulary)):
        return None
    family = FIRST if facts.get("position_encoding_2d") else SECOND
    return Geometry(family, hidden, vocabulary, None, StackGeometry(layers, heads, groups, width))


def _count(value: object) -> int:
    return value if isinstance(value, int) and 0 < value < 2**20 and value is not True else 0


def write(prompt: SoftPrompt, geometry: Geometry | None) -> Mapping[str, bytes]:
    """See `Format.write`."""
    base, stack = prefix_encoder.sizes(prompt, geometry)
    facts = {"model_type": "chatglm", "position_encoding_2d": base.model_type == FIRST, "hidden_size": base.hidden}
    facts |= {"num_layers": stack.layers, "num_attention_heads": stack.heads, "padded_vocab_size": base.vocabulary}
    groups = {"multi_query_attention": stack.kv_heads != stack.heads, "multi_query_group_num": stack.kv_heads}
    return prefix_encoder.write(STEM, prompt, {**facts, **groups, "kv_channels": stack.head_dim})


FORMAT = ArchiveFormat(
    name="chatglm",
    summary="ChatGLM-6B and ChatGLM2-6B, ptuning: a prefix, alone or in a whole checkpoint",
    files=("*.bin", "*.safetensors", "*.json"),
    recognise=sniff,
    reader=read,
    reads="prefix, projected or not, of what was trained or of a whole model, sharded, too",
    writes="prefix, not projected",
    proven="ChatGLM2's model written out from its definition; native engine and PEFT on transformers' GLM",
    encodings=("bin",),
    capabilities=prefix_encoder.capabilities("self", "zero", {FIRST, SECOND}),
    writer=write,
    advise=lambda prompt, geometry, first: (
        f"the base model's weights are not here: pass its name to ptuning/main.py, with --ptuning_checkpoint FOLDER, "
        f"with --pre_seq_len {prompt.parts[0].length}, and without --prefix_projection",
    ),
)
