"""Runs a prompt with AdapterHub itself, unmodified: `adapters.init`, `add_adapter` or `load_adapter`, and
`set_active_adapters`.

Three things are done around the toolkit, because it computes another function without them (each is shown in
`softbridge_compat.adapterhub_defects`): attention is switched to ``eager``; the key/value cache is switched off where
the toolkit never fills it; and tokens that do not start at 0 are moved by a hook on the module that receives
their positions.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from softbridge.base import BaseModel
from softbridge.errors import EngineError, Obstacle
from softbridge.geometry import Geometry, read_geometry
from softbridge.prompt import KeyValuePrefix, SoftPrompt
from softbridge.tensors import from_torch, to_torch
from softbridge_adapterhub import facts
from softbridge_adapterhub.format import CAPABILITIES

log = logging.getLogger(__name__)

#: The name of the adapter that `attach` adds.
ADAPTER = "softbridge"
_ATTACHMENT = "_softbridge_adapterhub"

#: The bottleneck of the prefix that `train_example` trains, and the standard deviation of its keys and values: large
#: enough for a prefix that is dropped or misplaced to show.
EXAMPLE_BOTTLENECK = 16
EXAMPLE_STD = 0.7


class AdapterHubEngine:
    """AdapterHub's own prefix tuning. The model is changed in place, and given back as it was."""

    name = "adapterhub"
    summary = "AdapterHub's package `adapters`, unmodified"
    capabilities = CAPABILITIES

    def unavailable(self) -> str | None:
        # Once imported, the package has no spec to be found.
        if "adapters" not in sys.modules and importlib.util.find_spec("adapters") is None:
            return "AdapterHub is not installed (the extra 'adapterhub' brings it; it pins a release of transformers)"
        return None

    def obstacles(self, prompt: SoftPrompt, model: Any) -> Sequence[Obstacle]:
        """See `Engine.obstacles`."""
        if hasattr(model, "adapters_config"):
            remedy = "give a plain transformers model; detach the first prompt"
            return [Obstacle("attached", "the model already carries AdapterHub's modules", remedy)]
        geometry = read_geometry(model.config)
        found = facts.obstacles(prompt, geometry)
        window = geometry.decoder.window if geometry.decoder is not None else None
        if window is not None and prompt.positions.window == "slides" and window < model.config.max_position_embeddings:
            reason = f"AdapterHub's prefix never slides out of the model's window of {window} tokens"
            found.append(Obstacle("window", reason, "choose another engine"))
        return found

    def attach(self, model: Any, prompt: SoftPrompt) -> Any:
        """Attach in place. See `Engine.attach`."""
        self._check(model, prompt)
        snapshot = _Snapshot(model)
        try:
            geometry = _run(model, prompt, lambda geometry: _add(model, prompt, geometry))
        except BaseException:
            snapshot.restore()
            raise
        setattr(model, _ATTACHMENT, _Attachment(prompt, geometry, snapshot))
        return model

    def load(self, model: Any, prompt: SoftPrompt, directory: Path) -> Any:
        """Run files with AdapterHub's own loader, `load_adapter`: the prefix comes from there.

        AdapterHub holds it in float32, and a perceptron is evaluated in float32; the keys and values that come of it
        are converted to the model's dtype, exactly where that is wider. A prediction head is not loaded, as none is
        read.

        Args:
            model: one that nothing else needs, it cannot be detached.
            prompt: what softbridge read from the same files; it says where the tokens stand.
            directory: as AdapterHub wrote it.

        Raises:
            EngineError: as for `attach`, or the files do not hold all that AdapterHub needs.
        """
        self._check(model, prompt)
        _run(model.eval(), prompt, lambda geometry: _load(model, directory))
        return model.eval()

    def _check(self, model: Any, prompt: SoftPrompt) -> None:
        """Raise an `EngineError` if AdapterHub is not there, or cannot run this."""
        reason = self.unavailable()
        if reason is not None:
            raise EngineError(reason, "an environment that holds AdapterHub", "install it, or choose another engine")
        obstacles = self.obstacles(prompt, model)
        if obstacles:
            raise EngineError(
                "AdapterHub cannot run this prompt on this model: "
                + "; ".join(f"[{obstacle.name}] {obstacle.reason}" for obstacle in obstacles),
                "a prompt that AdapterHub can express",
                "; ".join(dict.fromkeys(obstacle.remedy for obstacle in obstacles)),
            )

    def extract(self, model: Any) -> SoftPrompt:
        """The flat prefix as it is now, in the model's dtype. See `Engine.extract`."""
        attachment = _attachment(model)
        kv_heads, head_dim = facts.toolkit_shape(attachment.geometry)
        pool = model.base_model.prefix_tuning.prefix_tunings[ADAPTER]
        parts = tuple(
            KeyValuePrefix.from_flat(
                part.site, from_torch(pool[location].control_trans), tuple(part.layers), kv_heads, head_dim
            )
            for location, part in facts.prefixes_by_location(attachment.prompt, attachment.geometry).items()
        )
        return SoftPrompt(parts, attachment.prompt.positions, attachment.prompt.base)

    def detach(self, model: Any) -> Any:
        """Give the model back as `attach` met it: classes, modules, hooks, configuration and what is frozen.

        Values of its own parameters are not touched, so training them in between is kept. What stays is outside the
        model: `adapters.init` adds aliases to the attribute map of the configuration's class.
        """
        _attachment(model).snapshot.restore()
        return model

    def train_example(self, model: Any, method: str, directory: Path, *, length: int, steps: int, seed: int) -> None:
        """Train a prefix: reparameterised (``prefix-tuning``) or ``prefix-tuning-flat``. See `Engine.train_example`."""
        if method not in ("prefix-tuning", "prefix-tuning-flat"):
            raise EngineError(f"the method '{method}'", "prefix-tuning, or prefix-tuning-flat", "choose one of these")
        kind = model.config.model_type
        if kind not in facts.MODEL_TYPES:
            raise EngineError(
                f"a model of type '{kind}'", f"one of {', '.join(sorted(facts.MODEL_TYPES))}", "choose another engine"
            )
        import adapters
        import torch

        task = BaseModel.resolve(model).task
        _make_eager(model)
        adapters.init(model)
        config = adapters.PrefixTuningConfig(
            flat=method == "prefix-tuning-flat", prefix_length=length, bottleneck_size=EXAMPLE_BOTTLENECK
        )
        model.add_adapter("example", config=config)
        model.train_adapter("example")
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            with torch.no_grad():
                for name, parameter in trained:
                    kept = EXAMPLE_STD if config.flat else 1.0 if name.endswith("wte.weight") else 0
                    parameter.copy_((kept or parameter.shape[-1] ** -0.5) * torch.randn(parameter.shape))
            optimizer = torch.optim.Adam([parameter for _, parameter in trained], lr=0.01)
            tokens = torch.randint(3, model.config.vocab_size, (4, 9))
            labels = torch.randint(0, model.config.num_labels, (4,)) if task == "sequence-classification" else tokens
            for _ in range(steps):
                optimizer.zero_grad()
                model(input_ids=tokens, labels=labels).loss.backward()
                optimizer.step()
        model.eval()
        model.save_adapter(str(directory), "example", with_head=False)


