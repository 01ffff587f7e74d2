"""softbridge's own file form: a soft prompt in one safetensors file.

**The file.** A safetensors file whose metadata has one entry, ``softbridge``, a JSON object; every array of the prompt
is a tensor. The JSON is written with sorted keys, without spaces, in ASCII. The same prompt is always the same bytes.

**The description**, all keys required but for those that a part or the positions may have:

- ``version``: 1.
- ``parts``: a list. The part at place n is one of
  ``{"kind": "input", "stack": "encoder" | "decoder", "entry": "before" | "after",
  "placement": "before-sequence" | "after-first-token"}``, with the tensor ``parts.n.vectors`` [P, H], or
  ``{"kind": "prefix", "site": "self" | "encoder" | "cross", "layers": [numbers, rising]}``, with the tensors
  ``parts.n.layers.l.keys`` and ``parts.n.layers.l.values`` [K, P, D] for every layer l, or
  ``{"kind": "adaption", "site": "self" | "encoder", "layers": [numbers, rising], "joins": "heads" | "module" |
  "output"}``, with the tensors ``parts.n.layers.l.vectors`` [P, H] and ``parts.n.layers.l.gate`` [1 or heads].
  Three keys are there only where they say something: ``"gates": [numbers of the layers that have one, rising]``, with
  the tensors ``parts.n.layers.l.gate.weight`` [G, H] and ``parts.n.layers.l.gate.bias`` [G]; ``"template": TEMPLATE``,
  with the placement ``"template"``; and ``"scale": number``, by what the model that the vectors are for multiplies them
  before its first layer, in families of which releases of transformers differ in that. TEMPLATE is
  ``{"pieces": [PIECE, ...], "verbaliser": null | [[class, [ids]], ...]}`` and PIECE is
  ``{"virtual": number} | {"field": name} | {"words": [ids]} | {"slot": true}``.
- ``positions``: ``{"start": {stack: number}, "relative_bias": "plain" | "skewed", "window": "slides" | "pinned"}``,
  and ``"unbiased_from": {stack: layer}`` only where self-attention has no relative bias from a layer on.
- ``base``: ``{"name": text | null, "geometry": null | {"model_type", "hidden", "vocabulary", "encoder", "decoder",
  "embedding": number | null}}``, where a stack is null or
  ``{"layers", "heads", "kv_heads", "head_dim", "window": number | null}``, and ``"shapes": [[K, D], ...]`` where the
  layers differ.
- ``head``: names, sorted; ``head.NAME`` is the tensor.
- ``training``: null or ``{"kind": text, "settings": {...}, "tensors": names, sorted}``; the tensors are
  ``training.NAME``.
- ``origin``: null or ``{"format": text, "details": {...}, "digests": {file: sha256}}``. Of the details two are known,
  where they are there: ``"notes": [texts]``, which a conversion reports, and ``"partial": text | null``, what of
  its source was left behind.
- ``digest``: sha256, hexadecimal, over the JSON of ``[description without digest, [[name, dtype, shape], ...]]`` (the
  tensors sorted by name, dtypes in safetensors' words), followed by the bytes of the tensors in that order. Numbers
  with one bit turned are another function, and nothing else would show it.

**The tensors** are the ones named above and no others, little-endian, in row order, finite, of any dtype of
F64 F32 F16 BF16 I64 I32 I16 I8 U64 U32 U16 U8 BOOL.

Why a form of its own: no toolkit's files say where the real tokens' positions start, or keep the training's own tensors
beside what they make. A reader needs a safetensors library and this page.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any, TypeVar, cast

from softbridge.arrays import Array, pieces
from softbridge.errors import CheckpointError, OutputError
from softbridge.geometry import Geometry, StackGeometry
from softbridge.prompt.part import Adaption, AdaptionPrompt, Gate, InputPrompt, KeyValue, KeyValuePrefix, Part
from softbridge.prompt.soft_prompt import BaseId, Origin, Positions, SoftPrompt, Training
from softbridge.template import Template
from softbridge.untrusted import (
    DTYPE_CODES,
    Files,
    Streamed,
    little_endian,
    not_finite,
    parse_json,
    safetensors_file,
    sha256_of,
)

Made = TypeVar("Made")
KEY = "softbridge"
VERSION = 1
#: More of a base model are not believed: whoever converts goes through them.
MOST_LAYERS = 10**5

#: The name of such a file where transformers' trainer saves a model, and looks for one.
WEIGHTS_FILE = "model.safetensors"
_FIELDS = {"version", "parts", "positions", "base", "head", "training", "origin", "digest"}


def pack(prompt: SoftPrompt) -> bytes:
    """The bytes of a prompt's file; see `file_of`."""
    return bytes(file_of(prompt))


