"""Runs a prompt with AdapterHub itself, unmodified: `adapters.init`, `add_adapter` or `load_adapter`, and
`set_active_adapters`.

Three things are done around the toolkit, because it computes another function without them (each is shown in
`softbridge_compat.adapterhub_defects`): attention is switched to ``eager``; the key/value cache is switched off where
the toolkit never fills it, or fails with it; and tokens that do not start at 0 are moved by a hook on the module that
receives their positions. And logits and labels are those of real tokens: AdapterHub has them of virtual tokens, too.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from softbridge.arrays import from_torch, to_torch
from softbridge.base import BaseModel
from softbridge.base.head import load_head
from softbridge.base.snapshot import Snapshot
from softbridge.errors import EngineError, Obstacle, SoftbridgeError
from softbridge.geometry import Geometry, read_geometry
from softbridge.lowering.expressible import left_behind
from softbridge.methods import float32_parameterisation
from softbridge.prompt import SoftPrompt
from softbridge.untrusted import Files
from softbridge_adapterhub import composition, facts
from softbridge_adapterhub.adapter import FLAT, Adapter
from softbridge_adapterhub.format import CAPABILITIES, FORMAT, folder_of
from softbridge_adapterhub.hooks import (
    hide_virtual_tokens,
    make_eager,
    move_tokens,
    once,
    refuse_cache,
    say_once,
)

#: The name of the adapter that `attach` adds.
ADAPTER = "softbridge"
_ATTACHMENT = "_softbridge_adapterhub"

#: The bottleneck of the prefix that `train_example` trains, and the standard deviation of keys and values, or of
#: vectors in the input: large enough for a prompt that is dropped or misplaced to show.
EXAMPLE_BOTTLENECK = 16
EXAMPLE_STD = 0.7

#: What `train_example` can train: method -> settings of a prefix, or None for prompt tuning.
METHODS: dict[str, dict[str, Any] | None] = {
    "prefix-tuning": {},
    "prefix-tuning-flat": {"flat": True},
    "prefix-tuning-gated": {"use_gating": True, "shared_gating": False},
    "prompt-tuning": None,
}


class AdapterHubEngine:
    """AdapterHub's own prefix and prompt tuning. The model is changed in place, and given back as it was."""

    name = "adapterhub"
    summary = "AdapterHub's package `adapters`, unmodified"
    capabilities = replace(CAPABILITIES, left_pads=False)

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
        geometry, kind = read_geometry(model.config), model.config.model_type
        if kind != geometry.model_type and kind not in facts.MODEL_TYPES:
            reason = f"AdapterHub has no models of type '{kind}', of which a '{geometry.model_type}' is but a part"
            return [Obstacle("model", reason, "choose another engine")]
        found = facts.obstacles(prompt, geometry)
        window = geometry.decoder.window if geometry.decoder is not None else None
        if window is not None and prompt.positions.window == "slides" and window < model.config.max_position_embeddings:
            reason = f"AdapterHub's prefix never slides out of the model's window of {window} tokens"
            found.append(Obstacle("window", reason, "choose another engine"))
        if prompt.inputs and geometry.model_type in facts.PROMPT_UNSOUND:
            why = facts.PROMPT_UNSOUND[geometry.model_type]
            reason = f"AdapterHub's prompt tuning of '{geometry.model_type}' {why}"
            found.append(Obstacle("attention", reason, "choose another engine"))
        groups = getattr(model.config, "num_hidden_groups", 1) * getattr(model.config, "inner_group_num", 1)
        if geometry.model_type in facts.SHARED_LAYERS and groups > 1:
            reason = f"the model has {groups} groups of layers, and AdapterHub a prefix for each"
            found.append(Obstacle("layers", reason, "choose another engine"))
        return found

    def attach(self, model: Any, prompt: SoftPrompt) -> Any:
        """Attach in place. See `Engine.attach`."""
        self._check(model, prompt)
        flat = replace(prompt, training=None)
        snapshot = Snapshot(model)
        _run(model, prompt, lambda: _add(model, flat))
        keys = Adapter.of(flat, read_geometry(model.config), ADAPTER).shapes()
        own = {id(model.base_model.get_parameter(key)) for key in keys}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(id(parameter) in own or name in prompt.head)
        setattr(model, _ATTACHMENT, _Attachment(flat, snapshot))
        return model

    def float32_regions(self, prompt: SoftPrompt, geometry: Geometry) -> Sequence[str]:
        """AdapterHub evaluates a parameterisation in float32, when it loads one. See `Narrowing`."""
        return float32_parameterisation(prompt)

    def load(self, model: Any, prompt: SoftPrompt, directory: Path) -> Any:
        """Run files with AdapterHub's own loader, `load_adapter`: the prompt, and a classifier, come from there.

        AdapterHub holds them in float32, and evaluates a parameterisation in float32, here for one row. The keys and
        values that come of it are converted to the model's dtype, exactly where that is wider. Attached instead is what
        AdapterHub does not load into this class (the head of a class of its own), cannot load alone (the prompt of a
        union with others, or beside a head that is not read), or cannot load as one (a stack).

        Args:
            model: one that nothing else needs, it cannot be detached.
            prompt: what softbridge read from the same files; it says where the tokens stand.
            directory: as AdapterHub wrote it.

        Raises:
            EngineError: as for `attach`, or the files do not hold all that AdapterHub needs.
        """
        self._check(model, prompt)
        flat = replace(prompt, training=None)
        folder = None if left_behind(prompt) else folder_of(Files(directory))
        _run(
            model.eval(),
            prompt,
            lambda: _add(model, flat) if folder is None else _load(model, prompt, directory, folder),
        )
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

    def extract(self, model: Any, adapter: str | None = None) -> SoftPrompt:
        """The prompt as it is now, a flat prefix, in the model's dtype. See `Engine.extract`.

        Of a model that AdapterHub itself set up, what it would save: with a parameterisation, and with a head.

        Args:
            adapter: its name there; None: what is active, if that is one prompt, alone or stacked.

        Raises:
            EngineError: no prompt is attached or active, or several are, each for some of the rows.
        """
        if adapter is None and isinstance(getattr(model, _ATTACHMENT, None), _Attachment):
            return self._attached(model)
        if adapter is not None:
            return _saved(model, adapter)
        found = self.blocks(model)
        if len(found) > 1:
            setup = composition.describe(_active(model))
            raise EngineError(
                f"{setup} is active, which is several prompts for different rows",
                "one prompt for all rows",
                "say which: extract(model, adapter=...), or take them all: blocks(model)",
            )
        return found[0].prompt

    def blocks(self, model: Any) -> tuple[composition.Prompted, ...]:
        """The prompts that are active in a model which AdapterHub itself set up, and the rows that each is for.

        One for a single adapter and for `Stack`. For `BatchSplit` one per block, with the number of its rows in the
        batch. For `Parallel` one per child, with None: AdapterHub repeats the batch, and puts out all rows with the
        first child, then all rows with the next.

        Raises:
            EngineError: nothing is active, or there is no prompt that computes the same; with the reason.
        """
        setup = _active(model)
        try:
            return composition.prompted(setup, lambda name: _saved(model, name))
        except ValueError as error:
            raise EngineError(str(error), "soft prompts, alone or composed", "activate one of the adapters") from error

    def _attached(self, model: Any) -> SoftPrompt:
        prompt = _attachment(model).prompt
        adapter = Adapter.of(prompt, read_geometry(model.config), ADAPTER)
        parts, _ = adapter.read({key: from_torch(model.base_model.get_parameter(key)) for key in adapter.shapes()})
        return SoftPrompt(parts, prompt.positions, prompt.base)

    def insert(self, model: Any, prompt: SoftPrompt) -> None:
        """Other numbers for the attached prompt. See `Insertable`."""
        import torch

        adapter = Adapter.of(_attachment(model).prompt, read_geometry(model.config), ADAPTER)
        with torch.no_grad():
            for key, array in adapter.tensors(replace(prompt, training=None)).items():
                model.base_model.get_parameter(key).copy_(to_torch(array))

    def detach(self, model: Any) -> Any:
        """Give the model back as `attach` met it: classes, modules, hooks, configuration and what is frozen.

        Values of its own parameters are not touched, so training them in between is kept. What stays is outside the
        model: `adapters.init` adds aliases to the attribute map of the configuration's class.
        """
        _attachment(model).snapshot.restore()
        return model

    def train_example(self, model: Any, method: str, directory: Path, *, length: int, steps: int, seed: int) -> None:
        """Train one of `METHODS`. See `Engine.train_example`."""
        if method not in METHODS:
            raise EngineError(f"the method '{method}'", f"one of {', '.join(METHODS)}", "choose one of these")
        settings, kind = METHODS[method], model.config.model_type
        able = facts.PROMPT_MODEL_TYPES - facts.PROMPT_UNSOUND.keys() if settings is None else facts.MODEL_TYPES
        if kind not in able:
            raise EngineError(f"a model of type '{kind}'", f"one of {', '.join(sorted(able))}", "choose another engine")
        import adapters
        import torch

        task = BaseModel.resolve(model).task
        make_eager(model)
        adapters.init(model)
        if settings is None:
            config = adapters.PromptTuningConfig(prompt_length=length)
        else:
            config = adapters.PrefixTuningConfig(prefix_length=length, bottleneck_size=EXAMPLE_BOTTLENECK, **settings)
        model.add_adapter("example", config=config)
        model.adapter_to("example", dtype=model.dtype)  # gates take no other
        model.train_adapter("example")
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        scales = {FLAT: EXAMPLE_STD, "prompt_embedding.weight": EXAMPLE_STD, "wte.weight": 1.0}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            with torch.no_grad():
                for name, parameter in trained:
                    scale = next((scale for end, scale in scales.items() if name.endswith(end)), None)
                    parameter.copy_((scale or parameter.shape[-1] ** -0.5) * torch.randn(parameter.shape))
            optimizer = torch.optim.Adam([parameter for _, parameter in trained], lr=0.01)
            tokens = torch.randint(3, model.config.vocab_size, (4, 9))
            # AdapterHub gives logits of virtual tokens in the input, too, and nothing says what they should be.
            virtual = torch.full((4, length if settings is None else 0), -100)
            labels = torch.cat([virtual, tokens], 1)
            if task == "sequence-classification":
                labels = torch.randint(0, model.config.num_labels, (4,))
            for _ in range(steps):
                optimizer.zero_grad()
                model(input_ids=tokens, labels=labels).loss.backward()
                optimizer.step()
        model.eval()
        model.adapter_to("example", dtype=torch.float32)
        model.save_adapter(str(directory), "example", with_head=False)


