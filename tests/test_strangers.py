"""A sample of the standing trial: the architectures that it found wrong, crashing or refused for no reason."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import strangers
import tiny
import torch
import transformers
from strangers import Cell, Rows, tokens

import softbridge as sb
from softbridge.errors import EngineError
from softbridge.geometry import read_geometry
from softbridge.plugin.registry import engine_named
from softbridge.selfcheck import SWITCH
from softbridge.selfcheck.verdict import FOLDER
from softbridge.testing import random_input_prompt, random_prefix
from softbridge_native import tables

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers' models, about themselves

RIGHT, BEYOND, NO_DISPATCH = "right", "right .*beyond the table", "refused .*dispatch"
UNNAMED, UNBUILT = ".*does not say which", "not buildable .*no attribute 'config'"  # FSMT's on transformers 5 and 4
#: Kind and family -> what comes of an input prompt and of a prefix, as "outcome reason" matches.
SAMPLE: dict[tuple[str, str], tuple[str, str]] = {
    ("causal", "gpt2"): (BEYOND, BEYOND),
    ("causal", "bart"): (BEYOND, BEYOND),  # its layers could attend to an encoder, and there is none
    ("causal", "trocr"): (BEYOND, BEYOND),  # its table counts the cache, prefix included
    ("causal", "camembert"): (
        BEYOND,
        BEYOND,
    ),  # told where its tokens stand, it is told rows, the first 2 of them for pads
    ("causal", "gemma3n_text"): (
        "refused .*entry: .*vector",
        RIGHT,
    ),  # layers share keys; each has embeddings of its own
    # On transformers 4 it does not dispatch, and finds the prefix in its cache.
    ("causal", "diffllama"): (RIGHT, "refused .*call their attention 8 times|right"),
    ("causal", "doge"): (RIGHT, "refused .*make their own mask"),
    ("causal", "git"): (BEYOND, "refused .*dispatch|elsewhere"),
    ("causal", "mamba2"): (RIGHT, "refused .*(no key/value cache|without keys and values only)"),
    # Of hybrid models the layers that attend have a prefix. Jamba dispatches on transformers 5 only.
    ("causal", "jamba"): (RIGHT, "right|refused .*dispatch"),
    ("causal", "lfm2"): (RIGHT, RIGHT),
    ("causal", "zamba2"): (RIGHT, "right|refused .*in turn through 1 modules"),
    ("causal", "recurrent_gemma"): (RIGHT, "refused .*(where their queries stand|keep a state)"),
    # Some layers have other heads; keys are values.
    ("causal", "mimo_v2_flash"): (RIGHT, "refused attention: layer 1 attends to keys"),
    ("causal", "deepseek_v4"): ("refused .*entry", "refused .*one tensor for keys and for values"),
    ("causal", "prophetnet"): ("refused .*more states of each token", "refused .*no key/value cache"),
    ("causal", "inkling2_text"): (RIGHT, "refused .*(add a bias of their own|dispatch)"),  # which has none for a prefix
    ("causal", "llama4_text"): (RIGHT, "refused .*chunks"),
    ("masked", "nystromformer"): (BEYOND, NO_DISPATCH),  # its first position is 2
    ("masked", "rembert"): (BEYOND, NO_DISPATCH),  # its embeddings are narrower than its states
    ("masked", "ibert"): ("refused .*cannot be run on embeddings", NO_DISPATCH),
    ("masked", "reformer"): (BEYOND, NO_DISPATCH),
    ("classifier", "bert"): (
        BEYOND,
        f"{BEYOND}|{NO_DISPATCH}",
    ),  # its head takes the first state, which by hand is the text's, too
    ("masked", "mobilebert"): (BEYOND, f"not compared|{NO_DISPATCH}"),  # embeds each token with those beside it
    ("classifier", "longformer"): ("refused .*global_attention_mask", NO_DISPATCH),
    ("masked", "eurobert"): (RIGHT, RIGHT),  # its keys are rotated
    ("classifier", "eurobert"): (
        "refused .*raised RuntimeError",
        "not compared",
    ),  # it weighs P + T states by a mask of T
    ("seq2seq", "m2m_100"): ("right .*left pads", RIGHT),  # it finds pads by their token ids
    ("causal", "reformer"): ("right .*cached tokens", "refused .*no key/value cache"),  # its cache has another name
    ("causal", "xlm"): (BEYOND, "refused .*(no key/value cache|'encoder')"),  # it cuts a text to what its cache has not
    ("seq2seq", "fsmt"): (f"refused {UNNAMED}|{UNBUILT}", f"refused {UNNAMED}|{UNBUILT}"),
}


def trial(kind: str, model_type: str) -> list[Cell]:
    found = [cell for cell in strangers.cells() if (cell.kind, cell.model_type) == (kind, model_type)]
    if not found:
        pytest.skip(f"this transformers has no {model_type}")
    strangers.run(found[0], found[1:])
    return found


@pytest.mark.parametrize(("kind", "model_type"), SAMPLE, ids=["-".join(names) for names in SAMPLE])
def test_it_is_right_or_says_why_not(
    kind: str, model_type: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With the self-check, as whoever attaches has it: what it refuses is no longer right."""
    monkeypatch.setenv(SWITCH, "1")
    monkeypatch.setenv(FOLDER, str(tmp_path))
    for cell, expected in zip(trial(kind, model_type), SAMPLE[kind, model_type], strict=True):
        assert re.match(expected, f"{cell.outcome} {cell.reason}"), (cell.name, cell.outcome, cell.reason, cell.figures)


