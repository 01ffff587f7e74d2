"""Tools on prompts: pure functions, each tested for what it claims, on tiny models and on real prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import softbridge as sb
from softbridge import initialisation, tools
from softbridge.arrays import BFLOAT16
from softbridge.base import BaseModel, build
from softbridge.base import cache as caches
from softbridge.errors import BaseModelError, EngineError, LoweringError
from softbridge.prompt import BaseId, InputPrompt, KeyValue, KeyValuePrefix, Origin, Positions, SoftPrompt, Training
from softbridge.testing import agreement, apart, random_input_prompt, random_prefix, tiny_config, tiny_model
from softbridge.tools import nearest
from softbridge.untrusted import Files

A, B, C = (5, 11, 3, 40), (7, 22, 6), (9, 33, 12, 8, 50)
REST = torch.tensor([[61, 4, 80, 3], [17, 29, 44, 6]])
CAUSAL = ("gpt2", "llama", "qwen3", "gpt_neox")
FAR = 0.1

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "prompt_transferability"
TASKS = ("IMDB", "SST2", "laptop", "restaurant", "MNLI", "snli", "QNLI", "MRPC", "QQP")
FAMILIES = ({"IMDB", "SST2", "laptop", "restaurant"}, {"MNLI", "snli", "QNLI"}, {"MRPC", "QQP"})


def base_of(family: str, **changes: Any) -> BaseModel:
    return BaseModel(tiny_config(family, **changes))


def input_prompt(vectors: Any, **changes: Any) -> SoftPrompt:
    part = InputPrompt(np.asarray(vectors), "decoder", **changes)
    return SoftPrompt((part,), Positions({"decoder": part.length}))


def prefix_of(length: int, seed: int = 0, family: str = "llama") -> SoftPrompt:
    return random_prefix(base_of(family).geometry, length, seed=seed)


def difference(a: SoftPrompt, b: SoftPrompt) -> float:
    pairs = zip(a.arrays(), b.arrays(), strict=True)
    return max(float(np.abs(x - y).max()) for (_, x), (_, y) in pairs)


def logits(model: Any, prompt: SoftPrompt, ids: torch.Tensor = REST) -> torch.Tensor:
    sb.attach(model, prompt)
    try:
        with torch.no_grad():
            return model(input_ids=ids).logits
    finally:
        sb.detach(model)


# Nearest words


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "t5"])
def test_the_nearest_words_of_a_text_are_that_text(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family)
    found = tools.nearest_words(initialisation.text(model, C), model, 3)
    assert tuple(found.ids[:, 0]) == C
    np.testing.assert_allclose(found.similarities[:, 0], 1, atol=1e-14)
    assert (np.diff(found.similarities, axis=1) < 0).all()
    assert found.words is None
    monkeypatch.setattr(nearest, "_CHUNK", 7)
    pieces = tools.nearest_words(initialisation.text(model, C), model, 3)
    assert np.array_equal(pieces.ids, found.ids)
    np.testing.assert_allclose(pieces.similarities, found.similarities, atol=1e-14)


def test_nearest_words_are_by_direction_with_ties_by_id_and_words_by_a_tokenizer() -> None:
    class Tokenizer:
        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return [f"w{token}" for token in ids]

    table = np.array([[0, 0], [1, 0], [0, 9], [-1, 0], [5, 0]], np.float32)
    found = tools.nearest_words(input_prompt([[0.1, 0.0], [3, 4]]), table, 3, tokenizer=Tokenizer())
    assert found.ids.tolist() == [[1, 4, 0], [2, 1, 4]]
    np.testing.assert_allclose(found.similarities, [[1, 1, 0], [0.8, 0.6, 0.6]], atol=1e-7)
    assert found.words == (("w1", "w4", "w0"), ("w2", "w1", "w4"))


def test_what_has_no_neighbours_among_words_is_refused() -> None:
    table = np.ones((4, 2))
    two = SoftPrompt(
        (InputPrompt(np.ones((1, 2)), "encoder"), InputPrompt(np.ones((1, 2)), "decoder")),
        Positions({"encoder": 1, "decoder": 1}),
    )
    assert tools.nearest_words(two, table, stack="encoder").ids.tolist() == [[0]]
    for prompt in (prefix_of(3), input_prompt(np.ones((1, 2)), entry="after"), two):
        with pytest.raises(ValueError, match="one input prompt whose vectors enter before"):
            tools.nearest_words(prompt, table)
    with pytest.raises(ValueError, match=r"k = 5\n  expected: 1 to 4"):
        tools.nearest_words(input_prompt(np.ones((1, 2))), table, 5)
    with pytest.raises(ValueError, match=r"shape \(4, 2\)\n  expected: \[V, 3\]"):
        tools.nearest_words(input_prompt(np.ones((1, 3))), table)
    with pytest.raises(BaseModelError, match="which no configuration has"):
        tools.nearest_words(input_prompt(np.ones((1, 3))), tiny_config("gpt2"))


# Similarity


def test_similarities_are_what_they_say() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(4, 6)), generator.normal(size=(3, 6))

    def cosine(x: np.ndarray, y: np.ndarray) -> float:
        return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))

    one, two = input_prompt(a), input_prompt(b)
    assert tools.similarity(one, two) == pytest.approx(cosine(a.mean(0), b.mean(0)), abs=1e-14)
    pairwise = np.mean([cosine(x, y) for x in a for y in b])
    assert tools.similarity(one, two, "pairwise") == pytest.approx(pairwise, abs=1e-14)
    assert tools.similarity(one, one) == pytest.approx(1, abs=1e-14)
    assert tools.similarity(one, one, "pairwise") < 0.9
    assert tools.similarity(input_prompt(np.zeros((2, 6))), one) == 0


def test_a_prefix_is_compared_by_all_that_its_tokens_bring() -> None:
    ragged = {0: (2, 3), 4: (1, 5)}
    generator = np.random.default_rng(1)

    def prefix() -> SoftPrompt:
        layers = {n: KeyValue(*generator.normal(size=(2, heads, 7, dim))) for n, (heads, dim) in ragged.items()}
        return SoftPrompt((KeyValuePrefix("self", layers),), Positions({"decoder": 7}))

    one, two = prefix(), prefix()

    def flat(prompt: SoftPrompt) -> np.ndarray:
        layers = prompt.prefixes[0].layers
        halves = [half for pair in (layers[0], layers[4]) for half in (pair.keys, pair.values)]
        return np.stack([np.concatenate([half[:, token].ravel() for half in halves]) for token in range(7)])

    assert flat(one).shape == (7, 2 * 2 * 3 + 2 * 1 * 5)
    for measure in ("average", "pairwise"):
        expected = tools.similarity(input_prompt(flat(one)), input_prompt(flat(two)), measure)
        assert tools.similarity(one, two, measure) == pytest.approx(expected, abs=1e-14)
    shifted = replace(two, positions=Positions({"decoder": 0}))
    with pytest.raises(ValueError, match="other frames"):
        tools.similarity(one, shifted)
    with pytest.raises(ValueError, match="measure 'euclid'"):
        tools.similarity(one, two, "euclid")  # type: ignore[arg-type]


@pytest.mark.skipif(not REAL.is_dir(), reason="the real prompts are not beside this checkout")
@pytest.mark.parametrize("base", ["T5", "Roberta"])
def test_real_prompts_of_related_tasks_are_nearer(base: str) -> None:
    """Nine tasks: sentiment (two aspects of it from reviews of products), inference, paraphrase.

    In T5 every task's nearest prompt is of its own family. In RoBERTa only on the average: SST-2's nearest is QQP.
    """
    prompts = [
        SoftPrompt(
            (InputPrompt(Files(REAL / f"{task}Prompt{base}").tensors("task_prompt")[""], "encoder"),),
            Positions({"encoder": 100}),
        )
        for task in TASKS
    ]
    assert len(prompts) == 9
    related = {(a, b) for family in FAMILIES for a in family for b in family if a != b}
    for measure in ("average", "pairwise"):
        matrix = tools.similarity_matrix(prompts, measure)
        assert np.array_equal(matrix, matrix.T)
        assert (np.abs(matrix) <= 1 + 1e-12).all()
        if measure == "average":
            np.testing.assert_allclose(np.diag(matrix), 1, atol=1e-12)
        pairs = {(TASKS[i], TASKS[j]): matrix[i, j] for i, j in combinations(range(9), 2)}
        near = np.mean([value for pair, value in pairs.items() if pair in related])
        far = np.mean([value for pair, value in pairs.items() if pair not in related])
        print(f"{base} {measure}: related {near:.3f}, unrelated {far:.3f}")
        print("\n".join(f"{t:>10} " + " ".join(f"{x:5.2f}" for x in row) for t, row in zip(TASKS, matrix, strict=True)))
        assert near > 1.2 * far
        others = np.where(np.eye(9, dtype=bool), -1, matrix)
        nearest = {task: TASKS[others[i].argmax()] for i, task in enumerate(TASKS)}
        own = [pair for pair in nearest.items() if pair in related]
        print(f"{len(own)} of 9 have their nearest in their own family: {nearest}")
        if base == "T5":
            assert len(own) == 9
            assert near > 2 * far
        elif measure == "average":
            assert {("IMDB", "SST2"), ("laptop", "restaurant"), ("restaurant", "laptop"), ("MNLI", "snli")} <= {*own}
            assert ("MRPC", "QQP") not in own


# Mixing


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, BFLOAT16])
def test_interpolation_ends_at_the_inputs_and_an_average_of_one_prompt_is_itself(dtype: Any) -> None:
    generator = np.random.default_rng(0)
    a, b = (
        input_prompt((generator.normal(size=(5, 8)) * 10.0 ** generator.integers(-3, 3)).astype(dtype)) for _ in "ab"
    )
    zeros = input_prompt(np.full((5, 8), -0.0).astype(dtype))
    assert tools.interpolate([a, b], [1, 0]) == a
    assert tools.interpolate([a, b], [0, 1]) == b
    assert tools.interpolate([a, zeros], [0, 1]) == zeros
    for count in range(1, 12):
        assert tools.average([a] * count) == a
        assert tools.average([zeros] * count) == zeros
    mixed = tools.interpolate([a, b], [0.25, 0.75]).inputs[0].vectors
    x, y = (prompt.inputs[0].vectors.astype(np.float64) for prompt in (a, b))
    assert mixed.dtype == dtype
    assert np.array_equal(mixed, (0.25 * x + 0.75 * y).astype(dtype))
    beyond = tools.interpolate([a, b], [-1, 2]).inputs[0].vectors
    assert np.array_equal(beyond, (2 * y - x).astype(dtype))


def test_the_mean_of_prefixes_keeps_positions_base_and_a_shared_head() -> None:
    head = {"score.weight": np.ones((2, 3), np.float32)}
    one, two = (
        replace(prefix_of(5, seed), head=head, training=Training("mlp", {}, {}), origin=Origin("x")) for seed in (0, 1)
    )
    before = [array.copy() for _, array in one.arrays()]
    mean = tools.average([one, two])
    assert mean.positions == one.positions
    assert mean.base == one.base
    assert np.array_equal(mean.head["score.weight"], head["score.weight"])
    assert (mean.training, mean.origin) == (None, None)
    for layer, pair in mean.prefixes[0].layers.items():
        halves = one.prefixes[0].layers[layer].values, two.prefixes[0].layers[layer].values
        np.testing.assert_allclose(pair.values, sum(halves) / 2, atol=1e-7)
    assert all(np.array_equal(x, y) for x, (_, y) in zip(before, one.arrays(), strict=True))


ONE = prefix_of(5)
UNLIKE: dict[str, tuple[Callable[[], SoftPrompt], type[Exception], str]] = {
    "length": (lambda: prefix_of(6), ValueError, "2x5x8 float32 and 2x6x8 float32"),
    "kind": (lambda: random_input_prompt(base_of("llama").geometry), ValueError, "decoder input vectors"),
    "layers": (lambda: tools.slice(ONE, layers=[0, 2]), ValueError, "layers.1.keys: 2x5x8 float32 and none"),
    "site": (
        lambda: SoftPrompt((KeyValuePrefix("encoder", ONE.prefixes[0].layers),), Positions({"encoder": 5}), ONE.base),
        ValueError,
        "a prefix ('self'); a prefix ('encoder')",
    ),
    "dtype": (
        lambda: replace(
            ONE,
            parts=(
                KeyValuePrefix(
                    "self",
                    {
                        n: KeyValue(p.keys.astype(np.float64), p.values.astype(np.float64))
                        for n, p in ONE.prefixes[0].layers.items()
                    },
                ),
            ),
        ),
        ValueError,
        "float32 and 2x5x8 float64",
    ),
    "positions": (lambda: replace(ONE, positions=Positions({"decoder": 0})), ValueError, "differ in positions"),
    "window": (lambda: replace(ONE, positions=Positions({"decoder": 5}, window="pinned")), ValueError, "positions"),
    "head": (lambda: replace(ONE, head={"w": np.ones(2)}), ValueError, "different heads"),
    "base": (lambda: replace(ONE, base=BaseId(None, base_of("qwen3").geometry)), BaseModelError, "different base"),
}


@pytest.mark.parametrize("case", UNLIKE)
def test_unlike_prompts_are_not_mixed(case: str) -> None:
    make, error, words = UNLIKE[case]
    with pytest.raises(error) as refused:
        tools.interpolate([ONE, make()], [0.5, 0.5])
    assert words in str(refused.value)
    assert "expected:" in str(refused.value)
    assert "to do:" in str(refused.value)


@pytest.mark.parametrize("weights", [[0.5, 0.6], [1.0], [float("nan"), 1.0], [0.0, 0.0]])
def test_weights_must_add_up(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="adding up to 1"):
        tools.interpolate([ONE, ONE], weights)


def test_nothing_is_not_averaged() -> None:
    with pytest.raises(ValueError, match="no prompts"):
        tools.average([])


# Joining and cutting


@pytest.mark.parametrize("family", CAUSAL)
def test_the_caches_of_two_texts_that_follow_each_other_join_to_the_cache_of_both(family: str) -> None:
    """B was read after A, so its keys are in the frame of both, and nothing is to be rotated."""
    model = tiny_model(family)
    whole = initialisation.text_cache(model, A + B)
    first = initialisation.text_cache(model, A)
    second = tools.slice(whole, len(A), base=model)
    assert second.positions.start["decoder"] == len(A + B)
    assert second.prefixes[0].length == len(B)
    joined = tools.concatenate([first, second])
    assert joined.positions == whole.positions
    scale = max(float(np.abs(array).max()) for _, array in whole.arrays())
    assert difference(joined, whole) <= agreement(model) * scale
    assert tools.concatenate([tools.slice(whole, 0, len(A)), second]) == whole, "slices join to what they are cut from"
    three = [(0, 2), (2, 5), (5, 7)]
    assert tools.concatenate([tools.slice(whole, *ends, base=model) for ends in three]) == whole
    expected = logits(model, whole)
    assert apart(logits(model, joined), expected) <= agreement(model)
    alone = initialisation.text_cache(model, B)
    wrong = [
        tools.concatenate([first, alone], model),
        tools.concatenate([alone, first], model),
        replace(joined, positions=Positions({"decoder": len(B)})),
    ]
    for other in wrong:
        assert (logits(model, other) - expected).abs().max() > FAR


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_prompts_trained_apart_are_turned_to_stand_behind_each_other(family: str) -> None:
    """The oracle: text B, which sees nothing of A, at the positions behind A."""
    from transformers import DynamicCache

    model = tiny_model(family)
    first, second = initialisation.text_cache(model, A), initialisation.text_cache(model, B)
    joined = tools.concatenate([first, second], model)
    assert joined.positions.start["decoder"] == len(A + B)
    cache = DynamicCache()
    places = torch.arange(len(A), len(A + B))[None]
    with torch.no_grad():
        model(torch.tensor([B]), position_ids=places, **caches.handed(model.forward, cache))
    plain = 0.0
    for layer, pair in joined.prefixes[0].layers.items():
        assert np.array_equal(pair.keys[:, : len(A)], first.prefixes[0].layers[layer].keys)
        np.testing.assert_allclose(pair.keys[:, len(A) :], cache.layers[layer].keys[0].numpy(), atol=1e-5)
        np.testing.assert_allclose(pair.values[:, len(A) :], cache.layers[layer].values[0].numpy(), atol=1e-5)
        unrotated = second.prefixes[0].layers[layer].keys
        plain = max(plain, float(np.abs(unrotated - cache.layers[layer].keys[0].numpy()).max()))
    assert plain > FAR
    # And the model computes with it what it computes with both caches, one behind the other.
    seeded = DynamicCache()
    for layer, pair in first.prefixes[0].layers.items():
        both = [
            torch.cat([torch.from_numpy(np.array(half))[None], mine[0][None]], dim=2).expand(2, -1, -1, -1)
            for half, mine in ((pair.keys, cache.layers[layer].keys), (pair.values, cache.layers[layer].values))
        ]
        seeded.update(both[0], both[1], layer)
    with torch.no_grad():
        expected = model(
            REST, **caches.handed(model.forward, seeded), attention_mask=torch.ones(2, len(A + B) + 4)
        ).logits
    near = (logits(model, joined) - expected).abs().max() / expected.abs().max()
    print(f"{family}: {near:.1e}; unrotated keys differ by {plain:.1e}")
    assert near <= 1e-5
    with pytest.raises(BaseModelError, match="give base="):
        tools.concatenate([first, second])


def test_absolute_positions_stay_in_the_numbers_and_the_base_is_asked_all_the_same() -> None:
    one, two = prefix_of(4, 0, "gpt2"), prefix_of(3, 1, "gpt2")
    with pytest.raises(BaseModelError, match="give base="):
        tools.concatenate([one, two])
    joined = tools.concatenate([one, two], base_of("gpt2"))
    assert joined.positions.start["decoder"] == 7
    for layer, pair in joined.prefixes[0].layers.items():
        parts = [prompt.prefixes[0].layers[layer].keys for prompt in (one, two)]
        assert np.array_equal(pair.keys, np.concatenate(parts, axis=1))


def test_uncounted_prompts_are_joined_as_they_stand() -> None:
    one, two = (replace(prefix_of(length, length), positions=Positions({"decoder": 0})) for length in (4, 3))
    joined = tools.concatenate([one, two])
    assert joined.positions == one.positions
    assert joined.prefixes[0].length == 7
    with pytest.raises(ValueError, match=r"all counted .* or all uncounted"):
        tools.concatenate([one, prefix_of(3)], base_of("llama"))


def test_a_joined_prompt_has_the_widest_dtype_and_turned_keys_at_least_float32() -> None:
    half, wide = (input_prompt(np.ones((2, 3), dtype)) for dtype in (BFLOAT16, np.float64))
    assert tools.concatenate([half, half]).inputs[0].vectors.dtype == BFLOAT16
    assert tools.concatenate([half, wide]).inputs[0].vectors.dtype == np.float64
    cache = initialisation.text_cache(tiny_model("llama", torch.bfloat16), A)
    pair = tools.concatenate([cache, cache], base_of("llama")).prefixes[0].layers[1]
    before = cache.prefixes[0].layers[1]
    assert np.array_equal(pair.keys[:, : len(A)], before.keys)
    assert np.array_equal(pair.values[:, len(A) :], before.values)
    assert pair.keys.dtype == np.float32


def test_a_relative_bias_counts_by_itself() -> None:
    """T5's encoder: virtual tokens are told apart by position alone, so joining slices must give the whole back."""
    geometry = base_of("t5").geometry
    one, two = (random_prefix(geometry, n, sites=("encoder", "self", "cross"), seed=n) for n in (4, 3))
    joined = tools.concatenate([one, two], base_of("t5"))
    assert dict(joined.positions.start) == {"decoder": 7, "encoder": 7}
    front = tools.slice(joined, 0, 4)
    assert dict(front.positions.start) == {"decoder": 7, "encoder": 7}
    back = tools.slice(joined, 4, base=base_of("t5"))
    assert dict(back.positions.start) == {"decoder": 3, "encoder": 3}
    assert back == two
    assert tools.concatenate([front, back], base_of("t5")) == joined
    with pytest.raises(BaseModelError, match="give base="):
        tools.slice(joined, 4)
    skewed = replace(one, positions=Positions({"decoder": 0, "encoder": 0}, "skewed"))
    with pytest.raises(ValueError, match="skewed"):
        tools.concatenate([skewed, skewed], base_of("t5"))


