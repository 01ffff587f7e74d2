"""Prompts with heads of several tasks are verified under the head that they bring."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForTokenClassification

import softbridge as sb
from softbridge.base import BaseModel
from softbridge.geometry import read_geometry
from softbridge.prompt import SoftPrompt
from softbridge.testing import random_prefix, tiny_config

#: Task -> the class that has it, its head and how many rows that has, and PEFT's name of the task.
HEADS = {
    "sequence-classification": ("BertForSequenceClassification", "classifier", 3, "SEQ_CLS"),
    "token-classification": ("BertForTokenClassification", "classifier", 5, "TOKEN_CLS"),
    "question-answering": ("BertForQuestionAnswering", "qa_outputs", 2, "QUESTION_ANS"),
}


def prompt_with(task: str) -> tuple[SoftPrompt, BaseModel]:
    name, module, rows, _ = HEADS[task]
    config = tiny_config("bert", architectures=[name])
    # A prefix: with vectors in the input, PEFT's loss counts the places of a span from the first virtual token.
    prompt = random_prefix(read_geometry(config), 4)
    generator = np.random.default_rng(0)
    head = {
        f"{module}.weight": generator.normal(0, 1, (rows, config.hidden_size)).astype(np.float32),
        f"{module}.bias": generator.normal(0, 1, rows).astype(np.float32),
    }
    return replace(prompt, head=head), BaseModel(config)


@pytest.mark.parametrize("task", HEADS)
def test_the_head_that_a_prompt_brings_is_the_one_that_is_run(task: str, tmp_path: Path) -> None:
    prompt, base = prompt_with(task)
    assert base.with_head(prompt.head).task == task
    for name, format in (("ours", "softbridge"), ("theirs", "peft")):
        sb.save(prompt, tmp_path / name, format=format, base=base)
    assert json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())["task_type"] == HEADS[task][3]
    certificate = sb.verify(tmp_path / "theirs", tmp_path / "ours", base=base)
    assert certificate.same, certificate.to_json()
    # With the classes in another order it is another function.
    reversed_head = replace(prompt, head={name: array[::-1] for name, array in prompt.head.items()})
    sb.save(reversed_head, tmp_path / "reversed", format="softbridge", base=base)
    assert not sb.verify(tmp_path / "theirs", tmp_path / "reversed", base=base).same


def test_the_class_of_the_model_decides_between_heads_of_one_name() -> None:
    prompt, base = prompt_with("sequence-classification")
    config = base.config
    config.architectures = None
    assert BaseModel(config).with_head(prompt.head).task == "sequence-classification"
    model = AutoModelForTokenClassification.from_config(config).to(torch.float64)
    assert BaseModel.resolve(model).with_head(prompt.head).task == "token-classification"
    masked = {"cls.predictions.transform.dense.weight": np.zeros((32, 32), np.float32)}
    assert BaseModel(config).with_head(masked).task == "masked-lm"
    assert BaseModel(config).task == "sequence-classification"
