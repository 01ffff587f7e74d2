"""OpenDelta's prefixes: what each module of a base model has of one, or what an MLP makes for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from softbridge import untrusted
from softbridge.arrays import Array
from softbridge.errors import BaseModelError, CheckpointError, few
from softbridge.geometry import Geometry, Site, stack_of
from softbridge.prompt import KeyValue, KeyValuePrefix, Positions, Training
from softbridge_archive import building, contents, module_names

Own = Mapping[tuple[str, str], untrusted.Stored]  # by the names of the module that a tensor is at, and its own
Rows = dict[str, tuple[Array, Array]]  # module -> its keys and values, [P, K·D] each

#: Family that it has a prefix for -> whether that counts virtual tokens, and loses the bias.
FAMILIES = {"bart": False, "bert": False, "gpt2": False, "mt5": True, "roberta": False, "t5": True}
#: The beginnings of the names of the MLP's tensors -> of ours.
NETWORK = {
    "reparams.wte.weight": "embedding",
    "reparams.control_trans.0.": "hidden.",
    "reparams.control_trans.2.": "output.",
}


def prefixes(
    own: Own, facts: Mapping[str, Any], geometry: Geometry
) -> tuple[tuple[KeyValuePrefix, ...], Training | None]:
    """The prefixes, and the MLP that made them.

    Args:
        facts: what the configuration says.

    Raises:
        CheckpointError, BaseModelError: the tensors are not those of one prefix, or not of one for this base model.
    """
    if geometry.model_type not in FAMILIES:
        raise BaseModelError(f"an OpenDelta prefix for {geometry.model_type}", ", ".join(FAMILIES), "check --base")
    is_mlp = any(name.startswith("reparams.") for _, name in own)
    rows, training = _made(own, facts, geometry) if is_mlp else (_stored(own), None)
    sites: dict[Site, dict[int, KeyValue]] = {}
    length = min(len(half) for pair in rows.values() for half in pair)
    for name, pair in rows.items():
        site, layer = module_names.place_of(name, geometry)
        heads, width = module_names.shape_of(site, layer, geometry)
        if any(half.shape != (length, heads * width) for half in pair) or layer in sites.get(site, {}):
            raise _refusal(f"a prefix {list(pair[0].shape)}, {list(pair[1].shape)} at {name!r:.80}")
        keys, values = (half.reshape(-1, heads, width).swapaxes(0, 1) for half in pair)
        sites.setdefault(site, {})[layer] = KeyValue(keys, values)
    return tuple(KeyValuePrefix(site, sites[site]) for site in sorted(sites)), training


def positions(parts: tuple[KeyValuePrefix, ...], geometry: Geometry) -> Positions:
    """Where real tokens stand, and from which layer on T5 has no bias."""
    counted = FAMILIES[geometry.model_type]
    start = {stack_of(part.site): part.length * counted for part in parts}
    if not counted:
        return Positions(start)
    lost = {part.site: max(1, min(part.layers)) for part in parts}
    return Positions(
        start,
        unbiased_from={stack_of(s): n for s, n in lost.items() if (shape := geometry.site(s)) and n < shape.layers},
    )


def _stored(own: Own) -> Rows:
    halves = {path: ((path, "prefix.past_key"), (path, "prefix.past_value")) for path, _ in own}
    if not own or own.keys() != {name for pair in halves.values() for name in pair}:
        raise _refusal(f"half a prefix, or tensors of several kinds, at {few(halves)}")
    return {path: (contents.matrix(own[keys]), contents.matrix(own[values])) for path, (keys, values) in halves.items()}


def _made(own: Own, facts: Mapping[str, Any], geometry: Geometry) -> tuple[Rows, Training]:
    """It serves all modules that are like the first one, or those that the configuration names."""
    first, *others = dict.fromkeys(path for path, _ in own)
    if others:
        raise _refusal(f"an MLP at {first!r:.80}, and more at {few(others)}")
    site, layer = module_names.place_of(first, geometry)
    names = {theirs: f"{site}.{ours}" for theirs, ours in NETWORK.items()}
    tensors = contents.renamed({name: tensor for (_, name), tensor in own.items()}, names)
    training = Training("mlp", {"non_linearity": "tanh"}, tensors)
    made = building.made_rows(training, site)
    heads, width = module_names.shape_of(site, layer, geometry)
    modules = module_names.alike(first, geometry)
    count, rest = divmod(made.shape[1], 2 * heads * width)
    if len(modules) != count:
        told = facts.get("modified_modules")
        ends = tuple(f".{end}" for end in told if isinstance(end, str)) if isinstance(told, list) else ()
        modules = [name for name in modules if f".{name}".endswith(ends)]
    if rest or len(modules) != count or modules[0] != first:
        raise _refusal(f"an MLP at {first!r:.80} with rows of {made.shape[1]} numbers, for modules that are not known")
    halves = made.reshape(len(made), count, 2, -1).transpose(1, 2, 0, 3)
    return {name: (half[0], half[1]) for name, half in zip(modules, halves, strict=True)}, training


def _refusal(found: str) -> CheckpointError:
    return CheckpointError(found, "what OpenDelta saves of a prefix", "check --base, and that config.json is beside it")
