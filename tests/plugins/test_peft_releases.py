"""Files of old releases of PEFT are read as the release that wrote them ran them: its own logits decide.

The golden files hold what releases from 0.3 to 0.18 wrote, each with the transformers of its time, and what they
computed; see `tests/golden/make_peft.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig

import softbridge as sb
from softbridge import parts
from softbridge.base import BaseModel, build
from softbridge.errors import BaseModelError, LoweringError
from softbridge.prompt import SoftPrompt
from softbridge.testing import agreement
from softbridge.untrusted import Files
from softbridge.verification.run import attached
from softbridge_compat import peft_releases
from softbridge_native.engine import ENGINE as NATIVE
from softbridge_peft import facts
from softbridge_peft.engine import ENGINE

pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # transformers 4's GPT-BigCode, when it is imported.
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
RELEASES = ("0.3.0", "0.5.0", "0.7.1", "0.10.0", "0.12.0", "0.14.0", "0.16.0", "0.18.0")
#: Release -> how many of its files are compared, and which it could not run itself.
COMPARED = {
    "0.3.0": (12, {"gpt_bigcode.prefix-tuning"}),
    "0.5.0": (13, {"llama.prefix-tuning", "gpt_bigcode.prefix-tuning"}),
    "0.7.1": (15, {"llama.prefix-tuning"}),
    "0.10.0": (15, {"llama.prefix-tuning"}),
    "0.12.0": (16, set()),
    "0.14.0": (17, set()),
    "0.16.0": (16, {"bert.prefix-tuning"}),
    "0.18.0": (17, set()),
}
#: The release's file -> why today's PEFT has no file of the same numbers.
CHANGED = {
    **{(release, f"t5.{method}"): "parts" for release in RELEASES[:1] for method in ("prompt-tuning", "p-tuning")},
    **{(release, "bloom.prefix-tuning"): "order" for release in RELEASES[:5]},
    **{(release, "gpt_bigcode.prefix-tuning"): "heads" for release in RELEASES[2:7]},
}


@cache
def bases() -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(GOLDEN / "peft_bases.safetensors", "pt") as file:
        return load_file(GOLDEN / "peft_bases.safetensors"), file.metadata()


@cache
def base(family: str) -> Any:
    tensors, settings = bases()
    config = AutoConfig.for_model(family, **json.loads(settings[family]))
    model = build(config, BaseModel(config).task, torch.float32, 0)
    marker = f"{family}.weights."
    weights = {name.removeprefix(marker): tensor for name, tensor in tensors.items() if name.startswith(marker)}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    model.tie_weights()
    assert not unexpected
    assert {name for name, _ in model.named_parameters()} & set(missing) <= {"lm_head.weight"}
    return model.double().eval()


class Golden:
    """What one release wrote and computed."""

    def __init__(self, release: str) -> None:
        path = GOLDEN / f"peft_{release}.safetensors"
        self.tensors = load_file(path)
        with safe_open(path, "pt") as file:
            self.failed = json.loads(file.metadata()["failed"])
        self.cases = sorted({name.split("/")[0] for name in self.tensors if "/" in name})

    def put(self, case: str, directory: Path, **changes: Any) -> Path:
        """The directory that the release wrote, with changes to its configuration."""
        directory.mkdir(parents=True)
        for name, tensor in self.tensors.items():
            if name.startswith(f"{case}/"):
                (directory / name.split("/")[1]).write_bytes(tensor.numpy().tobytes())
        config = directory / facts.CONFIG_FILE
        config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
        return directory


def weights(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    files = Files(path)
    name = next(name for name in facts.WEIGHTS_FILES if name in files)
    return files.json(facts.CONFIG_FILE), {key: array.tobytes() for key, array in files.tensors(name).items()}


def logits(family: str, prompt: SoftPrompt | None) -> torch.Tensor:
    """By the native engine, where it can run the prompt."""
    tensors, _ = bases()
    rows = tensors[f"{family}.input_ids"]
    told = {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
    if family == "t5":
        told["labels"] = tensors["t5.labels"]
    model = base(family)
    with torch.no_grad():
        if prompt is None:
            return torch.as_tensor(model(**told).logits)
        engine = ENGINE if NATIVE.obstacles(prompt, model) else NATIVE
        with attached(engine, model, prompt) as running:
            return torch.as_tensor(running(**told).logits)


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Of the real tokens, relative to the largest."""
    if ours.ndim == 3:
        real = min(ours.shape[1], theirs.shape[1])
        ours, theirs = ours[:, -real:], theirs[:, -real:]
    return float((ours - theirs).abs().max() / theirs.abs().max())


def bound(case: str, expected: torch.Tensor) -> float:
    """As closely as the model agrees with itself, or with what a release computed in float32.

    P-tuning's prompt is evaluated in float32, by old releases anew for every batch, which rounds otherwise.
    """
    close = agreement(base(case.split(".")[0]))
    return max(close, 1e-5 if expected.dtype == torch.float32 else 1e-6 if "p-tuning" in case else close)


