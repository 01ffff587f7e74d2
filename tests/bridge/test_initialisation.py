"""Every initialisation, for what it claims: which numbers, and what the model computes with them before training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import softbridge as sb
from softbridge import initialisation
from softbridge.base import BaseModel, build
from softbridge.errors import BaseModelError, EngineError
from softbridge.lowering.expressible import check_fits
from softbridge.prompt import Origin, Positions, SoftPrompt, Training
from softbridge.testing import agreement, random_input_prompt, random_prefix, tiny_config, tiny_model

TEXT = (5, 11, 3, 40, 7, 22)
OTHER = (6, 11, 9, 2, 70, 31)
REST = torch.tensor([[9, 33, 12, 8, 50, 61, 4], [80, 3, 3, 17, 29, 44, 6]])
FAR = 0.1


class Tokenizer:
    """Letters are tokens."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(letter) - ord("a") for letter in text]}


def model_of(family: str) -> Any:
    """The family's tiny model, with an output for every token."""
    if family == "bert":
        from transformers import AutoModelForTokenClassification

        config = tiny_config("bert")
        model = AutoModelForTokenClassification.from_config(config, attn_implementation="eager")
        model.load_state_dict(build(config, "sequence-classification", torch.float32, 0).state_dict(), strict=False)
        torch.nn.init.normal_(model.classifier.weight, generator=torch.Generator().manual_seed(1))
        return model.double().eval()
    if family == "gemma":
        from transformers import AutoConfig

        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
        more = {"vocab_size": 96, "num_key_value_heads": 1, "head_dim": 12, "max_position_embeddings": 128}
        return build(AutoConfig.for_model("gemma", **sizes, **more), "causal-lm", torch.float64, 0)
    return tiny_model(family)


def run(model: Any, ids: torch.Tensor) -> torch.Tensor:
    answers = {"decoder_input_ids": REST[:, :3]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), **answers).logits
    return logits


def literal(model: Any, front: Sequence[int]) -> torch.Tensor:
    """The outputs at the rest, of the text and the rest in one sequence."""
    logits = run(model, torch.cat([torch.tensor([list(front)] * len(REST)), REST], 1))
    return logits if model.config.is_encoder_decoder else logits[:, len(front) :]


def attached(model: Any, prompt: SoftPrompt) -> torch.Tensor:
    sb.attach(model, prompt)
    try:
        return run(model, REST)
    finally:
        sb.detach(model)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


# What the model computes


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma", "bert", "t5"])
def test_the_vectors_of_a_text_are_that_text_put_in_front(family: str) -> None:
    model = model_of(family)
    expected = literal(model, TEXT)
    prompt = initialisation.text(model, TEXT)
    assert prompt.positions.start == prompt.counted()
    assert distance(attached(model, prompt), expected) <= agreement(model)
    for wrong in (OTHER, TEXT[1:], (*TEXT[1:], TEXT[0])):
        assert distance(attached(model, initialisation.text(model, wrong)), expected) > FAR


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "gpt_neox", "gemma"])
def test_the_cache_of_a_text_is_that_text_put_in_front(family: str) -> None:
    model = model_of(family)
    expected = literal(model, TEXT)
    prompt = initialisation.text_cache(model, TEXT)
    assert prompt.positions == Positions({"decoder": len(TEXT)})
    near = distance(attached(model, prompt), expected)
    print(f"{family}: {near:.1e}")
    assert near <= agreement(model)
    for wrong in (OTHER, TEXT[1:], (*TEXT[1:], TEXT[0])):
        assert distance(attached(model, initialisation.text_cache(model, wrong)), expected) > FAR
    shifted = replace(prompt, positions=Positions({"decoder": 0}))
    assert distance(attached(model, shifted), expected) > FAR


def test_the_cache_of_a_text_longer_than_a_sliding_window_is_whole() -> None:
    from transformers import AutoConfig

    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 4}
    model = build(AutoConfig.for_model("mistral", **sizes, **heads), "causal-lm", torch.float64, 0)
    prompt = initialisation.text_cache(model, TEXT)
    assert prompt.parts[0].length == len(TEXT) > 4
    expected = literal(model, TEXT)
    assert distance(attached(model, prompt), expected) <= agreement(model)
    pinned = replace(prompt, positions=replace(prompt.positions, window="pinned"))
    assert distance(attached(model, pinned), expected) > FAR


def test_a_text_is_cut_off_or_repeated_to_the_length() -> None:
    model = model_of("gpt2")
    for function in (initialisation.text, initialisation.text_cache):
        assert function(model, TEXT, 4) == function(model, TEXT[:4])
        assert function(model, TEXT, 15) == function(model, (*TEXT, *TEXT, *TEXT[:3]))
        assert function(model, "bcd", tokenizer=Tokenizer()) == function(model, [1, 2, 3])


