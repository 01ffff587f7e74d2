"""OpenPrompt's and OpenDelta's prompts, against what these toolkits computed themselves with the files that they wrote.

See `tests/golden/make_openprompt.py` and `make_opendelta.py`. RoBERTa, which OpenDelta has a prefix for, and the
placements of soft tokens that only a caller knows, are compared with references of this file.
"""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig

import softbridge as sb
from softbridge.arrays import to_torch
from softbridge.base import BaseModel, build
from softbridge.cloze import Cloze
from softbridge.errors import BaseModelError, CheckpointError, LoweringError
from softbridge.geometry import stack_of
from softbridge.methods import rematerialise
from softbridge.plugin.registry import formats
from softbridge.prompt import InputPrompt, KeyValue, SoftPrompt
from softbridge.template import Field, Slot, Template, Virtual
from softbridge.testing import TINY, agreement, apart
from softbridge.untrusted import Files

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
#: How far apart, relative to the largest number, another function is at least.
FAR = 1e-3
TEMPLATE = Template((Field("start"), Virtual(2), Field("text"), Virtual(1), Slot()))


@cache
def golden(name: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


def cases(toolkit: str) -> list[str]:
    return sorted(name.removesuffix(".logits") for name in golden(toolkit) if name.endswith(".logits"))


@cache
def settings(family: str) -> dict[str, Any]:
    with safe_open(GOLDEN / f"{'opendelta' if family == 'bart' else 'peft_bases'}.safetensors", "pt") as file:
        return dict(json.loads(file.metadata()[family]))


def config(family: str, **changes: Any) -> Any:
    return AutoConfig.for_model(family, **{**settings(family), **changes})


@cache
def weights(family: str) -> dict[str, torch.Tensor]:
    stored, marker = golden("opendelta" if family == "bart" else "peft_bases"), f"{family}.weights."
    return {name.removeprefix(marker): tensor for name, tensor in stored.items() if name.startswith(marker)}


def base(family: str, task: Any = None, **changes: Any) -> Any:
    """The base model of the golden files, anew."""
    model = build(config(family, **changes), task or BaseModel(config(family)).task, torch.float32, 0)
    missing, unexpected = model.load_state_dict(weights(family), strict=False)
    model.tie_weights()
    assert set(unexpected) <= ({"lm_head.weight"} if task else set())
    assert {name for name, _ in model.named_parameters()} & set(missing) <= {"lm_head.weight", "score.weight"}
    return model.double().eval()


def put(toolkit: str, case: str, folder: Path) -> Path:
    """The folder that the toolkit wrote, with a template beside it where it has one."""
    folder.mkdir(parents=True)
    for name, tensor in golden(toolkit).items():
        if name.startswith(f"{case}/"):
            (folder / name.split("/")[1]).write_bytes(zlib.decompress(tensor.numpy().tobytes()))
    if toolkit == "openprompt" and bool((golden(toolkit)[f"{case}.ids"] < 0).any()):
        (folder / "template.json").write_text(json.dumps(TEMPLATE.to_json()))
    return folder


def inputs(toolkit: str, case: str) -> dict[str, torch.Tensor]:
    family = case.split(".")[0]
    stored = golden("opendelta" if family == "bart" else "peft_bases")
    ids = golden(toolkit).get(f"{case}.ids", stored[f"{family}.input_ids"])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return batch | ({"decoder_input_ids": stored[f"{family}.labels"]} if f"{family}.labels" in stored else {})


def run(model: Any, batch: Mapping[str, torch.Tensor], prompt: SoftPrompt | None = None) -> torch.Tensor:
    """Logits, by the native engine where there is a prompt, without a head that this model does not have."""
    if prompt is not None and prompt.prefixes and not model._can_set_attn_implementation():
        pytest.skip(f"{model.config.model_type} does not dispatch here")
    if prompt is None:
        batch = {**batch, "input_ids": batch["input_ids"].clamp(min=3)}
    else:
        ours = {name for name, _ in model.named_parameters()}
        sb.attach(model, prompt if prompt.head.keys() <= ours else replace(prompt, head={}), accept=["partial"])
    with torch.no_grad():
        logits = model(**batch).logits
    if prompt is not None:
        sb.detach(model)
    return logits


def told_apart(prompt: SoftPrompt, relative: bool) -> bool:
    """Whether it matters where its real tokens stand; to a relative bias, only if a layer that has it has a prefix."""
    first = prompt.positions.unbiased_from
    biased = any(min(part.layers) < first.get(stack_of(part.site), 99) for part in prompt.prefixes)
    return biased if relative else not any(part.template for part in prompt.inputs)


def twins(prompt: SoftPrompt, relative: bool = False) -> Iterator[tuple[str, SoftPrompt]]:
    """Prompts that are almost this one, each another function."""
    if told_apart(prompt, relative):
        start = {stack: place + 1 for stack, place in prompt.positions.start.items()}
        yield "shifted", replace(prompt, positions=replace(prompt.positions, start=start))
    if prompt.positions.unbiased_from:
        yield "biased", replace(prompt, positions=replace(prompt.positions, unbiased_from={}))
    for number, part in enumerate(prompt.parts):
        if isinstance(part, InputPrompt):
            changed: dict[str, Any] = {"rolled": replace(part, vectors=np.roll(part.vectors, 1, axis=0))}
        else:
            pairs = part.layers
            turned = dict(zip(pairs, reversed(list(pairs.values())), strict=True))
            changed = {
                "rolled keys": replace(part, layers={n: with_keys(p, np.roll(p.keys, 1, 1)) for n, p in pairs.items()}),
                "swapped": replace(part, layers={n: KeyValue(p.values, p.keys) for n, p in pairs.items()}),
                **({"reversed": replace(part, layers=turned)} if len(pairs) > 1 else {}),
            }
        for name, other in changed.items():
            parts = [other if n == number else one for n, one in enumerate(prompt.parts)]
            yield f"{name} {number}", replace(prompt, parts=tuple(parts))


def with_keys(pair: KeyValue, keys: np.ndarray) -> KeyValue:
    return KeyValue(keys, pair.values)


ALL = [(toolkit, case) for toolkit in ("opendelta", "openprompt") for case in cases(toolkit)]


@pytest.mark.parametrize(("toolkit", "case"), ALL, ids=[" ".join(pair) for pair in ALL])
def test_a_prompt_runs_as_in_its_toolkit(toolkit: str, case: str, tmp_path: Path) -> None:
    family = case.split(".")[0]
    model, batch = base(family), inputs(toolkit, case)
    prompt = sb.load(put(toolkit, case, tmp_path / "it"), base=model.config)
    bare = run(model, batch)
    logits = run(model, batch, prompt)
    theirs = golden(toolkit)[f"{case}.logits"]
    theirs = theirs[:, -logits.shape[1] :] if theirs.ndim == 3 else theirs
    bound = agreement(model, **{**batch, "input_ids": batch["input_ids"].clamp(min=3)})
    assert apart(logits, theirs) < bound
    assert apart(bare, theirs) > FAR
    for name, other in twins(prompt, family == "t5"):
        assert apart(run(model, batch, other), theirs) > FAR, name
    assert prompt.origin is not None
    assert prompt.origin.format == toolkit


@pytest.mark.parametrize(
    ("toolkit", "case", "kind"),
    [
        ("opendelta", "gpt2.mlp", "mlp"),
        ("opendelta", "gpt2.some-mlp", "mlp"),
        ("opendelta", "bert.mlp", "mlp"),
        ("openprompt", "gpt2.prefix", "mlp"),
        ("openprompt", "t5.prefix", "mlp"),
        ("openprompt", "gpt2.lstm", "p-tuning-lstm"),
        ("openprompt", "t5.mlp", "p-tuning-mlp"),
    ],
)
def test_what_trained_it_is_kept(toolkit: str, case: str, kind: str, tmp_path: Path) -> None:
    prompt = sb.load(put(toolkit, case, tmp_path / "it"), base=config(case.split(".")[0]))
    assert prompt.training is not None
    assert prompt.training.kind == kind
    again = rematerialise(prompt)
    assert again.parts == prompt.parts
    tensors = {
        name: array + 1 if name.endswith("embedding") else array for name, array in prompt.training.tensors.items()
    }
    other = rematerialise(replace(prompt, training=replace(prompt.training, tensors=tensors)))
    assert all(a != b for a, b in zip(other.parts, prompt.parts, strict=True))


@pytest.mark.parametrize("case", ["t5.mlp", "bart.mlp", "t5.some-mlp"])
def test_one_mlp_of_two_stacks_is_evaluated_and_not_kept(case: str, tmp_path: Path) -> None:
    prompt = sb.load(put("opendelta", case, tmp_path / "it"), base=config(case.split(".")[0]))
    assert prompt.training is None
    assert prompt.origin is not None
    assert prompt.origin.notes == (
        "one MLP makes the prefixes of both stacks: it was evaluated, and is not kept for training",
    )


def test_a_soft_verbaliser_is_the_head_of_a_classifier(tmp_path: Path) -> None:
    prompt = sb.load(put("openprompt", "gpt2.prefix", tmp_path / "it"), base=config("gpt2"))
    model = base("gpt2", "sequence-classification", num_labels=3)
    batch = inputs("openprompt", "gpt2.prefix")
    sb.attach(model, prompt, accept=["partial"])
    with torch.no_grad():
        scores = model(**batch).logits
    expected = golden("openprompt")["gpt2.prefix.scores"]
    assert apart(scores, expected) < 1e-12
    assert apart(scores[:, [1, 2, 0]], expected) > FAR


def test_label_words_are_the_templates_verbaliser(tmp_path: Path) -> None:
    """Scores of OpenPrompt are logarithms of probabilities among the label words: a number of each row apart."""
    model, batch = base("gpt2"), inputs("openprompt", "gpt2.mixed")
    prompt = sb.load(put("openprompt", "gpt2.mixed", tmp_path / "it"), base=model.config)
    part = prompt.inputs[0]
    assert part.template is not None
    assert part.template.verbaliser is not None
    assert [words for _, words in part.template.verbaliser.classes] == [(4, 7), (9,)]
    assert prompt.origin is not None
    assert prompt.origin.details["label_words"] == [[4, 7], [9]]
    found = run(model, batch, prompt)[:, -1]
    scores = torch.stack([found[:, list(words)].mean(-1) for _, words in part.template.verbaliser.classes], -1)
    expected = golden("openprompt")["gpt2.mixed.scores"]
    differences = scores - expected
    assert apart(scores[:, 0] - scores[:, 1], expected[:, 0] - expected[:, 1]) < 1e-12
    assert float(differences.abs().min()) > FAR
    assert isinstance(Cloze(part.template, None, 0), Cloze)


@pytest.mark.parametrize(
    ("toolkit", "case"),
    [
        ("opendelta", "gpt2.soft"),
        ("opendelta", "t5.soft"),
        ("openprompt", "gpt2.soft"),
        ("openprompt", "t5.soft"),
        ("openprompt", "gpt2.lstm"),
        ("openprompt", "gpt2.prefix"),
    ],
)
def test_what_peft_has_is_written_for_it(toolkit: str, case: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    source = put(toolkit, case, tmp_path / "it")
    (source / "template.json").unlink(missing_ok=True)
    stated = "openprompt:before-sequence" if case == "gpt2.lstm" else None
    family = case.split(".")[0]
    report = sb.convert(
        source,
        tmp_path / "out",
        "peft",
        base=config(family, num_labels=3, n_positions=64),  # room for a text to be generated
        accept=["partial"] if case == "gpt2.prefix" else [],
        format=stated,
        dtype="float32",
        verify=True,
    )
    assert report.certificate is not None
    task = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["task_type"]
    assert task == ("SEQ_2_SEQ_LM" if family == "t5" else "SEQ_CLS" if case == "gpt2.prefix" else "CAUSAL_LM")


def tensors_of(toolkit: str, case: str) -> dict[str, Any]:
    """What the toolkit saved."""
    (name,) = [name for name in golden(toolkit) if name.startswith(f"{case}/") and not name.endswith("json")]
    content = zlib.decompress(golden(toolkit)[name].numpy().tobytes())
    return dict(torch.load(io.BytesIO(content), weights_only=False))


def template_of(case: str) -> dict[str, torch.Tensor]:
    """The state of a template."""
    saved = tensors_of("openprompt", case)
    saved = saved.get("state_dict", saved)
    below = {name.rpartition("template.")[2]: tensor for name, tensor in saved.items() if "plm." not in name}
    return {name: tensor for name, tensor in below.items() if not name.startswith("verbalizer.")}


def write(path: Path, saved: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(saved, path)
    return path


#: Name -> makes such a file or folder below a path, and returns what to open.
FILES: dict[str, Callable[[Path], Path]] = {
    f"{toolkit} {case}": (lambda path, toolkit=toolkit, case=case: put(toolkit, case, path / case))  # type: ignore[misc]
    for toolkit, case in ALL
} | {
    "openprompt bare template": lambda path: write(path / "template.pt", template_of("t5.prefix")),
    "openprompt encoder alone": lambda path: write(path / "template.pt", template_of("t5.encoder")),
    "opendelta weights alone": lambda path: write(path / "delta.bin", tensors_of("opendelta", "gpt2.prefix")),
}


@pytest.mark.parametrize("name", FILES)
def test_they_are_recognised_by_content(name: str, tmp_path: Path) -> None:
    path = FILES[name](tmp_path)
    assert [form for form, value in formats().items() if value.sniff(Files(path))] == [name.split()[0]]


OTHERS: dict[str, Callable[[], Any]] = {
    "a whole model": lambda: base("gpt2").state_dict(),
    "optimiser": lambda: torch.optim.Adam(base("t5").parameters()).state_dict(),
    "lora": lambda: {"transformer.h.0.attn.c_attn.lora.lora_A": torch.ones(2, 8)},
    "adapter of OpenDelta": lambda: {"encoder.block.0.layer.0.adapter.modulelist.down_proj.weight": torch.ones(2, 8)},
    "network of other toolkits": lambda: {"wte.weight": torch.ones(3, 8), "control_trans.0.weight": torch.ones(6, 8)},
    "vectors of no toolkit": lambda: {"soft_embeds": torch.ones(3, 8)},
    "template without vectors": lambda: {"prompt_model.template.raw_embedding.weight": torch.ones(24, 8)},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_not_theirs(name: str, tmp_path: Path) -> None:
    files = Files(write(tmp_path / "model.bin", OTHERS[name]()))
    taken = [form for form, value in formats().items() if value.sniff(files)]
    assert not [form for form in taken if form.startswith("open")]


@pytest.mark.parametrize("case", ["gpt2.soft", "t5.prefix"])
def test_a_template_is_found_in_whatever_was_saved(case: str, tmp_path: Path) -> None:
    own, model = template_of(case), base(case.split(".")[0])
    plm = {f"plm.{name}": tensor for name, tensor in model.state_dict().items()}
    prompt_model = {**plm, **{f"template.{name}": tensor for name, tensor in own.items()}}
    whole = {f"prompt_model.{name}": tensor for name, tensor in prompt_model.items()}
    saved = {"own": own, "prompt": prompt_model, "whole": whole, "run": {"state_dict": whole, "cur_epoch": 1}}
    read = {
        name: sb.load(write(tmp_path / f"{name}.pt", content), base=model.config) for name, content in saved.items()
    }
    assert all(prompt == read["own"] for prompt in read.values())
    told = {name: bool(prompt.origin and prompt.origin.partial) for name, prompt in read.items()}
    assert told == {"own": False, "prompt": True, "whole": True, "run": True}


@pytest.mark.parametrize("frozen", [True, False])
def test_a_runs_configuration_says_what_was_trained(frozen: bool, tmp_path: Path) -> None:
    """It lies one folder above the checkpoint."""
    put("openprompt", "gpt2.prefix", tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "config.yaml").write_text(
        "plm:\n  model_name: gpt2\n  model_path: gpt2-medium\n  optimize:\n"
        f"    freeze_para: {str(frozen).lower()}\nprefix_tuning_template:\n  prefix_dropout: 0.1\n"
    )
    prompt = sb.load(tmp_path / "run", base=config("gpt2"))
    assert prompt.base.name == "gpt2-medium"
    assert prompt.training is not None
    assert prompt.training.settings["dropout"] == 0.1
    assert prompt.origin is not None
    assert bool(prompt.origin.partial) is not frozen
    assert prompt.origin.notes is not None
    assert "optimizer" in prompt.origin.notes[0]
    model = base("gpt2", "sequence-classification", num_labels=3)
    if frozen:
        sb.attach(model, prompt)
    else:
        with pytest.raises(LoweringError, match="partial"):
            sb.attach(model, prompt)


def test_nothing_in_a_runners_checkpoint_is_executed(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "sprung",)

    saved = tensors_of("openprompt", "gpt2.prefix")
    path = write(tmp_path / "best.ckpt", {**saved, "extra": Trap()})
    prompt = sb.load(path, base=config("gpt2"))
    assert not (tmp_path / "sprung").exists()
    assert prompt == sb.load(put("openprompt", "gpt2.prefix", tmp_path / "it"), base=config("gpt2"))
    torch.load(path, weights_only=False)
    assert (tmp_path / "sprung").exists()


@pytest.mark.parametrize("case", ["gpt2.mixed", "gpt2.lstm", "bert.mixed"])
@pytest.mark.parametrize("placement", ["before-sequence", "after-first-token"])
def test_soft_tokens_stand_where_a_caller_says(case: str, placement: str, tmp_path: Path) -> None:
    family = case.split(".")[0]
    source = put("openprompt", case, tmp_path / "it")
    (source / "template.json").unlink()
    with pytest.raises(CheckpointError, match=r"whose text is in no file(.|\n)*template\.json"):
        sb.load(source, base=config(family))
    model, batch = base(family), inputs("opendelta", f"{family}.soft")
    prompt = sb.load(source, base=model.config, format=f"openprompt:{placement}")
    at = placement == "after-first-token"
    embedded = model.get_input_embeddings()(batch["input_ids"])
    vectors = to_torch(prompt.inputs[0].vectors).expand(len(embedded), -1, -1)
    with torch.no_grad():
        rows = torch.cat([embedded[:, :at], vectors, embedded[:, at:]], 1)
        expected = model(inputs_embeds=rows, attention_mask=torch.ones(rows.shape[:2], dtype=torch.long)).logits
        turned = torch.cat([embedded[:, : 1 - at], vectors, embedded[:, 1 - at :]], 1)
        other = model(inputs_embeds=turned, attention_mask=torch.ones(rows.shape[:2], dtype=torch.long)).logits
    found = run(model, batch, prompt)
    if expected.ndim == 3:
        expected, other, found = expected[:, -4:], other[:, -4:], found[:, -4:]
    assert apart(found, expected) < 1e-12
    assert apart(other, expected) > FAR


def roberta() -> Any:
    return build(AutoConfig.for_model("roberta", **{**TINY["bert"], "pad_token_id": 1}), "masked-lm", torch.float64, 0)


@torch.no_grad()
def by_hand(model: Any, ids: torch.Tensor, prefix: Mapping[int, tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """A masked language model's logits, its attention written out: keys and values [P, H] stand before the others."""
    hidden = model.roberta.embeddings(input_ids=ids)
    heads = model.config.num_attention_heads

    def split(rows: torch.Tensor) -> torch.Tensor:
        return rows.unflatten(-1, (heads, -1)).transpose(1, 2)

    for number, layer in enumerate(model.roberta.encoder.layer):
        own = layer.attention.self
        keys, values = own.key(hidden), own.value(hidden)
        if number in prefix:
            front = [half.expand(len(ids), -1, -1) for half in prefix[number]]
            keys, values = torch.cat([front[0], keys], 1), torch.cat([front[1], values], 1)
        query = split(own.query(hidden))
        scores = query @ split(keys).transpose(-1, -2) / query.shape[-1] ** 0.5
        mixed = (scores.softmax(-1) @ split(values)).transpose(1, 2).flatten(2)
        attended = layer.attention.output(mixed, hidden)
        hidden = layer.output(layer.intermediate(attended), attended)
    return model.lm_head(hidden)


@pytest.mark.parametrize("layers", [(0, 1, 2), (1,)])
def test_a_prefix_of_roberta_is_what_attention_meets(layers: tuple[int, ...], tmp_path: Path) -> None:
    model = roberta()
    generator = torch.Generator().manual_seed(0)
    prefix = {n: tuple(torch.randn(4, 32, generator=generator, dtype=torch.float64) for _ in range(2)) for n in layers}
    names = ("past_key", "past_value")
    saved = {
        f"roberta.encoder.layer.{n}.attention.prefix.{name}": half
        for n, pair in prefix.items()
        for name, half in zip(names, pair, strict=True)
    }
    prompt = sb.load(write(tmp_path / "delta.bin", saved), base=model.config)
    ids = torch.randint(3, 90, (2, 7), generator=generator)
    expected = by_hand(model, ids, prefix)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert apart(run(model, batch), by_hand(model, ids, {})) < 1e-12
    assert apart(run(model, batch, prompt), expected) < 1e-12
    for name, other in (*twins(prompt), ("dropped", None)):
        assert apart(run(model, batch, other), expected) > FAR, name


def changed(toolkit: str, case: str, **tensors: Any) -> Callable[[], dict[str, Any]]:
    """A checkpoint with tensors replaced, by the end of their names; None: left out."""

    def make() -> dict[str, Any]:
        saved = tensors_of(toolkit, case) if toolkit == "opendelta" else template_of(case)
        for end, value in tensors.items():
            (name,) = [name for name in saved if name.endswith(end.replace("__", "."))]
            saved[name] = value(saved[name]) if callable(value) else value
        return {name: tensor for name, tensor in saved.items() if tensor is not None}

    return make


def nan(tensor: torch.Tensor) -> torch.Tensor:
    return torch.full_like(tensor, float("nan"))


BROKEN: dict[str, tuple[str, Callable[[], dict[str, Any]], str]] = {
    "soft: three axes": ("gpt2", changed("opendelta", "gpt2.soft", soft_embeds=lambda t: t[None]), "matrix"),
    "soft: integers": ("gpt2", changed("opendelta", "gpt2.soft", soft_embeds=lambda t: t.long()), "matrix"),
    "soft: nan": ("gpt2", changed("opendelta", "gpt2.soft", soft_embeds=nan), "finite"),
    "soft: width": ("gpt2", changed("opendelta", "gpt2.soft", soft_embeds=lambda t: t[:, :5]), "width 5"),
    "prefix: half": ("gpt2", changed("opendelta", "gpt2.prefix", h__0__attn__prefix__past_key=None), "half a prefix"),
    "prefix: shape": (
        "gpt2",
        changed("opendelta", "gpt2.prefix", h__1__attn__prefix__past_key=lambda t: t[:, :4]),
        r"\[3, 4\]",
    ),
    "prefix: length": (
        "gpt2",
        changed("opendelta", "gpt2.prefix", h__1__attn__prefix__past_key=lambda t: t[:2]),
        r"\[2, 8\]",
    ),
    "prefix: family": ("llama", changed("opendelta", "gpt2.prefix"), "llama"),
    "prefix: base": ("bert", changed("opendelta", "gpt2.some-mlp"), "not known|no self-attention|modules"),
    "mlp: rows": (
        "gpt2",
        changed("opendelta", "gpt2.mlp", control_trans__2__weight=lambda t: t[:30]),
        "output.weight|bias",
    ),
    "mlp: missing": ("gpt2", changed("opendelta", "gpt2.mlp", control_trans__0__bias=None), "missing self.hidden.bias"),
    "mlp: which modules": ("gpt2", changed("opendelta", "gpt2.some-mlp"), "modules that are not known"),
    "t5 for gpt2": ("gpt2", changed("opendelta", "t5.prefix"), "layer|module|self-attention"),
    "template: missing": ("t5", changed("openprompt", "t5.prefix", decoder_wte__weight=None), "missing self.embedding"),
    "template: nan": ("t5", changed("openprompt", "t5.soft", soft_embeds=nan), "finite"),
    "template: rows": ("t5", changed("openprompt", "t5.prefix", input_tokens=lambda t: t.flip(0)), "input_tokens"),
    "template: site": ("gpt2", changed("openprompt", "t5.prefix"), "encoder"),
    "template: width": ("gpt2", changed("openprompt", "gpt2.soft", soft_embeds=lambda t: t[:, :5]), "width 5"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_does_not_fit_is_refused(name: str, tmp_path: Path) -> None:
    family, make, found = BROKEN[name]
    source = write(tmp_path / "it.bin", make())
    with pytest.raises((CheckpointError, BaseModelError), match=found) as refused:
        sb.load(source, base=config(family))
    assert refused.value.expected
    assert refused.value.remedy


@pytest.mark.parametrize("case", ["gpt2.lstm", "gpt2.mixed"])
def test_a_template_of_another_length_is_refused(case: str, tmp_path: Path) -> None:
    source = put("openprompt", case, tmp_path / "it")
    other = Template((Field("text"), Virtual(2), Slot()))
    (source / "template.json").write_text(json.dumps(other.to_json()))
    with pytest.raises(CheckpointError, match="3 vectors, and a template of 2"):
        sb.load(source, base=config("gpt2"))


def test_of_several_checkpoints_of_a_run_one_must_be_named(tmp_path: Path) -> None:
    saved = tensors_of("openprompt", "gpt2.prefix")
    for name in ("best", "last"):
        write(tmp_path / "run" / "checkpoints" / f"{name}.ckpt", saved)
    with pytest.raises(CheckpointError, match="give the path of the one to read"):
        sb.load(tmp_path / "run", base=config("gpt2"))


def test_a_mixed_template_without_soft_tokens_is_refused(tmp_path: Path) -> None:
    saved = {**template_of("gpt2.mixed"), "soft_embedding.weight": torch.ones(1, 8)}
    with pytest.raises(CheckpointError) as refused:
        sb.load(write(tmp_path / "it.pt", saved), base=config("gpt2"), format="openprompt:before-sequence")
    assert refused.value.remedy


@pytest.mark.parametrize("name", ["opendelta gpt2.prefix", "openprompt gpt2.soft"])
def test_the_base_model_must_be_given(name: str, tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="--base"):
        sb.load(FILES[name](tmp_path))


def test_what_else_was_trained_is_said(tmp_path: Path) -> None:
    """OpenDelta saves what is trained: a classifier is the prompt's head, a layer of the model is not the prompt's."""
    saved = tensors_of("opendelta", "bert.mlp")
    more = {**saved, "bert.encoder.layer.0.output.dense.bias": torch.ones(8)}
    prompt = sb.load(write(tmp_path / "it.bin", more), base=config("bert"))
    assert sorted(prompt.head) == ["classifier.bias", "classifier.weight"]
    with pytest.raises(LoweringError, match=r"1 tensors of the base model .* bert\.encoder\.layer\.0"):
        sb.attach(base("bert"), prompt)