ENGINE = AdapterHubEngine()


class _Snapshot:
    """Everything that AdapterHub changes in a model: classes, submodules, hooks, configurations, what is frozen.

    It holds references, no copies of weights. Dictionaries keep their identity, so that a hook's handle still removes
    the hook after `restore`.
    """

    def __init__(self, model: Any) -> None:
        holders = {id(holder): holder for holder in _holders(model)}.values()
        self.states = [
            (
                holder,
                type(holder),
                {
                    name: (value, dict(value) if isinstance(value, dict) else None)
                    for name, value in vars(holder).items()
                },
            )
            for holder in holders
        ]
        self.frozen = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore(self) -> None:
        for holder, kind, state in self.states:
            if type(holder) is not kind:
                holder.__class__ = kind
            attributes = vars(holder)
            attributes.clear()
            for name, (value, items) in state.items():
                if items is not None:
                    value.clear()
                    value.update(items)
                attributes[name] = value
        for parameter, requires_grad in self.frozen:
            parameter.requires_grad_(requires_grad)


@dataclass
class _Attachment:
    """What `extract` and `detach` need to know of an attached model."""

    prompt: SoftPrompt
    geometry: Geometry
    snapshot: _Snapshot


def _attachment(model: Any) -> _Attachment:
    attachment = getattr(model, _ATTACHMENT, None)
    if not isinstance(attachment, _Attachment):
        raise EngineError(
            "no prompt is attached to this model by engine 'adapterhub'",
            "a model that `attach` returned",
            "attach first",
        )
    return attachment


def _holders(model: Any) -> Iterator[Any]:
    for module in model.modules():
        yield module
        if hasattr(module, "config"):
            yield module.config
        if getattr(module, "generation_config", None) is not None:
            yield module.generation_config


def _run(model: Any, prompt: SoftPrompt, put: Callable[[Geometry], None]) -> Geometry:
    """Make the model run with the adapter `ADAPTER` that `put` puts in, and with tokens where the prompt has them."""
    import adapters

    geometry = read_geometry(model.config)
    if _make_eager(model):
        _say("attention is switched to 'eager': AdapterHub's prefix under other implementations is another function")
    adapters.init(model)
    put(geometry)
    model.set_active_adapters(ADAPTER)
    starts = {start for start in prompt.positions.start.values() if start != 0}
    if starts and geometry.model_type in facts.POSITION_INPUTS:
        _move_tokens(model, *facts.POSITION_INPUTS[geometry.model_type], starts.pop())
    if geometry.decoder is not None and _cache_stays_empty(model):
        _say(
            "the key/value cache is switched off: AdapterHub never fills it on this model, and decoding would be wrong"
        )
        model.config.use_cache = False
        if model.generation_config is not None:
            model.generation_config.use_cache = False
    return geometry


