"""What the READMEs say is so: every block runs, every link leads somewhere, and every list is the code's own.

How a block is run depends on its fence:

- ``python``: in order, all of a document in one namespace, which starts with what `given` makes. A block whose first
  line names a file (``# NAME.py``) is a file of the example plugin, which is built, installed and run.
- ``console``: what follows ``$`` is run. It ends with status 2 where a refusal is shown, with 1 where the verdict is
  that two sides differ, and with 0 otherwise. What is shown must be printed, in this order. ``...`` stands for
  anything, and widths do not count. A figure agrees within a tenth; the noise of a precision within a factor of 30.
- ``toml``: the example plugin's project.

Two are not run. ``sh`` installs software, takes minutes or writes into the checkout: its targets, extras, files and
pins must exist. ``text`` is no code.
"""

from __future__ import annotations

import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import typer.main
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import softbridge as sb
import softbridge_archive
from softbridge.base import build
from softbridge.cli import app
from softbridge.geometry import read_geometry
from softbridge.methods import MultitaskPromptTuning
from softbridge.plugin import hookspecs
from softbridge.plugin.hookspecs import Catalogued
from softbridge.plugin.optional import able
from softbridge.plugin.registry import engines, formats
from softbridge.prompt import Positions, container
from softbridge.testing import random_input_prompt, random_prefix, tiny_config, tiny_model
from softbridge.verification import Certificate

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = {
    str(path.relative_to(ROOT)): path.read_text()
    for folder in (ROOT, *(ROOT / name for name in ("bridge", "plugins", "compat", "tests")))
    for path in sorted(folder.glob("*.md"))
}
README, CORE, PLUGINS = (DOCUMENTS[name] for name in ("README.md", "bridge/README.md", "plugins/README.md"))
#: Whether this stack has every toolkit, so that what the documents show of who ran what is what is printed.
WHOLE = all(engine.unavailable() is None for engine in engines().values())

pytestmark = [
    pytest.mark.filterwarnings("ignore:.pin_memory. argument is set as true:UserWarning"),
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing.* is deprecated:FutureWarning"),
]


class Block(NamedTuple):
    document: str
    line: int
    fence: str
    text: str

    @property
    def file(self) -> str | None:
        """The file of the example plugin that it is, if it is one."""
        named = re.match(r"# (\S+\.(?:py|toml))\n", self.text)
        return named.group(1) if named else None


def blocks(*fences: str) -> list[Block]:
    found = []
    for name, text in DOCUMENTS.items():
        for match in re.finditer(r"^```(.*)\n((?:(?!```).*\n)*?)```$", text, re.MULTILINE):
            found.append(Block(name, text[: match.start()].count("\n") + 2, *match.groups()))
    return [block for block in found if not fences or block.fence in fences]


def section(document: str, title: str) -> str:
    return document.split(f"\n## {title}\n")[1].split("\n## ")[0]


# --- what the documents are about ------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that the documents name, where they are run."""
    monkeypatch.chdir(tmp_path)
    llama = tiny_model("llama", torch.float32)
    llama.save_pretrained("path/to/base")
    tiny_config("t5").save_pretrained("t5-v1_1-base")
    geometry, t5 = read_geometry(llama.config), read_geometry(tiny_config("t5"))
    prefix = random_prefix(geometry)
    sb.save(random_prefix(geometry, seed=1), "other_prefix", format="peft", base=llama)
    sb.save(prefix, "peft_prefix", format="peft", base=llama)
    sb.save(prefix, "adapterhub_prefix", format="adapterhub", base=llama)
    sb.save(
        MultitaskPromptTuning(2, length=4).initialise(geometry, seed=0), "peft_multitask", format="peft", base=llama
    )
    for name in ("prompts/sst2", "peft_prompt"):
        sb.save(random_input_prompt(geometry), name, format="peft", base=llama)
    sb.save(prefix, "prompts/xsum", format="softbridge", base=llama)
    sb.save(random_input_prompt(t5), "sst2.npy", format="google", base=tiny_config("t5"))
    torch_file = Path("prompt_transferability/SST2PromptT5/task_prompt")
    torch_file.parent.mkdir(parents=True)
    torch.save(torch.ones(4, t5.hidden), torch_file)
    skewed = Positions({"decoder": 0}, "skewed", "pinned")
    sb.save(random_prefix(t5, positions=skewed), "adapterhub_t5", format="adapterhub", base=tiny_config("t5"))
    return tmp_path


