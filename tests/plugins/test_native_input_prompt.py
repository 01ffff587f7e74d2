"""Where vectors enter and stand in the native engine: templates, after the first token, after the embedding block.

The oracle is the model itself with the row embedded by hand: `row_of` says what stands in which column.
"""

from __future__ import annotations

import copy
import inspect
import runpy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from softbridge.base import build
from softbridge.base import cache as caches
from softbridge.errors import EngineError
from softbridge.geometry import Stack, read_geometry
from softbridge.lowering.precision import as_dtype
from softbridge.prompt import Positions, SoftPrompt
from softbridge.template import PLACEHOLDER, Field, Slot, Template, Virtual, Words
from softbridge.testing import TINY, agreement, apart, random_input_prompt, random_prefix, tiny_config, tiny_model
from softbridge_native.engine import ENGINE

P, T, NEW = 5, 7, 6
CAUSAL = ("gpt2", "llama")
FAR = 0.1
#: `generate` keeps the logits of its steps in float32, whatever the model computes in.
STEP = 1e-6
#: Virtual tokens in front, in the middle and at the end.
TEMPLATE = Template((Virtual(2), Field("text"), Virtual(1), Words((9,)), Slot(), Virtual(2)))


def small_encoder(family: str, head: Any = AutoModelForTokenClassification, **changes: Any) -> Any:
    settings = {**TINY["bert"], "pad_token_id": 1 if family == "roberta" else 0, **changes}
    if family in ("electra", "albert"):
        settings |= {"embedding_size": 24, "num_hidden_groups": 1}
    if family == "distilbert":
        settings |= {"dim": 32, "hidden_dim": 48, "n_layers": 3, "n_heads": 4}
    config = AutoConfig.for_model(family, **settings)
    model = head.from_config(config, attn_implementation="eager")
    weights = build(config, "sequence-classification", torch.float32, 0).state_dict()
    model.load_state_dict({name: value for name, value in weights.items() if "classifier" not in name}, strict=False)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "classifier" in name:
            torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    return model.double().eval()


def token_model(family: str) -> Any:
    if family in TINY and family != "bert":
        model = tiny_model(family)
        model.generation_config.eos_token_id = None
        return model
    return small_encoder(family)


def seq2seq(family: str) -> Any:
    if family == "t5":
        return token_model("t5")
    both = {"layers": 2, "attention_heads": 4, "ffn_dim": 40}
    settings = {f"{stack}_{name}": size for stack in ("encoder", "decoder") for name, size in both.items()}
    settings |= {"vocab_size": 96, "d_model": 32, "max_position_embeddings": 64, "pad_token_id": 0}
    config = AutoConfig.for_model(family, **settings, bos_token_id=1, eos_token_id=None, decoder_start_token_id=0)
    return build(config, "seq2seq-lm", torch.float64, 0)


def under(model: Any, implementation: str) -> Any:
    """The same model with another implementation of attention, which some families choose when they are built."""
    if implementation == "sdpa" and not model._supports_sdpa:
        pytest.skip(f"{model.config.model_type} has no SDPA here")
    other = type(model)._from_config(copy.deepcopy(model.config), attn_implementation=implementation).double()
    other.load_state_dict(model.state_dict())
    return other.eval()


def make_prompt(model: Any, placement: str, entry: str = "before", stack: Stack | None = None) -> SoftPrompt:
    prompt = random_input_prompt(read_geometry(model.config), P, stack=stack)
    (part,) = prompt.inputs
    part = replace(part, placement=placement, entry=entry, template=TEMPLATE if placement == "template" else None)
    start = P if entry == "before" and placement != "template" else 0
    return replace(prompt, parts=(part,), positions=Positions({part.stack: start}))


def attached(model: Any, prompt: SoftPrompt) -> Any:
    return ENGINE.attach(copy.deepcopy(model), prompt)


def swapped(prompt: SoftPrompt) -> SoftPrompt:
    (part,) = prompt.inputs
    return replace(prompt, parts=(replace(part, vectors=part.vectors[::-1]),))