def test_a_relative_bias_that_is_lost_stays_so_where_its_prefix_stays() -> None:
    one, two = (random_prefix(base_of("t5").geometry, 3, sites=("encoder", "self"), seed=n) for n in (4, 3))
    lost = replace(one, positions=replace(one.positions, unbiased_from={"encoder": 1}))
    assert dict(tools.slice(lost, 0, 2).positions.unbiased_from) == {"encoder": 1}
    with pytest.raises(ValueError, match="differ in positions"):
        tools.concatenate([lost, two], base_of("t5"))
    with pytest.raises(ValueError, match="differ in positions"):
        tools.average([lost, two])


def mistral(window: int) -> Any:
    from transformers import AutoConfig

    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": window}
    return build(AutoConfig.for_model("mistral", **sizes, **heads), "causal-lm", torch.float64, 0)


def masked(model: Any, cut: int) -> torch.Tensor:
    """The outputs at the rest with the first `cut` tokens of the cache hidden: the slice, without softbridge."""
    from transformers import DynamicCache

    cache = DynamicCache()
    with torch.no_grad():
        model(torch.tensor([A + B] * 2), **caches.handed(model.forward, cache))
        mask = torch.ones(2, len(A + B) + REST.shape[1])
        mask[:, :cut] = 0
        places = torch.arange(len(A + B), mask.shape[1])[None].expand(2, -1)
        logits: torch.Tensor = model(
            REST, **caches.handed(model.forward, cache), attention_mask=mask, position_ids=places
        ).logits
    return logits


