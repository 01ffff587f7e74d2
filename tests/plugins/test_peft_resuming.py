"""PEFT's own training goes on from what softbridge kept with the loss that was saved; from PEFT's files alone, not."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

import softbridge as sb
from softbridge.errors import CheckpointError, EngineError
from softbridge.testing import tiny_config, tiny_model
from softbridge_compat import peft_defects
from softbridge_peft import example, facts
from softbridge_peft.resuming import restore, resumable, resume

peft = pytest.importorskip("peft")

pytestmark = [
    # A defect of PEFT, held by tests/compat: peft-deprecated.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]

METHODS = tuple(example.methods(1))
#: What PEFT saves without what trained it.
THROWN = ("p-tuning", "p-tuning-lstm", "context-aware", "prefix-tuning-projected")
TASKS = {"bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}
LENGTH = 4
#: No dropout: then two runs of the same training are the same numbers.
CALM = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "t5": {"dropout_rate": 0.0, "num_layers": 4, "num_decoder_layers": 4},
    "llama": {},
}


def base(family: str) -> Any:
    return tiny_model(family, **CALM[family])


def live(family: str, method: str, **changes: Any) -> Any:
    """What PEFT has trained for two steps, in training mode."""
    task = TASKS.get(family, "CAUSAL_LM")
    return example.train(base(family), task, method, length=LENGTH, steps=2, seed=1, **changes).train()


def batches(model: Any, steps: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)
    found = []
    for _ in range(steps):
        tokens = torch.randint(3, 96, (3, 6), generator=generator)
        batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
        if model.peft_config[model.active_adapter].task_type == "SEQ_CLS":
            batch["labels"] = tokens[:, 0] % 5
        if model.peft_type == facts.MULTITASK:
            batch["task_ids"] = torch.tensor([0, 1, 2])
        found.append(batch)
    return found


def losses(model: Any, steps: int = 3) -> list[float]:
    """Of SGD."""
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    curve = []
    for batch in batches(model, steps):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        curve.append(float(loss.detach()))
    return curve


def encoder_state(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.prompt_encoder["default"].state_dict().items()}


def alike(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


#: PEFT fails with any other prefix on a classifier: see peft-renamed-cache-classifier.
CLASSIFYING = () if peft_defects.RENAMED_CACHE_CLASSIFIER.applies() else ("prefix-tuning-projected",)
CASES = [
    *(("llama", method) for method in METHODS),
    *(("bert", method) for method in ("p-tuning", *CLASSIFYING, "multitask")),
    *(("t5", method) for method in ("p-tuning", "prefix-tuning-projected", "multitask", "cartridge", "prompt-tuning")),
]


@pytest.mark.parametrize(("family", "method"), CASES)
def test_training_goes_on_with_the_losses_that_it_would_have_had(family: str, method: str, tmp_path: Path) -> None:
    """The third loss of PEFT: `is_trainable=True` is refused."""
    model = resumable(live(family, method))
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / facts.TRAINING_FILE).exists() == (method in THROWN)
    saved = encoder_state(model)
    expected = losses(model)
    assert len(set(expected)) == 3

    with pytest.raises(ValueError, match="Cannot set a prompt learning adapter to trainable"):
        peft.PeftModel.from_pretrained(base(family), tmp_path / "saved", is_trainable=True)

    again = resume(base(family), tmp_path / "saved")
    if family != "t5":  # where the rows and blocks that PEFT never uses are drawn anew
        assert alike(encoder_state(again), saved)
    assert losses(again) == expected
    # What goes on once may go on again.
    again.save_pretrained(tmp_path / "again")
    model.save_pretrained(tmp_path / "uninterrupted")
    config = tiny_config(family, **CALM[family])
    assert sb.load(tmp_path / "again", base=config) == sb.load(tmp_path / "uninterrupted", base=config)
    assert losses(resume(base(family), tmp_path / "again")) == losses(model)


def test_the_prompt_that_softbridge_loads_is_put_into_a_live_model(tmp_path: Path) -> None:
    """From softbridge's own file, too; and what PEFT's loader makes of the same files is another loss, or none."""
    for method in THROWN:
        model = live("llama", method)
        model.save_pretrained(tmp_path / method)
        sb.save(sb.extract(model), tmp_path / f"{method}.safetensors", format="softbridge", base=tiny_config("llama"))
        expected = losses(model)
        other = live("llama", method, **({} if method == "context-aware" else {"encoder_hidden_size": 20}))
        losses(other, 1)
        twin = copy.deepcopy(other)
        prompt = sb.load(tmp_path / f"{method}.safetensors")
        before = [id(parameter) for parameter in other.parameters()]
        restore(other, prompt)
        assert [id(parameter) for parameter in other.parameters()] == before
        assert losses(other) == expected

        if method == "prefix-tuning-projected":
            with pytest.raises(RuntimeError, match="size mismatch"):
                twin.load_adapter(tmp_path / method, "default", is_trainable=True)
        else:
            twin.load_adapter(tmp_path / method, "default", is_trainable=True)
            assert abs(losses(twin)[0] - expected[0]) > 1e-4, method


def test_a_head_is_put_back(tmp_path: Path) -> None:
    model = live("bert", "p-tuning")
    losses(model, 2)
    prompt = sb.extract(model)
    other = live("bert", "p-tuning")
    restore(other, prompt)
    assert losses(other) == losses(model)
    config = peft.PromptEncoderConfig(task_type="SEQ_CLS", num_virtual_tokens=LENGTH, encoder_hidden_size=20)
    wide = peft.get_peft_model(tiny_model("bert", num_labels=7), config)
    with pytest.raises(EngineError, match="head"):
        restore(wide, prompt)


def test_what_started_a_prompt_is_not_asked_for_again(tmp_path: Path) -> None:
    """PEFT would look for the tokenizer of a prompt that started as a text."""
    model = live("llama", "prompt-tuning")
    model.save_pretrained(tmp_path)
    path = tmp_path / facts.CONFIG_FILE
    start = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a b", "tokenizer_name_or_path": "no/such"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **start}))
    again = resume(base("llama"), tmp_path)
    assert losses(again) == losses(model)
    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / facts.CONFIG_FILE).read_text()).items() >= start.items()


def test_dropout_is_left_out_of_what_is_kept(tmp_path: Path) -> None:
    """See peft-saved-dropout: what PEFT saves in training mode would not be what the encoder stands for."""
    model = resumable(live("llama", "p-tuning-lstm", encoder_dropout=0.5))
    model.save_pretrained(tmp_path / "saved")
    assert model.prompt_encoder["default"].training
    assert sb.load(tmp_path / "saved", base=tiny_config("llama")) == sb.extract(model)


def test_an_adapter_of_another_name_is_kept_in_its_folder(tmp_path: Path) -> None:
    config = peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, encoder_hidden_size=12)
    model = resumable(peft.get_peft_model(base("llama"), config, "english"))
    assert resumable(model) is model
    model.save_pretrained(tmp_path)
    assert (tmp_path / "english" / facts.TRAINING_FILE).is_file()
    assert losses(resume(base("llama"), tmp_path)) == losses(model)


def test_what_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    model = live("llama", "p-tuning")
    model.save_pretrained(tmp_path / "evaluated")
    evaluated, trained = sb.load(tmp_path / "evaluated"), sb.extract(model)
    cases: list[tuple[Any, Any, type[Exception], str]] = [
        (live("llama", "p-tuning"), evaluated, CheckpointError, "as it was evaluated"),
        (live("llama", "p-tuning", encoder_hidden_size=24), trained, EngineError, "p-tuning-mlp"),
        (live("llama", "p-tuning-lstm"), trained, EngineError, "p-tuning-mlp"),
        (live("llama", "prefix-tuning-projected"), trained, EngineError, "p-tuning-mlp"),
        (live("llama", "prefix-tuning"), evaluated, EngineError, "does not fit the adapter 'default'"),
        (live("llama", "multitask"), evaluated, EngineError, "prefix_task_cols"),
        (peft.PeftModel.from_pretrained(base("llama"), tmp_path / "evaluated"), trained, EngineError, "inference"),
        (base("llama"), trained, EngineError, "without an adapter"),
    ]
    for target, prompt, error, message in cases:
        before = [parameter.detach().clone() for parameter in target.parameters()]
        with pytest.raises(error, match=message) as caught:
            restore(target, prompt)
        assert caught.value.remedy
        assert all(torch.equal(a, b) for a, b in zip(before, target.parameters(), strict=True))
    with pytest.raises(CheckpointError, match="as it was evaluated"):
        resume(base("llama"), tmp_path / "evaluated")
    restore(live("llama", "prompt-tuning"), evaluated)
    with pytest.raises(EngineError, match="two submodules"):
        resumable(live("t5", "p-tuning-lstm"))
    resumable(live("t5", "p-tuning-lstm", num_transformer_submodules=1))


# --- the Trainer ------------------------------------------------------------------------------------------------------


def trainer(model: Any, directory: Path, greater: bool) -> Any:
    """The unmodified Trainer; which loss is better is chosen so that the best of its two checkpoints is the first."""
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=4,
        learning_rate=0.05,
        per_device_train_batch_size=3,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        logging_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=greater,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    rows = [{name: tensor[row] for name, tensor in batch.items()} for batch in batches(model, 4) for row in range(3)]
    return Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:3])


def curve(run: Any, name: str) -> dict[int, float]:
    return {entry["step"]: entry[name] for entry in run.state.log_history if name in entry}


def test_the_trainer_loads_the_best_and_resumes(tmp_path: Path) -> None:
    """The first two losses of PEFT, without and with softbridge."""
    outcome: dict[str, tuple[Any, Any]] = {}
    keepers: dict[str, Callable[[Any], Any]] = {"peft": lambda model: model, "softbridge": resumable}
    for name, keep in keepers.items():
        run = trainer(keep(live("llama", "p-tuning")), tmp_path / name, True)
        run.train()
        best = curve(run, "eval_loss")
        assert run.state.best_model_checkpoint == str(tmp_path / name / "checkpoint-2")
        assert best[2] > best[4]
        resumed = trainer(keep(live("llama", "p-tuning")), tmp_path / name, True)
        resumed.train(resume_from_checkpoint=str(tmp_path / name / "checkpoint-2"))
        outcome[name] = (run.evaluate()["eval_loss"] - best[2], (curve(run, "loss"), curve(resumed, "loss")))
    difference, (whole, resumed) = outcome["softbridge"]
    assert difference == 0
    assert whole == resumed
    difference, (whole, resumed) = outcome["peft"]
    assert abs(difference) > 1e-3
    assert whole[2] == resumed[2]
    assert abs(whole[3] - resumed[3]) > 1e-3


def test_the_trainer_resumes_a_projected_prefix(tmp_path: Path) -> None:
    """Which PEFT can neither resume nor load at the end."""
    with pytest.raises(RuntimeError, match="load_best_model_at_end"):
        trainer(live("llama", "prefix-tuning-projected"), tmp_path / "peft", False).train()
    run = trainer(resumable(live("llama", "prefix-tuning-projected")), tmp_path / "softbridge", False)
    run.train()
    assert run.evaluate()["eval_loss"] == curve(run, "eval_loss")[2]
    checkpoint = tmp_path / "softbridge" / "checkpoint-2"
    resumed = trainer(resumable(live("llama", "prefix-tuning-projected")), tmp_path / "resumed", False)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert curve(resumed, "loss") == curve(run, "loss")
    prompt = sb.load(checkpoint, base=tiny_config("llama"))
    assert prompt.training is not None
