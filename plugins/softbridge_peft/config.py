"""adapter_config.json: what it says, checked, and what is written into it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from softbridge.errors import CheckpointError, NotAPromptError
from softbridge_peft import adaption, facts

_SHAPE = ("token_dim", "num_attention_heads", "num_layers")
_TASKS = ("num_tasks", "num_ranks")


@dataclass(frozen=True)
class Config:
    """What parsing needs of an adapter_config.json, with its types checked."""

    peft_type: str
    task: str | None
    name: str | None
    length: int
    submodules: int
    token_dim: int | None
    heads: int | None
    layers: int | None
    tasks: int = 1
    ranks: int = 1
    frozen: int = 0

    @property
    def kind(self) -> facts.Kind:
        return facts.KINDS[self.peft_type]

    @classmethod
    def check(cls, config: Mapping[str, Any]) -> Config:
        peft_type, task = config.get("peft_type"), config.get("task_type")
        if not isinstance(peft_type, str) or peft_type not in facts.KINDS:
            kind = NotAPromptError if isinstance(peft_type, str) else CheckpointError
            raise kind(
                f"an adapter that is no soft prompt: {facts.CONFIG_FILE} has peft_type {peft_type!r:.80}",
                f"one of {', '.join((*facts.KINDS, adaption.TYPE))}",
                "keep it in PEFT: LoRA and its kin change weights or layers",
            )
        prefix, several = facts.KINDS[peft_type] == "prefix", _TASKS if peft_type == facts.MULTITASK else ()
        needed = ("num_virtual_tokens", *(_SHAPE if prefix else ()), *several)
        values: dict[str, Any] = {
            field: config.get(field)
            for field in ("num_virtual_tokens", "num_transformer_submodules", *_SHAPE, *several)
        }
        problems = [
            f"{field} is {value!r}"
            for field, value in values.items()
            if (field in needed if value is None else type(value) is not int or value < 1)
        ]
        problems += [
            f"{field} is {config[field]!r}"
            for field in ("base_model_name_or_path", "task_type")
            if not isinstance(config.get(field), str | None)
        ]
        if isinstance(task, str) and task not in facts.TASKS:
            problems.append(f"task_type is {task!r}")
        if problems:
            raise _broken(problems, f"whole numbers above 0, names as text, a task_type of {', '.join(facts.TASKS)}")
        length, submodules = values["num_virtual_tokens"], values["num_transformer_submodules"]
        most = 2 if task == facts.SEQ_2_SEQ_LM else 1
        submodules = submodules or most
        if submodules > most:
            problems.append(f"num_transformer_submodules is {submodules} with task_type {task!r}")
        token_dim, heads, layers = (values[field] for field in _SHAPE)
        if prefix and token_dim % heads:
            problems.append(f"token_dim is {token_dim}, no multiple of num_attention_heads {heads}")
        frozen = config.get("num_frozen_tokens", 1) if peft_type == facts.CARTRIDGE else 0
        if type(frozen) is not int or not 0 <= frozen <= length:
            problems.append(f"num_frozen_tokens is {frozen!r} of {length}")
        if peft_type == facts.CPT:
            lists = {field: config.get(field) for field in ("cpt_token_ids", "cpt_mask", "cpt_tokens_type_mask")}
            problems += [
                f"{field} is {value!r:.80}"
                for field, value in lists.items()
                if not isinstance(value, list) or len(value) != length or not all(type(item) is int for item in value)
            ]
            if task != facts.CAUSAL_LM:
                problems.append(f"task_type is {task!r}")
        if problems:
            raise _broken(problems, f"what PEFT itself can run as {peft_type}")
        if prefix and task == facts.SEQ_2_SEQ_LM and submodules == 1:
            # DynamicCache instead of EncoderDecoderCache: see softbridge_compat.peft_defects, peft-one-submodule.
            raise CheckpointError(
                "an encoder-decoder prefix with num_transformer_submodules 1",
                "num_transformer_submodules 2, PEFT's default",
                "PEFT runs such a file with errors: cross-attention, too, sees the prefix; train it with the default",
            )
        name = config.get("base_model_name_or_path") or None
        tasks, ranks = (values.get(field, 1) for field in _TASKS)
        return cls(peft_type, task, name, length, submodules, token_dim, heads, layers, tasks, ranks, frozen)

    @property
    def remedy(self) -> str:
        return "give the right --base (base=... in Python)" + (f"; the file names '{self.name}'" if self.name else "")


def _broken(problems: list[str], expected: str) -> CheckpointError:
    found = f"{facts.CONFIG_FILE} is broken: {'; '.join(problems)}"
    return CheckpointError(found, expected, "restore the file as PEFT wrote it")
