"""The main job, from training to certificate, on a model that is built in process."""

from __future__ import annotations

import tempfile
from pathlib import Path

from rich.console import Console

from softbridge.base.tiny import tiny_config, tiny_model
from softbridge.cli.tables import certificate_table, shown, steps_table
from softbridge.conversion import convert
from softbridge.errors import EngineError
from softbridge.plugin.hookspecs import Demonstrating
from softbridge.plugin.optional import able
from softbridge.plugin.registry import engine_named, engines, format_named
from softbridge.verification.certificate import Certificate

STEPS = 20
LENGTH = 8


def run(source: str, target: str, directory: Path | None, console: Console) -> Certificate:
    """Train with the engine `source`, convert to the format `target`, print and return the certificate."""
    if directory is None:
        with tempfile.TemporaryDirectory() as folder:
            return run(source, target, Path(folder), console)
    import torch

    format_named(target)  # before the work, and again when it is written
    trained, converted = directory / "trained", directory / "converted"
    model = tiny_model("llama", torch.float32)
    trainer = able(engine_named(source), Demonstrating)
    if trainer is None:
        those = [name for name, engine in engines().items() if able(engine, Demonstrating) is not None]
        raise EngineError(
            f"the engine '{source}' has no training of its own",
            f"one of {', '.join(those)}",
            "name another with --from",
        )
    trainer.train_example(model, "prefix-tuning", trained, length=LENGTH, steps=STEPS, seed=0)
    console.print(
        shown(
            f"1. {source} trained a prefix of {LENGTH} virtual tokens for {STEPS} steps on a tiny Llama and saved "
            f"{_listing(trained)}"
        )
    )
    report = convert(trained, converted, target, base=tiny_config("llama"), verify=True)
    console.print(shown(f"2. softbridge converted it to {target}: {_listing(converted)}"))
    console.print(steps_table(report.steps))
    console.print(shown("3. both were run on the same texts:"))
    assert report.certificate is not None
    console.print(certificate_table(report.certificate))
    return report.certificate


def _listing(directory: Path) -> str:
    return ", ".join(sorted(path.name for path in directory.iterdir()))
