"""vLLM itself answers with prompts as transformers does, within vLLM's own noise. Skipped where vLLM is not installed.

One engine at a time runs in this process: `TestOneServer` has one for all its tests, and the others start their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import softbridge as sb
from softbridge.arrays import BFLOAT16
from softbridge.base import BaseModel
from softbridge.errors import BaseModelError, EngineError
from softbridge.lowering.planner import lower
from softbridge.lowering.precision import as_dtype
from softbridge.lowering.steps import Target
from softbridge.plugin.serving import Answer, Request
from softbridge.prompt import SoftPrompt
from softbridge.testing import as_bytes, random_input_prompt, random_prefix, tiny_config, tiny_model
from softbridge.verification import serving
from softbridge.verification.serving import FACTOR, judge
from softbridge_vllm.client import Prompts
from softbridge_vllm.format import FORMAT
from softbridge_vllm.server import SERVER, answers, started, transferring
from softbridge_vllm.settings import Settings

REASON = SERVER.unavailable()
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.filterwarnings("ignore"),  # vLLM's own, as it is imported
]
_SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # vLLM attends on a CPU in heads of 32 and more
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def config(family: str, **changes: Any) -> Any:
    from transformers import AutoConfig

    if family == "gpt2":
        return tiny_config("gpt2", n_embd=64, n_head=2)
    return AutoConfig.for_model(family, **{**_SIZES, **changes})


FAMILIES: Mapping[str, Callable[[], Any]] = {
    "llama": lambda: config("llama"),
    "qwen3": lambda: config("qwen3"),
    "gpt2": lambda: config("gpt2"),
    "mistral": lambda: config("mistral", sliding_window=8),
    "gemma": lambda: config("gemma"),
    "gemma2": lambda: config("gemma2", sliding_window=8),
}
MAKERS: Mapping[str, Callable[..., SoftPrompt]] = {"prefix": random_prefix, "prompt": random_input_prompt}


@pytest.fixture
def judged_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not the entry point of this checkout is installed."""
    monkeypatch.setattr(serving, "servers", lambda: {SERVER.name: SERVER})


@pytest.mark.usefixtures("judged_here")
@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_vllm_answers_as_transformers_does(family: str, kind: str) -> None:
    base = BaseModel.resolve(FAMILIES[family]())
    # Longer than the window, and of a length that fills no block.
    prompt = MAKERS[kind](base.geometry, 11)
    prompt = lower(prompt, Target(FORMAT.name, FORMAT.capabilities, base), (), FORMAT.obstacles).prompt
    found = judge(FORMAT, prompt, base)
    print(f"{family} {kind}: {found.summary()}, bare {found.bare:.1e}")
    assert found.verdict == "served", found.summary()
    assert found.noise < 1e-3
    assert found.effect > 1e4 * found.bound
    names = {fault.name for fault in found.faults}
    assert names >= (
        {"keys and values swapped", "two layers swapped"} if kind == "prefix" else {"shifted by one position"}
    )


def test_a_base_model_that_vllm_does_not_attend_in_is_refused() -> None:
    assert [one.name for one in SERVER.obstacles(tiny_config("llama"))] == ["heads"]  # of 8
    assert [one.name for one in SERVER.obstacles(tiny_config("t5"))] == ["family"]
    assert [one.name for one in SERVER.obstacles(tiny_config("gpt_neox", hidden_size=128))] == ["family"]
    assert not SERVER.obstacles(config("llama"))


# --- one server with many prompts -------------------------------------------------------------------------------------

MARKER = 0
#: Name -> what makes it. Some are longer than a block (32), one fills blocks, and two fill a half.
PROMPTS: Mapping[str, Callable[[Any], SoftPrompt]] = {
    "mood": lambda geometry: random_prefix(geometry, 5, seed=1),
    "tone": lambda geometry: random_prefix(geometry, 5, seed=2),
    "topic": lambda geometry: random_prefix(geometry, 70, seed=3),
    "place": lambda geometry: random_prefix(geometry, 64, seed=4),
    "style": lambda geometry: random_input_prompt(geometry, 6, seed=5),
    "voice": lambda geometry: random_input_prompt(geometry, 6, seed=6),
}
#: Few and small blocks, and few tokens in a step: texts are cut into chunks, and requests are preempted.
PRESSED = {"block_size": 32, "num_gpu_blocks_override": 14, "max_num_batched_tokens": 64, "max_model_len": 256}
_GENERATOR = np.random.default_rng(0)
SHORT, LONG = (_GENERATOR.integers(3, 96, length).tolist() for length in (9, 75))
STEPS = 4


