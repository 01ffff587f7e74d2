"""Verification is trusted because it can fail: faults are put into the code, one at a time, and each must be caught.

A fault is a small edit of one or two functions (the sort a tired engineer commits), compiled and swapped in for one
test. With it a conversion must not come out as the same: it is refused, or what was written reads back differently, or
the two sides compute something else. Without it the very same call succeeds. Some faults are in reading and in writing
alike, so that the two cancel: there the toolkit's own loader is what notices.
"""

from __future__ import annotations
import __future__

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from types import CodeType
from typing import Any, Literal

import numpy as np
import pytest

import softbridge as sb
from softbridge.base import BaseModel
from softbridge.errors import SoftbridgeError
from softbridge.geometry import Geometry
from softbridge.lowering.examples import METHODS, example
from softbridge.methods import MLP, PrefixTuning
from softbridge.plugin.registry import engines, format_named
from softbridge.prompt import Gate, SoftPrompt
from softbridge.testing import random_prefix, tiny_config, tiny_model
from softbridge.verification import Certificate, bench
from softbridge.verification import proof as verification

HAS_ADAPTERHUB = engines()["adapterhub"].unavailable() is None


@dataclass(frozen=True)
class Route:
    """One conversion that comes out as the same; `adapterhub`: only where AdapterHub is installed."""

    family: str
    method: str
    source: str
    target: str
    accept: tuple[str, ...] = ()
    dtype: str | None = None
    adapterhub: bool = False


@dataclass(frozen=True)
class Fault:
    """One defect.

    Attributes:
        route: name of the route that is to notice it.
        edits: (module:function, what stands there once, what stands there instead).
        adapterhub: why it takes AdapterHub itself to notice it, if it does.
        blind: why it is not noticed, if it is a blind spot.
        where: on which comparisons it is one.
    """

    route: str
    edits: tuple[tuple[str, str, str], ...]
    adapterhub: str = ""
    blind: str = ""
    where: Literal["everywhere", "one engine", "no toolkit"] = "everywhere"

    def hides(self, right: Certificate) -> bool:
        """Whether a comparison like that one is blind to it."""
        one, no = not right.independent, bool(right.target.instead_of)
        return bool(self.blind) and {"everywhere": True, "one engine": one, "no toolkit": no}[self.where]


def fault(route: str, *edits: tuple[str, str, str], **more: Any) -> Fault:
    return Fault(route, edits, **more)


ROUTES = {
    "llama: peft to softbridge": Route("llama", "prefix-tuning", "peft", "softbridge"),
    "llama: peft to softbridge in float64": Route("llama", "prefix-tuning", "peft", "softbridge", dtype="float64"),
    "llama: peft to softbridge in float16": Route("llama", "prefix-tuning", "peft", "softbridge", dtype="float16"),
    "llama: softbridge to peft": Route("llama", "prefix-tuning", "softbridge", "peft"),
    "llama: peft to adapterhub": Route("llama", "prefix-tuning", "peft", "adapterhub"),
    "llama: adapterhub to peft": Route("llama", "prefix-tuning", "adapterhub", "peft"),
    "gpt2: softbridge to peft": Route("gpt2", "prefix-tuning", "softbridge", "peft"),
    "gpt2: peft to softbridge": Route("gpt2", "prefix-tuning", "peft", "softbridge"),
    "gpt2: peft to adapterhub": Route("gpt2", "prefix-tuning", "peft", "adapterhub", ("positions",)),
    "gpt2: adapterhub to peft": Route("gpt2", "prefix-tuning", "adapterhub", "peft", ("positions",)),
    "gpt2: adapterhub to softbridge, MLP": Route("gpt2", "prefix-tuning-square-mlp", "adapterhub", "softbridge"),
    "gpt2: adapterhub to softbridge, gates": Route("gpt2", "prefix-tuning-two-gates", "adapterhub", "softbridge"),
    "gpt2: softbridge to adapterhub, gates": Route(
        "gpt2", "prefix-tuning-two-gates", "softbridge", "adapterhub", ("positions",)
    ),
    "gpt2: softbridge to adapterhub, some layers": Route(
        "gpt2", "prefix-tuning-layers", "softbridge", "adapterhub", ("positions",), adapterhub=True
    ),
    "gpt2: softbridge to peft, vectors": Route("gpt2", "prompt-tuning", "softbridge", "peft"),
    "gpt2: softbridge to peft, P-tuning": Route("gpt2", "p-tuning", "softbridge", "peft"),
    "gpt2: peft to softbridge, tasks": Route("gpt2", "multitask-prompt-tuning", "peft", "softbridge"),
    "gpt2: softbridge to peft, cartridge": Route("gpt2", "cartridge", "softbridge", "peft"),
    "bert: peft to adapterhub, vectors": Route("bert", "prompt-tuning", "peft", "adapterhub", ("positions",)),
    "bert: softbridge to peft, head": Route("bert", "p-tuning-v2", "softbridge", "peft"),
    "bart: adapterhub to softbridge": Route("bart", "p-tuning-v2", "adapterhub", "softbridge"),
    "t5: peft to softbridge": Route("t5", "prefix-tuning", "peft", "softbridge"),
    "t5: softbridge to peft": Route("t5", "prefix-tuning", "softbridge", "peft"),
}

