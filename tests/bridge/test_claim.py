"""What a conversion claims is what its certificate, the certificate's re-run and `verify A B` hold it to."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig

import softbridge as sb
from softbridge.base import BaseModel
from softbridge.checkpoint.choice import ALL, Choice
from softbridge.checkpoint.manifest import signed
from softbridge.errors import CheckpointError, EngineError, SoftbridgeError
from softbridge.lowering.examples import METHODS, example
from softbridge.lowering.explain import KINDS, explain
from softbridge.lowering.matrix import rows
from softbridge.lowering.planner import CONDITIONS
from softbridge.lowering.precision import DTYPES
from softbridge.methods import rematerialise
from softbridge.plugin.registry import format_named
from softbridge.prompt import InputPrompt, KeyValue, Origin, SoftPrompt
from softbridge.template import Field, Template, Virtual, Words
from softbridge.testing import TINY, tiny_config, tiny_model
from softbridge.verification import Certificate, Claim, compare, probe
from softbridge.verification import bench as comparison
from softbridge.verification.recheck import verify_again
from softbridge.verification.recording import pack, unpack

pytestmark = pytest.mark.usefixtures("remembered_runs")

LONG = os.environ.get("SOFTBRIDGE_PROFILE") == "long"
#: What runs beside float64, and all deliberate faults but one, are no question of what is claimed.
PRECISION = "float64"


@pytest.fixture(autouse=True, scope="module")
def nothing_beside_the_verdict() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "faulty_prompts", lambda prompt, scheme: [("dropped", None)])
        yield


_SIZES = {**TINY["llama"], "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GEMMA = {"hidden_size": 48, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 12}
#: Models that the table's families do not stand for: name -> what makes the configuration.
CONFIGS: Mapping[str, Callable[[], Any]] = {
    **{family: lambda family=family: tiny_config(family) for family in KINDS},  # type: ignore[misc]
    "a window": lambda: AutoConfig.for_model("mistral", **_SIZES, sliding_window=64),
    "frequencies that change": lambda: tiny_config("llama", rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
    "scaled words": lambda: AutoConfig.for_model("gemma", **_GEMMA, vocab_size=96, num_key_value_heads=1),
}


@cache
def base_of(name: str) -> BaseModel:
    """With weights where they move vectors: behind BERT's embedding block, into a decoder's cache."""
    return BaseModel.resolve(tiny_model(name) if name in ("bert", "gpt2", "llama") else CONFIGS[name]())


def made(method: str, base: BaseModel, source: str) -> SoftPrompt:
    return example(method, base.geometry, format_named(source).capabilities)


def other(prompt: SoftPrompt) -> SoftPrompt:
    """Another prompt that can be converted in the same way."""
    if prompt.training is not None:
        tensors = {n: (a * 1.25).astype(a.dtype) for n, a in prompt.training.tensors.items() if a.dtype.kind == "f"}
        training = replace(prompt.training, tensors={**prompt.training.tensors, **tensors})
        return rematerialise(replace(prompt, training=training))
    return changed(prompt, lambda array: (array * 1.25).astype(array.dtype))


def changed(prompt: SoftPrompt, change: Callable[[np.ndarray], np.ndarray]) -> SoftPrompt:
    """The prompt with a change of all its numbers but those of gates."""
    parts = []
    for part in prompt.parts:
        if isinstance(part, InputPrompt):
            parts.append(replace(part, vectors=change(part.vectors)))
        else:
            pairs = {n: KeyValue(change(p.keys), change(p.values), p.gate) for n, p in part.layers.items()}
            parts.append(replace(part, layers=pairs))  # type: ignore[arg-type]
    return replace(prompt, parts=tuple(parts), training=None)


def agree(a: Path, b: Path, base: Any, certificate: Certificate) -> None:
    """The certificate, what runs it again, and whoever has the files alone."""
    again = verify_again(b / "certificate.json", base)
    assert again.holds, again.changes
    for found in (again.certificate, sb.verify(a, b, base=base, dtype=PRECISION)):
        assert found.same, found.summary()
        assert found.claim == certificate.claim
        for ours, theirs in ((certificate.source, found.source), (certificate.target, found.target)):
            assert replace(ours, files={}) == replace(theirs, files={})
            assert ours.files.items() <= theirs.files.items(), "the manifest and the certificate come later"
    assert Path(certificate.source.path) == a, "a path and nothing else"


def converted(a: Path, b: Path, to: str, base: Any, **options: Any) -> Certificate:
    with pytest.MonkeyPatch.context() as patch:
        from softbridge.verification import proof as verification

        patch.setattr(verification, "verify_prompts", partial(verification.verify_prompts, dtype=PRECISION))
        certificate = sb.convert(a, b, to, base=base, verify=True, **options).certificate
    assert certificate is not None
    assert json.loads((b / "certificate.json").read_text())["claim"] == _json(certificate.claim)
    return certificate


def _json(claim: Claim) -> Any:
    return json.loads(json.dumps(asdict(claim)))


# Every option


@dataclass(frozen=True)
class Case:
    """A conversion with an option: of what, from and to which format, and what it claims beyond nothing.

    Attributes:
        change: what is done to the prompt before it is written.
        bare: whether the source has no manifest.
    """

    base: str
    method: str
    source: str
    target: str
    options: Mapping[str, Any]
    claim: Mapping[str, Any]
    change: Callable[[SoftPrompt], SoftPrompt] = lambda prompt: prompt
    bare: bool = False


def _wide(prompt: SoftPrompt) -> SoftPrompt:
    """Numbers that float32 does not hold."""
    return changed(prompt, lambda array: array.astype(np.float64) / 3)


def _worded(prompt: SoftPrompt) -> SoftPrompt:
    """All virtual tokens in front, and words behind the text."""
    (part,) = prompt.inputs
    template = Template((Virtual(part.length), Field("text"), Words((4,))))
    positions = replace(prompt.positions, start=dict.fromkeys(prompt.positions.start, 0))
    return replace(prompt, parts=(replace(part, placement="template", template=template),), positions=positions)


def _partial(prompt: SoftPrompt) -> SoftPrompt:
    return replace(prompt, origin=Origin("softbridge", {"partial": "an adapter of another kind"}))


def _case(route: str, claim: Mapping[str, Any] = {}, **options: Any) -> Case:
    more = {name: options.pop(name) for name in ("change", "bare") if name in options}
    base, method, source, target = route.split(": ")
    return Case(base, method, source, target, options, claim, **more)


_ROTATED = "llama: prefix-tuning: peft: adapterhub"
_GPT2 = "gpt2: prefix-tuning: softbridge: peft"
CASES = {
    "numbers rounded to bfloat16": _case(_GPT2, {"dtype": "bfloat16"}, dtype="bfloat16"),
    "numbers rounded to float16": _case(_GPT2, {"dtype": "float16"}, dtype="float16"),
    "numbers rounded to float32": _case(_GPT2, {"dtype": "float32"}, dtype="float32", change=_wide),
    "numbers widened": _case("gpt2: prefix-tuning: peft: softbridge", dtype="float64"),
    "a rounding that was accepted": _case(
        _GPT2, {"dtype": "float32", "conditions": ("dtype",)}, accept=["dtype"], change=_wide
    ),
    "keys rotated and rounded": _case(_ROTATED, {"dtype": "bfloat16", "rounded": ("rotate",)}, dtype="bfloat16"),
    "keys rotated from float64 and rounded": _case(
        "llama: prefix-tuning: softbridge: adapterhub",
        {"dtype": "float16", "rounded": ("rotate",)},
        dtype="float16",
        change=_wide,
    ),
    "keys rotated, and a rounding that was accepted": _case(
        "llama: prefix-tuning: softbridge: adapterhub",
        {"dtype": "float32", "rounded": ("rotate",), "conditions": ("dtype",)},
        accept=["dtype"],
        change=_wide,
    ),
    "vectors sent through a block and rounded": _case(
        "bert: prompt-tuning: peft: adapterhub",
        {"dtype": "bfloat16", "rounded": ("entry",), "weights": True, "conditions": ("positions",)},
        dtype="bfloat16",
        accept=["positions"],
    ),
    "one task": _case(
        "gpt2: multitask-prompt-tuning: softbridge: peft", {"choice": Choice(task=1), "made": "target"}, task=1
    ),
    "one task, rounded": _case(
        "gpt2: multitask-prompt-tuning: peft: softbridge",
        {"choice": Choice(task=1), "dtype": "bfloat16"},
        task=1,
        dtype="bfloat16",
    ),
    "the first task, as accepted": _case(
        "bert: multitask-prompt-tuning: softbridge: adapterhub",
        {"conditions": ("task", "positions"), "rounded": ("entry",), "weights": True},
        accept=["task", "positions"],
    ),
    "one part": _case("t5: p-tuning-v2: softbridge: peft", {"choice": Choice(part="self")}, part="self"),
    "position_ids that are passed": _case(
        "gpt2: prefix-tuning: peft: adapterhub", {"conditions": ("positions",)}, accept=["positions"]
    ),
    "no training": _case(
        "gpt2: prefix-tuning-mlp: softbridge: peft", {"choice": Choice(drop=("training",))}, drop=["training"]
    ),
    "no manifest": _case(_GPT2, {"choice": Choice(drop=("manifest",))}, drop=["manifest"]),
    "a named format": _case(_GPT2, {"choice": Choice("softbridge")}, format="softbridge"),
    "a window": _case(
        "a window: prefix-tuning: peft: adapterhub",
        {"conditions": ("window",), "rounded": ("rotate",), "window": None},
        accept=["window"],
    ),
    "a bounded length": _case(
        "frequencies that change: prefix-tuning: peft: adapterhub",
        {"conditions": ("length",), "rounded": ("rotate",)},
        accept=["length"],
    ),
    "words that the caller writes": _case(
        "bert: prompt-tuning: softbridge: peft", {"conditions": ("template",)}, accept=["template"], change=_worded
    ),
    "a part of the source": _case(_GPT2, {"conditions": ("partial",)}, accept=["partial"], change=_partial),
    "a scale that was accepted": _case(
        "scaled words: prompt-tuning: peft: softbridge", {"conditions": ("scale",)}, accept=["scale"], bare=True
    ),
    "another scale": _case(
        "scaled words: prompt-tuning: peft: softbridge",
        {"rounded": ("scale",)},
        trained_on="here or there",
        bare=True,
    ),
    "another scale, rounded": _case(
        "scaled words: prompt-tuning: peft: softbridge",
        {"rounded": ("scale",), "dtype": "bfloat16"},
        trained_on="here or there",
        dtype="bfloat16",
        bare=True,
    ),
}


def _release(base: BaseModel) -> str:
    """One of transformers that multiplied by something else than the one that is installed."""
    return next(one for one in ("4.57", "5.4.0") if base.scale_on(one) != base.scale)


def write(case: Case, prompt: SoftPrompt, directory: Path, base: BaseModel) -> None:
    sb.save(prompt, directory, format=case.source, base=base, accept=["partial"] if case.change is _partial else ())
    if case.bare:
        (directory / "softbridge.json").unlink()


@pytest.mark.parametrize("name", CASES)
def test_every_option_is_claimed_and_nothing_else(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    base, a, b = base_of(case.base), tmp_path / "a", tmp_path / "b"
    prompt = case.change(made(case.method, base, case.source))
    write(case, prompt, a, base)
    options = dict(case.options)
    if "trained_on" in options:
        options["trained_on"] = _release(base)
    certificate = converted(a, b, case.target, base, **options)
    expected = {"conditions": (), "rounded": (), "dtype": None, "weights": False, **case.claim}
    assert {field: getattr(certificate.claim, field) for field in expected} == expected
    agree(a, b, base, certificate)
    reverse = sb.verify(b, a, base=base, dtype=PRECISION)
    assert reverse.same
    assert reverse.claim.reversed == certificate.claim
    assert (reverse.source.digest, reverse.target.digest) == (certificate.target.digest, certificate.source.digest)

    # A claim is no cover: another source in the place of the first is found out.
    elsewhere = tmp_path / "elsewhere"
    write(case, case.change(other(made(case.method, base, case.source))), elsewhere, base)
    recorded = json.loads((b / "certificate.json").read_text())
    recorded["source"]["path"] = str(elsewhere)
    (tmp_path / "certificate.json").write_text(json.dumps(recorded))
    again = verify_again(tmp_path / "certificate.json", base)
    assert again.certificate.verdict == "different", again.certificate.summary()
    assert "the source is another prompt" in again.changes
    assert not sb.verify(elsewhere, b, base=base, dtype=PRECISION).same


# Every route

#: What a conversion is told, one after the other on the routes of the table; in the long profile all on each.
TOLD: tuple[Mapping[str, Any], ...] = ({}, *({"dtype": name} for name in DTYPES), {"encoding": -1})


def routes(method: str) -> Iterator[tuple[str, str, str, Mapping[str, Any]]]:
    """(family, source, target, options): of each route one family and one option, in the long profile all.

    Routes are the matrix's, and those of one format that it leaves out.
    """
    for number, (source, target) in enumerate(product((*rows(), "google"), repeat=2)):
        families = [family for family in KINDS if leads(method, family, source, target)]
        if LONG:
            yield from ((family, source, target, told) for family, told in product(families, TOLD))
        elif families:
            place = number + list(METHODS).index(method)
            yield families[place % len(families)], source, target, TOLD[place % len(TOLD)]


@cache
def leads(method: str, family: str, source: str, target: str) -> bool:
    """Whether there is such a conversion, perhaps under conditions."""
    return bool(explain(source, target, method, base=base_of(family)).outcome != "impossible")


@pytest.mark.parametrize("method", METHODS)
def test_on_every_route_all_agree(method: str, tmp_path: Path) -> None:
    found, ran = list(routes(method)), 0
    for number, (family, source, target, told) in enumerate(found):
        base, a, b = base_of(family), tmp_path / f"{number}a", tmp_path / f"{number}b"
        sb.save(made(method, base, source), a, format=source, base=base, accept=CONDITIONS)
        options = dict(told)
        if "encoding" in options:
            options["encoding"] = format_named(target).encodings[options["encoding"]]
        accept = [s.name for s in explain(source, target, method, base=base).steps if s.exactness == "conditional"]
        try:
            certificate = converted(a, b, target, base, accept=accept, **options)
        except EngineError:  # such as T5 without some layers where the native engine does not run T5
            continue
        agree(a, b, base, certificate)
        ran += 1
    assert ran > len(found) / 2


# Whoever reads a claim


@pytest.mark.parametrize("name", ["keys rotated and rounded", "one task, rounded", "a window"])
def test_two_recordings_know_of_each_other(name: str, tmp_path: Path) -> None:
    """Each side runs by itself what it stands for in the comparison with the other."""
    case = CASES[name]
    base, a, b = base_of(case.base), tmp_path / "a", tmp_path / "b"
    write(case, made(case.method, base, case.source), a, base)
    certificate = converted(a, b, case.target, base, **case.options)
    recordings = []
    for side, against in ((a, b), (b, a)):
        recorded = pack(probe(side, base=base, against=against, dtype=PRECISION))
        (tmp_path / f"{side.name}.safetensors").write_bytes(recorded)
        recordings.append(unpack(tmp_path / f"{side.name}.safetensors"))
    found = compare(*recordings)
    assert found.same, found.summary()
    assert found.claim == certificate.claim
    assert (found.source.digest, found.target.digest) == (certificate.source.digest, certificate.target.digest)
    if case.options.keys() & {"dtype", "task"}:
        alone = probe(a, base=base, dtype=PRECISION)
        with pytest.raises(SoftbridgeError, match="for a comparison with something else"):
            compare(alone, recordings[1])
        assert not compare(alone, probe(b, base=base, dtype=PRECISION)).same


def test_certificates_without_a_claim_stay_readable(tmp_path: Path) -> None:
    """What is claimed is then what the files say; and a path may have words behind it."""
    base, a, b = base_of("gpt2"), tmp_path / "a", tmp_path / "b"
    sb.save(made("prefix-tuning", base, "softbridge"), a, format="softbridge", base=base)
    certificate = converted(a, b, "peft", base, dtype="bfloat16")
    recorded = json.loads((b / "certificate.json").read_text())
    del recorded["claim"]
    recorded["source"]["path"] += ", rounded to bfloat16"
    (tmp_path / "earlier.json").write_text(json.dumps(recorded))
    again = verify_again(tmp_path / "earlier.json", base)
    assert again.holds, again.changes
    assert again.certificate.claim == certificate.claim


def test_a_head_that_was_left_to_the_caller_is_the_other_sides(tmp_path: Path) -> None:
    base = base_of("bert")
    whole = made("p-tuning-v2", base, "softbridge")
    assert whole.head
    for name, prompt in {"a": whole, "b": replace(whole, head={})}.items():
        sb.save(prompt, tmp_path / name, format="softbridge", base=base)
    assert not sb.verify(tmp_path / "a", tmp_path / "b", base=base, dtype=PRECISION).same
    manifest = json.loads((tmp_path / "b" / "softbridge.json").read_text())
    manifest["steps"].append({"name": "head", "exactness": "conditional", "note": ""})
    (tmp_path / "b" / "softbridge.json").write_text(json.dumps(signed(manifest)))
    assert sb.verify(tmp_path / "a", tmp_path / "b", base=base, dtype=PRECISION).same
    assert sb.verify(tmp_path / "b", tmp_path / "a", base=base, dtype=PRECISION).conditions == ("head",)


def test_how_a_source_was_made_says_nothing_of_what_is_made_of_it(tmp_path: Path) -> None:
    """A -> B, rounded; B -> C, rotated: C's keys are not rounded, and B's rounding is not held against them."""
    base = base_of("llama")
    sb.save(made("prefix-tuning", base, "peft"), tmp_path / "a", format="peft", base=base)
    sb.convert(tmp_path / "a", tmp_path / "b", "softbridge", base=base, dtype="bfloat16")
    certificate = converted(tmp_path / "b", tmp_path / "c", "adapterhub", base)
    assert (certificate.claim.dtype, certificate.rounded) == (None, ("rotate",))
    agree(tmp_path / "b", tmp_path / "c", base, certificate)
    assert not sb.verify(tmp_path / "a", tmp_path / "c", base=base, dtype=PRECISION).same, "nobody told of A's rounding"


def test_two_of_one_origin(tmp_path: Path) -> None:
    """No conversion of each other: each says how it was made, and the other is rounded alike."""
    base = base_of("llama")
    sb.save(made("prefix-tuning", base, "peft"), tmp_path / "a", format="peft", base=base)
    for name, (to, options) in {
        "rotated": ("adapterhub", {}),
        "rounded": ("softbridge", {"dtype": "bfloat16"}),
        "rounded alike": ("peft", {"dtype": "bfloat16"}),
        "rotated and rounded": ("adapterhub", {"dtype": "bfloat16"}),
    }.items():
        sb.convert(tmp_path / "a", tmp_path / name, to, base=base, **options)  # type: ignore[arg-type]
    alike = sb.verify(tmp_path / "rounded", tmp_path / "rounded alike", base=base, dtype=PRECISION)
    assert alike.same
    assert (alike.claim.dtype, alike.claim.made) == ("bfloat16", None)
    rotated = sb.verify(tmp_path / "rotated", tmp_path / "rotated and rounded", base=base, dtype=PRECISION)
    assert rotated.same
    assert (rotated.claim.made, rotated.rounded) == ("target", ("rotate",))
    assert not sb.verify(tmp_path / "rotated", tmp_path / "rounded", base=base, dtype=PRECISION).same, (
        "keys of two frames"
    )


def test_a_rounding_that_is_none_is_seen(tmp_path: Path) -> None:
    """A manifest that claims a rounding does not make up for numbers that are no rounding of the source's."""
    base, a, b = base_of("llama"), tmp_path / "a", tmp_path / "b"
    prompt = made("prefix-tuning", base, "peft")
    sb.save(prompt, a, format="peft", base=base)
    for off, same in ((1.0, True), (1.01, False)):
        narrow = changed(prompt, lambda array, off=off: (array * off).astype(np.float32))
        sb.save(narrow, b, format="adapterhub", base=base, dtype="bfloat16", overwrite=True)
        assert sb.verify(a, b, base=base, dtype=PRECISION).same is same