def tokenizer() -> Any:
    """One token for each of the words in the documents."""
    special = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"]
    words = [" Overall", " it", " is", ".", " terrible", " great", "a", " fine", " day"]
    vocabulary = {word: number for number, word in enumerate([*special, *words])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+|\."), "isolated")
    names = ("pad", "cls", "sep", "mask", "unk")
    given = {f"{name}_token": word for name, word in zip(names, special, strict=True)}
    return PreTrainedTokenizerFast(tokenizer_object=made, **given)


def given() -> dict[str, Any]:
    """What the Python blocks of a document have besides what they import and make themselves."""
    ids = torch.arange(5, 29).reshape(3, 8)
    return {
        "model": tiny_model("llama", torch.float32),
        "token_ids": list(range(5, 25)),
        "tokenizer": tokenizer(),
        "batch": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        "dataset": [{"input_ids": row, "labels": row} for row in ids],
        "optimizer_of": lambda model: torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01),
    }


# --- the blocks ------------------------------------------------------------------------------------------------------


def test_every_fence_is_one_that_is_run_or_exempt() -> None:
    assert {block.fence for block in blocks()} == {"python", "console", "toml", "sh", "text"}
    for name, text in DOCUMENTS.items():
        fences = len(re.findall(r"^ *```", text, re.MULTILINE))
        assert fences == 2 * sum(block.document == name for block in blocks()), f"{name}: a block that nothing runs"


@pytest.mark.parametrize("name", sorted({block.document for block in blocks("python") if block.file is None}))
def test_the_python_blocks_run(name: str, place: Path, request: pytest.FixtureRequest) -> None:
    if name == "plugins/README.md":
        request.getfixturevalue("installed")
    names = given()
    for block in blocks("python"):
        if block.document == name and block.file is None:
            code = "\n" * (block.line - 1) + block.text
            exec(compile(code, str(ROOT / name), "exec"), names)


@pytest.mark.parametrize("name", sorted({block.document for block in blocks("console")}))
def test_the_console_blocks_print_what_they_show(name: str, place: Path) -> None:
    for block in blocks("console"):
        if block.document == name:
            for command, shown in commands(block.text):
                run(command, shown, f"{name}:{block.line}")


def commands(text: str) -> Iterator[tuple[str, str]]:
    """(command, what is shown below it)."""
    assert text.startswith("$ ")
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, shown = part.partition("\n")
        yield command, shown


def run(command: str, shown: str, where: str) -> None:
    program, *arguments = shlex.split(command, comments=True)
    assert program == "softbridge", f"{where}: {command}"
    done = CliRunner().invoke(app, arguments)
    wanted = 2 if "refused:" in shown else int("verdict: DIFFERENT" in shown)
    assert done.exit_code == wanted, f"{where}: {command}\n{done.output}"
    if WHOLE or "adapterhub" not in command:
        assert prints(shown, done.output), f"{where}: {command}\nprints\n{done.output}"


#: A figure, and units of least precision, of which the noise of float32 has any number.
FIGURE, UNITS = r"\d+(?:\.\d+)?e[+-]\d+", r"\([\d.]+(?:e[+-]\d+)? units\)"


def prints(shown: str, printed: str) -> bool:
    """Whether what is shown is printed, in this order."""
    printed, place = plain(printed), 0
    for segment in filter(None, map(str.strip, plain(shown).split("..."))):
        parts = re.split(f"({FIGURE}|{re.escape('(units)')})", segment)
        pattern = "".join(f"({FIGURE})" if re.fullmatch(FIGURE, part) else re.escape(part) for part in parts)
        found = re.compile(pattern).search(printed, place)
        if found is None or not all(map(agree, re.findall(FIGURE, segment), found.groups())):
            return False
        place = found.end()
    return True


def plain(text: str) -> str:
    return " ".join(re.sub(UNITS, "(units)", re.sub("[─━]+", " ", text)).split())


def agree(shown: str, printed: str) -> bool:
    if float(shown) < 0.01:  # the noise of a precision
        return float(shown) / 30 < float(printed) < float(shown) * 30
    return abs(float(printed) / float(shown) - 1) < 0.1


