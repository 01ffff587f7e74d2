"""One side of a comparison in a file, so that the other can run in another environment.

AdapterHub and transformers 5 cannot share an environment. Each side is recorded where it runs, and the two recordings
are judged anywhere: they must be of the same probes on the same model, down to its last weight, or they are refused.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from softbridge import untrusted
from softbridge.arrays import Array
from softbridge.errors import CheckpointError, EngineError, OutputError, SoftbridgeError
from softbridge.verification.bench import Bench
from softbridge.verification.probes import GREEDY
from softbridge.verification.recorded import ARRAYS, Recording, recording_of

KEY = "softbridge-recording"
#: Earlier ones have no digest, and anybody's edit of them would pass.
VERSION = 4
#: What another interpreter runs. The current folder, which may be a stranger's checkpoint, is nothing to import from.
_PROGRAM = "import sys; sys.path[:] = filter(None, sys.path); from softbridge.cli import main; main()"


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
        for group, attribute in ARRAYS.items():
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
        order = {group: list(getattr(capture, attribute)) for group, attribute in ARRAYS.items()}
        plain.append({"islands": list(capture.float32_regions), "longest": capture.longest, "order": order, **numbers})
    if any(map(untrusted.not_finite, tensors.values())):
        raise _no_numbers()
    described = {name: value for name, value in asdict(recording).items() if name != "captures"}
    content = {"version": VERSION, "captures": plain, **described}
    return untrusted.safetensors_bytes(tensors, {KEY: _text({**content, "digest": _digest(content, tensors)})})


def _text(content: Mapping[str, Any]) -> str:
    try:
        return json.dumps(content, sort_keys=True, separators=(",", ":"), default=dict, allow_nan=False)
    except ValueError as error:
        raise _no_numbers() from error


def _no_numbers() -> OutputError:
    return OutputError(
        "outputs, a loss or an effect that is NaN or infinite, which no recording holds",
        "outputs that are numbers",
        "record with another seed or --dtype, or check the base model",
    )


def _digest(content: Mapping[str, Any], tensors: Mapping[str, Array]) -> str:
    """sha256 of the file without it: of what was run, what is claimed of it, and every number."""
    return hashlib.sha256(untrusted.safetensors_bytes(tensors, {KEY: _text(content)})).hexdigest()


def unpack(path: str | Path) -> Recording:
    """The recording in a file.

    Raises:
        CheckpointError: the file is not a recording, is damaged, or was changed since it was written.
    """
    files = untrusted.Files(path)
    name = files.names[0] if files.is_file else ""
    metadata = files.metadata(name) if files.is_file and files.kind(name) == "safetensors" else {}
    remedy = "record it again with 'softbridge probe'"
    if metadata.keys() != {KEY}:
        raise CheckpointError(f"{path} is no recording", "a file that 'softbridge probe' wrote", remedy)
    content = untrusted.parse_json(metadata[KEY].encode(), str(path))
    version = content.get("version")
    if version != VERSION or isinstance(version, bool):
        raise CheckpointError(f"{path}: a recording of version {version!r:.20}", f"{VERSION}", remedy)
    tensors = files.tensors(name)
    digest = content.pop("digest", None)
    if digest != _digest(content, tensors):
        raise CheckpointError(f"{path} has been changed since it was recorded", "what its digest is of", remedy)
    try:
        return recording_of(content, tensors)
    except ValueError as error:
        raise CheckpointError(f"{path} is a damaged recording: {error!s:.200}", "an undamaged one", remedy) from error


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
    if other or _shapes(a) != _shapes(b):
        raise SoftbridgeError(
            f"recordings of different {', '.join(other) or 'probes'}",
            "two recordings with one seed, precision, window, texts and model",
            "record both with the same options of 'softbridge probe'",
        )


def _shapes(recording: Recording) -> list[list[tuple[str, tuple[int, ...]]]]:
    """What came out of each piece: of tokens, how many are generated depends on them."""
    return [
        [(name, array.shape if name != GREEDY else array.shape[:1]) for name, array in capture.exact.items()]
        for capture in recording.captures
    ]


def record_elsewhere(python: str, path: str | Path, options: Sequence[str], output: Path) -> Recording:
    """Run ``softbridge probe`` with another interpreter, without a shell, and read what it wrote as a stranger's file.

    Args:
        python: the interpreter.
        path: of the prompt, which may begin like an option and is none.
        options: of ``probe``.
        output: the file to write.

    Raises:
        EngineError: the interpreter cannot be started, or its probe failed.
    """
    command = [python, "-c", _PROGRAM, "probe", *options, "--output", str(output), "--", str(path)]
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
