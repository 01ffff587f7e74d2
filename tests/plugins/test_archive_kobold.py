"""mkultra, KoboldAI and HazyResearch's cartridges: files as the toolkits store them, against models run by hand."""

from __future__ import annotations

import base64
import copy
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

import softbridge as sb
from softbridge.arrays import to_torch
from softbridge.base import BaseModel
from softbridge.checkpoint.read import read
from softbridge.errors import BaseModelError, CheckpointError, LoweringError, SoftbridgeError, UnknownFormatError
from softbridge.prompt import InputPrompt, KeyValue, KeyValuePrefix, Positions, SoftPrompt
from softbridge.testing import agreement, apart, tiny_config, tiny_model

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "mkultra" / "neuromancer_gpt2.json"
P, H = 5, 32
VECTORS = np.random.default_rng(0).normal(0, 0.8, (P, H)).astype(np.float32)
#: Llama's of `tiny_config`: layers, key/value heads, head size.
L, K, D = 3, 2, 8
FROZEN = 2
KEYS, VALUES = np.random.default_rng(1).normal(0, 0.8, (2, L, K, P, D)).astype(np.float32)
META = {"name": "tale", "supported": ["gpt2"], "description": "of a whale", "author": "Ishmael"}


# --- files, as the toolkits write them --------------------------------------------------------------------------------


def mkultra(folder: Path, tensor: Any = None, content: str | None = None) -> Path:
    tensor = torch.from_numpy(VECTORS).requires_grad_() if tensor is None else tensor
    content = base64.b64encode(pickle.dumps(tensor, protocol=4)).decode("ascii") if content is None else content
    metadata = {"name": "tale", "uuid": "0", "description": "", "epoch": 3}
    path = folder / "tale.json"
    path.write_text(json.dumps({"metadata": metadata, "tensor": content}))
    return path


def kobold(folder: Path, array: Any = VECTORS, meta: Any = META, pickled: bool = False) -> Path:
    stream = io.BytesIO()
    np.save(stream, array.view("V2") if array.dtype == ml_dtypes.bfloat16 else array, allow_pickle=pickled)
    path = folder / "tale.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tensor.npy", stream.getvalue(), zipfile.ZIP_LZMA)
        archive.writestr("meta.json", json.dumps(meta), zipfile.ZIP_STORED)
    return path


def tuner_of_jax(folder: Path) -> Path:
    path = folder / "tale.mtjsp"
    state = np.array([{"mu": VECTORS}, (1, 2)], dtype=object)
    with path.open("wb") as stream:
        np.savez(stream, tensor=VECTORS, opt_state=state, step=7, loss=np.float32(2), allow_pickle=True)
    return path


def tuner_of_torch(folder: Path) -> Path:
    path = folder / "tale.mkusp"
    weights = nn.Parameter(torch.from_numpy(VECTORS.copy()))
    optimizer = torch.optim.Adam([weights])
    weights.sum().backward()
    optimizer.step()
    state = {"opt_state": optimizer.state_dict(), "step": 7, "loss": 2.0, "grad_norm": 1.0}
    torch.save({"tensor": torch.from_numpy(VECTORS), **state}, path)
    return path


def cartridge(folder: Path, frozen: int = FROZEN, fixed: str = "fixed", **changes: Any) -> Path:
    """`TrainableCache.save`: ParameterLists."""

    def some(halves: np.ndarray, rows: slice) -> nn.ParameterList:
        return nn.ParameterList(nn.Parameter(torch.from_numpy(half[None, :, rows].copy())) for half in halves)

    ahead, behind = slice(frozen), slice(frozen, None)
    content = {"trainable_keys": some(KEYS, behind), "trainable_values": some(VALUES, behind)}
    content |= {f"{fixed}_keys": some(KEYS, ahead), f"{fixed}_values": some(VALUES, ahead)}
    path = folder / "cache_last.pt"
    torch.save({**content, **changes}, path)
    return path


#: Name -> what makes such a file below a folder.
FILES: dict[str, Callable[[Path], Path]] = {
    "mkultra": mkultra,
    "koboldai": kobold,
    "koboldai mtjsp": tuner_of_jax,
    "koboldai mkusp": tuner_of_torch,
    "cartridges": cartridge,
    "cartridges nothing frozen": lambda folder: cartridge(folder, 0),
}


@pytest.mark.parametrize("kind", FILES)
def test_they_are_recognised(kind: str, tmp_path: Path) -> None:
    path = FILES[kind](tmp_path)
    assert read(path).format.name == kind.split()[0]
    assert read(tmp_path).format.name == kind.split()[0], "a folder in which it is all there is"
    (tmp_path / "model.safetensors").write_bytes(sb.untrusted.safetensors_bytes({"wte.weight": VECTORS}))
    with pytest.raises(UnknownFormatError):
        read(tmp_path)