ENGINE = AdapterHubEngine()


@dataclass
class _Attachment:
    """What `extract` and `detach` need to know of an attached model."""

    prompt: SoftPrompt
    snapshot: Snapshot


def _attachment(model: Any) -> _Attachment:
    attachment = getattr(model, _ATTACHMENT, None)
    if not isinstance(attachment, _Attachment):
        raise EngineError(
            "no prompt is attached to this model by engine 'adapterhub'",
            "a model that `attach` returned",
            "attach first",
        )
    return attachment


def _active(model: Any) -> Any:
    """The active composition, as `adapter_setup.json` would say it."""
    config = getattr(model, "adapters_config", None)
    if config is None or config.active_setup is None:
        raise EngineError(
            "no prompt is attached to this model by engine 'adapterhub', and no adapter of AdapterHub's is active",
            "a model that `attach` returned, or that AdapterHub set up",
            "attach first, or call set_active_adapters",
        )
    return config.active_setup.to_dict()


def _saved(model: Any, name: str) -> SoftPrompt:
    """An adapter as AdapterHub would save it."""
    if name not in model.adapters_config:
        known = ", ".join(model.adapters_config) or "none"
        raise EngineError(f"no adapter '{name}' in this model", f"one of {known}", "name one of these")
    with tempfile.TemporaryDirectory() as folder:
        further = {"with_head": True} if "with_head" in inspect.signature(model.save_adapter).parameters else {}
        model.save_adapter(folder, name, **further)
        try:
            return FORMAT.read(Files(folder), read_geometry(model.config))
        except SoftbridgeError as error:
            raise EngineError(
                f"adapter '{name}': {error.found}", "an adapter that is a soft prompt", error.remedy
            ) from error


