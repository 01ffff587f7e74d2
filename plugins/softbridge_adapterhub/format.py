"""AdapterHub's directories: `adapter_config.json` beside `pytorch_adapter.bin` or `adapter.safetensors`.

Prefix tuning is read and written, flat or as the perceptron that produces it. AdapterHub repeats the whole pool of
prefixes under every attention module; one copy is read and all are checked to be equal. Written is the pool alone,
without the base model's own prefix: `load_adapter` takes it on every model class.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from softbridge import untrusted
from softbridge.capabilities import UP_TO_FLOAT32, Capabilities
from softbridge.errors import BaseModelError, CheckpointError, Obstacle
from softbridge.geometry import Geometry, Site, stack_of
from softbridge.methods import MLP_TENSORS, activation, materialise
from softbridge.prompt import Array, BaseId, KeyValuePrefix, Origin, Positions, SoftPrompt, Training, same_array
from softbridge.tensors import BFLOAT16
from softbridge.untrusted import Files
from softbridge_adapterhub import facts

#: AdapterHub's tensors of a reparameterised prefix, in the order of `MLP_TENSORS`.
REPARAMETERISED = (
    "wte.weight",
    "control_trans.0.weight",
    "control_trans.0.bias",
    "control_trans.2.weight",
    "control_trans.2.bias",
)
FLAT = "control_trans"

_KEY = re.compile(
    r"(?P<where>(?:\w+\.)*)prefix_tuning\.(?:pool\.)?prefix_tunings\.(?P<adapter>[^.]+)\.(?P<location>\w+)\.(?P<tensor>.+)"
)

CAPABILITIES = Capabilities(
    prefix_sites=frozenset(("self", "encoder", "cross")),
    prefix_start="zero",
    positions_told=True,
    relative_bias="skewed",
    window="pinned",
    training=frozenset(("mlp",)),
    dtypes=UP_TO_FLOAT32,
    model_types=facts.MODEL_TYPES,
)


class AdapterHubFormat:
    """A directory as AdapterHub's `save_adapter` writes it, holding one prefix."""

    name = "adapterhub"
    summary = "AdapterHub: prefix tuning, flat or reparameterised"
    encodings = ("bin", "safetensors")
    engine = "adapterhub"
    capabilities = CAPABILITIES

    def sniff(self, files: Files) -> bool:
        if facts.CONFIG_FILE not in files or not (facts.WEIGHTS_FILE in files or facts.SAFE_WEIGHTS_FILE in files):
            return False
        try:
            document = files.json(facts.CONFIG_FILE)
        except CheckpointError:
            return False
        return isinstance(document.get("config"), dict) and "model_type" in document

    def read(self, files: Files, geometry: Geometry | None) -> SoftPrompt:
        """Read a prefix. See `Format.read`."""
        document = files.json(facts.CONFIG_FILE)
        config = _config(document)
        if geometry is None:
            raise BaseModelError(
                "an AdapterHub file does not say how many layers and key/value heads its tensors are for",
                f"the configuration of the {document['model_type']} model that it was trained for",
                "give it with --base",
            )
        _check_base(document, geometry)
        weights = facts.WEIGHTS_FILE if facts.WEIGHTS_FILE in files else facts.SAFE_WEIGHTS_FILE
        if weights not in files:
            raise CheckpointError(
                f"neither {facts.WEIGHTS_FILE} nor {facts.SAFE_WEIGHTS_FILE} is there",
                "one of the two beside adapter_config.json",
                "save the adapter again with AdapterHub's save_adapter",
            )
        pool = _pool(files.tensors(weights), document["name"])
        layers = facts.sites_of(config, geometry)
        if facts.partly_prefixed(layers, geometry):
            raise CheckpointError(
                f"a {geometry.model_type} prefix that leaves out layers {sorted(config['leave_out'])}: AdapterHub "
                "loses the relative bias of the layers after them",
                "a prefix in all layers of a stack, or in none",
                "train the prefix without 'leave_out'",
            )
        flat = any(key.endswith(f".{FLAT}") for key in pool)
        _check(pool, _expected_shapes(config, layers, geometry, flat))

        training = None if flat else _training(pool, config, layers, geometry)
        kv_heads, head_dim = facts.toolkit_shape(geometry)
        parts: list[KeyValuePrefix] = []
        for site, numbers in layers.items():
            if training is None:
                array = pool[f"{facts.location(geometry.model_type, site)}.{FLAT}"]
                part = KeyValuePrefix.from_flat(site, array, numbers, kv_heads, head_dim)
            else:
                part = materialise(training, site, numbers, kv_heads, head_dim)
            parts.append(part)
        notes = []
        if flat and not config["flat"]:
            notes.append("an ejected prefix: the configuration says flat: false, the tensors are flat")
        heads = [name for name in facts.HEAD_FILES if name in files]
        if heads:
            notes.append(f"the prediction head is not read: {', '.join(heads)}")
        return SoftPrompt(
            tuple(parts),
            Positions({stack_of(site): 0 for site in layers if site != "cross"}, "skewed", "pinned"),
            BaseId(document.get("model_name") or None, geometry),
            training=training,
            origin=Origin(
                self.name,
                {**document, "notes": notes},
                {name: files.digest(name) for name in (facts.CONFIG_FILE, weights)},
            ),
        )

    def obstacles(self, prompt: SoftPrompt, geometry: Geometry | None) -> Sequence[Obstacle]:
        """See `Format.obstacles`."""
        geometry = geometry or prompt.base.geometry
        if geometry is None:
            reason = "AdapterHub's configuration names the base model's type and size, and neither is known"
            return [Obstacle("base", reason, "give the base model with --base")]
        found = facts.obstacles(prompt, geometry)
        if prompt.training is not None and not found:
            shapes = {name: array.shape for name, array in prompt.training.tensors.items()}
            expected = _training_shapes(prompt, prompt.training, geometry)
            if shapes != expected:
                wrong = sorted(
                    name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name)
                )
                reason = f"AdapterHub has another shape for, or no tensor like, the perceptron's {', '.join(wrong)}"
                found.append(Obstacle("training", reason, "eject the parameterisation first"))
        return found

    def write(self, prompt: SoftPrompt, geometry: Geometry | None, encoding: str | None = None) -> Mapping[str, bytes]:
        """A file that `load_adapter` takes on every model class. See `Format.write`.

        AdapterHub reads safetensors only when asked to: ``load_adapter(directory, use_safetensors=True)``.
        """
        geometry = geometry or prompt.base.geometry
        if geometry is None:
            raise BaseModelError("no base model was given", "its type and its size", "give it with --base")
        given = dict(prompt.origin.details) if prompt.origin is not None and prompt.origin.format == self.name else {}
        given.pop("notes", None)
        layers = {part.site: tuple(part.layers) for part in prompt.prefixes}
        config = {
            **facts.DEFAULTS,
            **given.get("config", {}),
            **facts.config_of(layers, geometry),
            "flat": prompt.training is None,
            "prefix_length": prompt.prefixes[0].length,
        }
        tensors: dict[str, Array] = {}
        name = given.get("name", "softbridge")
        for location, part in facts.prefixes_by_location(prompt, geometry).items():
            where = f"prefix_tuning.prefix_tunings.{name}.{location}"
            if prompt.training is None:
                tensors[f"{where}.{FLAT}"] = part.flat().reshape(-1)
            else:
                config.update(_settings(prompt.training))
                for theirs, ours in zip(REPARAMETERISED, MLP_TENSORS, strict=True):
                    tensors[f"{where}.{theirs}"] = prompt.training.tensors[f"{part.site}.{ours}"]
        document = {
            # AdapterHub reads a file that names no version as one with old names of activations.
            "version": "softbridge",
            "model_class": None,
            **given,
            "config": config,
            "hidden_size": geometry.hidden,
            "model_name": prompt.base.name or "",
            "model_type": geometry.model_type,
            "name": name,
        }
        weights = (
            {facts.SAFE_WEIGHTS_FILE: untrusted.safetensors_bytes(tensors, {"format": "pt"})}
            if encoding == "safetensors"
            else {facts.WEIGHTS_FILE: untrusted.pickle_bytes(tensors)}
        )
        return {facts.CONFIG_FILE: untrusted.json_bytes(document), **weights}

    def advice(self, prompt: SoftPrompt, geometry: Geometry | None) -> Sequence[str]:
        """Eager attention, no cache where none is filled, positions. See `Format.advice`."""
        advice = ["load the model with attn_implementation='eager': otherwise AdapterHub's prefix is another function"]
        if geometry is not None and geometry.model_type in facts.CACHE_STAYS_EMPTY:
            advice.append("pass use_cache=False to forward and generate: AdapterHub never fills this model's cache")
        advice += [
            f"pass position_ids = torch.arange(T) + {start} for T unpadded tokens, in every call: the first real token "
            f"of the {stack} stands at {start}"
            for stack, start in prompt.positions.start.items()
            if start != 0
        ]
        return advice


