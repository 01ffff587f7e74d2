"""P-tuning's prompts (LAMA and PT-Fewshot), against rows of word embeddings with the vectors among them by hand.

Files are made by encoders that are built here as that program builds them, with what it saves beside them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig

import softbridge as sb
from softbridge import untrusted
from softbridge.base import build
from softbridge.errors import BaseModelError, CheckpointError, LoweringError
from softbridge.methods import rematerialise
from softbridge.prompt import SoftPrompt
from softbridge.template import Field, Slot, Template, Virtual, Words
from softbridge.testing import TINY, agreement, apart, tiny_config
from softbridge_archive import ptuning, ptuning_fewshot

FAR = 0.05
HEAD = [50, 51, 52]
MASK = 103
#: Name that LAMA knows a model by -> the family, and the row around the head for the template (3, 2, 1); -1: virtual.
ROWS: dict[str, tuple[str, list[int]]] = {
    "bert-base-cased": ("bert", [101, -1, -1, -1, MASK, -1, -1, *HEAD, -1, 102]),
    "roberta-large": ("roberta", [0, -1, -1, -1, MASK, -1, -1, *HEAD, -1, 2]),
    "gpt2-medium": ("gpt2", [-1, -1, -1, *HEAD, -1, -1]),
}


@cache
def model_of(family: str) -> Any:
    """With a vocabulary that has BERT's special tokens."""
    changes: dict[str, Any] = {"vocab_size": 128}
    if family == "gpt2":
        return build(tiny_config("gpt2", **changes), "causal-lm", torch.float64, 0)
    if family == "albert":
        changes |= {"embedding_size": 24, "num_hidden_groups": 1}
    settings = {**TINY["bert"], "pad_token_id": 1 if family == "roberta" else 0, **changes}
    return build(AutoConfig.for_model(family, **settings), "masked-lm", torch.float64, 0)


class Encoder(nn.Module):
    """LAMA's: H/2 in each direction."""

    def __init__(self, length: int, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(length, width)
        self.lstm_head = nn.LSTM(width, width // 2, 2, dropout=dropout, bidirectional=True, batch_first=True)
        self.mlp_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self) -> Tensor:
        return self.mlp_head(self.lstm_head(self.embedding.weight[None])[0])[0]


class FewShot(nn.Module):
    """PT-Fewshot's: an LSTM of H in each direction, or two linear layers alone."""

    def __init__(self, length: int, width: int, kind: str) -> None:
        super().__init__()
        self.prompt_embeddings = nn.Embedding(length, width)
        if kind == "lstm":
            self.lstm_head = nn.LSTM(width, width, 2, bidirectional=True, batch_first=True)
            self.mlp_head = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, width))
        else:
            self.mlp = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self) -> Tensor:
        rows = self.prompt_embeddings.weight[None]
        return (self.mlp_head(self.lstm_head(rows)[0]) if hasattr(self, "lstm_head") else self.mlp(rows))[0]

    def state(self) -> dict[str, Any]:
        """One dictionary for each module."""
        return {name: module.state_dict() for name, module in self.named_children()}


def large(encoder: Any, dtype: torch.dtype) -> Any:
    """With vectors of standard deviation about 1, so that they show."""
    torch.manual_seed(5)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.5)
    return encoder.to(dtype).eval()


def lama_encoder(model: str = "bert-base-cased", dtype: torch.dtype = torch.float64) -> Any:
    return large(Encoder(5 if "gpt" in model else 6, 32), dtype)


def lama_file(path: Path, model: str = "bert-base-cased", dtype: torch.dtype = torch.float64, **said: Any) -> Path:
    """As `cli.py` writes it."""
    arguments = {
        "relation_id": "P19",
        "model_name": model,
        "template": (3, 2, 1),
        "lr": 1e-5,
        "lstm_dropout": 0.25,
        "use_lm_finetune": False,
        "use_original_template": False,
        "vocab_strategy": "shared",
        "seed": 34,
        "device": torch.device("cpu"),
        "out_dir": "/somewhere",
    }
    checkpoint = {
        "embedding": lama_encoder(model, dtype).state_dict(),
        "dev_hit@1": 0.5,
        "test_hit@1": 0.25,
        "test_size": 944,
        "ckpt_name": "epoch_3_dev_50.0_test_25.0.ckpt",
        "time": datetime.datetime(2021, 3, 18, 12, 30),
        "args": argparse.Namespace(**{**arguments, **said}),
    }
    torch.save(checkpoint, path)
    return path


#: Of the family of the few-shot model, with its words.
PATTERN = Template((Words((101,)), Field("premise"), Words((102,)), Virtual(2), Slot(), Virtual(1), Words((119, 102))))
PATTERN_ROW = [101, *HEAD, 102, -1, -1, MASK, -1, 119, 102]


