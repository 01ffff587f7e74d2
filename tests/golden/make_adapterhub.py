"""Make `adapterhub_<family>.safetensors`: what AdapterHub itself computed, for environments that cannot hold it.

Run in an environment with AdapterHub: ``python tests/golden/make_adapterhub.py`` (``... small``: the file of small
models alone; ``... leave_out``: that of T5's left-out layers). One file per family (gpt2, llama,
bert, t5), in the safetensors format, everything in float64 unless said otherwise:

- metadata ``config``: the base model's configuration, JSON; ``family``; ``toolkit``: what AdapterHub's file says;
- ``weights.<name>``: the base model's state dict;
- ``file.adapter_config.json``, ``file.pytorch_adapter.bin``: the bytes (uint8) of the directory that AdapterHub's
  `save_adapter` wrote after a few steps of training: parameterised for gpt2 and t5, flat for llama and bert;
  t5 has all three sites;
- ``input_ids`` [B, T] (int64), and for t5 ``decoder_input_ids`` [B, T'];
- ``attention_mask`` [B, T] (int64): the last row ends in padding;
- ``logits``: AdapterHub's with the prompt, no mask; ``logits.masked``: with the mask; ``logits.base``: no prompt, no
  mask. All under eager attention.

And one file ``adapterhub_gates_and_entries.safetensors``, for prompts that AdapterHub was given by hand, on smaller
models: prefixes at all sites of the family, without gates (case ``plain``) and with them (``shared``: one gate for
keys and values, and ``own``: one each); prefixes of which AdapterHub's configuration leaves something out (``some``: a
layer, or with a relative bias, of which that loses the rest, a site); and prompt tuning, whose vectors enter after the
embedding block (``prefix`` and ``prefix_after_bos``):

- metadata ``<family>``: the base model's configuration, JSON;
- ``<family>.weights.<name>``: its state dict, float32, to be used in float64;
- ``<family>.input_ids``, ``<family>.decoder_input_ids`` and ``<family>.attention_mask``, as above;
- ``<family>.<case>.prompt``: the prompt, the bytes (uint8) of softbridge's own file;
- ``<family>.<case>.logits``, and ``<family>.<case>.masked``, of padded rows (pads are the token 0; the last columns of
  the mask are the decoder's, too).

And one file ``adapterhub_t5_leave_out.safetensors``, of prefixes at all sites of a T5 with three layers in each stack,
of which `leave_out` names some:

- metadata ``config``; ``cases``: case -> its `leave_out`, JSON;
- ``weights.<name>``, float32, to be used in float64; ``input_ids``, ``decoder_input_ids``, ``attention_mask`` as above;
- ``prompt``: the prefixes of all layers, the bytes (uint8) of softbridge's own file; each case has some of them;
- ``<case>.logits`` and ``<case>.masked``, as above; ``<case>.loss``, with `decoder_input_ids` as labels;
  ``<case>.gradient.<site>``: its gradient [P, 2·L·K·D] in keys and values of the layers that are there, in the order of
  `KeyValuePrefix.flat`; ``<case>.tokens``: generated, with a cache.

Numbers differ between machines in the last bits: compare with a tolerance (float32 regions: 1e-5, else 1e-10).
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import adapters
import numpy as np
import torch
from adapters.methods.prefix_tuning import PrefixTuningLayer
from transformers import AutoConfig

from softbridge.arrays import from_torch
from softbridge.base import BaseModel, build
from softbridge.geometry import Geometry, Site, read_geometry, stack_of
from softbridge.prompt import Gate, KeyValuePrefix, Positions, SoftPrompt, pack
from softbridge.testing import random_input_prompt, random_prefix, tiny_model
from softbridge.untrusted import Files, safetensors_bytes
from softbridge_adapterhub import facts
from softbridge_adapterhub.engine import ENGINE

METHODS = {
    "gpt2": "prefix-tuning",
    "llama": "prefix-tuning-flat",
    "bert": "prefix-tuning-flat",
    "t5": "prefix-tuning",
}
LENGTH = 5


#: Settings of the smaller models, and which of the two kinds of case each has.
_ENCODER = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_labels": 3}
_ENCODER |= {"num_attention_heads": 4, "max_position_embeddings": 24, "pad_token_id": 0}
_BART = {"vocab_size": 48, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
_BART |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 24}
_T5 = {"vocab_size": 48, "d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 2, "num_heads": 4}
_DISTILBERT = {"vocab_size": 48, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 4, "num_labels": 3}
SMALL: dict[str, tuple[dict[str, Any], str]] = {
    "gpt2": ({"vocab_size": 48, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 24}, "prefixes"),
    "llama": ({**_ENCODER, "num_key_value_heads": 2}, "prefixes"),
    "mistral": ({**_ENCODER, "num_key_value_heads": 2, "sliding_window": 3}, "prefixes"),
    "bert": (_ENCODER, "prefixes entries"),
    "roberta": (_ENCODER, "prefixes entries"),
    "distilbert": ({**_DISTILBERT, "max_position_embeddings": 24, "pad_token_id": 0}, "prefixes"),
    "electra": ({**_ENCODER, "embedding_size": 12}, "entries"),
    "albert": ({**_ENCODER, "embedding_size": 12, "num_hidden_groups": 1}, "entries"),
    "t5": ({**_T5, "tie_word_embeddings": True, "decoder_start_token_id": 0}, "prefixes"),
    "bart": ({**_BART, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}, "prefixes"),
}
COMBINE = {"before-sequence": "prefix", "after-first-token": "prefix_after_bos"}


def make(family: str, method: str) -> bytes:
    # transformers 5 builds T5 with tied embeddings whatever its configuration says; tied, both compute the same.
    model = tiny_model(family, **({"tie_word_embeddings": True} if family == "t5" else {}))
    inputs, mask = inputs_for(model)
    with tempfile.TemporaryDirectory() as scratch:
        ENGINE.train_example(copy.deepcopy(model), method, Path(scratch), length=LENGTH, steps=5, seed=11)
        written = {path.name: path.read_bytes() for path in Path(scratch).iterdir()}
        toolkit = Files(scratch).json("adapter_config.json")["version"]
        running = copy.deepcopy(model)
        adapters.init(running)
        running.load_adapter(scratch, set_active=True)
        running.eval()

    tensors = {f"weights.{name}": from_torch(tensor) for name, tensor in model.state_dict().items()}
    tensors |= {f"file.{name}": np.frombuffer(content, np.uint8) for name, content in written.items()}
    tensors |= {name: from_torch(tensor) for name, tensor in inputs.items()}
    tensors["attention_mask"] = from_torch(mask)
    tensors["logits"] = logits(running, inputs)
    tensors["logits.masked"] = logits(running, {**inputs, "attention_mask": mask})
    tensors["logits.base"] = logits(model, inputs)
    return safetensors_bytes(
        tensors, {"config": model.config.to_json_string(), "family": family, "toolkit": str(toolkit)}
    )


def small(family: str) -> Any:
    settings = SMALL[family][0]
    config = AutoConfig.for_model(family, **settings)
    return build(config, BaseModel(config).task, torch.float64, 0)


def cases(model: Any, kinds: str) -> Iterator[tuple[str, SoftPrompt]]:
    """Prompts of which AdapterHub computes what their positions say, by the name of the case."""
    geometry = read_geometry(model.config)
    if "entries" in kinds:
        (part,) = random_input_prompt(geometry, LENGTH).inputs
        for placement, name in COMBINE.items():
            moved = replace(part, entry="after", placement=placement)
            yield name, SoftPrompt((moved,), Positions({"encoder": 0}))
    if "prefixes" in kinds:
        prefix = random_prefix(geometry, LENGTH, sites=facts.model_sites(geometry))
        skewed = "skewed" if geometry.model_type in facts.RELATIVE_BIAS else "plain"
        positions = Positions(dict.fromkeys(prefix.positions.start, 0), skewed, "pinned")
        plain = SoftPrompt(prefix.prefixes, positions)
        yield "plain", plain
        for name, outputs in (("shared", 1), ("own", 2)):
            yield name, replace(plain, parts=tuple(gated(part, outputs, geometry.hidden) for part in prefix.prefixes))
        yield "some", some(plain, skewed == "skewed")


def some(prompt: SoftPrompt, whole_stacks: bool) -> SoftPrompt:
    """The prompt without the encoder's site, or without the first layer of each (its last layer in the encoder)."""
    if whole_stacks:
        start = {"decoder": prompt.positions.start["decoder"]}
        left = tuple(part for part in prompt.prefixes if part.site != "encoder")
        return replace(prompt, parts=left, positions=replace(prompt.positions, start=start))
    parts = []
    for part in prompt.prefixes:
        out = len(part.layers) - 1 if part.site == "encoder" else 0
        layers = {layer: pair for layer, pair in part.layers.items() if layer != out}
        parts.append(replace(part, layers=layers))
    return replace(prompt, parts=tuple(parts))


