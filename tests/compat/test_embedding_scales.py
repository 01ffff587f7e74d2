"""The table of families whose scale moved, against the installed transformers, and against the other stack's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest
import transformers
from transformers import AutoConfig

from softbridge.base import BaseModel
from softbridge.base.embedding_scale import measure_scale
from softbridge_compat import embedding_scales

OTHER = os.environ.get("SOFTBRIDGE_OTHER_PYTHON", sys.executable)
#: Not the square of a whole number, and of no power of two.
SIZES = {"hidden_size": 48, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12}
#: All of the table; and of those whose vectors nothing but a scale meets before the first layer, whoever multiplies
#: words, somewhere, and some others.
FAMILIES = (
    *embedding_scales.MOVED,
    *("gemma3_text", "granite", "granitemoe", "biogpt", "llama", "mistral", "qwen3", "phi", "cohere", "olmo2", "glm"),
)


def config_of(family: str) -> Any:
    return AutoConfig.for_model(family, **SIZES, num_hidden_layers=2, vocab_size=96, pad_token_id=0)


def measured() -> dict[str, float | None]:
    return {family: measure_scale(config_of(family)) for family in FAMILIES}


@pytest.fixture(scope="module")
def here() -> Mapping[str, float | None]:
    return measured()


def test_the_installed_release_does_what_the_table_says(here: Mapping[str, float | None]) -> None:
    for family in embedding_scales.MOVED:
        base = BaseModel(config_of(family))
        assert base.scale == here[family] == base.scale_on(transformers.__version__)
        assert base.scale_on("4.57.6") == base.scale_on("5.3") == 48**0.5
        assert base.scale_on("5.4") == base.scale_on("5.24.0") == 1
    assert all(here[family] is not None for family in FAMILIES)


def test_no_norm_is_taken_for_a_number() -> None:
    assert measure_scale(AutoConfig.for_model("bert", hidden_size=48, num_attention_heads=4)) is None


@pytest.mark.skipif(sys.executable == OTHER, reason="the other stack's environment was not named")
def test_no_family_of_the_sample_is_missing(here: Mapping[str, float | None]) -> None:
    done = subprocess.run([OTHER, "-W", "ignore", __file__], capture_output=True, text=True, check=True)
    there = json.loads(done.stdout)
    differ = {family for family in FAMILIES if there[family] != pytest.approx(here[family])}
    assert differ == embedding_scales.MOVED.keys()


if __name__ == "__main__":
    print(json.dumps(measured()))