def test_a_model_in_training_gives_what_it_gives_in_inference_and_stays_in_training() -> None:
    model = tiny_model("gpt2", resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)
    expected = initialisation.text_cache(model, TEXT)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    assert initialisation.text_cache(model, TEXT) == expected
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# Which numbers


def test_random_numbers_are_seeded_even_and_within_the_bound() -> None:
    geometry = BaseModel(tiny_config("llama")).geometry
    prompt = initialisation.random_uniform(geometry, 400, seed=3)
    vectors = prompt.inputs[0].vectors
    assert (vectors.shape, vectors.dtype, prompt.inputs[0].stack) == ((400, 32), np.float32, "decoder")
    assert np.abs(vectors).max() <= 0.5
    assert np.abs(vectors).max() > 0.499
    assert abs(vectors.mean()) < 0.01
    assert abs(vectors.std() - 1 / 12**0.5) < 0.01
    assert initialisation.random_uniform(geometry, 400, seed=3) == prompt
    assert initialisation.random_uniform(geometry, 400, seed=4) != prompt
    assert np.abs(initialisation.random_uniform(geometry, 400, bound=2.0).inputs[0].vectors).max() > 1.9


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "t5"])
def test_random_and_zero_prefixes_fit_and_run(family: str) -> None:
    model = tiny_model(family)
    base = BaseModel.resolve(model)
    sites: Any = {"bert": ("encoder",), "t5": ("encoder", "self", "cross")}.get(family, ("self",))
    for prompt in (
        initialisation.random_uniform(model, 4, sites=sites),
        initialisation.zero(base.geometry, 4, sites=sites),
    ):
        assert prompt.base.geometry == base.geometry
        assert {part.site for part in prompt.prefixes} == set(sites)
        assert prompt.positions.start == prompt.counted()
        check_fits(prompt, base.geometry)
    assert not any(array.any() for _, array in initialisation.zero(model, 4, sites=sites).arrays())
    assert not any(array.any() for _, array in initialisation.zero(model, 4).arrays())


def rows_of(model: Any) -> np.ndarray:
    """The word vectors as `inputs_embeds`, every word asked for on its own."""
    with torch.no_grad():
        return np.stack([model.get_input_embeddings()(torch.tensor([[token]]))[0, 0].numpy() for token in range(96)])


def ids_of(vectors: np.ndarray, table: np.ndarray) -> list[int]:
    """Which rows of the table the vectors are, bit for bit."""
    return [next(token for token, row in enumerate(table) if np.array_equal(row, vector)) for vector in vectors]


@pytest.mark.parametrize("family", ["gpt2", "gemma", "bert", "t5"])
def test_sampled_words_are_rows_of_the_most_frequent_and_different(family: str) -> None:
    model = model_of(family)
    table = rows_of(model)
    prompt = initialisation.sampled_vocabulary(model, 20, candidates=30, seed=1)
    ids = ids_of(prompt.inputs[0].vectors, table)
    assert max(ids) < 30
    assert len(set(ids)) == 20
    assert prompt.inputs[0].stack == ("encoder" if family in ("bert", "t5") else "decoder")
    assert initialisation.sampled_vocabulary(model, 20, candidates=30, seed=1) == prompt
    assert initialisation.sampled_vocabulary(model, 20, candidates=30, seed=2) != prompt
    beyond = ids_of(initialisation.sampled_vocabulary(model, 60).inputs[0].vectors, table)
    assert max(beyond) >= 30, "candidates matter"


def test_a_ranking_and_exclusions_decide_what_is_sampled() -> None:
    model = model_of("gpt2")
    table = rows_of(model)
    ranking = list(range(95, 50, -1))
    prompt = initialisation.sampled_vocabulary(model, 10, candidates=10, ranking=ranking, exclude={95, 94})
    assert sorted(ids_of(prompt.inputs[0].vectors, table)) == list(range(84, 94))


def test_class_labels_come_first_and_are_averaged_and_not_drawn_again() -> None:
    model = model_of("gpt2")
    table = rows_of(model)
    prompt = initialisation.class_labels(model, [[7], [3, 9], "cb"], 8, candidates=7, tokenizer=Tokenizer())
    vectors = prompt.inputs[0].vectors
    assert np.array_equal(vectors[0], table[7])
    np.testing.assert_allclose(vectors[1], (table[3] + table[9]) / 2, atol=1e-15)
    np.testing.assert_allclose(vectors[2], (table[2] + table[1]) / 2, atol=1e-15)
    drawn = ids_of(vectors[3:], table)
    assert len(set(drawn)) == 5
    assert max(drawn) < 7
    for seed in range(5):
        one = initialisation.class_labels(model, [[2], [4]], 7, candidates=5, seed=seed).inputs[0].vectors
        assert sorted(ids_of(one, table)) == [0, 1, 2, 3, 4, 5, 6]
    whole = initialisation.class_labels(model, [[2], [4]], 2).inputs[0].vectors
    assert ids_of(whole, table) == [2, 4]


