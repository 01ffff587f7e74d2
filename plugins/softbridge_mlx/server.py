"""mlx-lm as a server: a text alone through `generate_step`, several in one batch of `BatchGenerator`.

Both go on from a prompt cache. In a batch rows with other prompts, of other lengths, and without one stand together
(`mlx_lm/generate.py`). The model is loaded by `load_model`, which needs no tokenizer.

transformers 5 writes some settings under other names than mlx-lm 0.32 reads (``rope_parameters``), and mlx-lm then
takes its own defaults without a warning. `settings` gives them under the names that it reads.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from softbridge import untrusted
from softbridge.errors import BaseModelError, CheckpointError, EngineError, Obstacle
from softbridge.geometry import read_geometry
from softbridge.plugin.serving import Answer, Ask, Request
from softbridge_mlx.families import SLIDING, missed, windows
from softbridge_mlx.format import FORMAT, file_of
from softbridge_mlx.prompt_cache import PLAIN, ROTATING


class MlxServer:
    """mlx-lm's own models, loaded from a directory of transformers, in float32."""

    name = "mlx"
    summary = "mlx-lm: its own models, on prompt caches, alone and in batches"

    def unavailable(self) -> str | None:
        missing = [name for name in ("mlx", "mlx_lm") if find_spec(name) is None]
        return f"{' and '.join(missing)} not installed: pip install 'softbridge[mlx]'" if missing else None

    def version(self) -> str:
        import mlx.core as mx
        import mlx_lm

        return f"mlx-lm {mlx_lm.__version__}, mlx {mx.__version__}, float32, {mx.default_device().type.name}"

    def obstacles(self, config: Any) -> Sequence[Obstacle]:
        from mlx_lm.models.cache import make_prompt_cache

        elsewhere = "choose another server, or an engine"
        facts = config.to_dict()
        kind = facts["model_type"]
        if find_spec(_module(kind)) is None:
            return [Obstacle("family", f"mlx-lm has no model of {kind}", elsewhere)]
        try:  # nothing is computed: mlx makes its arrays when they are asked for
            made, arguments = _classes(facts)
            caches = make_prompt_cache(made(arguments.from_dict({**facts, **settings(facts)})))
        except (Exception, SystemExit) as error:  # its classes raise what they like, and OLMo's ends the program
            reason = f"mlx-lm's model of {kind} does not take this configuration: {error!r:.200}"
            return [Obstacle("model", reason, elsewhere)]
        others = sorted({type(one).__name__ for one in caches} - {PLAIN, ROTATING})
        if others:
            reason = f"mlx-lm's model of {kind} keeps more of a text than keys and values: {', '.join(others)}"
            return [Obstacle("cache", reason, elsewhere)]
        geometry = read_geometry(config)
        expected = windows(geometry) if geometry.decoder is not None else None
        found = tuple(getattr(one, "max_size", None) for one in caches)
        if found != expected:
            reason = f"mlx-lm's model of {kind} has windows of {found}, where {expected} were to be expected"
            return [Obstacle("window", reason, elsewhere)]
        return []

    @contextmanager
    def open(self, base: Path, prompts: Mapping[str, Path], scratch: Path) -> Iterator[Ask]:
        import mlx.core as mx
        import mlx_lm
        from mlx_lm.generate import BatchGenerator, generate_step
        from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache
        from mlx_lm.utils import load_model
        from transformers import AutoConfig

        geometry = read_geometry(AutoConfig.from_pretrained(base))
        facts = untrusted.Files(base).json("config.json")
        try:
            model, _ = load_model(base, model_config=settings(facts), get_model_classes=_classes)
        except Exception as error:  # its loader raises what it likes
            raise EngineError(
                f"mlx-lm does not load {base}: {error!r:.300}", "a base model that mlx-lm serves", "choose another"
            ) from error
        shapes = [(type(one).__name__, getattr(one, "max_size", None)) for one in make_prompt_cache(model)]
        held: dict[str, list[Any]] = {}
        for name, path in prompts.items():
            try:  # our own reader first: nothing of a file that it refuses is believed
                files = untrusted.Files(path)
                FORMAT.read(files, geometry)
            except (BaseModelError, CheckpointError) as error:
                raise EngineError(f"the prompt '{name}': {error.found}", error.expected, error.remedy) from error
            file = path if files.is_file else path / str(file_of(files))
            try:
                held[name] = list(load_prompt_cache(str(file)))
            except Exception as error:  # of a file of another release
                raise EngineError(
                    f"mlx-lm {mlx_lm.__version__} does not load the prompt '{name}': {error!r:.200}",
                    "a file in the layout of this release",
                    f"write it with another encoding: {', '.join(FORMAT.encodings)}",
                ) from error
            for one in held[name]:  # a batch has the precision of its first row's prompt, and would round the others
                one.keys, one.values = one.keys.astype(mx.float32), one.values.astype(mx.float32)
            found = [(type(one).__name__, getattr(one, "max_size", None)) for one in held[name]]
            if found != shapes:
                raise EngineError(
                    f"the prompt '{name}' has caches {found}", f"{shapes}, those of this model", "convert it again"
                )
        window, table = missed(geometry), facts.get("n_positions")

        def cache_of(request: Request, length: int) -> list[Any]:
            """A cache of its own for a request: mlx-lm writes into what it is given."""
            if request.prompt is not None and request.prompt not in held:
                raise EngineError(
                    f"no prompt is called '{request.prompt}'",
                    f"one of {', '.join(held) or 'none'}",
                    "open the server with its files",
                )
            cache: list[Any] = make_prompt_cache(model)
            if request.prompt is not None:
                cache = copy.deepcopy(held[request.prompt])
            seen = cache[0].offset + len(request.tokens) + length
            if window is not None and seen > window:
                raise EngineError(
                    f"{seen} tokens, the prompt's among them, and mlx-lm has no sliding window",
                    f"at most {window}, the window of {geometry.model_type} in transformers",
                    "ask with a shorter text",
                )
            if table is not None and seen > table:  # mlx reads what lies behind it
                raise EngineError(
                    f"{seen} tokens, the prompt's among them, and a table of {table} positions",
                    f"at most {table}",
                    "ask with a shorter text",
                )
            return cache

        def alone(request: Request, length: int) -> Answer:
            steps = generate_step(
                mx.array(request.tokens), model, max_tokens=length, prompt_cache=cache_of(request, length)
            )
            return _answer(list(steps))

        def together(requests: Sequence[Request], length: int) -> list[Answer]:
            caches = [cache_of(request, length) for request in requests]
            count = len(requests)
            batch = BatchGenerator(model, completion_batch_size=count, prefill_batch_size=count)
            try:
                ids = batch.insert([list(one.tokens) for one in requests], [length] * count, caches)
                steps: dict[int, list[tuple[int, Any]]] = {one: [] for one in ids}
                while any(len(found) < length for found in steps.values()):
                    for response in batch.next_generated():
                        steps[response.uid].append((response.token, response.logprobs))
            finally:
                batch.close()
            return [_answer(steps[one]) for one in ids]

        def ask(requests: Sequence[Request], length: int) -> Sequence[Answer]:
            return [alone(requests[0], length)] if len(requests) == 1 else together(requests, length)

        yield ask