def _run(model: Any, prompt: SoftPrompt, put: Callable[[], str]) -> None:
    """Make the model run with the adapter that `put` puts in and names, and with tokens where the prompt has them."""
    import adapters

    geometry = read_geometry(model.config)
    if make_eager(model):
        say_once(
            "attention is switched to 'eager': AdapterHub's prompt under other implementations is another function"
        )
    adapters.init(model)
    model.set_active_adapters(put())
    for part in prompt.inputs:
        hide_virtual_tokens(model, part)
    starts = {start for start in prompt.positions.start.values() if start != 0}
    if starts and geometry.model_type in facts.POSITION_INPUTS:
        move_tokens(model, *facts.POSITION_INPUTS[geometry.model_type], starts.pop())
    if geometry.decoder is not None and refuse_cache(model):
        say_once(
            "the key/value cache is switched off: AdapterHub never fills it on this model, or fails with it, and "
            "decoding would be wrong"
        )
        model.config.use_cache = False
        if model.generation_config is not None:
            model.generation_config.use_cache = False


def _add(model: Any, prompt: SoftPrompt) -> str:
    """Add an adapter with the numbers of a prompt that holds no parameterisation, in the model's dtype."""
    import torch

    adapter = Adapter.of(prompt, read_geometry(model.config), ADAPTER)
    model.add_adapter(adapter.name, config=adapter.config)
    for key, array in adapter.tensors(prompt).items():
        module, _, name = key.rpartition(".")
        value = torch.nn.Parameter(to_torch(array).to(model.device, model.dtype))
        setattr(model.base_model.get_submodule(module), name, value)
    return adapter.name


