"""What AdapterHub holds of a soft prompt: configurations, and tensors by the keys that they have in a file.

The format reads and writes files with it, the engine fills the toolkit's own modules and reads them: the keys are the
names of parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from softbridge.arrays import Array, same_array
from softbridge.geometry import Geometry, Site, Stack, stack_of
from softbridge.methods import MLP_TENSORS, materialise
from softbridge.prompt import Gate, InputPrompt, KeyValue, KeyValuePrefix, Part, SoftPrompt, Training
from softbridge_adapterhub import facts

#: Architecture -> its configuration, in the order of the parts.
Configs: TypeAlias = Mapping[str, Mapping[str, Any]]

#: AdapterHub's tensors of a parameterised prefix, in the order of `MLP_TENSORS`.
REPARAMETERISED = (
    "wte.weight",
    "control_trans.0.weight",
    "control_trans.0.bias",
    "control_trans.2.weight",
    "control_trans.2.bias",
)
FLAT = "control_trans"
#: The settings of a parameterisation.
_SETTINGS = ("bottleneck_size", "dropout", "non_linearity")


@dataclass(frozen=True)
class Adapter:
    """An adapter that is a soft prompt, or the part of one that is.

    Keys are as in a file without the base model's own name in front of them.

    Attributes:
        name: stands in every key.
        configs: all fields of each; that of a prefix says ``flat`` where its tensors are, whatever a file says.
        geometry: of the base model.
    """

    name: str
    configs: Configs
    geometry: Geometry

    @classmethod
    def of(
        cls, prompt: SoftPrompt, geometry: Geometry, name: str, given: Mapping[str, Mapping[str, Any]] = {}
    ) -> Adapter:
        """The adapter that AdapterHub would have made of a prompt.

        Args:
            given: configurations that it was read from: what else they say is kept.
        """
        configs: dict[str, dict[str, Any]] = {}
        layers = {part.site: tuple(part.layers) for part in prompt.prefixes}
        for part in prompt.parts:
            if isinstance(part, InputPrompt):
                combine = next(name for name, placement in facts.PLACEMENTS.items() if placement == part.placement)
                said = {"combine": combine, "prompt_length": part.length}
                configs[facts.PROMPT] = {**facts.DEFAULTS[facts.PROMPT], **given.get(facts.PROMPT, {}), **said}
            if not isinstance(part, KeyValuePrefix):
                continue
            gate = next(iter(part.layers.values())).gate
            configs[facts.PREFIX] = {
                **facts.DEFAULTS[facts.PREFIX],
                **given.get(facts.PREFIX, {}),
                **facts.config_of(layers, geometry),
                **({} if prompt.training is None else _settings(prompt.training)),
                "flat": prompt.training is None,
                "prefix_length": part.length,
                "use_gating": gate is not None,
                **({} if gate is None else {"shared_gating": len(gate.bias) == 1}),
            }
        return cls(name, configs, geometry)

    @property
    def config(self) -> dict[str, Any]:
        """The configuration of the whole: a ``union`` where there are several."""
        members = [dict(config) for config in self.configs.values()]
        return members[0] if len(members) == 1 else {"architecture": facts.UNION, "configs": members}

    @property
    def prefix(self) -> Mapping[str, Any] | None:
        """The configuration of the prefix, if there is one."""
        return self.configs.get(facts.PREFIX)

    @property
    def layers(self) -> dict[Site, tuple[int, ...]]:
        """Site -> prefixed layers."""
        return {} if self.prefix is None else facts.sites_of(self.prefix, self.geometry)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Key -> shape of every tensor."""
        shapes: dict[str, tuple[int, ...]] = {}
        if facts.PROMPT in self.configs:
            length = self.configs[facts.PROMPT]["prompt_length"]
            shapes[self._vectors_key] = (length, self.geometry.input_width)
        if self.prefix is None:
            return shapes
        length, bottleneck, hidden = self.prefix["prefix_length"], self.prefix["bottleneck_size"], self.geometry.hidden
        kv_heads, head_dim = facts.toolkit_shape(self.geometry)
        outputs = 1 if self.prefix["shared_gating"] else 2
        for site, layers in self.layers.items():
            stored = facts.stored_layers(layers, self.geometry)
            width = len(stored) * 2 * kv_heads * head_dim
            sizes = ((length, hidden), (bottleneck, hidden), (bottleneck,), (width, bottleneck), (width,))
            own = {FLAT: (length * width,)} if self.prefix["flat"] else dict(zip(REPARAMETERISED, sizes, strict=True))
            shapes.update({self._key(site, tensor): size for tensor, size in own.items()})
            if self.prefix["use_gating"]:
                for layer in stored:
                    shapes.update(zip(self._gate_keys(site, layer), ((outputs, hidden), (outputs,)), strict=True))
        return shapes

    def tensors(self, prompt: SoftPrompt) -> dict[str, Array]:
        """Key -> tensor of a prompt that this is the adapter `of`."""
        tensors: dict[str, Array] = {}
        for part in prompt.parts:
            if isinstance(part, InputPrompt):
                tensors[self._vectors_key] = part.vectors
            if not isinstance(part, KeyValuePrefix):
                continue
            layers = {layer: part.layers[layer] for layer in facts.stored_layers(tuple(part.layers), self.geometry)}
            if prompt.training is None:
                tensors[self._key(part.site, FLAT)] = replace(part, layers=layers).flat().reshape(-1)
            for layer, pair in layers.items():
                if pair.gate is not None:
                    gate = (pair.gate.weight, pair.gate.bias)
                    tensors.update(zip(self._gate_keys(part.site, layer), gate, strict=True))
        if prompt.training is not None:
            stored = self._gathered(prompt.training).tensors
            tensors.update({key: stored[name] for name, key in self._parameterisation(self.layers).items()})
        return tensors

    def read(self, tensors: Mapping[str, Array]) -> tuple[tuple[Part, ...], Training | None]:
        """The inverse of `tensors`: parts, and the parameterisation that a prefix comes from.

        Args:
            tensors: of the `shapes`.

        Raises:
            ValueError: the parameterisation cannot be evaluated.
        """
        training = None
        if self.prefix is not None and not self.prefix["flat"]:
            named = {name: tensors[key] for name, key in self._parameterisation(self.layers).items()}
            training = Training("mlp", {name: self.prefix[name] for name in _SETTINGS}, named)
        parts: list[Part] = []
        for architecture, config in self.configs.items():
            if architecture == facts.PROMPT:
                vectors = tensors[self._vectors_key]
                parts.append(InputPrompt(vectors, "encoder", "after", facts.PLACEMENTS[config["combine"]]))
            else:
                parts += [self._prefix(tensors, training, site, layers) for site, layers in self.layers.items()]
        return tuple(parts), None if training is None else self._spread(training)

    def _prefix(
        self, tensors: Mapping[str, Array], training: Training | None, site: Site, layers: tuple[int, ...]
    ) -> KeyValuePrefix:
        stored = facts.stored_layers(layers, self.geometry)
        shape = facts.toolkit_shape(self.geometry)
        if training is None:
            part = KeyValuePrefix.from_flat(site, tensors[self._key(site, FLAT)], stored, *shape)
        else:
            part = materialise(training, site, stored, *shape)

        def pair(layer: int) -> KeyValue:
            keys = self._gate_keys(site, layer)
            gated = keys[0] in tensors
            return replace(part.layers[layer], gate=Gate(*(tensors[key] for key in keys)) if gated else None)

        return replace(part, layers={layer: pair(layer if layer in stored else stored[0]) for layer in layers})

    def wrong(self, training: Training) -> list[str]:
        """Names of a parameterisation's tensors that AdapterHub lacks, or has in another shape."""
        stored, shapes = self._gathered(training), self.shapes()
        expected = {name: shapes[key] for name, key in self._parameterisation(self.layers).items()}
        found = {name: array.shape for name, array in stored.tensors.items()}
        again = self._spread(stored).tensors
        return sorted(
            name
            for name in found.keys() | expected.keys()
            if found.get(name) != expected.get(name) or not same_array(again[name], training.tensors[name])
        )

    @property
    def _vectors_key(self) -> str:
        return f"prompt_tuning.prompt_tunings.{self.name}.prompt_embedding.weight"

    def _key(self, site: Site, tensor: str) -> str:
        return f"prefix_tuning.prefix_tunings.{self.name}.{facts.location(self.geometry.model_type, site)}.{tensor}"

    def _gate_keys(self, site: Site, layer: int) -> tuple[str, str]:
        """Of weight and bias."""
        gate = f"{facts.attention(self.geometry, site, layer)}.prefix_tuning.prefix_gates.{self.name}"
        return f"{gate}.weight", f"{gate}.bias"

    def _parameterisation(self, sites: Iterable[Site]) -> dict[str, str]:
        """A parameterisation's tensors: name in `Training` -> key."""
        pairs = list(zip(MLP_TENSORS, REPARAMETERISED, strict=True))
        return {f"{site}.{ours}": self._key(site, theirs) for site in sites for ours, theirs in pairs}

    def _spread(self, training: Training) -> Training:
        """A parameterisation as it is stored -> one of all layers, with the rows of a shared one for each."""
        return _layered(training, lambda rows: np.concatenate([rows] * facts.copies(self.geometry)))

    def _gathered(self, training: Training) -> Training:
        """The inverse of `_spread`."""
        return _layered(training, lambda rows: rows[: len(rows) // facts.copies(self.geometry)])


def starts(parts: Iterable[Part]) -> dict[Stack, int]:
    """Where real tokens stand with AdapterHub: at 0, in every stack that has virtual ones."""
    stacks: list[Stack] = []
    for part in parts:
        if isinstance(part, InputPrompt):
            stacks.append(part.stack)
        elif part.site != "cross":
            stacks.append(stack_of(part.site))
    return dict.fromkeys(stacks, 0)


def _layered(training: Training, change: Callable[[Array], Array]) -> Training:
    """Change the tensors of a parameterisation that have rows for layers."""
    layered = MLP_TENSORS[-2:]
    tensors = {name: change(array) if name.endswith(layered) else array for name, array in training.tensors.items()}
    return replace(training, tensors=tensors)


def _settings(training: Training) -> dict[str, Any]:
    """The part of a configuration that describes the parameterisation."""
    sizes = [array.shape[0] for name, array in training.tensors.items() if name.endswith(".hidden.bias")]
    said = {**facts.DEFAULTS[facts.PREFIX], **training.settings, "bottleneck_size": sizes[0] if sizes else 0}
    return {name: said[name] for name in _SETTINGS}