def fewshot_folder(path: Path, kind: str, family: str = "bert", dtype: torch.dtype = torch.float64) -> Path:
    """The language model's folder, as far as it concerns a prompt, and where its virtual tokens stand."""
    path.mkdir()
    config = model_of(family).config
    torch.save(fewshot_encoder(kind, family, dtype).state(), path / "embeddings.pth")
    (path / "config.json").write_text(json.dumps(config.to_dict()))
    torch.save({"bert.embeddings.word_embeddings.weight": torch.ones(128, 32)}, path / "pytorch_model.bin")
    said = {"py/object": "pet.wrapper.WrapperConfig", "task_name": "rte", "pattern_id": 1, "model_type": family}
    (path / "wrapper_config.json").write_text(json.dumps({**said, "model_name_or_path": f"{family}-base"}))
    (path / "template.json").write_text(json.dumps(PATTERN.to_json()))
    return path


def fewshot_encoder(kind: str, family: str = "bert", dtype: torch.dtype = torch.float64) -> Any:
    return large(FewShot(3, model_of(family).get_input_embeddings().embedding_dim, kind), dtype)


#: Name -> makes such files below a path, and gives what to open.
FILES: dict[str, Callable[[Path], Path]] = {
    **{f"ptuning {name}": lambda path, name=name: lama_file(path / "epoch_3.ckpt", name) for name in ROWS},
    **{
        f"ptuning-fewshot {kind}": lambda path, kind=kind: fewshot_folder(path / "rte", kind)
        for kind in ("lstm", "mlp")
    },
}


def by_hand(family: str, row: list[int], vectors: Tensor) -> Tensor:
    """The model on a row of word embeddings, with the n-th vector in the place of the n-th virtual token."""
    model = model_of(family)
    ids = torch.tensor([row])
    words = model.get_input_embeddings()(ids.clamp(min=0))
    words[ids == -1] = vectors
    return model(inputs_embeds=words, attention_mask=torch.ones_like(ids)).logits


def run(family: str, prompt: SoftPrompt, row: list[int]) -> Tensor:
    """In the native engine."""
    model, ids = model_of(family), torch.tensor([row])
    sb.attach(model, prompt, accept=["partial"])
    try:
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    finally:
        sb.detach(model)


def row_of(prompt: SoftPrompt, **texts: list[int]) -> list[int]:
    template = prompt.inputs[0].template
    assert template is not None
    return template.fill(texts, MASK)


def check(family: str, prompt: SoftPrompt, row: list[int], filled: list[int], vectors: Tensor) -> None:
    """Equal to the row by hand, and far from it with other vectors, other places, or none."""
    assert apart(prompt.inputs[0].vectors, vectors) <= 1e-12
    expected = by_hand(family, row, vectors)
    assert filled == row
    assert apart(run(family, prompt, filled), expected) <= agreement(
        model_of(family), input_ids=torch.tensor([row]).clamp(min=0)
    )
    assert apart(by_hand(family, row, vectors.roll(1, 0)), expected) > FAR
    assert apart(by_hand(family, row, torch.zeros_like(vectors)), expected) > FAR
    place = row.index(HEAD[0])
    moved = [*row[: place - 1], row[place], row[place - 1], *row[place + 1 :]]  # what stands before the text, behind it
    assert apart(by_hand(family, moved, vectors), expected) > FAR
    bare = [token for token in row if token >= 0]
    keep = torch.tensor(row) >= 0
    assert apart(model_of(family)(input_ids=torch.tensor([bare])).logits, expected[:, keep]) > FAR


@pytest.mark.parametrize("name", ROWS)
@torch.no_grad()
def test_lama_computes_what_the_row_by_hand_does(name: str, tmp_path: Path) -> None:
    family, row = ROWS[name]
    prompt = sb.load(lama_file(tmp_path / "epoch_3_dev_50.0_test_25.0.ckpt", name))
    answer = [MASK] if family == "gpt2" else []  # what stands in the slot of a causal model it does not see
    check(family, prompt, [*row, *answer], row_of(prompt, head=HEAD), lama_encoder(name)())
    assert prompt.base.name == name
    assert prompt.training is not None
    assert prompt.training.settings["dropout"] == 0.25
    assert rematerialise(prompt) == prompt


