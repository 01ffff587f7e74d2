"""What every format of the archive is: a table of facts, and a function for each thing that it does."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from softbridge import untrusted
from softbridge.arrays import BFLOAT16, Array
from softbridge.checkpoint.manifest import CERTIFICATE, MANIFEST
from softbridge.errors import BaseModelError, CheckpointError, Obstacle, few
from softbridge.geometry import Geometry, Site, Stack, read_geometry
from softbridge.methods import materialise, materialise_vectors
from softbridge.methods.parameterisations import eject
from softbridge.plugin.capabilities import Capabilities
from softbridge.prompt import BaseId, InputPrompt, KeyValuePrefix, Origin, Placement, Positions, SoftPrompt, Training
from softbridge.prompt.values import Json, json_object
from softbridge.template import Template

Recognise = Callable[[untrusted.Files], bool]
Read = Callable[[untrusted.Files, "Geometry | None"], SoftPrompt]
Write = Callable[..., Mapping[str, bytes]]
Tell = Callable[[SoftPrompt, "Geometry | None"], Sequence[Obstacle]]
Advise = Callable[[SoftPrompt, "Geometry | None", int], Sequence[str]]


#: Evaluating a parameterisation makes at most so many numbers for each that it has.
GROWTH = 32

#: What a format can hold that is read only.
NOTHING = Capabilities()
#: More layers than this are not believed of a model.
MOST_LAYERS = 2**16
#: What transformers' trainer saves beside a model's weights.
_TRAINER = re.compile(r"(.*/)?(optimizer|scheduler|scaler|training_args|rng_state(_\d+)?)\.(pt|pth|bin)")


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

    def write(self, prompt: SoftPrompt, geometry: Geometry | None, encoding: str | None = None) -> Mapping[str, bytes]:
        assert self.writer is not None  # nothing is lowered to a format that is read only
        which = (encoding or self.encodings[0],) if len(self.encodings) > 1 else ()
        return self.writer(prompt, geometry, *which)

    def advice(self, prompt: SoftPrompt, geometry: Geometry | None, first: int = 0) -> Sequence[str]:
        return self.advise(prompt, geometry, first)


def weights(files: untrusted.Files) -> Mapping[str, untrusted.Stored]:
    """Every tensor of a checkpoint, of one file or of several, by its name; none is read yet.

    Dictionaries in dictionaries are one name: ``state_dict.encoder.weight``. What a trainer saves beside them (the
    state of its optimiser ...) is passed over.

    Raises:
        CheckpointError: a file is malformed, or two of them hold tensors of the same name.
    """
    found: dict[str, untrusted.Stored] = {}
    for file in files.names:
        if files.kind(file) in ("safetensors", "pickle") and not _TRAINER.fullmatch(file):
            for name, tensor in named(files.tree(file)).items():
                if name in found:
                    raise CheckpointError(
                        f"{files.path} holds several tensors {name!r:.80}, one of them in {file}",
                        "one checkpoint",
                        "give the path of the one to read",
                    )
                found[name] = tensor
    return found


def names(files: untrusted.Files) -> Collection[str]:
    """The names of every tensor. Of a file that is malformed there is none, which is for the reader to say."""
    found: set[str] = set()
    for file in files.names:
        with suppress(CheckpointError):
            if files.kind(file) in ("safetensors", "pickle"):
                found |= named(files.tree(file)).keys()
    return found


def saved(files: untrusted.Files, is_it: Callable[[Mapping[Any, Any]], bool]) -> dict[str, Mapping[Any, Any]]:
    """The dictionaries that torch.save wrote and that pass the test, by the names of their files. Never raises."""
    found: dict[str, Mapping[Any, Any]] = {}
    for name in files.names:
        with suppress(CheckpointError):  # of a file that is none of ours
            tree = files.tree(name) if files.kind(name) == "pickle" else None
            if isinstance(tree, dict) and is_it(tree):
                found[name] = tree
    return found


def the_one(found: Mapping[str, Any], files: untrusted.Files, what: str) -> Any:
    """The one thing that was found.

    Raises:
        CheckpointError: nothing was found, or several things.
    """
    if len(found) != 1:
        raise CheckpointError(
            f"{files.path} holds {len(found)} times {what}", "one prompt", "give the path of one file"
        )
    return next(iter(found.values()))


def named(tree: Any) -> dict[str, untrusted.Stored]:
    """Every tensor of what `Files.tree` gave, by its name.

    Raises:
        CheckpointError: the names would be longer than a file's description may be: lists that hold one another.
    """
    found: dict[str, untrusted.Stored] = {}
    todo, room = [("", tree)], untrusted.LIMIT
    while todo:
        path, node = todo.pop()
        if isinstance(node, untrusted.Stored):
            found[path] = node
        elif isinstance(node, (dict, list)):
            for name, child in node.items() if isinstance(node, dict) else enumerate(node):
                todo.append((f"{path}.{name}" if path else str(name), child))
                room -= len(todo[-1][0]) + 1
                if room < 0:
                    raise CheckpointError("names without end", "a checkpoint of tensors", "save the prompt's alone")
    return found


def below(found: Mapping[str, untrusted.Stored], stem: str) -> dict[str, untrusted.Stored]:
    """Those tensors whose names have ``stem`` before their last words, by these words: stem ``prefix_encoder`` finds
    ``embedding.weight`` in ``module.prefix_encoder.embedding.weight``. Empty if there is none.

    Args:
        stem: a regular expression.

    Raises:
        CheckpointError: the stem stands in several places.
    """
    matches = {name: re.fullmatch(rf"((?:.*\.)?(?:{stem}))\.(.+?)", name) for name in found}
    places = {match[1] for match in matches.values() if match is not None}
    if len(places) > 1:
        raise CheckpointError(
            f"tensors below {', '.join(sorted(places)[:4])}", "those of one prompt", "save that prompt's alone"
        )
    return {match[2]: found[name] for name, match in matches.items() if match is not None}


def unread(names: Collection[str]) -> tuple[str, ...]:
    """For `Origin.notes`: the names of tensors that are not the prompt's, and change nothing of what it computes."""
    return (f"not read: {len(names)} tensors that are not the prompt's ({few(sorted(names))})",) if names else ()


