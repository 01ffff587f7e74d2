"""Every hostile file of `hostile.py`, read in bounded memory and processor time: ``python tests/corpus.py``.

Each file is read in a process of its own, of which the address space may grow by `MEMORY` times the file and
`MEMORY_MORE`, and which may use `SECONDS` of its own processor time for each megabyte of the file and `SECONDS_MORE`.
A sparse file counts as the bytes that the disk holds of it. It prints a table; the exit status is the number of files
that got another answer than they should.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MEMORY, MEMORY_MORE = 100, 64 * 2**20
SECONDS, SECONDS_MORE = 2.0, 1.0
MEGABYTE = 2**20
MARKER = "executed"


@dataclass
class Result:
    """What became of a file.

    Attributes:
        outcome: 'accepted', or the class of the typed error.
        wrong: what is not as it should be, or ''.
        size: of the file, in bytes.
        seconds: of processor time.
        memory: by how many bytes the address space grew.
    """

    kind: str
    name: str
    expected: str
    outcome: str = ""
    wrong: str = ""
    size: int = 0
    seconds: float = 0.0
    memory: int = 0


def by_format(path: Path, form: str, geometry: Any) -> None:
    """As `softbridge.load` does: what it is, and what it holds."""
    from softbridge.checkpoint.read import read_files, recognise
    from softbridge.errors import UnknownFormatError
    from softbridge.plugin.registry import format_named
    from softbridge.untrusted import Files

    with suppress(UnknownFormatError):
        recognise(Files(path))
    read_files(Files(path), format_named(form), geometry)


def of_files(method: str) -> Callable[[Path], None]:
    def read(path: Path) -> None:
        from softbridge.untrusted import Files

        getattr(Files(path), method)(path.name)

    return read


def loaded(path: Path) -> None:
    from softbridge.checkpoint.read import read

    read(path)


def converted(path: Path) -> None:
    from softbridge.conversion import convert

    convert(path, path.parent / "out", "softbridge")


def base(path: Path) -> None:
    from softbridge.base import BaseModel

    resolved = BaseModel.resolve(path)
    assert resolved.geometry is not None


def recording(path: Path) -> None:
    from softbridge.verification.recording import unpack

    unpack(path)


def certificate(path: Path) -> None:
    from softbridge.verification.recheck import verify_again

    verify_again(path)


READERS: dict[str, Callable[[Path], None]] = {
    **{method: of_files(method) for method in ("tensors", "array", "json", "yaml", "inside", "tree")},
    "load": loaded,
    "convert": converted,
    "base": base,
    "recording": recording,
    "certificate": certificate,
}


def size_of(path: Path) -> int:
    """Bytes that the disk holds of a checkpoint."""
    if not os.path.exists(os.fsencode(path).replace(b"\0", b"?")):  # no such path can be
        return 0
    stats = [one.lstat() for one in ([path] if path.is_file() else path.rglob("*"))]
    return sum(min(stat.st_size, stat.st_blocks * 512) for stat in stats)


def tried(result: Result, path: Path, reader: Any) -> Result:
    """The result of reading the file in a child that may use so much and no more."""
    result.size = size_of(path)
    allowed = SECONDS * result.size / MEGABYTE + SECONDS_MORE
    incoming, outgoing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(incoming)
            with os.fdopen(outgoing, "w") as stream:
                json.dump(_read(result, path, reader, allowed), stream)
        finally:
            os._exit(0)  # whatever happened, the parent's way back is not the child's
    os.close(outgoing)
    with os.fdopen(incoming) as stream:
        said = stream.read()
    _, status, used = os.wait4(child, 0)
    if not said:
        seconds = used.ru_utime + used.ru_stime
        result.wrong, result.seconds = f"killed ({status}) after {seconds:.1f} s of processor time", seconds
        return result
    result = Result(**json.loads(said))
    if not result.wrong and result.seconds > allowed:
        result.wrong = f"{result.seconds:.1f} s of processor time, of {allowed:.1f} s"
    return result


def _read(result: Result, path: Path, reader: Any, allowed: float) -> dict[str, Any]:
    """In the child."""
    from softbridge.errors import SoftbridgeError

    begun = _address_space("VmSize")
    most = begun + MEMORY * result.size + MEMORY_MORE
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    limit = int(3 * allowed + 2)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    signal.alarm(20 * limit)  # it waits for something that never comes
    start = time.process_time()
    try:
        READERS[reader](path) if isinstance(reader, str) else by_format(path, *reader)
        result.outcome = "accepted"
    except SoftbridgeError as error:
        result.outcome = type(error).__name__
        names = {one.__name__ for one in type(error).__mro__}
        result.wrong = _incomplete(error) if result.expected in names else f"{type(error).__name__}: {error}"[:300]
    except BaseException as error:
        result.outcome, result.wrong = type(error).__name__, f"{error!r:.300}"
    result.seconds, result.memory = time.process_time() - start, _address_space("VmPeak") - begun
    if result.outcome == "accepted" != result.expected:
        result.wrong = "it was accepted"
    if Path(MARKER).exists():
        result.wrong = "its code was executed"
    return asdict(result)


def _incomplete(error: Any) -> str:
    parts = (error.found, error.expected, error.remedy)
    if not all(isinstance(part, str) and part for part in parts):
        return f"an error without one of its parts: {parts}"
    text = str(error)
    if "MemoryError" in text or "allocate memory" in text:
        return "the memory did not suffice"
    return f"a message of {len(text)} characters" if len(text) > 4000 else ""


def _address_space(name: str) -> int:
    """In bytes, from /proc."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def run(only: Iterable[str] = (), told: Callable[[Result], None] = lambda result: None) -> list[Result]:
    """Make the files, in a process of their own, and read each."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, str(Path(__file__).with_name("hostile.py")), folder, *only], check=True)
        _import()
        return read_all(Path(folder), pickle.loads((Path(folder) / "index.pickle").read_bytes()), told)


def read_all(
    folder: Path,
    index: Iterable[tuple[str, str, str, Any, str]],
    told: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Read each file, the current folder being the one that was made for it."""
    results, here = [], os.getcwd()
    for number, (kind, name, path, reader, expected) in enumerate(index):
        os.chdir(folder / str(number))
        results.append(tried(Result(kind, name, expected), Path(path), reader))
        told(results[-1])
    os.chdir(here)
    return results


