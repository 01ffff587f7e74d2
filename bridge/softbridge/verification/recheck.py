"""Does a certificate still hold? Its comparison is run again.

A certificate may be a stranger's, and what it names anything on this machine or on a hub. So what it names is looked
for in its own folder or, where that is a prompt's folder that softbridge wrote, beside that, and nowhere else. Whatever
lies elsewhere the caller gives. What counts as the same is the caller's word, too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from softbridge.checkpoint.manifest import CERTIFICATE, MANIFEST
from softbridge.checkpoint.read import files_at
from softbridge.errors import CheckpointError
from softbridge.untrusted import Files, is_safe_name
from softbridge.verification.certificate import OLDER, SCHEMA, Certificate, Side, Verdict
from softbridge.verification.claim import LEVELS, WORKING, Claim, Level
from softbridge.verification.proof import verify, verify_claim

_REMEDY = "make it anew with 'softbridge verify --json' or 'softbridge convert --verify'"


@dataclass(frozen=True)
class Again:
    """What running a certificate's comparison again found.

    Attributes:
        recorded: the verdict in the file.
        certificate: the new one.
        changes: in words, what is not as it was: digests of prompts and files, the verdict. Versions may change.
    """

    recorded: str
    certificate: Certificate
    changes: tuple[str, ...]

    @property
    def holds(self) -> bool:
        return not self.changes and self.certificate.same


def verify_again(
    path: str | Path,
    base: Any = None,
    *,
    source: str | Path | None = None,
    target: str | Path | None = None,
    level: Level = "exact",
) -> Again:
    """Run the comparison of a ``certificate.json`` again.

    Args:
        path: of the certificate.
        base: the base model; None: what the certificate names, if that lies beside it.
        source: the first side; None: likewise.
        target: the second side; None: likewise, or the folder in which the certificate lies.
        level: what counts as the same, at least: a certificate may ask for more, and not for less.

    Raises:
        CheckpointError: the file is not a certificate of a known version, or what it names is not beside it.
        SoftbridgeError: see `softbridge.verify`.
    """
    recorded, claim = _read(path)
    folder = Path(path).resolve().parent
    written = (folder / MANIFEST).is_file()
    places = [folder, folder.parent] if written else [folder]
    first = source or _beside(places, recorded["source"]["path"], "source")
    second = target or _beside(places, recorded["target"]["path"], "target", [folder] if written else [])
    if base is None and recorded.get("base") is None:
        raise CheckpointError(f"{path} does not name the base model", "a name or a path", "give --base")
    model = base if base is not None else str(_beside(places, recorded["base"], "base"))
    asked = recorded.get("level", "exact")
    strict = LEVELS[min(LEVELS.index(asked), LEVELS.index(level))]
    setting = {"dtype": recorded["dtype"], "seed": recorded["seed"]}
    if claim is not None:
        certificate = verify_claim(first, second, model, replace(claim, level=strict), **setting)
    else:  # an earlier one: what is claimed is what the files say
        weights = recorded["weights"] == "the model's own"
        certificate = verify(first, second, base=model, weights=weights, level=strict, **setting)
    changes = [
        *_changes("source", recorded["source"], certificate.source, first),
        *_changes("target", recorded["target"], certificate.target, second),
    ]
    verdicts, alike = {certificate.verdict, recorded["verdict"]}, [{"bitwise", "exact"}]
    if recorded["schema"] in OLDER:
        alike.append({"different", "rounding"})
    if len(verdicts) > 1 and verdicts not in alike:
        changes.append(f"the verdict was {recorded['verdict']}, and is {certificate.verdict}")
    if not certificate.same and replace(certificate, claim=replace(certificate.claim, level=asked)).same:
        changes.append(f"it holds by the level that it names itself alone: --level {asked}")
    return Again(recorded["verdict"], certificate, tuple(changes))


def _read(path: str | Path) -> tuple[Mapping[str, Any], Claim | None]:
    """What a certificate says, as far as it is used here, and what it claims, if it is not an earlier one."""
    files = Files(path)
    recorded = files.json(files.names[0]) if files.is_file else {}
    if recorded.get("schema") not in (SCHEMA, *OLDER):
        raise CheckpointError(
            f"{path}, alone, is no certificate of the schema {SCHEMA}",
            "a certificate.json, or two prompts to compare",
            f"give the second prompt, too; of a certificate, {_REMEDY}",
        )
    seed, base = recorded.get("seed"), recorded.get("base")
    known = {"dtype": (*WORKING, "float64"), "verdict": get_args(Verdict), "level": LEVELS}
    wrong = [
        name for name, words in known.items() if recorded.get(name, "exact" if name == "level" else 0) not in words
    ]
    wrong += ["seed"] if type(seed) is not int or not 0 <= seed < 2**32 else []
    wrong += ["weights"] if not isinstance(recorded.get("weights"), str) else []
    wrong += ["base"] if not isinstance(base, (str, type(None))) else []
    wrong += [name for name in ("source", "target") if not _is_side(recorded.get(name))]
    if wrong:
        raise CheckpointError(
            f"{path} is a damaged certificate: {', '.join(wrong)}",
            "two sides with the paths, the digests and the files that were compared, and the settings",
            _REMEDY,
        )
    try:
        return recorded, Claim.from_json(recorded["claim"]) if "claim" in recorded else None
    except ValueError as error:
        raise CheckpointError(f"{path} has no valid 'claim': {error}", "one that softbridge wrote", _REMEDY) from error


def _is_side(value: Any) -> bool:
    if not isinstance(value, dict) or not all(isinstance(value.get(name), str) for name in ("path", "digest")):
        return False
    files = value.get("files")
    return isinstance(files, dict) and bool(files) and all(isinstance(digest, str) for digest in files.values())


def _beside(places: Sequence[Path], said: str, name: str, otherwise: Sequence[Path] = ()) -> Path:
    """What a certificate names, if it lies in one of these folders, is not hidden, and no link leads out of them."""
    path = Path(said.partition(", rounded to ")[0])  # which earlier ones say there
    names = [path.name] if path.is_absolute() else [str(path), path.name]  # that of a folder itself is empty
    plain = [one for one in names if is_safe_name(one) and not any(part[:1] == "." for part in Path(one).parts)]
    within = places[-1].resolve()
    for candidate in [*(place / one for one in plain if Path(one).name for place in places), *otherwise]:
        real = Path(os.path.realpath(candidate))
        if os.path.exists(real) and real.is_relative_to(within) and real != within:
            return candidate
    raise CheckpointError(
        f"the certificate names the {name} {said!r:.200}, which is not beside it",
        "a file or folder beside the certificate: nothing else that it names is read, or fetched",
        f"give it with --{name}, if you know what it is",
    )


def _changes(name: str, recorded: Mapping[str, Any], side: Side, path: str | Path) -> list[str]:
    changes = [f"the {name} is another prompt"] if recorded["digest"] != side.digest else []
    # The manifest and the certificate are written after the certificate is made.
    now = {file: digest for file, digest in side.files.items() if file not in (MANIFEST, CERTIFICATE)}
    known, files = recorded["files"], files_at(path)
    # Of what was written, a reader may read a part.
    now |= {file: files.digest(file) for file in known.keys() - now.keys() if file in files}
    changed = [file for file, digest in now.items() if known.get(file) != digest]
    changes += [f"the {name}'s file {file} " + ("has changed" if file in known else "is new") for file in changed]
    return changes + [f"the {name}'s file {file} is gone" for file in sorted(known.keys() - now.keys())]
