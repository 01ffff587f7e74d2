"""Prefixes of XiangLi1999/PrefixTuning: GPT-2 and BART, against the paper's definition written out here.

Files are made as that program saves them. The references use torch and the bare model alone: for GPT-2 a cache that is
seeded by hand, for BART attention that is computed by hand, with keys and values in front.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, DynamicCache

import softbridge as sb
from softbridge import untrusted
from softbridge.base import build
from softbridge.base import cache as caches
from softbridge.errors import BaseModelError, CheckpointError, SoftbridgeError, UnknownFormatError
from softbridge.methods import rematerialise
from softbridge.prompt import KeyValuePrefix, SoftPrompt
from softbridge.testing import agreement, apart, tiny_config, tiny_model
from softbridge_archive import prefixtuning

P, MID, T, S = 5, 7, 6, 8
FAR = 0.05
BART = {
    "vocab_size": 96,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "max_position_embeddings": 64,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "decoder_start_token_id": 2,
}
#: Keys and values of every layer: [2·L, K, P, D], a key before a value.
Blocks = Tensor
SITES = {
    "self": ("wte", "control_trans"),
    "cross": ("wte2", "control_trans2"),
    "encoder": ("wte_enc", "control_trans_enc"),
}


def bart_config() -> Any:
    return AutoConfig.for_model("bart", **BART)


@cache
def model_of(family: str) -> Any:
    return tiny_model("gpt2") if family == "gpt2" else build(bart_config(), "seq2seq-lm", torch.float64, 0)


def mlp(
    layers: int, embedding: str, name: str, width: int, output: int, dtype: torch.dtype, seed: int
) -> dict[str, Tensor]:
    """The state of an embedding and of its MLP, large enough for keys and values of standard deviation 1."""
    torch.manual_seed(seed)
    sizes = [width, *[MID] * (layers - 1), output]
    linears = [nn.Linear(*pair) for pair in itertools.pairwise(sizes)]
    modules = [module for linear in linears for module in (linear, nn.Tanh())][:-1]
    network = nn.ModuleDict({embedding: nn.Embedding(P, width), name: nn.Sequential(*modules)})
    for parameter in network[name].parameters():
        nn.init.normal_(parameter, std=0.5)
    return network.to(dtype).state_dict()


def rows_of(state: Mapping[str, Tensor], embedding: str, name: str) -> Tensor:
    """[P, 2·L·H]: the embedding through the MLP."""
    hidden = state[f"{embedding}.weight"]
    layers = sum(key.startswith(f"{name}.") and key.endswith("weight") for key in state)
    for layer in range(layers):
        hidden = torch.tanh(hidden) if layer else hidden
        hidden = hidden @ state[f"{name}.{2 * layer}.weight"].T + state[f"{name}.{2 * layer}.bias"]
    return hidden


def blocks_of(rows: Tensor, heads: int) -> Blocks:
    """As the paper's code lays a row out: layer by layer, a key before a value, head by head."""
    return rows.view(len(rows), -1, heads, 8).permute(1, 2, 0, 3)


KINDS = ("mlp", "deep", "flat", "words")


