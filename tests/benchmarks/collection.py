"""What converting a folder of small checkpoints costs: processor time of each, peak memory, and what a kill costs.

    python tests/benchmarks/collection.py --count 1000 --jobs 2

The checkpoints are of several formats, written without their toolkits. The command is run until half of them are done;
then all of its processes are killed, and the same command resumes. Processor time is that of all its processes. Memory
is the largest sum of what they have by themselves and their shares of what they have together. Nothing is asserted of
time. Linux only: orphans are adopted, so that their time is counted, too.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

import softbridge as sb
from softbridge.base.build import build
from softbridge.collection.record import unpack
from softbridge.geometry import read_geometry
from softbridge.testing import random_input_prompt, random_prefix

LENGTH = 20
#: A Llama of 8 layers: a prefix has 160 KB, a prompt 20 KB.
SIZES = {
    "num_hidden_layers": 8,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "intermediate_size": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
Make = Callable[..., sb.SoftPrompt]
#: Format, encoding, and what is in it; one after another.
KINDS: Sequence[tuple[str, str | None, Make]] = (
    ("peft", "safetensors", random_prefix),
    ("peft", "safetensors", random_input_prompt),
    ("peft", "bin", random_prefix),
    ("peft", "bin", random_input_prompt),
    ("adapterhub", "bin", random_prefix),
    ("adapterhub", "safetensors", random_prefix),
    ("softbridge", None, random_prefix),
    ("mlx", None, random_prefix),
    ("vllm", None, random_input_prompt),
    ("tgis", None, random_input_prompt),
)
COMMAND = [sys.executable, "-c", "from softbridge.cli import main; main()", "convert"]
BECOME_SUBREAPER = 36  # prctl


@dataclass
class Run:
    """A run of the command: seconds, bytes, and what it said."""

    wall: float
    processor: float
    memory: int
    said: Mapping[str, Any]


def make(folder: Path, count: int) -> Path:
    """A folder of checkpoints, a hundred in each of its folders; the base model's directory beside it."""
    config = AutoConfig.for_model("llama", **SIZES)
    build(config, "causal-lm", torch.float32, 0).save_pretrained(folder / "base")
    geometry = read_geometry(config)
    for number in range(count):
        form, encoding, prompt = KINDS[number % len(KINDS)]
        place = folder / "in" / str(number // 100) / f"{number}-{form}"
        made = prompt(geometry, LENGTH, seed=number)
        sb.save(made, place, format=form, encoding=encoding, base=config)
    return folder / "in"


def memory_of(session: int) -> int:
    """Bytes that the processes of a session hold, shared ones shared out."""
    total = 0
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if int((path / "stat").read_text().rpartition(")")[2].split()[3]) == session:
                lines = (path / "smaps_rollup").read_text().splitlines()
                total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
        except (OSError, ValueError, StopIteration):  # it has ended
            continue
    return total


def run(arguments: Sequence[str], until: Callable[[], bool] | None = None) -> Run:
    """Run the command, or kill all of its processes as soon as `until` says so."""
    began = time.perf_counter()
    process = subprocess.Popen([*COMMAND, *arguments], start_new_session=True, stdout=subprocess.PIPE, text=True)
    peak, said = 0, ""

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            peak = max(peak, memory_of(process.pid))
            if until is not None and until():
                os.killpg(process.pid, signal.SIGKILL)
            time.sleep(0.02)

    before = os.times()
    watcher = threading.Thread(target=watch)
    watcher.start()
    assert process.stdout is not None
    said = process.stdout.read()
    watcher.join()
    wall = time.perf_counter() - began
    try:
        while True:  # the orphans, which are ours
            os.wait()
    except ChildProcessError:
        pass
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return Run(wall, spent, peak, json.loads(said) if until is None else {})


def measure(name: str, source: Path, arguments: Sequence[str], count: int) -> None:
    """A whole run, one that is killed half-way, the run that resumes it, and one with nothing to do."""
    with tempfile.TemporaryDirectory() as folder:
        out, killed = Path(folder, "whole"), Path(folder, "killed")

        def half() -> bool:
            try:
                return (killed / "softbridge-collection.jsonl.journal").read_bytes().count(b'"verdict"') >= count // 2
            except OSError:
                return False

        runs = {
            "whole": run([str(source), str(out), *arguments]),
            "killed half-way": run([str(source), str(killed), *arguments], half),
            "resumed": run([str(source), str(killed), *arguments]),
            "nothing to do": run([str(source), str(killed), *arguments]),
        }
        records = [unpack(place / "softbridge-collection.jsonl").records for place in (out, killed)]
        # Of a product, the last bit depends on where its numbers lie in memory: what the base model is run for differs.
        made, again = ([replace(one, target={"files": [*one.target.get("files", ())]}) for one in r] for r in records)
        assert made == again, "the manifest of a run that was killed and resumed is that of one that was not"
        assert runs["nothing to do"].said["taken_over"] == runs["whole"].said["counts"]["converted"]
        print(f"\n{name}: {json.dumps(runs['whole'].said['counts'])}")
        print(f"{'':17}{'wall':>8}{'processor':>11}{'each':>10}{'memory':>10}  taken over")
        for what, one in runs.items():
            done = count // 2 if what == "killed half-way" else count
            print(
                f"{what:17}{one.wall:7.1f}s{one.processor:10.1f}s{one.processor / done * 1e3:8.1f}ms"
                f"{one.memory / 2**20:8.0f}MB  {one.said.get('taken_over', '')}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the checkpoints are made; kept if it is there")
    asked = parser.parse_args()
    ctypes.CDLL(None).prctl(BECOME_SUBREAPER, 1, 0, 0, 0)
    folder = asked.folder or Path(tempfile.mkdtemp())
    try:
        source = folder / "in" if (folder / "in").is_dir() else make(folder, asked.count)
        common = ["--recursive", "--json", "--jobs", str(asked.jobs)]
        measure("to softbridge", source, ["--to", "softbridge", *common], asked.count)
        base = ["--base", str(folder / "base")]
        measure("to adapterhub, with the base's weights", source, ["--to", "adapterhub", *base, *common], asked.count)
    finally:
        if asked.folder is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