CLAIM = _json(Claim(("positions",), ("rotate",), "bfloat16", Choice(task=1), "target", True, 9, "bitwise"))


def test_a_claim_is_written_and_read() -> None:
    claim = Claim.from_json(CLAIM)
    assert _json(claim) == CLAIM
    assert claim.origin == "source"
    assert Claim.from_json(_json(Claim())) == Claim()
    assert Choice.from_json({}) == ALL


@pytest.mark.parametrize(
    "wrong",
    [
        5,
        {},
        {**CLAIM, "more": 1},
        *(
            {**CLAIM, name: value}
            for name, values in {
                "conditions": ("positions", [5], None),
                "rounded": ({}, [[]]),
                "dtype": ("int8", 5, []),
                "choice": (None, [], {"task": "1"}, {"task": True}, {"drop": ["head"]}, {"drop": "training"}, {"x": 1}),
                "made": ("both", [], 1),
                "weights": (None, 1, "true"),
                "window": (0, True, 2.5, "9"),
                "level": ("alike", None, []),
            }.items()
            for value in values
        ),
    ],
)
def test_what_is_no_claim_is_refused(wrong: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        Claim.from_json(wrong)
    certificate = {"schema": "softbridge/certificate/2", "verdict": "exact", "dtype": "float32", "seed": 0}
    sides = {name: {"path": "x", "digest": "", "files": {"x": ""}} for name in ("source", "target")}
    certificate |= {**sides, "weights": "random", "base": "x", "claim": wrong}
    (tmp_path / "c.json").write_text(json.dumps(certificate))
    with pytest.raises(CheckpointError, match="no valid 'claim'"):
        verify_again(tmp_path / "c.json", base_of("gpt2"))


@pytest.mark.parametrize(
    "wrong",
    [{"choice": 5}, {"choice": {"task": "x"}}, {"choice": {"drop": [[]]}}, {"source": 5}, {"source": {"digests": 5}}],
)
def test_a_manifest_that_says_nonsense_of_its_source(wrong: Any, tmp_path: Path) -> None:
    base = base_of("gpt2")
    sb.save(made("prefix-tuning", base, "peft"), tmp_path / "a", format="peft", base=base)
    manifest = json.loads((tmp_path / "a" / "softbridge.json").read_text())
    (tmp_path / "a" / "softbridge.json").write_text(json.dumps(signed({**manifest, **wrong})))
    with pytest.raises(CheckpointError, match=next(iter(wrong))):
        sb.load(tmp_path / "a", base=base)
