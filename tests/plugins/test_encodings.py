"""Every format writes its tensors in each of its encodings, and its own toolkit loads them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import softbridge as sb
from softbridge.base import BaseModel
from softbridge.errors import OutputError
from softbridge.lowering.matrix import rows
from softbridge.plugin.registry import formats
from softbridge.testing import random_prefix, tiny_config, tiny_model
from softbridge.untrusted import Files

SUFFIXES = {"safetensors": ".safetensors", "bin": ".bin"}
CASES = [(name, encoding) for name in rows() for encoding in formats()[name].encodings]  # the archive's have own tests


@pytest.mark.parametrize(("name", "encoding"), CASES)
def test_each_encoding_holds_the_same_prompt(name: str, encoding: str, tmp_path: Path) -> None:
    config = tiny_config("gpt2")
    prompt = random_prefix(BaseModel(config).geometry)
    sb.save(prompt, tmp_path / "out", format=name, base=config, accept=["positions"], encoding=encoding)
    kinds = {Files(tmp_path / "out").kind(file) for file in Files(tmp_path / "out").names if file != "README.md"}
    assert kinds - {"json"} == {"pickle" if encoding == "bin" else encoding}
    assert any(path.suffix == SUFFIXES[encoding] for path in (tmp_path / "out").iterdir())
    assert sb.load(tmp_path / "out", base=config).parts == prompt.parts


def test_there_are_all_of_them() -> None:
    assert {("peft", "bin"), ("peft", "safetensors"), ("adapterhub", "bin"), ("adapterhub", "safetensors")} < set(CASES)
    assert ("softbridge", "safetensors") in CASES


def test_another_encoding_is_refused(tmp_path: Path) -> None:
    config = tiny_config("gpt2")
    with pytest.raises(OutputError, match="does not store tensors as 'npy'"):
        sb.save(random_prefix(BaseModel(config).geometry), tmp_path / "out", format="peft", base=config, encoding="npy")
    assert not (tmp_path / "out").exists()


def test_adapterhub_loads_our_safetensors_though_it_cannot_save_its_own(tmp_path: Path) -> None:
    adapters = pytest.importorskip("adapters")
    config = tiny_config("llama")
    prompt = random_prefix(BaseModel(config).geometry)
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    found = []
    for encoding in ("bin", "safetensors"):
        sb.save(prompt, tmp_path / encoding, format="adapterhub", base=config, encoding=encoding)
        model = tiny_model("llama")
        with torch.no_grad():
            bare = model(input_ids=ids).logits
            adapters.init(model)
            safe = encoding == "safetensors"
            model.load_adapter(str(tmp_path / encoding), set_active=True, use_safetensors=safe)
            found.append(model(input_ids=ids, use_cache=False).logits)
    assert torch.equal(*found)
    assert (found[0] - bare).abs().max() > 0.1