_KEPT = "both sides are then read by softbridge alone"

#: Module:function -> the lines that several faults are put into.
_ROWS = "softbridge.prompt.part:KeyValuePrefix.from_rows"
_FLAT = "softbridge.prompt.part:KeyValuePrefix.flat"
_ORDER = "softbridge.prompt.part:KeyValuePrefix._halves"
_ROTATE = "softbridge.lowering.token_positions:rotate"
_MOVE = "softbridge.lowering.token_positions:_move"
_ATTEND = "softbridge_native.attention:_attend_joined"
_ADAPTER = "softbridge_adapterhub.adapter:Adapter"
_WRITE = "softbridge_adapterhub.format:AdapterHubFormat.write"
_PAIR = "KeyValue(pair[0], pair[1])"
_HALVES = "(pair.keys, pair.values)"
_RESHAPE = ".reshape(-1, 2, heads, width).transpose(1, 2, 0, 3)"
_GATES = "zip(self._gate_keys(part.site, layer), gate, strict=True)"
_GATE = "Gate(*(tensors[key] for key in keys))"
_STORED = "facts.stored_layers(tuple(part.layers), self.geometry)"
_KEYS = "torch.cat((keys, key), 2)"
_VALUES = "torch.cat((values, value), 2)"
_KEEP = "softbridge_native.joined_cache:keep"

