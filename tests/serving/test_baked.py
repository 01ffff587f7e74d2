"""A prompt that was baked into a checkpoint is served by every server, as words that any text can begin with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import softbridge as sb
from softbridge.base import BaseModel, build
from softbridge.errors import EngineError
from softbridge.plugin.registry import servers
from softbridge.plugin.serving import Answer, Request
from softbridge.testing import random_input_prompt, tiny_config
from softbridge.verification.serving import FACTOR, TOKENS, answered

#: Heads of 32, which every server attends in.
CONFIGS: Mapping[str, Any] = {
    "llama": lambda: tiny_config("llama", hidden_size=64, num_attention_heads=2, num_key_value_heads=1),
    "qwen3": lambda: tiny_config("qwen3", hidden_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=32),
    "gpt2": lambda: tiny_config("gpt2", n_embd=64, n_head=2),
}
#: Server and family -> what the server says of a head that is not the embedding, which a baked checkpoint has.
TIED = {("mlx", "gpt2"): "parameters not in model"}
TEXT = (7, 11, 13, 17, 19, 23)


def among(answer: Answer, vocabulary: int) -> Any:
    """Log-probabilities [N, V] among the words that the base model had before."""
    scores = np.asarray(answer.log_probabilities, np.float64)[:, :vocabulary]
    return scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))


@pytest.mark.filterwarnings("ignore")  # of vLLM, as it is imported
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("name", servers())
def test_baked_words_are_the_prompt(name: str, family: str, tmp_path: Path) -> None:
    server = servers()[name]
    if server.unavailable() is not None:
        pytest.skip(str(server.unavailable()))
    model = build(CONFIGS[family](), "causal-lm", torch.float32, 0)
    assert not server.obstacles(model.config)
    size = model.config.vocab_size
    prompts = {word: random_input_prompt(BaseModel(model.config).geometry, 5, seed=n) for n, word in enumerate("ab")}
    made = sb.bake(prompts, tmp_path / "baked", base=model)
    texts = [(*made.ids["a"], *TEXT), (*made.ids["b"], *TEXT), TEXT]
    (tmp_path / "scratch").mkdir()
    if (name, family) in TIED:
        with (
            pytest.raises(EngineError, match=TIED[name, family]),
            server.open(tmp_path / "baked", {}, tmp_path / "scratch"),
        ):
            pass
        return
    with server.open(tmp_path / "baked", {}, tmp_path / "scratch") as ask:
        found = ask([Request(tuple(int(one) for one in text)) for text in texts], TOKENS)
    exact = build(CONFIGS[family](), "causal-lm", torch.float64, 0)
    expected = []
    for word in ("a", "b", None):
        running = exact if word is None else sb.attach(exact, prompts[word], self_check=False)
        expected.append(answered(running, TEXT))
        if word is not None:
            sb.detach(running)

    def apart(ours: int, theirs: int) -> float:
        return float(np.abs(among(found[ours], size)[0] - among(expected[theirs], size)[0]).max())

    noise = apart(2, 2)
    print(f"{name} {family}: noise {noise:.1e}, {apart(0, 0):.1e}, {apart(1, 1):.1e}; effect {apart(0, 2):.1e}")
    assert max(apart(0, 0), apart(1, 1)) <= FACTOR * max(noise, 1e-6)
    assert min(apart(0, 1), apart(1, 0), apart(0, 2), apart(1, 2)) > 100 * noise
