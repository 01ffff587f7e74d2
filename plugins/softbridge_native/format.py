"""softbridge's own format: the canonical form itself, in one safetensors file (see `softbridge.prompt.container`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from softbridge.errors import Obstacle
from softbridge.geometry import Geometry
from softbridge.plugin.capabilities import EVERYTHING
from softbridge.prompt import SoftPrompt, file_of, unpack
from softbridge.prompt.container import KEY, WEIGHTS_FILE
from softbridge.untrusted import Content, Files

FILE = "prompt.safetensors"


class NativeFormat:
    """One file, which holds everything that the canonical form can say."""

    name = "softbridge"
    summary = "the canonical form itself, one .safetensors file"
    encodings = ("safetensors",)
    engine = "native"
    capabilities = EVERYTHING

    def sniff(self, files: Files) -> bool:
        """Whether there is a safetensors file with our key in its header."""
        file = _file(files)
        return file is not None and files.kind(file) == "safetensors" and KEY in files.metadata(file)

    def read(self, files: Files, geometry: Geometry | None) -> SoftPrompt:
        """Read the file. The core checks the geometry."""
        return unpack(files, _file(files) or FILE)

    def obstacles(self, prompt: SoftPrompt, geometry: Geometry | None) -> Sequence[Obstacle]:
        """Nothing stands against it."""
        return ()

    def write(
        self, prompt: SoftPrompt, geometry: Geometry | None, encoding: str | None = None
    ) -> Mapping[str, Content]:
        """The one file."""
        return {FILE: file_of(prompt)}

    def advice(self, prompt: SoftPrompt, geometry: Geometry | None, first: int = 0) -> Sequence[str]:
        """Nothing: the engine reads the positions in the file."""
        return ()


def _file(files: Files) -> str | None:
    """``prompt.safetensors`` of a folder, or what a trainer saved there; or the one file, if of safetensors."""
    for name in (FILE, WEIGHTS_FILE):
        if name in files:
            return name
    return files.names[0] if files.is_file and files.names[0].endswith(".safetensors") else None


FORMAT = NativeFormat()
