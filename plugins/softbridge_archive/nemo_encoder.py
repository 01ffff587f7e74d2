"""NeMo's prompt encoders: what makes a table that was not made yet, and what its training goes on with."""

from __future__ import annotations

import re
from collections.abc import Mapping

from softbridge import untrusted
from softbridge.arrays import Array
from softbridge.prompt import Training
from softbridge_archive.building import made_vectors

#: Tensors of an encoder -> ours (`prompt_encoder.py`, `parallel_adapters.py`). Between the layers of a head is ReLU,
#: between ``first`` and ``second`` GELU in its tanh form, with sqrt(2/pi) cut off after eight digits.
RENAMED = {
    r"embeddings?\.weight": "embedding",
    r"(?:tpmlp\.)?first\.(\w+)": r"linear.0.\1",
    r"(?:tpmlp\.)?second\.(\w+)": r"linear.1.\1",
    r"lstm_head\.(\w+)": r"lstm.\1",
    **{rf"mlp_head\.{2 * number}\.(\w+)": rf"linear.{number}.\1" for number in range(16)},
}


def encoded(found: Mapping[str, untrusted.Stored]) -> tuple[Array | None, Training | None]:
    """The vectors [P, H] that a prompt encoder makes, and its parameterisation; None where there is none.

    Raises:
        CheckpointError: the tensors are of no encoder of NeMo's.
    """
    tensors = {}
    for name, stored in found.items():
        for pattern, ours in RENAMED.items():
            if match := re.fullmatch(rf"(?:state_dict\.)?{pattern}", name):
                tensors[match.expand(ours)] = stored.array()
    if len(tensors) < 2:
        return tensors.get("embedding"), None
    recurrent = sum(re.fullmatch(r"lstm\.weight_ih_l\d+", name) is not None for name in tensors)
    linear = sum(re.fullmatch(r"linear\.\d+\.weight", name) is not None for name in tensors)
    gelu = any(re.search(r"\bfirst\.weight", name) for name in found)
    settings = {"layers": recurrent or linear, "non_linearity": "gelu_pytorch_tanh" if gelu else "relu"}
    training = Training("p-tuning-lstm" if recurrent else "p-tuning-mlp", settings, tensors)
    return made_vectors(training), training
