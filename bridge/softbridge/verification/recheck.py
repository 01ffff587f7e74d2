"""Does a certificate still hold? Its comparison is run again, on the files that it names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softbridge.errors import CheckpointError
from softbridge.untrusted import Files
from softbridge.verification.certificate import OLDER, SCHEMA, Certificate
from softbridge.verification.claim import LEVELS, Claim
from softbridge.verification.proof import verify, verify_claim


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


def verify_again(path: str | Path, base: Any = None) -> Again:
    """Run the comparison of a ``certificate.json`` again.

    Args:
        path: of the certificate. The files are looked for where it says, and in the folder in which it lies.
        base: the base model, if it is no longer where the certificate says.

    Raises:
        CheckpointError: the file is not a certificate of a known version, or the files that it names are gone.
        SoftbridgeError: see `softbridge.verify`.
    """
    files = Files(path)
    recorded = files.json(files.names[0]) if files.is_file else {}
    remedy = "make it anew with 'softbridge verify --json' or 'softbridge convert --verify'"
    if recorded.get("schema") not in (SCHEMA, *OLDER):
        raise CheckpointError(
            f"{path}, alone, is no certificate of the schema {SCHEMA}",
            "a certificate.json, or two prompts to compare",
            f"give the second prompt, too; of a certificate, {remedy}",
        )
    sides = [recorded.get(name) for name in ("source", "target")]
    level = recorded.get("level", "exact")
    settings = [recorded.get(name) for name in ("dtype", "seed", "weights", "verdict")]
    if not all(isinstance(side, dict) and isinstance(side.get("path"), str) for side in sides) or (
        None in settings or level not in LEVELS
    ):
        raise CheckpointError(f"{path} is a damaged certificate", "sides with paths, and the settings", remedy)
    folder = Path(path).resolve().parent
    source, target = (_place((side or {})["path"], folder) for side in sides)
    model = recorded.get("base") if base is None else base
    if model is None:
        raise CheckpointError(f"{path} does not name the base model", "a name or a path", "give --base")
    setting = {"dtype": recorded["dtype"], "seed": recorded["seed"]}
    if "claim" in recorded:
        try:
            claim = Claim.from_json(recorded["claim"])
        except ValueError as error:
            raise CheckpointError(
                f"{path} has no valid 'claim': {error}", "one that softbridge wrote", remedy
            ) from error
        certificate = verify_claim(source, target, model, claim, **setting)
    else:  # an earlier one: what is claimed is what the files say
        weights = recorded["weights"] == "the model's own"
        certificate = verify(source, target, base=model, weights=weights, level=level, **setting)
    changes = []
    for name, side in zip(("source", "target"), sides, strict=True):
        changes += _changes(name, side or {}, getattr(certificate, name))
    verdicts, alike = {certificate.verdict, recorded["verdict"]}, [{"bitwise", "exact"}]
    if recorded["schema"] in OLDER:
        alike.append({"different", "rounding"})
    if len(verdicts) > 1 and verdicts not in alike:
        changes.append(f"the verdict was {recorded['verdict']}, and is {certificate.verdict}")
    return Again(recorded["verdict"], certificate, tuple(changes))


def _place(path: str, folder: Path) -> Path:
    """Where the files are: where the certificate says, beside it, or the folder in which it lies."""
    path = path.partition(", rounded to ")[0]  # which earlier ones say there
    candidates = [Path(path), folder / path, folder.parent / Path(path).name]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    raise CheckpointError(f"there is no '{path}'", "the files that the certificate names", "restore them")


def _changes(name: str, recorded: Mapping[str, Any], side: Any) -> list[str]:
    changes = []
    if recorded.get("digest") != side.digest:
        changes.append(f"the {name} is another prompt")
    known = recorded.get("files")
    # The manifest and the certificate are written after the certificate is made.
    changed = [file for file, digest in (known or {}).items() if side.files.get(file, digest) != digest]
    return changes + [f"the {name}'s file {file} has changed" for file in changed]