def tokens(rows: int = 2, length: int = T, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    found: list[list[int]] = torch.randint(3, 96, (rows, length), generator=generator).tolist()
    return found


def row_of(text: list[int], placement: str, number: int = 0) -> list[int]:
    """A row with `PLACEHOLDER` for each virtual token; with a template, elsewhere in each row."""
    virtual = [PLACEHOLDER] * P
    if placement == "before-sequence":
        return virtual + text
    if placement == "after-first-token":
        return text[:1] + virtual + text[1:]
    if number == 0:
        return TEMPLATE.fill({"text": text}, 8)
    return text[:2] + virtual[:3] + text[2:] + [9, 8] + virtual[3:]


def padded(rows: Sequence[Sequence[int]], side: str, pad: int = 0) -> tuple[Tensor, Tensor]:
    length = max(map(len, rows))
    out, mask = torch.full((len(rows), length), pad), torch.zeros(len(rows), length, dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(length - len(row), None)
        out[number, place], mask[number, place] = torch.tensor(row), 1
    return out, mask


def by_hand(model: Any, rows: Sequence[Sequence[int]], vectors: Tensor) -> Tensor:
    """[B, n, H]: rows of one length embedded, with the next vector in each place of a virtual token."""
    embedding = model.get_input_embeddings()
    embedded = []
    for row in rows:
        following = iter(vectors)
        embedded.append([next(following) if i == PLACEHOLDER else embedding(torch.tensor(i)) for i in row])
    return torch.stack([torch.stack(row) for row in embedded])


def logits(model: Any, **inputs: Any) -> Tensor:
    if model.config.is_encoder_decoder:
        some = next(iter(inputs.values()))
        inputs.setdefault("decoder_input_ids", torch.tensor([[0, 5, 6]]).expand(some.shape[0], -1))
    found: Tensor = model(**inputs).logits
    return found


def difference(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).abs().max())


def vectors_of(prompt: SoftPrompt) -> Tensor:
    return torch.tensor(prompt.inputs[0].vectors).double()


# ------------------------------------------------------------------------------------------ as embedded by hand


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("placement", ["template", "after-first-token"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "bert", "roberta", "electra", "t5"])
def test_is_the_row_embedded_by_hand(family: str, placement: str, implementation: str) -> None:
    """Logits and the gradient of the vectors; then padded, with rows of different lengths.

    With a template that is the same calls on the same shapes; else the head predicts the real tokens alone.
    """
    model = under(token_model(family), implementation).requires_grad_(False)  # SDPA sums otherwise for what is trained
    prompt = as_dtype(make_prompt(model, placement), np.dtype(np.float64))
    ours, wrong = attached(model, prompt), attached(model, swapped(prompt))
    crossed, texts = model.config.is_encoder_decoder, tokens()
    rows = [row_of(text, placement, number) for number, text in enumerate(texts)]
    given = rows if placement == "template" else texts
    kept = torch.tensor([[placement == "template" or i != PLACEHOLDER for i in row] for row in rows])

    vectors = vectors_of(prompt).requires_grad_(True)
    expected = logits(model, inputs_embeds=by_hand(model, rows, vectors))
    expected = expected if crossed else expected[kept].unflatten(0, (2, -1))
    found = logits(ours, input_ids=torch.tensor(given))
    bound = agreement(model)
    assert apart(found, expected) <= (0.0 if placement == "template" else bound)
    assert difference(logits(wrong, input_ids=torch.tensor(given)), expected) > FAR
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=expected.dtype)
    (expected * weight).sum().backward()
    (found * weight).sum().backward()
    (gradient,) = (parameter.grad for parameter in ours.softbridge.parameters())
    assert apart(gradient, vectors.grad) <= bound

    shorter = [texts[0], texts[1][:4]]
    if placement == "template":
        shorter = [row_of(text, placement, number) for number, text in enumerate(shorter)]
    with torch.no_grad():
        alone = [logits(ours, input_ids=torch.tensor([row]))[0] for row in shorter]
        for side in ("right", "left"):
            out, mask = padded(shorter, side, model.config.pad_token_id or 0)
            both = logits(ours, input_ids=out, attention_mask=mask)
            for number, one in enumerate(alone):
                found = both[number] if crossed else both[number, mask[number].bool()]
                assert apart(found, one) <= bound, side


