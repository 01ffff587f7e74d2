"""The native engine keeps the contract of an engine on every architecture here, and a faulty one is found out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForMaskedLM

from softbridge import contract
from softbridge.base import BaseModel, build, draw_weights
from softbridge.base import cache as caches
from softbridge.errors import BaseModelError, EngineError, Obstacle
from softbridge.geometry import Geometry, Site, read_geometry
from softbridge.prompt import SoftPrompt
from softbridge.testing import agreement, apart, random_input_prompt, random_prefix
from softbridge.verification.probes import make_probes
from softbridge.verification.run import attached, gradient, run
from softbridge_native.engine import ENGINE, NativeEngine
from softbridge_peft.engine import ENGINE as PEFT

P, STD, WINDOW = 3, 0.7, 4
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2}
SMALL_HEAD = {**GROUPED, "head_dim": 8}
EXPERTS = {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}
ENCODER = {"type_vocab_size": 2}
BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 2,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
}
T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}

#: Family -> what its configuration needs beside SIZES. Windows are smaller than the text.
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "llama": GROUPED,
    "mistral": {**GROUPED, "sliding_window": WINDOW},
    "qwen2": GROUPED,
    "qwen3": SMALL_HEAD,
    "gemma2": {**SMALL_HEAD, "query_pre_attn_scalar": 8, "sliding_window": WINDOW},
    "gemma3_text": {**SMALL_HEAD, "query_pre_attn_scalar": 8, "sliding_window": WINDOW, "sliding_window_pattern": 2},
    "phi3": GROUPED,
    "gpt_neox": {"rotary_pct": 0.5},
    "glm4": {**SMALL_HEAD, "partial_rotary_factor": 0.5},
    "cohere2": {**GROUPED, "sliding_window": WINDOW, "logit_scale": 1.0, "sliding_window_pattern": 2},
    "smollm3": {**GROUPED, "no_rope_layers": [1, 0]},
    "olmo2": GROUPED,
    "gpt_oss": {**SMALL_HEAD, **EXPERTS, "sliding_window": WINDOW},
    "mixtral": EXPERTS,
    "granite": GROUPED,
    "starcoder2": {**GROUPED, "sliding_window": WINDOW},
    "phi": {"partial_rotary_factor": 0.5},
    "bert": ENCODER,
    "roberta": {**ENCODER, "pad_token_id": 1, "bos_token_id": 0},
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    "albert": {**ENCODER, "embedding_size": 24},
    "electra": {**ENCODER, "embedding_size": 24},
    "t5": T5,
    "mt5": T5,
    "bart": BART,
    "mbart": BART,
    "pegasus": BART,
}

#: Family -> why the engine refuses some prefix on it, in some supported transformers.
UNTELLABLE = "takes no position_ids"
UNDISPATCHED = "attention layers .*: 2 by .*, 0 dispatch"
REFUSALS = {
    **dict.fromkeys(("bert", "roberta", "electra", "t5", "mt5"), (UNDISPATCHED,)),
    "distilbert": (UNDISPATCHED, UNTELLABLE),
    "albert": (UNDISPATCHED, "attention layers .*: 2 by .*, 1 dispatch"),
    "cohere2": ("do not learn where their queries stand",),
}
#: One module for all layers, which can hold one prefix only.
SHARES_LAYERS = ("albert",)
#: Family -> what the model itself does not keep, in some supported transformers.
NOT_OFFERED = r"attention: ValueError: .* does not support an attention implementation"
BUILT_IN = r"attention: NotImplementedError: .* takes no other attention once it is built"
LEFT = (r"padding: (decoder_)?left", r"labels: left, loss")
OWN: dict[str, tuple[str, ...]] = {
    "gpt_oss": (NOT_OFFERED,),
    # Its sdpa attention silently leaves the soft cap of the scores out (transformers 4).
    "gemma2": (NOT_OFFERED, "attention: sdpa, "),
    **dict.fromkeys(("bert", "roberta", "albert", "electra"), (BUILT_IN,)),
    "distilbert": (*LEFT, BUILT_IN),
    # A query that sees nothing, a pad on the left, is no number in float64 (transformers 4).
    **dict.fromkeys(("t5", "mt5"), ("padding: decoder_left", BUILT_IN)),
    # Positions are counted from the first column, and nobody can tell otherwise.
    **dict.fromkeys(("bart", "mbart", "pegasus"), LEFT),
}
#: These compute in float64 throughout.
FLOAT64 = ("gpt2", "bert", "roberta", "distilbert", "albert", "electra")


def config_of(family: str) -> Any:
    return AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family]})


def fresh(family: str) -> Any:
    """Encoders have the head that predicts every token: more to compare than a class."""
    config = config_of(family)
    if BaseModel(config).task != "sequence-classification":
        return build(config, BaseModel(config).task, torch.float64, 0)
    model = AutoModelForMaskedLM.from_config(config, attn_implementation="eager")
    draw_weights(model, 0)
    return model.double().eval()


def sites_of(geometry: Geometry) -> tuple[Site, ...]:
    sites: tuple[Site, ...] = ("encoder", "self", "cross")
    return tuple(site for site in sites if geometry.site(site) is not None)


def prompts(model: Any, kind: str) -> Iterator[SoftPrompt]:
    """First what toolkits mean, virtual tokens counted and sliding out of windows; then what is easier to run."""
    geometry = read_geometry(model.config)
    if kind == "input":
        yield random_input_prompt(geometry, P, std=STD)
        return
    prefix = random_prefix(geometry, P, sites=sites_of(geometry), std=STD)
    yield prefix
    start = dict.fromkeys(prefix.positions.start, 0)
    yield replace(prefix, positions=replace(prefix.positions, start=start))
    yield replace(prefix, positions=replace(prefix.positions, window="pinned"))


def runnable(model: Any, kind: str) -> tuple[SoftPrompt | None, list[Obstacle]]:
    """The first prompt of a kind that the engine runs on the model, and what stood against those before it."""
    found: list[Obstacle] = []
    for prompt in prompts(model, kind):
        obstacles = ENGINE.obstacles(prompt, model)
        if not obstacles:
            return prompt, found
        found += obstacles
    return None, found


CASES = [(family, kind) for family in FAMILIES for kind in ("prefix", "input")]


@pytest.mark.filterwarnings("ignore")  # of transformers' models, about themselves
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_native_keeps_the_contract(family: str, kind: str) -> None:
    model = fresh(family)
    prompt, obstacles = runnable(model, kind)
    # What is refused is refused for a reason, and before anything is changed.
    refusals = REFUSALS.get(family, ())
    assert all(any(re.search(reason, o.reason) for reason in refusals) for o in obstacles), obstacles
    for obstacle in obstacles:
        assert obstacle.name in ("attention", "positions", "window")
    if prompt is None:
        before = set(vars(model))
        with pytest.raises(EngineError, match="cannot run this prompt"):
            ENGINE.attach(model, next(prompts(model, kind)))
        assert set(vars(model)) == before
        assert not model._can_set_attn_implementation() or family in SHARES_LAYERS
        return
    for outcome in contract.check(ENGINE, partial(fresh, family), prompt):
        assert outcome.figures or outcome.promise == "cache", outcome.promise
        assert not outcome.broken, str(outcome)
        # The model's own: the same check without a prompt fails as well, and nothing else is ever excused.
        own = [f"{outcome.promise}: {figure.name}" for figure in outcome.by_model]
        assert [name for name in own if not any(re.match(known, name) for known in OWN.get(family, ()))] == []
        assert not outcome.float32_regions or family not in FLOAT64, outcome.float32_regions


def test_how_many_architectures_run_a_prefix() -> None:
    """Of those that the engine refuses, all but one do not dispatch in this transformers."""
    able = [family for family in FAMILIES if runnable(fresh(family), "prefix")[0] is not None]
    assert len(able) == (28 if "t5" in able else 26 if "bert" in able else 22), able
    assert set(FAMILIES) - set(able) <= {"bert", "roberta", "distilbert", "electra", "t5", "mt5", *SHARES_LAYERS}
    assert all(runnable(fresh(family), "input")[0] is not None for family in ("albert", "bert", "t5"))


def test_speech_is_no_text() -> None:
    """Whisper hears: its encoder takes features, which the contract's texts are not, and no head for text builds it."""
    with pytest.raises(BaseModelError, match="whisper"):
        build(AutoConfig.for_model("whisper"), "seq2seq-lm", torch.float64, 0)


