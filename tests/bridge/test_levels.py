"""How alike two sides are, where in the model they part, and what a page says of it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import softbridge as sb
from softbridge.base import BaseModel
from softbridge.base.positions import PositionScheme
from softbridge.cli.console import app
from softbridge.cli.page import page
from softbridge.lowering.precision import DTYPES, as_dtype
from softbridge.prompt import KeyValue, Positions, SoftPrompt
from softbridge.testing import random_input_prompt, random_prefix, tiny_config
from softbridge.verification import Certificate, Claim, Layer, Level, Subject, compare, probe, verify_prompts
from softbridge.verification.certificate import Side
from softbridge.verification.faults import faulty_prompts
from softbridge.verification.recording import pack, unpack

LAYERS = 3


def certify(
    a: SoftPrompt, b: SoftPrompt, family: str = "gpt2", dtype: str = "float32", level: Level = "exact"
) -> Certificate:
    sides = Subject("a", a, "native"), Subject("b", b, "native")
    return verify_prompts(*sides, BaseModel(tiny_config(family)), dtype=dtype, claim=Claim(level=level))


def prefix_of(family: str) -> SoftPrompt:
    return random_prefix(BaseModel(tiny_config(family)).geometry)


@cache
def same_sides() -> Certificate:
    return certify(prefix_of("gpt2"), prefix_of("gpt2"))


def faulty(prompt: SoftPrompt, layer: int, what: str = "keys", factor: float = 1.01) -> SoftPrompt:
    """The last part with one layer's keys or values off."""
    *others, part = prompt.parts
    pair = part.layers[layer]  # type: ignore[union-attr]
    arrays = {"keys": pair.keys, "values": pair.values}
    arrays[what] = (arrays[what] * factor).astype(np.float32)
    layers = {**part.layers, layer: KeyValue(arrays["keys"], arrays["values"])}  # type: ignore[union-attr]
    return replace(prompt, parts=(*others, replace(part, layers=layers)))  # type: ignore[call-arg]


def test_what_the_working_precision_rounds_anyway_is_a_level_of_its_own() -> None:
    """Numbers rounded to bfloat16 are another function, which a bfloat16 model cannot tell from the first."""
    prompt = prefix_of("gpt2")
    rounded = as_dtype(prompt, DTYPES["bfloat16"])
    certificate = certify(prompt, rounded, dtype="bfloat16")
    assert certificate.worst > 1e-4
    assert certificate.verdict == "rounding"
    assert certificate.exit_status == 1, "float64 decides unless the caller says otherwise"
    assert replace(certificate, claim=Claim(level="rounding")).exit_status == 0
    assert certify(prompt, rounded, dtype="float32", level="rounding").verdict == "different"
    for fault, wrong in faulty_prompts(prompt, PositionScheme("absolute", tellable=True)):
        if wrong is not None:
            assert certify(prompt, wrong, dtype="bfloat16", level="rounding").verdict == "different", fault


def test_a_level_is_asked_for_and_only_what_reaches_it_is_the_same() -> None:
    right = same_sides()
    apart = replace(right, figures=tuple(replace(one, float64=1e-13) for one in right.figures))
    verdicts: list[tuple[Certificate, str]] = [(right, "bitwise"), (apart, "exact")]
    verdicts.append((replace(apart, bound=1e-14), "rounding"))
    for reached, (certificate, verdict) in enumerate(verdicts):
        assert certificate.verdict == verdict
        levels: tuple[Level, ...] = ("bitwise", "exact", "rounding")
        found = [replace(certificate, claim=Claim(level=level)).exit_status for level in levels]
        assert found == [int(number < reached) for number in range(3)]


def test_a_noise_floor_that_a_missing_prompt_would_pass_measures_nothing() -> None:
    right = same_sides()
    beyond = replace(right, figures=tuple(replace(one, float64=1e-3, working=1e-3) for one in right.figures))
    assert replace(beyond, yardstick=2e-3).verdict == "rounding"
    assert replace(beyond, yardstick=5e-4).verdict == "different"
    assert replace(beyond, yardstick=2 * right.effect).verdict == "different"
    assert replace(beyond, yardstick=float("nan")).verdict == "different"
    tokens = [replace(one, working=1.0) if one.probe == "greedy" else one for one in beyond.figures]
    assert replace(beyond, yardstick=2e-3, figures=tuple(tokens)).verdict == "different"


