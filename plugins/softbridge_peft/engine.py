"""PEFT itself, unmodified, as an engine: what a user of PEFT gets is what this runs.

PEFT always counts the virtual tokens: real tokens stand at P, P+1, ... A prefix that wants them elsewhere is served by
a hook that moves `position_ids` before the base model sees them.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from softbridge.arrays import Array, from_torch, to_torch
from softbridge.base import BaseModel
from softbridge.base import cache as caches
from softbridge.errors import BaseModelError, EngineError, Obstacle
from softbridge.geometry import Geometry, read_geometry, stack_of
from softbridge.lowering.expressible import check_fits, inexpressible
from softbridge.methods import rematerialise
from softbridge.prompt import Adaption, AdaptionPrompt, InputPrompt, KeyValue, KeyValuePrefix, Part, SoftPrompt
from softbridge.untrusted import Files
from softbridge_compat import peft_defects
from softbridge_peft import adaption, example, facts, guard
from softbridge_peft.format import FORMAT, adapter_folder, parse, tensors_of
from softbridge_peft.prompt_encoder import of_encoder
from softbridge_peft.written_config import config_of

#: Where an attached PeftModel keeps the means to undo it.
_ATTACHMENT = "softbridge_attachment"


@dataclass(frozen=True)
class _Attachment:
    """What was attached, and the state of the model before."""

    prompt: SoftPrompt
    trainable: Sequence[tuple[Any, bool]]
    training: Sequence[tuple[Any, bool]]
    attributes: Sequence[tuple[Any, frozenset[str]]]
    config: Mapping[str, Any]
    hook: Any


class PeftEngine:
    """Runs every prompt through `peft.get_peft_model`, evaluated, and PEFT's own files through PEFT's own loader."""

    name = "peft"
    summary = "Hugging Face PEFT itself"
    capabilities = replace(FORMAT.capabilities, prefix_start=None, left_pads=False, quantised=True)

    def unavailable(self) -> str | None:
        return None if find_spec("peft") is not None else "PEFT is not installed (softbridge's extra 'peft' brings it)"

    def obstacles(self, prompt: SoftPrompt, model: Any) -> Sequence[Obstacle]:
        if hasattr(model, "peft_config"):
            way = f"detach that first; or give its base, model.get_base_model(), and {guard.NATIVE}"
            return [Obstacle("attached", "the model already carries a PEFT adapter", way)]
        geometry = read_geometry(model.config)
        native = "run it with the native engine"
        found = list(FORMAT.obstacles(replace(prompt, training=None), geometry))
        try:
            check_fits(prompt, geometry)
        except BaseModelError as error:
            found.append(Obstacle("base-model", error.found, error.remedy))
        if _task(model) is None:
            reason = f"PEFT has no task for the class {type(model).__name__}; it has {', '.join(facts.TASKS)}"
            found.append(Obstacle("task", reason, "build the model with an Auto class of one of these tasks"))
        if guard.checkpointing(model) and not prompt.adaptions:
            reason = "PEFT refuses prefixes under gradient checkpointing, and leaves hooks in the model otherwise"
            found.append(Obstacle("gradient-checkpointing", reason, guard.checkpointing_remedy(model)))
        found += _head_obstacles(prompt, model)
        for part in prompt.parts:
            found += [Obstacle(name, reason, native) for name, reason in _refusals(part, prompt, model, geometry)]
        return found

    def attach(self, model: Any, prompt: SoftPrompt) -> Any:
        """Attach through `peft.get_peft_model`. See `Engine.attach`.

        Calls that PEFT cannot answer with this prompt (`adapter_names`, static caches, a prefix under gradient
        checkpointing) raise an `EngineError` that names the way out.

        The prompt's head is in the model already: `softbridge.attach` loads it, and PEFT copies what it finds there.
        """
        self._check(model, prompt)
        import peft

        bare = replace(prompt, head={}, training=None)
        config = config_of(bare, read_geometry(model.config), _task(model), fresh=True)
        tensors = {name: to_torch(array) for name, array in tensors_of(bare, config).items()}
        trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        training = [(module, module.training) for module in model.modules()]
        attributes = [(module, frozenset(vars(module))) for module in model.modules()]
        settings = dict(vars(model.config))
        # get_peft_model enters the model's own name here, and warns if there was another.
        config["base_model_name_or_path"] = None
        with _quiet():
            adapted = peft.get_peft_model(model, peft.PeftConfig.from_peft_type(**config))
            # PEFT refuses a state without the head that it has made a copy of.
            state = _state(adapted, adapted.active_adapter)
            tensors = adaption.under_names_of(state, tensors) if prompt.adaptions else tensors
            peft.set_peft_model_state_dict(adapted, {**state, **tensors})
        _freeze(adapted.eval(), prompt)
        hook = _pass_position_ids(model, prompt)
        if not prompt.adaptions:  # which PEFT runs in place, as any other module
            guard.guard(adapted, prompt)
        setattr(adapted, _ATTACHMENT, _Attachment(prompt, trainable, training, attributes, settings, hook))
        return adapted

    def load(self, model: Any, prompt: SoftPrompt, directory: Path) -> Any:
        """Run files with PEFT's own loader, `PeftModel.from_pretrained`: the prompt and a head come from there.

        What training began with is left out of the configuration: PEFT would open a path that a stranger's file names.
        It holds numbers in float32 and takes them into the model's dtype where it uses them. A file for a model
        without a head (FEATURE_EXTRACTION) runs under the head of the model that is given. A multitask prompt runs as
        its own task, unless a caller passes `task_ids`.

        Args:
            model: one that nothing else needs, it cannot be detached.
            prompt: what softbridge read from the same files; it says where the tokens stand.
            directory: as PEFT wrote it.

        Raises:
            EngineError: as for `attach`, or the files are for another task.
        """
        self._check(model, prompt)
        directory = directory / adapter_folder(Files(directory))
        if not any((directory / name).is_file() for name in facts.WEIGHTS_FILES):  # PEFT would ask the hub
            raise EngineError(f"no weights in {directory}", " or ".join(facts.WEIGHTS_FILES), "give PEFT's directory")
        import peft

        config = peft.PeftConfig.from_pretrained(str(directory))
        for said in fields(config):
            if said.name.startswith(facts.BEGINNINGS):
                setattr(config, said.name, said.default)
        task = config.task_type
        headless = task == facts.FEATURE_EXTRACTION and _called(model) is not model
        untold = task is None and prompt.adaptions  # which PEFT runs all the same
        if task != _task(model) and not headless and not untold:
            # Of a file that names none, PEFT would run the model without the prompt.
            raise EngineError(
                f"a file for the task {task and str(getattr(task, 'value', task))}",
                f"{_task(model)}, which a {type(model).__name__} is for",
                "build the model with the Auto class of the file's task",
            )
        target = model.base_model if headless else model
        with _quiet():
            adapted = peft.PeftModel.from_pretrained(target, str(directory), config=config)
        if adapted.peft_type == facts.MULTITASK:
            adapted.prompt_encoder[adapted.active_adapter].register_forward_pre_hook(_TellTask(prompt))
            if task == facts.SEQ_2_SEQ_LM and peft_defects.MULTITASK_DECODER.applies():
                # What PEFT itself makes of its file, run as prompt tuning, whose forward takes decoder_input_ids.
                vectors = from_torch(adapted.get_prompt(1)[0, : prompt.parts[0].length])
                return self.attach(model, replace(prompt, parts=(replace(prompt.inputs[0], vectors=vectors),)))
        _pass_position_ids(target, prompt)
        if headless:
            setattr(model, model.base_model_prefix, adapted)
            adapted = model
        return adapted.eval()

    def generate_fault(self, prompt: SoftPrompt, geometry: Geometry) -> str | None:
        return guard.generate_fault(prompt, geometry)

    def float32_regions(self, prompt: SoftPrompt, geometry: Geometry) -> Sequence[str]:
        return adaption.float32_regions(geometry) if prompt.adaptions else ()

    def _check(self, model: Any, prompt: SoftPrompt) -> None:
        """Raise an `EngineError` if PEFT is not there, or cannot run this."""
        reason = self.unavailable()
        if reason is not None:
            raise EngineError(reason, "PEFT in this environment", "install it, or choose another engine")
        obstacles = [
            *inexpressible(prompt, self.capabilities, BaseModel.resolve(model)),
            *self.obstacles(prompt, model),
        ]
        if obstacles:
            raise EngineError(
                "PEFT cannot run this prompt on this model: " + "; ".join(f"[{o.name}] {o.reason}" for o in obstacles),
                "a prompt that PEFT runs on this model",
                "; ".join(dict.fromkeys(o.remedy for o in obstacles)),
            )

    def extract(self, model: Any) -> SoftPrompt:
        """The prompt of an attached model, or of any PeftModel with a soft prompt, as it is now.

        A prompt of `attach` comes back with the positions, the base and the precision that it was attached with, and
        with the head that it has now. One that PEFT trains through an encoder brings the encoder along, and is what
        that evaluates to without dropout (PEFT itself saves what it evaluates to with dropout).
        """
        import peft

        if not isinstance(model, peft.PeftModel):
            raise _not_attached(model)
        adapter = model.active_adapter
        config = {name: getattr(value, "value", value) for name, value in model.peft_config[adapter].to_dict().items()}
        if config["peft_type"] not in (*facts.KINDS, adaption.TYPE):
            raise EngineError(
                f"a PeftModel with the adapter '{adapter}', which is {config['peft_type']}",
                f"a soft prompt: one of {', '.join((*facts.KINDS, adaption.TYPE))}",
                "activate the adapter that is one: model.set_adapter(name)",
            )
        beside = config["peft_type"] == adaption.TYPE
        # Before PEFT evaluates it: a context-aware prompt is changed by that.
        encoder = {} if beside else model.prompt_encoder[adapter].state_dict()
        state = {name: from_torch(tensor) for name, tensor in encoder.items()}
        tensors = {name: from_torch(tensor) for name, tensor in _state(model, adapter).items()}
        prompt = parse(config, tensors, read_geometry(model.config))
        if (
            not beside
            and not config["inference_mode"]
            and (live := of_encoder(config, state, prompt.parts[0])) is not None
        ):
            prompt = rematerialise(replace(prompt, training=live))
        attachment: _Attachment | None = getattr(model, _ATTACHMENT, None)
        if attachment is None:
            return prompt
        before = attachment.prompt
        parts = tuple(_in_precision(new, old) for new, old in zip(prompt.parts, before.parts, strict=True))
        head = _head(model.get_base_model(), adapter, before.head)
        training = before.training if parts == before.parts else None
        return replace(before, parts=parts, head=head, training=training, origin=None)

    def detach(self, model: Any) -> Any:
        from peft.utils.other import AuxiliaryTrainingWrapper

        attachment: _Attachment | None = getattr(model, _ATTACHMENT, None)
        if attachment is None:
            raise _not_attached(model)
        base = model.get_base_model()
        if attachment.hook is not None:
            attachment.hook.remove()
        for module in list(base.modules()):
            for name, child in module.named_children():
                if isinstance(child, AuxiliaryTrainingWrapper):
                    setattr(module, name, child.original_module)
        adaption.unwrap(base)
        for parameter, flag in attachment.trainable:
            parameter.requires_grad_(flag)
        for module, flag in attachment.training:
            module.training = flag
        for module, names in attachment.attributes:
            # PEFT's generate leaves its own prepare_inputs_for_generation and generation_config behind.
            for name in set(vars(module)) - names:
                delattr(module, name)
        vars(base.config).update(attachment.config)  # PEFT sets pretraining_tp
        delattr(model, _ATTACHMENT)
        return base

    def train_example(self, model: Any, method: str, directory: Path, *, length: int, steps: int, seed: int) -> None:
        with _quiet():
            trained = example.train(model, _task(model), method, length=length, steps=steps, seed=seed)
            trained.save_pretrained(directory, save_embedding_layers=False)  # see `_state`


ENGINE = PeftEngine()


class _Shift:
    """A forward pre-hook that moves all real tokens by `shift` positions from where PEFT has them."""

    def __init__(self, shift: int) -> None:
        self.shift = shift

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        import torch

        positions = kwargs.get("position_ids")
        if positions is None:
            inputs = kwargs.get("input_ids", args[0] if args else None)
            inputs = kwargs["inputs_embeds"] if inputs is None else inputs
            seen = caches.given(kwargs).get_seq_length()
            positions = torch.arange(seen, seen + inputs.shape[1], device=inputs.device)[None]
            # RoBERTa and its kin count from behind the padding token's index.
            embeddings: Any = getattr(module.base_model, "embeddings", None)
            if hasattr(embeddings, "create_position_ids_from_inputs_embeds"):
                positions = positions + embeddings.padding_idx + 1
        return args, {**kwargs, "position_ids": positions + self.shift}


class _TellTask:
    """A forward pre-hook on PEFT's multitask prompt that passes it a prompt's task, where its caller does not."""

    def __init__(self, prompt: SoftPrompt) -> None:
        self.task = 0 if prompt.training is None else prompt.training.settings.get("task", 0)

    def __call__(self, module: Any, args: tuple[Any, Any]) -> tuple[Any, Any]:
        indices, task_ids = args
        return indices, indices.new_full((len(indices),), self.task) if task_ids is None else task_ids


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what PEFT provokes in transformers by itself: see softbridge_compat.peft_defects, peft-deprecated."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield


def _state(model: Any, adapter: str) -> dict[str, Any]:
    """What PEFT would save of an adapter. Told that no embeddings are part of it, PEFT asks no hub whether they are."""
    import peft

    return dict(peft.get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False))


def _freeze(adapted: Any, prompt: SoftPrompt) -> None:
    """Freeze all but the prompt and its head. Of the head PEFT trains its own copy."""
    for name, parameter in adapted.named_parameters():
        owner, copied, rest = name.removeprefix("base_model.").partition(f".modules_to_save.{adapted.active_adapter}.")
        mine = f"{owner}.{rest}" if copied else owner
        own = name.startswith("prompt_encoder.") or adaption.is_parameter(name)
        parameter.requires_grad_(own or mine in prompt.head)


def _not_attached(model: Any) -> EngineError:
    return EngineError(
        f"a {type(model).__name__} that this engine did not attach to", "what attach returned", "attach a prompt first"
    )


def _task(model: Any) -> str | None:
    """PEFT's task_type for a transformers model, by its class."""
    from transformers.models.auto import modeling_auto

    names = {cls.__name__ for cls in type(model).__mro__}
    for task, table in facts.TASKS.items():
        for entry in getattr(modeling_auto, table).values():
            if not names.isdisjoint([entry] if isinstance(entry, str) else entry):
                return task
    return None