# -------------------------------------------------------------------------------------------- the contract itself


class Faulty(NativeEngine):
    """The native engine with one fault.

    Args:
        fault: what happens to the model after the prompt was attached.
        after: what happens to it after the prompt was detached.
    """

    def __init__(self, fault: Callable[[Any], object] = id, after: Callable[[Any], object] = id) -> None:
        super().__init__()
        self.fault, self.after = fault, after

    def attach(self, model: Any, prompt: SoftPrompt) -> Any:
        attached = super().attach(model, prompt)
        self.fault(attached)
        return attached

    def detach(self, model: Any) -> Any:
        detached = super().detach(model)
        self.after(detached)
        return detached


def ignores_pads(model: Any) -> None:
    def hook(module: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "attention_mask": None}

    model.transformer.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)


def forgets_where_the_cache_ends(model: Any) -> None:
    def hook(module: Any, args: Any, kwargs: Any) -> Any:
        cache = caches.given(kwargs)
        cached = cache is not None and cache.get_seq_length() > 0
        return args, {**kwargs, "position_ids": torch.zeros(1, 1, dtype=torch.long)} if cached else kwargs

    model.transformer.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)


def changes(model: Any, change: Callable[[Tensor], Tensor]) -> None:
    def hook(module: Any, args: Any, output: Any) -> Any:
        output.logits = change(output.logits)
        return output

    model.register_forward_hook(hook)


