"""A prefix in flex attention and in flash attention is the prefix of sdpa and eager attention.

Flex attention runs on this CPU: compiled, in float32 and forward only, in one test; everywhere else as torch's own
uncompiled function, which computes in float64, with gradients. Of flash attention no kernel was run: what stands in
for its package computes what the package's documentation says, and everything around it is transformers' own.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash
from torch import Tensor
from transformers import AutoConfig

import softbridge as sb
from softbridge.base import build
from softbridge.errors import EngineError
from softbridge.geometry import read_geometry
from softbridge.plugin.prompt_bank import PromptBank
from softbridge.prompt import Positions, SoftPrompt
from softbridge.testing import TINY, random_prefix, tiny_model
from softbridge_native import flex_and_flash as kernels
from softbridge_native import obstacles
from softbridge_native.engine import ENGINE

P, T, NEW, WINDOW = 3, 9, 4, 6
FAR = 0.1
#: Two sums over the same numbers, in float64; and across Gemma's softmax, which is in float32.
CLOSE, FLOAT32 = 1e-12, 1e-5
#: `generate` keeps the logits of its steps in float32.
STEP = 1e-6
KERNELS = ("flex_attention", "flash_attention_2")


#: The corner to which the past is aligned: the last key, or the first, as before version 2.1.
CORNER = {"bottom right": True}


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
) -> Tensor:
    """Of flash_attn, as it is documented, for q [B, Q, heads, D] and k, v [B, N, K, D]."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    key, value = (part.repeat_interleave(q.shape[2] // k.shape[2], 2).transpose(1, 2) for part in (k, v))
    scores = q.transpose(1, 2) @ key.transpose(2, 3) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    left, right = window_size[0], 0 if causal else window_size[1]
    # "If seqlen_q != seqlen_k and causal=True, the causal mask is aligned to the bottom right corner."
    own = torch.arange(q.shape[1])[:, None] + CORNER["bottom right"] * (k.shape[1] - q.shape[1])
    ahead = torch.arange(k.shape[1]) - own
    sees = ((ahead >= -left) | (left < 0)) & ((ahead <= right) | (right < 0))
    # "If a row of the mask is all zero, the output will be zero."
    probabilities = scores.masked_fill(~sees, -torch.inf).softmax(-1).nan_to_num(0.0)
    return (probabilities @ value).transpose(1, 2)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
) -> Tensor:
    """The same for rows of different lengths, one behind the other: q [sum of Q, heads, D]."""
    lengths = [cu.diff().tolist() for cu in (cu_seqlens_q, cu_seqlens_k)]
    assert [max(each) for each in lengths] == [max_seqlen_q, max_seqlen_k]
    rows = zip(q.split(lengths[0]), k.split(lengths[1]), v.split(lengths[1]), strict=True)
    settings = (dropout_p, softmax_scale, causal, window_size, softcap)
    return torch.cat([flash_attn_func(*(part[None] for part in row), *settings)[0] for row in rows])


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Flex attention uncompiled, and what stands in for the package of flash attention."""
    package, padding = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
    vars(package).update(
        flash_attn_func=flash_attn_func,
        flash_attn_varlen_func=flash_attn_varlen_func,
        flash_attn_with_kvcache=None,
    )
    vars(padding).update(pad_input=flash._pad_input, unpad_input=flash._unpad_input)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    monkeypatch.setattr(flash, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(flash, "is_flash_attn_greater_or_equal_2_10", lambda: True, raising=False)
    for name in ("_flash_fn", "_process_flash_kwargs_fn", "_loaded_implementation"):
        monkeypatch.setattr(flash, name, None, raising=False)
    with torch.compiler.set_stance("force_eager"):
        yield


pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{warning}")
    for warning in (
        "flex_attention called without torch.compile:UserWarning",
        # transformers, at every mask for flex attention; and torch, when it first compiles.
        "_compile flag on create_block_mask:DeprecationWarning",
        "`torch.jit.script_method` is deprecated:DeprecationWarning",
        ".* should not be instantiated:DeprecationWarning",
    )
]


def make(family: str, **changes: Any) -> Any:
    """Two layers; of Mistral and Gemma 2 with windows that are smaller than the text."""
    if family in TINY:
        layers = {"num_layers": 2, "num_decoder_layers": 2} if family == "t5" else {"num_hidden_layers": 2}
        model = tiny_model(family, **({"n_layer": 2} if family == "gpt2" else layers), **changes)
    else:
        more = {"sliding_window": WINDOW, "head_dim": 8, "bos_token_id": 1, "pad_token_id": 0, **changes}
        settings = {**TINY["llama"], "num_hidden_layers": 2, **more}
        model = build(AutoConfig.for_model(family, **settings), "causal-lm", torch.float64, 0)
    if hasattr(model, "generate"):
        model.generation_config.eos_token_id = None
    return model


def under(model: Any, implementation: str, prompt: SoftPrompt | None = None) -> Any:
    """A copy with that attention, and the prompt."""
    model = copy.deepcopy(model)
    model.config._attn_implementation = implementation  # past the question whether the package is installed
    return model if prompt is None else ENGINE.attach(model, prompt)


def prefix(model: Any, **positions: Any) -> SoftPrompt:
    return random_prefix(read_geometry(model.config), P, positions=Positions(**positions) if positions else None)


def tokens(rows: int = 3) -> Tensor:
    return torch.randint(3, 90, (rows, T), generator=torch.Generator().manual_seed(3))


def padded(side: str) -> Tensor | None:
    """Rows with pads of different numbers on that side, and one with none."""
    if side == "none":
        return None
    pads, places = torch.tensor([[3], [0], [1]]), torch.arange(T)
    return (places >= pads if side == "left" else places < T - pads).long()


def run(model: Any, mask: Tensor | None, rows: int = 3, **more: Any) -> Tensor:
    """The logits of real tokens."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=tokens(rows), attention_mask=mask, **more).logits
    return logits if mask is None else logits[mask.bool()]


