"""Google's prompts: real ones, on the geometry they were trained for."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import softbridge as sb
from softbridge.arrays import to_torch
from softbridge.base import BaseModel, build
from softbridge.checkpoint.read import read
from softbridge.errors import BaseModelError, CheckpointError, SoftbridgeError, UnknownFormatError
from softbridge.testing import random_input_prompt, tiny_config

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "google_prompt_tuning" / "t5_1_1_lm100k_base"
REAL = pytest.mark.skipif(not SHARED.is_dir(), reason="the real prompts are not beside this checkout")


def t5_base(**changes: Any) -> Any:
    """T5 1.1 base, as google/t5-v1_1-base publishes it."""
    from transformers import T5Config

    sizes = {"d_model": 768, "d_kv": 64, "num_layers": 12, "num_decoder_layers": 12, "num_heads": 12, "d_ff": 2048}
    facts = {"feed_forward_proj": "gated-gelu", "vocab_size": 32128, "tie_word_embeddings": False}
    return T5Config(**{**sizes, **facts, "decoder_start_token_id": 0, **changes})


@cache
def whole_t5() -> Any:
    """Vocabulary and feed-forward are shrunk for the time it takes; the attention is whole."""
    return BaseModel(t5_base()).structure(torch.float64)


@REAL
@pytest.mark.parametrize("name", ["sst2", "mrpc"])
def test_a_released_prompt_runs_in_peft_as_if_prepended_by_hand(name: str, tmp_path: Path) -> None:
    """Encoder input and logits, against the vectors put in front of the embedded text without any toolkit."""
    peft = pytest.importorskip("peft")
    report = sb.convert(SHARED / f"{name}.npy", tmp_path / "out", "peft", base=t5_base())
    assert [step.name for step in report.steps] == []
    vectors = np.load(SHARED / f"{name}.npy")
    assert vectors.shape == (100, 768)

    model = whole_t5()
    ids = torch.randint(3, model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    answers = torch.randint(3, model.config.vocab_size, (2, 4), generator=torch.Generator().manual_seed(1))

    def by_hand(prompt: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        front = to_torch(prompt, torch.float64).expand(2, -1, -1)
        embedded = torch.cat([front, model.get_input_embeddings()(ids)], 1)
        whole = torch.cat([torch.ones(2, len(prompt), dtype=mask.dtype), mask], 1)
        with torch.no_grad():
            out = model(inputs_embeds=embedded, attention_mask=whole, decoder_input_ids=answers)
        return embedded, out.logits

    embedded, expected = by_hand(vectors)
    wrong = [by_hand(np.roll(vectors, 1, axis=0))[1], by_hand(vectors[1:])[1]]
    with torch.no_grad():
        bare = model(input_ids=ids, attention_mask=mask, decoder_input_ids=answers).logits

    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "out").eval()
    seen: list[torch.Tensor] = []
    encoder = loaded.get_base_model().get_encoder()
    encoder.register_forward_pre_hook(lambda _, a, kw: seen.append(kw["inputs_embeds"]), with_kwargs=True)
    with torch.no_grad():
        logits = loaded(input_ids=ids, attention_mask=mask, decoder_input_ids=answers).logits
    assert torch.equal(seen[0], embedded)
    assert torch.equal(logits, expected)
    for other in (*wrong, bare):
        assert (other - expected).abs().max() > 0.1


@REAL
def test_the_command_line_converts_and_proves_it(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from softbridge.cli.console import app

    # Two layers: the proof is the same, the whole geometry is shown above.
    t5_base(num_layers=2, num_decoder_layers=2).save_pretrained(tmp_path / "base")
    arguments = ["convert", str(SHARED / "sst2.npy"), str(tmp_path / "out"), "--to", "peft"]
    result = CliRunner().invoke(app, [*arguments, "--base", str(tmp_path / "base"), "--verify"])
    assert result.exit_code == 0, result.output
    assert "the same, bit for bit" in result.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "certificate.json",
        "softbridge.json",
    }


@REAL
def test_there_and_back_returns_the_released_bytes(tmp_path: Path) -> None:
    sb.convert(SHARED / "mrpc.npy", tmp_path / "peft", "peft", base=t5_base())
    sb.convert(tmp_path / "peft", tmp_path / "back.npy", "google", base=t5_base())
    assert (tmp_path / "back.npy").read_bytes() == (SHARED / "mrpc.npy").read_bytes()


def save(path: Path, array: np.ndarray) -> Path:
    with path.open("wb") as stream:
        np.save(stream, array)
    return path


GOOD = np.random.default_rng(0).normal(size=(5, 24)).astype(np.float32)


def test_a_file_without_suffix_is_read_like_t5x_writes_it(tmp_path: Path) -> None:
    prompt = sb.load(save(tmp_path / "encoder.prompt.prompt.prompt", GOOD))
    assert np.array_equal(prompt.inputs[0].vectors, GOOD)
    assert prompt.positions.start["encoder"] == 5


def test_an_array_beside_a_checkpoint_is_not_its_prompt(tmp_path: Path) -> None:
    config = tiny_config("t5")
    prompt = random_input_prompt(BaseModel(config).geometry)
    sb.save(prompt, tmp_path / "peft", format="peft", base=config)
    (tmp_path / "peft" / "softbridge.json").unlink()  # as PEFT writes it
    save(tmp_path / "peft" / "labels.npy", GOOD)
    assert read(tmp_path / "peft").format.name == "peft"
    (tmp_path / "peft" / "adapter_config.json").unlink()
    with pytest.raises(UnknownFormatError, match="no known format"):
        sb.load(tmp_path / "peft")


def test_a_folder_is_recognised_if_an_array_is_all_it_holds(tmp_path: Path) -> None:
    config = tiny_config("t5")
    prompt = random_input_prompt(BaseModel(config).geometry)
    sb.save(prompt, tmp_path / "source", format="softbridge", base=config)
    sb.convert(tmp_path / "source", tmp_path / "google", "google", base=config, verify=True)
    names = {path.name for path in (tmp_path / "google").iterdir()}
    assert names == {"prompt.npy", "softbridge.json", "certificate.json", "README.md"}
    assert read(tmp_path / "google").format.name == "google"
    (tmp_path / "google" / "softbridge.json").unlink()
    assert read(tmp_path / "google").format.name == "google"
    (tmp_path / "google" / "notes.txt").write_text("mine")
    with pytest.raises(UnknownFormatError, match="no known format"):
        sb.load(tmp_path / "google")
    assert read(tmp_path / "google", format="google").format.name == "google"


@pytest.mark.parametrize(
    ("array", "error", "found"),
    [
        (np.where(np.arange(24) == 3, np.nan, GOOD), CheckpointError, "finite"),
        (GOOD.reshape(5, 24, 1), BaseModelError, "a table for t5"),
        (GOOD.reshape(5, 24, 1, 1), CheckpointError, r"\[5, 24, 1, 1\]"),
        (GOOD.astype(np.int64), CheckpointError, "int64"),
        (GOOD[:, :20], BaseModelError, "width 20, the model's is 24"),
        (np.array([{"a": 1}], dtype=object), CheckpointError, r"\|O"),
    ],
    ids=["nan", "three axes", "four axes", "integers", "other base", "pickled objects"],
)
def test_bad_arrays_are_refused_and_nothing_is_written(
    array: np.ndarray, error: type[SoftbridgeError], found: str, tmp_path: Path
) -> None:
    source = tmp_path / "prompt.npy"
    np.save(source, array, allow_pickle=True)
    with pytest.raises(error, match=found) as refused:
        sb.convert(source, tmp_path / "out", "peft", base=tiny_config("t5"))
    assert refused.value.expected
    assert refused.value.remedy
    assert not (tmp_path / "out").exists()


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    source = save(tmp_path / "prompt.npy", GOOD)
    source.write_bytes(source.read_bytes()[:-7])
    with pytest.raises(CheckpointError):
        sb.load(source)


def test_an_unknown_file_is_refused_with_the_known_formats(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\x08\x07onnx")
    with pytest.raises(
        UnknownFormatError, match=r"model\.onnx(.|\n)*adapterhub, (.*, )?google, (.*, )?peft, (.*, )?softbridge"
    ):
        sb.load(tmp_path / "model.onnx")


def test_other_families_are_refused() -> None:
    model = build(tiny_config("gpt2"), "causal-lm", torch.float32, 0)
    with pytest.raises(BaseModelError, match="encoder, which gpt2 lacks"):
        sb.attach(model, sb.load(SHARED / "sst2.npy") if SHARED.is_dir() else _prompt())


def _prompt() -> sb.SoftPrompt:
    from softbridge.prompt import InputPrompt, Positions

    return sb.SoftPrompt((InputPrompt(GOOD, "encoder"),), Positions({"encoder": 5}))