class Running:
    """An engine, a client of it, and the same base model in transformers."""

    def __init__(self, engine: Any, base: Any, directory: Path) -> None:
        self.engine, self.base, self.directory = engine, base, directory
        self.client = Prompts(directory, marker=MARKER)
        self._expected: dict[tuple[str | None, int], Any] = {}
        bare = [(None, text) for text in (SHORT, LONG)]
        self.bound = FACTOR * max(self.apart(one, *which) for one, which in zip(self.ask(bare), bare, strict=True))

    def ask(self, asked: Sequence[tuple[str | None, Sequence[int]]], steps: int = STEPS) -> list[Answer]:
        return answers(self.engine, [self.client.request(*one) for one in asked], steps)

    def expected(self, name: str | None, text: Sequence[int]) -> Any:
        """Log-probabilities [STEPS, V] of transformers, in float64."""
        key = (name, len(text))
        if key not in self._expected:
            model = self.base.double()
            if name is not None:
                prompt = sb.load(self.directory / name, base=model.config)
                model = sb.attach(model, prompt, self_check=False)
            ids, rows = torch.tensor([text]), []
            with torch.no_grad():
                for _ in range(STEPS):
                    logits = model(input_ids=ids).logits[0, -1]
                    rows.append(logits.log_softmax(-1).numpy())
                    ids = torch.cat([ids, logits.argmax()[None, None]], 1)
            if name is not None:
                sb.detach(model)
            self._expected[key] = np.stack(rows)
        return self._expected[key]

    def apart(self, answer: Answer, name: str | None, text: Sequence[int]) -> float:
        return float(np.abs(answer.log_probabilities - self.expected(name, text)).max())

    def raw(self, requests: Sequence[Mapping[str, Any]], steps: int = STEPS, **sampling: Any) -> list[Any]:
        """vLLM's own outputs."""
        from vllm import SamplingParams

        told = SamplingParams(temperature=0, max_tokens=steps, detokenize=False, ignore_eos=True, **sampling)
        found: list[Any] = self.engine.generate(list(requests), told, use_tqdm=False)
        return found


