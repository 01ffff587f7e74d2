"""Two profiles for hypothesis: a quick one that is the same every time, and SOFTBRIDGE_PROFILE=long to go looking.

SOFTBRIDGE_PROCESSOR=another sums otherwise than this processor does; see another_processor.py.
And a memory of what ran, for tests that compare many pairs of few sides: a folder that lasts as long as the session.
"""

from __future__ import annotations

import gc
import hashlib
import inspect
import os
import pickle
import runpy
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

# No clock decides: the machine may be busy.
settings.register_profile(
    "default", max_examples=100, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile(
    "long", max_examples=10_000, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile(os.environ.get("SOFTBRIDGE_PROFILE", "default"))

if os.environ.get("SOFTBRIDGE_PROCESSOR") == "another":
    _PROCESSOR = runpy.run_path(str(Path(__file__).with_name("another_processor.py")))

# What commands print is looked at where nobody says how wide it is; pytest's workers say 80.
os.environ.pop("COLUMNS", None)

# What a shell runs in the background ignores an interruption, and so would each command that a test interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What the suite itself shows no engine needs to show again before each call. That check has tests of its own.
os.environ.setdefault("SOFTBRIDGE_SELF_CHECK", "0")
# And no test reads, or writes, what a user's own checks have found.
_VERDICTS = tempfile.TemporaryDirectory(prefix="softbridge-self-check-")
os.environ["SOFTBRIDGE_SELF_CHECK_FOLDER"] = _VERDICTS.name


def pytest_collection_finish() -> None:
    """Spare each full collection of garbage the walk through all that was imported."""
    gc.collect()
    gc.freeze()


# One folder for all workers, made by the process that starts them.
if "SOFTBRIDGE_TEST_RUNS" not in os.environ:
    _RUNS = tempfile.TemporaryDirectory(prefix="softbridge-test-runs-")
    os.environ["SOFTBRIDGE_TEST_RUNS"] = _RUNS.name


@pytest.fixture(scope="module")
def remembered_runs() -> Iterator[None]:
    """Run each side of a comparison once, however many others it is compared with, in whichever module and worker.

    A run is a function of what it is given, and all of that is the key: the model down to its weights, the probes, the
    engine, the prompt as it was read, and the bytes of the files for the toolkit's own loader. Whatever a conversion
    gets wrong is another key, and is run. Modules that put faults into what runs must not use this.
    """
    from softbridge.verification.bench import Bench

    def once(run: Callable[..., Any]) -> Callable[..., Any]:
        arguments = inspect.signature(run)

        def remembered(*args: Any, **settings: Any) -> Any:
            given = arguments.bind(*args, **settings)
            given.apply_defaults()
            more = {probe.name for probe in given.arguments.pop("more", ())}  # what ran them did for less, too
            key = repr((run.__name__, *(_told(value) for value in given.arguments.values())))
            kept = Path(os.environ["SOFTBRIDGE_TEST_RUNS"], hashlib.sha256(key.encode()).hexdigest())
            ran, found = pickle.loads(kept.read_bytes()) if kept.exists() else (None, None)
            if ran is None or not more <= ran:
                ran, found = more, run(*args, **settings)
                written = kept.with_suffix(f".{os.getpid()}")
                written.write_bytes(pickle.dumps((ran, found)))
                written.replace(kept)
            for name in ran - more:
                del found[0][name]
            return found

        return remembered

    with pytest.MonkeyPatch.context() as patch:
        for name in ("own", "other", "without", "gradient"):
            patch.setattr(Bench, name, once(getattr(Bench, name)))
        patch.setattr(Bench, "float32_regions", property(once(Bench.float32_regions.func)))
        yield


def _told(value: Any) -> Any:
    """What an argument holds, to know it again by: where it came from is no matter."""
    import torch

    from softbridge.plugin.registry import engines
    from softbridge.prompt import SoftPrompt, pack
    from softbridge.verification import Subject
    from softbridge.verification.bench import Bench
    from softbridge.verification.recording import fingerprint

    match value:
        case None | bool() | int() | str():
            return value
        case Mapping():
            return tuple((name, _told(one)) for name, one in value.items())
        case list() | tuple():
            return tuple(_told(one) for one in value)
        case np.ndarray():
            return str(value.dtype), value.shape, value.tobytes()
        case SoftPrompt():
            return hashlib.sha256(pack(replace(value, origin=None))).hexdigest()
        case Subject():
            loads = value.directory is not None and hasattr(engines().get(value.engine), "load")
            return _told((value.prompt, (value.engine, _files(value.directory)) if loads else None))
        case Bench():
            if "told" not in vars(value):
                # By `frames` nothing is run: what ran is rotated.
                names = {field.name for field in fields(value)} - {"base", "frames"}
                settings = [(name, getattr(value, name)) for name in sorted(names)]
                vars(value)["told"] = str((settings, value.base.task, value.config.to_dict(), fingerprint(value)))
            return vars(value)["told"]
        case torch.nn.Module():  # the bench's own, as it is told already
            return None
    return value.name  # an engine


def _files(directory: Path) -> dict[str, str]:
    """What a toolkit reads of its own files: what else stands beside them is not its own."""
    from softbridge.checkpoint.manifest import BESIDE

    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
        if path.name not in BESIDE
    }
