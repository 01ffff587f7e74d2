"""The connector that an unmodified vLLM loads: prefixes by name, written into the engine's own cache.

vLLM imports this module (``kv_connector_module_path``), and nothing else does: it is the one that imports vLLM at its
top. The interface is that of `vllm/distributed/kv_transfer/kv_connector/v1/base.py`.

In the scheduler a request that begins with a prompt's ids is told to have P tokens computed already. In each worker,
before the forward of that step, the backend's own writer (`do_kv_cache_update`) puts the prefix into the blocks that
the request has. So the layout of the cache is the backend's business. A request that was preempted has other blocks
when it comes back, and the prefix is written again.

A request that names no known prompt is reported as a load that failed, which ends it with an error: it is never
computed as a text. A load that failed must not be recomputed (``kv_load_failure_policy``), which would be just that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index

from softbridge.arrays import to_torch
from softbridge.errors import EngineError
from softbridge.geometry import read_geometry
from softbridge_vllm.heads import heads_of
from softbridge_vllm.requests import Desk, slots
from softbridge_vllm.settings import Settings
from softbridge_vllm.shelf import Named, check_apart, numbers_of, read_shelf

logger = init_logger(__name__)


@dataclass(frozen=True)
class Load:
    """What one request needs before its first forward: of a prompt (by its digest) the tokens from `start` to P."""

    digest: str
    blocks: tuple[int, ...]
    start: int
    stop: int


@dataclass
class Step(KVConnectorMetadata):  # type: ignore[misc]
    """What the scheduler tells the workers: the loads of this step, and the requests that are refused."""

    loads: list[Load] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)


class PromptConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """Serves the prefixes of a directory. ``kv_connector_extra_config`` is documented in `Settings`.

    Raises:
        EngineError: vLLM is set up in a way in which prompts would not be what they are, or a prompt's dtype is not
            the cache's. What `read_shelf` raises, too.
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: Any = None) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        told = Settings.of(self._kv_transfer_config.kv_connector_extra_config)
        check_server(vllm_config, kv_cache_config)
        self._size = int(kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size)
        geometry = read_geometry(vllm_config.model_config.hf_config)
        prompts = read_shelf(told.directory, geometry, told.marker).values()
        check_apart(prompts, self._size)
        dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
        # Looked at in every process, and kept by the workers alone.
        numbers = {one.digest: numbers_of(one, dtype, rounded=told.rounded) for one in prompts if one.is_prefix}
        self._desk = Desk(prompts)
        self._numbers = numbers if role == KVConnectorRole.WORKER else {}
        self._layers: dict[int, Attention] = {}
        self._cut: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._found: dict[str, Named | EngineError] = {}
        self._step = Step()
        logger.info("softbridge serves %s", ", ".join(one.name for one in prompts))

    # --- in the scheduler ---

    def on_new_request(self, request: Any) -> None:
        """Find out which prompt a request names, and refuse it if that cannot be served."""
        found: Named | EngineError | None
        try:
            found = named = self._desk.named(_ids(request))
            if named is not None and request.skip_reading_prefix_cache:
                raise EngineError(
                    f"a request for '{named.name}' that lets no cache be read, as prompt_logprobs do",
                    "a request whose placeholders are not computed as if they were words",
                    "ask without prompt_logprobs",
                )
        except EngineError as error:
            logger.error("softbridge refuses request %s: %s", request.request_id, error)
            found = error
        if found is not None:
            self._found[request.request_id] = found
            request.skip_reading_prefix_cache = False  # vLLM would not ask us, and compute the placeholders

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """How many tokens more than these are there, and whether they come later: a refused request waits for all."""
        found = self._found.get(request.request_id)
        if isinstance(found, EngineError):
            return request.num_tokens - num_computed_tokens, True
        return (0 if found is None else max(0, found.length - num_computed_tokens)), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Remember what is to be loaded, and where to."""
        found = self._found.get(request.request_id)
        if isinstance(found, EngineError):
            self._step.refused.add(request.request_id)
        elif found is not None and num_external_tokens > 0:
            (own,) = blocks.get_block_ids()
            used = tuple(own[: -(-found.length // self._size)])
            self._step.loads.append(Load(found.digest, used, found.length - num_external_tokens, found.length))

    def build_connector_meta(self, scheduler_output: Any) -> Step:
        """What was remembered since the last step."""
        step, self._step = self._step, Step()
        return step

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Forget it."""
        self._found.pop(request.request_id, None)
        return False, None

    # --- in each worker ---

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Find this worker's layers, and cut out of each prompt what they have of it.

        Raises:
            EngineError: a layer is not one that a prefix can be written into.
        """
        layers = self._vllm_config.compilation_config.static_forward_context
        rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        for name in kv_caches:
            layer = layers[name]
            if not isinstance(layer, Attention) or not hasattr(layer.impl, "do_kv_cache_update"):
                raise _unservable(f"{name}, {type(layer).__name__} without a writer of its own for its cache")
            self._layers[extract_layer_index(name)] = layer
        if len(self._layers) != len(kv_caches):
            raise _unservable(f"{len(kv_caches)} caches in {len(self._layers)} layers")
        for digest, numbers in self._numbers.items():
            for number, layer in self._layers.items():
                heads = numbers[number][0].shape[1]
                own = heads_of(rank, ranks, heads)
                keys, values = (to_torch(np.ascontiguousarray(half[:, own])) for half in numbers[number])
                if tuple(keys.shape[1:]) != (layer.num_kv_heads, layer.head_size):
                    raise _unservable(
                        f"layer {number} with {layer.num_kv_heads} heads of {layer.head_size}, and a prompt with "
                        f"{list(keys.shape[1:])} for rank {rank} of {ranks}"
                    )
                device = _cache(layer).device
                self._cut[digest, number] = (keys.to(device), values.to(device))
        self._numbers = {}

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Write what this step's requests need into their blocks, all of them at once in each layer."""
        loads = self._metadata().loads
        if not loads:
            return
        places, numbers = zip(*(slots(load.blocks, self._size, load.start, load.stop) for load in loads), strict=True)
        device = _cache(next(iter(self._layers.values()))).device
        where = torch.from_numpy(np.concatenate(places)).to(device)
        which = [torch.from_numpy(used).to(device) for used in numbers]
        for number, layer in self._layers.items():
            pairs = [self._cut[load.digest, number] for load in loads]
            keys, values = (
                torch.cat([pair[side][used] for pair, used in zip(pairs, which, strict=True)]) for side in (0, 1)
            )
            layer.impl.do_kv_cache_update(layer, keys, values, _cache(layer), where)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """What was refused has failed."""
        refused = set(self._metadata().refused)
        return KVConnectorTransferResults(finished_recving=refused, failed_recving=set(refused))

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: it was written before the forward."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is saved."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""

    def _metadata(self) -> Step:
        step = self._get_connector_metadata()
        assert isinstance(step, Step)
        return step


