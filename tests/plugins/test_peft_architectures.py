"""Every method of PEFT x eleven architectures: the file there and back, and PEFT against the native engine.

PEFT decides which cells there are: what it does not train is counted, with its reason. All in float64 with dropout off,
so that what is the same sum is nearly the same number: in which order it is added, a processor decides by where its
numbers lie in memory (`softbridge.testing.agreement`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, BertModel

import softbridge as sb
from softbridge.arrays import Array
from softbridge.base import BaseModel, build
from softbridge.errors import EngineError
from softbridge.prompt import InputPrompt, KeyValue, KeyValuePrefix, Part
from softbridge.testing import agreement
from softbridge.untrusted import Files
from softbridge.verification.probes import make_probes
from softbridge.verification.run import attached, generate_fault, gradient, run
from softbridge_compat import peft_defects
from softbridge_native.engine import ENGINE as NATIVE
from softbridge_peft import example, facts
from softbridge_peft.engine import ENGINE, _task

pytest.importorskip("peft")

pytestmark = [
    # Defects of PEFT, held by tests/compat: peft-deprecated and peft-position-warning.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
]

LENGTH = 4
METHODS = tuple(example.methods(LENGTH))
PREFIXES = tuple(name for name, (peft_type, _) in example.methods(LENGTH).items() if facts.KINDS[peft_type] == "prefix")
SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 34,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
SEQ2SEQ = {"d_model": 16, "decoder_start_token_id": 2, "forced_bos_token_id": None, "forced_eos_token_id": None}
#: Family -> what its configuration needs beside SIZES. The window of Gemma 3 is shorter than prefix and text together.
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 34},
    "llama": GROUPED,
    "qwen3": GROUPED,
    "gemma3_text": {**GROUPED, "query_pre_attn_scalar": 6, "sliding_window": 6, "sliding_window_pattern": 2},
    "gpt_neox": {"rotary_pct": 0.5},
    "bloom": {"n_layer": 2, "n_head": 2},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "bert": {"num_labels": 3},
    "roberta": {"num_labels": 3, "pad_token_id": 1, "bos_token_id": 0},
    "t5": {**SEQ2SEQ, "d_kv": 6, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2},
    "bart": {
        **SEQ2SEQ,
        **dict.fromkeys(("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads"), 2),
        **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 24),
    },
}


#: Why PEFT itself trains no prompt -> what it raises then.
UNTRAINED: dict[str | None, type[Exception]] = {
    "only supports task_type = CAUSAL_LM": EngineError,
    # See peft-unpooled-prefix: the classifier is handed the cache.
    "not supported between instances of 'tuple' and 'int'": TypeError,
    # See peft-renamed-cache-classifier.
    "Model does not support past key values": ValueError,
}


def _table() -> dict[tuple[str, str], str]:
    """Cell -> why PEFT does not train it, or the native engine does not run it: a part of the reason given there."""
    causal, unpooled, renamed = (str(why) for why in UNTRAINED)
    cells = {(family, "context-aware"): causal for family in ("bert", "roberta", "t5", "bart")}
    refused: dict[str, str] = {}
    if not BertModel._can_set_attn_implementation():
        refused |= {"bert": "dispatch", "t5": "dispatch"}
    cells |= {(family, method): why for family, why in refused.items() for method in PREFIXES}
    if peft_defects.UNPOOLED_PREFIX.applies():
        cells |= {("roberta", method): unpooled for method in PREFIXES}
    if peft_defects.RENAMED_CACHE_CLASSIFIER.applies():
        cells |= {(family, method): renamed for family in ("bert", "roberta") for method in PREFIXES}
    return cells


LEFT_OUT = _table()


def test_how_many_cells_are_compared() -> None:
    cells = {(family, method) for family in FAMILIES for method in METHODS}
    assert (len(cells), len(LEFT_OUT)) in ((88, 4), (88, 10), (88, 13))
    assert LEFT_OUT.keys() <= cells


def content(path: Path) -> tuple[dict[str, Any], dict[str, tuple[str, tuple[int, ...], bytes]]]:
    files = Files(path)
    tensors = files.tensors(facts.WEIGHTS_FILES[0]).items()
    return files.json(facts.CONFIG_FILE), {name: (a.dtype.name, a.shape, a.tobytes()) for name, a in tensors}


def spoilt(part: Part) -> Part:
    """Vectors that stand one place off; keys for values."""
    if isinstance(part, InputPrompt):
        return replace(part, vectors=np.roll(part.vectors, 1, axis=0))
    return KeyValuePrefix(part.site, {n: KeyValue(pair.values, pair.keys) for n, pair in part.layers.items()})


def in_blocks(part: Part) -> Part:
    """An encoder-decoder model's gradient as PEFT has it: layers that share one stored block have one, their sum."""
    if isinstance(part, InputPrompt):
        return part
    block = {layer: facts.stored_block(layer, len(part.layers), 2) for layer in part.layers}

    def total(layer: int, half: str) -> Array:
        alike = [pair for other, pair in part.layers.items() if block[other] == block[layer]]
        return np.asarray(np.sum([getattr(pair, half) for pair in alike], axis=0))

    return KeyValuePrefix(part.site, {n: KeyValue(total(n, "keys"), total(n, "values")) for n in part.layers})


