"""What a conversion claims is what its certificate, the certificate's re-run and `verify A B` hold it to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import softbridge as sb
from softbridge.base import BaseModel
from softbridge.examples import METHODS
from softbridge.testing import tiny_config
from softbridge.verification.again import verify_again

#: Family, method, source and target format, options: conversions whose certificates were rejected at once.
REJECTED: dict[str, tuple[str, str, str, str, dict[str, Any]]] = {
    "keys that are turned and then rounded": ("llama", "prefix-tuning", "peft", "adapterhub", {"dtype": "bfloat16"}),
    "numbers that are rounded": ("gpt2", "prefix-tuning", "peft", "softbridge", {"dtype": "bfloat16"}),
    "one task of several": ("gpt2", "multitask-prompt-tuning", "softbridge", "peft", {"task": 1}),
    "one part of several": ("t5", "p-tuning-v2", "softbridge", "peft", {"part": "self"}),
}


@pytest.mark.parametrize("name", REJECTED)
def test_a_certificate_is_not_rejected_at_once(name: str, tmp_path: Path) -> None:
    family, method, source, target, options = REJECTED[name]
    config = tiny_config(family)
    config.save_pretrained(tmp_path / "base")
    sb.save(METHODS[method](BaseModel(config).geometry), tmp_path / "a", source, config)
    base = str(tmp_path / "base")
    report = sb.convert(tmp_path / "a", tmp_path / "b", target, base, verify=True, **options)
    assert report.certificate is not None
    assert report.certificate.same
    again = verify_again(tmp_path / "b" / "certificate.json")
    assert again.holds, again.changes
    between = sb.verify(tmp_path / "a", tmp_path / "b", base)
    assert between.same, between.summary()
    assert Path(report.certificate.source.path) == tmp_path / "a"
