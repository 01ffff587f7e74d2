"""How time and memory grow: with virtual tokens, real tokens, rows, layers, prompts of a bank, and bytes of a file.

    python tests/benchmarks/growth.py [--rounds N] [NAME ...]

Each curve is measured as a row of the table is, point by point, and printed with the slope that is expected and the one
that it has (`curve.py`). The models are so small, and what grows so large, that what grows is most of the work in the
upper half. Attention is quadratic in the real tokens and the rest of a model is linear in them: there the slope of the
bare model is what is expected.
"""

from __future__ import annotations

import argparse
import copy
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import conversions
import engines
import torch
from curve import HEADINGS, Curve, lines
from engines import BARE, again, make, stacked
from side_by_side import Figure, Row, Ways, check, keep, measured, table_heading, table_line
from torch import Tensor

import softbridge as sb
from softbridge.geometry import read_geometry
from softbridge.prompt import SoftPrompt
from softbridge.testing import random_prefix

NARROW = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 65536,
}


def frozen(**sizes: int) -> Any:
    return make("llama", **{**NARROW, **sizes}).requires_grad_(False)


def prefix(model: Any, length: int) -> SoftPrompt:
    return random_prefix(read_geometry(model.config), length)


def training(model: Any, prompt: SoftPrompt, rows: int, tokens: int) -> Ways:
    """A training step; of the bare model, without the prompt."""
    ways = engines.training_ways(model, prompt, rows, tokens)
    return {name: way for name, way in ways.items() if name in ("native", "peft", BARE)}


def decoding(model: Any, prompt: SoftPrompt, rows: int) -> Ways:
    """A few tokens behind a prefix; of the bare model, with the prefix in its cache."""
    return engines.generating_ways(model, prompt, rows, 16, without=["peft"])


def bank(count: int, rows: int = 8, tokens: int = 64) -> Ways:
    """A call with other prompts for its rows each time; of the bare model, with the same ones stacked in its cache."""
    model = frozen()
    prompts = {f"p{n}": random_prefix(read_geometry(model.config), 20, seed=n) for n in range(count)}
    held = sb.PromptBank(prompts)
    running = sb.attach(copy.deepcopy(model), held)
    ids = torch.randint(3, 90, (rows, tokens))
    for name in prompts:  # all of them are ready then
        with held.rows(name), torch.no_grad():
            running(input_ids=ids[:1, :1])
    names = list(prompts)[:rows]
    cache = stacked([prompts[name] for name in names])
    drawn = random.Random(0)

    @torch.no_grad()
    def call(chosen: Sequence[str]) -> Tensor:
        with held.rows(chosen):
            found: Tensor = running(input_ids=ids).logits
        return found

    @torch.no_grad()
    def bare() -> Tensor:
        found: Tensor = model(input_ids=ids, past_key_values=again(cache)).logits
        return found

    check({"bank": lambda: call(names), BARE: bare})

    def calls() -> None:
        for _ in range(10):
            call(drawn.sample(list(prompts), rows))

    return {"bank": calls, BARE: lambda: [bare() for _ in range(10)]}


def filling(count: int) -> Ways:
    """Attaching a bank, and a call with each of its prompts."""
    model = frozen()
    prompts = {f"p{n}": random_prefix(read_geometry(model.config), 256, seed=n) for n in range(count)}
    running = copy.deepcopy(model)
    ids = torch.randint(3, 90, (1, 1))

    @torch.no_grad()
    def fill() -> None:
        held = sb.PromptBank(prompts)
        attached = sb.attach(running, held)
        for name in prompts:
            with held.rows(name):
                attached(input_ids=ids)
        sb.detach(attached)

    return {"bank": fill}


