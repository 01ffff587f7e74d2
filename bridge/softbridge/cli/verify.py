"""`softbridge verify`, `probe` and `compare`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from softbridge.choices import LEVELS, WORKING, Level
from softbridge.cli.console import AsJson, Base, app, one_of, print_json, printer, quiet, refuse
from softbridge.cli.tables import certificate_table, shown
from softbridge.errors import SoftbridgeError

if TYPE_CHECKING:
    from softbridge.verification.certificate import Certificate

Weights = Annotated[
    bool, typer.Option("--weights", help="Use the base model's own weights, not random ones of its structure.")
]
Working = Annotated[str, one_of(WORKING, "--dtype", "The working precision, reported in addition to float64.")]
Seed = Annotated[int, typer.Option("--seed", help="Of texts and random weights.", min=0, max=2**32 - 1)]
Texts = Annotated[
    Path | None,
    typer.Option(
        "--texts",
        help="Run these instead of random tokens: one text a line, for the model's tokenizer; or JSON with 'ids'.",
    ),
]
Memory = Annotated[
    int | None,
    typer.Option("--memory", help="Bytes that a model without weights may take; larger ones run in pieces.", min=1),
]
AsLevel = Annotated[
    Level,
    one_of(
        LEVELS,
        "--level",
        "What counts as the same: no bit differs; float64 agrees; or no more than the working precision rounds.",
    ),
]
AsPage = Annotated[
    Path | None, typer.Option("--html", help="Write the certificate as a page with plots, too.", metavar="FILE")
]
NeededBase = Annotated[
    str, typer.Option("--base", help="A directory, a config.json, or a hub id.", metavar="MODEL_OR_CONFIG")
]


@app.command()
def verify(
    a: Annotated[Path, typer.Argument(help="The reference; or a certificate.json, to see whether it still holds.")],
    b: Annotated[Path | None, typer.Argument(help="What is compared with it.")] = None,
    base: Base = None,
    weights: Weights = False,
    dtype: Working = "float32",
    seed: Seed = 0,
    texts: Texts = None,
    memory: Memory = None,
    python: Annotated[
        list[str] | None,
        typer.Option(
            "--python",
            help="Run the side of this engine's toolkit with another environment's interpreter; may be repeated.",
            metavar="ENGINE=PATH",
        ),
    ] = None,
    level: AsLevel = "exact",
    html: AsPage = None,
    as_json: AsJson = False,
) -> None:
    """Do two checkpoints compute the same function? Exit status: 0 same, 1 different, 2 refused or not judged."""
    if b is None:
        _verify_again(a, base, html, as_json)

    def certify() -> Certificate:
        from softbridge.verification import proof
        from softbridge.verification.small_models import BUDGET

        if b is None or base is None:
            raise SoftbridgeError("no base model", "a directory, a config.json, or a hub id", "give it with --base")
        elsewhere = dict(_assignment(one) for one in python or ())
        return proof.verify(
            a,
            b,
            base=base,
            weights=weights,
            dtype=dtype,
            seed=seed,
            texts=_token_ids(texts, base),
            python=elsewhere,
            level=level,
            memory=BUDGET if memory is None else memory,
        )

    _show_certificate(certify, html, as_json)


@app.command()
def probe(
    path: Annotated[Path, typer.Argument(help="A file or a directory.")],
    base: NeededBase,
    output: Annotated[Path, typer.Option("--output", help="The file to write, .safetensors.")],
    weights: Weights = False,
    dtype: Working = "float32",
    seed: Seed = 0,
    texts: Texts = None,
    memory: Memory = None,
    against: Annotated[
        Path | None,
        typer.Option("--against", help="The other side, whose files, too, say what is claimed of the two."),
    ] = None,
    window: Annotated[
        int | None, typer.Option("--window", help="What a sliding window is shortened to, for both sides alike.", min=1)
    ] = None,
) -> None:
    """Record what one checkpoint computes, to compare it with another that runs in another environment."""
    from softbridge import untrusted
    from softbridge.verification import proof
    from softbridge.verification.recording import pack

    try:
        with quiet():
            recording = proof.probe(
                path,
                base=base,
                against=against,
                weights=weights,
                dtype=dtype,
                seed=seed,
                texts=_token_ids(texts, base),
                window=window,
                **({} if memory is None else {"memory": memory}),
            )
            untrusted.write_file(output, pack(recording))
    except SoftbridgeError as error:
        refuse(error, as_json=False)
    printer().print(shown(f"{path}, run by {recording.side.engine}: {output}"))


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="The reference, as 'softbridge probe' wrote it.")],
    b: Annotated[Path, typer.Argument(help="What is compared with it.")],
    level: AsLevel = "exact",
    html: AsPage = None,
    as_json: AsJson = False,
) -> None:
    """Judge two recordings. Exit status as of 'verify'."""
    from softbridge.verification import proof
    from softbridge.verification.recording import unpack

    _show_certificate(lambda: proof.compare(unpack(a), unpack(b), level=level), html, as_json)


def _write_page(certificate: Certificate, path: Path | None) -> None:
    if path is not None:
        from softbridge import untrusted
        from softbridge.cli.page import page

        untrusted.write_file(path, page(certificate).encode())


def _show_certificate(certify: Callable[[], Certificate], html: Path | None, as_json: bool) -> NoReturn:
    try:
        with quiet():
            certificate = certify()
        _write_page(certificate, html)
    except SoftbridgeError as error:
        refuse(error, as_json)
    if as_json:
        print_json(certificate.to_json())
    else:
        printer().print(certificate_table(certificate))
    raise typer.Exit(certificate.exit_status)


def _verify_again(path: Path, base: str | None, html: Path | None, as_json: bool) -> NoReturn:
    from softbridge.verification.recheck import verify_again

    try:
        with quiet():
            again = verify_again(path, base)
        _write_page(again.certificate, html)
    except SoftbridgeError as error:
        refuse(error, as_json)
    if as_json:
        found = {"holds": again.holds, "recorded": again.recorded, "changes": list(again.changes)}
        print_json({**found, "certificate": again.certificate.to_json()})
    else:
        console = printer()
        console.print(certificate_table(again.certificate))
        for change in again.changes:
            console.print(shown(change))
        console.print("the certificate holds" if again.holds else "the certificate does not hold")
    raise typer.Exit(0 if again.holds else 1 if again.changes else again.certificate.exit_status)


def _assignment(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise SoftbridgeError(f"--python {text}", "ENGINE=PATH", "name the engine whose toolkit is installed there")
    return name, path


def _token_ids(path: Path | None, base: str) -> list[list[int]] | None:
    """The texts of a file as token ids."""
    from softbridge.verification.texts import read_texts

    return None if path is None else read_texts(path, base)
