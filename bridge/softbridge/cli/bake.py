"""`softbridge bake`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from softbridge.cli.console import PROMPT, AsJson, NeededBase, Overwrite, command, print_json, quiet, refuse, reporter
from softbridge.cli.tables import shown
from softbridge.errors import SoftbridgeError


@command(
    "softbridge bake mood=prompts/sst2 baked/ --base path/to/base --verify",
    "softbridge bake a=prompts/a b=prompts/b baked/ --base owner/name --in-front a",
)
def bake(
    paths: Annotated[
        list[str],
        typer.Argument(
            help=f"Input prompts, each as PATH or NAME=PATH, and last the folder to write. PATH is {PROMPT}",
            metavar="PROMPT... TARGET",
        ),
    ],
    base: NeededBase,
    in_front: Annotated[
        str | None,
        typer.Option("--in-front", help="Let the tokenizer begin every text with this prompt.", metavar="NAME"),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Run the checkpoint and the prompts, and write nothing if they differ.")
    ] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write a base model whose vocabulary has the prompts: a checkpoint that any server loads."""
    from softbridge import baking

    try:
        if len(paths) < 2:
            raise SoftbridgeError(f"one path, {paths[0]!r}", "a prompt or more, and a target", "give both")
        *sources, target = paths
        named = dict(map(_named, sources))
        if len(named) < len(sources):
            raise SoftbridgeError(f"two prompts of one name: {', '.join(sources)}", "a name each", "say NAME=PATH")
        with quiet():
            made = baking.bake(named, target, base=base, in_front=in_front, verify=verify, overwrite=overwrite)
    except SoftbridgeError as error:
        refuse(error, as_json)
    if as_json:
        print_json({**vars(made), "path": str(made.path)})
        return
    console = reporter()
    console.print(shown(f"{base} with {', '.join(made.tokens)} in its vocabulary -> {made.path}/"))
    for name, tokens in made.tokens.items():
        first, last = made.ids[name][0], made.ids[name][-1]
        what = f"{''.join(tokens)[:60]}{' ...' if len(''.join(tokens)) > 60 else ''}"
        where = "in front of every text, by the tokenizer itself" if made.in_front == name else made.placement[name]
        console.print(shown(f"  {name}: tokens {first} to {last}, {what}; {where}"))
    if made.apart is not None:
        console.print(
            shown(
                f"  the checkpoint and the prompts differ by {made.apart:.1e} of the largest logit, which the prompts "
                f"move by {made.effect:.1e} or more"
            )
        )


def _named(source: str) -> tuple[str, str]:
    name, equals, path = source.partition("=")
    return (name, path) if equals else (Path(source).stem or "prompt", source)