@pytest.mark.parametrize("placement", ["before-sequence", "after-first-token"])
@pytest.mark.parametrize("family", ["gpt2", "roberta"])
def test_a_row_of_padding_disturbs_no_other(family: str, placement: str) -> None:
    """As a loader adds to fill a batch."""
    model = token_model(family)
    ours = attached(model, make_prompt(model, placement))
    ids = torch.tensor([*tokens(), [model.config.pad_token_id or 0] * T])
    mask = torch.ones_like(ids)
    mask[2] = 0
    with torch.no_grad():
        found, alone = ours(ids, attention_mask=mask).logits[:2], ours(ids[:2], attention_mask=mask[:2]).logits
    assert apart(found, alone) <= agreement(model)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_a_prefix_and_a_template(family: str) -> None:
    """The row with the virtual tokens starts behind the prefix: a model with the prefix, its row embedded by hand."""
    model = token_model(family)
    filled = make_prompt(model, "template")
    stack = filled.inputs[0].stack
    prefix = random_prefix(read_geometry(model.config), P, sites=("encoder" if stack == "encoder" else "self",))
    if ENGINE.obstacles(prefix, model):
        pytest.skip(f"{family} does not dispatch here")
    both = SoftPrompt((*prefix.parts, *filled.parts), Positions({stack: P}))
    assert both.counted() == {stack: P}
    rows = [row_of(text, "template", number) for number, text in enumerate(tokens())]
    ours, oracle = attached(model, both), attached(model, prefix)
    with torch.no_grad():
        expected = logits(oracle, inputs_embeds=by_hand(model, rows, vectors_of(filled)))
        assert torch.equal(logits(ours, input_ids=torch.tensor(rows)), expected)
        assert difference(logits(attached(model, filled), input_ids=torch.tensor(rows)), expected) > FAR


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "t5"])
def test_a_template_with_all_in_front_is_no_template(family: str) -> None:
    model = token_model(family)
    front = make_prompt(model, "before-sequence")
    template = Template((Virtual(P), Field("text")))
    (part,) = front.inputs
    part = replace(part, placement="template", template=template)
    filled = SoftPrompt((part,), Positions({part.stack: 0}), front.base)
    rows = torch.tensor([template.fill({"text": text}) for text in tokens()])
    with torch.no_grad():
        expected = logits(attached(model, front), input_ids=torch.tensor(tokens()))
        found = logits(attached(model, filled), input_ids=rows)
        later = replace(filled, positions=Positions({part.stack: 3}))
        if "position_ids" in inspect.signature(model.base_model.forward).parameters and family != "llama":
            assert difference(logits(attached(model, later), input_ids=rows), found) > FAR
    # Of a template's virtual tokens, too, there are logits.
    if family == "t5":
        assert torch.equal(found, expected)
    else:
        assert apart(found[:, P:], expected) <= agreement(model)


@pytest.mark.parametrize("placement", ["template", "after-first-token"])
@pytest.mark.parametrize("family", CAUSAL)
def test_generates_what_it_would_by_hand(family: str, placement: str) -> None:
    """A padded batch, cached, uncached and with beams: as each row alone, grown token by token without a cache."""
    model = token_model(family)
    prompt = make_prompt(model, placement)
    ours, wrong = attached(model, prompt), attached(model, swapped(prompt))
    rows = [tokens()[0], tokens()[1][:4]]
    if placement == "template":
        rows = [row_of(row, placement, number) for number, row in enumerate(rows)]
    settings = {"pad_token_id": 0, "eos_token_id": None, "max_new_tokens": NEW, "do_sample": False}

    def generate(running: Any, out: Tensor, mask: Tensor, **more: Any) -> Any:
        more |= {"output_logits": True, "return_dict_in_generate": True}
        return running.generate(input_ids=out, attention_mask=mask, **settings, **more)

    out, mask = padded(rows, "left")
    cached, uncached = generate(ours, out, mask), generate(ours, out, mask, use_cache=False)
    for number, row in enumerate(rows):
        grown, scores = torch.tensor([row]), []
        with torch.no_grad():
            for _ in range(NEW):
                scores.append(logits(ours, input_ids=grown)[:, -1])
                grown = torch.cat([grown, scores[-1].argmax(-1, keepdim=True)], dim=1)
        bound = max(STEP, agreement(model)) * float(torch.cat(scores).abs().max())
        for made in (cached, uncached):
            assert made.sequences[number, -NEW:].tolist() == grown[0, -NEW:].tolist()
            assert difference(torch.stack(made.logits, 1)[number], torch.cat(scores)) <= bound
        assert difference(torch.stack(generate(wrong, out, mask).logits, 1)[number], torch.cat(scores)) > FAR
    beams = [generate(ours, *padded([row], "left"), num_beams=2).sequences[0, -NEW:] for row in rows]
    assert torch.equal(generate(ours, out, mask, num_beams=2).sequences[:, -NEW:], torch.stack(beams))