FAULTS = {
    # Rotation and positions.
    "the last layer is not rotated": fault(
        "llama: peft to adapterhub",
        (_ROTATE, "@ maps[layer]", "@ (np.eye(len(maps[layer])) if layer == max(part.layers) else maps[layer])"),
    ),
    "keys are rotated the other way": fault("llama: peft to adapterhub", (_ROTATE, "@ maps[layer]", "@ maps[layer].T")),
    "the rotation is one position too far": fault(
        "llama: peft to adapterhub",
        (_MOVE, "scheme.rotation(want - have)", "scheme.rotation(want - have + 1)"),
    ),
    "values are rotated, too": fault(
        "llama: adapterhub to peft",
        (
            _ROTATE,
            "both[1] = pair.values",
            "both[1] = pair.values.astype(np.float64) @ maps[layer]",
        ),
    ),
    "rotated keys are stored in bfloat16": fault(
        "llama: adapterhub to peft",
        (_ROTATE, "np.empty((part.length, columns), dtype)", "np.empty((part.length, columns), 'bfloat16')"),
    ),
    "keys are rotated, and the prompt says one position more": fault(
        "llama: peft to adapterhub", (_MOVE, "stack: want}", "stack: want + 1}")
    ),
    "position_ids that must be passed are not passed": fault(
        "gpt2: peft to adapterhub",
        (_MOVE, "Option(prompt, (), (obstacle,))", "Option(moved, (), (obstacle,))"),
    ),
    "the manifest says the toolkit's own positions": fault(
        "gpt2: peft to adapterhub",
        (
            "softbridge.checkpoint.write:write_files",
            "lowering.prompt.positions.to_json()",
            "replace(lowering.prompt.positions, start={'decoder': 0}).to_json()",
        ),
    ),
    "the manifest is not written": fault(
        "gpt2: adapterhub to peft",
        (
            "softbridge.checkpoint.write:write_files",
            ", MANIFEST: last}",
            "}",
        ),
    ),
    "a toolkit is believed to count one token more": fault(
        "llama: adapterhub to peft",
        (
            "softbridge.lowering.token_positions:native_positions",
            'counted[stack] if own == "counted"',
            'counted[stack] + 1 if own == "counted"',
        ),
    ),
    # The flat layout.
    "keys and values swapped in reading": fault(
        "llama: peft to softbridge", (_ROWS, _PAIR, "KeyValue(pair[1], pair[0])")
    ),
    "heads reversed in reading": fault(
        "llama: peft to softbridge", (_ROWS, _PAIR, "KeyValue(pair[0][::-1], pair[1][::-1])")
    ),
    "rows reversed in reading": fault(
        "llama: peft to softbridge", (_ROWS, _PAIR, "KeyValue(pair[0][:, ::-1], pair[1][:, ::-1])")
    ),
    "layers reversed in reading": fault(
        "llama: peft to softbridge", (_ROWS, "in shapes.items():", "in reversed(list(shapes.items())):")
    ),
    "heads and channels swapped in reading": fault(
        "llama: peft to softbridge", (_ROWS, _RESHAPE, ".reshape(-1, 2, width, heads).transpose(1, 3, 0, 2)")
    ),
    "heads before keys and values in reading": fault(
        "llama: peft to softbridge", (_ROWS, _RESHAPE, ".reshape(-1, heads, 2, width).transpose(2, 1, 0, 3)")
    ),
    "keys and values swapped in writing": fault(
        "llama: softbridge to peft", (_ORDER, _HALVES, "(pair.values, pair.keys)")
    ),
    "layers reversed in writing": fault(
        "llama: softbridge to peft", (_ORDER, "in self.layers.values()", "in reversed(list(self.layers.values()))")
    ),
    "heads before rows in writing": fault(
        "llama: softbridge to peft", (_FLAT, "half.transpose(1, 0, 2)", "half.reshape(place.shape)")
    ),
    "keys and values swapped in reading and in writing": fault(
        "llama: softbridge to peft",
        (_ROWS, _PAIR, "KeyValue(pair[1], pair[0])"),
        (_ORDER, _HALVES, "(pair.values, pair.keys)"),
    ),
    "heads and channels swapped in reading and in writing": fault(
        "llama: softbridge to peft",
        (_ROWS, _RESHAPE, ".reshape(-1, 2, width, heads).transpose(1, 3, 0, 2)"),
        (_FLAT, "half.transpose(1, 0, 2)", "half.transpose(1, 2, 0).reshape(place.shape)"),
    ),
    "layers reversed in reading and in writing": fault(
        "gpt2: peft to softbridge",
        (_ROWS, "in shapes.items():", "in reversed(list(shapes.items())):"),
        (_ORDER, "in self.layers.values()", "in reversed(list(self.layers.values()))"),
    ),
    # Precision.
    "keys go through bfloat16 to float64": fault(
        "llama: peft to softbridge in float64",
        (
            "softbridge.lowering.precision:_pair_as_dtype",
            "pair.keys.astype(dtype)",
            "pair.keys.astype(BFLOAT16).astype(dtype)",
        ),
    ),
    "keys go through bfloat16 to float16, as asked": fault(
        "llama: peft to softbridge in float16",
        (
            "softbridge.lowering.precision:_pair_as_dtype",
            "pair.keys.astype(dtype)",
            "pair.keys.astype(BFLOAT16).astype(dtype)",
        ),
    ),
    # The embedding block.
    "vectors leave the embedding block one position on": fault(
        "bert: peft to adapterhub, vectors",
        (
            "softbridge.lowering.passes:_entry",
            "enter_block)(base, vectors, first)",
            "enter_block)(base, vectors, first + 1)",
        ),
    ),
    "vectors leave the embedding block before its norm": fault(
        "bert: peft to adapterhub, vectors",
        (
            "softbridge.lowering.embedding_block:leave_block",
            "block.register_forward_hook(lambda _, a, output: keep(output))",
            "block.LayerNorm.register_forward_pre_hook(lambda _, a: keep(a[0]))",
        ),
    ),
    "vectors leave the embedding block all at one position": fault(
        "bert: peft to adapterhub, vectors",
        (
            "softbridge.lowering.embedding_block:_watched",
            "model(inputs_embeds=tokens,",
            "model(position_ids=torch.zeros(tokens.shape[:2], dtype=torch.long), inputs_embeds=tokens,",
        ),
    ),
    # Parameterisations.
    "the other task": fault(
        "gpt2: peft to softbridge, tasks",
        ("softbridge.methods.kinds:_multitask", "= _task(", "= 1 - _task("),
    ),
    "one task's matrices mixed with another's": fault(
        "gpt2: peft to softbridge, tasks",
        ("softbridge.methods.kinds:_multitask", "rows[task : task + 1]", "rows.flip(0)[task : task + 1]"),
    ),
    "the rows of a cartridge in the wrong order": fault(
        "gpt2: softbridge to peft, cartridge",
        ("softbridge.methods.kinds:_cartridge", '("frozen", "trained")', '("trained", "frozen")'),
    ),
    "an activation before the first layer, not behind it": fault(
        "gpt2: softbridge to peft, P-tuning",
        ("softbridge.methods.kinds:_linear_layers", "if number else", "if not number else"),
    ),
    "a square weight transposed": fault(
        "gpt2: adapterhub to softbridge, MLP",
        ("softbridge.methods.kinds:_mlp", 'tensors[f"{name}.weight"]', 'tensors[f"{name}.weight"].T'),
        adapterhub="it alone evaluates the parameterisation in its file, otherwise",
    ),
    "no activation": fault(
        "gpt2: adapterhub to softbridge, MLP",
        ("softbridge.methods.kinds:_mlp", "hidden = function(", "hidden = ("),
        adapterhub="it alone evaluates the parameterisation in its file, otherwise",
    ),
    # PEFT's files.
    "PEFT's rows reversed": fault(
        "gpt2: softbridge to peft, vectors",
        ("softbridge_peft.format:tensors_of", "{facts.PROMPT: part.vectors}", "{facts.PROMPT: part.vectors[::-1]}"),
    ),
    "PEFT's numbers scaled by a thousandth": fault(
        "gpt2: softbridge to peft",
        (
            "softbridge_peft.format:tensors_of",
            "(part).flat(), **head",
            "(part).flat() * np.float32(1.001), **head",
        ),
    ),
    "a head of zeros": fault(
        "bert: softbridge to peft, head",
        ("softbridge_peft.format:tensors_of", "facts.HEAD + name: array for", "facts.HEAD + name: array * 0 for"),
    ),
    "the head's classes reversed": fault(
        "bert: softbridge to peft, head",
        ("softbridge_peft.format:tensors_of", "facts.HEAD + name: array for", "facts.HEAD + name: array[::-1] for"),
    ),
    "blocks of an encoder-decoder taken in their own order in reading": fault(
        "t5: peft to softbridge",
        (
            "softbridge_peft.prefix_tensors:read_prefix",
            "stored.layers[facts.stored_block(layer, layers, fields.submodules)]",
            "stored.layers[layer]",
        ),
    ),
    "blocks of an encoder-decoder in their own order in writing": fault(
        "t5: softbridge to peft",
        (
            "softbridge_peft.prefix_tensors:stored_blocks",
            "facts.stored_block(layer, len(prefix.layers), 2)",
            "layer",
        ),
    ),
    "blocks of an encoder-decoder in their own order in reading and in writing": fault(
        "t5: peft to softbridge",
        ("softbridge_peft.facts:stored_block", "2 * layer % layers", "layer"),
        blind="where PEFT alone runs T5 prefixes, it runs both sides, and what its file is read as is turned back into "
        "the same file for it",
        where="one engine",
    ),
    # AdapterHub's files.
    "each layer holds the next one's prefix in writing": fault(
        "gpt2: peft to adapterhub",
        (f"{_ADAPTER}.tensors", "part.layers[layer] for", "part.layers[(layer + 1) % len(part.layers)] for"),
    ),
    "each layer holds the next one's prefix in reading and in writing": fault(
        "gpt2: peft to adapterhub",
        (f"{_ADAPTER}.tensors", "part.layers[layer] for", "part.layers[(layer + 1) % len(part.layers)] for"),
        (f"{_ADAPTER}._prefix", "replace(part.layers[layer]", "replace(part.layers[(layer - 1) % len(stored)]"),
        adapterhub=_KEPT,
    ),
    "the layers that are left out are one too far": fault(
        "gpt2: softbridge to adapterhub, some layers",
        (_WRITE, "adapter.config,", '{**adapter.config, "leave_out": [n - 1 for n in adapter.config["leave_out"]]},'),
    ),
    "the encoder's prefix under the decoder's name, and the other way": fault(
        "bart: adapterhub to softbridge",
        (
            "softbridge_adapterhub.facts:location",
            'f"{site}_prefix"',
            "{'encoder': 'self', 'self': 'encoder'}.get(site, site) + '_prefix'",
        ),
        adapterhub=_KEPT,
    ),
    "the cross-attention's prefix under the decoder's name, and the other way": fault(
        "bart: adapterhub to softbridge",
        (
            "softbridge_adapterhub.facts:location",
            'f"{site}_prefix"',
            "{'cross': 'self', 'self': 'cross'}.get(site, site) + '_prefix'",
        ),
        adapterhub=_KEPT,
    ),
    "the configuration says no gates": fault(
        "gpt2: softbridge to adapterhub, gates",
        (_WRITE, "adapter.config,", '{**adapter.config, "use_gating": False},'),
    ),
    "gates are not read": fault(
        "gpt2: adapterhub to softbridge, gates",
        (f"{_ADAPTER}._prefix", f"{_GATE} if gated", "None if gated"),
        adapterhub=_KEPT,
    ),
    "gates of keys and values swapped in writing": fault(
        "gpt2: softbridge to adapterhub, gates",
        (f"{_ADAPTER}.tensors", _GATES, "zip(self._gate_keys(part.site, layer), (g[::-1] for g in gate), strict=True)"),
    ),
    "gates of keys and values swapped in reading and in writing": fault(
        "gpt2: adapterhub to softbridge, gates",
        (f"{_ADAPTER}.tensors", _GATES, "zip(self._gate_keys(part.site, layer), (g[::-1] for g in gate), strict=True)"),
        (f"{_ADAPTER}._prefix", _GATE, "Gate(*(tensors[key][::-1] for key in keys))"),
        adapterhub=_KEPT,
    ),
    "the other of two placements": fault(
        "bert: peft to adapterhub, vectors",
        (f"{_ADAPTER}.of", "if placement == part.placement", "if placement != part.placement"),
    ),
    # The native engine.
    "the prefix stands behind the real keys": fault(
        "llama: peft to softbridge",
        (_ATTEND, _KEYS, "torch.cat((key, keys), 2)"),
        (_ATTEND, _VALUES, "torch.cat((value, values), 2)"),
    ),
    "keys are a hundredth too large": fault(
        "llama: peft to softbridge",
        ("softbridge_native.prefix:LayerPrefix.forward", "return keys, values", "return keys * 1.01, values"),
    ),
    "keys are a millionth of a millionth too large": fault(
        "gpt2: peft to softbridge",
        ("softbridge_native.prefix:LayerPrefix.forward", "return keys, values", "return keys * (1 + 1e-10), values"),
    ),
    "the prefix is dropped where there is a cache": fault(
        "llama: peft to softbridge",
        (_KEEP, "running.now.mark = mark", "return"),
        (_ATTEND, "if binding is None or joined is None:", "if binding is None or joined is None or real > length:"),
    ),
    "a cache keeps the first layer's prefix in every layer": fault(
        "llama: peft to softbridge", (_KEEP, '"source": source,', '"source": sources[min(sources)],')
    ),
    "each layer runs with the next one's prefix": fault(
        "gpt2: peft to softbridge",
        (
            "softbridge_native.injection:Single.sources",
            "int(layer), source",
            "(int(layer) + 1) % len(module.layers), source",
        ),
    ),
    "the first virtual token is hidden": fault(
        "gpt2: peft to softbridge",
        (
            "softbridge_native.attention:_columns",
            "    if window is None:",
            "    columns[..., :1] = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min\n"
            "    if window is None:",
        ),
    ),
    "real tokens stand one position on": fault(
        "llama: peft to softbridge",
        (
            "softbridge_native.input_prompt:StackHooks._positions",
            "left_pads(mask)).clamp(min=0) + call.start",
            "left_pads(mask)).clamp(min=0) + 1 + call.start",
        ),
    ),
    "virtual tokens stand one position on": fault(
        "gpt2: softbridge to peft, vectors",
        (
            "softbridge_native.input_prompt:StackHooks._insert",
            "first = call.start - layout.lengths",
            "first = 1 + call.start - layout.lengths",
        ),
    ),
    "vectors are inserted in reverse": fault(
        "gpt2: softbridge to peft, vectors",
        (
            "softbridge_native.input_prompt:StackHooks._insert",
            "layout.insert(embedded, vectors(embedded))",
            "layout.insert(embedded, vectors(embedded).flip(1))",
        ),
    ),
    "pads on the left move the tokens": fault(
        "llama: softbridge to peft",
        ("softbridge_native.input_prompt:StackHooks._positions", "(column - left_pads(mask))", "column"),
    ),
    "gates are not applied": fault(
        "gpt2: adapterhub to softbridge, gates",
        ("softbridge_native.prefix:LayerPrefix.join", "if self.gate is None:", "if True:"),
        adapterhub="the native engine otherwise runs both sides",
    ),
    "a gate looks at the last position alone": fault(
        "gpt2: adapterhub to softbridge, gates",
        ("softbridge_native.prefix:LayerGate.forward", ".sigmoid().mean(1)", ".sigmoid()[:, -1]"),
        adapterhub="the native engine otherwise runs both sides",
    ),
    "the mean of a gate is taken before its sigmoid": fault(
        "gpt2: adapterhub to softbridge, gates",
        ("softbridge_native.prefix:LayerGate.forward", ".sigmoid().mean(1)", ".mean(1).sigmoid()"),
        adapterhub="the native engine otherwise runs both sides",
    ),
    # The toolkits' engines.
    "PEFT is passed position_ids that are one too large": fault(
        "gpt2: adapterhub to peft",
        ("softbridge_peft.engine:_Shift.__call__", "positions + self.shift", "positions + self.shift + 1"),
    ),
    "PEFT is passed no position_ids": fault(
        "gpt2: adapterhub to peft", ("softbridge_peft.engine:_pass_position_ids", "if shift:", "if False:")
    ),
    "AdapterHub is passed position_ids that are one too large": fault(
        "gpt2: peft to adapterhub",
        (
            "softbridge_adapterhub.engine:_run",
            "starts.pop())",
            "starts.pop() + 1)",
        ),
        adapterhub="the fault is in running it",
    ),
    "AdapterHub is passed no position_ids": fault(
        "gpt2: peft to adapterhub",
        ("softbridge_adapterhub.engine:_run", "if starts and", "if False and"),
        adapterhub="the fault is in running it",
    ),
}