def mixes_rows(model: Any) -> None:
    changes(model, lambda logits: logits + logits.mean(0, keepdim=True))


def keeps_virtual_tokens(model: Any) -> None:
    changes(model, lambda logits: torch.cat([logits[:, :1], logits], dim=1))


def trains_the_model(model: Any) -> None:
    model.transformer.ln_f.weight.requires_grad_(True)


def ignores_the_prompt(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if name.startswith("softbridge."):
            parameter.data.fill_(-1e3 if name.endswith("keys") else 0.0)  # seen by nobody, and of no value


def differs_in_sdpa(model: Any) -> None:
    if "sdpa" in model.config._attn_implementation:
        changes(model, lambda logits: logits * 1.001)


def leaves_a_hook(model: Any) -> None:
    model.transformer.register_forward_hook(lambda module, args, output: None)


def leaves_a_setting(model: Any) -> None:
    model.config._attn_implementation_internal = "softbridge_eager"


def loses_a_bit(model: Any) -> None:
    model.transformer.ln_f.weight.data[0] += 1e-15


def stays_trainable(model: Any) -> None:
    next(model.parameters()).requires_grad_(True)


FAULTS = [
    (Faulty(ignores_pads), contract.padding, "left"),
    (Faulty(forgets_where_the_cache_ends), contract.cache, "token by token"),
    (Faulty(mixes_rows), contract.batch, "equal lengths"),
    (Faulty(keeps_virtual_tokens), contract.labels, "right, logits too many"),
    (Faulty(ignores_pads), contract.labels, "left, loss"),
    (Faulty(trains_the_model), contract.training, "parameters of the model to train"),
    (Faulty(trains_the_model), contract.training, "tensors of the model changed"),
    (Faulty(ignores_the_prompt), contract.training, "extracted and attached again"),
    (Faulty(after=leaves_a_hook), contract.detaching, "hooks"),
    (Faulty(after=leaves_a_setting), contract.detaching, "attention"),
    (Faulty(after=loses_a_bit), contract.detaching, "numbers in the state"),
    (Faulty(after=stays_trainable), contract.detaching, "trainable"),
    (Faulty(differs_in_sdpa), contract.attention, "sdpa, logits"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("engine", "promise", "name"), FAULTS)
def test_a_faulty_engine_is_found_out(engine: Faulty, promise: contract.Promise, name: str) -> None:
    prompt, _ = runnable(fresh("gpt2"), "prefix")
    assert prompt is not None
    (outcome,) = contract.check(engine, partial(fresh, "gpt2"), prompt, [promise])
    assert name in [figure.name for figure in outcome.broken], str(outcome)
    assert not outcome.by_model


def test_an_engine_that_ignores_its_prompt_or_raises() -> None:
    class Ignores(Faulty):
        def attach(self, model: Any, prompt: SoftPrompt) -> Any:
            return model

        def detach(self, model: Any) -> Any:
            return model

    class Raises(Faulty):
        def attach(self, model: Any, prompt: SoftPrompt) -> Any:
            raise ZeroDivisionError("one\ntwo")

    prompt, _ = runnable(fresh("gpt2"), "prefix")
    assert prompt is not None
    (outcome,) = contract.check(Ignores(), partial(fresh, "gpt2"), prompt, [contract.detaching])
    assert "prompts not felt" in [figure.name for figure in outcome.broken]
    (outcome,) = contract.check(Raises(), partial(fresh, "gpt2"), prompt, [contract.padding])
    assert [figure.name for figure in outcome.broken] == ["ZeroDivisionError: one"]


def test_what_the_model_itself_breaks_is_recorded_as_its_own() -> None:
    def make() -> Any:
        model = fresh("gpt2")
        mixes_rows(model)
        return model

    prompt, _ = runnable(fresh("gpt2"), "prefix")
    assert prompt is not None
    (outcome,) = contract.check(ENGINE, make, prompt, [contract.batch])
    assert [figure.name for figure in outcome.by_model] == ["equal lengths", "mixed lengths"]
    assert not outcome.broken
    assert "the model alone: " in str(outcome)


def test_an_excuse_has_a_limit() -> None:
    def outcome(value: float, bare: float) -> contract.Outcome:
        return contract.Outcome("padding", (contract.Figure("left", value, "close"),), {"left": bare})

    nan, inf = float("nan"), float("inf")
    assert [bool(outcome(0.5, bare).by_model) for bare in (0.1, 0.04, 1e-13, nan, inf)] == [
        True,
        False,
        False,
        True,
        True,
    ]
    assert [bool(outcome(value, 0.1).broken) for value in (1e-13, 0.5, 1.5, nan, inf)] == [
        False,
        False,
        True,
        True,
        True,
    ]
    with_region = replace(outcome(1e-7, 0.0), float32_regions=("Norm",))
    assert outcome(1e-7, 0.0).broken
    assert not with_region.broken


# ------------------------------------------------------------------------------------------------------------ PEFT


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_counted_prefix_is_peft(family: str, implementation: str) -> None:
    """Logits, loss and gradient, unpadded; logits padded on the right, too."""

    def make() -> Any:
        model = fresh(family)
        model.set_attn_implementation(implementation)
        return model

    prompt, _ = runnable(make(), "prefix")
    assert prompt is not None
    config = make().config
    probes = [p for p in make_probes(read_geometry(config), config, 0, "causal-lm") if not p.greedy]
    probes = [p for p in probes if p.name in ("alone-0", "alone-1", "right-padded")]
    found = []
    for engine in (ENGINE, PEFT):
        with attached(engine, make(), prompt) as running:
            outputs = run(running, probes)
        found.append((outputs, gradient(engine, make(), prompt, probes[0])))
    (ours, (our_loss, our_gradient)), (theirs, (their_loss, their_gradient)) = found
    close = agreement(make())
    assert {name for name in ours if apart(ours[name], theirs[name]) > close} == set()
    assert our_loss == pytest.approx(their_loss, rel=close)
    pairs = zip(our_gradient.arrays(), their_gradient.arrays(), strict=True)
    assert all(name == other and apart(a, b) <= close and np.abs(a).max() > 0 for (name, a), (other, b) in pairs)
    bare = run(make(), probes)
    assert all(np.abs(bare[name] - ours[name]).max() > 0.1 for name in bare)


@pytest.mark.filterwarnings("ignore")
def test_peft_breaks_what_it_is_known_to_break() -> None:
    """An engine of another's making runs through the same functions; each defect stands in SEMANTICS.md."""
    prompt, _ = runnable(fresh("gpt2"), "input")
    assert prompt is not None
    outcomes = {o.promise: o for o in contract.check(PEFT, partial(fresh, "gpt2"), prompt)}
    broken = {promise: {figure.name for figure in o.broken} for promise, o in outcomes.items() if o.broken}
    # Positions are lost, so that pads on the left count; virtual tokens are in the output.
    assert set(broken) == {"padding", "cache", "labels"}
    assert broken["padding"] == {"left"}
    assert broken["labels"] >= {"right, logits too many", "left, logits too many"}
    assert not any(outcome.by_model for outcome in outcomes.values())