def distance(found: Tensor, expected: Tensor) -> float:
    assert torch.isfinite(found).all()
    return float((found - expected).abs().max() / expected.abs().max())


#: Family, and the attention and the bound with which it is compared. Llama's own softmax is in float32; sdpa's is not.
FAMILIES = [
    ("gpt2", "eager", CLOSE),
    ("llama", "sdpa", CLOSE),
    ("mistral", "sdpa", CLOSE),
    ("gemma2", "eager", FLOAT32),
]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("family", "other", "bound"), FAMILIES)
def test_a_prefix_is_the_same_prefix(family: str, other: str, bound: float, kernel: str) -> None:
    model = make(family)
    prompt = prefix(model)
    here, there = under(model, kernel, prompt), under(model, other, prompt)
    bare = under(model, kernel)
    for side in ("none", "left", "right"):
        expected = run(there, padded(side))
        assert distance(run(here, padded(side)), expected) < bound
        assert distance(run(bare, padded(side)), expected) > FAR
    # Step by step, with a cache; the window slides past the prefix on the way.
    settings = {"max_new_tokens": NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    for side in ("none", "left"):
        mask = torch.ones(3, T, dtype=torch.long) if padded(side) is None else padded(side)
        found, expected = (m.generate(tokens(), attention_mask=mask, **settings) for m in (here, there))
        assert found.sequences.tolist() == expected.sequences.tolist()
        assert distance(torch.stack(found.logits), torch.stack(expected.logits)) < max(bound, STEP)
    ENGINE.detach(here)
    assert torch.equal(run(here, None), run(bare, None))


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_encoder_looks_both_ways(kernel: str) -> None:
    model = make("bert")
    if not model._can_set_attn_implementation():
        pytest.skip("bert does not dispatch here")
    here, there = (under(model, name, prefix(model)) for name in (kernel, "eager"))
    bare = under(model, kernel)
    for side in ("none", "right"):
        with torch.no_grad():
            all_three = [m(input_ids=tokens(), attention_mask=padded(side)).logits for m in (here, there, bare)]
        found, expected, without = all_three
        assert distance(found, expected) < CLOSE
        assert distance(without, expected) > FAR


def test_gradients_are_the_same_or_refused() -> None:
    model = make("llama")
    prompt, mask = prefix(model), padded("left")
    assert mask is not None
    labels = tokens().masked_fill(mask.cumsum(-1) < 2, -100)  # of no pad, and none that a pad predicts

    def gradients(implementation: str) -> Tensor:
        attached = under(model, implementation, prompt)
        attached(input_ids=tokens(), attention_mask=mask, labels=labels).loss.backward()
        return torch.cat([p.grad.flatten() for p in attached.parameters() if p.requires_grad])

    found, expected = gradients("flash_attention_2"), gradients("sdpa")
    assert expected.abs().max() > 1e-3
    assert distance(found, expected) < CLOSE
    with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
        gradients("flex_attention")


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_rows_of_a_bank_have_prefixes_of_their_own(family: str, kernel: str) -> None:
    model = make(family)
    geometry = read_geometry(model.config)
    bank = PromptBank({name: random_prefix(geometry, length, seed=length) for name, length in (("a", T + 2), ("b", 2))})
    here, there = (sb.attach(under(model, name), bank) for name in (kernel, "sdpa"))
    for side in ("none", "left", "right"):
        with bank.rows(["b", None, "a"]):
            found, expected = (run(m, padded(side)) for m in (here, there))
        with bank.rows(["a", None, "b"]):
            other = run(here, padded(side))
        assert distance(found, expected) < CLOSE
        assert distance(other, expected) > FAR


def test_flex_attention_pins_a_prefix_to_its_window() -> None:
    """In a bank, in the rows that ask for it."""
    model = make("mistral")
    slides, pinned = prefix(model), prefix(model, start={"decoder": P}, window="pinned")
    bank = PromptBank({"slides": slides, "pinned": pinned})
    here, there = (sb.attach(under(model, name), bank) for name in ("flex_attention", "sdpa"))
    both, expected = ["pinned", "slides", "pinned"], {}
    for names in (both, ["slides"] * 3, ["pinned"] * 3):
        with bank.rows(names):
            found, expected[tuple(names)] = (run(m, padded("left")) for m in (here, there))
        assert distance(found, expected[tuple(names)]) < CLOSE
    mixed, *others = expected.values()
    assert min(distance(mixed, other) for other in others) > FAR


def test_all_layers_share_one_longer_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def counted(*args: Any, **settings: Any) -> Any:
        made.append(create(*args, **settings))
        return made[-1]

    create = kernels.create_block_mask
    monkeypatch.setattr(kernels, "create_block_mask", counted)
    model = make("gemma2", num_hidden_layers=4)
    attached = under(model, "flex_attention", prefix(model))
    for calls in (1, 2):
        run(attached, padded("left"))
        assert len(made) == 2 * calls  # one with a window, one without
    assert {mask.seq_lengths for mask in made} == {(T, P + T)}


@pytest.mark.skipif(
    os.environ.get("SOFTBRIDGE_PROFILE") != "long", reason="the long profile has a minute to compile it"
)
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="torch compiles flex attention for vector units alone"
)
def test_a_kernel_that_is_compiled() -> None:
    """In float32, forward only: on a CPU torch has no other."""
    model = make("llama").float()
    prompt, mask = prefix(model), padded("left")
    here, bare, there = under(model, "flex_attention", prompt), under(model, "eager"), under(model, "eager", prompt)
    expected = run(there, mask)
    with torch.compiler.set_stance("default"):
        found = run(here, mask)
    assert distance(found, expected) < 1e-5
    assert distance(run(bare, mask), expected) > FAR


