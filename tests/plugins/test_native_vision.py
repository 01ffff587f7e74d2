"""Prompts on vision-language bases: the native engine against rows embedded, positioned and masked by hand.

A row by hand is one text without pads. Its images' features are put among the embeddings of its words, its positions
are counted here, and its masks are made here, where the model has others than causal ones. A prefix is then what the
cache starts with, and the vectors of an input prompt are rows like any other.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as IMAGE_TEXT_TO_TEXT

from softbridge import PrefixTuning, PromptBank, attach, detach, extract
from softbridge.arrays import to_torch
from softbridge.base import BaseModel
from softbridge.base import cache as caches
from softbridge.errors import EngineError
from softbridge.geometry import read_geometry
from softbridge.lowering.precision import as_dtype
from softbridge.lowering.scale import recorded
from softbridge.methods import MLP
from softbridge.prompt import InputPrompt, KeyValue, KeyValuePrefix, Positions, SoftPrompt
from softbridge.template import Field, Template, Virtual
from softbridge.testing import random_input_prompt, random_prefix
from softbridge_native.engine import ENGINE

sys.path.insert(0, str(Path(__file__).parents[1]))
from vision import IMAGE, features, vision_inputs, vision_model, with_words

P, NEW = 5, 4
#: Large: the features of an image are, too, above all in PaliGemma.
STD = 2.0
TEXTS = ((2, 3), (4, 4))
#: Rotary tables are a float32 region in all of these.
CLOSE = 1e-5
#: Of gradients, which go through the float32 regions twice. By hand, with products summed in other orders, Gemma 3's
#: move by up to 6e-6, and its logits by 3e-6.
CLOSE_GRADIENT = 3e-5
#: What each fault moves, at least.
FAR = 1e-2
FAMILIES = ("llava", "qwen2_vl", "qwen2_5_vl", "gemma3", "paligemma", "idefics3", "smolvlm")
#: Those that are only compared with words.
FURTHER = ("aya_vision", "deepseek_vl", "glm4v", "idefics2", "internvl", "mistral3", "qwen3_vl", "video_llava")
#: What the model is told of an image's tokens: PaliGemma's types say what is bidirectional (0), not what is an image.
KINDS = {"paligemma": 0}
WINDOW = 8
#: Rows and columns of an image's tokens, which M-RoPE tells apart.
GRID = (2, 3)


@cache
def bare(family: str) -> Any:
    return vision_model(family)


def make_prompt(family: str, method: str, seed: int = 0) -> SoftPrompt:
    make = random_input_prompt if method == "input" else random_prefix
    return as_dtype(make(read_geometry(bare(family).config), P, seed=seed, std=STD), np.dtype(np.float64))


def attached(family: str, prompt: SoftPrompt) -> Any:
    return ENGINE.attach(copy.deepcopy(bare(family)), prompt)


def batch(family: str, image: bool, side: str = "left") -> dict[str, Tensor]:
    return vision_inputs(bare(family), TEXTS, side, image, KINDS.get(family, 1))


# ---------------------------------------------------------------------------------------------------------- by hand


def embedded(family: str, ids: Tensor, seen: Tensor | None) -> Tensor:
    """The words' embeddings [1, T, H], and the features in the places of the image's tokens."""
    found = bare(family).get_input_embeddings()(ids)[None].clone()
    if seen is not None:
        found[0, ids == IMAGE] = seen
    return found.detach()


def positions(family: str, ids: Tensor, apart: int = 0) -> Tensor:
    """[1, P + T], or [3, 1, P + T] under M-RoPE, with the text moved by `apart` places away from the prompt."""
    if not family.startswith("qwen"):
        found = torch.arange(P + len(ids))
        found[P:] += apart
        return found[None] + int(family == "paligemma")
    rows, columns = GRID
    places, now, seen = [(at, at, at) for at in range(P)], P + apart, 0
    for token in ids.tolist():
        if token != IMAGE:
            places.append((now, now, now))
            now += 1
            continue
        places.append((now, now + seen // columns, now + seen % columns))
        seen += 1
        if seen == rows * columns:
            now, seen = now + max(GRID), 0
    return torch.tensor(places).T[:, None]


def masks(family: str, ids: Tensor, both_ways: bool, given: int) -> Any:
    """Additive masks [1, 1, P + T, P + T] of virtual tokens and words, one for each kind of layer where there are two.

    The tokens of an image, or all of the `given` ones, see each other where the model lets them; with `both_ways` off
    they see none that come later.
    """
    column = torch.arange(P + len(ids))
    distance = column[:, None] - column
    visible = distance >= 0
    if both_ways and family == "gemma3":
        image = torch.cat([torch.zeros(P, dtype=torch.bool), ids == IMAGE])
        visible = visible | (image[:, None] & image)
    if both_ways and family == "paligemma":
        visible = visible | (column < P + given)
    if family != "gemma3":
        return additive(visible)
    return {"full_attention": additive(visible), "sliding_attention": additive(visible & (distance < WINDOW))}


def additive(visible: Tensor) -> Tensor:
    return torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, -1e9)[None, None]


def by_hand(
    family: str,
    prompt: SoftPrompt,
    ids: Tensor,
    seen: Tensor | None,
    apart: int = 0,
    both_ways: bool = True,
    given: int | None = None,
    make: Callable[[Any], Tensor] = to_torch,
) -> Tensor:
    """The logits [T, V] of one text, of which so many tokens were given, and all others generated."""
    model, own = bare(family), embedded(family, ids, seen)
    where, mask, told = positions(family, ids, apart), masks(family, ids, both_ways, given or len(ids)), {}
    (part,) = prompt.parts
    if isinstance(part, InputPrompt):
        own = torch.cat([make(part.vectors)[None], own], dim=1)
    else:
        seeded, where = DynamicCache(), where[..., P:]
        mask = {name: one[:, :, P:] for name, one in mask.items()} if isinstance(mask, dict) else mask[:, :, P:]
        for layer, pair in part.layers.items():
            seeded.update(make(pair.keys)[None], make(pair.values)[None], layer)
        told = {caches.argument(model.model.forward) or caches.NAMES[0]: seeded}
    with torch.set_grad_enabled(make is not to_torch):
        out = model.model(inputs_embeds=own, attention_mask=mask, position_ids=where, use_cache=bool(told), **told)
        found: Tensor = model.lm_head(out.last_hidden_state)[0, -len(ids) :]
    return found


def rows_of(family: str, given: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor | None, Tensor]]:
    """Each row's ids without pads, the features of its image, and where it stands in the batch."""
    shown = {name: given[name] for name in ("pixel_values", "image_grid_thw") if name in given}
    seen = features(bare(family), shown).chunk(len(TEXTS)) if shown else [None] * len(TEXTS)
    found = []
    for row, real in enumerate(given["attention_mask"].bool()):
        found.append((given["input_ids"][row, real], seen[row], real))
    return found