@pytest.mark.parametrize("release", RELEASES)
def test_files_mean_what_the_release_computed(release: str, tmp_path: Path) -> None:
    golden = Golden(release)
    count, refused = COMPARED[release]
    assert refused == {case for case in golden.failed if case in golden.cases}
    assert len(golden.cases) == count + len(refused)
    for case in set(golden.cases) - refused:
        family, _ = case.split(".")
        source, config = golden.put(case, tmp_path / case), base(family).config
        prompt, expected = sb.load(source, base=config), golden.tensors[f"{case}.logits"]
        assert apart(logits(family, prompt), expected) <= bound(case, expected), case
        assert apart(logits(family, None), expected) > 0.05, case

        # There and back: today's PEFT has the same file for it, or one that reads as the same prompt.
        encoding = "bin" if (source / facts.WEIGHTS_FILES[1]).exists() else None
        changed = CHANGED.get((release, case))
        if changed == "parts":
            with pytest.raises(LoweringError, match=r"\[parts\]"):
                sb.save(prompt, tmp_path / "written" / case, format="peft", base=config)
            continue
        sb.save(prompt, tmp_path / "written" / case, format="peft", base=config, encoding=encoding)
        written = weights(tmp_path / "written" / case)
        assert (written == weights(source)) == (changed is None), case
        again = sb.load(tmp_path / "written" / case, base=config)
        assert again == prompt
        assert changed is None or apart(logits(family, again), expected) <= bound(case, expected)


def test_the_order_of_an_old_bloom_prefix_depends_on_who_wrote_it(tmp_path: Path) -> None:
    golden, case = Golden("0.10.0"), "bloom.prefix-tuning"
    config, expected = base("bloom").config, golden.tensors["bloom.prefix-tuning.logits"]
    old = golden.put(case, tmp_path / "old")
    past = {layer: [golden.tensors[f"{case}.past.{layer}.{half}"] for half in ("keys", "values")] for layer in (0, 1)}
    for layer, pair in sb.load(old, base=config).prefixes[0].layers.items():
        keys, values = past[layer]  # [B·K, D, P] and [B·K, P, D]
        assert torch.equal(torch.from_numpy(pair.keys.copy()), keys.transpose(1, 2).to(torch.float32))
        assert torch.equal(torch.from_numpy(pair.values.copy()), values.to(torch.float32))

    def note(prompt: SoftPrompt) -> str:
        assert prompt.origin is not None
        return " ".join(prompt.origin.notes)

    assert "reordered" in note(sb.load(old, base=config))
    new = sb.load(golden.put(case, tmp_path / "new", peft_version="0.18.0"), base=config)
    assert apart(logits("bloom", new), expected) > 0.1
    assert note(new) == ""
    silent = golden.put(case, tmp_path / "silent")
    (silent / facts.CARD_FILE).unlink()
    assert sb.load(silent, base=config) == new
    assert peft_releases.UNKNOWN_BLOOM in note(sb.load(silent, base=config))
    said = golden.put(case, tmp_path / "said", peft_version="0.12.0@abc")
    assert sb.load(said, base=config) == sb.load(old, base=config)
    named = golden.put(case, tmp_path / "named", base_model_name_or_path="bigscience/bloom-560m")
    with pytest.raises(BaseModelError, match="bloom-560m by an old release"):
        sb.load(named)


def test_the_first_release_prompts_both_stacks(tmp_path: Path) -> None:
    golden = Golden("0.3.0")
    for case in ("t5.prompt-tuning", "t5.p-tuning"):
        expected = golden.tensors[f"{case}.logits"]
        prompt = sb.load(golden.put(case, tmp_path / case), base=base("t5").config)
        assert [part.stack for part in prompt.inputs] == ["encoder", "decoder"]
        half = parts.choose(prompt, "encoder-input")
        assert apart(logits("t5", half), expected) > 0.1
        # Which is what later releases make of such a file.
        later = sb.load(golden.put(case, tmp_path / f"{case}-later", revision=None), base=base("t5").config)
        assert apart(logits("t5", later), logits("t5", half)) == 0
        sb.save(half, tmp_path / f"{case}-half", format="peft", base=base("t5").config)
        assert sb.load(tmp_path / f"{case}-half", base=base("t5").config) == half


def test_what_no_release_could_run_is_refused_for_its_base(tmp_path: Path) -> None:
    """Grouped key/value heads, before PEFT counted them."""
    for release in ("0.5.0", "0.7.1", "0.10.0"):
        source = Golden(release).put("llama.prefix-tuning", tmp_path / release)
        with pytest.raises(BaseModelError, match="4 key/value heads of size 2 in layer 0, the model has 2"):
            sb.load(source, base=base("llama").config)


def test_releases_are_recognised() -> None:
    old = {"inference_mode": True, "task_type": "CAUSAL_LM"}
    cases: list[tuple[dict[str, Any], str | None, str | None]] = [
        (old, None, "0.3.0"),
        ({**old, "revision": None}, None, None),
        (old, "### Framework versions\n\n- PEFT 0.5.0\n- PEFT 0.4.0\n", "0.5.0"),
        (old, "nothing", None),
        ({"peft_version": "0.19.0@unknown", "revision": None}, "- PEFT 0.5.0", "0.19.0"),
        ({"peft_version": "strange"}, None, None),
        ({"peft_type": "PROMPT_TUNING"}, None, None),
    ]
    for config, card, expected in cases:
        found = peft_releases.release(config, card)
        assert (found and str(found)) == expected
    judged: list[Callable[[Any], bool]] = [peft_releases.prompts_decoder, peft_releases.scrambles_bloom]
    assert not any(judge(None) for judge in judged)


def test_geometry_decides_which_heads_count(tmp_path: Path) -> None:
    golden, case = Golden("0.7.1"), "gpt_bigcode.prefix-tuning"
    source = golden.put(case, tmp_path / "old")
    assert sb.load(source).prefixes[0].layers[0].keys.shape == (4, 3, 2)
    prefix = sb.load(source, base=base("gpt_bigcode").config).prefixes[0]
    for layer, pair in prefix.layers.items():
        fused = golden.tensors[f"{case}.past.{layer}"][0]  # [P, 2·D]
        both = torch.cat([torch.from_numpy(half[0].copy()) for half in (pair.keys, pair.values)], dim=1)
        assert torch.equal(both, fused.to(torch.float32))
