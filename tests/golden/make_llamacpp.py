"""Make `llamacpp.safetensors`: states that llama.cpp itself saved, of texts that transformers ran, too.

    pip install 'softbridge[llamacpp]' && python tests/golden/make_llamacpp.py    # version 4 of the form
    pip uninstall xllamacpp && pip install llama-cpp-python==0.3.36 && python tests/golden/make_llamacpp.py --add    # 3

Tensors: ``<family>.<encoding>.<dtype>``, the bytes (uint8) of what `llama_state_seq_save_file` wrote after a text of 5
tokens in float32; ``<family>.keys`` and ``<family>.values`` [L, K, P, D], what transformers' cache held, in float64
rounded to float32. The models are those of `softbridge.testing.tiny_model`. Metadata: ``tokens``, the text;
``versions``. With ``--add`` the tensors of the other release are kept.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from softbridge.base import cache
from softbridge.testing import tiny_model
from softbridge_llamacpp import base_file
from softbridge_llamacpp.functions import module
from softbridge_llamacpp.library import Cache, Row, loaded
from softbridge_llamacpp.server import SERVER

TOKENS = [7, 11, 5, 90, 33]
NUMBERS = {"float32": 0, "float16": 1}
SUFFIX = {"xllamacpp": "", "llama_cpp": "-v3"}
PATH = Path(__file__).with_name("llamacpp.safetensors")


def saved(folder: Path, held: Cache) -> torch.Tensor:
    with loaded(folder / "base.gguf") as model, model.context(2, 256, 16, held, 1) as context:
        # Another sequence lies in the way, so that the cells of this one are not the first of the cache.
        context.decode([Row(0, at, token, False) for at, token in enumerate(TOKENS[:3])])
        context.decode([Row(1, at, token, at == 4) for at, token in enumerate(TOKENS)])
        context.save(folder / "state", 1, TOKENS)
    return torch.frombuffer(bytearray((folder / "state").read_bytes()), dtype=torch.uint8).clone()


def main() -> None:
    add = "--add" in sys.argv
    tensors: dict[str, torch.Tensor] = {}
    metadata = {"tokens": json.dumps(TOKENS), "versions": SERVER.version()}
    if add:
        with safe_open(PATH, "pt") as old:
            tensors = {name: old.get_tensor(name) for name in old.keys()}  # noqa: SIM118
            metadata["versions"] = f"{old.metadata()['versions']}; {metadata['versions']}"
    for family in ("llama",) if add else ("llama", "qwen3"):
        model = tiny_model(family, torch.float32)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            model.save_pretrained(folder / "base")
            base_file.write(folder / "base", folder / "base.gguf")
            for flash in ("off", "on"):
                for dtype, number in NUMBERS.items() if family == "llama" and not add else [("float32", 0)]:
                    held = Cache(number, number, flash == "off")
                    tensors[f"{family}.flash-{flash}{SUFFIX[module() or '']}.{dtype}"] = saved(folder, held)
        with torch.no_grad():
            output = model.double()(input_ids=torch.tensor([TOKENS]), use_cache=True)
        pairs = [pair for _, pair in sorted(cache.pairs(cache.of(output)).items())]
        for half, name in enumerate(("keys", "values")):
            tensors[f"{family}.{name}"] = torch.stack([pair[half][0] for pair in pairs]).float().contiguous()
    save_file(tensors, PATH, metadata)


if __name__ == "__main__":
    main()
