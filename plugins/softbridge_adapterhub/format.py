"""AdapterHub's directories: `adapter_config.json` beside `pytorch_adapter.bin` or `adapter.safetensors`.

Prefix tuning (flat or as its parameterisation, with gates or without), prompt tuning, both in one adapter, and a head
beside them are read and written. AdapterHub repeats the whole pool of prefixes under every attention
module; one copy is read and all are checked to be equal. Written are the tensors without the base model's own name in
front: `load_adapter` takes that on every model class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from softbridge import untrusted
from softbridge.arrays import BFLOAT16, Array, same_array
from softbridge.errors import BaseModelError, CheckpointError, Obstacle
from softbridge.geometry import Geometry
from softbridge.plugin.capabilities import UP_TO_FLOAT32, Capabilities
from softbridge.plugin.snippet import labels_of, model_class, program, targets
from softbridge.prompt import BaseId, Origin, Positions, SoftPrompt
from softbridge.untrusted import Files
from softbridge_adapterhub import composition, facts, heads
from softbridge_adapterhub.adapter import FLAT, Adapter, Configs, starts

CAPABILITIES = Capabilities(
    inputs=frozenset(("encoder", "after", placement) for placement in facts.PLACEMENTS.values()),
    input_start="zero",
    prefix_sites=frozenset(("self", "encoder", "cross")),
    prefix_start="zero",
    gates=True,
    positions_told=True,
    relative_bias="skewed",
    window="pinned",
    training=frozenset(("mlp",)),
    dtypes=UP_TO_FLOAT32,
    head=True,
    model_types=facts.MODEL_TYPES,
)


class AdapterHubFormat:
    """A directory as AdapterHub's `save_adapter` writes it, or `save_adapter_setup` of one adapter or a stack."""

    name = "adapterhub"
    summary = "AdapterHub: prefix tuning (flat, parameterised, gated), prompt tuning"
    encodings = ("bin", "safetensors")
    engine = "adapterhub"
    library = "adapter-transformers"  # as AdapterHub's own cards say
    capabilities = CAPABILITIES

    def sniff(self, files: Files) -> bool:
        try:
            if facts.SETUP_FILE in files:
                return isinstance(files.json(facts.SETUP_FILE).get("adapter_setup"), dict)
            if facts.CONFIG_FILE not in files or facts.weights_in(files, "", facts.WEIGHTS_FILE) is None:
                return False
            document = files.json(facts.CONFIG_FILE)
        except CheckpointError:
            return False
        return isinstance(document.get("config"), dict) and "model_type" in document

    def read(self, files: Files, geometry: Geometry | None) -> SoftPrompt:
        """Read a prompt; of a setup that stacks several, the one that they are. See `Format.read`."""
        if facts.SETUP_FILE not in files:
            return self._read(files, "", geometry)
        setup = files.json(facts.SETUP_FILE).get("adapter_setup")
        remedy = "give the folder of one of the adapters"
        try:
            found = composition.prompted(setup, lambda name: self._read(files, f"{name}/", geometry))
        except ValueError as error:
            raise CheckpointError(str(error), "adapters that are one prompt together", remedy) from error
        if len(found) > 1:
            raise CheckpointError(
                f"{facts.SETUP_FILE} composes {composition.describe(setup):.200}",
                "a setup of one adapter, or of several that are stacked: these are several prompts, for different rows",
                remedy,
            )
        return found[0].prompt

    def _read(self, files: Files, folder: str, geometry: Geometry | None) -> SoftPrompt:
        """Read the adapter in a folder."""
        document = files.json(folder + facts.CONFIG_FILE)
        configs, others = _configs(document)
        if geometry is None:
            raise BaseModelError(
                "an AdapterHub file does not say how many layers and key/value heads its tensors are for",
                f"the configuration of the {document['model_type']} model that it was trained for",
                "give it with --base",
            )
        _check_base(document, configs, geometry)
        weights = facts.weights_in(files, folder, facts.WEIGHTS_FILE)
        if weights is None:
            raise CheckpointError(
                f"neither {facts.WEIGHTS_FILE} nor {facts.SAFE[facts.WEIGHTS_FILE]} is there",
                "one of the two beside adapter_config.json",
                "save the adapter again with AdapterHub's save_adapter",
            )
        tensors = files.tensors(weights)
        head = heads.read(files, folder, document["model_type"])
        notes = [*head.notes]
        prefix = configs.get(facts.PREFIX)
        if prefix is not None:
            flat = any(key.endswith(f".{FLAT}") for key in tensors)
            if flat and not prefix["flat"]:
                notes.append("an ejected prefix: the configuration says flat: false, the tensors are flat")
            configs = {**configs, facts.PREFIX: {**prefix, "flat": flat}}
        lost = []
        if others:
            foreign = " and ".join(others)
            notes.append(f"of a union the soft prompt alone is read, and {foreign} left out")
            lost.append(f"the source is a union with {foreign}, without which it computes another function")
        if head.lost is not None:
            notes.append(f"the prompt alone is read: {head.lost}")
            lost.append(head.lost)
        digests = {name: files.digest(name) for name in (folder + facts.CONFIG_FILE, weights)}
        details = {**document, "head": head.document}
        adapter = Adapter(document["name"], configs, geometry)
        tensors = _checked(tensors, adapter, partial=bool(others))
        try:
            parts, training = adapter.read(tensors)
        except ValueError as error:
            raise CheckpointError(
                str(error), "a parameterisation that AdapterHub evaluates", "check adapter_config.json"
            ) from error
        return SoftPrompt(
            parts,
            Positions(starts(parts), "skewed", "pinned", facts.unbiased_from(adapter.layers, geometry)),
            BaseId(document.get("model_name") or None, geometry),
            head.tensors,
            training,
            Origin(self.name, details, digests, tuple(notes), "; ".join(lost)),
        )

    def obstacles(self, prompt: SoftPrompt, geometry: Geometry | None) -> Sequence[Obstacle]:
        """See `Format.obstacles`."""
        geometry = geometry or prompt.base.geometry
        if geometry is None:
            reason = "AdapterHub's configuration names the base model's type and size, and neither is known"
            return [Obstacle("base", reason, "give the base model with --base")]
        found = facts.obstacles(prompt, geometry)
        if geometry.model_type in facts.UNTOLD and any(prompt.positions.start.values()):
            reason = f"'{geometry.model_type}' takes no positions from its caller"
            found.append(Obstacle("positions", reason, "choose another target, such as the native engine"))
        if prompt.training is not None and not found:
            wrong = Adapter.of(prompt, geometry, self.name).wrong(prompt.training)
            if wrong:
                reason = (
                    f"AdapterHub has another shape for, or no tensor like, the parameterisation's {', '.join(wrong)}"
                )
                found.append(Obstacle("training", reason, "eject the parameterisation first"))
        if prompt.head and heads.counterpart_of(geometry.model_type, prompt.head) is None:
            known = ", ".join(
                one.model_class for one in heads.HEADS.get(geometry.model_type, {}).values() if one.layers
            )
            reason = f"AdapterHub has no head of {', '.join(prompt.head)} for '{geometry.model_type}'"
            reason += f", but those of {known}" if known else ""
            found.append(Obstacle("head", reason, "leave the head out: replace(prompt, head={})"))
        return found

    def write(
        self, prompt: SoftPrompt, geometry: Geometry | None, encoding: str | None = None
    ) -> Mapping[str, untrusted.Content]:
        """A file that `load_adapter` takes on every model class. See `Format.write`.

        AdapterHub reads safetensors only when asked to: ``load_adapter(directory, use_safetensors=True)``. A head it
        loads into the class alone that `head_config.json` names.
        """
        geometry = geometry or prompt.base.geometry
        if geometry is None:
            raise BaseModelError("no base model was given", "its type and its size", "give it with --base")
        given = dict(prompt.origin.details) if prompt.origin is not None and prompt.origin.format == self.name else {}
        given.pop("head", None)
        known = {str(config.get("architecture")): config for config in _members(given.get("config", {}))}
        adapter = Adapter.of(prompt, geometry, given.get("name", "softbridge"), known)
        document = {
            # AdapterHub reads a file that names no version as one with old names of activations.
            "version": "softbridge",
            "model_class": None,
            **given,
            "config": adapter.config,
            "hidden_size": geometry.hidden,
            "model_name": prompt.base.name or "",
            "model_type": geometry.model_type,
            "name": adapter.name,
        }
        described = {facts.CONFIG_FILE: document}
        weights = {facts.WEIGHTS_FILE: adapter.tensors(prompt)}
        if prompt.head:
            described[facts.HEAD_CONFIG_FILE], weights[facts.HEAD_WEIGHTS_FILE] = heads.write(
                prompt.head, document, _head_of(prompt)
            )
        content: dict[str, untrusted.Content] = {name: untrusted.json_bytes(value) for name, value in described.items()}
        for name, tensors in weights.items():
            if encoding == "safetensors":
                content[facts.SAFE[name]] = untrusted.safetensors_file(tensors, {"format": "pt"})
            else:
                content[name] = untrusted.pickle_file(tensors)
        return content

    def advice(self, prompt: SoftPrompt, geometry: Geometry | None, first: int = 0) -> Sequence[str]:
        """Eager attention, no cache where none is filled, positions, padding. See `Format.advice`."""
        kind = "" if geometry is None else geometry.model_type
        advice = ["load the model with attn_implementation='eager': otherwise AdapterHub's prompt is another function"]
        if prompt.inputs and kind in facts.PROMPT_UNSOUND:
            advice = [f"pad no text: AdapterHub's prompt tuning of '{kind}' {facts.PROMPT_UNSOUND[kind]}"]
        if any(part.placement == "after-first-token" for part in prompt.inputs):
            advice.append("pad no text on the left: AdapterHub would put the virtual tokens after a pad")
        if kind in facts.CACHE_STAYS_EMPTY:
            advice.append("pass use_cache=False to forward and generate: AdapterHub never fills this model's cache")
        if kind in facts.CACHE_FAILS and geometry is not None and geometry.decoder is not None:
            advice.append("pass use_cache=False to forward and generate: AdapterHub fails with this model's cache")
        counterpart = heads.counterpart_of(kind, prompt.head, _head_of(prompt))
        if counterpart is not None:
            advice.append(f"load it into a {counterpart.model_class}: other classes do not take the head")
        advice += [
            f"pass position_ids = torch.arange(T) + {first + start} for T unpadded tokens, in every call: the first "
            f"real token of the {stack} stands at {start}"
            for stack, start in prompt.positions.start.items()
            if start != 0
        ]
        return advice

    def snippet(
        self, prompt: SoftPrompt, geometry: Geometry | None, *, path: str, base: str, encoding: str | None
    ) -> str:
        """`load_adapter` and `set_active_adapters`. See `Introducing.snippet`."""
        kind = "" if geometry is None else geometry.model_type
        counterpart = heads.counterpart_of(kind, prompt.head, _head_of(prompt))
        cls = model_class(prompt, geometry) if counterpart is None else counterpart.model_class
        how = ", use_safetensors=True" if encoding == "safetensors" else ""
        steps = (
            f'model = {cls}.from_pretrained(base, attn_implementation="eager"{labels_of(prompt, geometry)})',
            "adapters.init(model)",
            f"model.set_active_adapters(model.load_adapter({path!r}{how}))",
            "model = model.eval()",
        )
        uncached = kind in facts.CACHE_STAYS_EMPTY | facts.CACHE_FAILS
        cache = ("use_cache=False",) if geometry is not None and geometry.decoder is not None and uncached else ()
        return program(("import adapters",), cls, base, steps, (*targets(geometry), *cache))