@pytest.mark.parametrize(("kind", "family"), [("lstm", "bert"), ("mlp", "bert"), ("lstm", "albert")])
@torch.no_grad()
def test_fewshot_computes_what_the_row_by_hand_does(kind: str, family: str, tmp_path: Path) -> None:
    prompt = sb.load(fewshot_folder(tmp_path / "rte", kind, family))
    check(family, prompt, PATTERN_ROW, row_of(prompt, premise=HEAD), fewshot_encoder(kind, family)())
    assert rematerialise(prompt) == prompt
    assert prompt.base.name == f"{family}-base"
    assert prompt.origin is not None
    assert prompt.origin.details["task_name"] == "rte"


@torch.no_grad()
def test_without_a_third_group_bert_reads_a_full_stop(tmp_path: Path) -> None:
    encoder = large(Encoder(5, 32), torch.float64)
    saved = lama_file(tmp_path / "epoch.ckpt", template=(3, 2, 0))
    checkpoint = torch.load(saved, weights_only=False)
    torch.save({**checkpoint, "embedding": encoder.state_dict()}, saved)
    prompt = sb.load(saved)
    row = [101, -1, -1, -1, MASK, -1, -1, *HEAD, 119, 102]
    check("bert", prompt, row, row_of(prompt, head=HEAD), encoder())


@torch.no_grad()
def test_a_model_that_lama_does_not_know_needs_a_template(tmp_path: Path) -> None:
    row = [7, -1, -1, MASK, -1, *HEAD, -1, -1, -1]
    template = Template((Words((7,)), Virtual(2), Slot(), Virtual(1), Field("head"), Virtual(3)))
    lama_file(tmp_path / "epoch.ckpt", model_name="/models/bert-base-klingon")
    with pytest.raises(
        CheckpointError, match=r"bert-base-klingon', whose tokens are not known here(.|\n)*template\.json"
    ):
        sb.load(tmp_path)
    (tmp_path / "template.json").write_text(json.dumps(template.to_json()))
    prompt = sb.load(tmp_path)
    check("bert", prompt, row, row_of(prompt, head=HEAD), lama_encoder()())
    lama_file(tmp_path / "epoch.ckpt", model_name="/models/bert-base-cased")
    assert row_of(sb.load(tmp_path), head=HEAD) == ROWS["bert-base-cased"][1]