def test_a_past_that_is_aligned_to_the_first_key_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama")
    attached, expected = (
        under(model, "flash_attention_2", prefix(model)),
        run(under(model, "sdpa", prefix(model)), None),
    )
    assert distance(run(attached, None), expected) < CLOSE
    monkeypatch.setitem(CORNER, "bottom right", False)
    assert distance(run(attached, None), expected) > FAR


def names(prompt: SoftPrompt, model: Any) -> Sequence[str]:
    return [obstacle.name for obstacle in ENGINE.obstacles(prompt, model)]


def test_flash_attention_refuses_what_it_cannot_know(monkeypatch: pytest.MonkeyPatch) -> None:
    model = under(make("mistral"), "flash_attention_2")
    assert names(prefix(model), model) == []
    assert names(prefix(model, start={"decoder": P}, window="pinned"), model) == ["window"]
    assert names(prefix(model, start={"decoder": 0}), model) == ["window"]
    free = under(make("llama"), "flash_attention_2")  # without a window it does not matter
    assert names(prefix(free, start={"decoder": 0}, window="pinned"), free) == []
    bart = under(make_bart(), "flash_attention_2")
    crossed = random_prefix(read_geometry(bart.config), P, sites=("cross",))
    assert names(crossed, bart) == ["attention"]
    monkeypatch.setattr(obstacles, "flash_attn_supports_top_left_mask", lambda: True)
    assert names(prefix(free), free) == ["attention"]


