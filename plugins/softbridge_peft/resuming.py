"""PEFT's own training goes on where it stopped: what its files leave out is kept beside them and put back.

    >>> model = resumable(peft.get_peft_model(base, config))  # then train it with the Trainer, or however else
    >>> model = resume(base, "checkpoint-500")  # later: a trainable PeftModel, with the loss that was saved

PEFT saves what a parameterisation (an MLP, an LSTM) evaluates to, and loads that into the parameterisation's input: see
softbridge_compat.peft_defects, peft-lost-training and peft-lost-encoder. So `load_best_model_at_end` and
`resume_from_checkpoint` of the Trainer go on from another loss, or fail, and `is_trainable=True` is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from softbridge import untrusted
from softbridge.arrays import Array, from_torch, to_torch
from softbridge.errors import CheckpointError, EngineError
from softbridge.geometry import read_geometry
from softbridge.prompt import SoftPrompt
from softbridge_peft import facts
from softbridge_peft import prompt_encoder as training
from softbridge_peft.engine import ENGINE
from softbridge_peft.format import FORMAT, adapter_folder, tensors_of
from softbridge_peft.written_config import config_of

_OWN = (facts.PROMPT, facts.COLUMNS, facts.ROWS)


def resume(model: Any, directory: str | Path) -> Any:
    """Wrap a base model in PEFT for training from a directory that `resumable` or softbridge wrote.

    What `PeftModel.from_pretrained(model, directory, is_trainable=True)` refuses for soft prompts.

    Args:
        model: the transformers model that the prompt is for; PEFT wraps it in place.
        directory: PEFT's files, and beside them softbridge's.

    Returns:
        A `PeftModel` in training mode, `resumable`, with the parameterisation (and a head) as they were saved.

    Raises:
        CheckpointError: the files are malformed, or do not hold what trained the prompt.
        BaseModelError: the files do not fit the model.
    """
    import peft

    files = untrusted.Files(directory)
    folder = Path(directory) / adapter_folder(files)
    prompt = FORMAT.read(files, read_geometry(model.config))
    config = peft.PeftConfig.from_pretrained(str(folder))
    config.inference_mode = False
    start = getattr(config, "prompt_tuning_init", None)
    if start is not None:  # a text, say, for which PEFT would ask for a tokenizer
        config.prompt_tuning_init = "RANDOM"
    adapted = peft.get_peft_model(model, config)
    if start is not None:
        adapted.peft_config[adapted.active_adapter].prompt_tuning_init = start
    restore(adapted, prompt)
    return resumable(adapted.train())


def restore(model: Any, prompt: SoftPrompt, adapter: str | None = None) -> None:
    """Put what trained a prompt back into the parameterisation of a live PeftModel, and its head into the model.

    The optimiser is not touched. Parameters stay the same objects, in their own dtype and on their own device.

    Args:
        model: a PeftModel whose adapter has the prompt's method and sizes, and is to be trained.
        prompt: as `softbridge.load` or `softbridge.extract` gives it.
        adapter: name of the adapter; the active one if None.

    Raises:
        CheckpointError: the prompt does not say what trained it, where the adapter has a parameterisation.
        EngineError: the adapter has another method or other sizes.
    """
    import torch

    name, config, encoder = _adapter(model, adapter)
    head = _head(model, name, prompt)
    if (parameterised := training.encoder_of(config)) is None:
        _restore_stored(model, name, config, prompt)
    elif prompt.training is None:
        raise CheckpointError(
            f"a prompt as it was evaluated, and an adapter with a parameterisation ({parameterised[0]})",
            f"the training state of that parameterisation, which softbridge keeps in {facts.TRAINING_FILE}",
            "train with softbridge_peft.resuming.resumable(model); from an evaluated prompt, start PROMPT_TUNING or "
            "PREFIX_TUNING without projection",
        )
    else:
        state = {key: from_torch(tensor) for key, tensor in encoder.state_dict().items()}
        try:
            again = training.to_encoder(config, state, prompt)
        except ValueError as error:
            raise EngineError(
                f"the training state ({prompt.training.kind}) does not fit the adapter '{name}': {error}",
                f"the tensors of its parameterisation ({parameterised[0]})",
                "make the adapter from the configuration beside the training state: softbridge_peft.resuming.resume",
            ) from error
        with torch.no_grad():
            for key, tensor in encoder.state_dict(keep_vars=True).items():
                tensor.copy_(to_torch(again[key]))
    with torch.no_grad():
        for parameter, array in head:
            parameter.copy_(to_torch(array))


def _head(model: Any, name: str, prompt: SoftPrompt) -> list[tuple[Any, Array]]:
    """The parameters of an adapter's head, PEFT's own copy where there is one, and what belongs into them."""
    parameters = dict(model.get_base_model().named_parameters())
    found = []
    for key, array in prompt.head.items():
        owner, _, rest = key.partition(".")
        parameter = parameters.get(f"{owner}.modules_to_save.{name}.{rest}", parameters.get(key))
        if parameter is None or tuple(parameter.shape) != array.shape:
            raise EngineError(
                f"a head with '{key}' {list(array.shape)}, which the model does not have",
                "the head that the prompt was trained with",
                "build the model with the prompt's own kind of head and number of labels",
            )
        found.append((parameter, array))
    return found


def _restore_stored(model: Any, name: str, config: dict[str, Any], prompt: SoftPrompt) -> None:
    """Through PEFT's own loader, which is right where its file holds all that is trained."""
    import peft

    geometry = read_geometry(model.config)
    wanted = peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    ours = {key: wanted[key] for key in _OWN if key in wanted}
    theirs: dict[str, Array] = {}
    if not FORMAT.obstacles(prompt, geometry):
        theirs = tensors_of(prompt, config_of(prompt, geometry, config["task_type"]))
    if any(key not in theirs or theirs[key].shape != tuple(tensor.shape) for key, tensor in ours.items()):
        raise EngineError(
            f"a prompt that does not fit the adapter '{name}' ({config['peft_type']}): {prompt}",
            ", ".join(f"{key} {list(tensor.shape)}" for key, tensor in ours.items()),
            "make the adapter from the prompt's own configuration: softbridge_peft.resuming.resume",
        )
    state = {**wanted, **{key: to_torch(theirs[key]) for key in ours}}
    peft.set_peft_model_state_dict(model, state, adapter_name=name)


