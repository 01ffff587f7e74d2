"""What transformers' trainer does not do by itself: the prompt in further formats, beside every checkpoint.

    >>> Trainer(model=softbridge.attach(model, method), ..., callbacks=[SoftPromptCallback(["peft", "adapterhub"])])

What cannot work is said before the first step, and not in the middle of a night.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerCallback

from softbridge.attachment.attached import extract
from softbridge.checkpoint.read import load
from softbridge.checkpoint.write import save
from softbridge.errors import EngineError, SoftbridgeError
from softbridge.plugin.registry import format_named
from softbridge.prompt.soft_prompt import SoftPrompt
from softbridge.verification.proof import verify

#: The folder in a checkpoint that holds the further formats, each in one of its own name. It keeps them one level
#: deeper than transformers looks for adapters when it resumes.
FOLDER = "formats"


class SoftPromptCallback(TrainerCallback):  # type: ignore[misc]
    """Writes the prompt in further formats each time that the trainer saves.

    In ``checkpoint-N/formats/peft`` and so on. Each is read back and compared before it appears (see
    `softbridge.save`), and on request run by its own toolkit.

    Args:
        formats: names of formats.
        accept: conditions that are accepted, by format: ``{"adapterhub": ["positions"]}``.
        verify: run what was saved and what was written, and compare the outputs (see `softbridge.verify`).

    Raises:
        UnknownFormatError: no installed format has one of these names.
    """

    def __init__(
        self, formats: Sequence[str], accept: Mapping[str, Collection[str]] = {}, *, verify: bool = False
    ) -> None:
        self.formats = [format_named(name).name for name in formats]
        self.accept = accept
        self.verify = verify

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Refuse label smoothing and NEFTune with an engine that wraps the model.

        transformers unwraps the model as it does for LoRA, and then picks the wrong module.

        Raises:
            EngineError: one of the two is set, and the model is wrapped.
        """
        past = {name: getattr(args, name) for name in ("label_smoothing_factor", "neftune_noise_alpha")}
        found = [f"{name}={value}" for name, value in past.items() if value]
        if found and not isinstance(model, PreTrainedModel):
            raise EngineError(
                f"{' and '.join(found)} with a {type(model).__name__}: transformers unwraps it as it does "
                "for LoRA, and fails or picks the wrong module",
                "the setting left at its default, or an engine that attaches in place",
                "softbridge.attach(model, prompt, engine='native')",
            )

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Refuse formats that cannot hold the prompt.

        Raises:
            LoweringError: the prompt cannot be written in one of them as the same function.
            EngineError: nothing is attached.
        """
        with tempfile.TemporaryDirectory() as scratch:
            self._write(extract(model), Path(scratch), model)

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Write the checkpoint's prompt once more for each format.

        Raises:
            SoftbridgeError: the prompt could not be written, or the files are another function.
        """
        if not state.is_world_process_zero:
            return
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self._write(load(checkpoint, base=_under(model)), checkpoint / FOLDER, model)
        for name in self.formats if self.verify else ():
            certificate = verify(checkpoint, checkpoint / FOLDER / name, base=_generating(model))
            if not certificate.same:
                raise SoftbridgeError(
                    f"{checkpoint / FOLDER / name} is {certificate.verdict}: {certificate.summary()}",
                    f"the same outputs as {checkpoint}",
                    "report this as a defect of softbridge, with the two folders",
                )

    def _write(self, prompt: SoftPrompt, folder: Path, model: Any) -> None:
        for name in self.formats:
            save(
                prompt, folder / name, format=name, base=_under(model), accept=self.accept.get(name, ()), overwrite=True
            )


def _generating(model: Any) -> Any:
    """The base model's configuration, with the cache that a trainer switches off and generation has."""
    config = copy.deepcopy(_under(model).config)
    config.use_cache = True
    return config


def _under(model: Any) -> Any:
    """The base model: of a wrapper, what it wraps."""
    return model if isinstance(model, PreTrainedModel) else model.get_base_model()
