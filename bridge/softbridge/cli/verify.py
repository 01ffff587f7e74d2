"""`softbridge verify`, `probe` and `compare`."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from softbridge.choices import LEVELS, WORKING, Level
from softbridge.cli.console import (
    PROMPT,
    AsJson,
    Base,
    NeededBase,
    Overwrite,
    command,
    completing,
    engine_names,
    one_of,
    print_json,
    quiet,
    refuse,
    reporter,
)
from softbridge.cli.tables import certificate_table, shown
from softbridge.errors import SoftbridgeError

if TYPE_CHECKING:
    from softbridge.verification.certificate import Certificate
    from softbridge.verification.recheck import Again

Weights = Annotated[
    bool, typer.Option("--weights", help="Use the base model's own weights, not random ones of its structure.")
]
Working = Annotated[str, one_of(WORKING, "--dtype", "The working precision, reported in addition to float64.")]
Seed = Annotated[int, typer.Option("--seed", help="Where random texts and weights start from.", min=0, max=2**32 - 1)]
Texts = Annotated[
    Path | None,
    typer.Option(
        "--texts",
        help="Texts to run instead of random tokens: one on each line, or JSON with token 'ids'.",
    ),
]
Memory = Annotated[
    int | None,
    typer.Option("--memory", help="Bytes that a model without weights may take. Larger ones run in pieces.", min=1),
]
AsLevel = Annotated[
    Level,
    one_of(
        LEVELS,
        "--level",
        "What counts as the same: no bit differs, float64 agrees, or no more differs than rounding.",
    ),
]
AsPage = Annotated[
    Path | None, typer.Option("--html", help="Write the certificate as a page with plots, too.", metavar="FILE")
]


@command(
    "softbridge verify peft_prefix/ adapterhub_prefix/ --base path/to/base",
    "softbridge verify out/certificate.json",
)
def verify(
    context: typer.Context,
    a: Annotated[
        str, typer.Argument(help=f"The reference: {PROMPT} A certificate.json alone is run again.", metavar="PROMPT")
    ],
    b: Annotated[str | None, typer.Argument(help=f"What is compared with it: {PROMPT}", metavar="PROMPT")] = None,
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
            help="Run the side of this engine's toolkit with another environment's interpreter. May be repeated.",
            metavar="ENGINE=PATH",
            autocompletion=completing(lambda: (f"{name}=" for name in engine_names())),
        ),
    ] = None,
    source: Annotated[
        str | None, typer.Option("--source", help=f"Where a certificate's source is now: {PROMPT}", metavar="PROMPT")
    ] = None,
    target: Annotated[
        str | None, typer.Option("--target", help=f"Where a certificate's target is now: {PROMPT}", metavar="PROMPT")
    ] = None,
    level: AsLevel = "exact",
    html: AsPage = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Do two checkpoints compute the same function? Exit status: 0 same, 1 different, 2 refused or not judged."""
    given = {name for name in context.params if str(context.get_parameter_source(name)).endswith("COMMANDLINE")}
    if b is None:
        _check_asked(given - _OF_CERTIFICATES, "a certificate, which says with what it is run again", as_json)
        from softbridge.verification.recheck import verify_again

        _show_again(lambda: verify_again(a, base, source=source, target=target, level=level), html, overwrite, as_json)
    _check_asked(given & {"source", "target"}, "two checkpoints", as_json)

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

    _show_certificate(certify, html, overwrite, as_json)


@command(
    "softbridge probe peft_prefix/ --base path/to/base --output a.safetensors",
    "softbridge probe a/ --against b/ --base path/to/base --output a.safetensors",
)
def probe(
    path: Annotated[str, typer.Argument(help=f"What to run: {PROMPT}", metavar="PROMPT")],
    base: NeededBase,
    output: Annotated[Path, typer.Option("--output", help="The file to write, .safetensors.")],
    weights: Weights = False,
    dtype: Working = "float32",
    seed: Seed = 0,
    texts: Texts = None,
    memory: Memory = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            help=f"The other side. Its files, too, say what is claimed of the two. It is {PROMPT}",
            metavar="PROMPT",
        ),
    ] = None,
    window: Annotated[
        int | None, typer.Option("--window", help="What a sliding window is shortened to, for both sides alike.", min=1)
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
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
            untrusted.write_file(output, pack(recording), overwrite=overwrite)
    except SoftbridgeError as error:
        refuse(error, as_json)
    if as_json:
        side, ran = recording.side, {"base": recording.base, "weights": recording.weights}
        print_json({**vars(side), "files": dict(side.files), "path": path, "output": str(output), **ran})
    else:
        reporter().print(shown(f"{path}, run by {recording.side.engine}: {output}"))


@command(
    "softbridge compare a.safetensors b.safetensors",
    "softbridge compare a.safetensors b.safetensors --html page.html",
)
def compare(
    a: Annotated[Path, typer.Argument(help="The reference, as 'softbridge probe' wrote it.", metavar="RECORDING")],
    b: Annotated[Path, typer.Argument(help="What is compared with it.", metavar="RECORDING")],
    level: AsLevel = "exact",
    html: AsPage = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Judge two recordings. Exit status as of 'verify'."""
    from softbridge.verification import proof
    from softbridge.verification.recording import unpack

    _show_certificate(lambda: proof.compare(unpack(a), unpack(b), level=level), html, overwrite, as_json)


def _write_page(certificate: Certificate, path: Path | None, overwrite: bool) -> None:
    if path is not None:
        from softbridge import untrusted
        from softbridge.cli.page import page

        untrusted.write_file(path, page(certificate).encode(), overwrite=overwrite)


def _show_page(path: Path | None) -> None:
    if path is not None:
        reporter().print(shown(f"the page: {path}"))


def _show_certificate(
    certify: Callable[[], Certificate], html: Path | None, overwrite: bool, as_json: bool
) -> NoReturn:
    try:
        with quiet():
            certificate = certify()
        _write_page(certificate, html, overwrite)
    except SoftbridgeError as error:
        refuse(error, as_json)
    if as_json:
        print_json(certificate.to_json())
    else:
        reporter().print(certificate_table(certificate))
        _show_page(html)
    raise typer.Exit(certificate.exit_status)


#: The options that the re-run of a certificate has.
_OF_CERTIFICATES = frozenset(
    ("a", "base", "source", "target", "level", "html", "overwrite", "as_json", "quiet", "verbose")
)


def _check_asked(names: Collection[str], what: str, as_json: bool) -> None:
    if names:
        options = ", ".join(f"--{name}" for name in sorted(names))
        refuse(SoftbridgeError(f"{options} with {what}", "options that mean something there", "leave it out"), as_json)


def _show_again(run: Callable[[], Again], html: Path | None, overwrite: bool, as_json: bool) -> NoReturn:
    try:
        with quiet():
            again = run()
        _write_page(again.certificate, html, overwrite)
    except SoftbridgeError as error:
        refuse(error, as_json)
    if as_json:
        found = {"holds": again.holds, "recorded": again.recorded, "changes": list(again.changes)}
        print_json({**found, "certificate": again.certificate.to_json()})
    else:
        console = reporter()
        console.print(certificate_table(again.certificate))
        for change in again.changes:
            console.print(shown(change))
        _show_page(html)
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