def test_models_that_know_flash_attention_by_name_are_refused() -> None:
    """OPT in transformers 4 makes scores of a mask for any other name. Where it asks the interface, it runs."""
    model = build(AutoConfig.for_model("opt", **OPT), "causal-lm", torch.float64, 0)
    there, here = under(model, "sdpa", prefix(model)), under(model, "flash_attention_2")
    if "attention" in names(prefix(model), here):
        with pytest.raises(EngineError, match="under that very name only"):
            ENGINE.attach(here, prefix(model))
        assert here.config._attn_implementation == "flash_attention_2"
        return
    assert distance(run(ENGINE.attach(here, prefix(model)), padded("left")), run(there, padded("left"))) < CLOSE


OPT = {
    "vocab_size": 96,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "ffn_dim": 16,
    "word_embed_proj_dim": 16,
    "max_position_embeddings": 64,
}


def make_bart() -> Any:
    sizes = {f"{stack}_{name}": 2 for stack in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    config = AutoConfig.for_model("bart", vocab_size=96, d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, **sizes)
    return build(config, "seq2seq-lm", torch.float64, 0)


def test_flash_attention_refuses_rows_of_several_sequences() -> None:
    model = make("llama")
    attached = under(model, "flash_attention_2", prefix(model))
    twice = torch.cat([torch.arange(4), torch.arange(T - 4)])[None]
    with pytest.raises(EngineError, match="packed into one row"):
        run(attached, None, 1, position_ids=twice)
    bounds = {f"cu_seq_lens_{x}": torch.tensor([0, 4, T], dtype=torch.int32) for x in "qk"}
    with pytest.raises(EngineError, match="packed into one row"):
        run(attached, None, 1, **bounds, max_length_q=5, max_length_k=5)
    # One row of one sequence is none of them, wherever it starts.
    assert distance(run(attached, None, 1), run(under(model, "sdpa", prefix(model)), None, 1)) < CLOSE


def test_what_is_no_mask_of_these_queries_is_refused() -> None:
    model = make("llama")
    dense = torch.zeros(3, 1, T, T, dtype=torch.float64)
    with pytest.raises(EngineError, match="mask of 4 dimensions"):
        under(model, "flash_attention_2", prefix(model))(input_ids=tokens(), attention_mask=dense)
    attached = under(model, "flex_attention", prefix(model))
    block = kernels.create_block_mask(lambda b, h, q, k: q >= k, 3, None, T, T, "cpu")
    with pytest.raises(EngineError, match="a mask for 9 queries, and this layer has 4"):
        attached(input_ids=tokens()[:, :4], attention_mask=block)


def test_flex_attention_takes_a_mask_of_scores() -> None:
    """As models make it that ask for flex attention by its own name."""
    model = make("llama")
    here, there = under(model, "flex_attention", prefix(model)), under(model, "sdpa", prefix(model))
    past = torch.ones(T, T, dtype=torch.bool).tril()[None, None]
    forward = torch.no_grad()(lambda m, mask: m(input_ids=tokens(), attention_mask=mask).logits)
    for mask in (past, past.expand(3, -1, -1, -1), torch.zeros(1, 1, T, T).masked_fill(~past, -1e9).double()):
        found, expected = (forward(m, mask) for m in (here, there))
        assert distance(found, expected) < CLOSE
    assert distance(forward(under(model, "sdpa"), past), expected) > FAR


def test_flex_attention_refuses_a_relative_bias() -> None:
    model = make("t5")
    if not model._can_set_attn_implementation():
        pytest.skip("t5 does not dispatch here")
    assert "relative-bias" in names(prefix(model), under(model, "flex_attention"))
