"""Files of every format are taken for what they are, and what is no prompt is taken for none."""

from __future__ import annotations

import argparse
import io
import json
import pickle
import random
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from specimens import OWN, Make, of_the_archive

import softbridge as sb
from softbridge.base import BaseModel
from softbridge.checkpoint.read import recognise
from softbridge.errors import SoftbridgeError, UnknownFormatError
from softbridge.plugin.registry import formats
from softbridge.testing import tiny_config, tiny_model
from softbridge.untrusted import Files
from softbridge_archive.tensor import CHOICES

# --- what is no prompt ------------------------------------------------------------------------------------------------


def model(family: str, *, safe: bool = True, name: str = "model") -> Make:
    def saved(folder: Path) -> Path:
        whole = tiny_model(family, torch.float32)
        state = {key: value.clone() for key, value in whole.state_dict().items()}
        whole.config.save_pretrained(folder / name)
        if safe:
            safetensors.torch.save_file(state, folder / name / "model.safetensors", {"format": "pt"})
        else:
            torch.save(state, folder / name / "pytorch_model.bin")
        return folder / name

    return saved


def sharded(folder: Path) -> Path:
    state = list(tiny_model("llama", torch.float32).state_dict().items())
    folder.mkdir(exist_ok=True)
    tiny_config("llama").save_pretrained(folder)
    for number, some in enumerate((state[::2], state[1::2]), 1):
        torch.save(dict(some), folder / f"pytorch_model-{number:05d}-of-00002.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {}}))
    return folder


def training(folder: Path) -> Path:
    """A checkpoint of the Trainer's: weights, optimiser, scheduler, random states, arguments."""
    path = model("gpt2", name="checkpoint-3")(folder)
    whole = tiny_model("gpt2", torch.float32)
    optimiser = torch.optim.AdamW(whole.parameters())
    whole(input_ids=torch.ones(1, 3, dtype=torch.long), labels=torch.ones(1, 3, dtype=torch.long)).loss.backward()
    optimiser.step()
    torch.save(optimiser.state_dict(), path / "optimizer.pt")
    torch.save({"last_epoch": 3, "_last_lr": [0.1]}, path / "scheduler.pt")
    torch.save({"python": random.getstate(), "cpu": torch.get_rng_state()}, path / "rng_state.pth")
    torch.save(argparse.Namespace(rate=0.1), path / "training_args.bin")
    (path / "trainer_state.json").write_text("{}")
    return path


def optimiser_alone(folder: Path) -> Path:
    training(folder)
    return folder / "checkpoint-3" / "optimizer.pt"


def lora(folder: Path) -> Path:
    peft = pytest.importorskip("peft")
    whole = peft.get_peft_model(tiny_model("llama", torch.float32), peft.LoraConfig(target_modules=["q_proj"]))
    whole.save_pretrained(folder / "lora")
    return folder / "lora"


def lora_without_its_configuration(folder: Path) -> Path:
    path = lora(folder)
    (path / "adapter_config.json").unlink()
    return path


def saved(name: str, value: Callable[[], Any]) -> Make:
    def made(folder: Path) -> Path:
        torch.save(value(), folder / name)
        return folder / name

    return made


def written(name: str, content: Callable[[], bytes]) -> Make:
    def made(folder: Path) -> Path:
        (folder / name).write_bytes(content())
        return folder / name

    return made


def zipped(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


def tarred(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


def table_of_words(folder: Path) -> Path:
    (folder / "words").mkdir()
    np.save(folder / "words" / "embeddings.npy", np.zeros((50, 8), np.float32))
    (folder / "words" / "vocab.txt").write_text("a\nb\n")
    return folder / "words"


def convolution() -> dict[str, Any]:
    return {"state_dict": torch.nn.Conv2d(3, 4, 3).state_dict(), "epoch": 3}


def dictionary(**shapes: tuple[int, ...]) -> dict[str, Any]:
    return {name.replace("__", "."): torch.zeros(shape) for name, shape in shapes.items()}


NO_PROMPT: dict[str, Make] = {
    **{f"a whole {family}": model(family) for family in ("bert", "gpt2", "t5", "llama", "gpt_neox")},
    "a whole bert, pickled": model("bert", safe=False),
    "a whole gpt2, pickled": model("gpt2", safe=False),
    "a sharded llama": sharded,
    "a training checkpoint": training,
    "an optimiser's state": optimiser_alone,
    "a LoRA adapter without its configuration": lora_without_its_configuration,
    "a convolution's checkpoint": saved("model.ckpt", convolution),
    "a recurrent network": saved("lstm.pt", lambda: torch.nn.LSTM(4, 4, bidirectional=True).state_dict()),
    "a perceptron": saved("mlp.pt", lambda: torch.nn.Sequential(torch.nn.Linear(4, 4)).state_dict()),
    "an embedding and a head": saved("a.pt", lambda: dictionary(embedding__weight=(50, 8), head__weight=(2, 8))),
    "a vector": saved("mean.pt", lambda: torch.zeros(8)),
    "images": saved("images.pt", lambda: torch.zeros(4, 3, 8, 8)),
    "whole numbers": saved("ids.pt", lambda: torch.zeros(4, 8, dtype=torch.long)),
    "numbers": saved("numbers.pt", lambda: [1.0, 2.0]),
    "nothing": saved("nothing.pt", dict),
    "an object": saved("arguments.bin", lambda: argparse.Namespace(prompt=torch.zeros(4, 8))),
    "a dictionary of scores": saved("scores.pt", lambda: {"train": 0.5, "text": "a b"}),
    "word vectors": table_of_words,
    "labels": written("labels.npy", lambda: npy(np.zeros(9, np.int64))),
    "a bare pickle": written("model.pkl", lambda: pickle.dumps({"tensor": torch.zeros(4, 8)})),
    "a zip of texts": written("texts.zip", lambda: zipped({"a.txt": b"a", "meta.json": b"{}"})),
    "a tar of texts": written("texts.tar", lambda: tarred({"a.txt": b"a", "config.yaml": b"a: 1\n"})),
    "a spreadsheet": written("table.xlsx", lambda: zipped({"[Content_Types].xml": b"", "xl/workbook.xml": b""})),
    "a JSON file": written("a.json", lambda: b'{"tensor": "abc", "metadata": {}}'),
    "a configuration": written("config.json", lambda: b'{"model_type": "gpt2", "pre_seq_len": 4}'),
    "ONNX": written("model.onnx", lambda: b"\x08\x07onnx"),
    "GGUF": written("model.gguf", lambda: b"GGUF\x03\0\0\0" + bytes(64)),
    "an empty file": written("empty", lambda: b""),
    "a text": written("notes.txt", lambda: b"soft_prompt"),
}


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


# --- tests ------------------------------------------------------------------------------------------------------------


def test_there_are_files_of_every_format_that_recognises_any() -> None:
    recognised = {name.split()[0] for name in {**OWN, **of_the_archive()}}
    assert recognised <= set(formats())
    assert recognised >= {name for name in formats() if ":" not in name} - set(CHOICES)
    assert len(OWN) + len(of_the_archive()) + len(NO_PROMPT) >= 80


@pytest.mark.parametrize("name", [*OWN, *of_the_archive()])
def test_a_prompt_is_taken_for_its_own_format_alone(name: str, tmp_path: Path) -> None:
    path = {**OWN, **of_the_archive()}[name](tmp_path)
    matches = [form.name for form in formats().values() if form.sniff(Files(path))]
    assert matches == [name.split()[0]]


@pytest.mark.parametrize("name", NO_PROMPT)
def test_what_is_no_prompt_is_in_no_known_format(name: str, tmp_path: Path) -> None:
    path = NO_PROMPT[name](tmp_path)
    with pytest.raises(UnknownFormatError, match=r"no known format|is no soft prompt, but"):
        recognise(Files(path))


def test_a_lora_adapter_is_pefts_and_no_prompt(tmp_path: Path) -> None:
    path = lora(tmp_path)
    assert recognise(Files(path)).name == "peft"
    with pytest.raises(SoftbridgeError, match="LORA"):
        sb.load(path)


@pytest.mark.parametrize("name", [*OWN, *of_the_archive(), *NO_PROMPT])
def test_no_reader_fails_on_another_toolkits_files(name: str, tmp_path: Path) -> None:
    """A format that is named by hand refuses what is not its own, or reads it; it raises nothing but our errors."""
    path = {**OWN, **of_the_archive(), **NO_PROMPT}[name](tmp_path)
    geometry = BaseModel(tiny_config("gpt2")).geometry
    for form in formats().values():
        for given in (None, geometry):
            try:
                form.read(Files(path), given)
            except SoftbridgeError as error:
                assert all((error.found, error.expected, error.remedy))  # noqa: PT017
