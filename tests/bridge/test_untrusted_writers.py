"""A conversion whose writer is wrong is refused, a dry run knows its sizes, and memory is little more than the file."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import softbridge as sb
from softbridge.base import BaseModel
from softbridge.errors import CheckpointError, OutputError, SoftbridgeError
from softbridge.plugin.registry import format_named
from softbridge.prompt import SoftPrompt
from softbridge.testing import random_prefix, tiny_config
from softbridge.untrusted import Content, Streamed

# --- a writer that is broken ------------------------------------------------------------------------------------------


def number(prompt: SoftPrompt) -> SoftPrompt:
    """One number is the next one that there is."""
    (prefix,) = prompt.prefixes
    values = prefix.layers[1].values.copy()
    values[-1, -1, -1] = np.nextafter(values[-1, -1, -1], np.float32(9))
    return replace(
        prompt, parts=(replace(prefix, layers={**prefix.layers, 1: replace(prefix.layers[1], values=values)}),)
    )


def swapped(prompt: SoftPrompt) -> SoftPrompt:
    """The keys of two layers stand in each other's place."""
    (prefix,) = prompt.prefixes
    a, b = prefix.layers[0], prefix.layers[1]
    layers = {**prefix.layers, 0: replace(a, keys=b.keys), 1: replace(b, keys=a.keys)}
    return replace(prompt, parts=(replace(prefix, layers=layers),), training=None)


def bit(content: Content, prompt: SoftPrompt) -> Content:
    """A number of the prompt has another bit in the file, which is else as it should be."""
    whole = bytearray(bytes(content))
    place = whole.find(prompt.prefixes[0].layers[1].values[0, 0, :4].tobytes())
    assert place > 0
    whole[place] ^= 1
    return Streamed(lambda sink: sink.write(bytes(whole)))


FORMATS = {
    "softbridge": None,
    "peft": "safetensors",
    "peft-bin": "bin",
    "adapterhub": "safetensors",
    "adapterhub-bin": "bin",
    "mlx": None,
    "vllm": None,
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("fault", ["none", "number", "swapped", "bit", "missing", "empty"])
def test_what_is_written_otherwise_is_refused(
    name: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, form = tiny_config("llama"), format_named(name.removesuffix("-bin"))
    prompt, right = random_prefix(BaseModel(config).geometry, length=5), type(form).write

    def wrong(self: Any, given: SoftPrompt, *rest: Any) -> dict[str, Content]:
        change = {"number": number, "swapped": swapped}.get(fault)
        files = dict(right(self, given if change is None else change(given), *rest))
        last = list(files)[-1]  # the weights
        if fault == "bit":
            files[last] = bit(files[last], given)
        elif fault == "empty":
            files[last] = Streamed(lambda sink: None)
        elif fault == "missing":
            files["nothing.txt"] = b""
            del files[last]
        return files

    monkeypatch.setattr(type(form), "write", wrong)
    target = tmp_path / "out"

    def save() -> None:
        sb.save(prompt, target, format=form.name, base=config, encoding=FORMATS[name], accept=["positions", "window"])

    if fault == "none":
        save()
        assert target.is_dir()
        return
    with pytest.raises(SoftbridgeError) as caught:
        save()
    assert isinstance(caught.value, OutputError if fault in ("number", "swapped") else (OutputError, CheckpointError))
    if fault in ("number", "swapped"):
        assert "reads back differently" in str(caught.value)
        assert ("layers.1.values" if fault == "number" else "layers.0.keys, self.layers.1.keys") in str(caught.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", FORMATS)
def test_a_dry_run_knows_the_sizes(name: str, tmp_path: Path) -> None:
    config = tiny_config("llama")
    prompt = random_prefix(BaseModel(config).geometry, length=5)
    sb.save(prompt, tmp_path / "in", format="softbridge", base=config)

    def sizes(dry: bool) -> Mapping[str, int]:
        form, encoding = name.removesuffix("-bin"), FORMATS[name]
        asked: Any = {"base": config, "encoding": encoding, "accept": ["positions", "window"], "dry_run": dry}
        return sb.convert(tmp_path / "in", tmp_path / "out", form, **asked).files

    found = sizes(dry=True)
    assert not (tmp_path / "out").exists()
    assert sizes(dry=False) == found
    assert found == {name: (tmp_path / "out" / name).stat().st_size for name in found}
    assert set(os.listdir(tmp_path / "out")) == {*found, "softbridge.json"}


# --- memory -----------------------------------------------------------------------------------------------------------


#: Prints how much more memory than before, in sizes of the source, the process had at most after each conversion.
MEMORY = """
    import os, resource, sys
    from pathlib import Path
    import numpy as np
    import torch, transformers
    import softbridge as sb
    from softbridge.plugin.registry import format_named
    from softbridge.testing import tiny_config
    from softbridge.untrusted import write, safetensors_file, json_bytes

    folder = Path(sys.argv[1])
    sizes = dict(num_hidden_layers=4, hidden_size=512, num_attention_heads=8, num_key_value_heads=8)
    config = tiny_config("llama", **sizes, max_position_embeddings=8192)
    length, columns = 4096, 4 * 2 * 512
    said = {
        "peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": length, "token_dim": 512,
        "num_transformer_submodules": 1, "num_attention_heads": 8, "num_layers": 4, "encoder_hidden_size": 512,
        "prefix_projection": False,
    }

    def source():
        numbers = np.random.default_rng(0).standard_normal((length, columns), dtype=np.float32)
        file = safetensors_file({"prompt_embeddings": numbers})
        write(folder / "in", {"adapter_config.json": json_bytes(said), "adapter_model.safetensors": file})
        return len(file)

    def peak():  # not what getrusage says, which begins with the parent's
        with open("/proc/self/status") as status:
            (line,) = (line for line in status if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024

    base = sb.BaseModel.resolve(config)
    base.positions.rotation(length), base.positions.depends_on_length  # which runs a model
    for name in ("softbridge", "peft", "adapterhub"):  # whatever is imported
        prompt = sb.testing.random_prefix(base.geometry, 4)
        sb.save(prompt, folder / "first" / name, format=name, base=config)
    if os.fork() == 0:
        source()
        os._exit(0)
    os.wait()
    size, before = length * columns * 4, int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
    for name in sys.argv[2:]:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is of what follows
        if name == "bytes":
            form = type(format_named("softbridge"))
            right = form.write
            form.write = lambda *given: {name: bytes(content) for name, content in right(*given).items()}
        to = "softbridge" if name == "bytes" else name
        sb.convert(folder / "in", folder / "out" / name, to, base=base)
        print(name, (peak() - before) / size, flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="what a map counts as, and in which unit, is Linux's")
def test_memory_is_little_more_than_the_file(tmp_path: Path) -> None:
    """The source's numbers, and rotated ones; a writer that gives bytes has them once more, which shows."""

    def measured(*names: str) -> dict[str, float]:
        command = [sys.executable, "-c", textwrap.dedent(MEMORY), str(tmp_path / names[0]), *names]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return {name: float(much) for name, much in (row.split() for row in done.stdout.splitlines())}

    found = measured("peft", "softbridge", "adapterhub", "bytes")
    assert found["peft"] <= 1.4
    assert found["softbridge"] <= 1.4
    assert found["bytes"] >= 1.9
    assert found["adapterhub"] <= 2.5