def gated(part: KeyValuePrefix, outputs: int, hidden: int) -> KeyValuePrefix:
    generator = np.random.default_rng(outputs)
    layers = {}
    for layer, pair in part.layers.items():
        weight, bias = (generator.normal(0, 0.5, shape).astype(np.float32) for shape in ((outputs, hidden), outputs))
        layers[layer] = replace(pair, gate=Gate(weight, bias))
    return replace(part, layers=layers)


#: What is left out of a T5 with three layers in each stack; the decoder's have the numbers 3 to 5.
LEFT_OUT = {
    "encoder first": [0],
    "encoder middle": [1],
    "encoder last": [2],
    "encoder": [0, 1, 2],
    "decoder first": [3],
    "decoder middle": [4],
    "decoder last": [5],
    "both": [0, 1, 5],
}


def make_leave_out() -> bytes:
    settings = {**SMALL["t5"][0], "num_layers": 3}
    model = build(AutoConfig.for_model("t5", **settings), "seq2seq-lm", torch.float64, 0)
    geometry = read_geometry(model.config)
    inputs, mask = inputs_for(model)
    prefix = random_prefix(geometry, 3, sites=facts.model_sites(geometry))
    whole = replace(prefix, positions=Positions(dict.fromkeys(prefix.positions.start, 0), "skewed", "pinned"))
    tensors: dict[str, Any] = {f"weights.{name}": from_torch(t.float()) for name, t in model.state_dict().items()}
    tensors |= {name: from_torch(tensor) for name, tensor in {**inputs, "attention_mask": mask}.items()}
    tensors["prompt"] = np.frombuffer(pack(SoftPrompt(whole.prefixes, whole.positions)), np.uint8)
    for case, leave_out in LEFT_OUT.items():
        prompt = without(whole, leave_out, geometry)
        running = with_adapterhub(model, prompt, leave_out)
        tensors[f"{case}.logits"] = logits(running, inputs)
        tensors[f"{case}.masked"] = logits(running, padded(inputs, mask))
        tensors[f"{case}.tokens"] = from_torch(running.generate(inputs["input_ids"], max_new_tokens=5, do_sample=False))
        pool = running.base_model.prefix_tuning.prefix_tunings["a"]
        loss = running(input_ids=inputs["input_ids"], labels=inputs["decoder_input_ids"]).loss
        loss.backward()
        tensors[f"{case}.loss"] = from_torch(loss.detach())
        for part in prompt.prefixes:
            gradient = pool[f"{part.site}_prefix"].control_trans.grad.reshape(part.length, -1)
            tensors[f"{case}.gradient.{part.site}"] = from_torch(gradient)
    return safetensors_bytes(tensors, {"config": model.config.to_json_string(), "cases": json.dumps(LEFT_OUT)})