@pytest.mark.parametrize("family", [*CAUSAL, "mistral"])
def test_a_slice_is_the_prompt_with_the_others_hidden(family: str) -> None:
    model = mistral(5) if family == "mistral" else tiny_model(family)
    whole = initialisation.text_cache(model, A + B)
    cut = tools.slice(whole, 3, base=model)
    expected = masked(model, 3)
    other = tools.slice(whole, 2, base=model)
    if family == "mistral":  # unrotated, the window would count the virtual tokens from the wrong end
        pairs = {n: KeyValue(p.keys[:, 3:], p.values[:, 3:]) for n, p in whole.prefixes[0].layers.items()}
        other = replace(whole, parts=(KeyValuePrefix("self", pairs),))
    near = (logits(model, cut) - expected).abs().max() / expected.abs().max()
    print(f"{family}: {near:.1e}")
    assert near <= agreement(model)
    assert cut.positions.start["decoder"] == (4 if family == "mistral" else 7), "rotated only where a window slides"
    assert (logits(model, other) - expected).abs().max() > FAR
    rejoined = tools.concatenate([tools.slice(whole, 0, 3), cut], model)
    assert rejoined.positions == whole.positions
    assert difference(rejoined, whole) <= 1e-6


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "t5"])
def test_input_prompts_are_joined_and_cut_like_texts(family: str) -> None:
    model = tiny_model(family)
    first, second, both = (initialisation.text(model, ids) for ids in (A, B, A + B))
    assert tools.concatenate([first, second]) == both
    assert tools.concatenate([first, second, first]) == initialisation.text(model, A + B + A)
    assert tools.slice(both, len(A)) == second
    assert tools.slice(both, 0, len(A)) == first
    uncounted = [replace(prompt, positions=Positions(dict.fromkeys(prompt.counted(), 0))) for prompt in (first, both)]
    assert tools.slice(uncounted[1], 0, len(A)) == uncounted[0]


