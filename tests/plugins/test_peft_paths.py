"""A stranger's adapter_config.json may name any path on this machine: PEFT is never made to open it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import softbridge as sb
from softbridge.base import BaseModel
from softbridge.lowering.examples import example
from softbridge.plugin.registry import format_named
from softbridge.testing import tiny_config, tiny_model

peft = pytest.importorskip("peft")

_WATCHED: list[list[str]] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    for seen in _WATCHED:
        if event in ("open", "os.listdir", "os.scandir", "socket.connect"):
            seen.append(str(arguments[0]))


sys.addaudithook(_watch)


@contextmanager
def watched() -> Iterator[list[str]]:
    _WATCHED.append([])
    try:
        yield _WATCHED[-1]
    finally:
        _WATCHED.pop()


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("multitask-prompt-tuning", {"prompt_tuning_init": "EXACT_SOURCE_TASK"}),
        ("multitask-prompt-tuning", {"prompt_tuning_init": "AVERAGE_SOURCE_TASKS"}),
        ("multitask-prompt-tuning", {"prompt_tuning_init": "ONLY_SOURCE_SHARED"}),
        ("prompt-tuning", {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "go"}),
    ],
)
def test_paths_in_a_configuration_are_not_opened(method: str, said: dict[str, Any], tmp_path: Path) -> None:
    base, secret = tiny_config("gpt2"), tmp_path / "secret"
    geometry = BaseModel(base).geometry
    for name in ("a", "b"):
        prompt = example(method, geometry, format_named("peft").capabilities)
        sb.save(prompt, tmp_path / name, format="peft", base=base)
    (tmp_path / "a" / "softbridge.json").unlink()
    secret.mkdir()
    (secret / "state.bin").write_bytes(b"")
    path = tmp_path / "a" / "adapter_config.json"
    named = {"prompt_tuning_init_state_dict_path": str(secret / "state.bin"), "tokenizer_name_or_path": str(secret)}
    known = json.loads(path.read_text())
    path.write_text(json.dumps({**known, **said, **{name: one for name, one in named.items() if name in known}}))
    with watched() as seen:
        certificate = sb.verify(tmp_path / "a", tmp_path / "b", base=base)
    assert certificate.same
    assert certificate.source.loaded, "it was not PEFT's own loader that ran it"
    assert any(str(tmp_path / "a") in one for one in seen), "nothing was watched"
    assert not [one for one in seen if "secret" in one]
    if method != "prompt-tuning":
        with watched() as seen, suppress(Exception):
            peft.PeftModel.from_pretrained(tiny_model("gpt2"), tmp_path / "a")
        assert any("secret" in one for one in seen), "this test cannot fail"