def apart(ours: Mapping[str, Array], theirs: Mapping[str, Array]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float(np.abs(array - theirs[name]).max()) / float(np.abs(array).max()) for name, array in ours.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_and_the_same_in_both_engines(family: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family]})
    base = BaseModel(config)
    model = build(config, base.task, torch.float64, 0)
    chosen = ("alone-0", "right-padded", "greedy")
    probes = [probe for probe in make_probes(base.geometry, config, 0, base.task) if probe.name in chosen]
    told = probes[:-1] if probes[-1].greedy else probes
    plain = run(model, told)
    close = agreement(model)
    for method in METHODS:
        why = LEFT_OUT.get((family, method))
        folder = tmp_path / method
        if why in UNTRAINED:
            with pytest.raises(UNTRAINED[why], match=why):
                example.train(copy.deepcopy(model), _task(model), method, length=LENGTH, steps=1, seed=1)
            continue
        live = example.train(copy.deepcopy(model), _task(model), method, length=LENGTH, steps=1, seed=1)
        live.save_pretrained(folder / "source")
        sb.save(
            sb.load(folder / "source", base=config), folder / "canonical.safetensors", format="softbridge", base=config
        )
        sb.save(sb.load(folder / "canonical.safetensors", base=config), folder / "written", format="peft", base=config)
        assert content(folder / "written") == content(folder / "source"), method

        prompt = sb.load(folder / "written", base=config)
        wrong = generate_fault(ENGINE, prompt, base.geometry) is not None  # then it picks tokens through its forward
        with attached(ENGINE, copy.deepcopy(model), prompt) as running:
            expected = run(running, [replace(probe, stepwise=wrong) for probe in probes])
        loaded = run(ENGINE.load(copy.deepcopy(model), prompt, folder / "written"), told)
        assert loaded.keys() == plain.keys()
        assert apart(loaded, {name: expected[name] for name in loaded}) <= close, method
        obstacles = NATIVE.obstacles(prompt, model)
        if config.is_encoder_decoder and prompt.prefixes and peft_defects.CACHED_T5_PREFIX.applies() and not wrong:
            expected = {name: array for name, array in expected.items() if name in loaded}  # PEFT generates otherwise
        if obstacles:
            assert why is not None, (method, obstacles)
            assert any(why in obstacle.reason for obstacle in obstacles), obstacles
            continue
        assert why is None, method
        with attached(NATIVE, copy.deepcopy(model), prompt) as running:
            found = run(running, [probe for probe in probes if probe.name in expected])
        assert apart(found, expected) <= close, method
        with attached(NATIVE, copy.deepcopy(model), replace(prompt, parts=(spoilt(prompt.parts[0]),))) as running:
            wrong = run(running, told)
        assert min(apart(wrong, other) for other in (loaded, plain)) > 1e-3, method

        (loss, first), (other, second) = (
            gradient(engine, copy.deepcopy(model), prompt, probes[0]) for engine in (ENGINE, NATIVE)
        )
        assert abs(loss - other) <= close * abs(other), method
        theirs, ours = first.parts[0], in_blocks(second.parts[0]) if config.is_encoder_decoder else second.parts[0]
        assert apart(dict(ours.arrays()), dict(theirs.arrays())) <= close, method
