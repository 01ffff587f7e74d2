"""Textual inversion: files of three toolkits, against text models whose vocabulary has the learned words."""

from __future__ import annotations

import copy
import json
import runpy
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import softbridge as sb
from softbridge.arrays import from_torch
from softbridge.base import draw_weights
from softbridge.checkpoint.read import read
from softbridge.errors import BaseModelError, CheckpointError, EngineError, LoweringError
from softbridge.plugin.registry import formats
from softbridge.prompt import InputPrompt, Positions, SoftPrompt
from softbridge.template import PLACEHOLDER, Field, Slot, Template, Virtual, Words
from softbridge.testing import agreement, apart, tiny_model
from softbridge.untrusted import Files, safetensors_bytes

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "diffusers_textual_inversion.safetensors"
WORDS, H, WIDE, BOS, EOS = 60, 32, 48, 58, 59
VECTORS = np.random.default_rng(0).normal(0, 0.8, (3, H)).astype(np.float32)
MORE = np.random.default_rng(1).normal(0, 0.8, (2, H)).astype(np.float32)
OTHERS = np.random.default_rng(2).normal(0, 0.8, (3, WIDE)).astype(np.float32)
CLASSES = (CLIPTextModel, CLIPTextModelWithProjection)
FORMATS = {"a1111": "tale.pt", "textual-inversion": "learned_embeds.safetensors", "sdxl": "tale.safetensors"}


def config(width: int = H, **changes: Any) -> Any:
    sizes = {"hidden_size": width, "intermediate_size": 37, "num_hidden_layers": 3, "num_attention_heads": 4}
    facts = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": EOS, "projection_dim": 24}
    return CLIPTextConfig(**{"vocab_size": WORDS, "max_position_embeddings": 20, **sizes, **facts, **changes})