def file_of(prompt: SoftPrompt) -> Streamed:
    """The file of a prompt: the same bytes for the same prompt, in every process and on every machine.

    Raises:
        OutputError: a setting or a detail is no JSON value, or an array holds NaN or infinity, or is of a dtype that no
            format holds.
    """
    for name, array in prompt.arrays():
        if wrong := not_finite(array):
            raise OutputError(
                f"{wrong} of {array.size} numbers of '{name}' are not finite (NaN or infinity)",
                "finite numbers, which are all that a reader takes",
                "if they were trained, the training has diverged: go back to an earlier checkpoint, and lower the "
                "learning rate or clip gradients",
            )
    return _file_of(prompt)


def _file_of(prompt: SoftPrompt) -> Streamed:
    """The same, whatever the numbers are."""
    arrays = {name: little_endian(name, array) for name, array in prompt.arrays()}
    description = _describe(prompt)
    try:
        description["digest"] = _digest(description, arrays)
    except (TypeError, ValueError) as error:
        raise OutputError(
            f"the prompt's training settings or details of origin cannot be written as JSON: {error}",
            "texts, finite numbers, truth values, lists and dictionaries",
            "convert the values before saving",
        ) from error
    return safetensors_file(arrays, {KEY: _canonical(description)})


def unpack(files: Files, name: str) -> SoftPrompt:
    """The prompt in a file.

    Raises:
        CheckpointError: the file is not one of softbridge's own, or is damaged. The error names all that is wrong.
    """
    metadata = files.metadata(name)
    if metadata.keys() != {KEY}:
        raise _damaged(files, name, [f"metadata with the keys {sorted(metadata)!r:.200}, not only '{KEY}'"])
    description = parse_json(metadata[KEY].encode("utf-8"), f"{name}, metadata")
    version = description.get("version")
    if version != VERSION or isinstance(version, bool):
        raise CheckpointError(
            f"{name}: a softbridge file of version {version!r:.40}",
            f"version {VERSION}",
            "read it with the softbridge that wrote it, or update this one",
        )
    arrays = files.tensors(name)
    reader = _Reader(description, arrays)
    prompt = reader.prompt()
    if description.get("digest") != _digest(description, arrays):
        reader.problems.append("digest: not that of this description and these tensors")
    if prompt is None or reader.problems:
        raise _damaged(files, name, reader.problems)
    return prompt


def refilled(prompt: SoftPrompt, arrays: Mapping[str, Array]) -> SoftPrompt:
    """The prompt with other numbers, and its training state only if there are numbers for it.

    Args:
        prompt: what is not numbers comes from it, and so do the shapes.
        arrays: by the names of `SoftPrompt.arrays`, all of them and no others.

    Raises:
        CheckpointError: names or shapes are not the prompt's. All that is wrong is in the one error.
    """
    if not any(name.startswith("training.") for name in arrays):
        prompt = replace(prompt, training=None)
    expected = {name: array.shape for name, array in prompt.arrays()}
    problems = [f"missing tensor '{name}'" for name in expected.keys() - arrays.keys()]
    problems += [f"unexpected tensor '{name:.200}'" for name in arrays.keys() - expected.keys()]
    problems += [
        f"{name} {list(array.shape)}, the prompt's is {list(expected[name])}"
        for name, array in arrays.items()
        if name in expected and array.shape != expected[name]
    ]
    reader = _Reader(json.loads(_canonical({**_describe(prompt), "digest": None})), arrays)
    new = None if problems else reader.prompt()
    if new is None:
        raise CheckpointError(
            f"not the tensors of the prompt that is attached: {'; '.join(sorted(problems or reader.problems))}",
            f"the tensors {', '.join(expected)}",
            "attach a prompt of the same method, length and base model first",
        )
    return new