def plain(facts: Any, names: Iterable[str]) -> dict[str, Json]:
    """Those facts of a file that JSON can say, for `Origin.details`: of these names, where they are there."""
    found: dict[str, Json] = {}
    for name in names:
        if isinstance(facts, Mapping) and name in facts:
            with suppress(ValueError):
                found |= json_object({name: facts[name]}, name)
    return found


def made_prefix(training: Training, site: Site, geometry: Geometry) -> KeyValuePrefix:
    """What a parameterisation makes for every layer of a site.

    Raises:
        CheckpointError: its tensors are not those of the parameterisation, or not for this base model.
        BaseModelError: the base model does not have the site.
    """
    shape, layers = geometry.site(site), geometry.attending(site)
    assert shape is not None  # it attends
    with _evaluating(training):
        return materialise(training, site, layers, shape.kv_heads, shape.head_dim)


def made_vectors(training: Training) -> Array:
    """The vectors [P, H] that a parameterisation makes. Raises `CheckpointError`, as above."""
    with _evaluating(training):
        return materialise_vectors(training)


def made_rows(training: Training, site: Site) -> Array:
    """The rows [P, W] that a parameterisation makes for a site, of whatever layers. Raises `CheckpointError`."""
    with _evaluating(training):
        return eject(training, site)


def matrix(tensor: untrusted.Stored, first: int = 0) -> Array:
    """The rows of a tensor that must have two axes, both of some length, and floating-point numbers.

    Args:
        first: row that is read; those before it are none of the prompt's.

    Raises:
        CheckpointError: it is another.
    """
    floating = tensor.dtype.kind == "f" or tensor.dtype.name == "bfloat16"
    if len(tensor.shape) != 2 or tensor.shape[0] <= first or not tensor.shape[1] or not floating:
        raise CheckpointError(
            f"{tensor.name}: {list(tensor.shape)} of {tensor.dtype.name}",
            f"a floating-point matrix of at least {first + 1} rows",
            "check that the file is complete and what its toolkit wrote",
        )
    return tensor.array()[first:]


@contextmanager
def _evaluating(training: Training) -> Iterator[None]:
    rows = max((len(a) for name, a in training.tensors.items() if name.endswith("embedding") and a.ndim), default=0)
    widths = [max(array.shape, default=0) for name, array in training.tensors.items() if not name.endswith("embedding")]
    if rows * max(widths, default=0) > GROWTH * sum(array.size for array in training.tensors.values()):
        raise CheckpointError(
            f"a parameterisation that makes far more than it is: {training!r:.200}",
            f"at most {GROWTH} times as many numbers",
            "check the file",
        )
    try:
        yield
    except (ValueError, RuntimeError) as error:  # RuntimeError: torch lacks the operation for the dtype
        raise CheckpointError(
            str(error), "the tensors of one parameterisation", "check the file, and --base"
        ) from error


