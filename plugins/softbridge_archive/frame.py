"""What every format of the archive is: a table of facts, and a function for each thing that it does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from softbridge import untrusted
from softbridge.errors import CheckpointError, Obstacle
from softbridge.geometry import Geometry
from softbridge.plugin.capabilities import Capabilities
from softbridge.prompt import SoftPrompt

Recognise = Callable[[untrusted.Files], bool]
Read = Callable[[untrusted.Files, "Geometry | None"], SoftPrompt]
Write = Callable[..., Mapping[str, untrusted.Content]]
Tell = Callable[[SoftPrompt, "Geometry | None"], Sequence[Obstacle]]
Advise = Callable[[SoftPrompt, "Geometry | None", int], Sequence[str]]
#: What a format can hold that is read only.
NOTHING = Capabilities()


@dataclass(eq=False)
class ArchiveFormat:
    """A toolkit's files. Its facts stand in the module that makes it.

    Attributes:
        name: of the format.
        summary: what the files are, in a line.
        files: patterns of the names of the files that are read.
        recognise: see `Format.sniff`. Two formats never recognise the same files, unless their bytes cannot tell.
        reader: see `Format.read`.
        reads, writes, proven: for the table in `plugins/README.md`: which of the toolkit's files are read and written,
            and what their meaning was compared with.
        encodings, capabilities, writer, obstacles_of: of what is written; a format without encodings is read only. The
            writer is given the prompt and the geometry, and the encoding where there are several.
        advise: see `Format.advice`.
    """

    name: str
    summary: str
    files: Sequence[str]
    recognise: Recognise
    reader: Read
    reads: str
    proven: str
    writes: str = "-"
    encodings: Sequence[str] = ()
    capabilities: Capabilities = NOTHING
    writer: Write | None = None
    obstacles_of: Tell = lambda prompt, geometry: ()
    advise: Advise = lambda prompt, geometry, first: ()
    engine: str = "native"  # none of these toolkits runs on a transformers of today

    def sniff(self, files: untrusted.Files) -> bool:
        try:
            return self.recognise(files)
        except CheckpointError:  # what is malformed is of no format, and reading it by name says why
            return False

    def read(self, files: untrusted.Files, geometry: Geometry | None) -> SoftPrompt:
        return self.reader(files, geometry)

    def obstacles(self, prompt: SoftPrompt, geometry: Geometry | None) -> Sequence[Obstacle]:
        return self.obstacles_of(prompt, geometry)

    def write(
        self, prompt: SoftPrompt, geometry: Geometry | None, encoding: str | None = None
    ) -> Mapping[str, untrusted.Content]:
        assert self.writer is not None  # nothing is lowered to a format that is read only
        which = (encoding or self.encodings[0],) if len(self.encodings) > 1 else ()
        return self.writer(prompt, geometry, *which)

    def advice(self, prompt: SoftPrompt, geometry: Geometry | None, first: int = 0) -> Sequence[str]:
        return self.advise(prompt, geometry, first)