def text_model(kind: Any, implementation: str = "sdpa", **changes: Any) -> Any:
    made = config(**changes)
    made._attn_implementation = implementation
    model = kind(made).double().eval()
    draw_weights(model, seed=0)
    return model


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    """transformers 4 makes CLIP's mask in torch's own dtype, which float64 numbers do not fit."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


# --- files, as the toolkits write them --------------------------------------------------------------------------------


def tensor(array: np.ndarray) -> nn.Parameter:
    return nn.Parameter(torch.from_numpy(array.copy()))


def a1111(folder: Path, vectors: np.ndarray = VECTORS, old: bool = False, **changes: Any) -> Path:
    parameters = nn.ParameterDict({"*": tensor(vectors)}) if old else {"*": tensor(vectors)}
    facts = {"name": "<tale>", "step": 500, "sd_checkpoint": "c0ffee", "sd_checkpoint_name": None}
    content = {"string_to_token": {"*": 265}, "string_to_param": parameters, **facts, **changes}
    torch.save(content, folder / FORMATS["a1111"])
    return folder / FORMATS["a1111"]


def diffusers(folder: Path, tokens: dict[str, np.ndarray], file: str = "learned_embeds.safetensors") -> Path:
    if file.endswith(".bin"):
        torch.save({token: tensor(vectors).data for token, vectors in tokens.items()}, folder / file)
    else:
        (folder / file).write_bytes(safetensors_bytes(tokens))
    return folder / file


def sdxl(folder: Path, **encoders: np.ndarray) -> Path:
    (folder / FORMATS["sdxl"]).write_bytes(safetensors_bytes(encoders or {"clip_l": VECTORS, "clip_g": OTHERS}))
    return folder / FORMATS["sdxl"]


#: Name -> what makes such a file below a folder.
FILES: dict[str, Callable[[Path], Path]] = {
    "a1111": a1111,
    "a1111 old": lambda folder: a1111(folder, old=True),
    "textual-inversion": lambda folder: diffusers(folder, {"<tale>": VECTORS}),
    "textual-inversion bin": lambda folder: diffusers(folder, {"<tale>": VECTORS}, "learned_embeds.bin"),
    "textual-inversion unnamed": lambda folder: diffusers(folder, {"emb_params": VECTORS}, "tale.safetensors"),
    "sdxl": sdxl,
    "sdxl one": lambda folder: sdxl(folder, clip_l=VECTORS),
}


@pytest.mark.parametrize("kind", FILES)
def test_they_are_recognised(kind: str, tmp_path: Path) -> None:
    path = FILES[kind](tmp_path)
    loaded = read(path, base=config())
    assert loaded.format.name == kind.split()[0]
    assert np.array_equal(loaded.prompt.inputs[0].vectors, VECTORS)
    assert loaded.prompt.inputs[0].template == Template((Field("before"), Virtual(3), Field("after")))


def test_a_concept_among_its_images_and_texts(tmp_path: Path) -> None:
    diffusers(tmp_path, {"<tale>": VECTORS[:1]}, "learned_embeds.bin")
    diffusers(tmp_path, {"<tale>": VECTORS[1:2]}, "learned_embeds-steps-500.bin")
    (tmp_path / "token_identifier.txt").write_text("<tale>")
    (tmp_path / "concept_images").mkdir()
    (tmp_path / "concept_images" / "0.jpeg").write_bytes(b"\xff\xd8\xff")
    assert np.array_equal(sb.load(tmp_path).inputs[0].vectors, VECTORS[:1])


# --- what they mean ---------------------------------------------------------------------------------------------------


def with_words(model: Any, ids: torch.Tensor, vectors: np.ndarray, mask: torch.Tensor | None = None) -> Any:
    """The outputs of a model that has the vectors as words: the n-th placeholder of a row is the n-th of them."""
    model, words = copy.deepcopy(model), model.get_input_embeddings().weight.detach()
    more = nn.Embedding(len(words) + len(vectors), words.shape[1])
    more.weight.data = torch.cat([words, torch.from_numpy(vectors).double()])
    model.set_input_embeddings(more)
    virtual = ids == PLACEHOLDER
    own = len(words) + virtual.cumsum(-1) - 1
    with torch.no_grad():
        return model(torch.where(virtual, own, ids), attention_mask=mask)


def rows(template: Template, *texts: tuple[list[int], ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """<bos> ... <eos>, padded on the right; and the mask."""
    made = [
        template.fill(dict(zip(template.fields, ([BOS, *first], *between, [*last, EOS]), strict=True)))
        for first, *between, last in texts
    ]
    width = max(map(len, made))
    ids = torch.tensor([[*row, *[EOS] * (width - len(row))] for row in made])
    return ids, torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in made])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("file", ["a1111", "textual-inversion bin", "sdxl"])
def test_the_vectors_are_words(file: str, kind: Any, implementation: str, tmp_path: Path) -> None:
    model = text_model(kind, implementation)
    prompt = sb.load(FILES[file](tmp_path), base=model.config)
    ids, mask = rows(prompt.inputs[0].template, ([5, 6], [7]), ([], [8, 9, 10, 11]), ([4], []))
    bound = agreement(model, input_ids=ids.clamp(min=0))
    expected = {name: with_words(model, ids, VECTORS, m) for name, m in (("", None), ("masked", mask))}
    sb.attach(model, prompt)
    with torch.no_grad():
        found = {"": model(input_ids=ids), "masked": model(ids, attention_mask=mask)}
    for name, output in expected.items():
        for field, states in output.items():
            assert apart(found[name][field], states) <= bound, (name, field)
    assert sb.extract(model) == prompt
    sb.detach(model)
    wrong = {"rolled": np.roll(VECTORS, 1, 0), "dropped": np.zeros_like(VECTORS)}
    found = {name: with_words(model, ids, vectors) for name, vectors in wrong.items()}
    late = torch.where(ids[0] == PLACEHOLDER, PLACEHOLDER, 7)[None].roll(1, -1)
    late[0, [0, 1, 2]] = ids[0, [0, 1, 2]]
    found["one place later"] = with_words(model, late, VECTORS)
    for field, states in expected[""].items():
        for name, output in found.items():
            assert apart(output[field], states[: len(output[field])]) > 0.01, (name, field)


def test_several_tokens_have_a_field_between_each_two(tmp_path: Path) -> None:
    model = text_model(CLIPTextModel)
    prompt = sb.load(diffusers(tmp_path, {"<tale>": VECTORS, "<whale>": MORE, "<sea>": MORE[0]}), base=model.config)
    told = dict(zip(prompt.origin.details["tokens"], (3, 2, 1), strict=True))
    assert told.keys() == {"<sea>", "<tale>", "<whale>"}
    sizes = [piece.count for piece in prompt.inputs[0].template.pieces if isinstance(piece, Virtual)]
    in_order = {"<tale>": VECTORS, "<whale>": MORE, "<sea>": MORE[:1]}
    assert sizes == [len(in_order[token]) for token in prompt.origin.details["tokens"]]
    vectors = np.concatenate([in_order[token] for token in prompt.origin.details["tokens"]])
    ids, _ = rows(prompt.inputs[0].template, ([5], [6], [7, 8], [9]), ([], [10], [], [11]))
    expected, bound = with_words(model, ids, vectors).last_hidden_state, agreement(model, input_ids=ids.clamp(min=0))
    sb.attach(model, prompt)
    with torch.no_grad():
        assert apart(model(input_ids=ids).last_hidden_state, expected) <= bound
    sb.save(prompt, tmp_path / "again", format="textual-inversion", base=model.config)
    assert dict(read(tmp_path / "again").prompt.origin.details) == dict(prompt.origin.details)
    for other in ("a1111", "sdxl"):
        with pytest.raises(LoweringError, match="a file holds 1 token"):
            sb.save(prompt, tmp_path / "one", format=other, base=model.config)


def test_the_base_model_says_which_of_two_encoders(tmp_path: Path) -> None:
    path = sdxl(tmp_path)
    assert np.array_equal(sb.load(path, base=config()).inputs[0].vectors, VECTORS)
    prompt = sb.load(path, base=config(WIDE))
    assert np.array_equal(prompt.inputs[0].vectors, OTHERS)
    assert prompt.origin.notes == ("clip_l is for the other text model, and is left",)
    for base, error in ((None, "several text models"), (config(40), "clip_l"), (config(40), "clip_g")):
        with pytest.raises(BaseModelError, match=error):
            sb.load(path, base=base)
    assert "several text models" in sb.inspect(path)["needs_base"]
    with pytest.raises(CheckpointError, match="clip_g"):
        sb.load(sdxl(tmp_path, clip_l=VECTORS, clip_g=VECTORS), base=config())


def test_a_row_needs_the_token_once(tmp_path: Path) -> None:
    model = text_model(CLIPTextModel)
    sb.attach(model, sb.load(a1111(tmp_path), base=model.config))
    for ids in ([BOS, 5, EOS], [BOS, *[PLACEHOLDER] * 6, EOS]):
        with pytest.raises(EngineError, match="3 in each row"):
            model(input_ids=torch.tensor([ids]))
    with pytest.raises(EngineError, match="20 positions"):
        model(input_ids=torch.tensor([[BOS, *[PLACEHOLDER] * 3, *[5] * 20, EOS]]))


def test_pooling_knows_the_end_of_a_text_where_ids_do_not(tmp_path: Path) -> None:
    """With an eos_token_id of 2 the largest id is taken for <eos>, and words that were added have larger ones."""
    model = text_model(CLIPTextModel, eos_token_id=2)
    prompt = sb.load(a1111(tmp_path), base=model.config)
    ids, _ = rows(prompt.inputs[0].template, ([5, 6], [7]))
    expected = with_words(model, ids, VECTORS)
    sb.attach(model, prompt)
    with torch.no_grad():
        found = model(input_ids=ids)
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(found.pooler_output, found.last_hidden_state[:, -1])
    assert torch.equal(expected.pooler_output, expected.last_hidden_state[:, 5])


def test_rows_with_words_of_their_own(tmp_path: Path) -> None:
    """A bank: two tokens, and a row with neither."""
    model = text_model(CLIPTextModel)
    tale = sb.load(a1111(tmp_path), base=model.config)
    whale = sb.load(diffusers(tmp_path, {"<whale>": MORE}), base=model.config)
    ids, _ = rows(tale.inputs[0].template, ([5, 6], [7]))
    others, _ = rows(whale.inputs[0].template, ([8], [9, 10]))
    plain = torch.tensor([[BOS, 11, 12, 13, 14, 15, 16, EOS]])
    every = torch.cat([nn.functional.pad(one, (0, 8 - one.shape[1]), value=EOS) for one in (ids, others, plain)])
    expected = [with_words(model, one[None], own) for one, own in zip(every, (VECTORS, MORE, MORE[:0]), strict=True)]
    bank = sb.PromptBank({"tale": tale, "whale": whale})
    sb.attach(model, bank)
    with torch.no_grad(), bank.rows(["tale", "whale", None]):
        found = model(input_ids=every)
    for number, alone in enumerate(expected):
        assert apart(found.last_hidden_state[number], alone.last_hidden_state[0]) <= 1e-12
        assert apart(found.pooler_output[number], alone.pooler_output[0]) <= 1e-12


class Knowing(CLIPTextModel):
    """A model that looks at ids, and not at their embeddings alone."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, **more: Any) -> Any:
        output = super().forward(input_ids, attention_mask, position_ids, **more)
        output.last_hidden_state = output.last_hidden_state + input_ids[..., None]
        return output