def _import() -> None:
    """All that reading imports, before anything is counted."""
    import msgpack  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401
    import yaml  # noqa: F401

    from softbridge.plugin.registry import formats
    from softbridge.testing import tiny_model
    from softbridge.verification import recheck  # noqa: F401

    formats()
    tiny_model("gpt2")
    gc.collect()
    gc.freeze()


def table(results: Iterable[Result]) -> str:
    """The corpus in a table: kind, files, refused, accepted rightly, wrong, and the worst for each megabyte."""
    kinds: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        kinds[result.kind].append(result)
        kinds["all"].append(result)
    kinds["all"] = kinds.pop("all")
    lines = ["| kind | files | refused | accepted rightly | wrong | s (worst) | s per MB | MB (worst) | MB per MB |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for kind, some in kinds.items():
        right = [result for result in some if not result.wrong]
        accepted = sum(result.outcome == "accepted" for result in right)
        large = [result for result in some if result.size >= MEGABYTE]
        rates = [
            f"{max(result.seconds for result in some):.2f}",
            f"{max((one.seconds / one.size * MEGABYTE for one in large), default=0):.2f}" if large else "",
            f"{max(result.memory for result in some) / MEGABYTE:.0f}",
            f"{max((one.memory / one.size for one in large), default=0):.0f}" if large else "",
        ]
        counts = [len(some), len(right) - accepted, accepted, len(some) - len(right)]
        lines.append(f"| {kind} | {' | '.join(map(str, counts))} | {' | '.join(rates)} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table, and what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("only", nargs="*", help="words; rows with one of them in kind or name")
    parser.add_argument("--json", action="store_true", help="print every result, as JSON")
    parser.add_argument("--rows", action="store_true", help="print a line for every file")
    asked = parser.parse_args()

    def told(result: Result) -> None:
        if asked.rows:
            figures = f"{result.size} B, {result.seconds:.2f} s, {result.memory / MEGABYTE:.0f} MB"
            print(f"{result.kind}: {result.name}: {result.outcome}: {figures}", flush=True)
        if result.wrong:
            print(f"WRONG {result.kind}: {result.name}: {result.outcome or 'nothing'}: {result.wrong}", flush=True)

    results = run(asked.only, (lambda result: None) if asked.json else told)
    if asked.json:
        print(json.dumps([asdict(result) for result in results]))
        return
    print(table(results))
    sys.exit(min(sum(bool(result.wrong) for result in results), 100))


if __name__ == "__main__":
    main()
