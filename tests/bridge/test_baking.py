"""A baked checkpoint is an ordinary one: its new words compute what the prompt computes, and are never an answer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

import softbridge as sb
from softbridge import baking
from softbridge.base import BaseModel, build
from softbridge.base.build import auto_class
from softbridge.cli import app
from softbridge.errors import LoweringError, OutputError, SoftbridgeError
from softbridge.prompt import InputPrompt, Positions, SoftPrompt
from softbridge.testing import FLOAT32_BOUND, apart, random_input_prompt, random_prefix

P = 4
SIZES: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {"num_key_value_heads": 2}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", GROUPED),
    "llama, tied": ("llama", {**GROUPED, "tie_word_embeddings": True}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gemma2": ("gemma2", {**GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8}),
    "opt, narrow words": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 16}),
    "phi, a bias in the head": ("phi", {"partial_rotary_factor": 0.5}),
    "bloom, a norm of words": ("bloom", {"n_layer": 2, "n_head": 4}),
    "t5": ("t5", {**T5, "tie_word_embeddings": False}),
}


def base_at(folder: Path, family: str, *, words: bool = False) -> Path:
    """The base model's folder, with the tokenizer of a language of letters where that is asked for."""
    name, more = FAMILIES[family]
    config = AutoConfig.for_model(name, **{**SIZES, **more})
    model = build(config, BaseModel(config).task, torch.float32, 0)
    model.save_pretrained(folder)
    if words:
        known = {"<pad>": 0, "<s>": 1, "</s>": 2, **{chr(97 + n): n + 3 for n in range(26)}}
        tokenizer = Tokenizer(models.WordLevel(known, unk_token="</s>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
        fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
        fast.save_pretrained(folder)
    return folder


def prompt_for(base: Path, seed: int = 0) -> SoftPrompt:
    return random_input_prompt(BaseModel.resolve(str(base)).geometry, P, seed=seed)


def load(folder: Path) -> Any:
    base = BaseModel.resolve(str(folder))
    kind = auto_class(base.task, base.config)
    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    more = {"decoder_input_ids": ids[:, -3:]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, **more).logits
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_words_compute_what_vectors_compute(family: str, tmp_path: Path) -> None:
    base = base_at(tmp_path / "base", family)
    prompts = {"one": prompt_for(base), "two": prompt_for(base, 1)}
    made = sb.bake(prompts, tmp_path / "out", base=str(base), verify=True)
    assert made.apart is not None
    assert made.effect is not None
    assert made.apart <= FLOAT32_BOUND < 0.01 < made.effect
    assert made.ids == {"one": tuple(range(90, 90 + P)), "two": tuple(range(90 + P, 90 + 2 * P))}

    baked, ids = load(tmp_path / "out"), torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    assert len(baked.get_input_embeddings().weight) == 90 + 2 * P
    for name, prompt in prompts.items():
        wanted = logits(sb.attach(load(base), prompt, self_check=False), ids)

        def of(front: tuple[int, ...], count: int = wanted.shape[1], words: int = wanted.shape[-1]) -> torch.Tensor:
            text = torch.cat([torch.tensor([front], dtype=torch.long).expand(2, -1), ids], 1)
            return logits(baked, text)[:, -count:, :words]

        own, other = made.ids[name], made.ids["two" if name == "one" else "one"]
        assert apart(of(own), wanted) <= FLOAT32_BOUND
        for wrong in (own[1:], (*own[1:], own[0]), other, ()):
            assert apart(of(wrong), wanted) > 0.01


@pytest.mark.parametrize("family", ["llama", "llama, tied", "gpt2", "gemma2", "phi, a bias in the head"])
def test_the_new_words_are_no_answers(family: str, tmp_path: Path) -> None:
    base = base_at(tmp_path / "base", family)
    made = sb.bake({"one": prompt_for(base)}, tmp_path / "out", base=str(base))
    baked, ids = load(tmp_path / "out"), torch.randint(3, 90, (5, 6), generator=torch.Generator().manual_seed(1))
    text = torch.cat([torch.tensor([made.ids["one"]]).expand(5, -1), ids], 1)
    assert int(logits(baked, text).argmax(-1).max()) < 90
    how = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    attached = sb.attach(load(base), prompt_for(base), self_check=False)
    wanted = attached.generate(input_ids=ids, **how)[:, -8:]
    assert torch.equal(baked.generate(input_ids=text, **how)[:, -8:], wanted)
    torch.manual_seed(0)
    sampled = baked.generate(input_ids=text, max_new_tokens=30, do_sample=True, temperature=50.0, pad_token_id=0)
    assert int(sampled[:, text.shape[1] :].max()) < 90


def test_a_tied_head_that_is_left_tied_would_answer_with_them(tmp_path: Path) -> None:
    """What untying is for: a row of the embedding that is long is a word that is often said."""
    base = base_at(tmp_path / "base", "llama, tied")
    prompt = prompt_for(base)
    loud = replace(prompt, parts=(replace(prompt.inputs[0], vectors=prompt.inputs[0].vectors * 8),))
    made = sb.bake({"one": loud}, tmp_path / "out", base=str(base))
    baked = load(tmp_path / "out")
    text = torch.tensor([[*made.ids["one"], 5, 6, 7, 8, 9, 10]])
    assert int(logits(baked, text).argmax(-1).max()) < 90
    baked.get_output_embeddings().weight = baked.get_input_embeddings().weight
    assert int(logits(baked, text).argmax(-1).max()) >= 90


def test_a_factor_of_the_embedding_is_divided_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where embedded words are multiplied and vectors are not, as Gemma's are from transformers 5.4 on."""
    base = base_at(tmp_path / "base", "gemma2")
    if baking._factor(load(base).get_input_embeddings()) == 1:
        pytest.skip("this transformers multiplies vectors, too")
    sb.bake({"one": prompt_for(base)}, tmp_path / "out", base=str(base), verify=True)
    monkeypatch.setattr(baking, "_factor", lambda words: 1.0)
    with pytest.raises(SoftbridgeError, match="differs from its prompts"):
        sb.bake({"one": prompt_for(base)}, tmp_path / "wrong", base=str(base), verify=True)
    assert not (tmp_path / "wrong").exists()


def test_the_tokenizer_knows_them(tmp_path: Path) -> None:
    base = base_at(tmp_path / "base", "llama", words=True)
    made = sb.bake(
        {"mood": prompt_for(base), "tone": prompt_for(base, 1)}, tmp_path / "out", base=str(base), verify=True
    )
    # The vocabulary has more rows than the tokenizer has words: the new ones take the first that are free.
    assert made.ids == {"mood": (29, 30, 31, 32), "tone": (33, 34, 35, 36)}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "".join(made.tokens["mood"]) + "abc"
    assert tokenizer(text)["input_ids"] == [1, *made.ids["mood"], 3, 4, 5]
    assert tokenizer("abc")["input_ids"] == [1, 3, 4, 5]
    assert json.loads((tmp_path / "out" / "softbridge_bake.json").read_text())["ids"]["tone"] == [33, 34, 35, 36]


def test_the_tokenizer_puts_one_in_front(tmp_path: Path) -> None:
    base = base_at(tmp_path / "base", "llama", words=True)
    prompt = prompt_for(base)
    made = sb.bake({"mood": prompt}, tmp_path / "out", base=str(base), in_front="mood", verify=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("abc", return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == [*made.ids["mood"], 1, 3, 4, 5]
    baked = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    wanted = logits(sb.attach(load(base), prompt, self_check=False), torch.tensor([[1, 3, 4, 5]]))
    known = [n for n in range(90) if n not in made.ids["mood"]]
    assert apart(logits(baked, ids)[:, P:, known], wanted[..., known]) <= FLOAT32_BOUND
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "abc"}], tokenize=False)
    assert chat == "".join(made.tokens["mood"]) + "abc"


def test_behind_the_first_token(tmp_path: Path) -> None:
    base = base_at(tmp_path / "base", "gpt2")
    vectors = np.random.default_rng(0).normal(0, 0.7, (P, 32)).astype(np.float32)
    prompt = SoftPrompt((InputPrompt(vectors, "decoder", placement="after-first-token"),), Positions({"decoder": P}))
    made = sb.bake({"one": prompt}, tmp_path / "out", base=str(base), verify=True)
    assert made.placement == {"one": "after-first-token"}
    with pytest.raises(SoftbridgeError, match=r"no fast tokenizer"):
        sb.bake({"one": prompt}, tmp_path / "other", base=str(base), in_front="one")


def test_refusals(tmp_path: Path) -> None:
    base = base_at(tmp_path / "base", "gpt2")
    prefix = random_prefix(BaseModel.resolve(str(base)).geometry)
    with pytest.raises(LoweringError, match="keys and values in attention"):
        sb.bake({"one": prefix}, tmp_path / "out", base=str(base))
    with pytest.raises(SoftbridgeError, match="a configuration only"):
        sb.bake({"one": prompt_for(base)}, tmp_path / "out", base=str(base / "config.json"))
    for names, in_front, said in (
        ({}, None, "letters, digits"),
        ({"a b": prompt_for(base)}, None, "letters, digits"),
        ({"one": prompt_for(base)}, "two", "no prompt is called 'two'"),
    ):
        with pytest.raises(SoftbridgeError, match=said):
            sb.bake(names, tmp_path / "out", base=str(base), in_front=in_front)
    assert not (tmp_path / "out").exists()
    sb.bake({"one": prompt_for(base)}, tmp_path / "out", base=str(base))
    with pytest.raises(OutputError, match="there already"):
        sb.bake({"one": prompt_for(base)}, tmp_path / "out", base=str(base))
    sb.bake({"one": prompt_for(base)}, tmp_path / "out", base=str(base), overwrite=True)


def test_a_tied_t5_scales_what_its_head_reads(tmp_path: Path) -> None:
    """Untied, it would not: the copy is another function, which `verify` says, and nothing is written."""
    config = AutoConfig.for_model("t5", **{**SIZES, **T5, "tie_word_embeddings": True})
    build(config, "seq2seq-lm", torch.float32, 0).save_pretrained(tmp_path / "base")
    prompt = prompt_for(tmp_path / "base")
    try:
        made = sb.bake({"one": prompt}, tmp_path / "out", base=str(tmp_path / "base"), verify=True)
    except SoftbridgeError as error:
        assert "differs from its prompts" in str(error)  # noqa: PT017
        assert not (tmp_path / "out").exists()
    else:
        assert made.apart is not None
        assert made.apart <= FLOAT32_BOUND


def test_the_command(tmp_path: Path) -> None:
    base = base_at(tmp_path / "base", "llama", words=True)
    for name, seed in (("mood", 0), ("tone", 1)):
        sb.save(prompt_for(base, seed), tmp_path / name, format="peft", base=str(base))
    target = str(tmp_path / "out")
    arguments = ["bake", str(tmp_path / "mood"), f"other={tmp_path / 'tone'}", target, "--base", str(base), "--verify"]
    done = CliRunner().invoke(app, [*arguments, "--in-front", "mood"])
    assert done.exit_code == 0, done.output
    assert "mood: tokens 29 to 32" in done.output
    assert "by the tokenizer itself" in done.output
    assert "differ by" in done.output
    assert CliRunner().invoke(app, arguments).exit_code == 2
    again = CliRunner().invoke(app, [*arguments, "--overwrite", "--json"])
    assert json.loads(again.output)["ids"]["other"] == [33, 34, 35, 36]
    assert CliRunner().invoke(app, ["bake", target, "--base", str(base)]).exit_code == 2