def test_what_the_first_text_does_not_show_has_no_place() -> None:
    right = same_sides()
    tokens = [replace(one, float64=1.0, working=1.0) if one.probe == "greedy" else one for one in right.figures]
    decodes = replace(right, figures=tuple(tokens))
    assert decodes.verdict == "different"
    assert decodes.parted is None
    assert decodes.to_json()["parted"] is None
    assert "parted" not in decodes.summary()


def test_the_noise_floor_and_its_unit_are_of_the_working_precision() -> None:
    prompt = prefix_of("llama")
    fine, coarse = (certify(prompt, prompt, "llama", dtype) for dtype in ("float32", "bfloat16"))
    for certificate, unit in ((fine, 2.0**-23), (coarse, 2.0**-7)):
        assert unit / 2 <= certificate.unit <= unit, "the largest logit lies between a power of two and the next"
        assert certificate.yardstick < 100 * certificate.unit
    assert fine.yardstick > 0


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "t5"])
def test_where_two_sides_part_is_named(family: str) -> None:
    """Whatever layer of a prefix is off: the first place that differs is what attends in that layer."""
    prompt = prefix_of(family)
    stack = "encoder" if family == "bert" else "decoder"
    for layer, what in ((0, "values"), (1, "keys"), (LAYERS - 1, "values")):
        certificate = certify(prompt, faulty(prompt, layer, what), family, "float64")
        parted = certificate.parted
        assert certificate.verdict == "different"
        assert parted is not None
        assert (parted.stack, parted.layer) == (stack, layer)
        assert parted.part != "output"
        assert str(parted) in certificate.summary()
        inside = [place for place in certificate.layers if place.stack == stack]
        before = inside[: inside.index(parted)]
        assert len(before) >= layer
        assert all(place.apart == 0 for place in before)
        assert all(place.apart > 0 for place in inside[inside.index(parted) :])
        assert certificate.to_json()["parted"]["layer"] == layer


def test_a_toolkit_that_changes_the_model_is_watched_as_well() -> None:
    """AdapterHub swaps the classes of modules; where it is not installed, another engine stands in."""
    base = BaseModel(tiny_config("llama"))
    prompt = replace(random_prefix(base.geometry), positions=Positions({"decoder": 0}))
    ours = Subject("a", prompt, "native")
    for theirs, layer in ((prompt, None), (faulty(prompt, 1), 1)):
        certificate = verify_prompts(ours, Subject("b", theirs, "adapterhub"), base)
        assert certificate.target.engine == "adapterhub" or "not installed" in certificate.target.instead_of
        assert [str(place) for place in certificate.layers[:2]] == [
            "decoder layer 0, attention ('self_attn')",
            "decoder layer 0, what follows attention",
        ]
        assert len(certificate.layers) == 2 * LAYERS
        assert (None if certificate.parted is None else certificate.parted.layer) == layer


def test_a_fault_that_the_target_cannot_run_is_said_to_be_untried() -> None:
    """Of four layers of T5 PEFT's file holds two, each for two layers: it has no place for two that are swapped."""
    base = BaseModel(tiny_config("t5", num_layers=1, num_decoder_layers=4))
    prefix = random_prefix(base.geometry).prefixes[0]
    layers = {n: prefix.layers[n % 2] for n in prefix.layers}
    prompt = replace(random_prefix(base.geometry), parts=(replace(prefix, layers=layers),))
    certificate = verify_prompts(Subject("a", prompt, "peft"), Subject("b", prompt, "peft"), base)
    assert certificate.same
    assert "two layers swapped" not in {fault.name for fault in certificate.faults}
    assert certificate.untried.keys() == {"two layers swapped"}
    assert certificate.untried["two layers swapped"].startswith("peft: ")
    assert "fault: two layers swapped" in Page(page(certificate)).text