def _ids(request: Any) -> Sequence[int]:
    """The token ids of a request; -1 where it brings a vector instead."""
    ids, real = request.prompt_token_ids or [], request.prompt_is_token_ids
    if real is None:
        return ids if request.prompt_embeds is None else []
    return [token if is_token else -1 for token, is_token in zip(ids, real, strict=True)]


def _cache(layer: Attention) -> torch.Tensor:
    held: Any = layer.kv_cache
    cache: torch.Tensor = held[0] if isinstance(held, (list, tuple)) else held
    return cache


def _unservable(found: str) -> EngineError:
    return EngineError(
        found, "one cache of keys and values for each layer", "serve input prompts, or another base model"
    )


def check_server(vllm_config: VllmConfig, kv_cache_config: Any) -> None:
    """Refuse what nobody tried, or what would serve a prompt as something else. Raises `EngineError`."""
    transfer, cache, parallel = (
        vllm_config.kv_transfer_config,
        vllm_config.cache_config,
        vllm_config.parallel_config,
    )
    dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
    ranks = parallel.decode_context_parallel_size * parallel.prefill_context_parallel_size
    faults = {
        "kv_load_failure_policy other than 'fail': a refused request would be computed as a text": (
            transfer is None or transfer.kv_load_failure_policy != "fail"
        ),
        f"a cache of {cache.cache_dtype}, and a model of {dtype}": cache.cache_dtype not in ("auto", dtype),
        "several groups of caches": len(kv_cache_config.kv_cache_groups) != 1,
        "speculative decoding": vllm_config.speculative_config is not None,
        "context parallelism": ranks > 1,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
    }
    found = [text for text, holds in faults.items() if holds]
    if found:
        raise EngineError(
            "vLLM with " + "; ".join(found), "a server in which prompts were tried", "change that setting"
        )