FORMAT = AdapterHubFormat()


def _config(document: Mapping[str, Any]) -> dict[str, Any]:
    """The prefix's configuration with defaults filled in, checked field by field."""
    expected = "an adapter_config.json of AdapterHub's prefix tuning"
    remedy = "save the adapter again with AdapterHub's save_adapter"
    if not isinstance(document.get("config"), dict):
        raise CheckpointError("adapter_config.json has no object 'config'", expected, remedy)
    for name in ("model_type", "name"):
        if not isinstance(document.get(name), str) or not document[name]:
            raise CheckpointError(f"'{name}' is {document.get(name)!r} in adapter_config.json", "a name", remedy)
    given: dict[str, Any] = document["config"]
    architecture = given.get("architecture")
    if architecture != "prefix_tuning":
        inner = [part.get("architecture") for part in given.get("configs", []) if isinstance(part, dict)]
        named = f"'{architecture}'" + (f" of {', '.join(map(repr, inner))}" if architecture == "union" else "")
        raise CheckpointError(
            f"an AdapterHub adapter of architecture {named}",
            "'prefix_tuning', the only one that is read",
            "convert a prefix-tuning adapter; the others are no soft prompts, or not read yet",
        )
    config = {**facts.DEFAULTS, **given}
    if config["use_gating"]:
        raise CheckpointError(
            "a prefix with gates (use_gating: true)",
            "a prefix without gates; gated prefixes are not read yet",
            "train with use_gating=False",
        )
    unknown = sorted(given.keys() - facts.DEFAULTS.keys())
    if unknown:
        raise CheckpointError(f"unknown fields {', '.join(unknown)} in 'config'", expected, "update softbridge")
    checks = {
        "a positive whole number": (_is_count, ("prefix_length", "bottleneck_size")),
        "true or false": (lambda value: isinstance(value, bool), ("flat", "encoder_prefix", "cross_prefix")),
        "a rate below 1": (lambda value: type(value) in (int, float) and 0 <= value < 1, ("dropout",)),
        "a list of layer numbers": (
            lambda value: isinstance(value, list) and all(type(layer) is int and layer >= 0 for layer in value),
            ("leave_out",),
        ),
        "the name of an activation": (lambda value: isinstance(value, str), ("non_linearity",)),
    }
    for wanted, (is_right, names) in checks.items():
        for name in names:
            if not is_right(config[name]):
                raise CheckpointError(f"'{name}' is {config[name]!r} in adapter_config.json", wanted, remedy)
    config["non_linearity"] = config["non_linearity"].lower()
    if "version" not in document:
        config["non_linearity"] = facts.UNVERSIONED_ACTIVATIONS.get(config["non_linearity"], config["non_linearity"])
    return config


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0


