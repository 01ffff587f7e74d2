"""The model card beside written files: it says what is there, its program runs, and nothing from a file acts in it."""

from __future__ import annotations

import re
import shutil
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from markdown_it import MarkdownIt
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import softbridge as sb
from softbridge.base import BaseModel
from softbridge.base.build import build
from softbridge.checkpoint.card import BEGINS, CARD, UNNAMED, code_span, hub_base, model_card, prose
from softbridge.errors import OutputError
from softbridge.lowering.steps import Step
from softbridge.methods import MultitaskPromptTuning, rematerialise
from softbridge.plugin.registry import engines, format_named
from softbridge.prompt import Origin, SoftPrompt
from softbridge.testing import apart, random_adaption, random_input_prompt, random_prefix, tiny_config
from softbridge.untrusted import Files

TASKS = {"llama": "causal-lm", "gpt2": "causal-lm", "t5": "seq2seq-lm", "bert": "sequence-classification"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Base models with weights and a tokenizer."""
    folder = tmp_path_factory.mktemp("bases")
    words = {"[UNK]": 0, "a": 1, "text": 2, "</s>": 3}
    for kind, task in TASKS.items():
        config = tiny_config(kind, **({"num_labels": 3} if kind == "bert" else {}))
        build(config, task, torch.float32, 0).save_pretrained(folder / kind)  # type: ignore[arg-type]
        tokenizer = Tokenizer(models.WordLevel(words, "[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        names = ["input_ids", "attention_mask"]
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="</s>", model_input_names=names
        ).save_pretrained(folder / kind)
    return {kind: folder / kind for kind in TASKS}


def prompt_for(kind: str, base: Path, method: str) -> SoftPrompt:
    geometry = BaseModel.resolve(base).geometry
    if method == "tasks":
        return rematerialise(MultitaskPromptTuning(3, length=4).initialise(geometry, 0), 1)
    make = {
        "input": random_input_prompt,
        "prefix": random_prefix,
        "adaption": partial(random_adaption, joins="output"),
    }[method]
    prompt = make(geometry)
    if kind == "bert" and method == "prefix":  # where AdapterHub itself has real tokens
        prompt = replace(prompt, positions=replace(prompt.positions, start={"encoder": 0}))
    if kind != "bert":
        return prompt
    drawn = np.random.default_rng(0)
    head = {"classifier.weight": drawn.normal(size=(3, geometry.hidden)), "classifier.bias": drawn.normal(size=3)}
    return replace(prompt, head={name: array.astype(np.float32) for name, array in head.items()})


#: Format, its engine, family, method; what `save` is told.
PROGRAMS = [
    ("peft", "peft", "llama", "prefix", {}),
    ("peft", "peft", "bert", "input", {}),
    ("peft", "peft", "t5", "input", {"encoding": "bin"}),
    ("peft", "peft", "gpt2", "tasks", {}),
    ("peft", "peft", "gpt2", "adaption", {}),
    ("softbridge", "native", "llama", "prefix", {}),
    ("google", "native", "t5", "input", {}),
    ("adapterhub", "adapterhub", "llama", "prefix", {"encoding": "safetensors"}),
    ("adapterhub", "adapterhub", "bert", "prefix", {}),
]


@pytest.mark.parametrize(("form", "engine", "kind", "method", "told"), PROGRAMS, ids=lambda one: str(one))
def test_the_program_in_a_card_runs_and_is_the_prompt(
    form: str,
    engine: str,
    kind: str,
    method: str,
    told: dict[str, Any],
    bases: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reason = engines()[engine].unavailable()
    if reason is not None:
        pytest.skip(reason)
    prompt = prompt_for(kind, bases[kind], method)
    sb.save(prompt, tmp_path / "out", format=form, base=bases[kind], **told)
    (code,) = re.findall(r"^```python\n(.*?)^```$", (tmp_path / "out" / CARD).read_text(), re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    monkeypatch.chdir(tmp_path / "out")
    with redirect_stdout(StringIO()) as printed:
        exec(compile(code, "card", "exec"), names)
    assert "tensor" in printed.getvalue()

    bare = build(BaseModel.resolve(bases[kind]).config, TASKS[kind], torch.float32, 0).eval()  # type: ignore[arg-type]
    bare.load_state_dict(type(bare).from_pretrained(bases[kind]).state_dict())
    inputs = dict(names["row"])
    given = {"task_ids": torch.tensor([1])} if method == "tasks" else {}
    if kind == "t5":
        given = {"labels": inputs["input_ids"]}
    with torch.no_grad():
        found = names["model"](**inputs, **given).logits[:, -2:]
        given.pop("task_ids", None)
        without = bare(**inputs, **given).logits[:, -2:]
        reference = (
            engine if (kind, method) == ("bert", "prefix") else "native"
        )  # which runs it on transformers 5 alone
        expected = sb.attach(bare, prompt, engine=reference)(**inputs, **given).logits[:, -2:]
    assert apart(found, expected) < 1e-5
    assert apart(found, without) > 0.01


def test_the_card_says_what_was_done_and_found(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["llama"]
    prompt = replace(prompt_for("llama", base, "prefix"), base=replace(BaseModel.resolve(base).id, name="owner/llama"))
    sb.save(prompt, tmp_path / "source", format="peft", base=base)
    report = sb.convert(tmp_path / "source", tmp_path / "out", "softbridge", base=base, verify=True)
    card = (tmp_path / "out" / CARD).read_text()
    assert report.certificate is not None
    assert report.files[CARD] == len(card.encode())
    _, front, body = card.split("---\n", 2)
    tags = ["soft-prompt", "prefix-tuning", "softbridge"]
    expected = {"library_name": "softbridge", "base_model": "owner/llama", "base_model_relation": "adapter"}
    assert yaml.safe_load(front) == {**expected, "tags": tags}
    for said in (
        "5 virtual tokens in attention (self), in layers 0 to 2",
        f"`adapter_model.safetensors`, sha256 `{report.source.digests['adapter_model.safetensors']}`",
        "conditions that were accepted: none",
        f"{report.certificate.verdict}: prompt's effect {report.certificate.effect:.1e}",
        f"difference {report.certificate.worst:.1e}",
        "the source by peft and the files here by native",
    ):
        assert said in " ".join(body.split()), said
    unverified = sb.convert(tmp_path / "source", tmp_path / "again", "softbridge", base=base)
    assert unverified.certificate is None
    assert "- not verified\n" in (tmp_path / "again" / CARD).read_text()
    dry = sb.convert(tmp_path / "source", tmp_path / "dry", "softbridge", base=base, dry_run=True)
    assert dry.files == unverified.files
    assert not (tmp_path / "dry").exists()


def test_a_card_is_no_part_of_the_prompt(bases: dict[str, Path], tmp_path: Path) -> None:
    """It is there to be edited, or thrown away."""
    base = bases["llama"]
    for form in ("peft", "softbridge"):
        out = tmp_path / form
        sb.save(prompt_for("llama", base, "prefix"), out, format=form, base=base)
        before = sb.read(out, base=base)
        assert CARD not in before.digests
        assert CARD in sb.inspect(out, base=base)["others"]
        (out / CARD).write_text("edited")
        assert sb.load(out, base=base) == before.prompt
        (out / CARD).unlink()
        assert sb.load(out, base=base) == before.prompt


def test_one_file_has_no_card(bases: dict[str, Path], tmp_path: Path) -> None:
    report = sb.convert(_saved(bases, tmp_path), tmp_path / "one.safetensors", "softbridge", base=bases["llama"])
    assert CARD not in report.files
    assert {path.name for path in tmp_path.iterdir()} == {"source", "one.safetensors"}


def test_the_sources_own_card_is_not_lost_without_a_word(bases: dict[str, Path], tmp_path: Path) -> None:
    source = _saved(bases, tmp_path)
    assert not sb.convert(source, tmp_path / "ours", "softbridge").replaced, "a card of ours is made anew"
    (source / CARD).write_text("---\nlicense: mit\n---\nAn important prompt.\n")
    report = sb.convert(source, tmp_path / "out", "softbridge")
    assert report.replaced
    digest = Files(source).digest(CARD)
    assert (
        f"the source has a model card of its own (README.md, sha256 `{digest}`)"
        in (tmp_path / "out" / CARD).read_text()
    )
    assert "An important prompt" in (source / CARD).read_text()


def test_a_peft_card_of_theirs_still_says_the_release(bases: dict[str, Path], tmp_path: Path) -> None:
    source = _saved(bases, tmp_path)
    assert Files(source).begins(CARD, BEGINS)
    (source / CARD).write_text("### Framework versions\n\n- PEFT 0.10.0\n")
    assert CARD in sb.read(source, base=bases["llama"]).digests


def _saved(bases: dict[str, Path], tmp_path: Path) -> Path:
    sb.save(prompt_for("llama", bases["llama"], "prefix"), tmp_path / "source", format="peft", base=bases["llama"])
    return tmp_path / "source"


# --- what strangers wrote --------------------------------------------------------------------------------------------

HOSTILE = [
    "x\n---\nlicense: evil\n",
    "a/b\nlibrary_name: evil",
    "<script>alert(1)</script>",
    "![x](http://evil.example/x.png) [y](javascript:alert(1)) <http://evil.example>",
    "```\n# heading\n```",
    "`tick` ``two`` ```",
    "| a | b |\n|---|---|",
    "https://evil.example www.evil.example me@evil.example :smile: $x$ \\<b\\>",
    "&lt;b&gt; &#60;",
    "\u202egnp.exe\x00\x1b[31m",
    "- item",
    "1. item",
    "12) item",
    "# heading",
    "'''; import os; os.abort() #",
    "",
]
#: What cards consist of when nobody is hostile.
PLAIN = {"h1", "h2", "ul", "li", "p", "code", "fence"}


def kinds(text: str) -> set[str]:
    """What a reader of Markdown with tables, bare links and HTML makes of a text."""
    parser = MarkdownIt("gfm-like", {"linkify": False, "html": True}).disable("linkify")
    found = set()
    for token in parser.parse(text):
        found.add("fence" if token.type == "fence" else token.tag or token.type)
        found |= {child.tag or child.type for child in token.children or ()}
    return found - {"inline", "text", "softbreak", "text_special", "br"}


@pytest.mark.parametrize("text", HOSTILE)
def test_what_a_stranger_named_does_not_act(text: str, bases: dict[str, Path]) -> None:
    prompt = prompt_for("llama", bases["llama"], "prefix")
    prompt = replace(prompt, base=replace(prompt.base, name=text), head={text or "head": np.zeros((3, 32), np.float32)})
    step = Step("read", "exact", f"{text} and {text}")
    for form in ("peft", "adapterhub", "softbridge"):
        card = model_card(
            prompt,
            format_named(form),
            steps=[step, Step("positions", "conditional", text)],
            advice=[text],
            origin=Origin("peft", digests={text: "0" * 64}),
            verified=[text],
        ).decode()
        assert card.isprintable() or set(filter(lambda c: not c.isprintable(), card)) == {"\n"}
        _, front, body = card.split("---\n", 2)
        assert set(yaml.safe_load(front)) == {"library_name", "tags"}
        assert kinds(body) <= PLAIN
        for address in ("http://evil", "https://evil", "www.evil", "me@evil"):
            assert address not in re.sub(r"```python.*?```|`[^`]*`", "", body, flags=re.DOTALL)
        (code,) = re.findall(r"^```python\n(.*?)^```$", body, re.DOTALL | re.MULTILINE)
        constants = {value for value in compile(code, "card", "exec").co_consts if isinstance(value, str)}
        assert (text or UNNAMED) in constants


def test_the_guard_sees_what_acts() -> None:
    assert kinds("<b>x</b>") > {"html_inline"}
    assert "a" in kinds("[y](http://evil.example)")
    assert "table" in kinds("| a | b |\n|---|---|\n| c | d |")
    assert prose("use_cache=False: *now*") == r"use\_cache=False: \*now\*"
    assert code_span("a`b") == "`` a`b ``"
    assert code_span("") == "` `"


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("owner/name", True),
        ("Qwen/Qwen3-0.6B", True),
        (None, False),
        ("gpt2", False),
        ("/home/me/model", False),
        ("./a/b", False),
        ("a/b/c", False),
        ("a/b@main", False),
        ("a/b\n", False),
        ("a/b: c", False),
        ("tests/bridge", False),
    ],
)
def test_a_base_is_named_where_it_is_an_id(
    name: str | None, known: bool, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies here is a path."""
    monkeypatch.chdir(Path(__file__).parents[2])
    prompt = prompt_for("llama", bases["llama"], "prefix")
    assert hub_base(replace(prompt, base=replace(prompt.base, name=name))) == (name if known else None)


def test_a_failed_conversion_leaves_no_card(bases: dict[str, Path], tmp_path: Path) -> None:
    source = _saved(bases, tmp_path)
    (tmp_path / "out").mkdir()
    shutil.copy(source / "adapter_config.json", tmp_path / "out")
    with pytest.raises(OutputError):
        sb.convert(source, tmp_path / "out", "softbridge")
    assert not (tmp_path / "out" / CARD).exists()