def without(whole: SoftPrompt, leave_out: list[int], geometry: Geometry) -> SoftPrompt:
    """The prompt without the layers that `leave_out` names, the decoder's behind the encoder's."""
    parts = []
    for part in whole.prefixes:
        first = 0 if part.site == "encoder" else geometry.encoder.layers
        layers = {layer: pair for layer, pair in part.layers.items() if first + layer not in leave_out}
        parts += [replace(part, layers=layers)] if layers else []
    start = {stack: 0 for stack in whole.positions.start if stack in {stack_of(part.site) for part in parts}}
    return replace(whole, parts=tuple(parts), positions=replace(whole.positions, start=start))


def with_adapterhub(model: Any, prompt: SoftPrompt, leave_out: list[int] | None = None) -> Any:
    """A copy of the model with the prompt, in AdapterHub: prompt tuning, or a prefix, which leaves out these layers."""
    running = copy.deepcopy(model)
    adapters.init(running)
    for part in prompt.inputs:
        combine = COMBINE[part.placement]
        running.add_adapter("a", config=adapters.PromptTuningConfig(prompt_length=part.length, combine=combine))
        running.base_model.prompt_tuning.prompt_tunings["a"].prompt_embedding.weight.data = double(part.vectors)
    if prompt.prefixes:
        geometry = read_geometry(model.config)
        gate = next(iter(prompt.prefixes[0].layers.values())).gate
        said = facts.config_of({part.site: tuple(part.layers) for part in prompt.prefixes}, geometry)
        said |= {} if leave_out is None else {"leave_out": leave_out, "encoder_prefix": True, "cross_prefix": True}
        said |= {"use_gating": gate is not None, "shared_gating": gate is None or len(gate.bias) == 1}
        config = adapters.PrefixTuningConfig(flat=True, prefix_length=prompt.prefixes[0].length, **said)
        running.add_adapter("a", config=config)
        only = "encoder" if geometry.decoder is None else "self"
        sites: dict[str, Site] = {"encoder_prefix": "encoder", "cross_prefix": "cross"}
        for module in running.modules():
            if isinstance(module, PrefixTuningLayer) and "a" in module.prefixes:
                part = prompt.prefix(sites.get(module.location_key, only))
                module.pool.prefix_tunings["a"][module.location_key].control_trans.data = double(
                    part.flat().reshape(-1)
                )
                gate = list(part.layers.values())[module.prefixes["a"]].gate
                if gate is not None:
                    module.prefix_gates["a"].weight.data = double(gate.weight)
                    module.prefix_gates["a"].bias.data = double(gate.bias)
    running.set_active_adapters("a")
    return running.eval()