def _load(model: Any, prompt: SoftPrompt, directory: Path, folder: str) -> str:
    """Let AdapterHub load its files, under the name that they give: under another it would not find all of them."""
    files = Files(directory)
    weights = facts.weights_in(files, folder, facts.WEIGHTS_FILE)
    if weights is None:  # AdapterHub would ask the hub
        expected = f"{facts.WEIGHTS_FILE} or {facts.SAFE[facts.WEIGHTS_FILE]}"
        raise EngineError(f"no weights in {directory}", expected, "give AdapterHub's directory")
    found: dict[str, list[str]] = {}
    here = str((directory / folder).absolute())
    name: str = model.load_adapter(
        here,
        use_safetensors=weights.endswith(facts.SAFE[facts.WEIGHTS_FILE]),
        loading_info=found,
        **({"with_head": False} if "with_head" in inspect.signature(model.load_adapter).parameters else {}),
    )
    # Under the attention modules are the same objects again. What is missing AdapterHub silently leaves random.
    missing = [key for key in found["missing_keys"] if ".pool." not in key]
    headed = (
        bool(prompt.head) and files.json(folder + facts.HEAD_CONFIG_FILE).get("model_class") == type(model).__name__
    )
    if headed:
        head = facts.weights_in(files, folder, facts.HEAD_WEIGHTS_FILE) or ""
        found = {}
        model.load_head(here, use_safetensors=head == folder + facts.SAFE[facts.HEAD_WEIGHTS_FILE], loading_info=found)
        missing += [key for key in found["missing_keys"] if key in prompt.head]
    if missing:
        raise EngineError(
            f"AdapterHub does not find {', '.join(missing)} in {directory / folder}",
            "files that hold the whole prompt",
            "save the adapter again with AdapterHub's save_adapter",
        )
    if prompt.head and not headed:
        load_head(model, prompt.head)
    for path, module in list(model.base_model.named_modules()):
        if path.endswith((f".prefix_gates.{name}", f".prompt_tunings.{name}")):
            module.to(model.device, model.dtype)
        elif path.endswith(f".prefix_tunings.{name}"):
            for prefix in module.values():
                prefix.forward = once(prefix.to(model.device).forward, model.dtype)
    return name