def test_the_trial_notices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another prompt than the one by hand is wrong, whatever raises crashes, and what is refused at its use is told."""
    attach = sb.attach

    def halved(model: Any, prompt: Any) -> Any:
        part = prompt.parts[0]
        changed = (
            replace(part, vectors=part.vectors / 2)
            if prompt.inputs
            else replace(part, layers={n: type(pair)(pair.values, pair.keys) for n, pair in part.layers.items()})
        )
        return attach(model, replace(prompt, parts=(changed,)))

    def raising(model: Any, prompt: Any) -> Any:
        raise KeyError("input_ids")

    def refusing(model: Any, prompt: Any) -> Any:
        def refuse(*args: Any) -> None:
            raise EngineError("a call", "none", "do not")

        model.register_forward_pre_hook(refuse)
        return model

    for wrong, outcome in ((halved, "WRONG"), (raising, "CRASH"), (refusing, "refused")):
        monkeypatch.setattr(sb, "attach", wrong)
        assert [cell.outcome for cell in trial("causal", "llama")] == [outcome, outcome]


def test_every_text_family_is_enumerated() -> None:
    names = {(cell.kind, cell.model_type) for cell in strangers.cells()}
    assert {("causal", "llama"), ("masked", "bert"), ("classifier", "layoutlm"), ("seq2seq", "t5")} <= names
    assert len({model_type for _, model_type in names}) > 150


def test_an_input_prompt_longer_than_a_chunk_of_attention() -> None:
    """Llama 4 attends in chunks of 6 tokens here, and a prompt and its text have 10."""
    plain = transformers.Llama4TextConfig()
    config = type(plain)(**tiny.shrunk(plain, attention_chunk_size=6))
    model = strangers._model(config, transformers.Llama4ForCausalLM, torch.float64)
    prompt = random_input_prompt(read_geometry(model.config), strangers.P)
    hand, running, ids = Rows(model, prompt), sb.attach(copy.deepcopy(model), prompt), tokens()
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert strangers._difference(hand.scores(ids, True), strangers._scores(running, **given)) < strangers.FLOAT32
    expected = strangers.greedy(lambda written: hand.scores(written, True), ids)
    assert torch.equal(strangers.generated(running, given, False), expected)


def test_an_encoder_of_sounds_has_no_tokens() -> None:
    """Whisper: the encoder reads features, and the decoder takes what it cannot."""
    plain = transformers.WhisperConfig()
    config = type(plain)(**tiny.shrunk(plain, max_source_positions=32, num_mel_bins=8))
    model = transformers.WhisperForConditionalGeneration(config).double().eval()
    geometry, native = read_geometry(config), engine_named("native")
    (obstacle,) = native.obstacles(random_input_prompt(geometry, 3, stack="encoder"), model)
    assert "no token embeddings" in obstacle.reason
    assert obstacle.remedy == "use a prompt of the decoder"
    features = torch.randn(2, 8, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    decoder, words = tokens(2, 5), model.get_decoder().get_input_embeddings()
    prompt = random_input_prompt(geometry, 3, stack="decoder")
    vectors = torch.from_numpy(prompt.inputs[0].vectors).double().expand(2, -1, -1)
    rows = torch.cat([vectors, words(decoder)], dim=1)
    expected = strangers._scores(model, input_features=features, decoder_inputs_embeds=rows)[:, 3:]
    running = sb.attach(copy.deepcopy(model), prompt)
    found = strangers._scores(running, input_features=features, decoder_input_ids=decoder)
    assert strangers._difference(expected, found) < strangers.EXACT
    bare = strangers._scores(model, input_features=features, decoder_input_ids=decoder)
    assert strangers._difference(expected, bare) > strangers.FELT
    assert not native.obstacles(random_prefix(geometry, 3), model)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_the_last_position_is_taken_and_none_beyond(method: str) -> None:
    model = strangers.build("causal", "gpt2", "GPT2LMHeadModel")
    make = random_input_prompt if method == "prompt" else random_prefix
    running = sb.attach(model, make(read_geometry(model.config), 3))
    fits = tokens(1, model.config.n_positions - 3)
    strangers._scores(running, input_ids=fits)
    longer = torch.cat([fits, fits[:, :1]], dim=1)
    with pytest.raises(
        EngineError, match=r"126 tokens, the first of which stands at 3\s+expected: no more than the 128"
    ):
        strangers._scores(running, input_ids=longer)
    # Pads on the left stand nowhere.
    mask = torch.ones_like(longer)
    mask[:, 0] = 0
    if tables.counts_pads(running.base_model):  # but take room on transformers 4
        with pytest.raises(EngineError, match="126 tokens"):
            strangers._scores(running, input_ids=longer, attention_mask=mask)
    else:
        strangers._scores(running, input_ids=longer, attention_mask=mask)
    with pytest.raises(EngineError, match="stands at 3"):
        running.generate(fits, max_new_tokens=3, do_sample=False)


def test_the_document_shows_the_counts() -> None:
    kept = json.loads(strangers.COUNTS.read_text()) if strangers.COUNTS.exists() else {}
    assert f"{strangers.BEGIN}\n{strangers.table(kept)}\n{strangers.END}" in strangers.DOCUMENT.read_text()
    for numbers in kept.values():
        assert not any({"WRONG", "CRASH"} & set(outcomes) for outcomes in numbers.values())
