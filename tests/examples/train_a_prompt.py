"""Train a prompt on a real model with transformers' own trainer: python train_a_prompt.py MODEL MESSAGES.TSV OUT"""

import csv
import sys

import transformers as hf

import softbridge
from softbridge.methods import PTuningV2, TaskHead

CLASSES = ["fault", "fine", "wish"]


def accuracy(said: hf.EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((said.predictions.argmax(-1) == said.label_ids).mean())}


def main(model_path: str, messages: str, out: str, engine: str = "native") -> float:
    tokenizer = hf.AutoTokenizer.from_pretrained(model_path)
    parts: dict[str, list] = {"train": [], "held-out": []}
    with open(messages, encoding="utf-8") as lines:
        for row in csv.DictReader(lines, delimiter="\t"):
            parts[row["split"]].append({**tokenizer(row["text"]), "labels": CLASSES.index(row["label"])})

    method = PTuningV2(8, head=TaskHead(labels=len(CLASSES)))
    model = hf.AutoModelForSequenceClassification.from_pretrained(model_path, num_labels=len(CLASSES))
    model = softbridge.attach(model, method, engine=engine, seed=0)  # the only line that is not any trainer's
    model.print_trainable_parameters()
    told = hf.TrainingArguments(out, num_train_epochs=3, learning_rate=method.learning_rate, warmup_steps=5)
    further = softbridge.SoftPromptCallback(["peft", "adapterhub"], accept={"adapterhub": ["positions"]})
    data = {"train_dataset": parts["train"], "eval_dataset": parts["held-out"], "compute_metrics": accuracy}
    trainer = hf.Trainer(model, told, hf.DataCollatorWithPadding(tokenizer), callbacks=[further], **data)
    trainer.train()
    trainer.save_model()  # the prompt and its head: softbridge.load(out)
    return trainer.evaluate()["eval_accuracy"]


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
