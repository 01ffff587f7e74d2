"""What is explained beforehand is what is claimed, and the table of claims is proven cell by cell elsewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from softbridge.cli.console import app
from softbridge.errors import SoftbridgeError, UnknownFormatError
from softbridge.lowering.examples import METHODS as ALL
from softbridge.lowering.explain import explain, explanations
from softbridge.lowering.matrix import markdown, matrix
from softbridge.testing import TINY, tiny_config

FORMATS = ("softbridge", "peft", "adapterhub", "google")
MARKS = {"exact": "b", "rounding": "e", "conditional": "c", "impossible": "."}
METHODS = {"prompt-tuning": "prompt", "prefix-tuning": "prefix"}


def claims() -> list[str]:
    source = (Path(__file__).parents[1] / "test_conversions.py").read_text()
    table = re.search(r'TABLE = """\n(.*?)"""', source, re.DOTALL)
    assert table is not None
    return [" ".join(line.split()) for line in table.group(1).splitlines()[2:]]


def test_the_declarations_generate_the_table_that_is_proven() -> None:
    generated = []
    for method, name in METHODS.items():
        for family in TINY:
            pairs = [(source, target) for source in FORMATS for target in FORMATS]
            marks = [MARKS[explain(*pair, method, base=tiny_config(family)).outcome] for pair in pairs]
            generated.append(" ".join([family, name, *marks]))
    assert sorted(generated) == sorted(claims())


def test_every_refusal_has_its_reasons() -> None:
    refused = explain("adapterhub", "peft", "prefix-tuning", base=tiny_config("t5"))
    assert refused.outcome == "impossible"
    assert {obstacle.name for obstacle in refused.obstacles} == {"relative-bias", "positions"}
    assert refused.steps == ()
    conditional = explain("peft", "adapterhub", "prefix-tuning", base=tiny_config("gpt2"))
    assert [step.name for step in conditional.steps] == ["positions"]


def test_what_depends_on_the_prompts_own_numbers_is_explained_for_the_general_case() -> None:
    even = tiny_config("t5", num_layers=4, num_decoder_layers=4)
    found = explain("softbridge", "peft", "prefix-tuning", base=even)
    assert [obstacle.name for obstacle in found.obstacles] == ["repeated-layers"]
    assert explain("peft", "peft", "prefix-tuning", base=even).outcome == "exact"


def test_without_a_base_model_each_kind_of_positions_is_explained() -> None:
    found = dict(explanations("peft", "adapterhub", "prefix-tuning", None))
    outcomes = {name.split("(")[1].rstrip(")"): explanation.outcome for name, explanation in found.items()}
    assert outcomes == {"gpt2": "conditional", "bert": "conditional", "llama": "rounding", "t5": "impossible"}
    assert len(explanations("peft", "adapterhub", None, None)) == 4 * len(ALL)


def test_unknown_words_are_refused() -> None:
    with pytest.raises(SoftbridgeError, match="no method is called 'lora'"):
        explanations("peft", "adapterhub", "lora", None)
    with pytest.raises(UnknownFormatError):
        explain("peft", "onnx", "prefix-tuning", base=tiny_config("gpt2"))


def test_the_command(tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    arguments = ["explain", "--from", "peft", "--to", "adapterhub", "--base", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    assert "rotate: keys rotated by -5 positions" in " ".join(result.output.split())
    rows = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)
    outcomes = {row["method"]: row["outcome"] for row in rows}
    assert outcomes.keys() == ALL.keys()
    assert outcomes["prompt-tuning"] == "rounding"
    assert outcomes["prefix-tuning-gated"] == "impossible"
    assert outcomes["prefix-tuning"] == "rounding"
    assert CliRunner().invoke(app, ["explain", "--from", "peft", "--to", "onnx"]).exit_code == 2


def test_the_matrix_in_the_document_is_what_the_declarations_generate() -> None:
    """Every cell of it is proven in `tests/test_matrix.py`."""
    document = (Path(__file__).parents[1] / "MATRIX.md").read_text()
    generated = markdown(matrix())
    assert document.endswith(f"\n\n{generated}"), "run 'softbridge matrix', and end tests/MATRIX.md with its output"
    assert CliRunner().invoke(app, ["matrix"]).output == generated
    rows = json.loads(CliRunner().invoke(app, ["matrix", "--json"]).output)
    assert len(rows) == len(ALL) * 6 * 4
    assert {row["outcome"] for row in rows} == {"exact", "rounding", "conditional", "impossible"}