def _check_base(document: Mapping[str, Any], geometry: Geometry) -> None:
    kind = document["model_type"]
    if kind != geometry.model_type:
        raise BaseModelError(
            f"a base model of type '{geometry.model_type}'", f"'{kind}', as the file says", "give --base"
        )
    if kind not in facts.MODEL_TYPES:
        why = facts.OTHER_MODEL_TYPES.get(kind, "AdapterHub has no prefix tuning for it")
        raise CheckpointError(
            f"a prefix for a model of type '{kind}'",
            f"one of {', '.join(sorted(facts.MODEL_TYPES))}",
            f"not read: {why}",
        )
    hidden = document.get("hidden_size")
    if hidden is not None and hidden != geometry.hidden:
        raise BaseModelError(
            f"a base model of hidden size {geometry.hidden}",
            f"{hidden}, as the file says",
            "give the configuration of the model that the adapter was trained for",
        )


def _pool(tensors: Mapping[str, Array], adapter: str) -> dict[str, Array]:
    """``location.tensor`` -> array, from one of the copies of the pool, after a look at all of them."""
    pool: dict[str, Array] = {}
    unexpected: list[str] = []
    different: list[str] = []
    for key, array in sorted(tensors.items()):
        match = _KEY.fullmatch(key)
        if match is None or match["adapter"] != adapter:
            unexpected.append(key)
        elif not same_array(pool.setdefault(f"{match['location']}.{match['tensor']}", array), array):
            different.append(key)
    if unexpected:
        raise CheckpointError(
            f"tensors that are no part of the prefix '{adapter}': {', '.join(unexpected)}",
            f"...prefix_tuning.prefix_tunings.{adapter}.* only",
            "save that one adapter again with AdapterHub's save_adapter",
        )
    if different:
        raise CheckpointError(
            f"copies of the pool that differ from the first: {', '.join(different)}",
            "the same tensors under every attention module",
            "save the adapter again with AdapterHub's save_adapter",
        )
    return pool


