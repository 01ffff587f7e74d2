"""mlx-lm's prompt caches, without mlx: a key/value prefix in every layer of a decoder.

mlx-lm goes on behind a cache: its models rotate, or look up, positions from the cache's offset on, so real tokens stand
at P, P + 1, ... What `mlx_lm.cache_prompt` made of a text is a prefix as well, and is read as one.

mlx-lm has no file for vectors in the input. Some of its models take ``input_embeddings``, but its batches and its
command line take caches only. So vectors become a prefix (`softbridge.lowering.prefill`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from softbridge import untrusted
from softbridge.checkpoint.manifest import BESIDE
from softbridge.errors import BaseModelError, CheckpointError, Obstacle, few
from softbridge.geometry import Geometry
from softbridge.lowering.expressible import check_fits
from softbridge.plugin.capabilities import UP_TO_FLOAT32, Capabilities
from softbridge.prompt import BaseId, KeyValue, KeyValuePrefix, Origin, Positions, SoftPrompt
from softbridge.prompt.values import Json
from softbridge_mlx import prompt_cache
from softbridge_mlx.families import FAMILIES, missed, windows
from softbridge_mlx.prompt_cache import LayerCache, Layout

FILE = "prompt_cache.safetensors"
#: Encoding -> layout of the file.
LAYOUTS: Mapping[str, Layout] = {"safetensors": "0.32", "safetensors-0.31": "0.31"}


class MlxFormat:
    """Prompt caches of `save_prompt_cache`."""

    name = "mlx"
    summary = "mlx-lm: prompt caches, which its generate and its batches go on from"
    encodings = tuple(LAYOUTS)
    engine = "native"  # mlx-lm runs no transformers model: it is a server
    server = "mlx"
    files = ("*cache*.safetensors",)  # not those of a model
    reads = "the file of `save_prompt_cache`, of 0.32 and of earlier releases, with keys and values of every token"
    writes = "the same, for 0.32; for earlier ones `--encoding safetensors-0.31`"
    proven = "mlx-lm's own answers, alone and in batches, within 4 times its own distance from transformers"
    capabilities = Capabilities(
        prefix_sites=frozenset({"self"}),
        prefix_start="counted",
        every_layer=True,
        ragged=True,
        parts=1,
        positions_told=False,
        window="slides",
        dtypes=UP_TO_FLOAT32,
        model_types=frozenset(FAMILIES),
    )

    def sniff(self, files: untrusted.Files) -> bool:
        name = file_of(files)
        try:
            return name is not None and prompt_cache.layout_of(files.metadata(name)) is not None
        except CheckpointError:  # what is malformed is of no format, and reading it by name says why
            return False

    def read(self, files: untrusted.Files, geometry: Geometry | None) -> SoftPrompt:
        name = file_of(files)
        if name is None:
            raise CheckpointError(
                f"{files.path} holds {few(files.names)}", "one file of tensors", "give the path of the file itself"
            )
        caches, given = prompt_cache.read(files, name)
        part = KeyValuePrefix("self", {n: KeyValue(cache.keys, cache.values) for n, cache in enumerate(caches)})
        sizes = [cache.window for cache in caches]
        prompt = SoftPrompt(
            (part,),
            Positions({"decoder": part.length}),
            BaseId(given.get("model") or None, geometry),
            origin=Origin(self.name, {"windows": sizes, "metadata": given}),
        )
        if geometry is not None:
            check_fits(prompt, geometry)
            expected = windows(geometry) if geometry.decoder is not None else None
            if expected is not None and tuple(sizes) != expected:
                raise BaseModelError(
                    f"caches with windows of {_said(sizes)}",
                    f"{_said(expected)}, those of {geometry.model_type} in mlx-lm",
                    "check --base; a cache made with --max-kv-size has windows that the model has not",
                )
        return prompt

    def obstacles(self, prompt: SoftPrompt, geometry: Geometry | None) -> Sequence[Obstacle]:
        assert geometry is not None  # capabilities name families, so it was asked for
        found = []
        if _windows(prompt, geometry) is None:
            reason = f"some layers of {geometry.model_type} have a window of their own, and which is not known"
            found.append(Obstacle("base", reason, "give the base model: --base (base=... in Python)"))
        window, length = missed(geometry), prompt.prefixes[0].length
        if window is not None:
            bound = window - length
            reason = f"mlx-lm's model of {geometry.model_type} has no sliding window, and transformers' one of {window}"
            if bound < 1:
                found.append(Obstacle("window", f"{reason}, shorter than the prefix", "choose another target"))
            else:
                reason += f": the same only while a text has at most {bound} tokens"
                found.append(Obstacle("window", reason, "accept the bound on the text's length", True))
        if any(pair.keys.dtype != pair.values.dtype for pair in prompt.prefixes[0].layers.values()):
            reason = "a batch of mlx-lm has the keys and the values of a layer in one precision"
            found.append(Obstacle("precision", reason, "store them in one: --dtype float32", accidental=True))
        return found

    def write(
        self, prompt: SoftPrompt, geometry: Geometry | None, encoding: str | None = None
    ) -> Mapping[str, untrusted.Content]:
        assert geometry is not None
        sizes = _windows(prompt, geometry)
        assert sizes is not None  # it was an obstacle
        layers = prompt.prefixes[0].layers
        caches = [LayerCache(layers[n].keys, layers[n].values, size) for n, size in enumerate(sizes)]
        # What mlx_lm.generate looks for in a cache. Without the model's name it fails, and takes no model of its own.
        given = {"tokenizer_config": "{}"} | _given(prompt) | ({"model": prompt.base.name} if prompt.base.name else {})
        return {FILE: prompt_cache.write(caches, given, LAYOUTS[encoding or self.encodings[0]])}

    def advice(self, prompt: SoftPrompt, geometry: Geometry | None, first: int = 0) -> Sequence[str]:
        return (
            "pass --ignore-chat-template to mlx_lm.generate, and the whole text as --prompt: otherwise it leaves the "
            "beginning of a chat template out, as if the cache held it",
        )


def _windows(prompt: SoftPrompt, geometry: Geometry) -> Sequence[int | None] | None:
    """The window of each layer, by the base model or by the file that the prompt was read from; None: not known."""
    found, told = windows(geometry), _told(prompt, "windows")
    if found is None and isinstance(told, list) and len(told) == len(prompt.prefixes[0].layers):
        return [size if isinstance(size, int) else None for size in told]
    return found


def _given(prompt: SoftPrompt) -> dict[str, str]:
    """What whoever made the file that the prompt was read from wrote into it, but for the model's name."""
    told = _told(prompt, "metadata")
    pairs = told.items() if isinstance(told, dict) else ()
    return {name: text for name, text in pairs if isinstance(text, str) and name != "model"}


def _told(prompt: SoftPrompt, name: str) -> Json:
    """A detail of the file that the prompt was read from, if that was one of mlx-lm's; else None."""
    origin = prompt.origin
    return None if origin is None or origin.format != MlxFormat.name else origin.details.get(name)


def _said(sizes: Sequence[int | None]) -> str:
    return ", ".join("none" if size is None else str(size) for size in sizes)


def file_of(files: untrusted.Files) -> str | None:
    """The name of the one file of tensors beside softbridge's own; None: there are others, or none."""
    others = set(files.names) - BESIDE
    name = others.pop() if len(others) == 1 else None
    return name if name is not None and files.kind(name) == "safetensors" else None


FORMAT = MlxFormat()