def _square_mlp(geometry: Geometry) -> SoftPrompt:
    from softbridge.lowering.examples import as_if_trained

    return as_if_trained(PrefixTuning(5, MLP(geometry.hidden), ("self",)), geometry)


def _two_gates(geometry: Geometry) -> SoftPrompt:
    prompt, generator = random_prefix(geometry), np.random.default_rng(4)

    def numbers(*shape: int) -> Any:
        return generator.normal(0, 0.5, shape).astype(np.float32)

    layers = {
        n: replace(pair, gate=Gate(numbers(2, geometry.hidden), numbers(2)))
        for n, pair in prompt.prefixes[0].layers.items()
    }
    return replace(prompt, parts=(replace(prompt.prefixes[0], layers=layers),))


OWN: dict[str, Callable[[Geometry], SoftPrompt]] = {
    "prefix-tuning-square-mlp": _square_mlp,
    "prefix-tuning-two-gates": _two_gates,
}
_BART = {
    "vocab_size": 96,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
    "forced_eos_token_id": None,
}


#: Two layers do. T5 keeps three: of an even number PEFT uses half.
FEWER: dict[str, dict[str, int]] = {
    "gpt2": {"n_layer": 2},
    "llama": {"num_hidden_layers": 2},
    "bert": {"num_hidden_layers": 2},
    "t5": {},
}