FORMAT = AdapterHubFormat()


def _head_of(prompt: SoftPrompt) -> Mapping[str, Any] | None:
    """What AdapterHub's files say of the head, if the prompt came from there."""
    if prompt.origin is None or prompt.origin.format != FORMAT.name:
        return None
    said: Mapping[str, Any] | None = prompt.origin.details.get("head")
    return said


def folder_of(files: Files) -> str | None:
    """The folder in which the adapter lies: ``""``, ``name/`` for a setup of one, or None for one of several."""
    if facts.SETUP_FILE not in files:
        return ""
    try:
        found = composition.blocks(files.json(facts.SETUP_FILE).get("adapter_setup"))
    except ValueError:
        return None
    return f"{found[0].names[0]}/" if len(found) == 1 and len(found[0].names) == 1 else None


def _members(config: Mapping[str, Any]) -> list[Any]:
    """The configurations in a union, or the one that it is."""
    if config.get("architecture") != facts.UNION:
        return [config]
    members = config.get("configs")
    return members if isinstance(members, list) else []


def _configs(document: Mapping[str, Any]) -> tuple[Configs, list[str]]:
    """The configurations of the soft prompt, checked and with defaults filled in; and what else is in a union."""
    expected = "an adapter_config.json of AdapterHub's prefix tuning or prompt tuning"
    remedy = "save the adapter again with AdapterHub's save_adapter"
    if not isinstance(document.get("config"), dict):
        raise CheckpointError("adapter_config.json has no object 'config'", expected, remedy)
    for name in ("model_type", "name"):
        if not isinstance(document.get(name), str) or not document[name]:
            raise CheckpointError(f"'{name}' is {document.get(name)!r} in adapter_config.json", "a name", remedy)
    configs: dict[str, Mapping[str, Any]] = {}
    others: list[str] = []
    for given in _members(document["config"]):
        if not isinstance(given, dict):
            raise CheckpointError(f"{given!r:.40} among the 'configs' of a union", "configurations", remedy)
        # A bottleneck adapter's architecture is null.
        architecture = "bottleneck" if given.get("architecture") is None else f"{given['architecture']!s:.40}"
        if architecture not in facts.DEFAULTS:
            others.append(f"'{architecture}'")
        elif architecture in configs:
            raise CheckpointError(f"two configurations of '{architecture}' in a union", "one of each", remedy)
        else:
            renamed = "version" not in document and given is document["config"]
            configs[architecture] = _fields(given, facts.DEFAULTS[architecture], renamed)
    if not configs:
        raise CheckpointError(
            f"an AdapterHub adapter of architecture {' and '.join(others) or 'union, of nothing'}",
            f"{' or '.join(map(repr, facts.DEFAULTS))}, or a union with one of them",
            "choose an adapter that is a soft prompt: the other architectures are not",
        )
    return configs, others


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_rate(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1


def _are_layers(value: Any) -> bool:
    return isinstance(value, list) and all(type(layer) is int and layer >= 0 for layer in value)


#: Field -> a test of its value, and what is wanted. Of the others no value matters.
_CHECKS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("prefix_length", "bottleneck_size", "prompt_length"), (_is_count, "a positive whole number")),
    **dict.fromkeys(
        ("flat", "encoder_prefix", "cross_prefix", "use_gating", "shared_gating"),
        (lambda value: isinstance(value, bool), "true or false"),
    ),
    "dropout": (_is_rate, "a rate below 1"),
    "leave_out": (_are_layers, "a list of layer numbers"),
    "non_linearity": (lambda value: isinstance(value, str), "the name of an activation"),
    "combine": (lambda value: value in tuple(facts.PLACEMENTS), f"one of {', '.join(facts.PLACEMENTS)}"),
}