def renamed(tensors: Mapping[str, untrusted.Stored], beginnings: Mapping[str, str]) -> dict[str, Array]:
    """Tensors by our names, read. One whose name has none of the beginnings keeps it; evaluating then complains.

    Args:
        beginnings: of their names -> of ours.
    """
    found = {}
    for name, tensor in tensors.items():
        theirs = next((known for known in beginnings if name.startswith(known)), "")
        found[beginnings.get(theirs, "") + name.removeprefix(theirs)] = tensor.array()
    return found


def infilled(vectors: Array, stack: Stack, template: Template) -> tuple[InputPrompt, Positions]:
    """Vectors among the words of a template, and where the row stands that holds both.

    Raises:
        CheckpointError: the template has not as many virtual tokens.
    """
    if template.length != len(vectors):
        raise CheckpointError(
            f"{len(vectors)} vectors, and a template of {template.length} virtual tokens",
            "as many of the one as of the other",
            "check the file, and the template",
        )
    return InputPrompt(vectors, stack, placement="template", template=template), Positions({stack: 0})


#: A template, as `Template.to_json` has it, that a caller puts beside a prompt whose files do not say where it stands.
TEMPLATE = "template.json"


def template_beside(files: untrusted.Files, what: str) -> Template:
    """Where the vectors of a prompt stand, which its own files do not say.

    Args:
        what: what needs it, in words.

    Raises:
        CheckpointError: nobody says it.
    """
    if TEMPLATE not in files:
        raise CheckpointError(
            f"{what}, and nothing that says where its virtual tokens stand",
            f"a folder with {TEMPLATE} beside it: softbridge.template.Template.to_json(), as JSON",
            "write the template with which the prompt was trained, and give the folder",
        )
    try:
        return Template.from_json(files.json(TEMPLATE))
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{TEMPLATE}: {error}", "a template", "see softbridge.template.Template.to_json"
        ) from error


def alone(files: untrusted.Files) -> str | None:
    """The name of the one file that is there beside softbridge's own, or None."""
    others = set(files.names) - {MANIFEST, CERTIFICATE}
    return others.pop() if len(others) == 1 else None


def only(files: untrusted.Files) -> str:
    """As `alone`.

    Raises:
        CheckpointError: there are others, or none.
    """
    name = alone(files)
    if name is None:
        held = ", ".join(files.names[:6]) or "nothing"
        raise CheckpointError(f"{files.path} holds {held}", "one file", "give the path of the file itself")
    return name


def dictionary(files: untrusted.Files, name: str | None) -> Mapping[str, Any]:
    """What a file of tensors holds (see `Files.tree`), if that is a dictionary; else an empty one.

    Raises:
        CheckpointError: the file is malformed.
    """
    tree = files.tree(name) if name is not None and files.kind(name) in ("safetensors", "pickle") else None
    return tree if isinstance(tree, dict) else {}


#: torch's own containers of parameters, which a pickle has as objects: torch/nn/modules/container.py.
_CONTAINERS = frozenset(f"torch.nn.modules.container Parameter{kind}" for kind in ("List", "Dict"))


def contained(node: Any) -> dict[str, untrusted.Stored] | None:
    """The tensors of a dictionary, a list, or a ParameterDict or ParameterList of torch's; None if it is none of these.

    A list's are called 0, 1, ...
    """
    if isinstance(node, untrusted.Foreign) and node.name in _CONTAINERS and isinstance(node.state, dict):
        node = node.state.get("_parameters")
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    found = {str(name): one for name, one in pairs if isinstance(one, untrusted.Stored)}
    return found if isinstance(node, (dict, list)) and len(found) == len(node) else None


def is_floating(dtype: np.dtype[Any]) -> bool:
    """Whether numbers of this dtype are a prompt's."""
    return dtype.kind == "f" or dtype == BFLOAT16


