"""Install, import, the command line and the quick part of the suite, on every Python that this machine has.

python tests/pythons.py WHEEL [VERSION ...]    # all of `VERSIONS` if none is named

An interpreter is looked for on the path, among those of pyenv, and with uv, where that is installed. Each gets an
environment of its own, .envs/pythonVERSION, with the wheel and the newest stack of compat/matrix.toml whose
transformers is for that Python. Exit status: 1 if one fails, or none is found.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "compat"))

import stacks  # noqa: E402

VERSIONS = ("3.10", "3.11", "3.12", "3.13")
#: Newest first; each has PEFT.
STACKS = ("transformers5", "previous5", "middle5", "transformers4")
#: What is pinned: what else there is depends on the Python.
PINNED = ("torch", "transformers", "peft", "huggingface_hub", "tokenizers")
#: All that a Python may get wrong: syntax, types at run time, files, processes, archives, the command line.
QUICK = (
    "tests/test_bad_input.py",
    "tests/test_recognition.py",
    *(
        f"tests/bridge/test_{name}.py"
        for name in (
            *("card", "cli", "container", "geometry", "lowering_contents", "parts", "planner", "portrait", "prompt"),
            *("publish", "registry", "template", "tools", "untrusted_archives", "untrusted_output"),
            *("untrusted_reading", "untrusted_streaming", "verification"),
        )
    ),
    *(f"tests/plugins/test_{name}.py" for name in ("encodings", "native_input_prompt", "peft")),
)
COMMANDS = (
    ["--version"],
    ["formats"],
    ["doctor"],
    ["demo"],
    ["demo", "--from", "peft", "--to", "peft"],
)


def interpreter(version: str) -> str | None:
    """The path of a Python of this version that runs, or None."""
    for path in _candidates(version):
        code = "import sys; print('.'.join(map(str, sys.version_info[:2])))"
        done = subprocess.run([path, "-c", code], capture_output=True, text=True, check=False)
        if done.stdout.strip() == version:  # what pyenv puts on the path need not run
            return path
    return None


def _candidates(version: str) -> Iterator[str]:
    found = shutil.which(f"python{version}")
    if found is not None:
        yield found
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    yield from map(str, sorted((root / "versions").glob(f"{version}.*/bin/python")))
    uv = shutil.which("uv")
    if uv is not None:
        done = subprocess.run([uv, "python", "find", "--offline", version], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            yield done.stdout.strip()


def environment(version: str, path: str, wheel: Path) -> tuple[Path, str]:
    """An environment with the wheel, and the stack that it has.

    Raises:
        RuntimeError: none of the stacks can be installed.
    """
    folder = ROOT / ".envs" / f"python{version}"
    python = folder / "bin" / "python"
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([path, "-m", "venv", str(folder)], check=True)
    said = ""
    for stack in STACKS:
        pins = [f"{name}=={number}" for name, number in stacks.pins(stack).items() if name in PINNED]
        constraints = folder / "constraints.txt"
        constraints.write_text("\n".join(pins))
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", str(constraints)]
        done = subprocess.run([*pip, "torch"], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            wanted = [f"{wheel}[peft,train,msgpack]", "pytest", "hypothesis", "tomli; python_version < '3.11'"]
            done = subprocess.run([*pip, *wanted], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            subprocess.run([str(python), "-m", "pip", "check"], check=True, stdout=subprocess.DEVNULL)
            return python, stack
        said = done.stderr.strip().splitlines()[-1]
    raise RuntimeError(f"nothing can be installed: {said}")


def ran(python: Path) -> str:
    """What failed, or nothing."""
    hidden = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "SOFTBRIDGE_OTHER_PYTHON")
    }
    home = "import softbridge, sys; sys.exit(not softbridge.__file__.startswith(sys.prefix))"
    commands = [[str(python.with_name("softbridge")), *arguments] for arguments in COMMANDS]
    for command in ([str(python), "-c", home], *commands):
        done = subprocess.run(command, env=hidden, cwd=python.parent, capture_output=True, text=True, check=False)
        if done.returncode:
            return f"{' '.join(command[1:])}: {done.stderr.strip()}"
    suite = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *QUICK]
    done = subprocess.run(suite, env=hidden, cwd=ROOT, check=False)
    return "" if done.returncode == 0 else f"the suite: exit status {done.returncode}"


def main(wheel: str, *versions: str) -> int:
    """Run all; print a line for each."""
    lines, failed, count = [], 0, 0
    for version in versions or VERSIONS:
        path, begin = interpreter(version), time.monotonic()
        if path is None:
            lines.append(f"{version}  not run: there is none here")
            continue
        count += 1
        try:
            python, stack = environment(version, path, Path(wheel).resolve())
            problem, where = ran(python), f"transformers {stacks.pins(stack)['transformers']}"
        except (RuntimeError, subprocess.CalledProcessError) as error:
            problem, where = str(error), ""
        failed += bool(problem)
        lines.append(
            f"{version}  {'FAILED: ' + problem if problem else 'passed'}  {where}  {time.monotonic() - begin:.0f} s"
        )
    print("\n".join(lines))
    return int(failed > 0 or count == 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
