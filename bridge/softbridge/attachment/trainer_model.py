"""What makes a model with a prompt pass for any other in transformers' own `Trainer`.

`Trainer` saves a model with `save_pretrained`, looks for ``model.safetensors`` when it resumes or restores the best,
and gives its tensors to `load_state_dict`; what it pushes to a hub in mid-training is that file and the configuration.
So a model to which an engine attached in place gets a class of the same name, derived from its own, in which that file
is the prompt: softbridge's own format, whose tensors go by the names of `SoftPrompt.arrays`. Everything else
(`generate`, `pipeline`, the signature of `forward`, its place among transformers' classes) stays what it was.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from softbridge.arrays import from_torch
from softbridge.attachment.attached import attached_by, extract
from softbridge.base.head import load_head
from softbridge.errors import EngineError, OutputError, SoftbridgeError
from softbridge.plugin.hookspecs import Insertable
from softbridge.plugin.optional import able
from softbridge.plugin.registry import engine_named
from softbridge.prompt.container import WEIGHTS_FILE, pack, refilled, unpack
from softbridge.prompt.soft_prompt import SoftPrompt
from softbridge.untrusted import Files, write_into

#: What transformers says of a folder of ours, if it is to load a model from it.
NO_WEIGHTS = (
    "none: model.safetensors is a soft prompt of softbridge. Load the base model and softbridge.attach(model, folder)"
)

#: By this attribute transformers' models say that adapters are attached to them, which alone are trained. `Trainer`
#: asks for it before it takes a quantised base model.
_ADAPTED = "_hf_peft_config_loaded"

#: The attribute of an attached model that says that `become` set the other.
_SAID = "_softbridge_said_adapted"

#: What the name of a prompt's tensor starts with, of every prompt: see `SoftPrompt.arrays`.
_PARTS = "parts."


def become(model: Any) -> None:
    """Give an attached model its class. `unbecome` undoes it."""
    plain: Any = type(model)
    model.__class__ = derived(DropIn, plain)
    if getattr(model, "is_quantized", False) and not getattr(model, _ADAPTED, False):
        setattr(model, _ADAPTED, True)
        setattr(model, _SAID, True)


def unbecome(model: Any) -> None:
    """Give it back the class that it had, if it has one of `become`."""
    if isinstance(model, DropIn):
        model.__class__ = type(model).plain
        if vars(model).pop(_SAID, False):
            del vars(model)[_ADAPTED]


class Derived:
    """What a class that an engine derives, and gives to a module of the model, has before all that its own has.

    Its module, name and documentation are those of the class that the module had, `plain`.
    """

    plain: type

    @classmethod
    def members(cls, plain: type) -> Mapping[str, Any]:
        """What the derived class has that depends on the plain one."""
        return {}

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is found by the name of the one that it is derived from, so it is derived again.
        reduced: Any = super().__reduce_ex__(max(2, int(protocol)))
        plain: Any = type(self)
        kinds: list[Any] = []
        while issubclass(plain, Derived):
            kinds.append(plain.__bases__[0])
            plain = plain.plain
        return (_blank, (plain, *reversed(kinds)), *reduced[2:])


class DropIn(Derived):
    """What the class of an attached model has before all that its own has."""

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, Any] | None = None,
        push_to_hub: bool = False,
        safe_serialization: bool = True,
        **settings: Any,
    ) -> None:
        """Write the prompt, with the head and the parameterisation that are trained with it, and no other weights.

        The directory gets ``config.json`` (and ``generation_config.json``) of the base model, and ``model.safetensors``
        in softbridge's format: `softbridge.load` reads it, and so does this model's `load_state_dict`. Each file
        appears whole or not at all, and only after all were written and read back. Other files stay.

        A prompt that is not finite is refused, and so ends a training that has diverged. To go on would let the trainer
        remove the last sound checkpoint in favour of worthless ones (``save_total_limit``).

        Args:
            save_directory: made if it is missing.
            is_main_process: of several, one writes.
            state_dict: of this model, where its own parameters are but a share of it (FSDP).
            push_to_hub: as in transformers.
            safe_serialization: there is no other.
            settings: of shards and formats, which one small file has no use for; those of a hub are handed on.

        Raises:
            EngineError: a pickle is asked for.
            OutputError: the prompt holds NaN or infinity, or the files cannot be written.
        """
        if not safe_serialization:
            raise EngineError(
                "a checkpoint as a pickle (safe_serialization=False, save_safetensors=False)",
                "safetensors",
                "leave the setting at its default",
            )
        if not is_main_process:
            return
        model: Any = self
        folder = Path(save_directory)

        def check(files: Files) -> None:
            if pack(unpack(files, WEIGHTS_FILE)) != weights:
                raise OutputError(
                    f"{WEIGHTS_FILE} reads back as another prompt",
                    "the prompt that was to be written",
                    "report this as a defect of softbridge; nothing was written",
                )

        try:
            weights = pack(_now(model, state_dict or {}))
            write_into(folder, {**_described(model), WEIGHTS_FILE: weights}, check=check)
        except SoftbridgeError:
            with suppress(OSError):
                folder.rmdir()  # the trainer made it, and would take an empty checkpoint for the last one
            raise
        if push_to_hub:
            hub = {name: value for name, value in settings.items() if name in ("commit_message", "private", "token")}
            model.push_to_hub(settings.get("repo_id", folder.name), **hub)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Take the tensors of a prompt's file, all of them and no others, strict or not; or a whole state.

        Raises:
            CheckpointError: tensors are missing, unexpected or of other shapes.
        """
        model: Any = self
        if not any(name.startswith(_PARTS) for name in state_dict):
            return getattr(super(), "load_state_dict")(state_dict, *args, **kwargs)  # noqa: B009
        from torch.nn.modules.module import _IncompatibleKeys

        engine, now = engine_and_prompt(model)
        prompt = refilled(now, {name: from_torch(tensor) for name, tensor in state_dict.items()})
        engine.insert(model, prompt)
        load_head(model, prompt.head)
        return _IncompatibleKeys([], [])

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: see `init_continuous_batching`."""
        return self.init_continuous_batching()

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: continuous batching puts the tokens of many texts into one row, and calls attention of its own.

        Raises:
            EngineError: always.
        """
        raise EngineError(
            "continuous batching (generate_batch), which keeps the tokens of many texts in one row",
            "one text in each row",
            "generate from a padded batch: model.generate(input_ids, attention_mask=...)",
        )

    def num_trainable_parameters(self) -> tuple[int, int]:
        """How many numbers are trained, and how many there are in all."""
        model: Any = self
        parameters = list(model.parameters())
        return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)

    def print_trainable_parameters(self) -> None:
        """Print `num_trainable_parameters`, in the words that users of PEFT know."""
        trained, total = self.num_trainable_parameters()
        print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}")


