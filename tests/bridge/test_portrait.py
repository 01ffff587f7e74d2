"""`inspect --html`: the numbers of its pictures, a page that nothing acts in, and both pages in a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
import zlib
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import softbridge as sb
from softbridge.base import BaseModel
from softbridge.cli.console import app
from softbridge.cli.html import decades, document, heatmap, plot
from softbridge.cli.page import page
from softbridge.cli.portrait_page import portrait_page
from softbridge.prompt import KeyValue, SoftPrompt
from softbridge.testing import random_adaption, random_input_prompt, random_prefix, tiny_config, tiny_model
from softbridge.tools.portrait import WORDS, Picture, norms, portrait
from softbridge.verification import Subject, verify_prompts

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\u202e\x1b[31m&amp;'\""
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Words:
    """A tokenizer whose words are hostile."""

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [f"{HOSTILE}{number}" for number in ids]


def louder(prompt: SoftPrompt, times: float) -> SoftPrompt:
    (part,) = prompt.prefixes
    layers = {n: KeyValue((pair.keys * times).astype(np.float32), pair.values) for n, pair in part.layers.items()}
    return replace(prompt, parts=(replace(part, layers=layers),))


def picture_of(kind: str, prompt: Any, model: Any = None, **settings: Any) -> Picture:
    (picture,) = portrait(prompt(BaseModel(tiny_config(kind)).geometry), model, **settings)
    return picture


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_the_lengths_are_those_of_the_vectors() -> None:
    prompt = random_prefix(BaseModel(tiny_config("llama")).geometry, length=6)
    (picture,) = portrait(prompt)
    pair = prompt.prefixes[0].layers[1]
    assert picture.norms["keys"].shape == (3, 6)
    by_hand = np.sqrt((np.linalg.norm(pair.keys.astype(np.float64), axis=-1) ** 2).mean(axis=0))
    assert np.allclose(picture.norms["keys"][1], by_hand)
    rows = np.concatenate([p.keys.transpose(1, 0, 2).reshape(6, -1) for p in prompt.prefixes[0].layers.values()], 1)
    assert np.allclose(picture.spectrum["keys"] ** 2, np.linalg.eigvalsh(rows @ rows.T)[::-1], rtol=1e-4)
    assert np.allclose(np.diag(picture.cosines), 1)
    assert abs(picture.cosines[0, 1]) < 0.5
    assert (picture.own, picture.louder, picture.words) == ({}, None, None)
    pairs = prompt.prefixes[0].layers.items()
    layers = {n: KeyValue(np.repeat(pair.keys[:, :1], 2, 1), np.repeat(pair.values[:, :1], 2, 1)) for n, pair in pairs}
    part = replace(prompt.prefixes[0], layers=layers)
    twice = replace(prompt, parts=(part,), positions=replace(prompt.positions, start={"decoder": 2}))
    (same,) = portrait(twice)
    assert np.allclose(same.cosines, 1), "two tokens that are one"
    assert same.spectrum["keys"][1] < 1e-6 * same.spectrum["keys"][0]


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_the_models_own_keys_are_those_that_it_computes(kind: str) -> None:
    """By a hook on the projection of keys, which no rotation makes longer."""
    model = tiny_model(kind, torch.float32)
    seen: list[torch.Tensor] = []
    name = {"llama": "self_attn.k_proj", "t5": "decoder.block.1.layer.0.SelfAttention.k"}[kind]
    module = next(m for n, m in reversed(list(model.named_modules())) if n.endswith(name))
    hook = module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    picture = picture_of(kind, random_prefix_of_decoder, model)
    hook.remove()
    (keys,) = seen
    heads = BaseModel(model.config).geometry.decoder
    assert heads is not None
    split = keys[0].view(WORDS, heads.kv_heads, heads.head_dim).transpose(0, 1).detach().numpy()
    place = -1 if kind == "llama" else 1
    assert np.allclose(picture.own["keys"][place], np.percentile(norms(split), (5, 50, 95)), rtol=1e-4)
    assert not model.training


def random_prefix_of_decoder(geometry: Any) -> SoftPrompt:
    return random_prefix(geometry, sites=("self",))


def test_a_prefix_that_drowns_the_text_shows() -> None:
    model = tiny_model("llama", torch.float32)
    prompt = random_prefix(BaseModel(model.config).geometry)
    found = {"path": "p", "format": "f", "files": {}, "needs_base": "x"}
    (quiet,), (loud,) = portrait(prompt, model), portrait(louder(prompt, 100), model)
    assert quiet.louder is not None
    assert loud.louder is not None
    assert loud.louder == pytest.approx(100 * quiet.louder, rel=1e-5)
    assert "it may drown the text" in portrait_page(found, [loud])
    assert "it may drown the text" not in portrait_page(found, [quiet])


def test_vectors_are_beside_words_and_named_by_them() -> None:
    model = tiny_model("gpt2", torch.float32)
    table = model.get_input_embeddings().weight.detach().numpy()
    prompt = random_input_prompt(BaseModel(model.config).geometry, length=3)
    prompt = replace(prompt, parts=(replace(prompt.inputs[0], vectors=10 * table[[7, 11, 13]]),))
    (picture,) = portrait(prompt, model)
    assert picture.words is not None
    assert picture.words.ids[:, 0].tolist() == [7, 11, 13]
    assert picture.louder == pytest.approx(10, rel=0.5)


@pytest.mark.parametrize(
    ("kind", "make", "reason"),
    [
        ("bert", random_prefix, "an encoder keeps its keys in no cache"),
        ("llama", random_adaption, "no numbers of its own"),
    ],
)
def test_what_cannot_be_compared_says_why(kind: str, make: Any, reason: str) -> None:
    picture = picture_of(kind, make, tiny_model(kind, torch.float32))
    assert reason in picture.unknown
    assert picture.louder is None


# --- the page --------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    handle_startendtag = handle_starttag

    def handle_data(self, data: str) -> None:
        self.text += data


def hostile_page() -> str:
    model = tiny_model("llama", torch.float32)
    geometry = BaseModel(model.config).geometry
    pictures = [
        *portrait(random_input_prompt(geometry), model, Words()),
        *portrait(random_prefix(geometry), model),
        replace(portrait(random_prefix(geometry))[0], name=HOSTILE, unknown=HOSTILE),
    ]
    found = {"path": HOSTILE, "format": HOSTILE, "base": HOSTILE, "files": {HOSTILE: {}}, "needs_base": HOSTILE}
    return portrait_page(found, pictures, HOSTILE)


def test_nothing_of_a_checkpoint_acts_in_the_page() -> None:
    text = hostile_page()
    found = Page(text)
    assert not {tag for tag, _ in found.tags} & {
        "script",
        "img",
        "link",
        "iframe",
        "a",
        "object",
        "use",
        "image",
        "base",
    }
    names = {name for _, attributes in found.tags for name in attributes}
    assert not {name for name in names if name.startswith("on") or name in ("src", "href", "xlink:href")}
    assert not re.search(r"https?:|url\(|@import", text)
    assert not set("\x1b\u202e") & set(text)
    assert "<script>alert(1)</script><img src=x onerror=alert(1)>" in found.text


def test_both_pages_have_one_style_in_dark_and_light() -> None:
    config = tiny_config("gpt2")
    prompt = random_prefix(BaseModel(config).geometry)
    certificate = verify_prompts(Subject("a", prompt, "native"), Subject("b", prompt, "native"), BaseModel(config))
    found = {"path": "p", "format": "f", "files": {}, "needs_base": "x"}
    pages = page(certificate), portrait_page(found, portrait(prompt))
    styles = {re.findall("<style>(.*?)</style>", text, re.DOTALL)[0] for text in pages}
    (style,) = styles
    assert "prefers-color-scheme: dark" in style
    rest = style.split("@media", 1)[1].split("} }", 1)[1]
    assert not re.search(r"#[0-9a-f]{3}", rest), "colours stand at one place"
    assert not re.search(r'(?:fill|stroke)="#', page(certificate) + hostile_page())


def test_large_prompts_are_drawn_small() -> None:
    values = np.linspace(-1, 1, 300 * 200).reshape(300, 200)
    drawn = heatmap(values, range(300), range(200), 1.0)
    assert drawn.count("<rect") == 60 * 50
    assert 'class="two" fill-opacity="' in drawn
    assert heatmap(np.zeros((2, 2)), range(2), range(2), 0.0).count('fill-opacity="0.000"') == 4


def test_axes_end_where_the_numbers_do() -> None:
    assert decades([(0.5, 1.0, 20.0), None, 3.0]) == (-1, 2)
    assert decades([0.0, None, float("inf")]) == (0, 1)
    text = plot([("0", ((0.5, 1.0, 20.0), 0.0))], ("a", "b"), (), (-1, 2))
    assert ">1e-1<" in text
    assert ">0<" in text
    assert 'class="one"><title>0, a: 1.00e+00 (5.00e-01 to 2.00e+01)</title>' in text


def test_the_command_writes_the_page(tmp_path: Path) -> None:
    model = tiny_model("llama", torch.float32)
    model.save_pretrained(tmp_path / "base")
    sb.save(random_input_prompt(BaseModel(model.config).geometry), tmp_path / "p", format="peft", base=model.config)

    def call(*more: object) -> Any:
        return CliRunner().invoke(app, ["inspect", str(tmp_path / "p"), *map(str, more)])

    done = call("--base", tmp_path / "base", "--html", tmp_path / "page.html", "--json")
    assert done.exit_code == 0, done.output
    assert done.stdout == call("--base", tmp_path / "base", "--json").stdout
    text = (tmp_path / "page.html").read_text()
    assert "Nearest words" in text
    assert "times as long as the model&#x27;s own" in text
    assert call("--html", tmp_path / "page.html").exit_code == 2, "an existing file is not replaced"
    config = tmp_path / "base" / "config.json"
    assert call("--base", config, "--html", tmp_path / "bare.html").exit_code == 0
    assert "was given as a configuration only" in (tmp_path / "bare.html").read_text()
    assert call("--html", tmp_path / "alone.html").exit_code == 0
    assert "no base model with weights was given" in (tmp_path / "alone.html").read_text()


# --- in a browser ----------------------------------------------------------------------------------------------------


def browse(page: Path, *arguments: str) -> str:
    assert CHROMIUM is not None
    folder = page.parent / "profile"
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={folder}",
    ]
    done = subprocess.run(
        [*command, *arguments, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout


def corner(picture: Path) -> tuple[int, ...]:
    """The first pixel of a PNG: whatever predicts it, there is nothing before it."""
    content, data, place = picture.read_bytes(), b"", 8
    while place < len(content):
        size = int.from_bytes(content[place : place + 4], "big")
        if content[place + 4 : place + 8] == b"IDAT":
            data += content[place + 8 : place + 8 + size]
        place += 12 + size
    return tuple(zlib.decompress(data)[1:4])


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed, to see the pages in")
def test_a_browser_shows_the_page_in_dark_and_light(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(hostile_page())
    shown = Page(browse(path, "--dump-dom"))
    wanted = Page(path.read_text())
    count = {
        tag: sum(tag == one for one, _ in wanted.tags) for tag in ("svg", "circle", "rect", "table", "td", "figure")
    }
    assert {tag: sum(tag == one for one, _ in shown.tags) for tag in count} == count
    assert not {tag for tag, _ in shown.tags} & {"script", "img", "a"}
    colours = {}
    for name, scheme in (("dark", "0"), ("light", "1")):
        picture = tmp_path / f"{name}.png"
        browse(path, f"--screenshot={picture}", f"--blink-settings=preferredColorScheme={scheme}")
        colours[name] = corner(picture)
    assert max(colours["dark"]) < 64
    assert min(colours["light"]) > 240


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed, to see the pages in")
def test_a_browser_would_run_what_is_not_escaped(tmp_path: Path) -> None:
    """And the page's own policy keeps even that from running."""
    path = tmp_path / "page.html"
    loose = "<script>document.title = 'run'</script>"
    path.write_text(f"<title>still</title>{loose}")
    assert "<title>run</title>" in browse(path, "--dump-dom")
    path.write_text(document("still", [loose]))
    assert "<title>still</title>" in browse(path, "--dump-dom")