@pytest.mark.parametrize("placement", ["template", "after-first-token"])
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_encoder_decoder_generates_what_it_would_by_hand(family: str, placement: str) -> None:
    """Cross-attention sees the virtual tokens: against the encoder's rows embedded by hand and padded."""
    model = seq2seq(family)
    prompt = make_prompt(model, placement)
    texts = [tokens()[0], tokens()[1][:4]]
    rows = [row_of(text, placement, number) for number, text in enumerate(texts)]
    given, mask = padded(rows if placement == "template" else texts, "right")
    embedded = [by_hand(model, [row], vectors_of(prompt))[0] for row in rows]
    by_hand_mask = padded([[1] * len(row) for row in rows], "right")[1]
    settings = {"max_new_tokens": NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    settings |= {"eos_token_id": None, "forced_eos_token_id": None, "pad_token_id": 0}
    inputs = torch.nn.utils.rnn.pad_sequence(embedded, batch_first=True)
    expected = model.generate(inputs_embeds=inputs, attention_mask=by_hand_mask, **settings)
    found = attached(model, prompt).generate(input_ids=given, attention_mask=mask, **settings)
    wrong = attached(model, swapped(prompt)).generate(input_ids=given, attention_mask=mask, **settings)
    assert torch.equal(found.sequences, expected.sequences)
    assert apart(torch.stack(found.logits), torch.stack(expected.logits)) <= max(STEP, agreement(model))
    assert difference(torch.stack(wrong.logits), torch.stack(expected.logits)) > FAR


# ------------------------------------------------------------------------------------------------- what heads see


def test_a_classifier_reads_the_last_token_of_a_template() -> None:
    """A decoder's head looks for it in the token ids, where a virtual token is none of padding."""
    model = build(tiny_config("gpt2", num_labels=3), "sequence-classification", torch.float64, 0)
    prompt = make_prompt(model, "template")
    ours, rows = attached(model, prompt), [row_of(tokens()[0], "template"), row_of(tokens()[1][:4], "template", 1)]
    with torch.no_grad():
        out, mask = padded(rows, "right")
        found = ours(out, attention_mask=mask).logits
        for number, row in enumerate(rows):
            expected = model(inputs_embeds=by_hand(model, [row], vectors_of(prompt))).logits[0]
            assert apart(found[number], expected) <= agreement(model)
    assert difference(found[0], found[1]) > FAR


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_the_first_state_is_the_first_tokens(family: str) -> None:
    """A classifier that takes the first state takes a virtual token's, or the real [CLS] that stands in front."""
    model = small_encoder(family, AutoModelForSequenceClassification)
    found = {}
    for placement in ("before-sequence", "after-first-token"):
        prompt = make_prompt(model, placement)
        rows = [row_of(text, placement) for text in tokens()]
        ours = attached(model, prompt)
        with torch.no_grad():
            found[placement] = ours(torch.tensor(tokens())).logits
            expected = model(inputs_embeds=by_hand(model, rows, vectors_of(prompt))).logits
            assert apart(found[placement], expected) <= agreement(model)
            states = ours.base_model(torch.tensor(tokens())).last_hidden_state
            assert states.shape[1] == (T + P if placement == "before-sequence" else T)
            out, mask = padded([tokens()[0], tokens()[1][:4]], "right")
            shorter = ours(out, attention_mask=mask).logits[1]
            assert apart(shorter, ours(torch.tensor([tokens()[1][:4]])).logits[0]) <= agreement(model)
    assert difference(*found.values()) > FAR


def test_the_loss_of_a_template_is_the_models_own() -> None:
    model = token_model("gpt2")
    ours, rows = attached(model, make_prompt(model, "template")), [row_of(text, "template") for text in tokens()]
    given = torch.tensor(rows)
    output = ours(given, labels=given.masked_fill(given == PLACEHOLDER, -100))
    by_hand = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), given[:, 1:].masked_fill(given[:, 1:] == PLACEHOLDER, -100).flatten()
    )
    assert output.logits.shape[:2] == given.shape
    assert difference(output.loss, by_hand) <= 1e-6


# -------------------------------------------------------------------------------- the decoder of an encoder-decoder


