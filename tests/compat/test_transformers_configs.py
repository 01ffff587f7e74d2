"""A configuration that says what the installed transformers does not read is refused; one that says the same, taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import softbridge as sb
from softbridge.base import BaseModel
from softbridge.errors import BaseModelError
from softbridge.testing import random_prefix, tiny_config, tiny_model

IDS = torch.tensor([[5, 9, 17, 33, 21]])


def written(folder: Path, family: str, drop: tuple[str, ...] = (), **said: Any) -> Path:
    """A config.json as another release writes it: without what this one calls otherwise, and with its own words."""
    folder.mkdir()
    config = tiny_config(family).to_dict()
    kept = {key: value for key, value in config.items() if key not in drop}
    (folder / "config.json").write_text(json.dumps({**kept, "transformers_version": "9.9.9", **said}))
    return folder


def rope(**said: Any) -> dict[str, Any]:
    return {"drop": ("rope_theta", "rope_scaling", "rope_parameters"), "rope_parameters": said}


def unread(key: str, family: str) -> bool:
    return key not in tiny_config(family).to_dict()


@pytest.mark.parametrize(
    ("family", "key", "other", "same"),
    [
        ("llama", "rope_parameters", {"rope_theta": 500.0, "rope_type": "default"}, {"rope_theta": 10000.0}),
        (
            "llama",
            "rope_parameters",
            {"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0},
            {"rope_theta": 10000.0, "rope_type": "default"},
        ),
        ("gpt_neox", "rope_parameters", {"rope_theta": 10000.0, "partial_rotary_factor": 0.25}, None),
        ("t5", "scale_decoder_outputs", False, True),
        ("bert", "position_embedding_type", "relative_key", "absolute"),
    ],
)
def test_what_is_not_read_is_refused_where_it_says_something_else(
    family: str, key: str, other: Any, same: Any, tmp_path: Path
) -> None:
    drop = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor") if "rope" in key else ()
    base = written(tmp_path / "other", family, drop, **{key: other})
    agreeing = written(
        tmp_path / "same", family, drop if same is not None else (), **({} if same is None else {key: same})
    )
    assert BaseModel.resolve(agreeing).geometry.model_type == family
    if not unread(key, family):
        assert BaseModel.resolve(base).geometry.model_type == family
        return
    with pytest.raises(BaseModelError, match=rf"says {key} = (.|\n)*transformers that wrote it \(transformers 9"):
        BaseModel.resolve(base)
    with pytest.raises(BaseModelError, match=key):  # the same where a model was made of it, unread
        sb.attach(_made_of(base, family), random_prefix(BaseModel(tiny_config(family)).geometry))


def _made_of(base: Path, family: str) -> Any:
    model = tiny_model(family)
    vars(model.config).update(json.loads((base / "config.json").read_text()))
    return model


def test_such_a_base_would_have_been_another_model(tmp_path: Path) -> None:
    """Why it is refused: what transformers makes of it by itself."""
    base = written(tmp_path / "base", "llama", **rope(rope_theta=500.0, rope_type="default"))
    from transformers import AutoConfig

    told = (
        {"rope_theta": 500.0}
        if unread("rope_parameters", "llama")
        else {"rope_parameters": rope(rope_theta=500.0, rope_type="default")["rope_parameters"]}
    )
    right, made = tiny_model("llama", **told), AutoConfig.from_pretrained(base)
    from softbridge.base import build

    with torch.no_grad():
        theirs = build(made, "causal-lm", torch.float64, 0)(IDS).logits
        distance = float((right(IDS).logits - theirs).abs().max())
    assert (distance > 0.1) == unread("rope_parameters", "llama")
    assert distance == 0 or unread("rope_parameters", "llama")


def test_every_configuration_of_the_installed_transformers_is_read_whole() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from softbridge_compat.transformers_configs import unread as ignored

    for family in ("llama", "gemma3_text", "gpt_neox", "t5", "longt5", "bert", "deberta", "modernbert", "mamba2"):
        assert ignored(CONFIG_MAPPING[family]()) == {}
