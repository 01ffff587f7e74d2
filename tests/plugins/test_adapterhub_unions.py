"""Adapters of several methods (`ConfigUnion`), and setups (`save_adapter_setup`): what of them is a soft prompt."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import softbridge as sb
from softbridge import untrusted
from softbridge.arrays import Array
from softbridge.errors import CheckpointError, LoweringError
from softbridge.geometry import Geometry, read_geometry
from softbridge.prompt import Positions, SoftPrompt
from softbridge.testing import apart, as_bytes, random_prefix, tiny_config, tiny_model
from softbridge.untrusted import Files
from softbridge_adapterhub import facts
from softbridge_adapterhub.engine import ENGINE
from softbridge_adapterhub.format import FORMAT

BOTTLENECK = {"architecture": None, "mh_adapter": False, "reduction_factor": 16}
LORA = {"architecture": "lora", "r": 8}


@pytest.fixture(scope="module")
def geometry() -> Geometry:
    return read_geometry(tiny_config("bert"))


def prefix_for(geometry: Geometry) -> SoftPrompt:
    prompt = random_prefix(geometry, 5)
    return replace(prompt, positions=Positions({"encoder": 0}, "skewed", "pinned"))


def put(folder: Path, files: Mapping[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def union(geometry: Geometry, folder: Path, *others: Mapping[str, Any]) -> Path:
    """A prefix in a union with others, whose tensors stand in the same file."""
    written = as_bytes(FORMAT.write(prefix_for(geometry), None))
    document = json.loads(written[facts.CONFIG_FILE])
    document["config"] = {"architecture": "union", "configs": [document["config"], *others]}
    tensors = Files(put(folder, written)).tensors(facts.WEIGHTS_FILE)
    tensors["bert.encoder.layer.0.output.adapters.softbridge.adapter_up.weight"] = np.ones((2, 2), np.float32)
    tensors["bert.encoder.layer.0.attention.self.query.loras.softbridge.lora_A"] = np.ones((2, 2), np.float32)
    written[facts.CONFIG_FILE] = untrusted.json_bytes(document)
    return put(folder, {**written, facts.WEIGHTS_FILE: untrusted.pickle_bytes(tensors)})


def test_a_union_runs_as_the_prompt_alone_where_that_is_accepted(geometry: Geometry, tmp_path: Path) -> None:
    """Refused by every way in, with the condition that `convert` asks for; attached alone, a bank's or not."""
    folder = union(geometry, tmp_path / "x", BOTTLENECK, LORA)
    alone = prefix_for(geometry)
    model = tiny_model("bert")
    if not model._can_set_attn_implementation():
        pytest.skip("BERT does not dispatch here")

    def logits(running: Any) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = running(input_ids=torch.arange(3, 9)[None]).logits
            return found

    for source in (folder, sb.load(folder, base=model)):
        with pytest.raises(LoweringError, match="partial"):
            sb.attach(copy.deepcopy(model), source)
        with pytest.raises(LoweringError, match="partial"):
            sb.attach(copy.deepcopy(model), source, accept=["positions", "length"])
        banked, bank = copy.deepcopy(model), sb.PromptBank({"x": source})
        sb.attach(banked, bank)
        with bank.rows("x"), pytest.raises(LoweringError, match="partial"):
            logits(banked)
        expected = logits(sb.attach(copy.deepcopy(model), alone))
        assert torch.equal(logits(sb.attach(copy.deepcopy(model), source, accept=["partial"])), expected)
        accepted, bank = copy.deepcopy(model), sb.PromptBank({"x": source})
        sb.attach(accepted, bank, accept=["partial"])
        with bank.rows("x"):
            assert float((logits(accepted) - expected).abs().max()) < 1e-12
        assert float((logits(model) - expected).abs().max()) > 0.05


def test_of_a_union_the_soft_prompt_is_read_and_the_rest_named(geometry: Geometry, tmp_path: Path) -> None:
    folder = union(geometry, tmp_path / "x", BOTTLENECK, LORA)
    prompt = FORMAT.read(Files(folder), geometry)
    assert prompt == prefix_for(geometry)
    assert prompt.origin is not None
    assert prompt.origin.notes == ("of a union the soft prompt alone is read, and 'bottleneck' and 'lora' left out",)
    assert "a union with 'bottleneck' and 'lora'" in prompt.origin.partial
    # Written again it is a prefix and no union.
    again = as_bytes(FORMAT.write(prompt, geometry))
    assert json.loads(again[facts.CONFIG_FILE])["config"]["architecture"] == "prefix_tuning"
    whole = FORMAT.read(Files(put(tmp_path / "y", again)), geometry)
    assert whole == prompt
    assert whole.origin is not None
    assert whole.origin.partial == ""


def test_tensors_of_others_belong_into_a_union_only(geometry: Geometry, tmp_path: Path) -> None:
    folder = union(geometry, tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"unexpected bert.*lora_A.*unexpected bert.*adapter_up"):
        FORMAT.read(Files(folder), geometry)


def test_a_part_of_an_adapter_goes_on_with_consent_only(geometry: Geometry, tmp_path: Path) -> None:
    folder = union(geometry, tmp_path / "x", LORA)
    config = tiny_config("bert")
    with pytest.raises(LoweringError, match=r"\[partial\].*union with 'lora'"):
        sb.convert(folder, tmp_path / "out", "softbridge", base=config)
    report = sb.convert(folder, tmp_path / "out", "softbridge", base=config, accept=["partial"])
    assert any("'lora' left out" in step.note for step in report.steps)
    assert sb.load(tmp_path / "out", base=config).parts == prefix_for(geometry).parts


