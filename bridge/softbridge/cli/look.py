"""`softbridge words` and `similar`: what a prompt is near to."""

from __future__ import annotations

from typing import Annotated, Any, get_args

import typer

from softbridge.choices import Measure
from softbridge.cli.console import PROMPT, AsJson, Base, NeededBase, command, one_of, print_json, printer, quiet, refuse
from softbridge.cli.tables import rows_table
from softbridge.errors import BaseModelError, SoftbridgeError
from softbridge.geometry import Stack


@command(
    "softbridge words peft_prompt/ --base path/to/base",
    "softbridge words prompt.npy --base owner/name --top 5 --json",
)
def words(
    path: Annotated[str, typer.Argument(help=f"An input prompt: {PROMPT}", metavar="PROMPT")],
    base: NeededBase,
    top: Annotated[int, typer.Option("--top", help="How many words for each virtual token.", min=1)] = 3,
    stack: Annotated[str | None, one_of(get_args(Stack), "--stack", "Which of two input prompts to look at.")] = None,
    as_json: AsJson = False,
) -> None:
    """Which words of the base model's vocabulary the virtual tokens are nearest to, by cosine."""
    from softbridge.base.model import BaseModel
    from softbridge.checkpoint.read import load
    from softbridge.tools import nearest_words
    from softbridge.verification.texts import tokenizer_of

    try:
        with quiet():
            model = BaseModel.resolve(base)
            prompt = load(path, base=model)
            import torch

            weights = model.weights(torch.float32)
            try:
                tokenizer = tokenizer_of(base)
            except BaseModelError:
                tokenizer = None  # the ids say it, too
            found = nearest_words(prompt, weights, top, stack=stack, tokenizer=tokenizer)  # type: ignore[arg-type]
    except SoftbridgeError as error:
        refuse(error, as_json)
    rows: list[dict[str, Any]] = []
    for number, (ids, cosines) in enumerate(zip(found.ids.tolist(), found.similarities.tolist(), strict=True)):
        named = {} if found.words is None else {"words": list(found.words[number])}
        rows.append({"virtual_token": number, "ids": ids, "cosines": [round(one, 6) for one in cosines], **named})
    if as_json:
        print_json(rows)
        return
    cells = [
        [
            str(row["virtual_token"]),
            "  ".join(
                f"{row['words'][n]!r} {cosine:.2f}"
                if "words" in row and row["words"][n]
                else f"{row['ids'][n]} {cosine:.2f}"
                for n, cosine in enumerate(row["cosines"])
            ),
        ]
        for row in rows
    ]
    printer().print(rows_table(["virtual token", "nearest, and its cosine"], cells))


@command(
    "softbridge similar prompts/sst2 prompts/imdb prompts/mnli",
    "softbridge similar prompts/sst2 owner/name/folder --measure pairwise",
)
def similar(
    paths: Annotated[
        list[str], typer.Argument(help=f"Two prompts or more, of the same parts. Each is {PROMPT}", metavar="PROMPT...")
    ],
    base: Base = None,
    measure: Annotated[
        str,
        one_of(get_args(Measure), "--measure", "Cosine of the averaged vectors, or average of the pairwise cosines."),
    ] = "average",
    as_json: AsJson = False,
) -> None:
    """How near prompts are to each other (SPoT): which task to start another from."""
    from softbridge.base.model import BaseModel
    from softbridge.checkpoint.read import load
    from softbridge.tools import similarity_matrix

    try:
        with quiet():
            model = None if base is None else BaseModel.resolve(base)
            if len(paths) < 2:
                raise SoftbridgeError("one prompt", "two or more", "give another")
            prompts = [load(path, base=model) for path in paths]
            found = similarity_matrix(prompts, measure)  # type: ignore[arg-type]
    except SoftbridgeError as error:
        refuse(error, as_json)
    if as_json:
        print_json({"measure": measure, "prompts": paths, "similarity": found.tolist()})
        return
    cells = [[path, *(f"{one:.3f}" for one in row)] for path, row in zip(paths, found, strict=True)]
    printer().print(rows_table(["", *(str(number) for number in range(1, len(paths) + 1))], cells))