class TestOneServer:
    @pytest.fixture(scope="class")
    def running(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
        folder = tmp_path_factory.mktemp("vllm")
        base = tiny_model("llama", torch.float32, head_dim=32, max_position_embeddings=512)
        base.save_pretrained(folder / "base")
        for name, make in PROMPTS.items():
            prompt = make(BaseModel(base.config).geometry)
            sb.save(prompt, folder / "prompts" / name, format="softbridge", base=base.config)
        with started(folder / "base", Settings(str(folder / "prompts"), MARKER), **PRESSED) as engine:
            yield Running(engine, base, folder / "prompts")

    def test_each_prompt_is_served_alone_again_and_among_others(self, running: Running) -> None:
        """The second time, what the prefix cache has of it is read from there."""
        asked = [(name, text) for name in (None, *PROMPTS) for text in (SHORT, LONG)]
        for _ in range(2):
            found = [running.ask([one])[0] for one in asked]
            assert max(running.apart(one, *which) for one, which in zip(found, asked, strict=True)) <= running.bound
            found = running.ask(asked)
            assert max(running.apart(one, *which) for one, which in zip(found, asked, strict=True)) <= running.bound
        effects = {
            (name, other): float(np.abs(running.expected(name, SHORT) - running.expected(other, SHORT)).max())
            for name in (None, *PROMPTS)
            for other in PROMPTS
            if name != other
        }
        assert min(effects.values()) > 1e4 * running.bound, "no two of them could be mistaken for each other"

    def test_the_prefix_cache_is_used(self, running: Running) -> None:
        request = running.client.request("topic", LONG)
        running.raw([request])
        again = running.raw([request])[0].num_cached_tokens
        assert again == (70 + 75) // 32 * 32, "the prompt and the text behind it"
        assert running.raw([running.client.request("mood", SHORT)])[0].num_cached_tokens == 5

    def test_a_request_that_is_preempted_finds_its_prompt_again(
        self, running: Running, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from vllm.v1.core.sched.scheduler import Scheduler

        preempted: list[tuple[int, ...]] = []
        preempt = Scheduler._preempt_request

        def watched(self: Any, request: Any, *arguments: Any, **named: Any) -> Any:
            preempted.append(tuple(request.prompt_token_ids[:5]))
            return preempt(self, request, *arguments, **named)

        monkeypatch.setattr(Scheduler, "_preempt_request", watched)
        requests = [running.client.request(name, SHORT) for name in (None, *PROMPTS)]
        alone = [running.raw([one], 60)[0].outputs[0].token_ids for one in requests]
        assert not preempted
        together = [one.outputs[0].token_ids for one in running.raw(requests * 3, 60)]
        assert any(ids[0] == MARKER for ids in preempted), "a prefix among them"
        assert together == alone * 3

    def test_a_prompt_that_is_not_here_ends_its_request_alone(self, running: Running) -> None:
        good = [("mood", SHORT), (None, LONG), ("voice", SHORT)]
        known = running.client.placeholders("mood")
        for wrong in ([MARKER, 5, 6, 7], [MARKER], [MARKER] * 200, [*known[:-1], (known[-1] + 1) % 96, 5], list(known)):
            bad = {"prompt_token_ids": wrong}
            found = running.raw([bad, *[running.client.request(*one) for one in good], bad])
            assert [one.outputs[0].finish_reason for one in found] == ["error", "length", "length", "length", "error"]
            assert [list(one.outputs[0].token_ids) for one in (found[0], found[-1])] == [[], []]
            with pytest.raises(EngineError, match="ended a request"):
                answers(running.engine, [bad], STEPS)
        found = running.ask(good)
        assert max(running.apart(one, *which) for one, which in zip(found, good, strict=True)) <= running.bound

    def test_log_probabilities_of_placeholders_are_refused(self, running: Running) -> None:
        """vLLM reads no cache then: it would compute the placeholders as words."""
        (found,) = running.raw([running.client.request("mood", SHORT)], prompt_logprobs=1)
        assert (found.outputs[0].finish_reason, list(found.outputs[0].token_ids)) == ("error", [])
        (found,) = running.raw([running.client.request(None, SHORT)], prompt_logprobs=1)
        assert found.outputs[0].finish_reason == "length"
        assert len(found.prompt_logprobs) == len(SHORT)


# --- what does not start ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_model("llama", torch.float32, head_dim=32).save_pretrained(folder)
    return folder


def written(folder: Path, prompt: SoftPrompt) -> Path:
    for name, content in as_bytes(FORMAT.write(prompt, None)).items():
        (folder / "mood").mkdir(parents=True)
        (folder / "mood" / name).write_bytes(content)
    return folder


PREFIX = {"head_dim": 32}


def test_a_prompt_that_the_cache_would_round_does_not_start(tmp_path: Path, base: Path) -> None:
    geometry = BaseModel(tiny_config("llama", **PREFIX)).geometry
    folder = written(tmp_path / "wide", random_prefix(geometry))
    with (
        pytest.raises(EngineError, match="does not hold these numbers"),
        started(base, Settings(str(folder), 0), dtype="bfloat16"),
    ):
        pass
    folder = written(tmp_path / "exact", as_dtype(random_prefix(geometry), BFLOAT16))
    with started(base, Settings(str(folder), 0), dtype="bfloat16") as engine:
        found = answers(engine, [Prompts(folder, marker=0).request("mood", SHORT), {"prompt_token_ids": SHORT}], 2)
    assert np.abs(found[0].log_probabilities[0] - found[1].log_probabilities[0]).max() > 1


def test_a_prompt_for_another_base_model_does_not_start(tmp_path: Path, base: Path) -> None:
    other = BaseModel(tiny_config("llama", **PREFIX, num_hidden_layers=4)).geometry
    folder = written(tmp_path, random_prefix(other))
    with pytest.raises(BaseModelError, match="another base model"), started(base, Settings(str(folder))):
        pass


def test_a_server_that_would_compute_what_is_refused_does_not_start(tmp_path: Path, base: Path) -> None:
    folder = written(tmp_path, random_prefix(BaseModel(tiny_config("llama", **PREFIX)).geometry))
    arguments = transferring(Settings(str(folder)))
    arguments["kv_transfer_config"].kv_load_failure_policy = "recompute"
    with pytest.raises(EngineError, match="computed as a text"), started(base, Settings(str(folder)), **arguments):
        pass


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        ("kv_transfer_config.kv_load_failure_policy", "recompute", "kv_load_failure_policy"),
        ("cache_config.cache_dtype", "fp8", "a cache of fp8"),
        ("speculative_config", SimpleNamespace(), "speculative decoding"),
        ("parallel_config.decode_context_parallel_size", 2, "context parallelism"),
        ("parallel_config.prefill_context_parallel_size", 2, "context parallelism"),
        ("parallel_config.pipeline_parallel_size", 2, "pipeline parallelism"),
        ("groups", [1, 2], "several groups"),
        (None, None, None),
    ],
)
def test_settings_in_which_nobody_tried_prompts_are_refused(place: str | None, value: Any, reason: str | None) -> None:
    from softbridge_vllm.connector import check_server

    told = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_load_failure_policy="fail"),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        model_config=SimpleNamespace(dtype=torch.float32),
        speculative_config=None,
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1, prefill_context_parallel_size=1, pipeline_parallel_size=1
        ),
    )
    caches = SimpleNamespace(kv_cache_groups=value if place == "groups" else [1])
    if place is not None and place != "groups":
        *path, name = place.split(".")
        setattr(getattr(told, path[0]) if path else told, name, value)
    if reason is None:
        check_server(told, caches)
        return
    with pytest.raises(EngineError, match=reason):
        check_server(told, caches)


@pytest.mark.usefixtures("judged_here")
def test_a_name_that_is_not_served_is_refused(tmp_path: Path, base: Path) -> None:
    folder = written(tmp_path / "a", random_prefix(BaseModel(tiny_config("llama", **PREFIX)).geometry))
    (tmp_path / "scratch").mkdir()
    with SERVER.open(base, {"a mood": folder / "mood"}, tmp_path / "scratch") as ask:
        assert len(ask([Request(tuple(SHORT), "a mood"), Request(tuple(SHORT))], 2)) == 2
        with pytest.raises(EngineError, match="no prompt is called 'nobody'"):
            ask([Request(tuple(SHORT), "nobody")], 2)
