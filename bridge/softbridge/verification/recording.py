"""One side of a comparison in a file, so that the other can run in another environment.

AdapterHub and transformers 5 cannot share an environment. Each side is recorded where it runs, and the two recordings
are judged anywhere: they must be of the same probes on the same model, down to its last weight, or they are refused.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from softbridge import untrusted
from softbridge.arrays import Array
from softbridge.errors import CheckpointError, EngineError, SoftbridgeError
from softbridge.geometry import Geometry, StackGeometry
from softbridge.verification.bench import Bench, Capture
from softbridge.verification.certificate import Side
from softbridge.verification.claim import Claim

KEY = "softbridge-recording"
VERSION = 3
#: Earlier ones, which have ``conditions`` and ``rounded`` instead of a claim, can still be judged.
OLDER = (2,)
#: Group of arrays in the file -> attribute of `Capture`.
_ARRAYS = {name: name for name in ("exact", "rough", "states", "gradient")} | {"turned": "rotated"}


#: What another interpreter runs. The current folder, which may be a stranger's checkpoint, is nothing to import from.
_PROGRAM = "import sys; sys.path[:] = filter(None, sys.path); from softbridge.cli import main; main()"


@dataclass(frozen=True)
class Recording:
    """What one side put out, and on what.

    Attributes:
        side: what was run.
        setting: everything that both sides must share, as JSON: seed, precision, window, texts, weights; the digests
            of the probes and of the model's weights, piece by piece.
        captures: what came out, piece by piece.
        base: name of the base model, or None.
        geometry: its attention.
        weights: with which weights it was run, in words.
        claim: in which sense it is to be the same as another, which is the target.
        versions: of everything that can change a result.
    """

    side: Side
    setting: Mapping[str, Any]
    captures: tuple[Capture, ...]
    base: str | None
    geometry: Geometry
    weights: str
    claim: Claim
    versions: Mapping[str, str]


def fingerprint(bench: Bench) -> dict[str, str]:
    """Digests of the rows that are run and of the model that runs them."""
    probes, weights = hashlib.sha256(), hashlib.sha256()
    for probe in bench.bare:
        for name, array in sorted(probe.inputs.items()):
            probes.update(f"{probe.name} {name} {array.shape}".encode())
            probes.update(np.ascontiguousarray(array, dtype=np.int64).tobytes())
    for name, parameter in sorted(bench.model("float32").named_parameters()):
        weights.update(f"{name} {tuple(parameter.shape)}".encode())
        weights.update(parameter.detach().cpu().numpy().tobytes())
    return {"probes": probes.hexdigest(), "weights": weights.hexdigest()}


def pack(recording: Recording) -> bytes:
    """The file of a recording."""
    tensors: dict[str, Array] = {}
    plain = []
    for number, capture in enumerate(recording.captures):
        for group, attribute in _ARRAYS.items():
            arrays = getattr(capture, attribute)
            tensors |= {f"{number}.{group}.{name}": array for name, array in arrays.items()}
        numbers = {
            "loss": capture.loss,
            "start": dict(capture.start),
            "repeats": capture.repeats,
            "left_pads": capture.left_pads,
            "faults": dict(capture.faults),
            "untried": dict(capture.untried),
            "stepwise": capture.stepwise,
            "unit": capture.unit,
        }
        order = {group: list(getattr(capture, attribute)) for group, attribute in _ARRAYS.items()}
        plain.append({"islands": list(capture.float32_regions), "longest": capture.longest, "order": order, **numbers})
    described = {name: value for name, value in asdict(recording).items() if name != "captures"}
    content = {"version": VERSION, "captures": plain, **described}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), default=dict)
    return untrusted.safetensors_bytes(tensors, {KEY: text})


def unpack(path: str | Path) -> Recording:
    """The recording in a file.

    Raises:
        CheckpointError: the file is not a recording, or is damaged.
    """
    files = untrusted.Files(path)
    name = files.names[0] if files.is_file else ""
    metadata = files.metadata(name) if files.is_file and files.kind(name) == "safetensors" else {}
    remedy = "record it again with 'softbridge probe'"
    if metadata.keys() != {KEY}:
        raise CheckpointError(f"{path} is no recording", "a file that 'softbridge probe' wrote", remedy)
    content = untrusted.parse_json(metadata[KEY].encode(), str(path))
    if content.get("version") not in (VERSION, *OLDER):
        raise CheckpointError(f"{path}: a recording of version {content.get('version')!r:.20}", f"{VERSION}", remedy)
    tensors = files.tensors(name)
    try:
        engine = content["side"]["engine"]
        captures = []
        for number, plain in enumerate(content["captures"]):
            groups = {
                attribute: {name: tensors.pop(f"{number}.{group}.{name}") for name in plain["order"][group]}
                for group, attribute in _ARRAYS.items()
            }
            captures.append(
                Capture(
                    engine=engine,
                    float32_regions=tuple(plain["islands"]),
                    longest=plain["longest"],
                    loss=float(plain["loss"]),
                    start=plain["start"],
                    repeats=plain["repeats"],
                    left_pads=plain["left_pads"],
                    faults=plain["faults"],
                    untried=plain["untried"],
                    stepwise=plain.get("stepwise", ""),  # earlier recordings do not have it
                    unit=float(plain["unit"]),
                    naive=None,
                    **groups,
                )
            )
        return Recording(
            side=Side(**content["side"]),
            setting=content["setting"],
            captures=tuple(captures),
            base=content["base"],
            geometry=_geometry(content["geometry"]),
            weights=content["weights"],
            claim=Claim.from_json(content["claim"])
            if "claim" in content
            else Claim(tuple(content["conditions"]), tuple(content["rounded"])),
            versions=content["versions"],
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is a damaged recording: {error!r:.200}", "an undamaged recording", remedy
        ) from error


def _geometry(value: Mapping[str, Any]) -> Geometry:
    def stack(one: Mapping[str, Any] | None) -> StackGeometry | None:
        if one is None:
            return None
        shapes, sources = one["shapes"], one.get("sources")
        return StackGeometry(
            **{
                **one,
                "shapes": None if shapes is None else tuple((k, d) for k, d in shapes),
                "sources": None if sources is None else tuple(sources),
            }
        )

    return Geometry(**{**value, "encoder": stack(value["encoder"]), "decoder": stack(value["decoder"])})


def check_same_setting(a: Recording, b: Recording) -> None:
    """Refuse recordings of different probes or models, or of prompts of which different things are claimed.

    Raises:
        SoftbridgeError: the probes, the models or the claims differ.
    """
    about = [(claim.dtype, claim.choice, claim.made) for claim in (a.claim, b.claim.reversed)]
    if about[0] != about[1]:
        raise SoftbridgeError(
            f"recordings of which one was rounded, or chosen from, for a comparison with something else: {about}",
            "two recordings, each made for a comparison with the other's files",
            "record both with 'softbridge probe A --against B', or both without",
        )
    other = sorted(n for n in a.setting.keys() | b.setting.keys() if a.setting.get(n) != b.setting.get(n))
    same_probes = a.captures and [list(c.exact) for c in a.captures] == [list(c.exact) for c in b.captures]
    if other or not same_probes:
        raise SoftbridgeError(
            f"recordings of different {', '.join(other) or 'probes'}",
            "two recordings with one seed, precision, window, texts and model",
            "record both with the same options of 'softbridge probe'",
        )


def record_elsewhere(python: str, arguments: Sequence[str], output: Path) -> Recording:
    """Run ``softbridge probe`` with another interpreter, and read what it wrote.

    Raises:
        EngineError: the interpreter cannot be started, or its probe failed.
    """
    command = [python, "-c", _PROGRAM, "probe", *arguments, "--output", str(output)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise EngineError(f"{python} cannot be started: {error}", "a Python interpreter", "check the path") from error
    if done.returncode != 0:
        raise EngineError(
            f"{python} did not run the probes (exit status {done.returncode}): {done.stderr.strip()[-2000:]}",
            "an environment in which softbridge and the toolkit are installed",
            "install softbridge there",
        )
    return unpack(output)