def test_what_parts_behind_attention_is_told_from_what_parts_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault in the feed-forward of one side's layer 1."""
    from softbridge_native.engine import ENGINE

    prompt, attach = prefix_of("gpt2"), type(ENGINE).attach

    def broken(self: object, model: object, given: SoftPrompt) -> object:
        running = attach(self, model, given)  # type: ignore[arg-type]
        if given.origin is not None:
            model.transformer.h[1].mlp.c_fc.bias.data.add_(0.1)  # type: ignore[attr-defined]
        return running

    monkeypatch.setattr(type(ENGINE), "attach", broken)
    marked = replace(prompt, origin=sb.prompt.Origin("softbridge"))
    certificate = certify(prompt, marked)
    assert certificate.parted is not None
    assert replace(certificate.parted, apart=0.0) == Layer("decoder", 1, "output", 0.0)
    assert "layer 1, what follows attention" in str(certificate.parted)


def test_vectors_part_where_the_model_begins_and_a_model_in_pieces_counts_all_its_layers() -> None:
    prompt = random_input_prompt(BaseModel(tiny_config("gpt2")).geometry)
    rolled = replace(prompt, parts=(replace(prompt.inputs[0], vectors=np.roll(prompt.inputs[0].vectors, 1, 0)),))
    certificate = certify(prompt, rolled)
    assert certificate.parted is not None
    assert certificate.parted.layer == 0

    base = BaseModel(tiny_config("llama", hidden_size=256, num_attention_heads=16, intermediate_size=512))
    prefix = random_prefix(base.geometry)
    sides = Subject("a", prefix, "native"), Subject("b", faulty(prefix, 2), "native")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("softbridge.verification.small_models.SMALL", 0)
        pieces = verify_prompts(*sides, base, memory=1)
    assert "1 layer at a time" in pieces.weights
    assert {place.layer for place in pieces.layers} == {0, 1, 2}
    assert pieces.parted is not None
    assert pieces.parted.layer == 2


def test_recordings_know_where_they_part_and_at_which_level(tmp_path: Path) -> None:
    config, prompt = tiny_config("llama"), prefix_of("llama")
    recordings = []
    for name, saved in (("a", prompt), ("b", faulty(prompt, 1, factor=1 + 1e-7))):
        sb.save(saved, tmp_path / name, format="softbridge", base=config)
        (tmp_path / f"{name}.safetensors").write_bytes(pack(probe(tmp_path / name, base=config, dtype="bfloat16")))
        recordings.append(unpack(tmp_path / f"{name}.safetensors"))
    certificate = compare(*recordings, level="rounding")
    assert certificate.same
    far = faulty(prompt, 1, factor=1.5)
    sb.save(far, tmp_path / "c", format="softbridge", base=config)
    other = probe(tmp_path / "c", base=config, dtype="bfloat16")
    assert (found := compare(recordings[0], other).parted) is not None
    assert found.layer == 1