@pytest.mark.parametrize("placement", ["before-sequence", "template", "after-first-token"])
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_in_the_decoder_of_an_encoder_decoder(family: str, placement: str) -> None:
    """Against the decoder's row embedded by hand: logits, loss, and what is generated with and without a cache."""
    model = seq2seq(family).requires_grad_(False)
    prompt = make_prompt(model, placement, stack="decoder")
    ours, wrong = attached(model, prompt), attached(model, swapped(prompt))
    ids, mask = padded([tokens()[0], tokens()[1][:4]], "right")
    source = {"input_ids": ids, "attention_mask": mask}
    texts = [[0, *text] for text in tokens(length=5, seed=3)]
    rows = [row_of(text, placement) for text in texts]
    given = torch.tensor(rows if placement == "template" else texts)

    def oracle(rows: list[list[int]]) -> Tensor:
        """Logits of the decoder's own columns."""
        own = [column for column, i in enumerate(rows[0]) if i != PLACEHOLDER or placement == "template"]
        found: Tensor = model(**source, decoder_inputs_embeds=by_hand(model, rows, vectors_of(prompt))).logits
        return found[:, own]

    with torch.no_grad():
        expected = oracle(rows)
        labels = torch.randint(3, 96, given.shape, generator=torch.Generator().manual_seed(4))
        output = ours(**source, decoder_input_ids=given, labels=labels)
        bound = agreement(model)
        assert apart(output.logits, expected) <= bound
        loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten())
        assert difference(output.loss, loss) <= max(1e-6, bound)
        assert apart(ours(**source, decoder_input_ids=given).logits, expected) <= bound
        assert difference(wrong(**source, decoder_input_ids=given).logits, expected) > FAR

        settings = {"max_new_tokens": NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        settings |= {"eos_token_id": None, "forced_eos_token_id": None, "pad_token_id": 0}
        start = [] if given[0, 0] == 0 else [0]  # `generate` sees to it that a row begins so
        grown, scores = [start + row for row in rows], []
        for _ in range(NEW):
            scores.append(oracle(grown)[:, -1])
            chosen = scores[-1].argmax(-1).tolist()
            grown = [[*row, token] for row, token in zip(grown, chosen, strict=True)]
        for use_cache in (True, False):
            made = ours.generate(**source, decoder_input_ids=given, use_cache=use_cache, **settings)
            assert made.sequences[:, -NEW:].tolist() == [row[-NEW:] for row in grown]
            assert apart(torch.stack(made.logits), torch.stack(scores)) <= max(STEP, bound)


@pytest.mark.parametrize("placement", ["before-sequence", "template", "after-first-token"])
def test_a_prompt_in_each_stack(placement: str) -> None:
    model = seq2seq("t5")
    prompts = {stack: make_prompt(model, placement, stack=stack) for stack in ("encoder", "decoder")}
    start = {stack: prompt.positions.start[stack] for stack, prompt in prompts.items()}
    parts = [
        replace(prompt.inputs[0], vectors=prompt.inputs[0].vectors * (1 + n))
        for n, prompt in enumerate(prompts.values())
    ]
    ours = attached(model, SoftPrompt(tuple(parts), Positions(start)))
    texts = tokens(), tokens(seed=3)
    rows = [[row_of(text, placement) for text in each] for each in texts]
    source, target = (
        torch.tensor(row if placement == "template" else text) for row, text in zip(rows, texts, strict=True)
    )
    vectors = [torch.tensor(part.vectors).double() for part in parts]
    with torch.no_grad():
        embedded, decoder = (by_hand(model, *each) for each in zip(rows, vectors, strict=True))
        expected = model(inputs_embeds=embedded, decoder_inputs_embeds=decoder).logits
        own = [column for column, i in enumerate(rows[1][0]) if i != PLACEHOLDER or placement == "template"]
        found = ours(input_ids=source, attention_mask=torch.ones_like(source), decoder_input_ids=target).logits
    assert apart(found, expected[:, own]) <= agreement(model)
    assert ENGINE.extract(ours).inputs == tuple(parts)


# -------------------------------------------------------------------------------------- after the embedding block

BLOCKS = ("bert", "roberta", "electra", "albert", "distilbert", "deberta-v2", "mpnet")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("placement", ["before-sequence", "after-first-token"])
@pytest.mark.parametrize("family", BLOCKS)
def test_after_the_block_padding_does_not_matter(family: str, placement: str) -> None:
    """And neither does which of the equivalent arguments the caller gives."""
    model = small_encoder(family)
    prompt = make_prompt(model, placement, "after")
    texts = [tokens()[0], tokens()[1][:4]]
    (part,) = prompt.inputs
    negated = replace(prompt, parts=(replace(part, vectors=-part.vectors),))
    # These two count pads on the left, with or without a prompt: their callers cannot, or need not, tell positions.
    sides = ("right",) if family in ("distilbert", "mpnet") else ("right", "left")
    for implementation in ("eager", "sdpa") if model._supports_sdpa else ("eager",):
        running = under(model, implementation)
        ours, wrong = attached(running, prompt), attached(running, negated)
        with torch.no_grad():
            alone = [ours(torch.tensor([text])).logits[0] for text in texts]
            for side in sides:
                out, mask = padded(texts, side, model.config.pad_token_id)
                both, other = ours(out, attention_mask=mask).logits, wrong(out, attention_mask=mask).logits
                assert both.shape[:2] == out.shape
                for number, one in enumerate(alone):
                    real = mask[number].bool()
                    assert apart(both[number, real], one) <= agreement(running), (implementation, side)
                    assert difference(other[number, real], one) > FAR
            given, words = torch.tensor(texts[:1]), running.base_model.embeddings
            if family != "deberta-v2":  # whose block wants a mask
                assert torch.equal(ours.base_model.embeddings(given), words(given)), "the block on its own, afterwards"
            embedded = running.get_input_embeddings()(given)
            assert apart(ours(inputs_embeds=embedded).logits[0], alone[0]) <= agreement(running)
            later = replace(prompt, positions=Positions({part.stack: 3}))
            if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
                assert [obstacle.name for obstacle in ENGINE.obstacles(later, running)] == ["positions"]
                continue
            first = 2 if family in ("roberta", "mpnet") else 0  # rows up to the padding token's are reserved
            told = ours(given, position_ids=torch.arange(first + 3, first + 3 + T)[None]).logits[0]
            assert difference(told, alone[0]) > FAR
            assert torch.equal(attached(running, later)(given).logits[0], told)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("placement", ["before-sequence", "after-first-token"])
@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "albert"])
def test_after_the_block_is_adapterhub(family: str, placement: str) -> None:
    """States of every token. (What AdapterHub's classifiers make of them: test_adapterhub_golden.py.)"""
    pytest.importorskip("adapters")
    maker = runpy.run_path(str(Path(__file__).parent.parent / "golden" / "make_adapterhub.py"))
    model = small_encoder(family)
    prompt = make_prompt(model, placement, "after")
    toolkit, ours = maker["with_adapterhub"](model, prompt), attached(model, prompt)
    places = [i != PLACEHOLDER for i in row_of(tokens()[0], placement)]
    types = torch.tensor([[0, 0, 0, 1, 1, 1, 1]] * 2)
    out, mask = padded([tokens()[0], tokens()[1][:4]], "right", model.config.pad_token_id)
    whole = torch.tensor(tokens())
    settings = [{"input_ids": whole}, {"input_ids": whole, "token_type_ids": types * (family != "roberta")}]
    settings += [{"input_ids": whole, "position_ids": torch.arange(3, T + 3)[None]}]
    settings += [{"input_ids": out, "attention_mask": mask}]
    found = []
    for inputs in settings:
        real = inputs.get("attention_mask", torch.ones_like(out)).bool()
        with torch.no_grad():
            found.append(ours(**inputs).logits[real])
            assert apart(found[-1], toolkit(**inputs).logits[:, places][real]) <= agreement(model)
            assert difference(found[-1], model(**inputs).logits[real]) > FAR
    assert difference(found[2], found[0]) > FAR, "positions"
    assert family == "roberta" or difference(found[1], found[0]) > FAR, "types"