def _described(model: Any) -> dict[str, bytes]:
    """The files of the base model's configuration, as transformers writes them.

    A key of ``config.json`` that names the file of weights says that there are none: `from_pretrained` raises on a
    prompt's folder, and returns no model of random weights. transformers hands the key on to no model that is saved
    anew.
    """
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    with TemporaryDirectory() as scratch:
        config.save_pretrained(scratch)
        if model.can_generate() and getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(scratch)
        files = {path.name: path.read_bytes() for path in sorted(Path(scratch).iterdir())}
    document = {**json.loads(files["config.json"]), "transformers_weights": NO_WEIGHTS}
    return {**files, "config.json": (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()}


def _now(model: Any, state: Mapping[str, Any]) -> SoftPrompt:
    """The prompt as it is now; of a sharded model, as the gathered state has it."""
    with _holding(model, state):
        return extract(model)


def engine_and_prompt(model: Any) -> tuple[Insertable, SoftPrompt]:
    """The engine that attached to a model, and the prompt as it is now."""
    insertable = able(engine_named(attached_by(model)), Insertable)
    assert insertable is not None, "`attach` makes a trainer's model of no other"
    return insertable, extract(model)


@contextmanager
def _holding(model: Any, state: Mapping[str, Any]) -> Iterator[None]:
    """The model, with trained parameters from elsewhere in the place of its own."""
    import torch

    displaced: list[tuple[Any, str, Any]] = []
    for path, parameter in list(model.named_parameters()):
        if parameter.requires_grad and path in state:
            owner, _, name = path.rpartition(".")
            module = model.get_submodule(owner)
            displaced.append((module, name, parameter))
            module._parameters[name] = torch.nn.Parameter(state[path].detach().cpu())
    try:
        yield
    finally:
        for module, name, parameter in displaced:
            module._parameters[name] = parameter


@cache
def derived(kind: Any, plain: Any) -> Any:
    """The class of a module whose own is `plain`, with what `kind` has before it."""
    same = {name: getattr(plain, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(plain.__name__, (kind, plain), {**same, **kind.members(plain), "plain": plain})


def _blank(plain: Any, *kinds: Any) -> Any:
    for kind in kinds:
        plain = derived(kind, plain)
    return plain.__new__(plain)