@cache
def base_of(family: str) -> BaseModel:
    if family == "bart":
        from transformers import AutoConfig

        return BaseModel.resolve(AutoConfig.for_model("bart", **_BART))
    if family == "bert":  # vectors go through its embedding block, with its weights
        import torch

        return BaseModel.resolve(tiny_model("bert", torch.float32, num_labels=2, **FEWER[family]))
    return BaseModel.resolve(tiny_config(family, **FEWER[family]))


def write_source(route: Route, directory: Path) -> None:
    base, able = base_of(route.family), format_named(route.source).capabilities
    if route.method in OWN:
        from softbridge.lowering.token_positions import native_positions

        prompt = OWN[route.method](base.geometry)
        prompt = replace(prompt, positions=native_positions(prompt, able))
    else:
        assert route.method in METHODS
        prompt = example(route.method, base.geometry, able)
    sb.save(prompt, directory, format=route.source, base=base)


def converted(route: Route, source: Path, target: Path) -> Certificate:
    base = base_of(route.family)
    report = sb.convert(source, target, route.target, base=base, accept=route.accept, dtype=route.dtype, verify=True)
    assert report.certificate is not None
    return report.certificate


@pytest.fixture(autouse=True, scope="module")
def nothing_but_the_verdict() -> Iterator[None]:
    """Leave out what a verdict does not ask for: a working precision, and all deliberate faults but one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "verify_prompts", partial(verification.verify_prompts, dtype="float64"))
        patch.setattr(bench, "faulty_prompts", lambda prompt, scheme: [("dropped", None)])
        yield


@pytest.fixture(scope="module")
def proven(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Certificate]]:
    """Name of a route -> its source, and the certificate that it comes to without any fault."""

    @cache
    def prove(name: str) -> tuple[Path, Certificate]:
        if ROUTES[name].adapterhub and not HAS_ADAPTERHUB:
            pytest.skip("AdapterHub is not installed, and no other engine runs this")
        directory = tmp_path_factory.mktemp("route")
        write_source(ROUTES[name], directory / "source")
        certificate = converted(ROUTES[name], directory / "source", directory / "target")
        assert certificate.same, certificate.summary()
        return directory / "source", certificate

    return prove


def function_at(place: str) -> Any:
    module, _, path = place.partition(":")
    found: Any = import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    return getattr(found, "__func__", found)


def source_of(place: str) -> str:
    """The text of a function, found in its file by name: that holds while somebody edits the lines above it."""
    file = Path(inspect.getsourcefile(function_at(place)) or "").read_text(encoding="utf-8")
    node: Any = ast.parse(file)
    for name in place.partition(":")[2].split("."):
        node = next(inner for inner in node.body if getattr(inner, "name", None) == name)
    return textwrap.dedent("\n".join(file.splitlines()[node.lineno - 1 : node.end_lineno]))


def edited(place: str, edits: list[tuple[str, str]]) -> CodeType:
    """The code of a function with some words of it replaced, each of which must stand there exactly once."""
    source = source_of(place)
    for old, new in edits:
        assert source.count(old) == 1, f"{place} has changed: {old!r} stands there {source.count(old)} times"
        source = source.replace(old, new)
    module = compile(source, place, "exec", __future__.annotations.compiler_flag, dont_inherit=True)
    return next(code for code in module.co_consts if isinstance(code, CodeType))


def inject(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    """Swap the code, so that whoever has imported the function has the fault."""
    for place in dict.fromkeys(place for place, _, _ in fault.edits):
        code = edited(place, [(old, new) for where, old, new in fault.edits if where == place])
        monkeypatch.setattr(function_at(place), "__code__", code)


@pytest.mark.parametrize("name", ROUTES)
def test_without_a_fault_it_is_the_same(name: str, proven: Callable[[str], tuple[Path, Certificate]]) -> None:
    assert proven(name)[1].same


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_caught(
    name: str,
    proven: Callable[[str], tuple[Path, Certificate]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    fault = FAULTS[name]
    if fault.adapterhub and not HAS_ADAPTERHUB:
        pytest.skip(f"AdapterHub is not installed: {fault.adapterhub}")
    source, right = proven(fault.route)
    if fault.hides(right):
        request.applymarker(pytest.mark.xfail(reason=fault.blind, strict=True, raises=pytest.fail.Exception))
    inject(fault, monkeypatch)
    try:
        wrong = converted(ROUTES[fault.route], source, tmp_path / "target")
    except (SoftbridgeError, ValueError) as error:
        print(f"CAUGHT {name}: {type(error).__name__}: {error!s:.150}")
        assert not (tmp_path / "target").exists()
        return
    if wrong.same:
        pytest.fail(f"not caught: {wrong.summary()}; {wrong.source.engine} against {wrong.target.engine}")


def test_there_are_many_faults() -> None:
    apart = [fault for fault in FAULTS.values() if fault.adapterhub or ROUTES[fault.route].adapterhub]
    here = [fault for fault in FAULTS.values() if HAS_ADAPTERHUB or fault not in apart]
    assert len(here) >= (55 if HAS_ADAPTERHUB else 45)
    assert sum(bool(fault.blind) for fault in here) <= 5
    assert {fault.route for fault in FAULTS.values()} <= ROUTES.keys()
