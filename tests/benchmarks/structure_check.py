"""What the structure check of a 70B model costs: seconds of processor and of clock, and the peak of memory.

    python tests/benchmarks/structure_check.py [LAYERS]

A prefix of 100 virtual tokens for Llama-3-70B's geometry, in PEFT's files and in our own, compared from the
configuration alone as ``softbridge verify peft/ native/ --base config.json`` does. Nothing is asserted: the machine may
be busy, and `tests/bridge/test_structure.py` holds what the check covers. Reading the two files is included, starting
Python and importing torch is not.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from pathlib import Path

import softbridge as sb
from softbridge.base import BaseModel
from softbridge.testing import random_prefix

#: Llama-3-70B, as its config.json has it.
LLAMA_70B = {
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "intermediate_size": 28672,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
LENGTH = 100


def main(layers: int) -> None:
    import peft  # noqa: F401  # imports are not what is measured
    from transformers import AutoConfig

    config = AutoConfig.for_model("llama", **{**LLAMA_70B, "num_hidden_layers": layers})
    with tempfile.TemporaryDirectory() as folder:
        sides = [Path(folder) / name for name in ("peft", "softbridge")]
        prefix = random_prefix(BaseModel(config).geometry, LENGTH)
        for side in sides:
            sb.save(prefix, side, format=side.name, base=config)
        before, clock = time.process_time(), time.perf_counter()
        certificate = sb.verify(*sides, base=config)
        spent, passed = time.process_time() - before, time.perf_counter() - clock
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(certificate.summary())
    print(f"{certificate.source.engine} and {certificate.target.engine}; {certificate.weights}")
    print(f"{spent:.1f} s of processor, {passed:.1f} s of clock, peak {peak:.2f} GiB")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else LLAMA_70B["num_hidden_layers"])
