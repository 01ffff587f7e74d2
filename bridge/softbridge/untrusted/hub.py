"""A prompt on the Hugging Face hub: its id becomes a folder of the hub's cache that holds the prompt's files."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from softbridge.errors import CheckpointError

#: ``owner/name``, perhaps with a sub-folder behind it, perhaps with ``@revision``.
_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:/([\w-][\w.-]*))?(?:@([^@\s]+))?")
#: What says what a folder holds.
_DESCRIPTIONS = ("*.json", "README.md")
#: What may hold tensors of a prompt, and what a repository holds beside.
_TENSORS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.npy")
_OTHERS = (
    "model.safetensors",
    "model-*",
    "pytorch_model.bin",
    "pytorch_model-*",
    "optimizer.*",
    "scheduler.*",
    "rng_state*",
    "training_args.bin",
)


def hub_id(path: str | Path) -> tuple[str, str | None, str | None] | None:
    """(``owner/name``, sub-folder, revision) if this can be the id of something on the hub, else None.

    What exists here is no id, nor is what would lie in a folder that exists here: then it is a misspelt path.
    """
    match = _ID.fullmatch(str(path))
    if match is None or Path(path).exists() or Path(path).parts[0] in (".", "..") or Path(Path(path).parts[0]).exists():
        return None
    return match.group(1), match.group(2), match.group(3)


def located(path: str | Path, revision: str | None, recognised: Callable[[Path], Sequence[str] | None]) -> Path:
    """The folder of a prompt: the path itself, or where the hub's cache has what it names.

    Only the prompt's files are fetched: first descriptions, then the tensors that its format knows. Without a network
    (``HF_HUB_OFFLINE=1``) the cache is all there is.

    Args:
        path: of a file or a folder; or an id, ``owner/name``, ``owner/name/subfolder``, each perhaps ``@revision``.
        revision: a branch, a tag or a commit of the id; None: as the id says, else its main branch.
        recognised: names of the files that belong to the prompt that a folder of descriptions describes, as patterns;
            None if it cannot tell.

    Raises:
        CheckpointError: the repository, revision or sub-folder is neither on the hub nor in its cache.
    """
    named = hub_id(path)
    if named is None:
        if revision is not None:
            raise CheckpointError(f"'{path}' with a revision", "the id of a repository on the hub", "leave it out")
        return Path(path)
    repository, folder, said = named
    if said is not None and revision not in (None, said):
        raise CheckpointError(f"'{path}' and the revision '{revision}'", "one of the two", "leave one out")
    revision = said or revision
    place = "" if folder is None else f"{folder}/"
    # Without a sub-folder: the top, and the adapters one below it, of which the reader takes its pick.
    places = (place,) if place else ("", "*/")
    snapshot = _fetched(repository, revision, [here + name for here in places for name in _DESCRIPTIONS], [])
    wanted = recognised(snapshot / place) if (snapshot / place).is_dir() else None
    names = _TENSORS if wanted is None else wanted
    others = [here + name for here in places for name in _OTHERS] if wanted is None else []
    found = _fetched(repository, revision, [here + name for here in places for name in names], others) / place
    if not found.is_dir():
        raise CheckpointError(
            f"'{repository}' has no folder '{folder}'", "a folder of the repository", "check the spelling"
        )
    return found


def _fetched(repository: str, revision: str | None, patterns: list[str], others: list[str]) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    try:
        folder = huggingface_hub.snapshot_download(
            repository, revision=revision, allow_patterns=patterns, ignore_patterns=others
        )
    except (OSError, ValueError, HfHubHTTPError) as error:
        at = "" if revision is None else f" at the revision '{revision}'"
        raise CheckpointError(
            f"'{repository}' is neither a file nor a folder here, and could not be downloaded from the hub{at}: "
            f"{(str(error).splitlines() or [repr(error)])[0]}",
            "a path, or the id of a repository that the hub or its cache has",
            "check the spelling, the network and HF_HUB_OFFLINE; a path that is meant so may start with ./",
        ) from error
    return Path(folder)