@torch.no_grad()
def test_what_an_old_torch_saved_is_read(tmp_path: Path) -> None:
    saved = lama_file(tmp_path / "epoch.ckpt")
    expected = sb.load(saved)
    torch.save(torch.load(saved, weights_only=False), saved, _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(saved)
    assert sb.load(saved) == expected


def test_it_is_kept_whole_in_the_canonical_form(tmp_path: Path) -> None:
    source = lama_file(tmp_path / "epoch.ckpt")
    sb.convert(source, tmp_path / "out", "softbridge", base=model_of("bert"))
    back, read = sb.load(tmp_path / "out"), sb.load(source, base=model_of("bert"))
    assert back == read
    assert back.origin is not None
    assert back.origin.details["dev_hit@1"] == 0.5
    assert "out_dir" not in back.origin.details


def test_peft_has_no_templates(tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match="template"):
        sb.convert(lama_file(tmp_path / "epoch.ckpt"), tmp_path / "out", "peft", base=model_of("bert").config)


def test_the_encoder_goes_on_training(tmp_path: Path) -> None:
    """Gradients of every tensor of the encoder, through the native engine and through the row by hand."""
    prompt, model = sb.load(lama_file(tmp_path / "epoch.ckpt", lstm_dropout=0.0)), model_of("bert")
    row, encoder = ROWS["bert-base-cased"][1], lama_encoder()
    weight = torch.randn(1, len(row), 128, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (by_hand("bert", row, encoder()) * weight).sum().backward()
    sb.attach(model, prompt)
    try:
        ids = torch.tensor([row_of(prompt, head=HEAD)])
        (model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits * weight).sum().backward()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert len(trained) == len(list(encoder.parameters()))
        for tensor in encoder.parameters():
            (same,) = [parameter for parameter in trained if torch.equal(parameter, tensor)]
            assert apart(same.grad, tensor.grad) <= 1e-12
    finally:
        sb.detach(model)


# --- what is refused, and what is told --------------------------------------------------------------------------------


def test_what_the_files_lack_is_asked_for(tmp_path: Path) -> None:
    saved = fewshot_folder(tmp_path / "rte", "lstm")
    model = model_of("bert")
    with pytest.raises(LoweringError, match="the language model, which was trained with it"):
        sb.attach(model, sb.load(saved))
    (saved / "template.json").unlink()
    with pytest.raises(CheckpointError, match=r"where its virtual tokens stand(.|\n)*template\.json"):
        sb.load(saved)
    with pytest.raises(CheckpointError, match=r"template\.json beside it"):
        sb.load(saved / "embeddings.pth", base=model)
    (saved / "config.json").unlink()
    with pytest.raises(BaseModelError, match="give --base"):
        sb.load(saved)


def test_a_language_model_that_was_trained_too_is_asked_about(tmp_path: Path) -> None:
    prompt = sb.load(lama_file(tmp_path / "epoch.ckpt", use_lm_finetune=True))
    with pytest.raises(LoweringError, match="use_lm_finetune"):
        sb.attach(model_of("bert"), prompt)


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        saved = lama_file(path / "epoch.ckpt")
        checkpoint = torch.load(saved, weights_only=False)
        change(checkpoint)
        torch.save(checkpoint, saved)
        return saved

    return make


def argued(**said: Any) -> Callable[[Path], Path]:
    return lambda path: lama_file(path / "epoch.ckpt", **said)


def patterned(template: Any) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        saved = fewshot_folder(path / "rte", "mlp")
        (saved / "template.json").write_text(json.dumps(template))
        return saved

    return make


def twice(path: Path) -> Path:
    lama_file(path / "epoch_1.ckpt")
    lama_file(path / "epoch_2.ckpt")
    return path


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (argued(template=(3, 3, 3)), "6 vectors, and a template of 9"),
        (argued(template=(0, 0, 0)), r"the template \[0, 0, 0\]"),
        (argued(template=(3, 2)), r"the template \[3, 2\]"),
        (argued(template=(3, 2, -1)), r"the template \[3, 2, -1\]"),
        (argued(template="(3,2,1)"), "the template '"),
        (argued(model_name="bert-base-klingon"), "whose tokens are not known here"),
        (argued(model_name=7), "do not name the model"),
        (argued(use_original_template=True), "a template of words alone"),
        (argued(lstm_dropout=1.5), "dropout: a rate below 1"),
        (edited(lambda c: c.update(args=3)), "do not name the model"),
        (edited(lambda c: c["embedding"].pop("mlp_head.2.bias")), "missing linear.1.bias"),
        (edited(lambda c: c["embedding"].update(more=torch.ones(2))), "unexpected more"),
        (edited(lambda c: c["embedding"].update({"embedding.weight": torch.ones(6, 31)})), "has the shape"),
        (edited(lambda c: c["embedding"].update({"embedding.weight": torch.ones(6)})), "has the shape"),
        (edited(lambda c: c["embedding"]["lstm_head.bias_ih_l1"].fill_(torch.nan)), "finite"),
        (edited(lambda c: c["embedding"].update({"mlp_head.0.bias": torch.ones(32)})), "one floating-point type"),
        (twice, "holds 2 times a checkpoint of LAMA"),
        (patterned({"pieces": [], "verbaliser": None}), "at least one virtual token"),
        (patterned({"pieces": [{"virtual": 2}], "verbaliser": None}), "3 vectors, and a template of 2"),
        (patterned({"pieces": 3, "verbaliser": None}), r"template\.json"),
        (patterned({"pieces": [{"virtual": "x"}], "verbaliser": None}), r"template\.json"),
        (patterned({"pieces": [{"virtual": 3}], "verbaliser": [[1, 2], [3, 4]]}), r"template\.json"),
        (patterned([]), r"template\.json"),
    ],
)
def test_what_does_not_fit_is_refused(make: Callable[[Path], Path], found: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=found) as refused:
        sb.load(make(tmp_path))
    assert refused.value.expected
    assert refused.value.remedy


def test_nothing_in_a_checkpoint_is_executed(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "executed",))

    saved = edited(lambda c: setattr(c["args"], "device", Hostile()))(tmp_path)
    (tmp_path / "executed").unlink(missing_ok=True)
    assert sb.load(saved).inputs[0].length == 6
    assert not (tmp_path / "executed").exists()


def test_other_files_are_not_taken_for_it(tmp_path: Path) -> None:
    encoder = lama_encoder()
    others = (
        encoder.state_dict(),  # it does not say where its vectors stand
        {"embedding": encoder.state_dict()},
        {"embedding": torch.ones(6, 32), "args": argparse.Namespace()},
        {"prompt_embeddings": torch.ones(3, 32), "mlp": {}},
        {"prompt_embeddings": torch.ones(3, 32)},
        {**fewshot_encoder("mlp").state(), "epoch": 3},
        {"state": {0: {"exp_avg": torch.ones(3, 32)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        model_of("bert").state_dict(),
    )
    for number, content in enumerate(others):
        torch.save(content, tmp_path / f"{number}.pth")
        files = untrusted.Files(tmp_path / f"{number}.pth")
        assert not ptuning.sniff(files)
        assert not ptuning_fewshot.sniff(files)
