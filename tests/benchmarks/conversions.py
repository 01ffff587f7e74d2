"""What a conversion costs, file to file, against reading and writing the same bytes with safetensors.

    python tests/benchmarks/conversions.py [MEGABYTES ...] [--small COUNT] [--rounds N] [--folder DIR]

Each way runs in a process of its own, in turns. Its time is that of its work, without what it imports: processor time,
and in the row below it that of a clock, with what waits for the disk. Its memory is the most that the process ever had,
with what it imports (Linux only). Small prefixes are converted one after another by one process, and the time is that
of each. That the files hold the same numbers is asserted: those that were read, or, where keys are rotated, those of
the lowering.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from side_by_side import Row, heading, report

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
#: Virtual tokens of a small prefix: 2.5 MB.
SMALL = 10
WEIGHTS = "adapter_model.safetensors"

#: What a process does with a folder: read and write with safetensors, or convert.
WORK = {
    "safetensors": "save_file(load_file(source / 'adapter_model.safetensors'), target)",
    "softbridge": "sb.convert(source, target, to=to, base=base, overwrite=True)",
}
CHILD = """
import json, sys, time
from pathlib import Path
import numpy
from safetensors.numpy import load_file, save_file
sources, targets, to, base = sorted(Path(sys.argv[1]).iterdir()), Path(sys.argv[2]), sys.argv[3], sys.argv[4] or None
if to:
    import softbridge as sb
    sb.convert, sb.formats()
    if base:  # its reader, and the toolkit's writer, are imports
        import torch, transformers
        base = sb.BaseModel.resolve(base)
        base.geometry
begun, start = time.perf_counter(), time.process_time()
for source in sources:
    target = targets / source.name
    WORK
spent = [(time.process_time() - start) / len(sources), (time.perf_counter() - begun) / len(sources)]
toolkits = sorted({"torch", "transformers", "peft", "adapters"} & sys.modules.keys())
# Not getrusage's, which begins with what the parent had.
peak = next(int(row.split()[1]) for row in open("/proc/self/status") if row.startswith("VmHWM:")) * 1024
print(json.dumps([*spent, peak, toolkits]))
"""


def write(folder: Path, length: int, seed: int = 0) -> None:
    """PEFT's files of a prefix of so many virtual tokens for `BASE`: a quarter of a megabyte each."""
    columns = LAYERS * 2 * HEADS * WIDTH
    numbers = np.random.default_rng(seed).standard_normal((length, columns), dtype=np.float32)
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
    folder.mkdir(parents=True)
    save_file({"prompt_embeddings": numbers}, folder / WEIGHTS)
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def run(sources: Path, targets: Path, to: str, base: Path | None) -> tuple[float, float, int, list[str]]:
    """Seconds of a processor and of a clock, bytes at the most, and which toolkits were imported."""
    shutil.rmtree(targets, ignore_errors=True)
    targets.mkdir()
    code = CHILD.replace("WORK", WORK["softbridge" if to else "safetensors"])
    command = [sys.executable, "-c", code, str(sources), str(targets), to, "" if base is None else str(base)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    processor, wall, peak, toolkits = json.loads(done.stdout.splitlines()[-1])
    return processor, wall, peak, toolkits


def compare(folder: Path, title: str, lengths: list[int], rounds: int) -> None:
    """Convert prefixes of these lengths to each format."""
    sources, targets = folder / "in", folder / "out"
    for number, length in enumerate(lengths):
        write(sources / f"{number:04}", length, number)
    base = folder / "base.json"
    base.write_text(json.dumps(BASE))
    size = max((one / WEIGHTS).stat().st_size for one in sources.iterdir())
    for to in ("softbridge", "peft", "adapterhub"):
        # Only where keys are rotated does anything depend on the base model.
        asked = base if to == "adapterhub" else None
        processor: dict[str, list[float]] = {"softbridge": [], "safetensors": []}
        wall: dict[str, list[float]] = {"softbridge": [], "safetensors": []}
        peaks: dict[str, list[int]] = {"softbridge": [], "safetensors": []}
        toolkits: list[str] = []
        for _ in range(rounds):
            found = run(sources, folder / "copies", "", None)
            processor["safetensors"].append(found[0])
            wall["safetensors"].append(found[1])
            peaks["safetensors"].append(found[2])
            found = run(sources, targets, to, asked)
            processor["softbridge"].append(found[0])
            wall["softbridge"].append(found[1])
            peaks["softbridge"].append(found[2])
            toolkits = found[3]
        assert_same(sources, targets, to, asked)
        report(Row(f"{title}, peft to {to}", processor, "safetensors", peaks))
        report(Row(f"{title}, peft to {to}, by the clock", wall, "safetensors"))
        peak, imported = statistics.median(peaks["softbridge"]), ", ".join(toolkits) or "no toolkit"
        held = f"{peak / 2**20:.0f} MB" + (f", {peak / size:.2f} times the file" if len(lengths) == 1 else "")
        print(f"<!-- in memory at most {held}; {imported} -->", flush=True)
        shutil.rmtree(targets)
    shutil.rmtree(sources)


def assert_same(sources: Path, targets: Path, to: str, base: Any) -> None:
    """The numbers that were written are those that were read, or what a rotation made of them."""
    import softbridge as sb
    from softbridge.arrays import same_array
    from softbridge.lowering.planner import lower
    from softbridge.lowering.steps import Target

    resolved = None if base is None else sb.BaseModel.resolve(base)
    for source in sorted(sources.iterdir())[:3]:
        target = targets / source.name
        if to == "peft":
            kept = load_file(target / WEIGHTS)["prompt_embeddings"]
            assert np.array_equal(load_file(source / WEIGHTS)["prompt_embeddings"], kept)
            continue
        prompt = sb.load(source, base=resolved)
        found = sb.load(target, base=resolved)
        if to == "softbridge":
            assert found.parts == prompt.parts
            continue
        lowered = lower(prompt, Target(to, sb.formats()[to].capabilities, resolved)).prompt
        layers = (one.prefixes[0].layers.values() for one in (found, lowered, prompt))
        for kept, made, read in zip(*layers, strict=True):
            assert same_array(kept.values, read.values)
            # Of a product, the last bit depends on where its numbers lie in memory.
            assert np.allclose(kept.keys, made.keys, rtol=1e-6, atol=1e-6)
            assert not np.allclose(kept.keys, read.keys, rtol=1e-2, atol=1e-2), "nothing was rotated"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("megabytes", type=int, nargs="*", default=[256])
    parser.add_argument("--small", type=int, default=200, help="how many small prefixes one process converts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where files are made: four times the largest must fit")
    given = parser.parse_args()
    print(heading())
    for megabytes in given.megabytes:
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            compare(Path(folder), f"{megabytes} MB", [4 * megabytes], given.rounds)
    if given.small:
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            compare(Path(folder), f"each of {given.small} of 2.5 MB", [SMALL] * given.small, given.rounds)


if __name__ == "__main__":
    main()