def test_a_model_that_looks_at_ids_is_refused(tmp_path: Path) -> None:
    model = text_model(Knowing)
    with pytest.raises(EngineError, match="knows a word by more than its embedding"):
        sb.attach(model, sb.load(a1111(tmp_path), base=model.config))
    in_front = SoftPrompt((InputPrompt(VECTORS, "encoder"),), Positions({"encoder": 3}))
    with pytest.raises(EngineError, match="cannot be run on embeddings"):
        sb.attach(text_model(CLIPTextModel), in_front)


def test_it_trains(tmp_path: Path) -> None:
    """The gradient is that of the rows of an embedding, and nothing else is trained."""
    model = text_model(CLIPTextModel)
    prompt = sb.load(a1111(tmp_path), base=model.config)
    ids, _ = rows(prompt.inputs[0].template, ([5, 6], [7]), ([], [8]))
    aim = torch.randn(H, generator=torch.Generator().manual_seed(0))
    reference = copy.deepcopy(model)
    more = nn.Embedding(WORDS + 3, H)
    more.weight.data = torch.cat([model.get_input_embeddings().weight.detach(), torch.from_numpy(VECTORS).double()])
    reference.set_input_embeddings(more)
    virtual = ids == PLACEHOLDER
    places = torch.where(virtual, WORDS + virtual.cumsum(-1) - 1, ids)
    (reference(places).last_hidden_state @ aim).sum().backward()
    sb.attach(model, prompt)
    (trained,) = (parameter for parameter in model.parameters() if parameter.requires_grad)
    (model(input_ids=ids).last_hidden_state @ aim).sum().backward()
    assert trained.grad is not None
    assert apart(trained.grad, more.weight.grad[WORDS:]) <= 1e-6  # the vectors, and so their gradient, are float32


