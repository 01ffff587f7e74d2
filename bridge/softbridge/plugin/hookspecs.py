"""The whole plugin interface: four hooks, and the four kinds of value that they return.

A plugin is a module named in the entry-point group ``softbridge``. Its top module must import no toolkit: an
`ImportError` there would take the whole program down, and listing what is installed would load everything.

What a `Format` and an `Engine` must have is in these two protocols. What they may have besides is in `FORMAT_EXTRAS`
and `ENGINE_EXTRAS`, a protocol each, and is asked for by `softbridge.plugin.optional.able` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pluggy

from softbridge.errors import Obstacle
from softbridge.geometry import Geometry
from softbridge.plugin.capabilities import Capabilities
from softbridge.plugin.prompt_bank import Entry, PromptBank
from softbridge.plugin.serving import Server
from softbridge.prompt.soft_prompt import SoftPrompt
from softbridge.untrusted import Content, Files
from softbridge_compat.defects import Defect

PROJECT = "softbridge"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class Format(Protocol):
    """A codec between files and the canonical form. It needs no toolkit installed."""

    name: str
    summary: str
    #: The engine that is this format's own toolkit; verification runs the files there if it is installed.
    engine: str
    capabilities: Capabilities

    @property
    def encodings(self) -> Sequence[str]:
        """How tensors can be stored, the default first: ``safetensors``, ``bin`` (torch's pickle), ``npy``.

        Empty: files of this format are read, and not written.
        """
        ...

    def sniff(self, files: Files) -> bool:
        """Whether the files are of this format, judged by their content. Must not read tensors' data."""
        ...

    def read(self, files: Files, geometry: Geometry | None) -> SoftPrompt:
        """Read the files. `positions` are what the toolkit itself does when it runs them.

        Raises:
            CheckpointError: the files are malformed or incomplete.
            BaseModelError: the files do not say enough and no geometry was given, or they do not fit it.
        """
        ...

    def obstacles(self, prompt: SoftPrompt, geometry: Geometry | None) -> Sequence[Obstacle]:
        """What stands against writing a prompt that the capabilities allow. Empty if nothing does."""
        ...

    def write(
        self, prompt: SoftPrompt, geometry: Geometry | None, encoding: str | None = None
    ) -> Mapping[str, Content]:
        """File name -> content, in one of `encodings` (None: the first).

        What may be large is a `Streamed`, which makes it while it is written, and what is small is bytes.

        The prompt has been lowered to the capabilities, and `obstacles` found none.
        """
        ...

    def advice(self, prompt: SoftPrompt, geometry: Geometry | None, first: int = 0) -> Sequence[str]:
        """What whoever runs the written files in the toolkit itself must do, so that it computes this prompt.

        Empty where the toolkit's own defaults do. Printed by ``convert`` and written into the manifest.

        Args:
            first: what the base model's `position_ids` are for a token that stands at 0 (`PositionScheme.first`).
        """
        ...


class Engine(Protocol):
    """Runs a soft prompt on a transformers model."""

    name: str
    summary: str
    capabilities: Capabilities

    def unavailable(self) -> str | None:
        """Why this engine cannot be used in this environment, or None. Must not import the toolkit."""
        ...

    def obstacles(self, prompt: SoftPrompt, model: Any) -> Sequence[Obstacle]:
        """What stands against running this prompt on this model here. Empty if nothing does."""
        ...

    def attach(self, model: Any, prompt: SoftPrompt) -> Any:
        """Make the model run with the prompt, and return the model to call (the same one, where possible).

        What it has done to the model when it raises, `softbridge.attach` undoes (see `softbridge.base.snapshot`); the
        values of parameters it must not have changed by then.

        Raises:
            EngineError: the engine is unavailable, or `obstacles` are not empty.
        """
        ...

    def extract(self, model: Any) -> SoftPrompt:
        """The prompt of an attached model, as it is now."""
        ...

    def detach(self, model: Any) -> Any:
        """Undo `attach`, and return the model that was given to it."""
        ...


@runtime_checkable
class Listing(Protocol):
    """What a format can say besides, if it knows the names of its files."""

    @property
    def files(self) -> Sequence[str]:
        """Patterns of the names of the files that it reads: these are fetched of a repository on the hub."""
        ...


@runtime_checkable
class Resumable(Protocol):
    """What a format can say besides, if it keeps what training needs in files that running does without."""

    @property
    def training_files(self) -> Sequence[str]:
        """Their names. They are left out where that is asked for (``--drop training``)."""
        ...


@runtime_checkable
class Catalogued(Protocol):
    """What a format can say besides, if its toolkit runs on no transformers of today: its row in a table of its own.

    The matrix of conversions leaves it out: what is read goes wherever the same prompt in `softbridge`'s form goes.
    """

    reads: str
    writes: str
    proven: str


@runtime_checkable
class Servable(Protocol):
    """What a format can say besides, if a server reads its files: that server judges what was written."""

    #: Its name.
    server: str


@runtime_checkable
class Introducing(Protocol):
    """What a format can say besides, for the model card beside its files.

    Without it the card says how softbridge itself loads them.
    """

    #: What the hub calls its toolkit (``library_name``).
    library: str

    def snippet(
        self, prompt: SoftPrompt, geometry: Geometry | None, *, path: str, base: str, encoding: str | None
    ) -> str:
        """A Python program that loads the files with the toolkit itself, and calls the model once.

        Args:
            path: of their folder, or their id on the hub.
            base: name of the base model, which anybody may have chosen: write it as ``repr`` does.
            encoding: as `Format.write` was told.
        """
        ...


@runtime_checkable
class Demonstrating(Protocol):
    """What an engine can do besides, if its toolkit has an interface to train with: it can start `softbridge demo`."""

    def train_example(self, model: Any, method: str, directory: Path, *, length: int, steps: int, seed: int) -> None:
        """Train a prompt for a few steps with the toolkit's own interface, and save it with the toolkit's own saver.

        Args:
            model: a transformers model; it is used up.
            method: ``prompt-tuning`` or ``prefix-tuning``.
            directory: where the toolkit's files go.
            length: P.

        Raises:
            EngineError: the toolkit does not offer the method for this model.
        """
        ...


@runtime_checkable
class Loader(Protocol):
    """What an engine can do besides, if its toolkit has files of its own and a loader for them."""

    def load(self, model: Any, prompt: SoftPrompt, directory: Path) -> Any:
        """Like `Engine.attach`, but the toolkit itself reads its files from `directory`.

        `prompt` is what softbridge read from the same files; it says where the tokens stand. The model is for running
        only, and is not detached again. Verification uses this, so that a fault in our own reading shows.
        """
        ...


@runtime_checkable
class Insertable(Protocol):
    """What an engine can do besides, if it attaches in place: its model is then a drop-in for any trainer."""

    def insert(self, model: Any, prompt: SoftPrompt) -> None:
        """Give an attached model other numbers, in place: the tensors that an optimiser holds stay what they are.

        Args:
            model: what `attach` returned.
            prompt: one that `extract` could have returned: of the same parts and shapes. Its head is not touched.

        Raises:
            EngineError: the model trains a parameterisation, and the prompt has none.
        """
        ...


@runtime_checkable
class Misgenerating(Protocol):
    """What an engine can say besides, if its toolkit's `generate` need not be the same function as its forward."""

    def generate_fault(self, prompt: SoftPrompt, geometry: Geometry) -> str | None:
        """Why the toolkit's own `generate` gives other tokens than its forward with this prompt here, or None.

        Verification then picks the tokens through the forward, so that the toolkit's fault is not taken for one of the
        conversion.
        """
        ...


@runtime_checkable
class Narrowing(Protocol):
    """What an engine can say besides, if its toolkit computes in float32 in a model of float64."""

    def float32_regions(self, prompt: SoftPrompt, geometry: Geometry) -> Sequence[str]:
        """What does so with this prompt, by name: the toolkit's own modules, or a parameterisation that it evaluates.

        In float32 another processor, or another number of threads, makes another last bit. Empty if nothing does.
        """
        ...


@runtime_checkable
class Banker(Protocol):
    """What an engine can do besides, if it can give each row of a batch a prompt of its own."""

    def attach_bank(self, model: Any, bank: PromptBank, fetch: Callable[[Entry], SoftPrompt]) -> Any:
        """Like `Engine.attach`, with all the prompts of a bank.

        Each call runs with the prompts of `bank.names(rows)`, and `fetch(bank.entry(name))` reads one of them and
        lowers it to what the engine can express on this model. A row's outputs are those that it has alone.
        """
        ...


@runtime_checkable
class SelfChecking(Protocol):
    """What an engine can do besides, if it can prove itself on the architecture that it was attached to."""

    def check_itself(self, model: Any) -> None:
        """Check the engine before the first call of an attached model; see `softbridge.selfcheck`.

        What does not hold is an `EngineError` at every call that it concerns. Nothing is checked, and nothing is
        refused, on a model for which this was not asked.
        """
        ...


#: Every protocol that a format, and an engine, may follow besides.
FORMAT_EXTRAS = (Listing, Resumable, Catalogued, Servable, Introducing)
ENGINE_EXTRAS = (Loader, Insertable, Misgenerating, Narrowing, Banker, SelfChecking, Demonstrating)


@hookspec
def softbridge_formats() -> Sequence[Format]:  # type: ignore[empty-body]
    """Return the formats that this plugin brings."""


@hookspec
def softbridge_engines() -> Sequence[Engine]:  # type: ignore[empty-body]
    """Return the engines that this plugin brings."""


@hookspec
def softbridge_servers() -> Sequence[Server]:  # type: ignore[empty-body]
    """Return the servers that this plugin brings."""


@hookspec
def softbridge_defects() -> Sequence[Defect]:  # type: ignore[empty-body]
    """Return the known defects of the toolkits that this plugin's engines run."""
