"""What a recording holds, and how its description and tensors become one again: read without believing a word."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from softbridge.arrays import Array
from softbridge.geometry import Geometry, StackGeometry
from softbridge.verification.bench import Capture
from softbridge.verification.certificate import Side
from softbridge.verification.claim import WORKING, Claim
from softbridge.verification.probes import GREEDY, REVERSED

#: Group of arrays in the file -> attribute of `Capture`.
ARRAYS = {name: name for name in ("exact", "rough", "states", "gradient")} | {"turned": "rotated"}
#: What is watched inside a model: see `softbridge.verification.layers.places`.
_PLACE = re.compile(r"(?:encoder|decoder)\.\d{1,6}\.\S+")


@dataclass(frozen=True)
class Recording:
    """What one side put out, and on what.

    Attributes:
        side: what was run.
        setting: everything that both sides must share, as JSON: seed, precision, window, texts, weights; the digests
            of the probes and of the model's weights, piece by piece.
        captures: what came out, piece by piece.
        base: name of the base model, or None.
        geometry: its attention.
        weights: with which weights it was run, in words.
        claim: in which sense it is to be the same as another, which is the target.
        versions: of everything that can change a result.
    """

    side: Side
    setting: Mapping[str, Any]
    captures: tuple[Capture, ...]
    base: str | None
    geometry: Geometry
    weights: str
    claim: Claim
    versions: Mapping[str, str]


def recording_of(content: Mapping[str, Any], tensors: Mapping[str, Array]) -> Recording:
    """The recording of which these are the description and the tensors.

    Raises:
        ValueError: something is missing, of another kind, or could not have been recorded.
    """
    left, said = dict(tensors), _Fields(content, "")
    side = said.object("side")
    text = {name: side.get(name, _is_text) for name in ("path", "engine", "instead_of", "digest")}
    engine = text["engine"]
    captures = [
        _capture(_Fields(plain, f"captures.{number}."), engine, f"{number}.", left)
        for number, plain in enumerate(said.get("captures", _is_list))
    ]
    setting = said.object("setting")
    kinds: Mapping[str, Callable[[Any], bool]] = {
        "seed": lambda value: type(value) is int and 0 <= value < 2**32,
        "precision": lambda value: value in (*WORKING, "float64"),
        "window": lambda value: value is None or _is_count(value),
        "own weights": _is_truth,
        "model": lambda value: _is_list(value) and all(map(_is_texts, value)),
    }
    known = {name: setting.get(name, is_right) for name, is_right in kinds.items()}
    if not captures or len(captures) != len(known["model"]) or left:
        raise ValueError(f"{len(captures)} pieces of {len(known['model'])}, and {len(left)} tensors that are of none")
    return Recording(
        side=Side(**text, loaded=side.get("loaded", _is_truth), files=side.get("files", _is_texts)),
        setting=known,
        captures=tuple(captures),
        base=said.get("base", lambda value: value is None or _is_text(value)),
        geometry=_geometry(said.object("geometry")),
        weights=said.get("weights", _is_text),
        claim=Claim.from_json(said.get("claim", lambda value: True)),
        versions=said.get("versions", _is_texts),
    )


class _Fields:
    """An object of the description. What is missing or of another kind is a ValueError that names it."""

    def __init__(self, value: Any, here: str) -> None:
        if not isinstance(value, dict):
            raise ValueError(f"{here.rstrip('.') or 'description'}: {type(value).__name__}, not an object")
        self.value = value
        self.here = here

    def get(self, name: str, is_right: Callable[[Any], bool]) -> Any:
        value = self.value.get(name)
        if name not in self.value or not is_right(value):
            raise ValueError(f"{self.here}{name}: {type(value).__name__}, or a value that cannot stand there")
        return value

    def object(self, name: str) -> _Fields:
        return _Fields(self.value.get(name), f"{self.here}{name}.")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_truth(value: Any) -> bool:
    return isinstance(value, bool)


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_text, value.values()))


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**62


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 2**1000 and math.isfinite(value)


def _capture(said: _Fields, engine: str, begin: str, left: dict[str, Array]) -> Capture:
    """One piece; what it has of `left` is taken out."""
    order = said.object("order")
    groups: dict[str, dict[str, Array]] = {}
    for group, attribute in ARRAYS.items():
        names = order.get(group, _is_names)
        if missing := [name for name in names if f"{begin}{group}.{name}" not in left]:
            raise ValueError(f"no tensors for {', '.join(missing):.80}")
        groups[attribute] = {name: left.pop(f"{begin}{group}.{name}") for name in dict.fromkeys(names)}
    _check_outputs(said.here, groups)
    is_numbers: Callable[[Any], bool] = lambda value: isinstance(value, dict) and all(map(_is_number, value.values()))  # noqa: E731
    return Capture(
        engine=engine,
        float32_regions=tuple(said.get("islands", _is_names)),
        longest=said.get("longest", _is_count),
        loss=float(said.get("loss", _is_number)),
        start=said.get("start", lambda value: is_numbers(value) and all(type(one) is int for one in value.values())),
        repeats=said.get("repeats", _is_truth),
        left_pads=said.get("left_pads", _is_truth),
        faults=said.get("faults", lambda value: is_numbers(value) and "dropped" in value),
        untried=said.get("untried", _is_texts),
        stepwise=said.get("stepwise", _is_text),
        unit=float(said.get("unit", _is_number)),
        naive=None,
        **groups,
    )


def _check_outputs(here: str, groups: Mapping[str, Mapping[str, Array]]) -> None:
    """Refuse outputs that no probes of softbridge's have: `softbridge.verification.judge` counts on these."""
    exact, rough = groups["exact"], groups["rough"]
    shapes = {name: array.shape for name, array in exact.items()}
    as_rough = {name: array.shape for name, array in rough.items()}
    right, back = shapes.get("right-padded"), as_rough.pop(REVERSED, None)
    logits = [name for name in exact if name != GREEDY]
    wrong = right is None or back != right or not any(name.startswith("alone") for name in exact)
    wrong |= any(exact[name].ndim != 2 or not exact[name].size for name in logits)
    wrong |= {n: s for n, s in shapes.items() if n != GREEDY} != {n: s for n, s in as_rough.items() if n != GREEDY}
    wrong |= (GREEDY in exact) != (GREEDY in rough) or len({exact[name].shape[1:] for name in logits}) > 1
    wrong |= sum(len(exact[n]) for n in logits if n.startswith("alone")) != (right or (0,))[0]
    wrong |= shapes.get("left-padded", right) != right
    if wrong:
        raise ValueError(f"{here}order: not the outputs of softbridge's probes: {shapes!s:.120}")
    if any(not _PLACE.fullmatch(name) or array.ndim != 2 or not array.size for name, array in groups["states"].items()):
        raise ValueError(f"{here}order: states of no place in a model")
    if not groups["gradient"] or any(not array.size for group in groups.values() for array in group.values()):
        raise ValueError(f"{here}order: no gradient, or empty arrays")
    kinds = {array.dtype.kind for name in ("exact", "rough") for array in groups[name].values()}
    if not kinds <= {"f", "i"} or any(
        a.dtype.kind != "f" for n in ("states", "gradient", "rotated") for a in groups[n].values()
    ):
        raise ValueError(f"{here}order: arrays of the kinds {', '.join(sorted(kinds))}")


