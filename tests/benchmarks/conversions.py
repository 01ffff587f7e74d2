"""What a conversion costs, file to file, against reading and writing the same bytes with safetensors.

    python tests/benchmarks/conversions.py [MEGABYTES] [--rounds N]

Each way runs in a process of its own, in turns: its processor time is that of its work, without what it imports, and
its memory the most that the process ever had, with what it imports. That the files hold the same numbers is asserted,
where nothing is rotated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from side_by_side import Row, heading, line

LAYERS, HEADS, WIDTH = 32, 8, 128
BASE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 32,
    "num_key_value_heads": HEADS,
    "head_dim": WIDTH,
    "vocab_size": 32000,
    "max_position_embeddings": 131072,
}
WEIGHTS = "adapter_model.safetensors"

#: What a process does: read and write with safetensors, or convert.
WORK = {
    "safetensors": "save_file(load_file(source), target + '.safetensors')",
    "softbridge": "sb.convert(source.parent, target, to=to, base=base, overwrite=True)",
}
CHILD = """
import json, resource, sys, time
from pathlib import Path
import numpy
from safetensors.numpy import load_file, save_file
source, target, to = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
base = sys.argv[4] or None
if to:
    import softbridge as sb
    sb.convert, sb.formats()
    if base:  # its reader, and the toolkit's writer, are imports
        import torch, transformers
        sb.BaseModel.resolve(base).geometry
start = time.process_time()
WORK
spent = time.process_time() - start
toolkits = sorted({"torch", "transformers", "peft", "adapters"} & sys.modules.keys())
print(json.dumps([spent, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, toolkits]))
"""


def write(folder: Path, megabytes: int) -> Path:
    """PEFT's files of a prefix of so many megabytes, for `BASE`."""
    columns = LAYERS * 2 * HEADS * WIDTH
    length = megabytes * 2**20 // (columns * 4)
    numbers = np.random.default_rng(0).standard_normal((length, columns), dtype=np.float32)
    settings = {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": length,
        "token_dim": HEADS * WIDTH,
        "num_transformer_submodules": 1,
        "num_attention_heads": HEADS,
        "num_layers": LAYERS,
        "encoder_hidden_size": HEADS * WIDTH,
        "prefix_projection": False,
    }
    folder.mkdir()
    save_file({"prompt_embeddings": numbers}, folder / WEIGHTS)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder / WEIGHTS


def run(source: Path, target: Path, to: str, base: Path | None) -> tuple[float, int, list[str]]:
    """Seconds, bytes at the most, and which toolkits were imported."""
    code = CHILD.replace("WORK", WORK["softbridge" if to else "safetensors"])
    command = [sys.executable, "-c", code, str(source), str(target), to, "" if base is None else str(base)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds, peak, toolkits = json.loads(done.stdout.splitlines()[-1])
    return seconds, peak, toolkits


def compare(folder: Path, megabytes: int, rounds: int) -> None:
    import softbridge as sb

    source = write(folder / "peft", megabytes)
    (folder / "base.json").write_text(json.dumps(BASE))
    size = source.stat().st_size
    for to in ("softbridge", "peft", "adapterhub"):
        # Only where keys are rotated does anything depend on the base model.
        base = folder / "base.json" if to == "adapterhub" else None
        spent: dict[str, list[float]] = {"softbridge": [], "safetensors": []}
        peaks, toolkits = [], []
        for _ in range(rounds):
            target = folder / f"to-{to}"
            seconds, peak, toolkits = run(source, target, to, base)
            spent["softbridge"].append(seconds)
            peaks.append(peak / size)
            spent["safetensors"].append(run(source, folder / "copy", "", None)[0])
        if to == "peft":
            assert np.array_equal(
                load_file(source)["prompt_embeddings"], load_file(target / WEIGHTS)["prompt_embeddings"]
            )
        elif to == "softbridge":
            assert sb.load(target).parts == sb.load(source.parent).parts
        print(line(Row(f"{megabytes} MB, peft to {to}", spent, limit="safetensors")), flush=True)
        imported = ", ".join(toolkits) or "no toolkit"
        print(f"<!-- at most {statistics.median(peaks):.2f} times the file in memory; {imported} -->", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("megabytes", type=int, nargs="?", default=256)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    print(heading())
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), given.megabytes, given.rounds)


if __name__ == "__main__":
    main()
