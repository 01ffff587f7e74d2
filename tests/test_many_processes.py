"""Two processes train the prompt that one trains, and save it once, whole."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import softbridge as sb
from softbridge.testing import agreement

SCRIPT = Path(__file__).with_name("many_processes.py")


def apart(a: sb.SoftPrompt, b: sb.SoftPrompt) -> float:
    """Relative to the largest number; of the parameterisation, too."""
    pairs = list(zip(a.arrays(), b.arrays(), strict=True))
    return max(float(np.abs(x - y).max() / np.abs(y).max()) for (_, x), (_, y) in pairs)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Any]:
    """What two processes left, and the script as a module."""
    folder = tmp_path_factory.mktemp("two")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    # No time-out, which a busy machine would trip: gloo gives up a call that the other process never joins by itself.
    done = subprocess.run([*launch, SCRIPT, folder], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return folder, json.loads((folder / "told.json").read_text()), module


def test_ddp(both: tuple[Path, dict[str, Any], Any], tmp_path: Path) -> None:
    folder, told, module = both
    assert told["wrapped"] == "DistributedDataParallel"
    module.with_trainer(tmp_path)
    alone = sb.load(tmp_path)
    assert apart(sb.load(folder / "trainer"), alone) <= agreement(module.tiny_model("llama"))
    assert apart(sb.load(folder / "trainer"), sb.extract(module.attached())) > 0.01
    files = {path.name for path in (folder / "trainer" / "checkpoint-4").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "model.safetensors"} <= files


def test_fsdp2(both: tuple[Path, dict[str, Any], Any], tmp_path: Path) -> None:
    """Through torch's own `fully_shard`: accelerate does not shard where there is no accelerator."""
    folder, told, module = both
    assert told["sharded"] > 20
    assert told["accelerate"] == "DistributedType.MULTI_CPU", "the trainer can be asked for FSDP on a CPU now"
    module.whole(tmp_path)
    alone = sb.load(tmp_path)
    assert apart(sb.load(folder / "shards"), alone) <= agreement(module.tiny_model("llama"))
    assert apart(sb.load(folder / "shards"), sb.extract(module.attached())) > 0.01


def test_a_tensor_parallel_plan(both: tuple[Path, dict[str, Any], Any]) -> None:
    _, told, _ = both
    assert told["distance"] < 1e-5 < 0.1 < told["effect"]
    assert "[tensor-parallel]" in told["refused"], "and not in the middle of a step"