def _geometry(said: _Fields) -> Geometry:
    def stack(name: str) -> StackGeometry | None:
        if said.value.get(name) is None:
            return None
        one = said.object(name)
        shapes = one.get("shapes", lambda value: value is None or (_is_list(value) and all(map(_is_pair, value))))
        sources = one.get("sources", lambda value: value is None or (_is_list(value) and all(map(_is_index, value))))
        kinds = one.get("kinds", lambda value: value is None or _is_names(value))
        return StackGeometry(
            **{count: one.get(count, _is_count) for count in ("layers", "heads", "kv_heads", "head_dim")},
            window=one.get("window", lambda value: value is None or _is_count(value)),
            shapes=None if shapes is None else tuple((k, d) for k, d in shapes),
            sources=None if sources is None else tuple(sources),
            kinds=None if kinds is None else tuple(kinds),
        )

    unknown = said.value.keys() - {field.name for field in fields(Geometry)}
    if unknown:
        raise ValueError(f"{said.here}{', '.join(sorted(unknown)):.80}: unknown")
    return Geometry(
        said.get("model_type", _is_text),
        said.get("hidden", _is_count),
        said.get("vocabulary", _is_count),
        stack("encoder"),
        stack("decoder"),
        said.get("embedding", lambda value: value is None or _is_count(value)),
    )


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_count, value))


def _is_index(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62