def _called(model: Any) -> Any:
    """The module that PEFT calls with a prefix: the model, or what is under its head if that alone takes a cache."""
    return model if caches.argument(model.forward) is not None else model.base_model


def _pass_position_ids(model: Any, prompt: SoftPrompt) -> Any:
    """Put the real tokens where the prompt has them; the hook's handle, or None where PEFT has them there itself."""
    for stack, counted in prompt.counted().items():
        shift = prompt.positions.start.get(stack, counted) - counted
        if shift:
            return _called(model).register_forward_pre_hook(_Shift(shift), with_kwargs=True)
    return None


def _head(base: Any, adapter: str, attached: Mapping[str, Array]) -> dict[str, Array]:
    """The head as it is now, under the model's own names: what was attached, and what training changed in addition."""
    now, before = {}, {}
    for name, parameter in base.named_parameters():
        owner, copied, rest = name.partition(f".modules_to_save.{adapter}.")
        if copied:
            now[f"{owner}.{rest}"] = parameter
        elif ".original_module." in name:
            before[name.replace(".original_module.", ".")] = parameter
        elif name in attached:
            now[name] = parameter
    changed = {name for name, parameter in before.items() if name in now and not now[name].equal(parameter)}
    head = {name: from_torch(parameter) for name, parameter in now.items() if name in attached or name in changed}
    return {name: array.astype(attached[name].dtype) if name in attached else array for name, array in head.items()}