def test_layers_are_cut() -> None:
    some = tools.slice(ONE, layers={2, 0})
    assert tuple(some.prefixes[0].layers) == (0, 2)
    assert some.prefixes[0].layers[2] == ONE.prefixes[0].layers[2]
    assert some.positions == ONE.positions
    assert tools.slice(ONE) == ONE
    t5 = random_prefix(base_of("t5").geometry, sites=("encoder", "self"))
    deep = replace(t5, parts=(t5.parts[0], KeyValuePrefix("self", {0: t5.prefixes[1].layers[0]})))
    assert dict(tools.slice(deep, layers=[2]).positions.start) == {"encoder": 5}, "no stack without virtual tokens"


MIXED = SoftPrompt(
    (InputPrompt(np.ones((5, 32), np.float32), "decoder"), *ONE.parts), Positions({"decoder": 10}), ONE.base
)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: tools.slice(ONE, 2, 2), "virtual tokens 2 to 2 of 5"),
        (lambda: tools.slice(ONE, 0, 6), "virtual tokens 0 to 6 of 5"),
        (lambda: tools.slice(ONE, -1), "virtual tokens -1 to 5 of 5"),
        (lambda: tools.slice(ONE, layers=[1, 3]), r"layers \[1, 3\]\n  expected: some of \[0, 1, 2\]"),
        (lambda: tools.slice(ONE, layers=[]), r"layers \[\]"),
        (lambda: tools.slice(input_prompt(np.ones((2, 2))), layers=[0]), "this has no prefix"),
        (lambda: tools.slice(MIXED, 0, 2), "both in the decoder"),
        (lambda: tools.concatenate([MIXED, MIXED], base_of("llama")), "both in the decoder"),
        (lambda: tools.concatenate([ONE, tools.slice(ONE, layers=[0])]), "same parts, layers and widths"),
        (lambda: tools.concatenate([ONE, UNLIKE["head"][0]()], base_of("llama")), "different heads"),
        (lambda: tools.concatenate([ONE, UNLIKE["window"][0]()], base_of("llama")), "positions"),
        (lambda: tools.concatenate([]), "no prompts"),
    ],
)
def test_what_cannot_be_joined_or_cut_is_refused(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_frequencies_that_change_with_the_length_are_a_condition() -> None:
    base = base_of("llama", rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    prompts = [random_prefix(base.geometry, 4, seed=seed) for seed in (0, 1)]
    with pytest.raises(LoweringError, match="--accept length"):
        tools.concatenate(prompts, base)
    assert tools.concatenate(prompts, base, accept=["length"]).prefixes[0].length == 8
    with pytest.raises(BaseModelError, match="does not fit"):
        tools.concatenate(prompts, base_of("qwen3"))


# Ensembling


def test_votes() -> None:
    x = [[0, 0.1, 0], [0, 0.3, 0], [9, 0, 0]]
    assert tools.vote(x) == 1
    assert tools.vote(x, "mean") == 0, "the sure one outweighs the two"
    tied = [[0, 0, 2.0], [0, 5.0, 0]]
    assert tools.vote(tied) == 1, "the larger mean probability decides"
    outsider = [[4, 0, 3.9, 0], [0, 4, 3.9, 0]]
    assert tools.vote(outsider) == 0, "a class without votes does not win a tie"
    assert tools.vote(outsider, "mean") == 2
    batch = np.random.default_rng(0).normal(size=(5, 2, 3, 4))
    for how in ("majority", "mean"):
        classes = tools.vote(batch, how)
        assert classes.shape == (2, 3)
        assert tools.vote(batch[:, 1, 2], how) == classes[1, 2]
        assert np.array_equal(tools.vote(batch + np.arange(5)[:, None, None, None], how), classes)
        assert np.array_equal(tools.vote(batch[:1], how), batch[0].argmax(-1))
    for bad, how in ((np.ones(3), "mean"), (np.ones((0, 3)), "mean"), (batch, "median")):
        with pytest.raises(ValueError, match=r"\[N, ..., C\]"):
            tools.vote(bad, how)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_an_ensemble_is_each_prompt_by_itself_and_leaves_the_model_as_it_was(family: str) -> None:
    model = tiny_model(family)
    geometry = BaseModel.resolve(model).geometry
    prompts: Sequence[SoftPrompt] = [random_input_prompt(geometry, length, seed=length) for length in (3, 5, 8)]
    if family == "bert":
        head = {"classifier.weight": np.random.default_rng(0).normal(size=(5, 32))}
        prompts = [*prompts[:2], replace(prompts[2], head=head)]
    else:
        prompts = [*prompts, random_prefix(geometry)]
    batch = {"input_ids": REST, "attention_mask": torch.ones_like(REST)}
    expected = np.stack([logits(model, prompt).numpy() for prompt in prompts])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    found = tools.ensemble(model, prompts, batch)
    assert np.array_equal(found, expected)
    assert np.abs(np.diff(expected, axis=0)).max() > FAR
    assert all(module.training for module in model.modules())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert tools.vote(found).shape == found.shape[1:-1]


def test_an_ensemble_needs_prompts_and_a_bare_model() -> None:
    model = tiny_model("gpt2")
    prompt = random_input_prompt(BaseModel.resolve(model).geometry)
    with pytest.raises(ValueError, match="no prompts"):
        tools.ensemble(model, [], {"input_ids": REST})
    with pytest.raises(BaseModelError, match="does not fit"):
        tools.ensemble(model, [prompt, prefix_of(3)], {"input_ids": REST})
    sb.attach(model, prompt)
    with pytest.raises(EngineError, match="detach"):
        tools.ensemble(model, [prompt], {"input_ids": REST})
    sb.detach(model)