def test_the_engine_proves_itself(tmp_path: Path) -> None:
    if transformers.__version__.startswith("4."):
        pytest.skip("transformers 4 makes CLIP's mask in float32, in which the engine does not judge itself")
    torch.set_default_dtype(torch.float32)
    model = text_model(CLIPTextModelWithProjection)
    prompt = sb.load(a1111(tmp_path), base=model.config)
    sb.attach(model, prompt, self_check=True)
    ids, _ = rows(prompt.inputs[0].template, ([5, 6], [7]))
    with torch.no_grad():
        model(input_ids=ids)  # an UnprovenWarning would be an error


# --- diffusers itself -------------------------------------------------------------------------------------------------


def golden_model(kind: Any, tensors: Any, told: Any) -> Any:
    made = CLIPTextConfig.from_dict(json.loads(told["config"]))
    made._attn_implementation = "sdpa"
    model = kind(made).double().eval()
    weights = {name.removeprefix("weights."): a for name, a in tensors.items() if name.startswith("weights.")}
    ends = {name.removeprefix("text_model."): torch.from_numpy(np.array(a)).double() for name, a in weights.items()}
    model.load_state_dict({name: ends[name.removeprefix("text_model.")] for name in model.state_dict()})
    return model


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("case", ["a1111", "diffusers one", "diffusers several"])
def test_the_states_are_those_of_diffusers_loader(case: str, kind: Any, tmp_path: Path) -> None:
    files = Files(GOLDEN)
    tensors, told = files.tensors(GOLDEN.name), files.metadata(GOLDEN.name)
    (tmp_path / told[case]).write_bytes(tensors[f"{case}.file"].tobytes())
    model = golden_model(kind, tensors, told)
    prompt = sb.load(tmp_path / told[case], base=model.config)
    ids = torch.from_numpy(np.array(tensors[f"{case}.input_ids"]))
    ids = torch.where(ids >= model.config.vocab_size, PLACEHOLDER, ids)
    assert (ids == PLACEHOLDER).sum(-1).tolist() == [prompt.inputs[0].length] * len(ids)
    sb.attach(model, prompt)
    with torch.no_grad():
        found = model(input_ids=ids)
    names = [
        name.removeprefix(f"{case}.{kind.__name__}.") for name in tensors if name.startswith(f"{case}.{kind.__name__}.")
    ]
    assert len(names) == 2
    for name in names:
        assert apart(found[name], tensors[f"{case}.{kind.__name__}.{name}"]) <= 1e-10, name