def _head_obstacles(prompt: SoftPrompt, model: Any) -> list[Obstacle]:
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    wrong = [name for name, array in prompt.head.items() if shapes.get(name) != array.shape]
    if not wrong:
        return []
    reason = f"the model has no tensors of these names and shapes: {', '.join(wrong)}"
    return [Obstacle("head", reason, "build the model with the prompt's own kind of head and number of labels")]


def _refusals(part: Part, prompt: SoftPrompt, model: Any, geometry: Geometry) -> list[tuple[str, str]]:
    """(name, reason) of everything that stands against running one part on this model."""
    if isinstance(part, InputPrompt):
        found = []
        if part.entry != "before":
            found.append(("entry", "PEFT puts vectors before the embedding block, this prompt's belong after it"))
        if part.placement != "before-sequence":
            found.append(("placement", f"PEFT puts vectors before the sequence, not {part.placement}"))
        if prompt.positions.start.get(part.stack, part.length) != part.length:
            found.append(("positions", "PEFT counts the vectors of an input prompt, this prompt does not"))
        return found
    if isinstance(part, AdaptionPrompt):
        return []
    if part.site == "cross":
        return [("site", "PEFT has no prefix at the cross-attention")]
    found = []
    called, kind = _called(model), type(model).__name__
    takes = inspect.signature(called.forward).parameters
    if caches.argument(called.forward) is None:
        found.append(("past-key-values", f"{kind} takes no past key values, which PEFT's prefix is"))
    elif _task(model) in facts.ASKING and peft_defects.RENAMED_CACHE_CLASSIFIER.applies():
        reason = f"PEFT fails with a prefix on {kind}: it does not know what the installed transformers calls the cache"
        found.append(("past-key-values", reason))
    unpooled = called is not model and _task(model) == facts.SEQ_CLS and getattr(called, "pooler", None) is None
    if unpooled and peft_defects.UNPOOLED_PREFIX.applies():
        found.append(("pooler", f"PEFT fails with a prefix on {kind} under the installed transformers"))
    biased = any(hasattr(module, "relative_attention_bias") for module in model.modules())
    shifted = prompt.positions.start.get(stack_of(part.site), part.length) != part.length
    if biased and prompt.positions.unbiased_from:
        found.append(("relative-bias", "PEFT's layers all have the relative position bias, this prompt's have not"))
    elif biased and (shifted or prompt.positions.relative_bias == "skewed"):
        reason = "PEFT's real tokens stand behind the prefix for the relative position bias, this prompt's do not"
        found.append(("relative-bias", reason))
    elif shifted and "position_ids" not in takes:
        found.append(("positions", f"{kind} takes no position_ids"))
    shape = geometry.site(part.site)
    if prompt.positions.window == "pinned" and shape is not None and shape.window is not None:
        found.append(("window", "the sliding window drops virtual tokens in PEFT, and not for this prompt"))
    return found


def _in_precision(new: Part, old: Part) -> Part:
    """`new` in the precision of `old`, whose numbers PEFT holds in float32."""
    if isinstance(new, InputPrompt) and isinstance(old, InputPrompt):
        return replace(new, vectors=new.vectors.astype(old.vectors.dtype), scale=old.scale)
    if isinstance(new, AdaptionPrompt) and isinstance(old, AdaptionPrompt):
        first = next(iter(old.layers.values()))
        cast = (first.vectors.dtype, first.gate.dtype)
        ones = {n: Adaption(o.vectors.astype(cast[0]), o.gate.astype(cast[1])) for n, o in new.layers.items()}
        return replace(new, layers=ones)
    if isinstance(new, KeyValuePrefix) and isinstance(old, KeyValuePrefix):
        dtype: Any = old.layers[0].keys.dtype
        pairs = {layer: KeyValue(p.keys.astype(dtype), p.values.astype(dtype)) for layer, p in new.layers.items()}
        return KeyValuePrefix(new.site, pairs)
    raise TypeError("an attached prompt keeps its kind")
