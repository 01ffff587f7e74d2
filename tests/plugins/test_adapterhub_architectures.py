"""Every architecture that AdapterHub has a folder for: it works in the grid of `test_adapterhub`, or it is refused.

The reason for which it is refused is measured here or shown by a defect in `softbridge_compat`. And families of
encoders that are configured as decoders.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import softbridge as sb
from softbridge.arrays import Array
from softbridge.errors import BaseModelError, CheckpointError
from softbridge.geometry import Geometry, StackGeometry, read_geometry
from softbridge.untrusted import Files
from softbridge_adapterhub import facts
from softbridge_adapterhub.engine import ENGINE
from softbridge_adapterhub.format import FORMAT

adapters = pytest.importorskip("adapters")

import torch  # noqa: E402
from transformers import AutoConfig, AutoModel, EncoderDecoderConfig, EncoderDecoderModel  # noqa: E402

from softbridge.base import build  # noqa: E402

#: As the issue lists them; XLM-R is `xlm-roberta`.
ARCHITECTURES = [
    *("bert", "roberta", "distilbert", "albert", "electra", "deberta", "deberta-v2", "xlm-roberta", "bert-generation"),
    *("gpt2", "gptj", "llama", "mistral", "t5", "mt5", "bart", "mbart", "plbart", "encoder-decoder", "whisper"),
    *("vit", "beit", "clip", "xmod"),
]
_SIZES = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
_TEXT = {**_SIZES, "vocab_size": 40, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1}
_IMAGES = {**_SIZES, "image_size": 8, "patch_size": 4}
REFUSED: dict[str, dict[str, Any]] = {
    "beit": _IMAGES,
    "clip": {"text_config": _TEXT, "vision_config": _IMAGES},
    "deberta": _TEXT,
    "encoder-decoder": {},
    "vit": _IMAGES,
    "xmod": {**_TEXT, "languages": ["en_XX"], "default_language": "en_XX"},
}


def test_every_architecture_is_here_or_refused() -> None:
    assert len(ARCHITECTURES) == 24
    assert set(ARCHITECTURES) == facts.MODEL_TYPES | REFUSED.keys()
    assert REFUSED.keys() == facts.OTHER_MODEL_TYPES.keys()
    assert len(facts.MODEL_TYPES) == 18


def config_of(family: str) -> Any:
    if family == "encoder-decoder":
        halves = (AutoConfig.for_model("bert", **_TEXT) for _ in range(2))
        return EncoderDecoderConfig.from_encoder_decoder_configs(*halves)
    return AutoConfig.for_model(family, **REFUSED[family])


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("family", REFUSED)
def test_a_file_of_another_architecture_is_refused(family: str, tmp_path: Path) -> None:
    config = config_of(family)
    model = EncoderDecoderModel(config) if family == "encoder-decoder" else AutoModel.from_config(config)
    adapters.init(model)
    model.add_adapter("mine", adapters.PrefixTuningConfig(flat=True, prefix_length=3))
    further = {"with_head": False} if family == "encoder-decoder" else {}
    model.save_adapter(str(tmp_path), "mine", **further)
    files = Files(tmp_path)
    locations = {key.split(".mine.")[1] for key in files.tensors(facts.WEIGHTS_FILE) if ".pool." not in key}
    if family in ("clip", "encoder-decoder"):
        assert len(locations) > 1, "more than one model is prefixed"
    else:
        assert locations == {"self_prefix.control_trans"}
    stack = StackGeometry(2, 2, 2, 8)
    with pytest.raises(CheckpointError, match=facts.OTHER_MODEL_TYPES[family][:40]):
        FORMAT.read(files, Geometry(family, 16, 40, stack, None))
    with pytest.raises((CheckpointError, BaseModelError)):
        sb.load(tmp_path, base=config)
    if family in ("vit", "encoder-decoder"):
        with pytest.raises(BaseModelError):
            read_geometry(config)


def logits(model: Any, **further: Any) -> Array:
    tokens = torch.tensor([[5, 9, 17, 33, 21, 8], [7, 11, 3, 30, 0, 0]])
    with torch.no_grad():
        return np.asarray(model(input_ids=tokens, attention_mask=(tokens != 0).long(), **further).logits)


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta", "electra", "bert-generation"])
def test_an_encoders_family_as_a_decoder(family: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(family, **_TEXT, is_decoder=True)
    model = build(config, "causal-lm", torch.float64, 0)
    running = copy.deepcopy(model)
    adapters.init(running)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        running.add_adapter("mine", adapters.PrefixTuningConfig(flat=True, prefix_length=3), set_active=True)
    running.save_adapter(str(tmp_path), "mine", with_head=False)
    running.adapter_to("mine", dtype=torch.float64)
    reference = logits(running.eval(), use_cache=False)

    geometry = read_geometry(config)
    prompt = FORMAT.read(Files(tmp_path), geometry)
    assert [part.site for part in prompt.prefixes] == ["self"]
    fails = family in facts.CACHE_FAILS
    assert any("use_cache=False" in advice for advice in FORMAT.advice(prompt, geometry)) == fails
    for ours in (ENGINE.attach(copy.deepcopy(model), prompt), ENGINE.load(copy.deepcopy(model), prompt, tmp_path)):
        np.testing.assert_array_equal(logits(ours, use_cache=False), reference)
        assert np.abs(reference - logits(model)).max() > 0.1
        assert ours.config.use_cache is not fails
        # Decoding with whatever cache is left is decoding without one.
        tokens = torch.tensor([[5, 9, 17, 33]])
        settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        found = [
            ours.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **settings, **further)
            for further in ({}, {"use_cache": False})
        ]
        assert found[0].tolist() == found[1].tolist()