def converting(megabytes: int, rounds: int) -> Row:
    """PEFT's file to ours. Memory is that of the process, beyond what it needs for a file of a megabyte. Linux only."""
    formats = {"softbridge": "softbridge", "safetensors": ""}
    seconds: dict[str, list[float]] = {way: [] for way in formats}
    memory: dict[str, list[int]] = {way: [] for way in formats}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for size in {1, megabytes}:
            conversions.write(folder / f"{size}" / "prefix", 4 * size)
        for turn in range(rounds + 1):
            for way, to in formats.items():
                _, _, least, _ = conversions.run(folder / "1", folder / way, to, None)
                spent, _, most, _ = conversions.run(folder / f"{megabytes}", folder / way, to, None)
                if turn:
                    seconds[way].append(spent)
                    memory[way].append(most - least)
        conversions.assert_same(folder / f"{megabytes}", folder / "softbridge", "softbridge", None)
    return Row(f"{megabytes} MB", seconds, "safetensors", memory)


@dataclass(frozen=True)
class Growth:
    """A curve that is to be measured; see `Curve`.

    Attributes:
        point: a size and a number of rounds -> the row.
    """

    title: str
    axis: str
    at: Sequence[int]
    point: Callable[[int, int], Row]
    expected: Mapping[Figure, float | str]

    def measured(self, rounds: int) -> Curve:
        rows = [self.point(size, rounds) for size in self.at]
        return Curve(self.title, self.axis, self.at, rows, self.expected)


def here(ways: Callable[[int], Ways]) -> Callable[[int, int], Row]:
    """A point that is measured in this process."""
    return lambda size, rounds: measured(f"{size}", ways(size), rounds, memory=True)


LINEAR: Mapping[Figure, float | str] = {"seconds": 1, "memory": 1}
TRAINING = "training step, prefix of 128"


def doubled(first: int, last: int) -> list[int]:
    return [first << n for n in range((last // first).bit_length())]


GROWTHS: Mapping[str, Growth] = {
    "prefix-training": Growth(
        "training step, 2 rows of 64",
        "virtual tokens P",
        doubled(1024, 65536),
        here(lambda size: training(model := frozen(), prefix(model, size), 2, 64)),
        LINEAR,
    ),
    "prefix-decoding": Growth(
        "16 tokens generated, 16 rows",
        "virtual tokens P",
        doubled(1024, 16384),
        here(lambda size: decoding(model := frozen(num_attention_heads=16, head_dim=16), prefix(model, size), 16)),
        {"seconds": 1, "memory": 0},
    ),
    "tokens": Growth(
        f"{TRAINING}, 1 row",
        "real tokens T",
        doubled(128, 4096),
        here(lambda size: training(model := frozen(), prefix(model, 128), 1, size)),
        {"seconds": BARE, "memory": BARE},
    ),
    "rows": Growth(
        f"{TRAINING}, rows of 64",
        "rows B",
        doubled(2, 128),
        here(lambda size: training(model := frozen(), prefix(model, 128), size, 64)),
        LINEAR,
    ),
    "layers": Growth(
        f"{TRAINING}, 4 rows of 64",
        "layers L",
        doubled(2, 64),
        here(lambda size: training(model := frozen(num_hidden_layers=size), prefix(model, 128), 4, 64)),
        LINEAR,
    ),
    "bank": Growth(
        "a call of 8 rows with drawn prompts",
        "prompts in a PromptBank",
        doubled(8, 512),
        here(bank),
        {"seconds": 0, "memory": 0},
    ),
    "bank-filling": Growth(
        "a bank attached and filled",
        "prompts in a PromptBank",
        doubled(8, 256),
        here(filling),
        LINEAR,
    ),
    "file": Growth("PEFT's file to ours", "megabytes of the file", doubled(8, 128), converting, LINEAR),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(GROWTHS)}; all if left out")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    engines.setup()
    print(table_heading(HEADINGS))
    for name in given.names or GROWTHS:
        curve = GROWTHS[name].measured(given.rounds)
        for cells in lines(curve):
            print(table_line(cells), flush=True)
        keep(curve=asdict(curve))


if __name__ == "__main__":
    main()
