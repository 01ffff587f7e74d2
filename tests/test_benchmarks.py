"""What the benchmarks make of their figures is right: ratios, spreads, slopes, peaks of memory, and the table.

No time is asserted here, nor anywhere. A way that gives another result is refused before it is timed.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from softbridge.geometry import read_geometry
from softbridge.testing import random_prefix

BENCHMARKS = Path(__file__).resolve().parent / "benchmarks"
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(BENCHMARKS)
    names = ("curve", "engines", "growth", "side_by_side", "table")
    curve, engines, growth, side_by_side, table = map(import_module, names)

ROW = side_by_side.Row(
    "a step",
    {"native": [1.0, 2.0, 3.0], "slow": [4.0, 4.0, 4.0], "fast": [2.0, 2.0, 2.0], "bare": [0.5, 1.0, 1.0]},
    "bare",
    {"native": [2**20], "fast": [2**21], "bare": [2**19]},
)
#: A script as the benchmarks are.
SCRIPT = """
from side_by_side import heading, measure
print(heading())
print("<!-- slow: not here -->")
print("<!-- slow: not here -->")
measure("{title}", {{"native": lambda: 0.25, "slow": lambda: 0.5}}, rounds=2)
{then}
"""


def test_a_row_compares_medians_and_says_how_the_ratio_is_spread() -> None:
    assert ROW.peers == ["fast", "slow"], "the limit is no peer"
    assert ROW.ratio("fast") == 1
    assert ROW.quartiles("fast") == (0.5, 1.5)
    assert ROW.against("bare") == "2.00 (2.00 to 3.00)", "turn by turn: 2, 2 and 3"
    assert side_by_side.cells(ROW) == (
        "a step",
        "2000.0 ms",
        "fast 2000.0 ms, slow 4000.0 ms",
        "1.00 (0.50 to 1.50)",
        "bare 1000.0 ms",
        "2.00 (2.00 to 3.00)",
        "1.0 MiB; 0.50 of fast; 2.00 of bare",
    )
    alone = side_by_side.Row("alone", {"native": [1.0]})
    assert side_by_side.cells(alone) == ("alone", "1000.0 ms", "", "", "", "", "")


def test_ways_run_in_turns_and_the_first_turn_does_not_count() -> None:
    ran = []

    def way(name: str, figures: list[float]) -> Any:
        def run() -> float:
            ran.append(name)
            return figures[len(ran) // 2 - 1 if name == "b" else len(ran) // 2]

        return run

    row = side_by_side.measured("", {"a": way("a", [9.0, 1.0, 2.0]), "b": way("b", [9.0, 3.0, 4.0])}, 2)
    assert ran == ["a", "b"] * 3
    assert row.seconds == {"a": [1.0, 2.0], "b": [3.0, 4.0]}, "a way that gives a number has timed itself"
    assert row.memory == {}


def test_the_peak_of_memory_is_exact() -> None:
    mebibyte = 2**18  # in numbers of four bytes
    held: list[torch.Tensor] = []

    def fill() -> None:
        held.append(torch.zeros(8 * mebibyte))

    def one_after_another() -> None:
        held.clear()  # what was there counts as staying
        torch.zeros(mebibyte)
        torch.zeros(2 * mebibyte)

    def together() -> None:
        kept = torch.zeros(mebibyte)
        torch.zeros(2 * mebibyte)
        del kept

    fill()  # which the profiler does not see
    assert side_by_side.peak(one_after_another) // 2**20 == 2
    assert side_by_side.peak(fill) // 2**20 == 8
    assert side_by_side.peak(one_after_another) // 2**20 == 2
    assert side_by_side.peak(together) // 2**20 == 3
    row = side_by_side.measured("", {"native": together, "other": one_after_another}, 1, memory=True)
    assert row.ratio("other", "memory") == pytest.approx(1.5, rel=1e-3)


def test_a_slope_is_that_of_the_upper_half() -> None:
    sizes = [1, 2, 4, 8, 16, 32]

    def made(**figures: Any) -> Any:
        rows = [side_by_side.Row(f"{x}", {name: [figure(x)] for name, figure in figures.items()}) for x in sizes]
        return curve.Curve("step", "tokens", sizes, rows, {"seconds": "bare"})

    found = made(native=lambda x: 3.0 * x**2, bare=lambda x: max(5.0, 5.0 * x / 8), flat=lambda x: 7.0)
    assert found.slope("native", "seconds") == pytest.approx(2)
    assert found.slope("bare", "seconds") == pytest.approx(1), "below stands what does not grow"
    assert found.slope("flat", "seconds") == pytest.approx(0)
    assert found.awaited("seconds") == pytest.approx(1), "the bare model's"
    assert curve.lines(found) == [
        ("step: tokens", "1", "32", "time", "1.00 (bare)", "2.00", "bare 1.00, flat 0.00"),
    ]


def test_ways_that_give_the_same_are_timed_and_others_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = growth.frozen()
    prompt = random_prefix(read_geometry(model.config), 3)
    assert [*growth.training(model, prompt, 1, 4)] == ["native", "peft", "bare model"]
    timed = []
    monkeypatch.setattr(growth, "measured", lambda *given, **_: timed.append(given))
    growth.here(lambda size: growth.training(model, prompt, 1, size))(4, 1)
    assert len(timed) == 1

    other = random_prefix(read_geometry(model.config), 3, seed=1)
    right = engines.attached
    monkeypatch.setattr(
        engines, "attached", lambda model, given, name: right(model, other if name == "peft" else given, name)
    )
    with pytest.raises(AssertionError, match=r"peft: .* of the largest number apart"):
        growth.here(lambda size: growth.training(model, prompt, 1, size))(4, 1)
    assert len(timed) == 1, "nothing was timed"


def test_one_table_of_all_scripts_also_where_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "good.py").write_text(SCRIPT.format(title="well done", then=""))
    (tmp_path / "bad.py").write_text(SCRIPT.format(title="half done", then="assert 1 == 2"))
    (tmp_path / "words.py").write_text("print('| no row | of ours |')")
    monkeypatch.setattr(table, "HERE", tmp_path)
    monkeypatch.setattr(table, "NEWER", (("bad.py",), ("good.py", "and", "more"), ("words.py",)))
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", ["table.py", str(tmp_path / "out")])
    assert table.main() == 1
    page, results = (tmp_path / "out/bench.md").read_text(), json.loads((tmp_path / "out/bench.json").read_text())
    assert capfd.readouterr().err.endswith(f"failed: {sys.executable} bad.py\n")
    rows = [line for line in page.splitlines() if "done" in line]
    assert [row.split(" | ")[1:5] for row in rows] == [
        [title, "250.0 ms", "slow 500.0 ms", "0.50 (0.50 to 0.50)"] for title in ("half done", "well done")
    ]
    assert f"torch {torch.__version__}" in page
    assert page.count("not here") == 2, "what is printed besides is kept, once of each script"
    assert page.count("softbridge") == 1, "one head for all"
    assert "| no row | of ours |" in page, "of a script that keeps no rows, all is"
    assert [script["script"] for script in results["scripts"]] == ["bad.py", "good.py and more", "words.py"]
    assert results["scripts"][1]["kept"][0]["row"]["seconds"] == {"native": [0.25] * 2, "slow": [0.5] * 2}