def vectors_of(tensor: untrusted.Stored) -> Array:
    """The vectors [P, H] in a tensor [P, H], [1, P, H] or [H].

    Raises:
        CheckpointError: it has another shape, or no floating-point numbers.
    """
    shape = tensor.shape[1:] if len(tensor.shape) == 3 and tensor.shape[0] == 1 else tensor.shape
    if len(shape) not in (1, 2) or 0 in shape or not is_floating(tensor.dtype):
        raise CheckpointError(
            f"{tensor.name}: {list(tensor.shape)} of {tensor.dtype.name}",
            "floating-point vectors [P, H]",
            "check that this is a prompt's file",
        )
    return tensor.array().reshape(-1, shape[-1])


def holds(files: untrusted.Files, name: str) -> bool:
    """Whether one of the files is a dictionary with a tensor of that very name. What is malformed is none."""
    for file in files.names:
        with suppress(CheckpointError):
            tree = files.tree(file) if files.kind(file) in ("safetensors", "pickle") else None
            if isinstance(tree, dict) and isinstance(tree.get(name), untrusted.Stored):
                return True
    return False


def geometry_of(files: untrusted.Files, given: Geometry | None, what: str) -> Geometry:
    """The base model's geometry: from the config.json beside the prompt, or else as given.

    Reading refuses a prompt that records another geometry than the given one.

    Args:
        what: what it is needed for, in words.

    Raises:
        BaseModelError: neither is there, or transformers does not know the family.
    """
    geometry = _recorded(files) or given
    if geometry is None:
        raise BaseModelError(f"{what}, and nothing that says for which base model", "the base model", "give --base")
    return geometry


def _recorded(files: untrusted.Files) -> Geometry | None:
    from transformers import CONFIG_MAPPING

    if "config.json" not in files:
        return None
    facts = files.json("config.json")
    kind = facts.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        return None
    try:
        layers = max((n for name, n in facts.items() if "layer" in name and isinstance(n, int)), default=0)
        if layers > MOST_LAYERS:  # transformers counts them one by one
            raise ValueError(f"{layers} layers")
        return read_geometry(CONFIG_MAPPING[kind].from_dict(facts))
    except Exception as error:  # configuration classes raise what they like
        raise CheckpointError(
            f"a config.json of {kind} that transformers cannot read: {str(error)[:120]}",
            "a configuration",
            "give --base",
        ) from error


def only_array(files: untrusted.Files) -> int | None:
    """How many axes the array has that is all there is; None: there is more, or something else.

    0 where its header is none that is believed, too: that is for the reader to say.
    """
    others = [name for name in files.names if name not in (MANIFEST, CERTIFICATE)]
    if len(others) != 1 or files.kind(others[0]) != "npy":
        return None
    with suppress(CheckpointError):
        return len(files.header(others[0])[""][1])
    return 0


def matrix_of(stored: untrusted.Stored) -> Array:
    """The numbers of one prompt [P, H].

    Raises:
        CheckpointError: the tensor has another shape, or holds no floating-point numbers.
    """
    shape, dtype = stored.shape, stored.dtype
    if len(shape) != 2 or 0 in shape or (dtype.kind != "f" and dtype.name != "bfloat16"):
        raise CheckpointError(
            f"{stored.name} holds an array {list(shape)} of {dtype}",
            "a floating-point array [P, H]",
            "check that this is a prompt, not another parameter of the checkpoint",
        )
    return stored.array()


def in_front(
    found: Mapping[Stack, Array],
    geometry: Geometry | None,
    origin: Origin,
    placement: Placement = "before-sequence",
    training: Training | None = None,
) -> SoftPrompt:
    """Vectors [P, H] in front of the embedded text of each stack, where real tokens stand behind them."""
    parts = tuple(InputPrompt(vectors, stack, placement=placement) for stack, vectors in found.items())
    positions = Positions({part.stack: part.length for part in parts})
    return SoftPrompt(parts, positions, BaseId(None, geometry), training=training, origin=origin)


def several(
    tasks: Mapping[str, Array], stack: Stack, geometry: Geometry | None, format: str, notes: tuple[str, ...] = ()
) -> SoftPrompt:
    """The prompts [P, H] of several tasks in front of the text, by name: the first one, and all as a parameterisation.

    One task is a prompt like any other. Of several one is chosen with ``--task``, by its number.
    """
    names = list(tasks)
    first = in_front({stack: tasks[names[0]]}, geometry, Origin(format, {"tasks": names}, notes=notes))
    if len(tasks) == 1:
        return first
    settings = {"lengths": [len(rows) for rows in tasks.values()], "names": names, "task": 0}
    tensors = {f"tasks.{number}": rows for number, rows in enumerate(tasks.values())}
    return replace(first, training=Training("table", settings, tensors))