def test_words_keep_the_dtype_of_the_model() -> None:
    model = tiny_model("llama", torch.bfloat16)
    assert initialisation.text(model, TEXT).inputs[0].vectors.dtype.name == "bfloat16"
    assert initialisation.text_cache(model, TEXT).prefixes[0].layers[0].keys.dtype.name == "bfloat16"
    assert initialisation.class_labels(model, [[3, 4]], 2).inputs[0].vectors.dtype.name == "bfloat16"


def test_another_prompt_is_copied_without_what_belongs_to_its_task() -> None:
    model = tiny_model("llama")
    source = replace(
        random_prefix(BaseModel.resolve(model).geometry),
        head={"score.weight": np.ones((2, 32))},
        training=Training("mlp", {}, {"x": np.ones(2)}),
        origin=Origin("x"),
    )
    copy = initialisation.another(source, model, 5)
    assert copy.parts == source.parts
    assert copy.positions == source.positions
    assert copy.base == BaseModel.resolve(model).id
    assert (dict(copy.head), copy.training, copy.origin) == ({}, None, None)
    assert initialisation.average([source, source], model) == copy


# What is refused


def test_another_prompt_of_other_shapes_is_refused() -> None:
    llama = BaseModel(tiny_config("llama"))
    source = random_prefix(llama.geometry)
    with pytest.raises(ValueError, match=r"length 5[\s\S]*expected: 6 virtual"):
        initialisation.another(source, llama, 6)
    for config in (tiny_config("llama", num_hidden_layers=2), tiny_config("qwen3"), tiny_config("bert")):
        with pytest.raises(BaseModelError, match="does not fit"):
            initialisation.another(source, config)
    gpt2 = BaseModel(tiny_config("gpt2"))
    with pytest.raises(BaseModelError, match="for llama"):
        initialisation.another(random_input_prompt(llama.geometry), gpt2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: initialisation.text(model, []), "no tokens"),
        (lambda model: initialisation.text(model, "abc"), "a tokenizer"),
        (lambda model: initialisation.text(model, [3, 96, -1]), r"token ids -1, 96\n  expected: 0 to 95"),
        (lambda model: initialisation.text(model, TEXT, 0), "length 0"),
        (lambda model: initialisation.text_cache(model, [96]), "token ids 96"),
        (
            lambda model: initialisation.sampled_vocabulary(model, 97),
            "97 words to be drawn without replacement from 96",
        ),
        (lambda model: initialisation.sampled_vocabulary(model, 5, candidates=4), "5 words .* from 4"),
        (lambda model: initialisation.sampled_vocabulary(model, 1, ranking=[400]), "token ids 400"),
        (lambda model: initialisation.class_labels(model, [[1], [2], [3]], 2), "3 labels for 2"),
        (lambda model: initialisation.class_labels(model, [], 2), "0 labels"),
        (lambda model: initialisation.class_labels(model, [[]], 2), "no tokens"),
        (lambda model: initialisation.random_uniform(model, 0), "length 0"),
        (lambda model: initialisation.zero(model, 2, stack="decoder", sites=("self",)), "leave one of them out"),
    ],
)
def test_wrong_arguments_are_refused_with_a_way_out(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(tiny_model("gpt2"))


def test_what_the_model_lacks_is_refused() -> None:
    gpt2 = tiny_model("gpt2")
    with pytest.raises(BaseModelError, match="no encoder"):
        initialisation.text(gpt2, TEXT, stack="encoder")
    with pytest.raises(BaseModelError, match="the encoder, which"):
        initialisation.zero(gpt2, 3, stack="encoder")
    with pytest.raises(BaseModelError, match="no site 'cross'"):
        initialisation.zero(gpt2, 3, sites=("cross",))
    with pytest.raises(BaseModelError, match="which no configuration has"):
        initialisation.text(gpt2.config, TEXT)
    for family in ("bert", "t5"):
        with pytest.raises(BaseModelError, match="which has an encoder"):
            initialisation.text_cache(tiny_model(family), TEXT)


def test_the_cache_of_a_model_that_runs_with_a_prompt_is_refused() -> None:
    model = tiny_model("gpt2")
    sb.attach(model, initialisation.text_cache(model, TEXT))
    with pytest.raises(EngineError, match="detach"):
        initialisation.text_cache(model, TEXT)