def _classes(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """mlx-lm's classes of a model and of its settings.

    That of GPT-2 knows the names of the weights that were published first, without those of the parts of
    transformers' class.
    """
    code = import_module(_module(config["model_type"]))
    if config["model_type"] != "gpt2":
        return code.Model, code.ModelArgs

    class Model(code.Model):  # type: ignore[name-defined, misc]
        def sanitize(self, weights: Mapping[str, Any]) -> Any:
            return super().sanitize({name.removeprefix("transformer."): one for name, one in weights.items()})

    return Model, code.ModelArgs


def _module(family: str) -> str:
    from mlx_lm.utils import MODEL_REMAPPING

    return f"mlx_lm.models.{MODEL_REMAPPING.get(family, family)}"


def _answer(steps: Sequence[tuple[int, Any]]) -> Answer:
    rows = [np.array(row, dtype=np.float64) for _, row in steps]
    return Answer(np.array([token for token, _ in steps]), np.stack(rows))


def settings(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a transformers configuration under the names that mlx-lm reads, where they are not there already.

    Args:
        facts: what config.json holds.
    """
    found: dict[str, Any] = {}
    if "n_positions" in facts:
        found["n_ctx"] = facts["n_positions"]
    rope = facts.get("rope_parameters") or {}
    local, whole = rope.get(SLIDING), rope.get("full_attention", rope)
    if local is not None:
        found["rope_local_base_freq"] = local["rope_theta"]
    if "rope_theta" in whole:
        found["rope_theta"] = found["rotary_emb_base"] = whole["rope_theta"]
        scaled = whole.get("rope_type", "default") != "default"
        found["rope_scaling"] = (
            {name: value for name, value in whole.items() if name != "rope_theta"} if scaled else None
        )
        if "partial_rotary_factor" in whole:
            found["partial_rotary_factor"] = found["rotary_pct"] = whole["partial_rotary_factor"]
    kinds = facts.get("layer_types") or []
    if SLIDING in kinds:  # every so manieth layer has none
        found["sliding_window_pattern"] = (
            kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds) + 1
        )
    return {name: value for name, value in found.items() if name not in facts}


SERVER = MlxServer()