def test_diffusers_still_does_so() -> None:
    pytest.importorskip("diffusers", reason="diffusers is not installed: its outputs are in tests/golden")
    torch.set_default_dtype(torch.float32)
    tensors, _ = runpy.run_path(str(GOLDEN.with_name("make_diffusers.py")))["make"]()
    kept = Files(GOLDEN).tensors(GOLDEN.name)
    assert kept.keys() == tensors.keys()
    for name, array in tensors.items():
        if not name.endswith(".file"):  # torch.save writes a number that is drawn
            assert apart(array, kept[name]) <= 1e-10, name


# --- each from each ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "target"), list(permutations(FORMATS, 2)))
def test_each_from_each(source: str, target: str, tmp_path: Path) -> None:
    """Through files, and back: the same vectors, and the token's name where a file has one."""
    base, here = config(width=768, num_attention_heads=12), tmp_path / "here"
    here.mkdir()
    vectors = np.random.default_rng(3).normal(size=(2, 768)).astype(np.float32)
    made: dict[str, Callable[[], Path]] = {
        "a1111": lambda: a1111(here, vectors),
        "textual-inversion": lambda: diffusers(here, {"<tale>": vectors}),
        "sdxl": lambda: sdxl(here, clip_l=vectors),
    }
    path, there = made[source](), tmp_path / "there"
    report = sb.convert(path, there, target, base=base)
    assert [step.name for step in report.steps] == []
    back = tmp_path / "back"
    sb.convert(there, back, source, base=base)
    first, again = sb.load(path, base=base), sb.load(back, base=base)
    assert read(there).format.name == target
    assert first == again
    if "sdxl" not in (source, target):
        assert again.origin.details["tokens"] == ["<tale>"]


def test_what_a_file_says_of_itself_is_written_back(tmp_path: Path) -> None:
    sb.save(sb.load(a1111(tmp_path)), tmp_path / "again.pt", format="a1111")
    content = torch.load(tmp_path / "again.pt", weights_only=True)
    told = {name: content[name] for name in ("name", "step", "sd_checkpoint", "sd_checkpoint_name", "string_to_token")}
    assert told == {
        "name": "<tale>",
        "step": 500,
        "sd_checkpoint": "c0ffee",
        "sd_checkpoint_name": None,
        "string_to_token": {"*": 265},
    }
    assert np.array_equal(content["string_to_param"]["*"].numpy(), VECTORS)
    sb.save(
        sb.load(sdxl(tmp_path), base=config(WIDE)), tmp_path / "again.safetensors", format="sdxl", base=config(WIDE)
    )
    assert Files(tmp_path / "again.safetensors").header("again.safetensors") == {"clip_g": ("float32", (3, WIDE))}


