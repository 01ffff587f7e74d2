"""Every method of PEFT, trained for a few steps on random tokens: for tests and demonstrations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from softbridge.errors import EngineError
from softbridge.geometry import read_geometry
from softbridge_peft import facts

#: How many tasks an example of multitask prompt tuning has.
TASKS = 3


def methods(length: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Method -> peft_type and settings."""
    plain = {"num_virtual_tokens": length}
    encoder = {**plain, "encoder_hidden_size": 20}
    text = {"cpt_token_ids": [*range(5, 5 + length)], "cpt_tokens_type_mask": [1 + n % 4 for n in range(length)]}
    bounds = {"opt_projection_epsilon": 9.0, "opt_projection_format_epsilon": 14.0}
    return {
        "prompt-tuning": (facts.PROMPT_TUNING, plain),
        "p-tuning": (facts.P_TUNING, encoder),
        "p-tuning-lstm": (facts.P_TUNING, {**encoder, "encoder_reparameterization_type": "LSTM"}),
        "multitask": (facts.MULTITASK, {**plain, "num_tasks": TASKS, "num_ranks": 2}),
        "context-aware": (facts.CPT, {**text, **bounds}),
        "prefix-tuning": (facts.PREFIX_TUNING, plain),
        "prefix-tuning-projected": (facts.PREFIX_TUNING, {**encoder, "prefix_projection": True}),
        "cartridge": (facts.CARTRIDGE, {**plain, "num_frozen_tokens": length // 2}),
    }


def train(model: Any, task: str | None, method: str, *, length: int, steps: int, seed: int, **changes: Any) -> Any:
    """The model, wrapped by PEFT and trained.

    Args:
        model: a transformers model; it is used up.
        task: PEFT's task_type for it.
        method: one of `methods`.
        length: P.
        steps: of the optimiser.
        seed: of everything.
        changes: to PEFT's settings.

    Raises:
        EngineError: PEFT does not offer the method for this task.
    """
    import peft
    import torch

    if task not in (facts.CAUSAL_LM, facts.SEQ_2_SEQ_LM, facts.SEQ_CLS):
        raise EngineError(
            f"{type(model).__name__} has the task {task}",
            f"a model for {facts.CAUSAL_LM}, {facts.SEQ_2_SEQ_LM} or {facts.SEQ_CLS}",
            "build the model with the Auto class of one of these tasks",
        )
    known = methods(length)
    if method not in known:
        raise _no(method, model, known)
    peft_type, settings = known[method]
    geometry = read_geometry(model.config)
    if facts.KINDS[peft_type] == "prefix" and geometry.decoder is not None and geometry.is_encoder_decoder:
        # PEFT takes the hidden size, which is not heads · head size in every T5.
        settings = {**settings, "token_dim": geometry.decoder.kv_heads * geometry.decoder.head_dim}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            config = peft.PeftConfig.from_peft_type(peft_type=peft_type, task_type=task, **{**settings, **changes})
        except ValueError as error:
            raise _no(method, model, known, f": {error}") from error
        adapted = peft.get_peft_model(model, config)
        _enlarge(adapted.prompt_encoder["default"])
        optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=0.02)
        for _ in range(steps):
            tokens = torch.randint(3, geometry.vocabulary, (4, 8))
            labels = torch.randint(0, model.config.num_labels, (4,)) if task == facts.SEQ_CLS else tokens
            asked = {"task_ids": torch.arange(4) % TASKS} if peft_type == facts.MULTITASK else {}
            optimizer.zero_grad()
            adapted(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=labels, **asked).loss.backward()
            optimizer.step()
    return adapted


def _no(method: str, model: Any, known: Iterable[str], why: str = "") -> EngineError:
    found = f"PEFT has no '{method}' for a {type(model).__name__}{why}"
    return EngineError(found, f"one of {', '.join(known)}", "choose another method")


def _enlarge(encoder: Any) -> None:
    """Draw all that makes the prompt from so wide a distribution that it shows; the text of a CPT prompt is given."""
    import torch

    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if parameter.requires_grad or name == "frozen_embedding":
                layer = name.startswith(("mlp_head", "lstm_head", "transform"))
                parameter.normal_(std=1.5 / parameter.shape[-1] ** 0.5 if layer else 0.7)
