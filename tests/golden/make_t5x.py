"""Make `t5x.safetensors`: a prompt as flax and TensorStore write it, unmodified, in the layout of a checkpoint of T5X.

    pip install jax==0.10.2 flax==0.12.8 tensorstore==0.1.86 safetensors
    python tests/golden/make_t5x.py

``<case>/<file>``: the bytes (uint8) of each file; ``prompt``: the vectors [5, 8], float32. Cases: ``gzip``, ``plain``
and ``bfloat16``, variables in zarr of two chunks along the width, and ``msgpack``, a state of flax.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import tensorstore
from flax.serialization import msgpack_serialize
from safetensors.numpy import save_file

PROMPT = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
FROZEN = np.ones((8, 8), np.float32)
VARIABLE = "target.encoder.prompt.prompt.prompt"
CASES = {"gzip": ({"id": "gzip"}, "<f4"), "plain": (None, "<f4"), "bfloat16": ({"id": "gzip"}, "bfloat16")}


def write(folder: Path, array: np.ndarray, compressor: dict[str, str] | None, dtype: str) -> None:
    chunks = [array.shape[0], array.shape[1] // 2]
    metadata = {"shape": array.shape, "chunks": chunks, "compressor": compressor, "dtype": dtype}
    store = {"driver": "file", "path": str(folder)}
    opened = tensorstore.open({"driver": "zarr", "kvstore": store, "metadata": metadata, "create": True}).result()
    opened.write(array.astype(opened.dtype.numpy_dtype)).result()


def main() -> None:
    tensors = {"prompt": PROMPT}
    with tempfile.TemporaryDirectory() as scratch:
        for case, (compressor, dtype) in CASES.items():
            write(Path(scratch) / case / VARIABLE, PROMPT, compressor, dtype)
            write(Path(scratch) / case / "target.encoder.layers_0.kernel", FROZEN, compressor, dtype)
        state = {"encoder": {"prompt": {"prompt": {"prompt": PROMPT}}, "kernel": jnp.asarray(FROZEN, jnp.bfloat16)}}
        (Path(scratch) / "msgpack").mkdir()
        content = msgpack_serialize({"optimizer": {"target": state, "state": {"step": np.int32(7)}}, "version": 3})
        (Path(scratch) / "msgpack" / "checkpoint").write_bytes(content)
        for path in sorted(Path(scratch).rglob("*")):
            if path.is_file():
                tensors[str(path.relative_to(scratch))] = np.frombuffer(path.read_bytes(), np.uint8)
    save_file(tensors, Path(__file__).parent / "t5x.safetensors")


if __name__ == "__main__":
    main()