def setup(adapter_setup: Any, head_setup: Any = None) -> dict[str, bytes]:
    document = {"adapter_setup": adapter_setup, "head_setup": head_setup, "version": "adapters.x"}
    return {facts.SETUP_FILE: untrusted.json_bytes(document)}


def single(name: str) -> dict[str, Any]:
    return {"type": "single", "children": [name]}


def test_a_setup_of_one_adapter(geometry: Geometry, tmp_path: Path) -> None:
    folder = put(tmp_path / "x", setup({"type": "Stack", "children": [single("mine")]}))
    put(folder / "mine", as_bytes(FORMAT.write(prefix_for(geometry), None)))
    files = Files(folder)
    assert FORMAT.sniff(files)
    prompt = FORMAT.read(files, geometry)
    assert prompt == prefix_for(geometry)
    assert prompt.origin is not None
    assert set(prompt.origin.digests) == {"mine/adapter_config.json", "mine/pytorch_adapter.bin"}
    (folder / "mine" / facts.CONFIG_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"mine/adapter_config\.json"):
        FORMAT.read(Files(folder), geometry)


def test_what_is_no_setup_is_not_taken_for_one(tmp_path: Path) -> None:
    assert not FORMAT.sniff(Files(put(tmp_path / "x", setup(None))))
    assert not FORMAT.sniff(Files(put(tmp_path / "y", {facts.SETUP_FILE: b"{"})))


# --- with the toolkit ------------------------------------------------------------------------------------------------


@pytest.fixture
def adapters() -> Any:
    return pytest.importorskip("adapters")


def logits(model: Any) -> Array:
    import torch

    tokens = torch.tensor([[5, 9, 17, 33, 21, 8, 4], [7, 11, 3, 30, 6, 0, 0]])
    with torch.no_grad():
        return np.asarray(model(input_ids=tokens, attention_mask=(tokens != 0).long()).logits)


def randomised(adapters: Any, model: Any, config: Any) -> Any:
    """A model with an adapter `mine` of large random numbers, in float32."""
    import torch

    adapters.init(model)
    model.add_adapter("mine", config, set_active=True)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mine." in name:
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("method", ["MAMConfig", "UniPELTConfig"])
def test_the_prefix_in_a_published_union(method: str, adapters: Any, tmp_path: Path) -> None:
    import torch

    model = tiny_model("bert", torch.float32)
    prefix = adapters.PrefixTuningConfig(prefix_length=5, bottleneck_size=6)
    running = randomised(adapters, copy.deepcopy(model), getattr(adapters, method)(prefix))
    running.save_adapter(str(tmp_path / "x"), "mine", with_head=False)
    prompt = FORMAT.read(Files(tmp_path / "x"), read_geometry(model.config))
    assert prompt.prefixes[0].gated == (method == "UniPELTConfig")
    assert prompt.origin is not None
    assert ("'lora'" in prompt.origin.partial) == (method == "UniPELTConfig")

    # The same numbers in an adapter that is nothing else.
    alone = copy.deepcopy(model)
    adapters.init(alone)
    (tmp_path / "alone").mkdir()
    document = Files(tmp_path / "x").json(facts.CONFIG_FILE)
    document["config"] = document["config"]["configs"][0]
    put(
        tmp_path / "alone",
        {
            facts.CONFIG_FILE: untrusted.json_bytes(document),
            facts.WEIGHTS_FILE: (tmp_path / "x" / facts.WEIGHTS_FILE).read_bytes(),
        },
    )
    alone.load_adapter(str(tmp_path / "alone"), set_active=True)
    reference = logits(alone.eval())
    attached = logits(ENGINE.attach(copy.deepcopy(model), prompt))
    # A float32 model, and a parameterisation that the toolkit evaluates for every row.
    assert apart(attached, reference) <= 1e-5
    assert np.abs(attached - logits(running)).max() > 0.1
    # The toolkit would load the whole union.
    np.testing.assert_array_equal(logits(ENGINE.load(copy.deepcopy(model), prompt, tmp_path / "x")), attached)
    report = sb.convert(tmp_path / "x", tmp_path / "out", "softbridge", base=model, accept=["partial"], verify=True)
    assert report.certificate is not None
    assert report.certificate.same


def test_a_setup_that_the_toolkit_wrote(adapters: Any, tmp_path: Path) -> None:
    import torch

    model = tiny_model("bert", torch.float32)
    config = adapters.PrefixTuningConfig(flat=True, prefix_length=5)
    running = randomised(adapters, copy.deepcopy(model), config)
    running.save_adapter_setup(str(tmp_path / "x"), "mine")
    prompt = FORMAT.read(Files(tmp_path / "x"), read_geometry(model.config))
    assert prompt.head.keys() == {"classifier.weight", "classifier.bias"}
    np.testing.assert_array_equal(logits(sb.attach(copy.deepcopy(model), prompt, "adapterhub")), logits(running))
    np.testing.assert_array_equal(logits(ENGINE.load(copy.deepcopy(model), prompt, tmp_path / "x")), logits(running))