def _fields(given: Mapping[str, Any], defaults: Mapping[str, Any], renamed: bool) -> dict[str, Any]:
    """A configuration, checked and with defaults filled in.

    Args:
        renamed: whether AdapterHub takes its activation for an old name.
    """
    unknown = sorted(given.keys() - defaults.keys())
    if unknown:
        expected = f"the fields of AdapterHub's {defaults['architecture']}: {', '.join(defaults)}"
        raise CheckpointError(f"unknown fields {', '.join(unknown)} in 'config'", expected, "update softbridge")
    config = {**defaults, **given}
    for name in config.keys() & _CHECKS.keys():
        is_right, wanted = _CHECKS[name]
        if not is_right(config[name]):
            remedy = "save the adapter again with AdapterHub's save_adapter"
            raise CheckpointError(f"'{name}' is {config[name]!r} in adapter_config.json", wanted, remedy)
    if "non_linearity" in config:
        activation = config["non_linearity"]
        config["non_linearity"] = (facts.UNVERSIONED_ACTIVATIONS if renamed else {}).get(activation, activation).lower()
    return config


def _check_base(document: Mapping[str, Any], configs: Configs, geometry: Geometry) -> None:
    kind = document["model_type"]
    if kind not in facts.MODEL_TYPES:
        why = facts.OTHER_MODEL_TYPES.get(kind, "AdapterHub has no soft prompts for it")
        raise CheckpointError(
            f"a prompt for a model of type '{kind}'",
            f"one of {', '.join(sorted(facts.MODEL_TYPES))}",
            f"not read: {why}",
        )
    if kind != geometry.model_type:
        raise BaseModelError(
            f"a base model of type '{geometry.model_type}'", f"'{kind}', as the file says", "give --base"
        )
    hidden = document.get("hidden_size")
    if hidden is not None and hidden != geometry.hidden:
        raise BaseModelError(
            f"a base model of hidden size {geometry.hidden}",
            f"{hidden}, as the file says",
            "give the configuration of the model that the adapter was trained for",
        )
    if facts.PROMPT in configs and (kind not in facts.PROMPT_MODEL_TYPES or geometry.encoder is None):
        raise CheckpointError(
            f"prompt tuning of a {'decoder' if geometry.encoder is None else 'model'} of type '{kind}'",
            f"an encoder of type {', '.join(sorted(facts.PROMPT_MODEL_TYPES))}: AdapterHub has it for these alone",
            "check that --base is the model that the adapter was trained for",
        )
    prefix = configs.get(facts.PREFIX)
    why_whole = None if prefix is None else facts.partly_prefixed(facts.sites_of(prefix, geometry), geometry)
    if prefix is not None and why_whole is not None:
        raise CheckpointError(
            f"a {kind} prefix that leaves out layers {sorted(prefix['leave_out'])}: {why_whole}",
            "a prefix in all layers of a stack, or in none",
            "train the prefix without 'leave_out'",
        )