def _add(model: Any, prompt: SoftPrompt, geometry: Geometry) -> None:
    """Add a flat prefix with the prompt's numbers, in the model's dtype."""
    import adapters
    import torch

    layers = {part.site: tuple(part.layers) for part in prompt.prefixes}
    config = adapters.PrefixTuningConfig(
        flat=True, prefix_length=prompt.prefixes[0].length, **facts.config_of(layers, geometry)
    )
    model.add_adapter(ADAPTER, config=config)
    pool = model.base_model.prefix_tuning.prefix_tunings[ADAPTER]
    for location, part in facts.prefixes_by_location(prompt, geometry).items():
        values = to_torch(part.flat().reshape(-1)).to(model.device, model.dtype)
        pool[location].control_trans = torch.nn.Parameter(values)


def _load(model: Any, directory: Path) -> None:
    """Let AdapterHub load its file."""
    names = [name for name in (facts.WEIGHTS_FILE, facts.SAFE_WEIGHTS_FILE) if (directory / name).is_file()]
    if not names:  # AdapterHub would ask the hub
        expected = f"{facts.WEIGHTS_FILE} or {facts.SAFE_WEIGHTS_FILE}"
        raise EngineError(f"no weights in {directory}", expected, "give AdapterHub's directory")
    headed = "with_head" in inspect.signature(model.load_adapter).parameters
    found: dict[str, list[str]] = {}
    model.load_adapter(
        str(directory.absolute()),
        load_as=ADAPTER,
        use_safetensors=names[0] == facts.SAFE_WEIGHTS_FILE,
        loading_info=found,
        **({"with_head": False} if headed else {}),
    )
    # Under the attention modules are the same objects again. What is missing AdapterHub leaves random, without a word.
    missing = [key for key in found["missing_keys"] if ".pool." not in key]
    if missing:
        raise EngineError(
            f"AdapterHub does not find {', '.join(missing)} in {directory / names[0]}",
            "a file that holds the whole prefix",
            "save the adapter again with AdapterHub's save_adapter",
        )
    for prefix in model.base_model.prefix_tuning.prefix_tunings[ADAPTER].values():
        prefix.to(model.device).register_forward_hook(_convert(model.dtype))


def _convert(dtype: Any) -> Callable[..., Any]:
    """A forward hook that converts a prefix, once it is computed."""

    def convert(prefix: Any, args: tuple[Any, ...], pairs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(pair.to(dtype) for pair in pairs)

    return convert


def _make_eager(model: Any) -> bool:
    """Switch a model to eager attention, and say whether that changed anything.

    Older modelling code picks the attention's class when the model is built: there, too, the class is changed to the
    eager one that it is derived from.
    """
    changed = False
    for holder in _holders(model):
        if getattr(holder, "_attn_implementation", None) not in (None, "eager"):
            holder._attn_implementation = "eager"
            changed = True
        if getattr(holder, "attn_implementation", None) == "sdpa":
            holder.attn_implementation = "eager"
        if "Sdpa" in type(holder).__name__:
            holder.__class__ = type(holder).__mro__[1]
    return changed


def _move_tokens(model: Any, suffix: str, argument: int | str, start: int) -> None:
    """Add `start` to the positions that reach the modules whose name ends in `suffix`."""

    def move(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if isinstance(argument, int):
            return (*args[:argument], args[argument] + start, *args[argument + 1 :]), kwargs
        return args, {**kwargs, argument: kwargs[argument] + start}

    modules = [module for name, module in model.named_modules() if f".{name}".endswith(suffix)]
    if not modules:
        raise EngineError(
            f"a model without any module called '*{suffix}'", "one that receives the tokens' positions", "report this"
        )
    for module in modules:
        module.register_forward_pre_hook(move, with_kwargs=True)


def _cache_stays_empty(model: Any) -> bool:
    """Whether the model returns a key/value cache that holds nothing, tried with two tokens."""
    import torch

    tokens = torch.zeros((1, 2), dtype=torch.long, device=model.device)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens
    with torch.random.fork_rng(), torch.no_grad():
        past = getattr(model(**inputs, use_cache=True), "past_key_values", None)
    if past is None or isinstance(past, tuple):  # no cache at all, or one of tensors
        return False
    return int(past.get_seq_length()) == 0


@cache
def _say(message: str) -> None:
    log.warning(message)