def test_two_encodings_of_diffusers(tmp_path: Path) -> None:
    prompt = sb.load(a1111(tmp_path))
    for encoding, file in (("safetensors", "learned_embeds.safetensors"), ("bin", "learned_embeds.bin")):
        sb.save(prompt, tmp_path / encoding, format="textual-inversion", encoding=encoding)
        assert Files(tmp_path / encoding / file).header(file) == {"<tale>": ("float32", (3, H))}


def test_other_templates_are_no_words(tmp_path: Path) -> None:
    for pieces in (
        (Virtual(3), Field("x"), Slot()),
        (Words((1,)), Virtual(3)),
        (Field("before"), Virtual(1), Virtual(2)),
    ):
        part = InputPrompt(VECTORS, "encoder", placement="template", template=Template(pieces))
        with pytest.raises(LoweringError, match="template"):
            sb.save(SoftPrompt((part,), Positions({"encoder": 0})), tmp_path / "x", format="textual-inversion")
    trained = sb.load(a1111(tmp_path))
    sb.save(replace(trained, origin=None), tmp_path / "x", format="textual-inversion")
    assert sb.load(tmp_path / "x").origin.details["tokens"] == ["<softbridge-1>"]


# --- what is refused --------------------------------------------------------------------------------------------------

NAN = np.where(np.arange(H) == 3, np.nan, VECTORS)
HOSTILE: dict[str, Callable[[Path], Path]] = {
    "a1111 nan": lambda folder: a1111(folder, NAN),
    "a1111 three axes": lambda folder: a1111(folder, np.ones((2, 3, H))),
    "a1111 integers": lambda folder: a1111(folder, string_to_param={"*": torch.ones(3, H, dtype=torch.long)}),
    "a1111 several": lambda folder: a1111(folder, string_to_param={"*": torch.ones(3, H), "+": torch.ones(3, H)}),
    "a1111 none": lambda folder: a1111(folder, string_to_param={}),
    "a1111 object": lambda folder: a1111(folder, string_to_param=Path("x")),
    "a1111 nothing": lambda folder: folder,
    "textual-inversion nothing": lambda folder: folder,
    "sdxl no file": lambda folder: folder,
    "textual-inversion widths": lambda folder: diffusers(folder, {"<a>": VECTORS, "<b>": OTHERS}),
    "textual-inversion nan": lambda folder: diffusers(folder, {"<a>": NAN}),
    "sdxl nothing": lambda folder: diffusers(folder, {"x": VECTORS}),
    "sdxl nan": lambda folder: sdxl(folder, clip_l=NAN),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_wrong_is_refused(kind: str, tmp_path: Path) -> None:
    path = HOSTILE[kind](tmp_path)
    with pytest.raises(CheckpointError) as refused:
        sb.load(path, format=kind.split()[0])
    assert refused.value.expected
    assert refused.value.remedy


def test_other_files_are_not_taken_for_words(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    state = {name: from_torch(tensor) for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.Adam(model.parameters())
    model(input_ids=torch.tensor([[5, 6]]), labels=torch.tensor([[5, 6]])).loss.backward()
    optimizer.step()
    lora = {f"base_model.model.q.lora_{side}.weight": MORE for side in "AB"}
    others: dict[str, Any] = {
        "model.safetensors": safetensors_bytes(state),
        "adapter_model.safetensors": safetensors_bytes(lora),
        "prompt.safetensors": safetensors_bytes({"prompt_embeddings": VECTORS}),
        "clip.safetensors": safetensors_bytes({"clip_l": VECTORS, "unet": VECTORS}),
        "optimizer.pt": optimizer.state_dict(),
        "tensor.pt": torch.from_numpy(VECTORS),
        "soft.pt": {"template": {"shared_soft_embeds": torch.from_numpy(VECTORS)}},
    }
    for name, content in others.items():
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        else:
            torch.save(content, tmp_path / name)
        assert [form for form in FORMATS if formats()[form].sniff(Files(tmp_path / name))] == [], name
