"""Position schemes are measured, for every family the same way, and the measured rotation is the model's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from softbridge.base.positions import probe
from softbridge.errors import BaseModelError
from softbridge.testing import TINY, tiny_config

KINDS = {
    "gpt2": "absolute",
    "llama": "rotary",
    "qwen3": "rotary",
    "gpt_neox": "rotary",
    "bert": "absolute",
    "t5": "relative",
}

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.mark.parametrize("family", TINY)
def test_kinds(family: str) -> None:
    scheme = probe(tiny_config(family))
    assert scheme.kind == KINDS[family]
    assert scheme.tellable == (family != "t5")


def test_every_family_of_the_table_is_here() -> None:
    assert set(KINDS) == set(TINY)


def halves(dim: int, position: int, theta: float = 10000.0) -> np.ndarray:
    """The rotation of Su et al. 2021 in the half-split pairing, written down independently. Rows: k · M."""
    angle = position * theta ** (-np.arange(0, dim, 2) / dim)
    matrix = np.zeros((dim, dim))
    for i, a in enumerate(angle):
        j = i + dim // 2
        matrix[i, i] = matrix[j, j] = np.cos(a)
        matrix[i, j], matrix[j, i] = np.sin(a), -np.sin(a)
    return matrix


@pytest.mark.parametrize(("family", "dim", "rotary"), [("llama", 8, 8), ("qwen3", 12, 12), ("gpt_neox", 8, 4)])
@pytest.mark.parametrize("shift", [1, 7, -7])
def test_the_probed_rotation_is_the_published_one(family: str, dim: int, rotary: int, shift: int) -> None:
    expected = np.eye(dim)
    expected[:rotary, :rotary] = halves(rotary, shift)
    maps = probe(tiny_config(family)).rotation(shift)
    assert set(maps) == set(range(3))
    for matrix in maps.values():
        assert np.abs(matrix - expected).max() < 1e-6  # the model's tables are float32
        assert np.abs(matrix - np.roll(expected, 1, 0)).max() > 0.1


def test_rotations_invert() -> None:
    scheme = probe(tiny_config("llama"))
    there, back = scheme.rotation(9), scheme.rotation(-9)
    assert all(np.abs(there[layer] @ back[layer] - np.eye(8)).max() < 1e-6 for layer in there)


@pytest.mark.parametrize(
    ("scaling", "depends"),
    [
        ({"rope_type": "linear", "factor": 4.0}, False),
        ({"rope_type": "dynamic", "factor": 2.0}, True),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, False),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            False,
        ),
        (
            {
                "rope_type": "longrope",
                "factor": 4.0,
                "short_factor": [1.0] * 4,
                "long_factor": [3.0] * 4,
                "original_max_position_embeddings": 32,
            },
            True,
        ),
    ],
    ids=lambda value: value["rope_type"] if isinstance(value, dict) else "",
)
def test_scaled_frequencies(scaling: dict[str, object], depends: bool) -> None:
    """YaRN and longrope multiply both sides by an attention factor, which the map must not contain."""
    from transformers import AutoConfig

    scheme = probe(AutoConfig.for_model("llama", **SMALL, rope_scaling=scaling))
    assert scheme.kind == "rotary"
    assert scheme.depends_on_length == depends
    matrix = scheme.rotation(5)[0]
    assert np.abs(matrix @ matrix.T - np.eye(8)).max() < 1e-6


def test_layers_without_rotary_positions_keep_their_keys() -> None:
    from transformers import AutoConfig

    scheme = probe(AutoConfig.for_model("smollm3", **SMALL))
    maps = scheme.rotation(5)
    still = [layer for layer, matrix in maps.items() if np.abs(matrix - np.eye(8)).max() < 1e-12]
    assert still == [3]


def test_what_cannot_be_measured_is_refused_not_guessed() -> None:
    from transformers import AutoConfig

    scheme = probe(AutoConfig.for_model("bloom", hidden_size=32, n_head=4, n_layer=2, vocab_size=96))
    assert (scheme.kind, scheme.tellable) == ("unknown", False)
    assert "position_ids" in scheme.reason
    with pytest.raises(BaseModelError, match="unknown, not rotary"):
        scheme.rotation(3)


def test_probing_leaves_the_configuration_and_the_generator_alone() -> None:
    config = tiny_config("llama")
    before, state = config.to_dict(), torch.random.get_rng_state()
    probe(config).rotation(3)
    assert config.to_dict() == before
    assert torch.equal(torch.random.get_rng_state(), state)
