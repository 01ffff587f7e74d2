"""The rows of `engines.py` in which AdapterHub computes the same by the same kernel: eager attention for all ways.

    .envs/transformers4/bin/python tests/benchmarks/adapterhub_rows.py [--rounds N] [training | generating] ...

AdapterHub's prompts are right under eager attention only, so that its plugin switches the model to it. In the rows of
`engines.py` it stands like that beside ways that run SDPA. Here all of them, and the bare model, run eager attention.
Where AdapterHub never fills the model's cache (Llama), its plugin switches the cache off, and each token costs a whole
pass. On these models AdapterHub has no prompt tuning: vectors in the input become a prefix. That is the same function,
so they are a row of generating. It trains other parameters, so they are no row of training.
"""

from __future__ import annotations

from typing import Any

from engines import DEEP, GPT2, LLAMA, generating_row, main, make, training_row

from softbridge.geometry import read_geometry
from softbridge.testing import random_input_prompt, random_prefix

LENGTHS = (20, 128)


def eager(family: str, **sizes: int) -> Any:
    model = make(family, **sizes)
    model.set_attn_implementation("eager")
    return model


def training(rounds: int) -> None:
    for family, sizes in (("gpt2", GPT2), ("llama", LLAMA)):
        model = eager(family, **sizes).requires_grad_(False)  # the limit is that of a frozen model
        geometry = read_geometry(model.config)
        for length in LENGTHS:
            title = f"eager: training step, {family}, prefix of {length}, 4 x 128"
            training_row(model, random_prefix(geometry, length), title, rounds)


def generating(rounds: int) -> None:
    for family, sizes in (("gpt2", {**DEEP["gpt2"], "n_positions": 256}), ("llama", DEEP["llama"])):
        model = eager(family, **sizes)
        geometry = read_geometry(model.config)
        prompts = {f"prefix of {length}": random_prefix(geometry, length) for length in LENGTHS}
        prompts["prompt of 20"] = random_input_prompt(geometry, 20)
        for kind, prompt in prompts.items():
            for batch in (1, 8):
                title = f"eager: 24 tokens, {family} of 32 tiny layers, {kind}, {batch} rows"
                generating_row(model, prompt, title, batch, 24, rounds)


if __name__ == "__main__":
    main({"generating": generating, "training": training})
