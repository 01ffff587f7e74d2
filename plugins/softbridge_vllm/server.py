"""vLLM in this process, in float32, for the judge: named prefixes by the connector, input prompts as vectors."""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from softbridge.errors import EngineError, Obstacle, SoftbridgeError, few
from softbridge.geometry import read_geometry
from softbridge.plugin.serving import Answer, Ask, Request
from softbridge_vllm.client import Prompts
from softbridge_vllm.format import FILE
from softbridge_vllm.settings import Settings
from softbridge_vllm.shelf import SUFFIX

#: Set while it runs. The engine in this process, on the threads that torch has here; nothing is sent anywhere.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
#: How many tokens a request may have, if the base model has as many positions.
LONGEST = 1024


class VllmServer:
    """vLLM with the connector of `softbridge_vllm.connector`."""

    name = "vllm"
    summary = "vLLM in this process, in float32"

    def unavailable(self) -> str | None:
        return None if importlib.util.find_spec("vllm") else "vLLM is not installed"

    def version(self) -> str:
        import vllm
        from vllm.platforms import current_platform

        return f"vllm {vllm.__version__} on {current_platform.device_name}, float32"

    def obstacles(self, config: Any) -> Sequence[Obstacle]:
        geometry = read_geometry(config)
        if geometry.decoder is None or geometry.encoder is not None:
            return [Obstacle("family", f"vLLM's connectors do not serve {geometry.model_type}", "choose a decoder")]
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        from vllm import ModelRegistry
        from vllm.platforms import current_platform

        model = ModelRegistry.models.get(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(geometry.model_type))
        if model is None or getattr(model, "class_name", "").startswith("Transformers"):
            reason = (
                f"vLLM has no {geometry.model_type} of its own and runs that of transformers, whose classes it changes "
                "in this process: nothing is left to compare with"
            )
            return [Obstacle("family", reason, "choose a base model that vLLM has; such a prompt is served, unjudged")]
        if current_platform.is_cpu():
            from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

            sizes, found = CPUAttentionBackend.get_supported_head_sizes(), geometry.decoder.head_dim
            if found not in sizes:
                reason = f"heads of {found} in {geometry.model_type}, and vLLM attends on a CPU in {sizes}"
                return [Obstacle("heads", reason, "choose a base model with such heads")]
        return []

    @contextmanager
    def open(self, base: Path, prompts: Mapping[str, Path], scratch: Path) -> Iterator[Ask]:
        numbers = {name: str(number) for number, name in enumerate(prompts)}  # names need not be names of files
        for name, path in prompts.items():
            file = path if path.is_file() else path / FILE
            shutil.copyfile(file, scratch / f"{numbers[name]}{SUFFIX}")
        settings = Settings(str(scratch), _marker(base)) if prompts else None
        with started(base, settings) as engine:
            shelf = None if settings is None else Prompts(scratch, marker=settings.marker)

            def request(one: Request) -> dict[str, Any]:
                if one.prompt is not None and one.prompt not in numbers:
                    raise EngineError(
                        f"no prompt is called '{one.prompt}'", f"one of {few(numbers)}", "serve it, or ask for another"
                    )
                if shelf is None:
                    return {"prompt_token_ids": list(one.tokens)}
                return shelf.request(one.prompt and numbers[one.prompt], one.tokens)

            def ask(requests: Sequence[Request], length: int) -> Sequence[Answer]:
                return answers(engine, [request(one) for one in requests], length)

            yield ask


SERVER = VllmServer()


@contextmanager
def started(base: Path, settings: Settings | None, **changes: Any) -> Iterator[Any]:
    """vLLM's own ``LLM`` of a base model, with the prompts that the settings say, or without any.

    Args:
        changes: arguments of ``LLM``, instead of those here.

    Raises:
        EngineError: it does not start. What the connector raises, too.
    """
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        raise EngineError(
            "a process that belongs to a torch.distributed group, which vLLM would take for its own",
            "a process of its own",
            "judge what was written in another process",
        )
    with _environment():
        from vllm import LLM

        arguments: dict[str, Any] = {
            "model": str(base),
            "dtype": "float32",
            "skip_tokenizer_init": True,
            "enforce_eager": True,
            "seed": 0,
            "max_logprobs": -1,
            "max_model_len": min(LONGEST, getattr(_config(base), "max_position_embeddings", None) or LONGEST),
            "max_num_seqs": 64,
            "enable_prompt_embeds": settings is not None,
            **({} if settings is None else transferring(settings)),
            **changes,
        }
        try:
            engine = LLM(**arguments)
        except SoftbridgeError:
            _close()
            raise
        except Exception as error:
            _close()
            raise EngineError(
                f"vLLM does not start: {error!s:.400}", "a server", "see its own log: VLLM_LOGGING_LEVEL=INFO"
            ) from error
        try:
            yield engine
        finally:
            engine.llm_engine.engine_core.shutdown()
            _close()


def transferring(settings: Settings) -> dict[str, Any]:
    """The arguments of ``LLM`` that load the connector."""
    from vllm.config import KVTransferConfig

    return {
        "kv_transfer_config": KVTransferConfig(
            kv_connector="PromptConnector",
            kv_connector_module_path="softbridge_vllm.connector",
            kv_role="kv_both",
            kv_connector_extra_config=settings.to_json(),
        ),
        "disable_hybrid_kv_cache_manager": True,
    }


def answers(engine: Any, requests: Sequence[Mapping[str, Any]], length: int) -> list[Answer]:
    """What a running ``LLM`` answers to requests in one batch, with so many tokens each.

    Raises:
        EngineError: it refuses one.
    """
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, logprobs=-1, detokenize=False, ignore_eos=True, max_tokens=length)
    try:
        found = engine.generate(list(requests), sampling, use_tqdm=False)
    except ValueError as error:  # so vLLM says that a request is too long, or that its ids are none
        raise EngineError(f"vLLM refuses a request: {error!s:.400}", "one that it answers", "correct it") from error
    return [_answer(one) for one in found]


def _config(base: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(base).get_text_config()


def _marker(base: Path) -> int | None:
    """A token with which no text begins, as far as the base model's configuration says."""
    config = _config(base)
    special = (getattr(config, name, None) for name in ("pad_token_id", "eos_token_id"))
    return next((one for one in special if type(one) is int and 0 <= one < config.vocab_size), None)


def _answer(output: Any) -> Answer:
    (made,) = output.outputs
    if made.finish_reason == "error":
        raise EngineError(
            "vLLM ended a request with an error", "an answer", "its log says why: VLLM_LOGGING_LEVEL=INFO"
        )
    steps = [[step[token].logprob for token in range(len(step))] for step in made.logprobs]
    return Answer(np.array(made.token_ids), np.array(steps, np.float64))


@contextmanager
def _environment() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def _close() -> None:
    """Leave nothing behind that would keep another one from starting in this process."""
    from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    ensure_kv_transfer_shutdown()
    cleanup_dist_env_and_memory()
    gc.collect()