def test_another_output_is_found_out() -> None:
    printed = "fault: two   layers swapped\n ────\n 6.9e-01   9.7e-07 (11.7 units)\nverdict: the same function"
    assert prints("fault: two layers swapped 6.8e-01 2e-06 (3 units)\n...\nverdict: the same function", printed)
    assert not prints("fault: two layers swapped 3.9e-01", printed)
    assert not prints("fault: two layers swapped 6.9e-01 9.7e-04 (11.7 units)", printed)
    assert not prints("verdict: the same function\n...\nfault: two layers", printed)
    assert not prints("verdict: DIFFERENT", printed)


def test_what_is_not_run_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pins = {(ROOT / "compat" / f"{stack}.txt").read_text() for stack in ("transformers4", "transformers5")}
    for block in blocks("sh"):
        for line in block.text.splitlines():
            match shlex.split(line, comments=True):
                case ["make", target]:
                    assert target in targets, line
                case ["python", file, "write"]:
                    assert (ROOT / file).exists()
                case ["pip", "install", "-c", constraints, wanted]:
                    assert (ROOT / constraints).exists()
                    assert wanted in {f".[{extra}]" for extra in extras}
                case ["pip", "install", pinned]:
                    assert all(f"\n{pinned}\n" in text for text in pins), line
                case _:
                    pytest.fail(f"{block.document}:{block.line}: {line}")
    assert targets - {"lint"} <= {word for block in blocks("sh") for word in shlex.split(block.text, comments=True)}


# --- the example plugin ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example plugin, built and installed as a distribution of its own; the folder that it is in."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for block in blocks("python", "toml"):
        if block.file is not None:
            (source / block.file).write_text(block.text)
    assert {path.name for path in source.iterdir()} == {"pyproject.toml", "softbridge_plain.py", "softbridge_embeds.py"}
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target"]
    subprocess.run([*pip, str(site), str(source)], check=True, capture_output=True)
    return site