def test_after_the_block_of_a_decoder() -> None:
    """BERT can be one: what follows in a cache goes on where the real tokens end, and the vectors have an order."""
    model = build(tiny_config("bert", is_decoder=True), "causal-lm", torch.float64, 0)
    ids = torch.tensor(tokens(rows=1))
    for placement in ("before-sequence", "after-first-token"):
        prompt = make_prompt(model, placement, "after")
        ours, wrong = attached(model, prompt), attached(model, swapped(prompt))
        with torch.no_grad():
            expected = ours(ids).logits
            assert difference(wrong(ids).logits, expected) > FAR
            cache = caches.of(ours(ids[:, :4], use_cache=True))
            later = ours(ids[:, 4:6], **caches.handed(ours.forward, cache)).logits
            assert apart(later, expected[:, 4:6]) <= agreement(model)


def test_a_text_may_be_as_long_as_the_positions() -> None:
    """The embedding block meets the real tokens only."""
    long = small_encoder("bert")
    short = small_encoder("bert", max_position_embeddings=T)
    weights = {
        name: value[:T] if name.endswith("position_embeddings.weight") else value
        for name, value in long.state_dict().items()
    }
    short.load_state_dict(weights)
    ids = torch.tensor(tokens())
    for placement in ("before-sequence", "after-first-token"):
        prompt = make_prompt(long, placement, "after")
        with torch.no_grad():
            assert torch.equal(attached(short, prompt)(ids).logits, attached(long, prompt)(ids).logits)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_a_template_trains_and_leaves_nothing_behind() -> None:
    """As test_native.py has it of the other kinds, whose rows need no places for virtual tokens."""
    model = tiny_model("gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    prompt, state = make_prompt(model, "template"), {name: t.clone() for name, t in model.state_dict().items()}
    given, plain = torch.tensor([row_of(text, "template") for text in tokens()]), torch.tensor(tokens())
    bare = logits(model, input_ids=plain)
    ours = ENGINE.attach(model, prompt).train()
    (vectors,) = (p for p in ours.parameters() if p.requires_grad)
    gradients = []
    for reentrant in (None, False, True):
        if reentrant is not None:
            ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        ours.zero_grad()
        labels = given.masked_fill(given == PLACEHOLDER, -100)
        ours(input_ids=given, labels=labels, use_cache=False).loss.backward()
        gradients.append(vectors.grad.clone())
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])
    assert ENGINE.extract(ours) is prompt
    torch.optim.Adam([vectors], lr=0.1).step()
    trained = ENGINE.extract(ours)
    assert trained.inputs[0].template == TEMPLATE
    assert np.abs(trained.inputs[0].vectors - prompt.inputs[0].vectors).max() > 0.01
    with torch.no_grad():
        expected = logits(ours.eval(), input_ids=given)
        assert torch.equal(logits(copy.deepcopy(ours), input_ids=given), expected)
        assert torch.equal(logits(ENGINE.detach(ours), input_ids=plain), bare)
        assert torch.equal(logits(attached(model, trained), input_ids=given), expected)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