def _expected_shapes(
    config: Mapping[str, Any], layers: Mapping[Site, tuple[int, ...]], geometry: Geometry, flat: bool
) -> dict[str, tuple[int, ...]]:
    length, hidden, bottleneck = config["prefix_length"], geometry.hidden, config["bottleneck_size"]
    kv_heads, head_dim = facts.toolkit_shape(geometry)
    shapes: dict[str, tuple[int, ...]] = {}
    for site, numbers in layers.items():
        location = facts.location(geometry.model_type, site)
        width = len(numbers) * 2 * kv_heads * head_dim
        if flat:
            shapes[f"{location}.{FLAT}"] = (length * width,)
        else:
            sizes = ((length, hidden), (bottleneck, hidden), (bottleneck,), (width, bottleneck), (width,))
            shapes.update({f"{location}.{name}": size for name, size in zip(REPARAMETERISED, sizes, strict=True)})
    return shapes


def _check(pool: Mapping[str, Array], shapes: Mapping[str, tuple[int, ...]]) -> None:
    problems = [f"missing {key}" for key in sorted(shapes.keys() - pool.keys())]
    problems += [f"unexpected {key}" for key in sorted(pool.keys() - shapes.keys())]
    if problems or not shapes:
        raise CheckpointError(
            "; ".join(problems) or "no layer is prefixed",
            f"the tensors {', '.join(sorted(shapes))}" if shapes else "at least one prefixed layer",
            "check that --base is the model that the adapter was trained for",
        )
    for key, shape in sorted(shapes.items()):
        array = pool[key]
        if array.shape != shape:
            raise CheckpointError(
                f"{key} has the shape {list(array.shape)}",
                f"{list(shape)} for this base model",
                "check that --base is the model that the adapter was trained for",
            )
        if not (np.issubdtype(array.dtype, np.floating) or array.dtype == BFLOAT16):
            raise CheckpointError(f"{key} is of type {array.dtype}", "floating point", "save the adapter again")


def _settings(training: Training) -> dict[str, Any]:
    """The part of a configuration that describes the perceptron."""
    sizes = [array.shape[0] for name, array in training.tensors.items() if name.endswith(".hidden.bias")]
    dropout = training.settings.get("dropout", facts.DEFAULTS["dropout"])
    return {
        "bottleneck_size": sizes[0] if sizes else 0,
        "dropout": dropout,
        "non_linearity": training.settings["non_linearity"],
    }


def _training_shapes(prompt: SoftPrompt, training: Training, geometry: Geometry) -> dict[str, tuple[int, ...]]:
    config = {**_settings(training), "prefix_length": prompt.prefixes[0].length}
    layers = {part.site: tuple(part.layers) for part in prompt.prefixes}
    shapes = _expected_shapes(config, layers, geometry, flat=False)
    return {
        f"{site}.{ours}": shapes[f"{facts.location(geometry.model_type, site)}.{theirs}"]
        for site in layers
        for ours, theirs in zip(MLP_TENSORS, REPARAMETERISED, strict=True)
    }


def _training(
    pool: Mapping[str, Array], config: Mapping[str, Any], layers: Mapping[Site, tuple[int, ...]], geometry: Geometry
) -> Training:
    try:
        activation(config["non_linearity"])
    except ValueError as error:
        raise CheckpointError(str(error), "an activation that AdapterHub knows", "check adapter_config.json") from error
    return Training(
        "mlp",
        {name: config[name] for name in ("non_linearity", "dropout", "bottleneck_size")},
        {
            f"{site}.{ours}": pool[f"{facts.location(geometry.model_type, site)}.{theirs}"]
            for site in layers
            for ours, theirs in zip(MLP_TENSORS, REPARAMETERISED, strict=True)
        },
    )
