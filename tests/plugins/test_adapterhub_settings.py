"""Whatever a configuration of AdapterHub's prefix tuning says: we read its file as the package runs it."""

from __future__ import annotations

import copy
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softbridge.arrays import same_array
from softbridge.base import BaseModel, build
from softbridge.geometry import read_geometry
from softbridge.testing import as_bytes
from softbridge.untrusted import Files
from softbridge_adapterhub import facts
from softbridge_adapterhub.engine import ENGINE
from softbridge_adapterhub.format import FORMAT

adapters = pytest.importorskip("adapters")

# AdapterHub's T5 passes transformers an argument under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`past_key_value` is deprecated:FutureWarning")

import torch  # noqa: E402
from transformers import AutoConfig  # noqa: E402

_ENCODER = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 3, "pad_token_id": 0}
_SEQ2SEQ = {"vocab_size": 40, "d_model": 16, "pad_token_id": 0, "decoder_start_token_id": 1}
MODELS: dict[str, dict[str, Any]] = {
    "albert": {**_ENCODER, "num_attention_heads": 2, "embedding_size": 8},
    "bart": {**_SEQ2SEQ, "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 20, "decoder_ffn_dim": 20}
    | {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 32},
    "bert": {**_ENCODER, "num_attention_heads": 2},
    "gpt2": {"vocab_size": 40, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32, "pad_token_id": 0},
    "t5": {**_SEQ2SEQ, "d_kv": 6, "d_ff": 20, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 2},
}
LAYERS = {"bart": 5, "bert": 3, "gpt2": 3, "t5": 5}

CONFIGURATIONS = st.fixed_dictionaries(
    {
        "architecture": st.just("prefix_tuning"),
        "flat": st.booleans(),
        "prefix_length": st.integers(1, 4),
        "bottleneck_size": st.integers(1, 5),
        "non_linearity": st.sampled_from(["tanh", "relu", "gelu", "gelu_new", "leakyrelu", "swish"]),
        "dropout": st.sampled_from([0.0, 0.5]),
        "encoder_prefix": st.booleans(),
        "cross_prefix": st.booleans(),
        "leave_out": st.lists(st.integers(0, 5), max_size=3, unique=True),
        "use_gating": st.booleans(),
        "shared_gating": st.booleans(),
    }
)


@cache
def model_of(family: str) -> Any:
    config = AutoConfig.for_model(family, **MODELS[family])
    return build(config, BaseModel(config).task, torch.float64, 0)


def logits(model: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 40, (2, 6), generator=generator)
    inputs = {"input_ids": tokens, "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens[:, :5]
    with torch.no_grad():
        return np.asarray(model(**inputs).logits)


@pytest.mark.parametrize("family", MODELS)
@settings(max_examples=10)
@given(config=CONFIGURATIONS)
def test_a_file_is_read_as_the_package_runs_it(family: str, config: dict[str, Any]) -> None:
    if family not in LAYERS:
        config = {**config, "leave_out": []}
    left = set(range(LAYERS.get(family, 1))) - set(config["leave_out"])
    if not left or (family in ("bart", "t5") and not left & {2, 3, 4} and not config["encoder_prefix"]):
        return  # the package fails without a prefix
    model = model_of(family)
    running = copy.deepcopy(model)
    adapters.init(running)
    running.add_adapter("mine", adapters.AdapterConfig.load(config))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in running.named_parameters():
            if ".mine." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    with tempfile.TemporaryDirectory() as folder:
        running.save_adapter(folder, "mine", with_head=False)
        files = Files(folder)
        theirs = files.tensors(facts.WEIGHTS_FILE)
        prompt = FORMAT.read(files, read_geometry(model.config))
        assert not FORMAT.obstacles(prompt, None)
        loaded = logits(ENGINE.load(copy.deepcopy(model), prompt, Path(folder)))
        (Path(folder) / "again").mkdir()
        for name, content in as_bytes(FORMAT.write(prompt, None)).items():
            (Path(folder) / "again" / name).write_bytes(content)
        again = Files(Path(folder) / "again").tensors(facts.WEIGHTS_FILE)
    running.adapter_to("mine", dtype=torch.float64)
    running.set_active_adapters("mine")
    attached = logits(ENGINE.attach(copy.deepcopy(model), prompt))
    np.testing.assert_array_equal(loaded, attached)
    # The package evaluates a parameterisation in the precision that it was moved to, and in its files there is float32.
    np.testing.assert_allclose(logits(running.eval()), attached, atol=0 if config["flat"] else 1e-4)
    base = f"{model.base_model_prefix}."
    first = {key.removeprefix(base): array for key, array in theirs.items() if ".pool." not in key}
    assert again.keys() == first.keys()
    assert all(same_array(again[key], first[key]) for key in first)
