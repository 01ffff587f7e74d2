"""A valid file of every format that is read: what the tests of recognition, of foreign bytes and the fuzzer begin with.

Our own writers make those of `OWN`. The files of the archive's formats are those that its own tests make: each
``tests/plugins/test_archive_*.py`` has a table `FILES` of what makes them, under names that begin with the format's.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import softbridge as sb
from softbridge.base import BaseModel
from softbridge.checkpoint.read import read_files
from softbridge.errors import SoftbridgeError
from softbridge.geometry import Geometry
from softbridge.plugin.registry import format_named
from softbridge.testing import random_input_prompt, random_prefix, tiny_config
from softbridge.untrusted import Files

Make = Callable[[Path], Path]
HERE = Path(__file__).parent


@cache
def of_the_archive() -> dict[str, Make]:
    """Name -> makes the file or folder below a path."""
    found: dict[str, Make] = {}
    for path in sorted((HERE / "plugins").glob("test_archive_*.py")):
        module = loaded(path)
        assert not found.keys() & module.FILES.keys()
        found |= module.FILES
    return found


@cache
def loaded(path: Path) -> Any:
    """A module of tests, for what it makes."""
    spec = importlib.util.spec_from_file_location(f"made_by_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def by_us(form: str, make: Callable[..., sb.SoftPrompt], family: str = "gpt2") -> Make:
    """Makes a folder of a format with our own writer."""

    def written(folder: Path) -> Path:
        config = tiny_config(family)
        sb.save(make(BaseModel(config).geometry), folder / "out", format=form, base=config, accept=["positions"])
        return folder / "out"

    return written


#: Of the formats with engines or servers of their own.
OWN: dict[str, Make] = {
    "softbridge vectors": by_us("softbridge", random_input_prompt),
    "softbridge prefix": by_us("softbridge", random_prefix),
    "peft vectors": by_us("peft", random_input_prompt),
    "peft prefix": by_us("peft", random_prefix),
    "adapterhub prefix": by_us("adapterhub", random_prefix),
    "llamacpp prefix": by_us("llamacpp", random_prefix),
    "mlx prefix": by_us("mlx", random_prefix),
    "vllm vectors": by_us("vllm", random_input_prompt),
    "vllm prefix": by_us("vllm", random_prefix),
}

#: Formats that only a name can choose -> the specimen that is read so.
CHOSEN = {
    "attempt": "bare-tensor",
    "google:after-first-token": "google npy",
    "openprompt:after-first-token": "openprompt gpt2.lstm",
    "openprompt:before-sequence": "openprompt gpt2.lstm",
    "prompt-transferability": "bare-tensor",
    "prompt-transferability:2.0": "bare-tensor",
    "tensor": "bare-tensor",
    "tensor:after-first-token": "bare-tensor",
}
#: Formats of which no file says enough to be read, whatever it is given.
NEVER_READ = frozenset(("bare-tensor",))


@dataclass(frozen=True)
class Specimen:
    """A valid checkpoint, held in memory.

    Attributes:
        format: that reads it.
        files: name -> content; of one file, or of a folder's with ``sub/name``.
        alone: whether it is one file, and no folder.
        geometry: of the base model that it needs to be read, or None.
        prompt: that it holds; None: its format never reads any.
    """

    name: str
    format: str
    files: Mapping[str, bytes]
    alone: bool
    geometry: Geometry | None
    prompt: sb.SoftPrompt | None

    def laid(self, folder: Path, files: Mapping[str, bytes] | None = None) -> Path:
        """The path of its files, or of others in their place, in a folder."""
        for name, content in (self.files if files is None else files).items():
            path = folder / name
            if path.parent != folder:
                path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        return folder / next(iter(self.files)) if self.alone else folder

    def read(self, path: Path) -> sb.SoftPrompt:
        """What the format reads at the path, with what a manifest there says."""
        return read_files(Files(path), format_named(self.format), self.geometry).prompt


@cache
def geometries() -> tuple[Geometry, ...]:
    """Of base models that specimens are for."""
    families = ("gpt2", "t5", "bert")
    found = [BaseModel(tiny_config(family)).geometry for family in families]
    thunlp, vectors = (loaded(HERE / "plugins" / f"test_archive_{name}.py") for name in ("thunlp", "vectors"))
    more = [
        *(thunlp.config(family) for family in (*families, "bart")),
        vectors.roberta_base(hidden_size=32, num_attention_heads=4),
    ]
    return *found, *(BaseModel(config).geometry for config in more)


@cache
def specimens() -> dict[str, Specimen]:
    """Name -> a valid checkpoint: of every format that there is, at least one."""
    makes = {**OWN, **of_the_archive()}
    named = {name: (name.split()[0], make) for name, make in makes.items()}
    named |= {form: (form, makes[source]) for form, source in CHOSEN.items()}
    return {name: _specimen(name, form, make) for name, (form, make) in named.items()}


def _specimen(name: str, form: str, make: Make) -> Specimen:
    with tempfile.TemporaryDirectory() as folder:
        path = make(Path(folder))
        found = Files(path)
        files = {one: (path if found.is_file else path / one).read_bytes() for one in found.names}
        why: SoftbridgeError | None = None
        for geometry in (None, *geometries()):
            try:
                prompt = read_files(Files(path), format_named(form), geometry).prompt
            except SoftbridgeError as error:
                why = error
                continue
            return Specimen(name, form, files, found.is_file, geometry, prompt)
    assert form in NEVER_READ, (name, why)
    return Specimen(name, form, files, found.is_file, None, None)