@pytest.fixture
def installed(built: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, on the path, beside the files that the documents name."""
    monkeypatch.syspath_prepend(built)
    return built


#: A prompt is converted into the example's format, and verified by its engine; then by the engine with a fault.
USE_IT = """
import json, sys
import softbridge as sb
from softbridge.doctor import diagnose
from softbridge.errors import OutputError
from softbridge.plugin.registry import owners

def told(*asked):
    return [defect.id for defect in diagnose(*asked).defects if defect.engine == "embeds"]

certificate = sb.convert("bert_prompt", "plain", to="plain", base="bert", verify=True).certificate
print(owners()["softbridge_formats"]["plain"], owners()["softbridge_engines"]["embeds"])
print(certificate.source.engine, certificate.target.engine, certificate.verdict)
print(told(), told("bert_prompt", "bert"), told("bert_prefix", "bert"))
sys.modules["softbridge_embeds"].BESIDE["attention_mask"] = 0
try:
    sb.convert("bert_prompt", "faulty", to="plain", base="bert", verify=True)
except OutputError as error:
    print(error.found)
"""


def test_the_example_plugin_comes_in_by_its_entry_points(installed: Path) -> None:
    bert = build(tiny_config("bert"), "masked-lm", torch.float32, 0)
    bert.save_pretrained("bert")
    sb.save(random_input_prompt(read_geometry(bert.config)), "bert_prompt", format="peft", base=bert)
    sb.save(random_prefix(read_geometry(bert.config)), "bert_prefix", format="peft", base=bert)
    code = f"import sys; sys.path.insert(0, {str(installed)!r})\n{USE_IT}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    owners, certificate, defects, fault = done.stdout.splitlines()
    assert owners == "plain embeds"
    assert re.fullmatch("peft embeds (bitwise|exact)", certificate)
    assert defects == "['embeds-hidden-states'] ['embeds-hidden-states'] []"
    assert fault.startswith("verification found the converted prompt different")
    assert not Path("faulty").exists()


def test_the_examples_defect_is_where_its_record_says(installed: Path) -> None:
    embeds = import_module("softbridge_embeds")
    bert = build(tiny_config("bert"), "masked-lm", torch.float64, 0)
    prompt = random_input_prompt(read_geometry(bert.config), 4)
    model = embeds.EmbedsEngine().attach(bert, prompt)
    output = model(torch.arange(5, 11)[None], output_hidden_states=True)
    assert output.logits.shape[1] == 6
    assert output.hidden_states[-1].shape[1] == 10
    assert embeds.HIDDEN_STATES.applies()
    assert embeds.HIDDEN_STATES.concerns(prompt, None)
    assert not embeds.HIDDEN_STATES.concerns(random_prefix(read_geometry(bert.config)), None)


def test_the_examples_are_as_short_as_is_said() -> None:
    lengths = {block.file: len(block.text.splitlines()) for block in blocks("python") if block.file}
    assert lengths["softbridge_plain.py"] < 100
    assert lengths["softbridge_embeds.py"] < 200


# --- lists and links -------------------------------------------------------------------------------------------------


def test_the_first_page_is_short() -> None:
    assert len(README.splitlines()) <= 200


def test_every_link_leads_somewhere() -> None:
    count = 0
    for name, text in DOCUMENTS.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, anchor = target.partition("#")
            linked = (ROOT / name).parent / path
            assert linked.exists(), f"{name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
                assert anchor in {heading.lower().replace(" ", "-").replace("'", "") for heading in headings}, target
            count += 1
    assert count > 30


def test_every_file_of_tests_that_is_named_exists() -> None:
    for name, text in DOCUMENTS.items():
        for path in re.findall(r"`((?:tests|compat|bridge|plugins)/[\w./-]+)`", text):
            assert (ROOT / path).exists() or (ROOT / name).parent.joinpath(path).exists(), f"{name}: {path}"


def test_the_container_format_is_specified_in_the_words_of_its_module() -> None:
    specification = inspect.cleandoc(container.__doc__ or "").split("\n", 2)[2]
    assert section(CORE, "The container format").strip() == specification.strip()
    assert len(specification.splitlines()) < 50, "under a page"


def test_every_command_format_and_engine_is_named() -> None:
    group = typer.main.get_command(app)
    for command in group.commands:  # type: ignore[attr-defined]
        assert f"softbridge {command}" in README
    apart = {name for name, form in formats().items() if able(form, Catalogued) is not None}
    for name in (*formats(), *engines()):
        assert f"| `{name}` |" in PLUGINS
        assert f"| `{name}` |" in README or name in apart


def test_the_archives_table_is_generated() -> None:
    table = PLUGINS.split("<!-- archive -->\n")[1].split("<!-- end -->")[0]
    assert table == softbridge_archive.catalogue(), "put softbridge_archive.catalogue() between the two comments"


def test_every_protocol_of_a_plugin_is_named() -> None:
    protocols = {
        name
        for name, value in vars(hookspecs).items()
        if getattr(value, "_is_protocol", False) and value.__module__ == hookspecs.__name__
    }
    assert {"Format", "Engine", "Loader"} < protocols
    for name in protocols - {"Format", "Engine"}:
        assert f"(`{name}`)" in PLUGINS, name
    for hook in (name for name in vars(hookspecs) if name.startswith("softbridge_")):
        assert f"`{hook}()`" in PLUGINS


def test_every_field_of_the_certificate_is_documented() -> None:
    text = section(CORE, "The certificate")
    for field in fields(Certificate):
        assert f"`{field.name}`" in text, field.name


def test_every_module_of_the_core_is_named() -> None:
    core = ROOT / "bridge" / "softbridge"
    text = section(CORE, "The modules")
    named = set(re.findall(r"\b(\w+\.py|\w+/)(?=[\s,])", text.split("plugins/")[0]))
    there = {f"{path.name}/" if path.is_dir() else path.name for path in core.iterdir() if path.name[0] not in "._"}
    assert there - {"py.typed"} == named - {"softbridge/", "bridge/"}


def test_the_stacks_are_the_ones_that_are_built() -> None:
    for stack in ("transformers4", "transformers5"):
        pins = (ROOT / "compat" / f"{stack}.txt").read_text()
        version = re.search(r"^transformers==(.*)$", pins, re.MULTILINE)
        assert version is not None
        assert f"transformers {version.group(1)}" in section(DOCUMENTS["tests/README.md"], "Stacks")