class Page(HTMLParser):
    """What a page is made of; anything left open, or closed twice, is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data


HOSTILE = "</title><script>alert(1)</script><img src=x onerror=alert(1)>&\"'\x1b[31m\u202e"


def test_a_page_is_whole_needs_nothing_and_runs_nothing() -> None:
    prompt = prefix_of("gpt2")
    certificate = certify(prompt, faulty(prompt, 1))
    # Whatever a stranger's recordings may say.
    side = Side(HOSTILE, HOSTILE, HOSTILE, True, HOSTILE, {HOSTILE: HOSTILE})
    faults = [one if one.name == "dropped" else replace(one, name=HOSTILE) for one in certificate.faults]
    hostile = replace(
        certificate,
        source=side,
        target=replace(side, loaded=False),
        base=HOSTILE,
        weights=HOSTILE,
        dtype=HOSTILE,
        geometry=replace(certificate.geometry, model_type=HOSTILE),
        claim=Claim((HOSTILE,), (HOSTILE,)),
        figures=tuple(replace(one, probe=HOSTILE, judged=False, note=HOSTILE) for one in certificate.figures),
        layers=tuple(replace(one, stack=HOSTILE, part=HOSTILE) for one in certificate.layers),
        faults=tuple(faults),
        islands=(HOSTILE,),
        untried={HOSTILE: HOSTILE},
        versions={HOSTILE: HOSTILE},
    )
    for shown in (certificate, hostile):
        text = page(shown)
        found = Page(text)
        tags = {tag for tag, _ in found.tags}
        assert not tags & {"script", "img", "link", "iframe", "a", "object", "use", "image", "base"}
        names = {name for _, attributes in found.tags for name in attributes}
        assert not {name for name in names if name.startswith("on") or name in ("src", "href", "xlink:href")}
        assert not re.search(r"https?:|url\(|@import", text)
        assert not set("\x1b\u202e") & set(text)
        assert sum(tag == "svg" for tag, _ in found.tags) == 2
        dots = sum(tag == "circle" for tag, _ in found.tags)
        values = sum(1 + (one.working is not None) for one in shown.figures) + len(shown.layers)
        assert dots == values + 3, "a dot for each figure, and one for each name of a series"
        assert json.dumps(shown.to_json(), indent=2, sort_keys=True) in found.text
    figure = next(one for one in certificate.figures if one.probe == "alone")
    assert f"alone, float64: {figure.float64:.2e}" in page(certificate)
    assert "decoder 1 attn, float64" in page(certificate)
    assert "<script>alert(1)</script><img src=x onerror=alert(1)>" in Page(page(hostile)).text


def test_what_is_no_number_is_drawn_at_the_edge() -> None:
    certificate = same_sides()
    ends = [float("nan"), float("inf"), 1e300, 0.0, 1e-300]
    layers = tuple(Layer("decoder", number, "output", value) for number, value in enumerate(ends))
    drawn = Page(page(replace(certificate, layers=layers)))
    heights = [
        float(attributes["cy"] or "nan") for tag, attributes in drawn.tags if tag == "circle" and attributes["r"] == "4"
    ][-len(ends) - 1 : -1]
    assert heights[0] == heights[1] < heights[2] < heights[4] < heights[3]
    assert "no layers were found" in page(replace(certificate, layers=()))


def test_the_commands_write_a_page_and_heed_the_level(tmp_path: Path) -> None:
    config, prompt = tiny_config("gpt2"), prefix_of("gpt2")
    config.save_pretrained(tmp_path / "base")
    sb.save(prompt, tmp_path / "a", format="softbridge", base=config)
    sb.save(as_dtype(prompt, DTYPES["bfloat16"]), tmp_path / "b", format="softbridge", base=config)
    words = ["verify", str(tmp_path / "a"), str(tmp_path / "b"), "--base", str(tmp_path / "base")]
    words += ["--dtype", "bfloat16", "--json"]
    done = CliRunner().invoke(app, [*words, "--html", str(tmp_path / "page.html"), "--level", "rounding"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert (found["verdict"], found["level"]) == ("rounding", "rounding")
    assert "no more than bfloat16 rounds by itself" in Page((tmp_path / "page.html").read_text("utf-8")).text
    assert CliRunner().invoke(app, words).exit_code == 1
    taken = CliRunner().invoke(app, [*words, "--html", str(tmp_path / "page.html")])
    assert taken.exit_code == 2, "an existing file is not replaced"

    (tmp_path / "certificate.json").write_text(done.output, "utf-8")
    again = CliRunner().invoke(app, ["verify", str(tmp_path / "certificate.json")])
    assert again.exit_code == 1, "what counts as the same is the caller's word, not the certificate's"
    again = CliRunner().invoke(app, ["verify", str(tmp_path / "certificate.json"), "--level", "rounding"])
    assert again.exit_code == 0, again.output
    # As an earlier release wrote it, which had no such level.
    older = {**found, "schema": "softbridge/certificate/1", "verdict": "different"}
    older = {
        name: value for name, value in older.items() if name not in ("level", "claim", "unit", "layers", "untried")
    }
    (tmp_path / "certificate.json").write_text(json.dumps(older), "utf-8")
    again = CliRunner().invoke(app, ["verify", str(tmp_path / "certificate.json"), "--json"])
    assert again.exit_code == 1
    assert json.loads(again.output)["changes"] == []
