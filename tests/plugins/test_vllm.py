"""vLLM's format, and how its requests name prompts. Nothing here needs vLLM: see `tests/serving/test_vllm.py`."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import softbridge as sb
from softbridge.arrays import BFLOAT16
from softbridge.base import BaseModel
from softbridge.errors import BaseModelError, CheckpointError, EngineError, LoweringError, SoftbridgeError
from softbridge.geometry import Geometry, StackGeometry
from softbridge.lowering.planner import lower
from softbridge.lowering.precision import as_dtype
from softbridge.lowering.steps import Target
from softbridge.plugin.declared import faults
from softbridge.prompt import KeyValuePrefix, Positions, SoftPrompt, pack
from softbridge.prompt.container import digest_of
from softbridge.testing import random_adaption, random_input_prompt, random_prefix, tiny_config
from softbridge.untrusted import Files
from softbridge_native.format import FORMAT as CONTAINER
from softbridge_vllm.client import Prompts
from softbridge_vllm.format import FILE, FORMAT
from softbridge_vllm.heads import heads_of
from softbridge_vllm.placeholders import placeholders
from softbridge_vllm.requests import Desk, slots
from softbridge_vllm.server import SERVER
from softbridge_vllm.settings import Settings
from softbridge_vllm.shelf import Named, check_apart, numbers_of, read_shelf, vectors_of

LLAMA = BaseModel(tiny_config("llama"))


def written(path: Path, prompt: SoftPrompt, geometry: Geometry | None = None) -> Path:
    """In the plugin's own format, as one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(FORMAT.write(prompt, geometry)[FILE]))
    return path


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Two prefixes, one of them as a folder, and vectors."""
    folder = tmp_path / "prompts"
    written(folder / "mood.safetensors", random_prefix(LLAMA.geometry, 5, seed=1))
    written(folder / "topic" / FILE, random_prefix(LLAMA.geometry, 9, seed=2))
    written(folder / "style.safetensors", random_input_prompt(LLAMA.geometry, 6, seed=3))
    return folder


# --- the format -------------------------------------------------------------------------------------------------------


def test_the_plugin_keeps_its_protocols() -> None:
    assert faults("softbridge_formats", FORMAT) == []
    assert faults("softbridge_servers", SERVER) == []
    assert FORMAT.server == SERVER.name


@pytest.mark.parametrize("make", [random_prefix, random_input_prompt])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_what_is_written_is_the_container(tmp_path: Path, family: str, make: Callable[..., SoftPrompt]) -> None:
    geometry = BaseModel(tiny_config(family)).geometry
    prompt = replace(make(geometry), base=sb.prompt.BaseId("a base"))
    files = Files(written(tmp_path / "a.safetensors", prompt, geometry))
    assert FORMAT.read(files, None) == CONTAINER.read(files, None)
    assert FORMAT.read(files, None) == replace(prompt, base=sb.prompt.BaseId("a base", geometry))
    assert CONTAINER.sniff(files), "by itself it is what it is"
    assert not FORMAT.sniff(files)
    folder = written(tmp_path / "folder" / FILE, prompt, geometry).parent
    assert FORMAT.sniff(Files(folder))
    assert not CONTAINER.sniff(Files(folder))
    assert FORMAT.read(Files(folder), None) == FORMAT.read(files, None)


def test_a_prefix_that_does_not_count_is_rotated_to_where_vllm_has_the_text() -> None:
    prompt = random_prefix(LLAMA.geometry, positions=Positions({"decoder": 0}))
    found = lower(prompt, Target("vllm", FORMAT.capabilities, LLAMA), (), FORMAT.obstacles)
    assert found.prompt.positions.start == {"decoder": 5}
    assert [step.name for step in found.steps] == ["rotate"]
    assert not np.allclose(found.prompt.prefixes[0].layers[0].keys, prompt.prefixes[0].layers[0].keys)


def some_layers(prompt: SoftPrompt) -> SoftPrompt:
    part = prompt.prefixes[0]
    return replace(prompt, parts=(KeyValuePrefix("self", {0: part.layers[0]}),))


def after_first_token(geometry: Geometry) -> SoftPrompt:
    prompt = random_input_prompt(geometry)
    return replace(prompt, parts=(replace(prompt.inputs[0], placement="after-first-token"),))


REFUSED: dict[str, tuple[str, Callable[[Geometry], SoftPrompt], str]] = {
    "a layer left out": ("llama", lambda geometry: some_layers(random_prefix(geometry)), "leaves out"),
    "positions that nobody can pass": (
        "gpt2",
        lambda geometry: random_prefix(geometry, positions=Positions({"decoder": 0})),
        "real tokens stand at 0",
    ),
    "a window that keeps the prefix": (
        "mistral",
        lambda geometry: random_prefix(geometry, positions=Positions({"decoder": 5}, window="pinned")),
        "window",
    ),
    "behind the first token": ("llama", after_first_token, "after-first-token"),
    "LLaMA-Adapter": ("llama", random_adaption, "softmax of their own"),
    "an encoder's": ("bert", random_prefix, "at the site 'encoder'"),
    "an encoder-decoder's": ("t5", lambda geometry: random_prefix(geometry, sites=("self",)), "of a decoder alone"),
    "numbers of float64": (
        "llama",
        lambda geometry: as_dtype(random_prefix(geometry), np.dtype(np.float64)),
        "float32",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_vllm_does_not_compute_is_refused(name: str) -> None:
    family, make, reason = REFUSED[name]
    config = tiny_config(family) if family != "mistral" else mistral(8)
    base = BaseModel(config)
    prompt = make(base.geometry)
    if name == "numbers of float64":
        part = prompt.prefixes[0]
        layers = {n: replace(pair, keys=pair.keys + 1e-12) for n, pair in part.layers.items()}
        prompt = replace(prompt, parts=(replace(part, layers=layers),))
    with pytest.raises(LoweringError, match=reason):
        lower(prompt, Target("vllm", FORMAT.capabilities, base), (), FORMAT.obstacles)


def mistral(window: int | None) -> Any:
    from transformers import AutoConfig

    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    return AutoConfig.for_model(
        "mistral", **sizes, num_attention_heads=4, num_key_value_heads=2, sliding_window=window, pad_token_id=0
    )


def test_layers_that_share_or_keep_a_state_are_refused() -> None:
    plain = StackGeometry(2, 4, 2, 8)
    for stack, reason in (
        (replace(plain, sources=(0, 0)), "share another layer's keys"),
        (replace(plain, kinds=("mamba", "full_attention")), "keep a state"),
    ):
        geometry = Geometry("some", 32, 96, None, stack)
        (found,) = FORMAT.obstacles(random_prefix(geometry), geometry)
        assert reason in found.reason
        assert FORMAT.obstacles(random_input_prompt(geometry), geometry) == ()


def test_gemmas_vectors_are_for_a_model_that_does_not_scale_them() -> None:
    geometry = Geometry("gemma", 32, 96, None, StackGeometry(2, 4, 2, 8))
    prompt = random_input_prompt(geometry)
    for scale, refused in ((None, True), (32**0.5, True), (1.0, False)):
        told = replace(prompt, parts=(replace(prompt.inputs[0], scale=scale),))
        assert bool(FORMAT.obstacles(told, geometry)) == refused
    assert FORMAT.obstacles(random_prefix(geometry), geometry) == ()


def test_a_prompt_of_an_unknown_base_is_refused() -> None:
    prompt = replace(random_prefix(LLAMA.geometry), base=sb.prompt.BaseId())
    assert [obstacle.name for obstacle in FORMAT.obstacles(prompt, None)] == ["vocabulary"]


# --- naming -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [2, 96, 50257])
@pytest.mark.parametrize("length", [1, 2, 5, 200])
def test_placeholders_are_as_many_token_ids_and_begin_with_the_marker(length: int, vocabulary: int) -> None:
    found = placeholders("ab" * 32, length, vocabulary, vocabulary - 1)
    assert len(found) == length
    assert found[0] == vocabulary - 1
    assert all(0 <= token < vocabulary for token in found)


def test_placeholders_say_128_bits_of_the_digest_where_there_is_room() -> None:
    digest = digest_of(random_prefix(LLAMA.geometry))
    found = placeholders(digest, 30, 1000, 7)
    digits = found[1:14]  # 13 digits of a thousand are more than 2^128
    assert sum(digit * 1000**place for place, digit in enumerate(digits)) == int(digest[:32], 16)
    assert set(found[14:]) == {7}
    assert placeholders(digest, 30, 1000, 7) == found
    for place in range(32):
        other = digest[:place] + format(int(digest[place], 16) ^ 1, "x") + digest[place + 1 :]
        assert placeholders(other, 30, 1000, 7) != found


@pytest.mark.parametrize("marker", [-1, 96])
def test_a_marker_is_a_token_id(marker: int) -> None:
    with pytest.raises(SoftbridgeError, match="marker"):
        placeholders("ab" * 32, 5, 96, marker)


def test_server_and_client_read_the_same_ids(directory: Path) -> None:
    served = read_shelf(directory, replace(LLAMA.geometry, vocabulary=120), 0)  # resized
    client = Prompts(directory, marker=0)
    assert client.names == ("mood", "style", "topic")
    assert client.placeholders("mood") == served["mood"].tokens
    assert client.request("topic", [5, 6])["prompt_token_ids"] == [*served["topic"].tokens, 5, 6]
    assert Prompts(directory).placeholders("mood")[0] == 95, "the last token id, unless another is said"


def test_a_prompt_that_was_trained_on_has_other_ids(directory: Path) -> None:
    before = Prompts(directory).placeholders("mood")
    written(directory / "mood.safetensors", random_prefix(LLAMA.geometry, 5, seed=7))
    assert Prompts(directory).placeholders("mood") != before


def desk(directory: Path, marker: int = 0) -> Desk:
    return Desk(read_shelf(directory, None, marker).values())


def test_a_request_is_found_by_its_ids(directory: Path) -> None:
    client, found = Prompts(directory, marker=0), desk(directory)
    for name in ("mood", "topic"):
        named = found.named(client.request(name, [5, 6, 7])["prompt_token_ids"])
        assert named is not None
        assert named.name == name
    assert found.named([5, 6, 7]) is None
    assert found.named([]) is None
    assert found.named([-1, 0, 4]) is None, "vectors stand first"


def test_a_request_that_names_nothing_known_is_refused(directory: Path) -> None:
    found, ids = desk(directory), Prompts(directory, marker=0).placeholders("mood")
    for wrong in ([0], [0, 5, 6], [*ids[:-1], (ids[-1] + 1) % 96, 5], [0, *ids], list(ids[:-1])):
        with pytest.raises(EngineError, match="not here"):
            found.named(wrong)
    with pytest.raises(EngineError, match="without a text"):
        found.named(ids)
    style = read_shelf(directory, None, 0)["style"]
    with pytest.raises(EngineError, match="not here"):
        found.named([*style.tokens, 5])


def test_the_client_refuses_what_the_server_would(directory: Path) -> None:
    client = Prompts(directory, marker=0)
    with pytest.raises(EngineError, match="no prompt is called 'nobody'"):
        client.request("nobody", [5])
    with pytest.raises(EngineError, match="no text"):
        client.request("mood", [])
    with pytest.raises(EngineError, match="begins with 0"):
        client.request(None, [0, 5])
    with pytest.raises(EngineError, match="vectors in front"):
        client.placeholders("style")


def test_vectors_stand_in_front_of_the_text(directory: Path) -> None:
    asked = Prompts(directory).request("style", [5, 6])
    vectors = random_input_prompt(LLAMA.geometry, 6, seed=3).inputs[0].vectors
    assert np.array_equal(asked["prompt_embeds"][:6].numpy(), vectors)
    assert tuple(asked["prompt_embeds"].shape) == (8, LLAMA.geometry.hidden)
    assert asked["prompt_token_ids"] == [0] * 6 + [5, 6]
    assert asked["prompt_is_token_ids"] == [False] * 6 + [True] * 2


def test_the_completions_api_takes_ids_or_vectors(directory: Path) -> None:
    client, words = Prompts(directory), torch.randn(96, LLAMA.geometry.hidden)
    assert client.openai(None, [5, 6]) == {"prompt": [5, 6]}
    assert client.openai("mood", [5, 6]) == {"prompt": [*client.placeholders("mood"), 5, 6]}
    with pytest.raises(EngineError, match="word embeddings"):
        client.openai("style", [5, 6])
    body = client.openai("style", [5, 6], words)["extra_body"]["prompt_embeds"]
    sent = torch.load(io.BytesIO(base64.b64decode(body)), weights_only=True)
    assert torch.equal(sent[6:], words[[5, 6]])
    assert np.array_equal(sent[:6].numpy(), random_input_prompt(LLAMA.geometry, 6, seed=3).inputs[0].vectors)
    with pytest.raises(EngineError, match="does not hold these numbers"):
        client.openai("style", [5, 6], words.bfloat16())
    assert Prompts(directory, rounded=True).openai("style", [5, 6], words.bfloat16())


# --- a directory of prompts -------------------------------------------------------------------------------------------


def test_a_directory_without_prompts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no prompts"):
        read_shelf(tmp_path)
    with pytest.raises(EngineError, match="no directory"):
        read_shelf(tmp_path / "none")


def test_two_prompts_of_one_name_are_refused(directory: Path) -> None:
    written(directory / "mood" / FILE, random_prefix(LLAMA.geometry, 5, seed=4))
    with pytest.raises(EngineError, match="two prompts are called 'mood'"):
        read_shelf(directory)


def test_prompts_that_no_ids_tell_apart_are_refused(directory: Path) -> None:
    written(directory / "short.safetensors", random_prefix(LLAMA.geometry, 1, seed=4))
    with pytest.raises(EngineError, match="begin with the same 1 token ids"):
        read_shelf(directory)


def test_prompts_that_a_prefix_cache_takes_for_one_are_refused(directory: Path) -> None:
    mood = read_shelf(directory)["mood"]
    twin = replace(mood, name="twin", digest="other", tokens=(*mood.tokens[:4], (mood.tokens[4] + 1) % 96))
    check_apart([mood, twin])
    check_apart([mood, twin], 5)
    with pytest.raises(EngineError, match="the same 4 token ids"):
        check_apart([mood, twin], 4)


def test_one_prompt_may_have_two_names(directory: Path) -> None:
    written(directory / "again.safetensors", random_prefix(LLAMA.geometry, 5, seed=1))
    client = Prompts(directory)
    assert client.placeholders("again") == client.placeholders("mood")


@pytest.mark.parametrize(
    "other",
    [{"num_hidden_layers": 4}, {"num_key_value_heads": 4}, {"vocab_size": 90}],
    ids=["layers", "heads", "words"],
)
def test_a_prompt_for_another_base_model_is_refused(directory: Path, other: dict[str, int]) -> None:
    with pytest.raises(BaseModelError, match=r"another base model|for 96 token ids"):
        read_shelf(directory, BaseModel(tiny_config("llama", **other)).geometry)


def test_a_prompt_of_an_unknown_base_is_not_served(directory: Path) -> None:
    prompt = replace(random_prefix(LLAMA.geometry), base=sb.prompt.BaseId())
    (directory / "unknown.safetensors").write_bytes(pack(prompt))
    with pytest.raises(BaseModelError, match="does not say for which base model"):
        read_shelf(directory, LLAMA.geometry)


def test_a_prompt_that_is_not_as_vllm_computes_it_is_not_served(directory: Path) -> None:
    """Whoever wrote it: the bytes do not tell that it was lowered."""
    prompt = random_prefix(LLAMA.geometry, positions=Positions({"decoder": 0}))
    (directory / "zero.safetensors").write_bytes(pack(prompt))
    with pytest.raises(BaseModelError, match="needs to know the base model"):
        read_shelf(directory, LLAMA.geometry)
    (directory / "zero.safetensors").write_bytes(pack(some_layers(random_prefix(LLAMA.geometry))))
    with pytest.raises(LoweringError, match="leaves out"):
        read_shelf(directory, LLAMA.geometry)


def test_what_is_damaged_is_refused(directory: Path) -> None:
    content = bytearray((directory / "mood.safetensors").read_bytes())
    content[-1] ^= 1
    (directory / "mood.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="digest"):
        read_shelf(directory)


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_numbers_are_stored_as_the_cache_has_them(directory: Path) -> None:
    named = read_shelf(directory)["topic"]
    keys, values = numbers_of(named, "float32")[1]
    pair = named.prompt.prefixes[0].layers[1]
    assert keys.shape == (9, *LLAMA.geometry.decoder.shape(1))  # type: ignore[union-attr]
    assert np.array_equal(keys[3, 1], pair.keys[1, 3])
    assert np.array_equal(values[3, 1], pair.values[1, 3])


def test_a_cache_that_rounds_is_refused_unless_that_is_accepted(directory: Path) -> None:
    shelf = read_shelf(directory)
    for take in (
        lambda **how: numbers_of(shelf["mood"], "bfloat16", **how)[0][0],
        lambda **how: vectors_of(shelf["style"], "bfloat16", **how),
    ):
        with pytest.raises(EngineError, match="does not hold these numbers"):
            take()
        assert take(rounded=True).dtype == BFLOAT16
    with pytest.raises(EngineError, match="fp8"):
        numbers_of(shelf["mood"], "fp8", rounded=True)
    exact = as_dtype(random_prefix(LLAMA.geometry), BFLOAT16)
    named = Named("exact", exact, "", (0,) * 5)
    assert np.array_equal(
        numbers_of(named, "float32")[0][0][2, 1], exact.prefixes[0].layers[0].keys[1, 2].astype(np.float32)
    )


def test_numbers_too_large_for_the_cache_are_refused_in_any_case() -> None:
    prompt = random_prefix(LLAMA.geometry)
    layers = {n: replace(pair, keys=pair.keys * 1e6) for n, pair in prompt.prefixes[0].layers.items()}
    named = Named("large", replace(prompt, parts=(replace(prompt.prefixes[0], layers=layers),)), "", (0,) * 5)
    with pytest.raises(EngineError, match="does not hold"), np.errstate(over="ignore"):
        numbers_of(named, "float16", rounded=True)


@pytest.mark.parametrize(("ranks", "heads"), [(1, 4), (2, 4), (4, 4), (2, 8), (4, 2), (8, 1), (8, 2)])
def test_ranks_share_all_heads_out(ranks: int, heads: int) -> None:
    """As vLLM's `QKVParallelLinear` does: `shard_id = rank // num_kv_head_replicas` of shards of equal size."""
    count, replicas = max(1, heads // ranks), max(1, ranks // heads)
    for rank in range(ranks):
        own = list(range(heads))[heads_of(rank, ranks, heads)]
        first = rank // replicas * count
        assert own == list(range(first, first + count))
    assert {head for rank in range(ranks) for head in range(heads)[heads_of(rank, ranks, heads)]} == set(range(heads))


def test_heads_that_cannot_be_shared_out_are_refused() -> None:
    for ranks, heads in ((3, 4), (4, 6)):
        with pytest.raises(EngineError, match="key/value heads"):
            heads_of(0, ranks, heads)


def test_virtual_tokens_go_into_the_blocks_of_the_request() -> None:
    places, numbers = slots([7, 3, 9], 4, 0, 10)
    assert places.tolist() == [28, 29, 30, 31, 12, 13, 14, 15, 36, 37]
    assert numbers.tolist() == list(range(10))
    places, numbers = slots([7, 3, 9], 4, 8, 10)
    assert (places.tolist(), numbers.tolist()) == ([36, 37], [8, 9]), "what the prefix cache had is left alone"
    places, numbers = slots([0, 3], 4, 0, 6)
    assert (places.tolist(), numbers.tolist()) == ([12, 13], [4, 5]), "the null block is nobody's"


# --- settings ---------------------------------------------------------------------------------------------------------


def test_settings_are_read_from_json() -> None:
    told = Settings("somewhere", 3, True)
    assert Settings.of(told.to_json()) == told
    assert Settings.of({"directory": "somewhere"}) == Settings("somewhere")


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"directory": 3},
        {"directory": "a", "marker": True},
        {"directory": "a", "rounded": 1},
        {"directory": "a", "dir": ""},
    ],
    ids=str,
)
def test_settings_that_say_something_else_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(EngineError, match="kv_connector_extra_config"):
        Settings.of(wrong)