def _pooled(key: str) -> str:
    """The name in the pool of a prefix's tensor, which is there under every attention module again."""
    before, found, rest = key.partition("prefix_tunings.")
    copied = found and before.removesuffix("pool.").endswith("prefix_tuning.")
    return f"prefix_tuning.{found}{rest}" if copied else key


def _checked(tensors: Mapping[str, Array], adapter: Adapter, partial: bool) -> dict[str, Array]:
    """Key -> array, without the base model's name in front, after a look at all copies.

    Args:
        partial: whether the file may hold other tensors than the soft prompt's.
    """
    expected = adapter.shapes()
    found: dict[str, Array] = {}
    unexpected: list[str] = []
    different: list[str] = []
    for given, array in sorted(tensors.items()):
        if partial and "prefix_tuning." not in given and "prompt_tuning." not in given:
            continue
        key = _pooled(given)
        key = key if key in expected else key.partition(".")[2]
        if key not in expected:
            unexpected.append(given)
        elif not same_array(found.setdefault(key, array), array):
            different.append(given)
    problems = [f"missing {key}" for key in sorted(expected.keys() - found.keys())]
    problems += [f"unexpected {key}" for key in unexpected]
    if problems or not expected:
        raise CheckpointError(
            "; ".join(problems) or "no layer is prefixed",
            f"the tensors {', '.join(sorted(expected))}" if expected else "at least one prefixed layer",
            f"check that --base is the model that '{adapter.name}' was trained for, and that the file holds no other",
        )
    if different:
        raise CheckpointError(
            f"copies of the pool that differ from the first: {', '.join(different)}",
            "the same tensors under every attention module",
            "save the adapter again with AdapterHub's save_adapter",
        )
    for key, shape in sorted(expected.items()):
        array = found[key]
        if array.shape != shape:
            raise CheckpointError(
                f"{key} has the shape {list(array.shape)}",
                f"{list(shape)} for this base model",
                "check that --base is the model that the adapter was trained for",
            )
        if not (np.issubdtype(array.dtype, np.floating) or array.dtype == BFLOAT16):
            raise CheckpointError(f"{key} is of type {array.dtype}", "floating point", "save the adapter again")
    return found
