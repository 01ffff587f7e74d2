"""What is made of the tensors of a toolkit: parts of prompts, evaluated or as they are, and their positions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from softbridge import untrusted
from softbridge.arrays import Array
from softbridge.errors import BaseModelError, CheckpointError
from softbridge.geometry import MOST, Geometry, Site, Stack, read_geometry
from softbridge.methods import materialise, materialise_vectors
from softbridge.methods.parameterisations import eject
from softbridge.prompt import BaseId, InputPrompt, KeyValuePrefix, Origin, Placement, Positions, SoftPrompt, Training
from softbridge.template import Template

#: Evaluating a parameterisation makes at most so many numbers for each that it has.
GROWTH = 32
#: A template, as `Template.to_json` has it, that a caller puts beside a prompt whose files do not say where it stands.
TEMPLATE = "template.json"


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
        if layers > MOST:  # transformers counts them one by one
            raise ValueError(f"{layers} layers")
        return read_geometry(CONFIG_MAPPING[kind].from_dict(facts))
    except Exception as error:  # configuration classes raise what they like
        raise CheckpointError(
            f"a config.json of {kind} that transformers cannot read: {str(error)[:120]}",
            "a configuration",
            "give --base",
        ) from error


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