def resumable(model: Any) -> Any:
    """Let a live PeftModel keep what trains the prompt that is active now, so that its training can go on.

    From now on `save_pretrained` writes softbridge's file beside PEFT's, evaluated without dropout; and `load_adapter`,
    which the Trainer calls to resume and to load the best model, puts back from there what PEFT's loader cannot.

    Returns:
        The same model.

    Raises:
        EngineError: the model has no soft prompt, or one whose parameterisation cannot be kept.
    """
    name, config, _ = _adapter(model, None)
    parameterised = training.encoder_of(config)
    if parameterised is not None and ENGINE.extract(model).training is None:
        raise EngineError(
            f"a parameterisation ({parameterised[0]}) that runs over the vectors of two submodules at once",
            "one submodule, whose vectors are the prompt",
            "make the adapter with num_transformer_submodules=1; PEFT uses the first submodule's vectors alone",
        )
    if not isinstance(model.save_pretrained, _Save):
        model.save_pretrained = _Save(model.save_pretrained, name)
        model.load_adapter = _Load(model.load_adapter)
    return model


class _Save:
    """`save_pretrained` of a PeftModel, and one file more."""

    def __init__(self, run: Callable[..., Any], adapter: str) -> None:
        self.run, self.adapter = run, adapter

    def __call__(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
        model: Any = self.run.__self__  # type: ignore[attr-defined]
        if model.active_adapter != self.adapter:
            return self.run(save_directory, *args, **kwargs)
        name, config, encoder = _adapter(model, self.adapter)
        prompt = ENGINE.extract(model)  # first: a context-aware prompt is changed by saving it
        mode = encoder.training
        encoder.eval()
        try:
            done = self.run(save_directory, *args, **kwargs)
        finally:
            encoder.train(mode)
        if kwargs.get("is_main_process", True):
            folder = Path(save_directory) / ("" if name == "default" else name)
            for file, content in training.files(prompt.training, config["peft_type"]).items():
                untrusted.write_file(folder / file, content, overwrite=True)
        return done


class _Load:
    """`load_adapter` of a PeftModel, where softbridge's file is there, and PEFT's otherwise."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run = run

    def __call__(self, model_id: Any, adapter_name: str, is_trainable: bool = False, **kwargs: Any) -> Any:
        from torch.nn.modules.module import _IncompatibleKeys

        model: Any = self.run.__self__  # type: ignore[attr-defined]
        if adapter_name not in model.peft_config or not (Path(model_id) / facts.TRAINING_FILE).is_file():
            return self.run(model_id, adapter_name, is_trainable=is_trainable, **kwargs)
        restore(model, FORMAT.read(untrusted.Files(model_id), read_geometry(model.config)), adapter_name)
        if not is_trainable:
            model.eval()
        return _IncompatibleKeys([], [])


def _adapter(model: Any, name: str | None) -> tuple[str, dict[str, Any], Any]:
    """Name, configuration and `prompt_encoder` of an adapter of a live PeftModel."""
    configs = getattr(model, "peft_config", {})
    name = getattr(model, "active_adapter", "") if name is None else name
    encoder = getattr(model, "prompt_encoder", {})
    if name not in configs or name not in encoder or configs[name].inference_mode:
        raise EngineError(
            f"a {type(model).__name__} without an adapter '{name}' that PEFT trains a soft prompt with",
            "a PeftModel with a soft prompt that is not for inference alone",
            "make one with peft.get_peft_model, or with softbridge_peft.resuming.resume",
        )
    config = {key: getattr(value, "value", value) for key, value in configs[name].to_dict().items()}
    return name, config, encoder[name]