def apart_by(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def logits(model: Any, given: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**given).logits
    return found


def distance(family: str, prompt: SoftPrompt, given: Mapping[str, Tensor], **fault: Any) -> float:
    """Of the attached model's batch from its rows by hand, which may be given a fault."""
    found = logits(attached(family, prompt), given)
    return max(
        apart_by(found[row, real], by_hand(family, prompt, ids, seen, **fault))
        for row, (ids, seen, real) in enumerate(rows_of(family, given))
    )


def greedy(family: str, prompt: SoftPrompt, ids: Tensor, seen: Tensor | None) -> Tensor:
    given = len(ids)
    for _ in range(NEW):
        last = by_hand(family, prompt, ids, seen, given=given)[-1:]
        last[:, IMAGE] = -torch.inf  # it would be of an image that is not there
        ids = torch.cat([ids, last.argmax(-1)])
    return ids[-NEW:]


def generated(model: Any, given: Mapping[str, Tensor], **settings: Any) -> Tensor:
    """[B, NEW] greedy tokens, none of which is of an image that is not there."""
    lengths = {"max_new_tokens": NEW, "do_sample": False, "suppress_tokens": [IMAGE]}
    found: Tensor = model.generate(**given, **{**lengths, **settings})
    return found[:, -NEW:]


def uncached_is_its_own(family: str) -> bool:
    """Whether the model says something else without a cache: PaliGemma of 4.x lets all words see each other then."""
    return family == "paligemma" and hasattr(bare(family).model, "_update_causal_mask")


def alone(family: str, given: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
    """One row of a batch, without pads."""
    real = given["attention_mask"][row].bool()
    rows = len(given["attention_mask"])
    return {
        name: value[row : row + 1, real] if value.shape[:2] == given["input_ids"].shape else value.chunk(rows)[row]
        for name, value in given.items()
    }


methods = pytest.mark.parametrize("method", ["input", "prefix"])
families = pytest.mark.parametrize("family", FAMILIES)
images = pytest.mark.parametrize("image", [True, False], ids=["image", "text"])


@families
@methods
@images
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_are_those_of_rows_by_hand(family: str, method: str, image: bool, side: str) -> None:
    assert distance(family, make_prompt(family, method), batch(family, image, side)) < CLOSE


@families
@methods
@images
def test_tokens_are_those_of_rows_by_hand(family: str, method: str, image: bool) -> None:
    prompt, given = make_prompt(family, method), batch(family, image)
    expected = torch.stack([greedy(family, prompt, ids, seen) for ids, seen, _ in rows_of(family, given)])
    model = attached(family, prompt)
    assert torch.equal(generated(model, given), expected)
    if not uncached_is_its_own(family):
        assert torch.equal(generated(model, given, use_cache=False), expected)
    assert not torch.equal(generated(bare(family), batch(family, image, "right")), expected)


@families
@methods
def test_faults_show(family: str, method: str) -> None:
    """What the equalities above would notice."""
    prompt, given = make_prompt(family, method), batch(family, True, "right")
    (part,) = prompt.parts
    if isinstance(part, InputPrompt):
        swapped: Any = replace(part, vectors=part.vectors[::-1].copy())
        fewer: Any = replace(part, vectors=np.concatenate([part.vectors[:-1], part.vectors[:1]]))
    else:
        swapped = replace(part, layers={n: replace(p, keys=p.values, values=p.keys) for n, p in part.layers.items()})
        fewer = replace(part, layers={**part.layers, 0: part.layers[1]})
    found = logits(attached(family, prompt), given)
    moved = {
        "no prompt": logits(bare(family), given),
        "swapped": logits(attached(family, replace(prompt, parts=(swapped,))), given),
        "one is another": logits(attached(family, replace(prompt, parts=(fewer,))), given),
        "another image": logits(attached(family, prompt), {**given, **pixels(family, given)}),
    }
    real = given["attention_mask"].bool()
    for name, other in moved.items():
        assert apart_by(other[real], found[real]) > FAR, name
    assert distance(family, prompt, given, apart=1) > FAR
    if family in ("gemma3", "paligemma"):
        assert distance(family, prompt, given, both_ways=False) > FAR


def pixels(family: str, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {"pixel_values": torch.randn(given["pixel_values"].shape, generator=generator, dtype=torch.float64)}


def test_m_rope_is_told_apart_from_counting() -> None:
    prompt, given = make_prompt("qwen2_vl", "input"), batch("qwen2_vl", True, "right")
    found = logits(attached("qwen2_vl", prompt), given)
    for row, (ids, seen, real) in enumerate(rows_of("qwen2_vl", given)):
        own = torch.cat([to_torch(prompt.inputs[0].vectors)[None], embedded("qwen2_vl", ids, seen)], dim=1)
        counted = torch.arange(own.shape[1]).expand(3, 1, -1)
        with torch.no_grad():
            other = bare("qwen2_vl")(inputs_embeds=own, position_ids=counted).logits[0, P:]
        assert apart_by(other, found[row, real]) > FAR


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "paligemma"])
@methods
def test_positions_may_be_told(family: str, method: str) -> None:
    """By the caller, as the model counts them: of one dimension, of three, and from 1."""
    prompt, given = make_prompt(family, method), alone(family, batch(family, True), 0)
    model = attached(family, prompt)
    told = positions(family, given["input_ids"][0])[..., P:] - P
    assert apart_by(logits(model, {**given, "position_ids": told}), logits(model, given)) < CLOSE
    far = told + torch.arange(told.shape[-1])
    assert apart_by(logits(model, {**given, "position_ids": far}), logits(model, given)) > FAR


@pytest.mark.parametrize("family", ["gemma3", "qwen2_vl"])
def test_vectors_may_come_after_the_first_token(family: str) -> None:
    prompt, given = make_prompt(family, "input"), batch(family, True)
    later = replace(prompt, parts=(replace(prompt.inputs[0], placement="after-first-token"),))
    found = logits(attached(family, later), given)
    for row in range(len(TEXTS)):
        one = alone(family, given, row)
        model = copy.deepcopy(bare(family))
        words = torch.cat([one["input_ids"][:, :1], torch.full((1, P), 3), one["input_ids"][:, 1:]], dim=1)
        lengthened = {**one, "input_ids": words, "attention_mask": torch.ones_like(words)}
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in one:
                lengthened[name] = torch.nn.functional.pad(one[name], (P, 0))

        def put(stack: Any, args: Any, kwargs: Any) -> Any:
            own = kwargs["inputs_embeds"]
            vectors = to_torch(prompt.inputs[0].vectors)[None]
            return args, {**kwargs, "inputs_embeds": torch.cat([own[:, :1], vectors, own[:, 1 + P :]], dim=1)}

        model.get_decoder().register_forward_pre_hook(put, with_kwargs=True)
        expected = logits(model, lengthened)[0]
        real = given["attention_mask"][row].bool()
        assert apart_by(found[row, real], torch.cat([expected[:1], expected[1 + P :]])) < CLOSE
        assert apart_by(logits(attached(family, prompt), given)[row, real], found[row, real]) > FAR


@pytest.mark.parametrize("family", [*FAMILIES, *FURTHER])
@methods
@images
def test_a_prompt_that_is_words_is_what_the_words_are(family: str, method: str, image: bool) -> None:
    """The embeddings of words, or the cache of having read them; and the model given the words; in sdpa attention."""
    if family not in IMAGE_TEXT_TO_TEXT:
        pytest.skip("not in this transformers")
    if family == "paligemma" and method == "prefix":
        pytest.skip("words in a cache have not seen what comes behind, and here they would")
    model = vision_model(family, "sdpa")
    words = torch.tensor([7, 20, 33, 41, 5])
    prompt = as_dtype(random_input_prompt(read_geometry(model.config), P), np.dtype(np.float64))
    if method == "input":
        vectors = model.get_input_embeddings()(words).detach().numpy()
        prompt = replace(prompt, parts=(replace(prompt.inputs[0], vectors=vectors),))
    else:
        with torch.no_grad():
            layers = caches.of(model(input_ids=words[None], use_cache=True)).layers
        pairs = {n: KeyValue(layer.keys[0].numpy(), layer.values[0].numpy()) for n, layer in enumerate(layers)}
        prompt = replace(prompt, parts=(KeyValuePrefix("self", pairs),))
    given = vision_inputs(model, TEXTS, "left", image, KINDS.get(family, 1))
    read = with_words(model, given, words)
    expected, tokens = logits(model, read), generated(model, read)
    without = logits(model, given)
    if any("where their queries stand" in obstacle.reason for obstacle in ENGINE.obstacles(prompt, model)):
        pytest.skip("a sliding window, in layers that are not told positions")
    running = ENGINE.attach(model, prompt)
    found = logits(running, given)
    for row, (real, all_real) in enumerate(
        zip(given["attention_mask"].bool(), read["attention_mask"].bool(), strict=True)
    ):
        assert apart_by(found[row, real], expected[row, all_real][P:]) < CLOSE
        assert apart_by(without[row, real], expected[row, all_real][P:]) > FAR
    assert torch.equal(generated(running, given), tokens)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # those of the vision tower
@families
@methods
def test_gradients_are_those_of_rows_by_hand(family: str, method: str) -> None:
    """And the same with gradient checkpointing."""
    prompt, given = make_prompt(family, method), batch(family, True)
    leaves: list[Tensor] = []

    def leaf(array: Any) -> Tensor:
        leaves.append(to_torch(array).requires_grad_())
        return leaves[-1]

    losses = [by_hand(family, prompt, ids, seen, make=leaf).square().mean() for ids, seen, _ in rows_of(family, given)]
    sum(losses).backward()
    each = len(leaves) // len(losses)
    expected = [sum(leaves[n + row * each].grad for row in range(len(losses))) for n in range(each)]

    model = attached(family, prompt).train()
    for settings in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        if settings is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
        model.zero_grad()
        found = model(**given, use_cache=False).logits
        sum(found[row, real].square().mean() for row, (_, _, real) in enumerate(rows_of(family, given))).backward()
        trained = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
        assert len(trained) == len(expected)
        for own, other in zip(trained, expected, strict=True):
            assert apart_by(own, other.reshape(own.shape)) < CLOSE_GRADIENT


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # those of the vision tower
def test_a_network_trains_with_gradient_checkpointing() -> None:
    """The embedding runs before the stack does, when the last step's parameterisation is still there."""
    model = copy.deepcopy(bare("gemma3")).train()
    attach(model, PrefixTuning(P, MLP(16)), seed=0)
    given = batch("gemma3", True)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    for _ in range(2):
        model.zero_grad()
        model(**given, labels=given["input_ids"], use_cache=False).loss.backward()
    trained = [p.grad for p in model.parameters() if p.requires_grad]
    assert trained
    assert all(grad is not None and bool(grad.abs().max() > 0) for grad in trained)


@pytest.mark.parametrize("family", ["gemma3", "qwen2_vl", "paligemma"])
def test_each_row_has_its_own_prompt(family: str) -> None:
    prompts = {"long": make_prompt(family, "input"), "prefix": make_prompt(family, "prefix")}
    prompts["short"] = as_dtype(
        random_input_prompt(read_geometry(bare(family).config), 3, seed=3), np.dtype(np.float64)
    )
    bank = PromptBank(prompts)
    model = attach(copy.deepcopy(bare(family)), bank)
    given = batch(family, True)
    for names in (["long", "short"], ["short", None], ["prefix", "long"], [None, "prefix"]):
        with bank.rows(names):
            found, tokens = logits(model, given), generated(model, given)
        for row, name in enumerate(names):
            one = alone(family, given, row)
            other = bare(family) if name is None else attached(family, prompts[name])
            assert apart_by(found[row, given["attention_mask"][row].bool()], logits(other, one)[0]) < CLOSE
            assert torch.equal(tokens[row], generated(other, one)[0])


@families
@methods
def test_detached_it_is_the_model_before(family: str, method: str) -> None:
    model, given = copy.deepcopy(bare(family)), batch(family, True, "right")
    prompt = make_prompt(family, method)
    attach(model, prompt)
    assert extract(model) == recorded(prompt, BaseModel.resolve(model))
    logits(model, given)
    detach(model)
    assert torch.equal(logits(model, given), logits(bare(family), given))
    both = (model, bare(family))
    hooks = [[len(m._forward_pre_hooks) + len(m._forward_hooks) for m in one.modules()] for one in both]
    assert hooks[0] == hooks[1]


def test_what_cannot_be_lengthened_is_refused() -> None:
    given = batch("gemma3", True)
    model = attached("gemma3", make_prompt("gemma3", "input"))
    with pytest.raises(EngineError, match="ready-made"):
        generated(model, given, cache_implementation="static", disable_compile=True)
    template = Template((Virtual(2), Field("text"), Virtual(3)))
    prompt = make_prompt("gemma3", "input")
    part = replace(prompt.inputs[0], placement="template", template=template)
    with pytest.raises(EngineError, match="token ids"):
        attached("gemma3", replace(prompt, parts=(part,), positions=Positions({"decoder": 0})))


def test_pads_that_the_model_counts_are_not_between_a_prefix_and_the_text() -> None:
    """PaliGemma counts pads where it is told no positions, also behind a cache; `generate` tells them."""
    prompt, given = make_prompt("paligemma", "prefix"), batch("paligemma", True)
    model = attached("paligemma", prompt)
    expected = generated(model, given)
    name, seen, found = caches.argument(model.forward) or caches.NAMES[0], dict(given), []
    for _ in range(NEW):
        with torch.no_grad():
            out = model(**seen, use_cache=True)
        last = out.logits[:, -1]
        last[:, IMAGE] = -torch.inf
        found.append(last.argmax(-1, keepdim=True))
        mask = torch.cat([seen["attention_mask"], torch.ones(len(TEXTS), 1, dtype=torch.long)], dim=1)
        seen = {"input_ids": found[-1], "attention_mask": mask, name: caches.of(out)}
    assert torch.equal(torch.cat(found, dim=1), expected)


@pytest.mark.parametrize("family", ["gemma3", "qwen2_vl"])
@methods
def test_a_model_without_a_head_runs_it(family: str, method: str) -> None:
    """Also where its forward is called past the hooks."""
    prompt, given = make_prompt(family, method), batch(family, True)
    whole = copy.deepcopy(bare(family))
    model = attach(whole.model, prompt)
    with torch.no_grad():
        for call in (model, model.forward):
            states = call(**given).last_hidden_state
            found = whole.lm_head(states)
            for row, (ids, seen, real) in enumerate(rows_of(family, given)):
                assert apart_by(found[row, real], by_hand(family, prompt, ids, seen)) < CLOSE


@methods
def test_images_that_are_placed_by_themselves_are_refused_where_they_would_move(method: str) -> None:
    """HunYuan-VL counts an image's rows and columns from 0, wherever it is: `generate` tells such positions."""
    if "hunyuan_vl" not in IMAGE_TEXT_TO_TEXT:
        pytest.skip("not in this transformers")
    model = vision_model("hunyuan_vl", "sdpa")
    make = random_input_prompt if method == "input" else random_prefix
    given = vision_inputs(model, TEXTS)
    attach(model, make(read_geometry(model.config), P))
    with pytest.raises(EngineError, match="placed by itself"):
        generated(model, given)


@pytest.mark.parametrize("family", ["qwen2_vl", "gemma3", "paligemma"])
@methods
def test_the_engines_check_of_itself_lets_it_run(
    family: str, method: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Qwen2-VL keeps what it found of the last sequence, and PaliGemma reads on in another way than it begins."""
    monkeypatch.setenv("SOFTBRIDGE_SELF_CHECK", "1")
    monkeypatch.setenv("SOFTBRIDGE_SELF_CHECK_FOLDER", str(tmp_path))
    prompt, given = make_prompt(family, method), batch(family, True)
    model = attach(copy.deepcopy(bare(family)), prompt)
    assert torch.equal(generated(model, given), generated(attached(family, prompt), given))