# --- vectors in front -------------------------------------------------------------------------------------------------


def gpt2() -> Any:
    return tiny_model("gpt2")


def in_front(model: Any, vectors: Any, ids: torch.Tensor) -> torch.Tensor:
    """As KoboldAI has it: ids that the vocabulary does not have stand in front, and the embedding knows them."""
    model, words = copy.deepcopy(model), model.get_input_embeddings().weight
    more = nn.Embedding(len(words) + len(vectors), words.shape[1])
    more.weight.data = torch.cat([words.detach(), to_torch(np.asarray(vectors), torch.float64)])
    model.transformer.wte = more
    own = torch.arange(len(words), len(more.weight)).expand(len(ids), -1)
    with torch.no_grad():
        return model(input_ids=torch.cat([own, ids], 1)).logits[:, len(vectors) :]


def some_ids(model: Any, rows: int = 2, length: int = 7) -> torch.Tensor:
    return torch.randint(3, model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", [kind for kind in FILES if not kind.startswith("cartridges")])
def test_vectors_run_as_if_in_front(kind: str, tmp_path: Path) -> None:
    prompt = sb.load(FILES[kind](tmp_path), base=tiny_config("gpt2"))
    assert prompt.positions.start == {"decoder": P}
    model = gpt2()
    ids, bound = some_ids(model), agreement(model)
    expected = in_front(model, VECTORS, ids)
    with torch.no_grad():
        dropped = model(input_ids=ids).logits
        found = sb.attach(model, prompt)(input_ids=ids).logits
    assert apart(found, expected) <= bound
    model = sb.detach(model)
    shifted = sb.attach(model, replace(prompt, positions=Positions({"decoder": P + 1})))
    with torch.no_grad():
        moved = shifted(input_ids=ids).logits
    wrong = [dropped, moved, in_front(sb.detach(model), np.roll(VECTORS, 1, 0), ids)]
    assert min(apart(one, expected) for one in wrong) > 0.01


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_kobold_keeps_every_dtype(dtype: str, tmp_path: Path) -> None:
    numbers = VECTORS.astype(np.dtype(dtype if dtype != "bfloat16" else ml_dtypes.bfloat16))
    prompt = sb.load(kobold(tmp_path, numbers))
    assert prompt.inputs[0].vectors.dtype == numbers.dtype
    assert np.array_equal(prompt.inputs[0].vectors, numbers)
    sb.save(prompt, tmp_path / "a.zip", format="koboldai", base=tiny_config("gpt2"))
    sb.save(prompt, tmp_path / "b.zip", format="koboldai", base=tiny_config("gpt2"))
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        members = {one.filename: (one.date_time, one.compress_type) for one in archive.infolist()}
        assert json.loads(archive.read("meta.json")) == META
        array = np.load(io.BytesIO(archive.read("tensor.npy")))
    assert members["tensor.npy"] == ((1980, 1, 1, 0, 0, 0), zipfile.ZIP_LZMA)
    assert members["meta.json"][1] == zipfile.ZIP_STORED
    assert array.dtype.str == {"float16": "<f2", "float32": "<f4", "bfloat16": "|V2"}[dtype]
    assert array.tobytes() == numbers.tobytes()


def test_kobold_to_peft_and_back(tmp_path: Path) -> None:
    base = tiny_config("gpt2")
    report = sb.convert(kobold(tmp_path), tmp_path / "peft", "peft", base=base, verify=True)
    assert report.certificate is not None
    assert report.certificate.same
    sb.convert(tmp_path / "peft", tmp_path / "back.zip", "koboldai", base=base)
    assert sb.load(tmp_path / "back.zip", base=base).parts == sb.load(tmp_path / "tale.zip", base=base).parts


def test_kobold_takes_fewer_than_2048(tmp_path: Path) -> None:
    long = SoftPrompt((InputPrompt(np.zeros((2048, H), np.float32), "decoder"),), Positions({"decoder": 2048}))
    with pytest.raises(LoweringError, match="fewer than 2048"):
        sb.save(long, tmp_path / "a.zip", format="koboldai")


class Plain(pickle.Unpickler):
    """The toolkit's own way to read, with what a plain tensor needs and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" == "torch.storage._load_from_bytes":
            return lambda content: torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        assert f"{module}.{name}" in ("torch._utils._rebuild_tensor_v2", "collections.OrderedDict")
        return super().find_class(module, name)


@cache
def whole_gpt2() -> Any:
    """Vocabulary and feed-forward are shrunk for the time it takes; the attention is whole."""
    from transformers import GPT2Config

    return BaseModel(GPT2Config()).structure(torch.float64)


@pytest.mark.skipif(not REAL.is_file(), reason="the real prompts are not beside this checkout")
def test_a_released_prompt_runs_in_peft_as_if_prepended_by_hand(tmp_path: Path) -> None:
    from transformers import GPT2Config

    peft = pytest.importorskip("peft")
    told = sb.inspect(REAL)
    assert (told["format"], told["parts"][0]["shape"], told["parts"][0]["dtype"]) == ("mkultra", [100, 768], "float32")
    assert sb.load(REAL).origin.details["metadata"]["name"]
    sb.convert(REAL, tmp_path / "out", "peft", base=GPT2Config())
    vectors = Plain(io.BytesIO(base64.b64decode(json.loads(REAL.read_text())["tensor"]))).load().detach().numpy()
    model = whole_gpt2()
    ids = some_ids(model)

    def by_hand(front: np.ndarray) -> torch.Tensor:
        rows = to_torch(front, torch.float64).expand(2, -1, -1)
        with torch.no_grad():
            return model(inputs_embeds=torch.cat([rows, model.get_input_embeddings()(ids)], 1)).logits[:, len(front) :]

    expected = by_hand(vectors)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "out").eval()
    with torch.no_grad():
        found, bare = loaded(input_ids=ids).logits[:, 100:], model(input_ids=ids).logits
    assert apart(found, expected) <= agreement(model)
    for other in (by_hand(np.roll(vectors, 1, axis=0)), by_hand(vectors[1:]), bare):
        assert apart(other, expected) > 0.01


# --- keys and values --------------------------------------------------------------------------------------------------


def cached(model: Any, keys: Any, values: Any, ids: torch.Tensor, start: int) -> torch.Tensor:
    """A cache that starts with them, as `TrainableCache` is one; real tokens from `start` on."""
    from transformers import DynamicCache

    held = DynamicCache()
    for layer in range(L):
        pair = (
            to_torch(np.asarray(half[layer]), torch.float64).expand(len(ids), -1, -1, -1) for half in (keys, values)
        )
        held.update(*pair, layer)
    places = torch.arange(start, start + ids.shape[1]).expand(len(ids), -1)
    with torch.no_grad():
        return model(input_ids=ids, past_key_values=held, position_ids=places).logits


@pytest.mark.parametrize("frozen", [0, FROZEN])
def test_a_cartridge_runs_as_a_cache_that_starts_with_it(frozen: int, tmp_path: Path) -> None:
    config = tiny_config("llama")
    prompt = sb.load(cartridge(tmp_path, frozen), base=config)
    assert prompt.training is not None
    assert prompt.training.settings["frozen"] == frozen
    model = tiny_model("llama")
    ids, bound = some_ids(model), agreement(model)
    expected = cached(model, KEYS, VALUES, ids, P)
    wrong = {
        "rolled": cached(model, np.roll(KEYS, 1, 2), VALUES, ids, P),
        "positions": cached(model, KEYS, VALUES, ids, P + 1),
        "swapped": cached(model, VALUES, KEYS, ids, P),
        "layers": cached(model, KEYS[::-1], VALUES[::-1], ids, P),
    }
    with torch.no_grad():
        wrong["dropped"] = model(input_ids=ids).logits
        found = sb.attach(model, prompt)(input_ids=ids).logits
    assert apart(found, expected) <= bound
    assert min(apart(one, expected) for one in wrong.values()) > 0.01


def test_what_is_frozen_stays_so_in_training(tmp_path: Path) -> None:
    model = tiny_model("llama")
    sb.attach(model, sb.load(cartridge(tmp_path), base=model.config))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 2 * L * K * (P - FROZEN) * D


@pytest.mark.parametrize("frozen", [0, FROZEN])
def test_a_cartridge_to_peft_and_back(frozen: int, tmp_path: Path) -> None:
    config = tiny_config("llama")
    source = cartridge(tmp_path, frozen)
    report = sb.convert(source, tmp_path / "peft", "peft", base=config, verify=True)
    assert report.certificate is not None
    told = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (told["peft_type"], told["num_frozen_tokens"]) == ("CARTRIDGE", frozen)
    sb.convert(tmp_path / "peft", tmp_path / "back.pt", "cartridges", base=config)
    assert read(tmp_path / "back.pt").format.name == "cartridges"
    assert sb.load(tmp_path / "back.pt", base=config) == sb.load(source, base=config)
    content = torch.load(tmp_path / "back.pt", weights_only=True)
    assert content.keys() == {f"{name}_{half}" for name in ("fixed", "trainable") for half in ("keys", "values")}
    for half, numbers in (("keys", KEYS), ("values", VALUES)):
        both = zip(content[f"fixed_{half}"], content[f"trainable_{half}"], strict=True)
        whole = [torch.cat(two, dim=2) for two in both]
        assert np.array_equal(torch.cat(whole).numpy(), numbers)
        assert [tuple(one.shape) for one in content[f"trainable_{half}"]] == [(1, K, P - frozen, D)] * L


def test_other_names_and_dtypes_of_cartridges(tmp_path: Path) -> None:
    expected = sb.load(cartridge(tmp_path))
    assert sb.load(cartridge(tmp_path, fixed="frozen")) == expected
    content = torch.load(cartridge(tmp_path), weights_only=False)
    torch.save(
        {name: [one.data.bfloat16() for one in part] for name, part in content.items()}, tmp_path / "cache_last.pt"
    )
    half = sb.load(tmp_path / "cache_last.pt")
    assert half.prefixes[0].layers[0].keys.dtype == ml_dtypes.bfloat16
    trained = {name: content[name] for name in ("trainable_keys", "trainable_values")}
    for empty in ({}, {"fixed_keys": None, "fixed_values": None}, {"fixed_keys": [], "fixed_values": []}):
        torch.save({**trained, **empty}, tmp_path / "cache_last.pt")
        assert sb.load(tmp_path / "cache_last.pt").prefixes[0].length == P - FROZEN


def test_a_prefix_that_leaves_a_layer_out_is_no_cartridge(tmp_path: Path) -> None:
    layers = {n: KeyValue(KEYS[n], VALUES[n]) for n in range(L - 1)}
    some = SoftPrompt((KeyValuePrefix("self", layers),), Positions({"decoder": P}))
    with pytest.raises(LoweringError):
        sb.save(some, tmp_path / "a.pt", format="cartridges", base=tiny_config("llama"))


# --- hostile edits ----------------------------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("exploded"),))


def lists(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.ones(shape) for shape in shapes]


NAN = np.where(np.arange(H) == 3, np.nan, VECTORS)
HOSTILE: dict[str, Callable[[Path], Path]] = {
    "mkultra no base64": lambda folder: mkultra(folder, content="?!"),
    "mkultra nothing": lambda folder: folder,
    "koboldai nothing": lambda folder: folder,
    "cartridges nothing": lambda folder: folder,
    "mkultra code": lambda folder: mkultra(folder, Bomb()),
    "mkultra text": lambda folder: mkultra(folder, "vectors"),
    "mkultra nan": lambda folder: mkultra(folder, torch.from_numpy(NAN)),
    "mkultra integers": lambda folder: mkultra(folder, torch.ones(5, H, dtype=torch.long)),
    "mkultra four axes": lambda folder: mkultra(folder, torch.ones(1, 1, 5, H)),
    "koboldai nan": lambda folder: kobold(folder, NAN),
    "koboldai three axes": lambda folder: kobold(folder, np.ones((2, 5, H), np.float32)),
    "koboldai objects": lambda folder: kobold(folder, np.array([Bomb()], dtype=object), pickled=True),
    "koboldai meta": lambda folder: kobold(folder, meta=[1]),
    "cartridges missing layer": lambda folder: cartridge(folder, trainable_keys=lists(*[(1, K, P, D)] * 2)),
    "cartridges other heads": lambda folder: cartridge(folder, trainable_keys=lists(*[(1, K + 1, P, D)] * L)),
    "cartridges batch": lambda folder: cartridge(folder, trainable_keys=lists(*[(2, K, P, D)] * L)),
    "cartridges lengths": lambda folder: cartridge(folder, fixed_keys=lists(*[(1, K, 1, D)] * L)),
    "cartridges none": lambda folder: cartridge(folder, trainable_keys=[], trainable_values=[]),
    "cartridges code": lambda folder: cartridge(folder, trainable_keys=[Bomb()]),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_wrong_is_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = HOSTILE[kind](tmp_path)
    with pytest.raises(SoftbridgeError) as refused:
        sb.load(path, format=kind.split()[0])
    assert isinstance(refused.value, CheckpointError)
    assert refused.value.expected
    assert refused.value.remedy
    assert not (tmp_path / "exploded").exists()


def test_another_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="32"):
        sb.load(kobold(tmp_path), base=tiny_config("gpt2", n_embd=24))
    with pytest.raises(BaseModelError):
        sb.load(cartridge(tmp_path), base=tiny_config("llama", num_hidden_layers=2))
