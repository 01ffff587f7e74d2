"""PEFT's files, without PEFT: adapter_config.json beside adapter_model.safetensors or .bin.

Beside them, where PEFT's own files do not say it, stands what trained the prompt; see `training`.

The same pure functions serve the files and the engine: `parse` (configuration and tensors -> prompt) and, the other
way, `config.config_of` with `tensors_of`. So what the engine runs is what a file would hold.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, get_args

import numpy as np
from packaging.version import Version

from softbridge import untrusted
from softbridge.arrays import Array
from softbridge.checkpoint.card import BEGINS
from softbridge.checkpoint.manifest import MANIFEST
from softbridge.errors import BaseModelError, CheckpointError, Obstacle, few
from softbridge.geometry import Geometry, Stack, may_be_causal
from softbridge.lowering.expressible import check_fits
from softbridge.methods import KINDS, materialise_vectors, rematerialise
from softbridge.plugin.capabilities import UP_TO_FLOAT32, Capabilities
from softbridge.plugin.snippet import labels_of, program, targets
from softbridge.prompt import (
    AdaptionPrompt,
    BaseId,
    InputPrompt,
    KeyValue,
    KeyValuePrefix,
    Origin,
    Part,
    Positions,
    SoftPrompt,
    Training,
)
from softbridge_compat import peft_releases
from softbridge_peft import adaption, facts, whole_model
from softbridge_peft import prompt_encoder as training
from softbridge_peft.config import Config
from softbridge_peft.origin import config_of_origin, unused, unused_details
from softbridge_peft.prefix_tensors import check_layers, read_prefix, stored_blocks
from softbridge_peft.written_config import config_of, provision


class PeftFormat:
    """Everything that PEFT counts as prompt learning, and LLaMA-Adapter."""

    name = "peft"
    summary = (
        "Hugging Face PEFT: prompt, P-, prefix, multitask and context-aware prompt tuning, cartridges, LLaMA-Adapter"
    )
    encodings = ("safetensors", "bin")
    engine = library = "peft"
    training_files = (facts.TRAINING_FILE,)
    files = (*facts.WEIGHTS_FILES, facts.CONFIG_FILE, facts.CARD_FILE, facts.TRAINING_FILE, MANIFEST)
    capabilities = Capabilities(
        inputs=frozenset((stack, "before", "before-sequence") for stack in get_args(Stack)),
        prefix_sites=frozenset(("self", "encoder")),
        input_start="counted",
        prefix_start="counted",
        adaption=frozenset(family.joins for family in adaption.FAMILIES.values()),
        every_layer=True,
        ragged=True,
        parts=1,
        positions_told=True,
        relative_bias="plain",
        window="slides",
        training=frozenset(KINDS) - {"table"},  # several prompts: PEFT has one
        dtypes=UP_TO_FLOAT32,
        head=True,
    )

    def sniff(self, files: untrusted.Files) -> bool:
        if not files.is_file and facts.CONFIG_FILE in files:
            return "peft_type" in files.json(facts.CONFIG_FILE)
        if whole_model.file_in(files) is not None:
            return True
        # Beside another format's tensors, an adapter in a sub-folder is a neighbour.
        beside = any("/" not in name and name.endswith(".safetensors") for name in files.names)
        return not beside and bool(_nested(files))

    def read(self, files: untrusted.Files, geometry: Geometry | None) -> SoftPrompt:
        folder = adapter_folder(files)
        state = whole_model.file_in(files) if not folder else None
        if state is not None:
            return _of_state(files, state, geometry)
        weights = next((folder + name for name in facts.WEIGHTS_FILES if folder + name in files), None)
        if folder + facts.CONFIG_FILE not in files or weights is None:
            raise CheckpointError(
                f"{files.path} holds {few(files.names)}",
                f"{facts.CONFIG_FILE} and one of {', '.join(facts.WEIGHTS_FILES)}",
                "pass the directory that save_pretrained wrote",
            )
        kept, card = folder + facts.TRAINING_FILE, folder + facts.CARD_FILE
        theirs = card in files and not files.begins(card, BEGINS)
        others = [] if folder else [f"not read: {files.path / name}, an adapter of its own" for name in _nested(files)]
        config = files.json(folder + facts.CONFIG_FILE)
        return parse(
            config,
            files.tensors(weights),
            geometry,
            training.read(files, kept) if kept in files else None,
            others,
            peft_releases.release(config, files.text(card) if theirs else None),
        )

    def obstacles(self, prompt: SoftPrompt, geometry: Geometry | None) -> Sequence[Obstacle]:
        found = [obstacle for part in prompt.parts for obstacle in _refusals(part, geometry)]
        if prompt.training is not None and (why := training.problem(prompt)):
            reason = f"the {prompt.training.kind} training state is not that of the prompt: {why}"
            remedy = "evaluate it anew: softbridge.methods.rematerialise(prompt); or replace(prompt, training=None)"
            found.append(Obstacle("training", reason, remedy))
        several = prompt.training.tensors if prompt.training and prompt.training.kind == "multitask" else {}
        if dtypes := {array.dtype.name for array in several.values()} - {"float32"}:
            reason = f"PEFT multiplies the tensors of a multitask prompt in float32, and these are {', '.join(dtypes)}"
            found.append(Obstacle("precision", reason, "leave out what trained it (--drop training)"))
        if prompt.adaptions and prompt.head:
            reason = f"PEFT's {adaption.TYPE} keeps no head, this prompt has {', '.join(prompt.head)}"
            return [*found, Obstacle("head", reason, "leave the head out: replace(prompt, head={})")]
        foreign = [name for name in prompt.head if name.split(".")[0] not in facts.HEAD_MODULES]
        if foreign and not config_of_origin(prompt):
            reason = f"PEFT has heads named {', '.join(facts.HEAD_MODULES)}, this prompt has {', '.join(foreign)}"
            found.append(Obstacle("head", reason, "leave the head out: replace(prompt, head={})"))
        return found

    def write(
        self, prompt: SoftPrompt, geometry: Geometry | None, encoding: str | None = None
    ) -> Mapping[str, untrusted.Content]:
        config = config_of(prompt, geometry or prompt.base.geometry)
        tensors = tensors_of(prompt, config)
        weights = (
            {facts.WEIGHTS_FILES[1]: untrusted.pickle_file(tensors)}
            if encoding == "bin"
            else {facts.WEIGHTS_FILES[0]: untrusted.safetensors_file(tensors, {"format": "pt"})}
        )
        kept = training.files(prompt.training, config["peft_type"])
        return {facts.CONFIG_FILE: json.dumps(config, indent=2, sort_keys=True).encode(), **weights, **kept}

    def advice(self, prompt: SoftPrompt, geometry: Geometry | None, first: int = 0) -> Sequence[str]:
        advice = [
            f"pass position_ids = torch.arange(T) {'-' if shift < 0 else '+'} {abs(shift)} for T unpadded tokens, in "
            f"every call: PEFT adds the prefix length {counted} to them, and the first real token stands at {start}"
            for stack, counted in prompt.counted().items()
            if prompt.prefixes
            and (start := prompt.positions.start[stack]) != counted
            and (shift := first + start - counted) is not None
        ]
        if prompt.training is not None and prompt.training.kind == "multitask":
            config = config_of(prompt, geometry or prompt.base.geometry)
            task = prompt.training.settings.get("task", 0)
            if config["peft_type"] == facts.MULTITASK:
                advice.append(f"pass task_ids = torch.full((B,), {task}) for a batch of B rows, in every call")
                if config["num_transformer_submodules"] == 2:
                    advice.append("call generate: PEFT's forward drops decoder_input_ids, and prompts the decoder, too")
                elif config["task_type"] == facts.SEQ_2_SEQ_LM:
                    advice.append("call generate, or forward with labels: PEFT's forward drops decoder_input_ids")
        if prompt.adaptions:
            return advice
        return [*advice, "pad batches on the right: PEFT puts virtual tokens before the pads of a left-padded row"]

    def snippet(
        self, prompt: SoftPrompt, geometry: Geometry | None, *, path: str, base: str, encoding: str | None
    ) -> str:
        """`PeftModel.from_pretrained`. See `Introducing.snippet`."""
        config = config_of(prompt, geometry or prompt.base.geometry)
        cls = facts.CLASSES.get(config["task_type"], "AutoModel")
        steps = (
            f"model = {cls}.from_pretrained(base{labels_of(prompt, geometry)})",
            f"model = PeftModel.from_pretrained(model, {path!r}).eval()",
        )
        imports = ["from peft import PeftModel"]
        arguments = [*targets(geometry)]
        if config["peft_type"] == facts.MULTITASK and prompt.training is not None:
            imports.insert(0, "import torch")
            arguments.append(f"task_ids=torch.tensor([{prompt.training.settings.get('task', 0)}])")
        return program(imports, cls, base, steps, arguments)


FORMAT = PeftFormat()


def _of_state(files: untrusted.Files, name: str, geometry: Geometry | None) -> SoftPrompt:
    """The prompt in the state of a whole PeftModel; see `whole_model`."""
    config = files.json(facts.CONFIG_FILE) if not files.is_file and facts.CONFIG_FILE in files else None
    if config is None:
        raise CheckpointError(
            f"{name} is the state of a whole PeftModel, and no configuration beside it says what its numbers are",
            f"{facts.CONFIG_FILE} beside it, in a folder",
            "write it there: model.peft_config['default'].save_pretrained(folder)",
        )
    encoder, tensors = whole_model.taken_apart(files.tensors(name))
    fields = Config.check(config)
    parameterised = fields.peft_type not in facts.STORED.values() and encoder.keys() != {"embedding.weight"}
    if parameterised:  # what it evaluates to is not in the state
        width = (fields.token_dim or 0) * (1 if fields.kind == "input" else 2 * (fields.layers or 0))
        rows = fields.length * (fields.submodules if fields.kind == "input" else 1)
        tensors[facts.PROMPT] = np.zeros((rows, width), np.float32)
    else:
        tensors |= {facts.PROMPT if part == "embedding.weight" else part: a for part, a in encoder.items()}
    prompt = parse(config, tensors, geometry)
    if not parameterised:
        return prompt
    try:
        live = training.of_encoder(config, encoder, prompt.parts[0])
        if live is not None:
            return rematerialise(replace(prompt, training=live))
    except (KeyError, ValueError, RuntimeError, IndexError) as error:
        raise CheckpointError(
            f"the parameterisation in {name} is not the one of {facts.CONFIG_FILE}: {error!r:.200}",
            "the configuration that it was trained with",
            "put that configuration into the same folder",
        ) from error
    raise CheckpointError(
        f"the parameterisation in {name} runs over the vectors of two submodules at once",
        "one submodule, whose vectors are the prompt",
        "save the prompt with PEFT's own save_pretrained, which evaluates it",
    )


def _nested(files: untrusted.Files) -> list[str]:
    """The sub-folders that hold an adapter each: PEFT saves one with a name other than 'default' into its own."""
    found = []
    for name in files.names:
        if name.endswith(f"/{facts.CONFIG_FILE}"):
            with suppress(CheckpointError):  # not ours, then
                found += [name.partition("/")[0]] if "peft_type" in files.json(name) else []
    return found


def adapter_folder(files: untrusted.Files) -> str:
    """Where in a directory its adapter lies: '', or 'NAME/' if the only one is in a sub-folder.

    Raises:
        CheckpointError: several sub-folders hold adapters, or softbridge wrote the only one and its manifest is there.
    """
    if facts.CONFIG_FILE in files or not (nested := _nested(files)):
        return ""
    if len(nested) > 1 or f"{nested[0]}/{MANIFEST}" in files:
        raise CheckpointError(
            f"{files.path} holds its adapters in sub-folders: {few(nested)}",
            "the directory of one adapter",
            f"pass {' or '.join(str(files.path / name) for name in nested[:4])}; or convert all with --recursive",
        )
    return f"{nested[0]}/"


def parse(
    config: Mapping[str, Any],
    tensors: Mapping[str, Array],
    geometry: Geometry | None,
    kept: Training | None = None,
    notes: Sequence[str] = (),
    written_by: Version | None = None,
) -> SoftPrompt:
    """The prompt that PEFT runs for a configuration and its tensors.

    Args:
        config: what adapter_config.json holds.
        tensors: prompt_embeddings, those of multitask prompt tuning, and tensors of a head.
        geometry: of the base model, to check against and to say which stack is prompted; None if not known.
        kept: what `training.read` found beside them. Without it a multitask prompt is that of task 0.
        notes: for the user, in addition to what is found here.
        written_by: the release that wrote them, if that is known: numbers of old ones may mean something else.

    Raises:
        CheckpointError: configuration and tensors are malformed, incomplete, or do not agree.
        BaseModelError: they do not say which stack they are for, and no geometry was given; or they do not fit it.
    """
    if config.get("peft_type") == adaption.TYPE:
        return adaption.read(config, tensors, geometry, notes)
    fields = Config.check(config)
    _check_tensors(fields, tensors)
    stack = _stack(fields, geometry)
    beside: Mapping[str, Any] = {}
    advice: Sequence[str] = ()
    part: Part
    others: tuple[InputPrompt, ...] = ()
    if fields.kind == "prefix":
        part, said = read_prefix(
            fields, tensors[facts.PROMPT], "encoder" if stack == "encoder" else "self", geometry, written_by
        )
        beside, advice = unused_details(fields, tensors)
        notes = [*notes, *said]
    else:
        part = InputPrompt(tensors[facts.PROMPT][: fields.length], stack)
        if fields.submodules == 2 and peft_releases.prompts_decoder(written_by):
            others = (InputPrompt(tensors[facts.PROMPT][fields.length :], "decoder"),)
            notes = [*notes, "written by a release of PEFT that prompts the decoder, too; today's does not"]
        else:
            beside, advice = unused_details(fields, tensors)
    state = _training(fields, tensors, part, kept)
    if isinstance(part, InputPrompt) and fields.peft_type == facts.MULTITASK and state is not None:
        try:
            part = replace(part, vectors=materialise_vectors(state))
        except ValueError as error:
            raise training.refused(str(error)) from error
    notes = [*notes, *advice]
    if fields.tasks > 1:
        notes.append(f"the prompt of one task of {fields.tasks}: --task (task=... in Python) takes another, alone")
    # Where layer 0 has no prefix (see `_cut`), PEFT's forward, by which it was trained, counts none.
    start = fields.length if isinstance(part, InputPrompt) or 0 in part.layers else 0
    prompt = SoftPrompt(
        parts=(part, *others),
        positions=Positions(dict.fromkeys((stack, *(other.stack for other in others)), start)),
        base=BaseId(fields.name, geometry),
        head={name.removeprefix(facts.HEAD): array for name, array in tensors.items() if name.startswith(facts.HEAD)},
        training=state,
        origin=Origin("peft", {"config": dict(config), **beside}, notes=tuple(notes)),
    )
    if geometry is not None:
        check_fits(prompt, geometry)
        check_layers(fields, geometry)
    if kept is not None and (why := training.problem(prompt)):
        raise training.refused(why)
    return prompt


def _training(fields: Config, tensors: Mapping[str, Array], part: Part, kept: Training | None) -> Training | None:
    """What trained the prompt, where the files say it."""
    length, frozen = fields.length, fields.frozen
    if fields.peft_type == facts.MULTITASK:
        # Of two submodules, the second half of the rows is for the decoder; see `origin`.
        ours = {
            "embedding": tensors[facts.PROMPT][:length],
            "columns": tensors[facts.COLUMNS][:, :length],
            "rows": tensors[facts.ROWS],
        }
        # PEFT holds all it loads in float32, and so multiplies in float32.
        stored = Training("multitask", training.FIRST_TASK, {name: a.astype(np.float32) for name, a in ours.items()})
    elif isinstance(part, KeyValuePrefix) and fields.peft_type == facts.CARTRIDGE and frozen < length:
        rows = {"frozen": part.flat()[:frozen], "trained": part.flat()[frozen:]}
        named = {f"{part.site}.{name}": array for name, array in rows.items() if len(array)}
        stored = Training("cartridge", {"frozen": frozen}, named)
    else:
        return kept
    if kept is None:
        return stored
    if kept.kind != stored.kind or kept.tensors:
        raise training.refused(f"{kept}, and {facts.WEIGHTS_FILES[0]} beside it says {stored}")
    return replace(stored, settings=kept.settings)


def _check_tensors(fields: Config, tensors: Mapping[str, Array]) -> None:
    several = (facts.COLUMNS, facts.ROWS) if fields.peft_type == facts.MULTITASK else ()
    unexpected = sorted(
        name for name in tensors if name not in (facts.PROMPT, *several) and not name.startswith(facts.HEAD)
    )
    missing = [name for name in (facts.PROMPT, *several) if name not in tensors]
    if unexpected or missing:
        raise CheckpointError(
            f"tensors are missing ({', '.join(missing) or 'none'}) or unexpected ({', '.join(unexpected) or 'none'})",
            f"{', '.join((facts.PROMPT, *several))}, and nothing else but a head's '{facts.HEAD}...'",
            f"check that {facts.CONFIG_FILE} belongs to these tensors",
        )
    # Old files of prompt tuning do not name their width.
    rows, width = fields.length, fields.token_dim or (*tensors[facts.PROMPT].shape, 0, 0)[1]
    if fields.kind == "input":
        rows *= fields.submodules
    else:
        width *= 2 * (fields.layers or 0)
    shapes: dict[str, tuple[int, ...]] = {facts.PROMPT: (rows, width)}
    if several:
        shapes[facts.COLUMNS] = (fields.tasks, rows, fields.ranks)
        shapes[facts.ROWS] = (fields.tasks, fields.ranks, width)
    wrong = [name for name, shape in shapes.items() if tensors[name].shape != shape or 0 in shape]
    if wrong:
        raise CheckpointError(
            ", ".join(f"'{name}' has shape {list(tensors[name].shape)}" for name in wrong),
            ", ".join(f"{list(shapes[name])}" for name in wrong) + f", by {facts.CONFIG_FILE}",
            f"check that {facts.CONFIG_FILE} belongs to these tensors",
        )
    odd = sorted(f"'{name}' is {a.dtype}" for name, a in tensors.items() if a.dtype.name not in facts.FLOATS)
    if odd:
        raise CheckpointError(", ".join(odd), f"one of {', '.join(facts.FLOATS)}", "save the tensors as floating point")


def _stack(fields: Config, geometry: Geometry | None) -> Stack:
    """Which stack the prompt is for, by the base model if it is known, else by the task."""
    seq2seq, causal = fields.task == facts.SEQ_2_SEQ_LM, fields.task == facts.CAUSAL_LM
    if geometry is None:
        if not (seq2seq or causal):
            raise BaseModelError(
                f"task_type {fields.task!r} in the file does not say whether its base model is an encoder or a decoder",
                "the base model's configuration, directory or hub id",
                fields.remedy,
            )
        return "encoder" if seq2seq and fields.kind == "input" else "decoder"
    if causal and geometry.decoder is None:
        kind = geometry.model_type
        why = f"the base model, a '{kind}', is one only if its configuration says is_decoder"
        if not may_be_causal(kind):
            why = f"transformers has none of the base model's type '{kind}'"
        raise BaseModelError(
            f"the file is for a causal language model, and {why}",
            "the causal language model that the prompt was trained for",
            f"{fields.remedy}; of a model of several parts, that of the whole",
        )
    if seq2seq != geometry.is_encoder_decoder:
        raise BaseModelError(
            f"the file's task_type is {fields.task!r} and the base model ({geometry.model_type}) has "
            f"{'no' if geometry.encoder is None else 'an'} encoder and "
            f"{'no' if geometry.decoder is None else 'a'} decoder",
            "a base model of the kind that the prompt was trained for",
            fields.remedy,
        )
    if seq2seq:
        return "encoder" if fields.kind == "input" else "decoder"
    return "decoder" if geometry.encoder is None else "encoder"


def _refusals(part: Part, geometry: Geometry | None) -> list[Obstacle]:
    """What of one part PEFT cannot hold, beyond what the capabilities say."""
    elsewhere = "choose a target that can hold it, such as --to softbridge"
    composite = geometry is not None and geometry.is_encoder_decoder
    found = []
    wide = [name for name, array in part.arrays() if not _fits_float32(array)]
    if wide:
        reason = f"PEFT holds prompts in float32, which would round {', '.join(wide)}"
        found.append(Obstacle("precision", reason, elsewhere))
    if isinstance(part, AdaptionPrompt):
        return [*found, *adaption.refusals(part, geometry)]
    shape = None if geometry is None or isinstance(part, InputPrompt) else geometry.site(part.site)
    if shape is not None and shape.stateful:
        found.append(Obstacle("states", facts.STATES, elsewhere))
    if isinstance(part, KeyValuePrefix) and shape is not None and shape.sources is not None:
        apart = [n for n, source in enumerate(shape.sources) if part.layers.get(n) != part.layers.get(source)]
        if apart:
            reason = (
                f"layers {apart} attend to the keys of earlier ones, whose prefix they have in PEFT, and here another"
            )
            found.append(Obstacle("shared-layers", reason, elsewhere, accidental=True))
    if isinstance(part, InputPrompt):
        if part.stack == "decoder" and composite:
            reason = "PEFT puts vectors into the encoder of an encoder-decoder model, not the decoder"
            found.append(Obstacle("stack", reason, elsewhere))
        return found
    if part.site == "encoder" and composite:
        reason = "PEFT prefixes the decoder of an encoder-decoder model, not its encoder"
        return [*found, Obstacle("stack", reason, elsewhere)]
    if len({array.dtype for _, array in part.arrays()}) > 1:
        reason = "PEFT holds one precision for all layers"
        found.append(Obstacle("precision", reason, elsewhere, accidental=True))
    elif composite and stored_blocks(part) is None:
        reason = (
            "PEFT gives decoder layer i of an encoder-decoder model block 2i mod L, so that with an even number of "
            "layers the upper half must repeat the lower, and here it does not"
        )
        found.append(Obstacle("repeated-layers", reason, elsewhere, accidental=True))
    return found


def _fits_float32(array: Array) -> bool:
    return array.dtype.itemsize <= 4 or bool((array.astype(np.float32).astype(array.dtype) == array).all())


def tensors_of(prompt: SoftPrompt, config: Mapping[str, Any]) -> dict[str, Array]:
    """The tensors of a prompt in the layout that its `config_of` announces."""
    part = prompt.parts[0]
    if isinstance(part, AdaptionPrompt):
        return adaption.tensors_of(prompt, config)
    head = {facts.HEAD + name: array for name, array in prompt.head.items()}
    twice = config["num_transformer_submodules"] == 2
    rest = unused(prompt, config["peft_type"]) if twice else {}
    if isinstance(part, InputPrompt):
        tensors = {facts.PROMPT: part.vectors}
        if config["peft_type"] == facts.MULTITASK and prompt.training is not None:
            ours = prompt.training.tensors
            tensors = {facts.PROMPT: ours["embedding"], facts.COLUMNS: ours["columns"], facts.ROWS: ours["rows"]}
        # Behind the rows, which are the last axis but one.
        tensors |= {name: np.concatenate([tensors[name], array], axis=-2) for name, array in rest.items()}
        return {**tensors, **head}
    if twice:
        blocks = stored_blocks(part)
        if blocks is None:
            raise ValueError("the prompt has obstacles")
        dead = tuple(block for block in range(len(part.layers)) if block not in blocks)
        kv_heads, length, head_dim = part.layers[0].keys.shape
        if dead:
            zeros = np.zeros((length, len(dead) * 2 * kv_heads * head_dim), part.layers[0].keys.dtype)
            flat = rest.get(facts.PROMPT, zeros)
            blocks |= KeyValuePrefix.from_flat(part.site, flat, dead, kv_heads, head_dim).layers
        part = KeyValuePrefix(part.site, blocks)
    return {facts.PROMPT: _provisioned(part).flat(), **head}


def _provisioned(part: KeyValuePrefix) -> KeyValuePrefix:
    heads, width = provision(part)

    def filled(array: Array) -> Array:
        more = heads - array.shape[0], width - array.shape[2]
        return np.pad(array, ((0, more[0]), (0, 0), (0, more[1]))) if any(more) else array

    layers = {n: KeyValue(filled(pair.keys), filled(pair.values)) for n, pair in part.layers.items()}
    return KeyValuePrefix(part.site, layers)