def _damaged(files: Files, name: str, problems: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{files.path}, {name}: no sound softbridge file: " + "; ".join(sorted(set(problems))),
        f"a softbridge file of version {VERSION}, as softbridge wrote it",
        "get the file again from where it came from, or convert the prompt again",
    )


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest_of(prompt: SoftPrompt) -> str:
    """sha256 of what a model sees: the file of its parts and positions alone.

    Neither the head, the base model's name nor where it was read from changes it.
    """
    return sha256_of(_file_of(SoftPrompt(prompt.parts, prompt.positions)))


def _digest(description: Mapping[str, Any], arrays: Mapping[str, Array]) -> str:
    plain = {name: value for name, value in description.items() if name != "digest"}
    names = sorted(arrays)
    tensors = [[name, DTYPE_CODES[arrays[name].dtype], arrays[name].shape] for name in names]
    state = hashlib.sha256(_canonical([plain, tensors]).encode("ascii"))
    for name in names:
        for piece in pieces(arrays[name]):
            state.update(piece)
    return state.hexdigest()


def _describe(prompt: SoftPrompt) -> dict[str, Any]:
    training, origin = prompt.training, prompt.origin
    return {
        "version": VERSION,
        "parts": [_describe_part(part) for part in prompt.parts],
        "positions": prompt.positions.to_json(),
        "base": {
            "name": prompt.base.name,
            "geometry": None if prompt.base.geometry is None else _describe_geometry(prompt.base.geometry),
        },
        "head": list(prompt.head),
        "training": None
        if training is None
        else {"kind": training.kind, "settings": dict(training.settings), "tensors": list(training.tensors)},
        "origin": None
        if origin is None
        else {"format": origin.format, "details": origin.described(), "digests": dict(origin.digests)},
    }


def _describe_geometry(geometry: Geometry) -> dict[str, Any]:
    described = asdict(geometry)
    for name in ("encoder", "decoder"):
        if described[name] is not None:
            del described[name]["sources"], described[name]["kinds"]
            if described[name]["shapes"] is None:
                del described[name]["shapes"]
    return described


def _describe_part(part: Part) -> dict[str, Any]:
    if isinstance(part, InputPrompt):
        more: dict[str, Any] = {} if part.template is None else {"template": part.template.to_json()}
        more |= {} if part.told_scale is None else {"scale": part.told_scale}
        return {"kind": "input", "stack": part.stack, "entry": part.entry, "placement": part.placement, **more}
    if isinstance(part, AdaptionPrompt):
        return {"kind": "adaption", "site": part.site, "layers": list(part.layers), "joins": part.joins}
    gated = [layer for layer, pair in part.layers.items() if pair.gate is not None]
    gates = {"gates": gated} if gated else {}
    return {"kind": "prefix", "site": part.site, "layers": list(part.layers), **gates}


