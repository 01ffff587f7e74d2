"""A cloze task: a template with a slot and a verbaliser trains and predicts, on masked and on causal models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import softbridge as sb
from softbridge.base import draw_weights
from softbridge.cloze import IGNORED, Cloze
from softbridge.geometry import read_geometry
from softbridge.prompt import SoftPrompt
from softbridge.template import PLACEHOLDER, Field, Slot, Template, Verbaliser, Virtual, Words
from softbridge.testing import random_input_prompt, tiny_config

MASK, PAD, CLS, SEP = 4, 0, 1, 2
STEPS = 200
LABELS = Verbaliser((("down", (20,)), ("up", (30,))))
#: [CLS] v v v x v v "it is" [MASK] "." [SEP]
MASKED = Template(
    (Words((CLS,)), Virtual(3), Field("text"), Virtual(2), Words((10, 11)), Slot(), Words((12, SEP))), LABELS
)
#: v v v x v v "it is" ...
CAUSAL = Template((Virtual(3), Field("text"), Virtual(2), Words((10, 11)), Slot()), LABELS)

KINDS: dict[str, tuple[str, Cloze]] = {
    "bert": ("AutoModelForMaskedLM", Cloze(MASKED, MASK, PAD)),
    "gpt2": ("AutoModelForCausalLM", Cloze(CAUSAL, None, PAD)),
    "llama": ("AutoModelForCausalLM", Cloze(CAUSAL, None, PAD)),
}


def model_of(family: str) -> Any:
    """In float32, with large random weights."""
    import transformers

    sizes = {"n_embd": 64, "n_layer": 2} if family == "gpt2" else {"hidden_size": 64, "num_hidden_layers": 2}
    config = tiny_config(family, **sizes)
    model = getattr(transformers, KINDS[family][0]).from_config(config, attn_implementation="eager")
    draw_weights(model, seed=1)
    return model.eval()


def examples(count: int, seed: int) -> list[dict[str, Any]]:
    """Texts of several lengths; the class is which of two words stands at the end."""
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        label = int(generator.integers(2))
        others = generator.integers(50, 60, generator.integers(1, 4))
        found.append({"text": [*map(int, others), 40 + label], "label": label})
    return found


def prompt_for(model: Any, template: Template) -> SoftPrompt:
    """Random vectors, which stand where the template has them."""
    prompt = random_input_prompt(read_geometry(model.config), template.length, std=0.3)
    part = replace(prompt.inputs[0], placement="template", template=template)
    start = dict.fromkeys(prompt.positions.start, 0)
    return replace(prompt, parts=(part,), positions=replace(prompt.positions, start=start))


def accuracy(model: Any, cloze: Cloze, rows: list[dict[str, Any]]) -> float:
    texts = [{"text": row["text"]} for row in rows]  # no label is near when it predicts
    batch = cloze(texts)
    assert "labels" not in batch
    with torch.no_grad():
        scores = cloze.scores(model(**batch).logits, batch)
    return float((scores.argmax(-1) == torch.tensor([row["label"] for row in rows])).float().mean())


@pytest.mark.parametrize("family", KINDS)
def test_it_trains_and_predicts(family: str, tmp_path: Path) -> None:
    cloze, model = KINDS[family][1], model_of(family)
    held_out = examples(100, seed=2)
    sb.attach(model, prompt_for(model, cloze.template))
    before = accuracy(model, cloze, held_out)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trained) == 5 * model.config.hidden_size
    optimizer = torch.optim.Adam(trained, lr=0.1)
    for step in range(STEPS):
        batch = cloze(examples(16, seed=100 + step))
        assert (batch["labels"] != IGNORED).sum(-1).tolist() == [1] * 16
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    after = accuracy(model, cloze, held_out)
    print(f"{family}: {before:.2f} before, {after:.2f} after")
    assert after >= 0.9
    assert after > before + 0.3

    prompt = sb.extract(model)
    sb.save(prompt, tmp_path / "prompt", format="softbridge", base=model)
    sb.detach(model)
    loaded = sb.load(tmp_path / "prompt", base=model)
    assert loaded.inputs[0].template == cloze.template, "the template and the verbaliser travel with the prompt"
    sb.attach(model, loaded)
    assert accuracy(model, replace(cloze, template=loaded.inputs[0].template), held_out) == after


def test_a_causal_model_does_not_see_the_answer() -> None:
    cloze, model = KINDS["gpt2"][1], model_of("gpt2")
    sb.attach(model, prompt_for(model, cloze.template))
    rows = examples(6, seed=5)
    told, untold = cloze(rows), cloze([{"text": row["text"]} for row in rows])
    assert not torch.equal(told["input_ids"], untold["input_ids"])
    with torch.no_grad():
        scores = [
            cloze.scores(model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits, b)
            for b in (told, untold)
        ]
    assert torch.equal(*scores)


def test_scores_are_means_over_the_words_of_a_class() -> None:
    words = Verbaliser((("down", (20, 21)), ("up", (30,))))
    cloze = Cloze(replace(MASKED, verbaliser=words), MASK, PAD)
    batch = cloze([{"text": [40, 41], "label": "up"}, {"text": [50], "label": 0}])
    assert batch["labels"].tolist()[0][cloze.template.slot({"text": [40, 41]})] == 30
    assert batch["labels"].tolist()[1][cloze.template.slot({"text": [50]})] == 20
    assert (batch["input_ids"] == PLACEHOLDER).sum(-1).tolist() == [5, 5]
    assert batch["attention_mask"].sum(-1).tolist() == [13, 12]
    logits = torch.randn(2, batch["input_ids"].shape[1], 96)
    slots = [cloze.template.slot({"text": [0] * n}) for n in (2, 1)]
    expected = [
        [float(logits[row, slot, [20, 21]].mean()), float(logits[row, slot, 30])] for row, slot in enumerate(slots)
    ]
    assert torch.allclose(cloze.scores(logits, batch), torch.tensor(expected))


def test_what_does_not_fit_is_refused() -> None:
    cloze = KINDS["bert"][1]
    with pytest.raises(ValueError, match="no examples"):
        cloze([])
    with pytest.raises(ValueError, match="for every example"):
        cloze([{"text": [9], "label": 0}, {"text": [9]}])
    with pytest.raises(ValueError, match="a class of down, up"):
        cloze([{"text": [9], "label": 2}])
    with pytest.raises(ValueError, match="one mask token"):
        cloze.slots(cloze([{"text": [MASK]}]))
    with pytest.raises(ValueError, match="goes on behind the slot"):
        Cloze(MASKED, None, PAD)
    with pytest.raises(ValueError, match="with a verbaliser"):
        Cloze(replace(MASKED, verbaliser=None), MASK, PAD)
