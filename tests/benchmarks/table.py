"""All benchmarks, each in a process of its own, in one table: what `make bench` runs.

    python tests/benchmarks/table.py FOLDER [--older PYTHON] [--rounds N] [--only SCRIPT ...]

FOLDER then has `bench.md` (machine, versions, the table, growth, what else was printed) and `bench.json` (the same with
the figures of all turns), which `plot.py` draws. PYTHON is that of the older stack, where AdapterHub is. What fails is
named at the end, behind what the rest gave, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import curve
import side_by_side
from curve import Curve
from side_by_side import KEPT, Row, cells, table_heading, table_line

HERE = Path(__file__).parent
#: Script and arguments; a number of rounds that is asked for comes behind them, and so counts.
OLDER = (("engines.py", "generating", "training", "long"), ("adapterhub_rows.py",))
NEWER = (("engines.py",), ("conversions.py",), ("growth.py",), ("structure_check.py",), ("self_check.py",))
#: Those without rounds.
ONCE = ("structure_check.py", "self_check.py")


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    lines: Iterator[str] = iter(())
    if Path("/proc/cpuinfo").exists():
        lines = (line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    processor = next(lines, "").partition(":")[2].strip() or platform.processor() or platform.machine()
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads used": 1,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def run(command: Sequence[str]) -> tuple[dict[str, Any], int]:
    """What a script keeps and what it prints, and its exit status. What it prints is passed on as it comes."""
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder, "kept.jsonl")
        printed = []
        # Torch warns of each block that its profiler did not see begin.
        environment = {**os.environ, KEPT: str(kept), "TORCH_CPP_LOG_LEVEL": "ERROR"}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                printed.append(line.rstrip("\n"))
        lines = kept.read_text().splitlines() if kept.exists() else []
    script = " ".join([Path(command[1]).name, *command[2:]])
    return {"script": script, "kept": [json.loads(line) for line in lines], "printed": printed}, process.returncode


def page(results: Mapping[str, Any]) -> str:
    """The results in Markdown."""
    kept = [one for script in results["scripts"] for one in script["kept"]]
    rows = [(stack(one), *cells(Row(**one["row"]))) for one in kept if "row" in one]
    slopes = [(stack(one), *line) for one in kept if "curve" in one for line in curve.lines(Curve.of(one["curve"]))]
    parts = ["# Benchmarks", head(results)]
    for headings, found in ((side_by_side.HEADINGS, rows), (curve.HEADINGS, slopes)):
        if found:
            parts.append("\n".join([table_heading(("stack", *headings)), *map(table_line, found)]))
    for script in results["scripts"]:
        # Of a script that keeps nothing for the tables, all that it prints; of the others, what is in none. Each line
        # once: a peer is often refused in many rows for one reason.
        lines = dict.fromkeys(script["printed"])
        rest = [line for line in lines if line and not (script["kept"] and line.startswith("|"))]
        if rest:
            parts.append("\n".join([f"`{script['script']}`", "", "```text", *rest, "```"]))
    return "\n\n".join(parts) + "\n"


def stack(kept: Mapping[str, Any]) -> str:
    return f"transformers {kept['versions']['transformers']}"


def head(results: Mapping[str, Any]) -> str:
    """The date, the machine, and the versions of each stack."""
    stacks = {stack(one): one["versions"] for script in results["scripts"] for one in script["kept"]}
    facts = [", ".join(f"{name} {value}" for name, value in versions.items()) for versions in stacks.values()]
    machine = ", ".join(f"{name}: {value}" for name, value in results["machine"].items())
    return "\n".join(f"- {fact}" for fact in (results["date"], machine, *facts))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--older", metavar="PYTHON", help="without it, what runs on the older stack is left out")
    parser.add_argument("--rounds", type=int, help="instead of each script's own number")
    parser.add_argument("--only", nargs="+", metavar="SCRIPT", help="such as growth.py")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    given.folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"date": f"{datetime.date.today()}", "machine": machine(), "scripts": []}
    failed = []
    scripts = [(given.older, script) for script in OLDER if given.older] + [(sys.executable, one) for one in NEWER]
    for python, (name, *arguments) in scripts:
        if given.only and name not in given.only:
            continue
        rounds = [] if given.rounds is None or name in ONCE else ["--rounds", str(given.rounds)]
        found, status = run([python, str(HERE / name), *arguments, *rounds])
        results["scripts"].append(found)
        if status:
            failed.append(f"{python} {found['script']}")
        # After each: what was measured is there if a later one is interrupted.
        (given.folder / "bench.json").write_text(json.dumps(results, indent=1) + "\n")
        (given.folder / "bench.md").write_text(page(results))
    print(f"\n{page(results)}")
    for script in failed:
        print(f"failed: {script}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