class _Reader:
    """Builds a prompt from a description and tensors, and collects all that is wrong instead of stopping at the first.

    Whether words and shapes are right is asked of the prompt's own classes: there is one place that knows.
    """

    def __init__(self, description: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
        self.description = description
        self.left = dict(arrays)
        self.problems: list[str] = []

    def prompt(self) -> SoftPrompt | None:
        where = self.fields(self.description, "description", _FIELDS)
        parts = [self.part(number, part) for number, part in enumerate(self.items(where["parts"], "parts"))]
        positions = self.build("positions", Positions, self.positions(where["positions"]))
        base = self.base(where["base"])
        head = {name: self.take(f"head.{name}") for name in self.names(where["head"], "head")}
        training = None if where["training"] is None else self.training(where["training"])
        origin = None if where["origin"] is None else self.origin(where["origin"])
        self.problems += [f"unexpected tensor '{name}'" for name in self.left]
        if self.problems:
            return None
        return self.build(
            "description",
            SoftPrompt,
            {
                "parts": tuple(parts),
                "positions": positions,
                "base": base,
                "head": head,
                "training": training,
                "origin": origin,
            },
        )

    def part(self, number: int, value: Any) -> Part | None:
        here = f"parts.{number}"
        kind = value.get("kind") if isinstance(value, dict) else None
        if kind == "input":
            extra = {"template", "scale"} & value.keys()
            fields = self.fields(value, here, {"kind", "stack", "entry", "placement", *extra})
            vectors = self.take(f"{here}.vectors")
            del fields["kind"]
            if "template" in extra:
                fields["template"] = self.build(f"{here}.template", Template.from_json, {"value": fields["template"]})
            if "scale" in extra and not isinstance(fields["scale"], (int, float)):
                self.problems.append(f"{here}.scale: {fields['scale']!r:.40}, not a number")
            return None if vectors is None else self.build(here, InputPrompt, {**fields, "vectors": vectors})
        if kind == "prefix":
            extra = {"gates"} & value.keys()
            fields = self.fields(value, here, {"kind", "site", "layers", *extra})
            numbers = self.rising(fields["layers"], f"{here}.layers")
            gates = self.rising(fields["gates"], f"{here}.gates") if extra else []
            if extra and (not gates or not set(gates) <= set(numbers)):
                self.problems.append(f"{here}.gates: {gates!r:.80}, not some of the layers")
            layers = {layer: self.layer(f"{here}.layers.{layer}", layer in gates) for layer in numbers}
            if None in layers.values():
                return None
            return self.build(here, KeyValuePrefix, {"site": fields["site"], "layers": layers})
        if kind == "adaption":
            fields = self.fields(value, here, {"kind", "site", "layers", "joins"})
            del fields["kind"]
            numbers = self.rising(fields["layers"], f"{here}.layers")
            fields["layers"] = {n: self.adaption(f"{here}.layers.{n}") for n in numbers}
            return None if None in fields["layers"].values() else self.build(here, AdaptionPrompt, fields)
        self.problems.append(f"{here}: neither an input prompt, a prefix nor an adaption prompt: {value!r:.80}")
        return None

    def layer(self, here: str, gated: bool) -> KeyValue | None:
        arrays = {name: self.take(f"{here}.{name}") for name in ("keys", "values")}
        gate = {name: self.take(f"{here}.gate.{name}") for name in ("weight", "bias")} if gated else {}
        if any(array is None for array in (*arrays.values(), *gate.values())):
            return None
        made = self.build(f"{here}.gate", Gate, gate) if gated else None
        return self.build(here, KeyValue, {**arrays, "gate": made})

    def adaption(self, here: str) -> Adaption | None:
        arrays = {name: self.take(f"{here}.{name}") for name in ("vectors", "gate")}
        return None if any(array is None for array in arrays.values()) else self.build(here, Adaption, arrays)

    def rising(self, value: Any, here: str) -> list[int]:
        numbers = self.items(value, here)
        if all(map(_is_count, numbers)) and numbers == sorted(set(numbers)):
            return numbers
        self.problems.append(f"{here}: {numbers!r:.80}, not rising numbers from 0")
        return []

    def positions(self, value: Any) -> dict[str, Any]:
        extra = {"unbiased_from"} & value.keys() if isinstance(value, dict) else set()
        fields = self.fields(value, "positions", {"start", "relative_bias", "window", *extra})
        for name in ("start", *extra):
            fields[name] = self.fields(fields[name], f"positions.{name}", None)
            self.problems += [
                f"positions.{name}.{stack:.40}: {place!r:.40}, not a number from 0"
                for stack, place in fields[name].items()
                if not _is_count(place)
            ]
        if extra and not fields["unbiased_from"]:
            self.problems.append("positions.unbiased_from: no stack")
        return fields

    def base(self, value: Any) -> BaseId:
        fields = self.fields(value, "base", {"name", "geometry"})
        if fields["geometry"] is None:
            return BaseId(self.text(fields["name"], "base.name", optional=True))
        here = "base.geometry"
        shape = self.fields(
            fields["geometry"], here, {"model_type", "hidden", "vocabulary", "encoder", "decoder", "embedding"}
        )
        stacks = {name: self.stack(shape[name], f"{here}.{name}") for name in ("encoder", "decoder")}
        geometry = Geometry(
            cast("str", self.text(shape["model_type"], f"{here}.model_type")),
            self.count(shape["hidden"], f"{here}.hidden"),
            self.count(shape["vocabulary"], f"{here}.vocabulary"),
            **stacks,
            embedding=None if shape["embedding"] is None else self.count(shape["embedding"], f"{here}.embedding"),
        )
        return BaseId(self.text(fields["name"], "base.name", optional=True), geometry)

    def stack(self, value: Any, here: str) -> StackGeometry | None:
        if value is None:
            return None
        counts = ("layers", "heads", "kv_heads", "head_dim")
        extra = {"shapes"} & value.keys() if isinstance(value, dict) else set()
        fields = self.fields(value, here, {*counts, "window", *extra})
        window = fields["window"]
        shapes = [
            tuple(self.count(size, f"{here}.shapes") for size in self.items(pair, f"{here}.shapes"))
            for pair in (self.items(fields["shapes"], f"{here}.shapes") if extra else ())
        ]
        if extra and (len(shapes) != fields["layers"] or any(len(pair) != 2 for pair in shapes)):
            self.problems.append(f"{here}.shapes: not a pair for each of the layers")
        if _is_count(fields["layers"]) and fields["layers"] > MOST_LAYERS:
            self.problems.append(f"{here}.layers: {fields['layers']!r:.40}, more than {MOST_LAYERS}")
        return StackGeometry(
            **cast("Any", {name: self.count(fields[name], f"{here}.{name}") for name in counts}),
            window=None if window is None else self.count(window, f"{here}.window"),
            shapes=cast("Any", tuple(shapes)) if extra else None,
        )

    def training(self, value: Any) -> Training | None:
        fields = self.fields(value, "training", {"kind", "settings", "tensors"})
        kind = self.text(fields["kind"], "training.kind")
        settings = self.fields(fields["settings"], "training.settings", None)
        tensors = {n: self.take(f"training.{n}") for n in self.names(fields["tensors"], "training.tensors")}
        if kind is None or any(tensor is None for tensor in tensors.values()):
            return None
        return self.build("training", Training, {"kind": kind, "settings": settings, "tensors": tensors})

    def origin(self, value: Any) -> Origin | None:
        fields = self.fields(value, "origin", {"format", "details", "digests"})
        form = self.text(fields["format"], "origin.format")
        details = self.fields(fields["details"], "origin.details", None)
        digests = self.fields(fields["digests"], "origin.digests", None)
        for file, digest in digests.items():
            self.text(digest, f"origin.digests.{file:.40}")
        return self.build("origin.details", Origin, {"format": form, "details": details, "digests": digests})

    def take(self, name: str) -> Array | None:
        array = self.left.pop(name, None)
        if array is None:
            self.problems.append(f"missing tensor '{name:.200}'")
        return array

    def build(self, here: str, make: Callable[..., Made], fields: Mapping[str, Any]) -> Made | None:
        try:
            return make(**fields)
        except (TypeError, ValueError) as error:  # TypeError: an unhashable value where a word is asked for
            self.problems.append(f"{here}: {error!s:.200}")
            return None

    def fields(self, value: Any, here: str, names: set[str] | None) -> dict[str, Any]:
        """The object's fields: exactly `names`, or any if None. What is missing is None, and a problem."""
        if not isinstance(value, dict):
            self.problems.append(f"{here}: {type(value).__name__}, not an object")
            value = {}
        elif names is not None:
            self.problems += [f"{here}: no '{name}'" for name in names - value.keys()]
            self.problems += [f"{here}: unexpected '{name:.40}'" for name in value.keys() - names]
        return dict.fromkeys(names or ()) | {n: v for n, v in value.items() if names is None or n in names}

    def items(self, value: Any, here: str) -> list[Any]:
        if isinstance(value, list):
            return value
        self.problems.append(f"{here}: {type(value).__name__}, not a list")
        return []

    def names(self, value: Any, here: str) -> list[str]:
        names = self.items(value, here)
        if all(isinstance(name, str) for name in names) and names == sorted(set(names)):
            return names
        self.problems.append(f"{here}: {names!r:.80}, not names, sorted, each once")
        return []

    def text(self, value: Any, here: str, *, optional: bool = False) -> str | None:
        if not isinstance(value, str) and not (optional and value is None):
            self.problems.append(f"{here}: {type(value).__name__}, not a text")
            return None
        return value

    def count(self, value: Any, here: str) -> int:
        if not _is_count(value) or value == 0:
            self.problems.append(f"{here}: {value!r:.40}, not a positive number")
            return 0
        return cast("int", value)


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0
