"""What a path is that holds no soft prompt, where it is something well known: to say so, and what to give instead."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from fnmatch import fnmatch

from softbridge import untrusted
from softbridge.errors import CheckpointError, few
from softbridge.plugin.hookspecs import Format

#: Files of a trainer by their names, as patterns -> what they are.
_TRAINERS = {
    "optimizer.*": "the state of an optimiser",
    "scheduler.*": "the state of a scheduler of learning rates",
    "scaler.*": "the state of a scaler of gradients",
    "rng_state*": "the states of random number generators",
    "training_args.bin": "the arguments of a Trainer",
    "trainer_state.json": "the log of a Trainer",
}
#: Files that hold, or list, the weights of a whole model.
_MODEL = ("model.safetensors", "model-*", "model.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.json")
_CONFIG = "config.json"
_INSTEAD = "give the path of the prompt itself; a base model is given with --base (base=... in Python)"


def recognised(files: untrusted.Files, formats: Mapping[str, Format]) -> tuple[str, str] | None:
    """(what the files are, what to give instead), or None if they are nothing that is known here.

    Args:
        files: in none of the formats.
        formats: name -> format.
    """
    if not files.names:
        return _without_files(files)
    inside = _prompts_inside(files, formats)
    if inside:
        named = [f"{name} ({form})" for name, form in inside.items()]
        return (
            f"a directory of prompts: {few(named)}",
            f"give one of them: {files.path / next(iter(inside))}; or convert all with --recursive",
        )
    if files.is_file:
        what = _of_a_trainer(files, files.names[0]) or _of_a_model(files.names[0])
        return None if what is None else (what, _INSTEAD)
    kind = _model_type(files)
    if kind is not None and any(fnmatch(name, pattern) for name in files.names for pattern in _MODEL):
        return f"a whole model ({kind:.40}), by the names of its files", _INSTEAD
    if all(_of_a_trainer(files, name) for name in files.names):
        return "the state of a trainer, without what it trained", _INSTEAD
    return None


def _without_files(files: untrusted.Files) -> tuple[str, str]:
    folders = sorted(path.name for path in files.path.iterdir() if path.is_dir())
    if not folders:
        return "an empty directory", "check the path, and that what writes there has ended"
    return f"a directory of directories: {few(folders)}", f"give the one that holds the prompt, in {files.path}"


def _prompts_inside(files: untrusted.Files, formats: Mapping[str, Format]) -> dict[str, str]:
    """Sub-folder -> the one format that it is of."""
    found: dict[str, str] = {}
    for folder in sorted({name.partition("/")[0] for name in files.names if "/" in name}):
        with suppress(CheckpointError):  # what cannot be read is no prompt
            inside = untrusted.Files(files.path / folder)
            matches = [name for name, form in formats.items() if form.sniff(inside)]
            found |= {folder: matches[0]} if len(matches) == 1 else {}
    return found


def _of_a_trainer(files: untrusted.Files, name: str) -> str | None:
    for pattern, what in _TRAINERS.items():
        if fnmatch(name, pattern):
            return what
    with suppress(CheckpointError):
        if files.kind(name) == "pickle":
            state = files.tree(name)
            if isinstance(state, dict) and state.keys() >= {"state", "param_groups"}:
                return _TRAINERS["optimizer.*"]
    return None


def _of_a_model(name: str) -> str | None:
    if name == _CONFIG:
        return "the configuration of a model"
    return "the weights of a whole model, by its name" if any(fnmatch(name, pattern) for pattern in _MODEL) else None


def _model_type(files: untrusted.Files) -> str | None:
    """What the configuration beside weights says that the model is."""
    if _CONFIG not in files:
        return None
    with suppress(CheckpointError):
        kind = files.json(_CONFIG).get("model_type")
        return kind if isinstance(kind, str) else None
    return None