def double(array: Any) -> torch.Tensor:
    return torch.tensor(array).double()


def make_small() -> bytes:
    tensors: dict[str, Any] = {}
    configs = {}
    for family, (_, kinds) in SMALL.items():
        model = small(family)
        configs[family] = model.config.to_json_string()
        inputs, mask = inputs_for(model)
        named = {f"weights.{name}": from_torch(tensor.float()) for name, tensor in model.state_dict().items()}
        named |= {name: from_torch(tensor) for name, tensor in {**inputs, "attention_mask": mask}.items()}
        for case, prompt in cases(model, kinds):
            running = with_adapterhub(model, prompt)
            named[f"{case}.prompt"] = np.frombuffer(pack(prompt), np.uint8)
            named[f"{case}.logits"] = logits(running, inputs)
            named[f"{case}.masked"] = logits(running, padded(inputs, mask))
        tensors |= {f"{family}.{name}": array for name, array in named.items()}
    return safetensors_bytes(tensors, configs)


def padded(inputs: dict[str, torch.Tensor], mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """The inputs with padding where the mask says so, in an encoder-decoder model for either stack."""
    result = {"input_ids": inputs["input_ids"] * mask, "attention_mask": mask}
    if "decoder_input_ids" in inputs:
        decoder = mask[:, -inputs["decoder_input_ids"].shape[1] :]
        result |= {"decoder_input_ids": inputs["decoder_input_ids"] * decoder, "decoder_attention_mask": decoder}
    return result


def inputs_for(model: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Two rows of tokens, and a mask with which the last row ends in padding."""
    generator = torch.Generator().manual_seed(7)
    inputs = {"input_ids": torch.randint(3, model.config.vocab_size, (2, 7), generator=generator)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(3, model.config.vocab_size, (2, 6), generator=generator)
    mask = torch.ones_like(inputs["input_ids"])
    mask[-1, -2:] = 0
    return inputs, mask


def logits(model: Any, inputs: dict[str, Any]) -> Any:
    with torch.no_grad():
        return from_torch(model(**inputs).logits)


if __name__ == "__main__":
    asked = sys.argv[1:] or ["small", "leave_out", *METHODS]
    contents = {"gates_and_entries": make_small()} if "small" in asked else {}
    contents |= {"t5_leave_out": make_leave_out()} if "leave_out" in asked else {}
    contents |= {family: make(family, method) for family, method in METHODS.items() if family in asked}
    for name, content in contents.items():
        target = Path(__file__).parent / f"adapterhub_{name}.safetensors"
        target.write_bytes(content)
        print(f"{target.name}: {len(content)} bytes")
