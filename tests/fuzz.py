"""Each reader of foreign bytes, under libFuzzer for a bounded time: ``python tests/fuzz.py [SECONDS] [FORMAT ...]``.

The corpus of a format begins with the files of its specimens, in a temporary folder. A run is a process of its own with
the coverage of the format's plugin, of `softbridge.untrusted` and of what reads checkpoints. libFuzzer's bytes are the
file itself, in the place of the specimen's main one, or they choose changes of it (`mutations.altered`). What is found
is whatever `mutations.hold` does not allow; the input is kept in ``fuzz-findings/``. It prints a table; the exit status
is the number of formats with a finding.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

SECONDS = 60
#: For one input: its processor time is a matter of `corpus.py`.
TIMEOUT = 30
KEPT = Path("fuzz-findings")


def instrumented() -> None:
    """Import what is fuzzed, so that libFuzzer sees its branches."""
    import atheris

    # Imported without: nothing of them is ours, and numbers are not fuzzed.
    import msgpack  # noqa: F401
    import numpy  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401
    import yaml  # noqa: F401

    ours = ["softbridge.untrusted", "softbridge.checkpoint", "softbridge.prompt"]
    plugins = [f"softbridge_{name}" for name in ("archive", "peft", "adapterhub", "llamacpp", "mlx", "vllm", "native")]
    with atheris.instrument_imports(include=[*ours, *plugins, "zipfile", "pickletools", "tarfile", "json"]):
        from softbridge.plugin.registry import formats

        formats()


def fuzz(form: str, corpus: Path, seconds: int) -> None:
    """In a process of its own: never returns."""
    import atheris

    instrumented()
    from mutations import altered, hold
    from specimens import specimens

    everyone = specimens()
    mine = [one for one in everyone.values() if one.format == form]
    mains = [max(one.files, key=lambda name, one=one: len(one.files[name])) for one in mine]
    for number, (one, main) in enumerate(zip(mine, mains, strict=True)):
        (corpus / f"{number}-file").write_bytes(bytes([number, 0]) + one.files[main])
        (corpus / f"{number}-changes").write_bytes(bytes([number, 1]) + bytes(range(64)))

    def tested(data: bytes) -> None:
        if len(data) < 2:
            return
        place = data[0] % len(mine)
        one = mine[place]
        if data[1] % 2:
            choices = atheris.FuzzedDataProvider(data[2:])
            files = altered(one, lambda count: choices.ConsumeIntInRange(0, count - 1), everyone)
        else:
            files = {**one.files, mains[place]: data[2:]}
        hold(one, files)

    options = [f"-max_total_time={seconds}", f"-timeout={TIMEOUT}", "-rss_limit_mb=4096", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={KEPT}/{form.replace(':', '-')}-", str(corpus)], tested)
    atheris.Fuzz()


def main() -> None:
    """Fuzz each format, one after another."""
    if os.environ.get("SOFTBRIDGE_FUZZ"):
        fuzz(os.environ["SOFTBRIDGE_FUZZ"], Path(sys.argv[2]), int(sys.argv[1]))
    from softbridge.plugin.registry import formats

    seconds = int(sys.argv[1]) if len(sys.argv) > 1 else SECONDS
    KEPT.mkdir(exist_ok=True)
    failed = 0
    print("| format | executions | branches | corpus | found |\n|---|---|---|---|---|")
    for form in sys.argv[2:] or sorted(formats()):
        with tempfile.TemporaryDirectory() as corpus:
            done = subprocess.run(
                [sys.executable, __file__, str(seconds), corpus],
                env={**os.environ, "SOFTBRIDGE_FUZZ": form},
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
            )
            kept = len(os.listdir(corpus))
        runs = re.findall(r"^#(\d+)|number_of_executed_units: (\d+)", done.stderr, re.M)
        count = max((int(one or other) for one, other in runs), default=0)
        covered = max(map(int, re.findall(r"cov: (\d+)", done.stderr)), default=0)
        failed += done.returncode != 0
        print(
            f"| {form} | {count} | {covered} | {kept} | {'nothing' if done.returncode == 0 else 'see below'} |",
            flush=True,
        )
        if done.returncode != 0:
            print(done.stderr[-3000:], file=sys.stderr)
    sys.exit(failed)


if __name__ == "__main__":
    main()