# ------------------------------------------------------------------------------------------------ what is refused


def test_rows_that_do_not_fit_the_template() -> None:
    model = token_model("gpt2")
    ours = attached(model, make_prompt(model, "template"))
    good = torch.tensor([row_of(text, "template") for text in tokens()])
    few = good.clone()
    few[1, 0] = 7
    for ids, found in ((few, "5, 4"), (torch.tensor(tokens()), "0, 0")):
        with pytest.raises(EngineError, match=f"rows with {found} virtual tokens") as caught:
            ours(ids)
        assert caught.value.expected == "5 in each row"
    with pytest.raises(EngineError, match="'inputs_embeds' were given"):
        ours(inputs_embeds=model.get_input_embeddings()(torch.tensor(tokens())))
    cache = caches.of(ours(good, use_cache=True))
    with pytest.raises(EngineError, match="rows with 5, 5 virtual tokens") as caught:
        ours(good, **caches.handed(ours.forward, cache))
    assert "0 in each row" in caught.value.expected
    with pytest.raises(IndexError):
        model(good)


def test_what_looks_at_the_ids_before_the_model_runs() -> None:
    """A fact: a repetition penalty looks every token of the row up in the vocabulary, where a placeholder is not."""
    model = token_model("gpt2")
    ours, rows = attached(model, make_prompt(model, "template")), [row_of(text, "template") for text in tokens()]
    settings = {"attention_mask": torch.ones(2, len(rows[0])), "max_new_tokens": 2, "pad_token_id": 0}
    with pytest.raises((IndexError, RuntimeError)):
        ours.generate(torch.tensor(rows), repetition_penalty=1.5, **settings)


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "roformer", "mobilebert"])
def test_no_block_to_enter_after(family: str) -> None:
    """RoFormer has such a module, but positions are none of its business; MobileBERT's makes vectors wider."""
    model = token_model(family)
    (obstacle,) = ENGINE.obstacles(make_prompt(model, "before-sequence", "after"), model)
    assert obstacle.name == "entry"
    assert "no module that is its embedding block and keeps its width" in obstacle.reason
    assert ENGINE.obstacles(make_prompt(model, "before-sequence"), model) == []
