"""What a checkpoint is, as plain values to print or to hand on as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from softbridge.base.model import BaseModel
from softbridge.checkpoint.read import files_at, read_files, recognise
from softbridge.errors import BaseModelError
from softbridge.methods import tasks_of
from softbridge.plugin.registry import format_named
from softbridge.prompt.container import digest_of
from softbridge.prompt.part import AdaptionPrompt, InputPrompt
from softbridge.prompt.soft_prompt import SoftPrompt


def inspect(path: str | Path, *, base: Any = None, format: str | None = None) -> dict[str, Any]:
    """What a file or a directory holds, as ``softbridge inspect --json`` prints it: plain values.

    Args:
        path: whatever `softbridge.load` takes.
        base: whatever `BaseModel.resolve` takes. Where the files can be understood only with it and it is None, there
            is less: ``needs_base`` then says why, and is None otherwise.
        format: the name of the format; recognised by content if None.

    Returns:
        ``path``, ``format``, ``files`` (name -> ``{"sha256": text}``, of those that were read), ``others`` (names of
        those that were not) and ``needs_base``; and, unless that is a text:
        ``conditions`` (names), ``base`` (its name or None), ``parts`` (for each where it stands, its length P, shape,
        dtype, and the standard deviation and the largest of its numbers), ``positions``, ``head`` (names of tensors),
        ``training`` (its kind or None), ``task``, ``notes`` and ``digest``.

    Raises:
        SoftbridgeError: the files cannot be read; see `softbridge.read`.
    """
    named = None if format is None else format_named(format)
    files = files_at(path, form=named)
    form = named or recognise(files)
    found: dict[str, Any] = {"path": str(path), "format": form.name, "files": {}, "needs_base": None}
    resolved = None if base is None else BaseModel.resolve(base)
    loaded = None
    with files.reading() as names:
        try:
            loaded = read_files(files, form, None if resolved is None else resolved.geometry)
        except BaseModelError as error:
            if base is not None:
                raise
            found["needs_base"] = error.found
    digests = {name: files.digest(name) for name in sorted(names)} if loaded is None else loaded.digests
    found["files"] = {name: {"sha256": digest} for name, digest in digests.items()}
    found["others"] = [name for name in files.names if name not in digests]
    if loaded is None:
        return found
    return {**found, "conditions": list(loaded.conditions), **_describe(loaded.prompt)}


def _describe(prompt: SoftPrompt) -> dict[str, Any]:
    parts = []
    for part in prompt.parts:
        arrays = [array for _, array in part.arrays()]
        numbers = {
            "length": part.length,
            "shape": list(arrays[0].shape),
            "dtype": str(arrays[0].dtype),
            "std": float(sum(float(a.astype("float64").var()) for a in arrays) / len(arrays)) ** 0.5,
            "largest": max(float(abs(a.astype("float64")).max()) for a in arrays),
        }
        where: dict[str, Any]
        if isinstance(part, InputPrompt):
            where = {"kind": "input", "stack": part.stack, "entry": part.entry, "placement": part.placement}
            where |= {} if part.told_scale is None else {"scale": part.told_scale}
        elif isinstance(part, AdaptionPrompt):
            where = {"kind": "adaption", "site": part.site, "layers": list(part.layers), "joins": part.joins}
        else:
            where = {"kind": "prefix", "site": part.site, "layers": list(part.layers)}
        parts.append({**where, **numbers})
    return {
        "base": prompt.base.name,
        "parts": parts,
        "positions": prompt.positions.to_json(),
        "head": sorted(prompt.head),
        "training": None if prompt.training is None else prompt.training.kind,
        "task": _task(prompt),
        "notes": [] if prompt.origin is None else list(prompt.origin.notes or ()),
        "digest": digest_of(prompt),
    }


def _task(prompt: SoftPrompt) -> dict[str, int] | None:
    """Of a multitask prompt, whose task it is, and of how many."""
    training = prompt.training
    tasks = 0 if training is None else tasks_of(training)
    return {"number": training.settings.get("task", 0), "of": tasks} if training is not None and tasks else None