def gpt2_state(kind: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    width = 32
    state = mlp(3 if kind == "deep" else 2, "wte", "control_trans", width, 2 * 3 * width, dtype, 1)
    if kind in ("mlp", "deep"):
        return state
    flat = rows_of(state, "wte", "control_trans")
    return {"control_trans": flat.reshape(-1) if kind == "flat" else blocks_of(flat, 4)[:, None].contiguous()}


def gpt2_blocks(state: Mapping[str, Tensor]) -> Blocks:
    numbers = state.get("control_trans")
    if numbers is None:
        return blocks_of(rows_of(state, "wte", "control_trans"), 4)
    return numbers[:, 0] if numbers.ndim == 5 else blocks_of(numbers.view(P, -1), 4)


def bart_state(layers: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {
        name: tensor
        for seed, (embedding, network) in enumerate(SITES.values())
        for name, tensor in mlp(layers, embedding, network, 32, 2 * 2 * 32, dtype, seed).items()
    }


def folder(path: Path, config: Any, state: Mapping[str, Tensor], **said: Any) -> Path:
    """What `save_pretrained` writes: the base model's configuration with the prefix's settings, and weights."""
    path.mkdir()
    told = {"preseqlen": P, "mid_dim": MID, "prefix_dropout": 0.1, "use_infix": False, "optim_prefix": True, **said}
    (path / "config.json").write_text(json.dumps({**config.to_dict(), **told}))
    torch.save(dict(state), path / "pytorch_model.bin")
    return path


def gpt2_folder(path: Path, kind: str, dtype: torch.dtype = torch.float64, **said: Any) -> Path:
    return folder(path, tiny_config("gpt2"), gpt2_state(kind, dtype), _my_arg_tune_mode="prefixtune", **said)


def bart_folder(path: Path, layers: int, dtype: torch.dtype = torch.float64, **said: Any) -> Path:
    return folder(path, bart_config(), bart_state(layers, dtype), use_prefix=True, **said)


#: Name -> makes such files below a path, and gives what to open.
FILES: dict[str, Callable[[Path], Path]] = {
    **{f"prefixtuning gpt2 {kind}": lambda path, kind=kind: gpt2_folder(path / "gpt2", kind) for kind in KINDS},
    "prefixtuning bart": lambda path: bart_folder(path / "bart", 2),
    "prefixtuning bart deep": lambda path: bart_folder(path / "bart", 3),
}


def ids_of(length: int, seed: int) -> Tensor:
    return torch.randint(3, 96, (2, length), generator=torch.Generator().manual_seed(seed))


# --- GPT-2 ------------------------------------------------------------------------------------------------------------


def with_past(blocks: Blocks | None, shift: int = 0) -> Tensor:
    """GPT-2's logits with this past: it counts its own tokens from there."""
    model, ids = model_of("gpt2"), ids_of(T, 0)
    past, length = DynamicCache(), 0 if blocks is None else blocks.shape[2]
    for layer in range(3 if blocks is not None else 0):
        past.update(*(blocks[2 * layer + half].expand(2, -1, -1, -1) for half in (0, 1)), layer)
    places = torch.arange(length + shift, length + shift + T)[None]
    return model(input_ids=ids, position_ids=places, **caches.handed(model.forward, past)).logits


def check_rows(prefix: KeyValuePrefix, blocks: Blocks) -> None:
    """Virtual token by virtual token: attention does not know their order."""
    for layer, pair in prefix.layers.items():
        assert apart(pair.keys, blocks[2 * layer]) <= 1e-12
        assert apart(pair.values, blocks[2 * layer + 1]) <= 1e-12


def run(family: str, prompt: SoftPrompt, **inputs: Tensor) -> Tensor:
    """In the native engine."""
    model = model_of(family)
    sb.attach(model, prompt)
    try:
        with torch.no_grad():
            return model(**inputs).logits
    finally:
        sb.detach(model)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_gpt2_computes_what_a_seeded_cache_does(kind: str, tmp_path: Path) -> None:
    prompt = sb.load(gpt2_folder(tmp_path / "saved", kind))
    assert prompt.positions.start == {"decoder": P}, "GPT-2 counts its past"
    model, blocks = model_of("gpt2"), gpt2_blocks(gpt2_state(kind))
    check_rows(prompt.prefixes[0], blocks)
    expected = with_past(blocks)
    found = run("gpt2", prompt, input_ids=ids_of(T, 0))
    bound = agreement(model, input_ids=ids_of(T, 0))
    assert apart(found, expected) <= bound
    swapped = blocks.view(3, 2, *blocks.shape[1:]).flip(1).flatten(0, 1)
    reversed_layers = blocks.view(3, 2, *blocks.shape[1:]).flip(0).flatten(0, 1)
    wrong = [
        with_past(None),
        with_past(blocks, 1),
        with_past(blocks, -P),
        with_past(swapped),
        with_past(reversed_layers),
    ]
    assert min(apart(other, expected) for other in wrong) > FAR
    if kind in ("mlp", "deep"):
        assert prompt.training is not None
        assert prompt.training.settings["dropout"] == 0.1
        assert rematerialise(prompt) == prompt
    else:
        assert prompt.training is None


def test_the_deep_mlp_is_trained_as_the_reference_is(tmp_path: Path) -> None:
    """Gradients of every stored tensor, through the native engine and through the seeded cache."""
    saved = gpt2_folder(tmp_path / "saved", "deep", prefix_dropout=0.0)
    prompt, model = sb.load(saved), model_of("gpt2")
    weight = torch.randn(2, T, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    state = {name: tensor.requires_grad_() for name, tensor in gpt2_state("deep").items()}
    (with_past(gpt2_blocks(state)) * weight).sum().backward()
    sb.attach(model, prompt)
    try:
        (model(input_ids=ids_of(T, 0)).logits * weight).sum().backward()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert len(trained) == len(state) == 7
        for tensor in state.values():
            (same,) = [parameter for parameter in trained if torch.equal(parameter, tensor)]
            assert apart(same.grad, tensor.grad) <= 1e-12
        assert sb.extract(model).training == prompt.training
    finally:
        sb.detach(model)


# --- BART -------------------------------------------------------------------------------------------------------------


@contextmanager
def prefixed(model: Any, blocks: Mapping[str, Blocks]) -> Iterator[None]:
    """BART with its attention computed by hand, and keys and values of these sites in front. Rows without pads."""

    def attend(module: Any, site: str, layer: int) -> Callable[..., Any]:
        def heads(rows: Tensor) -> Tensor:
            return rows.view(*rows.shape[:2], 4, 8).transpose(1, 2)

        def hook(_: Any, arguments: tuple[Tensor, ...], named: dict[str, Any], output: Any) -> Any:
            asking = arguments[0] if arguments else named["hidden_states"]
            told = named["key_value_states"] if site == "cross" else asking
            query = heads(module.q_proj(asking))
            keys, values = heads(module.k_proj(told)), heads(module.v_proj(told))
            visible = torch.ones(query.shape[2], keys.shape[2], dtype=torch.bool)
            visible = visible.tril() if site == "self" else visible
            if site in blocks:
                front = blocks[site][2 * layer : 2 * layer + 2]
                keys, values = (
                    torch.cat([half.expand(len(asking), -1, -1, -1), real], 2)
                    for half, real in zip(front, (keys, values), strict=True)
                )
                visible = torch.cat([torch.ones(len(visible), front.shape[2], dtype=torch.bool), visible], 1)
            scores = (query @ keys.transpose(2, 3) * 8**-0.5).masked_fill(~visible, -torch.inf)
            joined = (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)
            return module.out_proj(joined), *output[1:]

        return hook

    stacks = (("encoder", model.get_encoder(), "self_attn"), ("self", model.get_decoder(), "self_attn"))
    hooks = []
    for site, stack, name in (*stacks, ("cross", model.get_decoder(), "encoder_attn")):
        for number, layer in enumerate(stack.layers):
            module = getattr(layer, name)
            hooks.append(module.register_forward_hook(attend(module, site, number), with_kwargs=True))
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def bart_inputs() -> dict[str, Tensor]:
    return {"input_ids": ids_of(S, 1), "decoder_input_ids": ids_of(T, 2)}


def bart_logits(blocks: Mapping[str, Blocks], **further: Any) -> Tensor:
    model = model_of("bart")
    with prefixed(model, blocks):
        return model(**bart_inputs(), use_cache=False, **further).logits


@pytest.mark.parametrize("layers", [2, 3])
@torch.no_grad()
def test_bart_computes_what_attention_by_hand_does(layers: int, tmp_path: Path) -> None:
    prompt = sb.load(bart_folder(tmp_path / "saved", layers))
    assert prompt.positions.start == {"decoder": 0, "encoder": 0}, "BART's tokens stand where they would without it"
    state = bart_state(layers)
    blocks = {site: blocks_of(rows_of(state, *names), 4) for site, names in SITES.items()}
    for prefix in prompt.prefixes:
        check_rows(prefix, blocks[prefix.site])
    expected, model = bart_logits(blocks), model_of("bart")
    bound = agreement(model, **bart_inputs())
    assert apart(bart_logits({}), model(**bart_inputs()).logits) <= bound, "the attention by hand is BART's own"
    assert apart(run("bart", prompt, **bart_inputs()), expected) <= bound
    wrong = [{name: one for name, one in blocks.items() if name != left} for left in blocks]
    wrong += [{**blocks, site: one.view(2, 2, *one.shape[1:]).flip(1).flatten(0, 1)} for site, one in blocks.items()]
    wrong += [{**blocks, site: one.view(2, 2, *one.shape[1:]).flip(0).flatten(0, 1)} for site, one in blocks.items()]
    wrong += [{"self": blocks["cross"], "cross": blocks["self"], "encoder": blocks["encoder"]}, {}]
    assert min(apart(bart_logits(other), expected) for other in wrong) > FAR
    assert rematerialise(prompt) == prompt


@torch.no_grad()
def test_counting_barts_prefix_would_be_another_function(tmp_path: Path) -> None:
    """The shifted twin: the same numbers, with tokens that stand behind the prefix."""
    prompt = sb.load(bart_folder(tmp_path / "saved", 2))
    state = bart_state(2)
    blocks = {site: blocks_of(rows_of(state, *names), 4) for site, names in SITES.items()}
    for stack in ("encoder", "decoder"):
        table = getattr(model_of("bart"), f"get_{stack}")().embed_positions
        whole = table.weight.data.clone()
        table.weight.data = whole.roll(-1, 0)
        try:
            moved = bart_logits(blocks)
        finally:
            table.weight.data = whole
        assert apart(run("bart", prompt, **bart_inputs()), moved) > FAR


# --- elsewhere --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mlp", "deep", "words"])
def test_a_prefix_of_gpt2_runs_in_peft(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    source = gpt2_folder(tmp_path / "saved", kind, torch.float32)
    report = sb.convert(source, tmp_path / "peft", "peft", base=tiny_config("gpt2"), verify=True)
    assert report.certificate is not None
    assert report.certificate.same
    back = sb.load(tmp_path / "peft", base=tiny_config("gpt2"))
    read = sb.load(source)
    assert back.parts == read.parts
    assert back.training == read.training, "beside PEFT's files"


def test_barts_three_prefixes_run_in_adapterhub(tmp_path: Path) -> None:
    pytest.importorskip("adapters")
    source = bart_folder(tmp_path / "saved", 2, torch.float32)
    report = sb.convert(source, tmp_path / "adapterhub", "adapterhub", base=bart_config(), verify=True)
    assert report.certificate is not None
    assert report.certificate.same
    back = sb.load(tmp_path / "adapterhub", base=bart_config())
    assert {part.site: part for part in back.prefixes} == {part.site: part for part in sb.load(source).prefixes}


# --- what is refused, and what is told --------------------------------------------------------------------------------


def test_what_is_not_the_prefix_is_named(tmp_path: Path) -> None:
    state = {
        **gpt2_state("mlp"),
        "transformer.h.0.ln_1.weight": torch.ones(32),
        "transformer.h.0.ln_1.bias": torch.ones(32),
    }
    prompt = sb.load(folder(tmp_path / "saved", tiny_config("gpt2"), state))
    assert prompt.origin is not None
    assert prompt.origin.notes == (
        "not read: 2 tensors that are not the prompt's (transformer.h.0.ln_1.bias, transformer.h.0.ln_1.weight)",
    )
    assert prompt.origin.partial == ""
    assert prompt.origin.details["mid_dim"] == MID


def test_a_base_model_that_was_trained_too_is_asked_about(tmp_path: Path) -> None:
    saved = folder(tmp_path / "saved", tiny_config("gpt2"), gpt2_state("flat"), _my_arg_tune_mode="bothtune")
    with pytest.raises(SoftbridgeError, match="trained, too"):
        sb.convert(saved, tmp_path / "out", "softbridge", base=tiny_config("gpt2"))
    sb.convert(saved, tmp_path / "out", "softbridge", base=tiny_config("gpt2"), accept=["partial"])


def changed(kind: str, **tensors: Tensor | None) -> dict[str, Tensor]:
    state: dict[str, Tensor | None] = {
        **gpt2_state(kind),
        **{name.replace("__", "."): t for name, t in tensors.items()},
    }
    return {name: tensor for name, tensor in state.items() if tensor is not None}


@pytest.mark.parametrize(
    ("state", "said", "error", "found"),
    [
        (lambda: changed("mlp", control_trans__2__bias=None), {}, CheckpointError, "missing self.output.bias"),
        (lambda: changed("mlp", wte__weight=torch.ones(5, 31)), {}, CheckpointError, "hidden.weight has the shape"),
        (lambda: changed("mlp", wte__weight=torch.full((5, 32), torch.nan)), {}, CheckpointError, "finite"),
        (
            lambda: changed("mlp", control_trans__4__bias=torch.ones(9)),
            {},
            CheckpointError,
            "unexpected control_trans.4.bias",
        ),
        (lambda: changed("mlp", wte2__weight=torch.ones(5, 32)), {}, CheckpointError, "an infix"),
        (lambda: changed("mlp"), {"use_infix": True}, CheckpointError, "an infix"),
        (lambda: mlp(2, "wte", "control_trans", 32, 32, torch.float64, 0), {}, CheckpointError, "PrefixEmbTuning"),
        (lambda: mlp(2, "wte", "control_trans", 32, 96, torch.float64, 0), {}, CheckpointError, "rows of 96 numbers"),
        (lambda: changed("mlp"), {"prefix_dropout": 2.0}, CheckpointError, "dropout: a rate below 1"),
        (lambda: changed("mlp"), {"prefix_dropout": "much"}, CheckpointError, "dropout: a number"),
        (lambda: changed("flat"), {"preseqlen": 6}, CheckpointError, r"control_trans \[960\]"),
        (lambda: changed("flat", control_trans=torch.ones(961)), {}, CheckpointError, r"control_trans \[961\]"),
        (lambda: changed("flat", control_trans=torch.ones(960).long()), {}, CheckpointError, "int64"),
        (lambda: changed("words", control_trans=torch.ones(6, 1, 4, 5, 7)), {}, CheckpointError, r"\[6, 1, 4, 5, 7\]"),
        (lambda: changed("words", control_trans=torch.ones(4, 1, 4, 5, 8)), {}, CheckpointError, r"\[4, 1, 4, 5, 8\]"),
        (lambda: changed("flat", control_trans2__0__bias=torch.ones(3)), {}, BaseModelError, "sites self, cross"),
        (lambda: bart_state(2), {}, BaseModelError, "sites self, cross, encoder"),
    ],
)
def test_what_does_not_fit_is_refused(
    state: Callable[[], dict[str, Tensor]],
    said: dict[str, Any],
    error: type[SoftbridgeError],
    found: str,
    tmp_path: Path,
) -> None:
    saved = folder(tmp_path / "saved", tiny_config("gpt2"), state(), **said)
    with pytest.raises(error, match=found) as refused:
        sb.load(saved)
    assert refused.value.expected
    assert refused.value.remedy


def test_it_says_that_it_needs_the_base(tmp_path: Path) -> None:
    saved = gpt2_folder(tmp_path / "saved", "mlp")
    (saved / "config.json").unlink()
    with pytest.raises(BaseModelError, match="give --base"):
        sb.load(saved)
    assert sb.load(saved, base=tiny_config("gpt2")).parts == sb.load(gpt2_folder(tmp_path / "again", "mlp")).parts
    with pytest.raises(BaseModelError, match="sites self"):
        sb.load(saved, base=bart_config())


def test_a_small_file_makes_no_large_prefix(tmp_path: Path) -> None:
    state = mlp(2, "wte", "control_trans", 1, 192, torch.float32, 0)
    state["wte.weight"] = torch.ones(200_000, 1)
    with pytest.raises(CheckpointError, match="far more than it is"):
        sb.load(folder(tmp_path / "saved", tiny_config("gpt2"), state))


def test_other_files_are_not_taken_for_it(tmp_path: Path) -> None:
    """OpenPrompt's template and OpenDelta's prefix hold the same network; a base model and an optimiser hold none."""
    network = gpt2_state("mlp")
    others: list[dict[str, Any]] = [
        {**network, "input_tokens": torch.arange(P)},
        {f"transformer.h.0.attn.reparams.{name}": tensor for name, tensor in network.items()},
        {f"prompt_model.template.{name}": tensor for name, tensor in network.items()},
        model_of("gpt2").transformer.state_dict(),
        {"state": {0: {"exp_avg": torch.ones(3, 32)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
    ]
    for number, content in enumerate(others):
        torch.save(content, tmp_path / f"{number}.bin")
        assert not prefixtuning.sniff(untrusted.Files(tmp_path / f"{number}.bin"))
    with pytest.raises(UnknownFormatError, match="no soft prompt"):
        sb.load(folder(tmp_path / "base", tiny_config("gpt2"), model_of("gpt2").state_dict()))


def test_lists_that_hold_one_another_end(tmp_path: Path) -> None:
    """Fifty lists, each twice in the next: as a tree they would have 2^50 leaves."""
    nested: Any = torch.ones(2)
    for _ in range(50):
        nested = [nested, nested]
    torch.save({"control_trans": nested}, tmp_path / "nested.pt")
    with pytest.raises(UnknownFormatError):
        sb.load(tmp_path / "nested.pt")
    with pytest.raises(CheckpointError, match="names without end"):
        sb.load(tmp_path / "nested.pt", format="prefixtuning", base=tiny_config("gpt2"))
