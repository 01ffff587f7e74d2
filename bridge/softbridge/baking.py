"""Bake input prompts into a base model's vocabulary: an ordinary checkpoint that every server loads.

The P vectors of a prompt become P rows of the word embedding, and P tokens of the tokenizer. A text that begins with
these tokens then computes what the prompt computes in front of it, in whatever runs the checkpoint: no server has to
know what a soft prompt is. Several prompts can live in one vocabulary, each under its own tokens.

Two things would make the copy another function, and are seen to. Where the model multiplies embedded words (Gemma), the
rows are divided by that factor, which is measured. And a row of the embedding must not become an answer: tied heads are
untied, the new tokens' row of the head is the mean of all others, so that none is ever the best guess, and
``generation_config.json`` suppresses them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from softbridge import untrusted
from softbridge.arrays import Array, from_torch, to_torch
from softbridge.attachment.attach import attach, detach
from softbridge.base.model import BaseModel
from softbridge.checkpoint.read import load
from softbridge.errors import BaseModelError, DifferentError, LoweringError, Obstacle, SoftbridgeError, one_of
from softbridge.lowering.planner import lower
from softbridge.lowering.steps import Target
from softbridge.plugin.capabilities import Capabilities
from softbridge.progress import stage
from softbridge.prompt.part import InputPrompt
from softbridge.prompt.soft_prompt import SoftPrompt
from softbridge.untested import warn_of_untested

#: What rows of a vocabulary can say: virtual tokens that stand in the sequence like words.
WORDS = Capabilities(
    inputs=frozenset(
        (stack, "before", placement)
        for stack in ("encoder", "decoder")
        for placement in ("before-sequence", "after-first-token", "template")
    ),
    input_start="counted",
    parts=1,
    positions_told=False,
)
#: What the bias of a head, where it has one, is for a token that is no answer.
NEVER = -1e4
#: How closely the written checkpoint must agree with the prompt in front, in float32, relative to the largest logit.
BOUND = 1e-4


@dataclass(frozen=True)
class Baked:
    """What was written.

    Attributes:
        path: the checkpoint's folder.
        tokens: name of a prompt -> its P tokens, in their order; joined, they are the text to put in front.
        ids: name -> their numbers in the vocabulary.
        placement: name -> where they belong: ``before-sequence`` (in front of everything, a first token of the
            tokenizer's included), ``after-first-token``, or ``template``.
        tokenizer: whether the checkpoint has a tokenizer that knows them; without one, pass the numbers.
        in_front: the name of the prompt that the tokenizer puts in front of every text by itself, or None.
        apart: the largest difference of logits between the written checkpoint and the prompts as the native engine
            runs them, in float32, relative to the largest; None if nobody asked.
        effect: the same between the model with and without them, where it is least.
    """

    path: Path
    tokens: Mapping[str, tuple[str, ...]]
    ids: Mapping[str, tuple[int, ...]]
    placement: Mapping[str, str]
    tokenizer: bool
    in_front: str | None
    apart: float | None = None
    effect: float | None = None


def bake(
    prompts: Mapping[str, SoftPrompt | str | Path],
    target: str | Path,
    *,
    base: Any,
    in_front: str | None = None,
    verify: bool = False,
    overwrite: bool = False,
) -> Baked:
    """Write a base model whose vocabulary has these prompts.

    Memory: the model, once, in the precision of its own weights; with `verify` a second time, in float32.

    Args:
        prompts: name -> an input prompt, or the path of one. Prefixes have no words.
        target: the folder to write.
        base: a model, a directory or a hub id, with weights.
        in_front: which prompt the tokenizer shall put in front of every text.
        verify: run the written checkpoint and the prompts, and write nothing if they differ.
        overwrite: replace the folder.

    Raises:
        LoweringError: a prompt is no input prompt, or of vectors behind the embedding block.
        BaseModelError: the base has no weights, or does not make words of its embedding by a factor alone.
        SoftbridgeError: there is no prompt, a name is none for a token, or the two differ.
        OutputError: the target is there already.
    """
    import torch

    warn_of_untested()
    _check_names(prompts, in_front)
    resolved = BaseModel.resolve(base)
    if not overwrite:
        untrusted.check_vacant(Path(target))
    read = {n: p if isinstance(p, SoftPrompt) else load(p, base=resolved) for n, p in prompts.items()}
    parts = {name: _as_words(name, prompt, resolved) for name, prompt in read.items()}
    model = resolved.weights(_own_dtype(resolved))
    tokens = {name: tuple(f"<{name}-{n}>" for n in range(part.length)) for name, part in parts.items()}
    tokenizer = _tokenizer(resolved, [token for own in tokens.values() for token in own])
    ids = _numbers(tokens, tokenizer, len(model.get_input_embeddings().weight))
    with torch.no_grad():
        _add_rows(
            model, {number: row for name in parts for number, row in zip(ids[name], parts[name].vectors, strict=True)}
        )
    placement = {name: part.placement for name, part in parts.items()}
    if in_front is not None:
        _put_in_front(tokenizer, in_front, tokens[in_front], ids[in_front], placement[in_front])
    made = Baked(Path(target), tokens, ids, placement, tokenizer is not None, in_front)

    def fill(files: untrusted.Files) -> None:
        nonlocal made
        folder = files.path
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if verify:
            made = _verified(folder, made, read, resolved)

    said = {"tokens": tokens, "ids": ids, "placement": placement, "in_front": in_front}
    with stage(f"writing {target}"):
        untrusted.write(
            Path(target), {"softbridge_bake.json": untrusted.json_bytes(said)}, overwrite=overwrite, check=fill
        )
    return made


def _check_names(prompts: Mapping[str, Any], in_front: str | None) -> None:
    wrong = [name for name in prompts if not name.replace("-", "").replace("_", "").isalnum()]
    if not prompts or wrong:
        found = f"prompts named {', '.join(map(repr, wrong))}" if wrong else "no prompt"
        raise SoftbridgeError(found, "a prompt or more, each under a name of letters, digits, - and _", "name them so")
    if in_front is not None and in_front not in prompts:
        raise SoftbridgeError(
            f"no prompt is called '{in_front}', to stand in front", one_of(prompts, in_front), "name one"
        )


def _as_words(name: str, prompt: SoftPrompt, base: BaseModel) -> InputPrompt:
    """The prompt's vectors, as the base model here takes them in the place of embedded words."""
    if prompt.prefixes:
        reason = f"'{name}' has keys and values in attention, and no word of a vocabulary does"
        raise LoweringError("a vocabulary", [Obstacle("part", reason, "serve a prefix through a cache")])
    return lower(prompt, Target("a vocabulary", WORDS, base), ["task"]).prompt.inputs[0]


def _own_dtype(base: BaseModel) -> Any:
    import torch

    named = getattr(base.config, "dtype", None) or getattr(base.config, "torch_dtype", None)
    named = getattr(torch, named, None) if isinstance(named, str) else named
    return named if isinstance(named, torch.dtype) else torch.float32


def _tokenizer(base: BaseModel, tokens: Sequence[str]) -> Any:
    """The base's tokenizer with these tokens, or None if it has none."""
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    if base.name is None or base.name.endswith(".json"):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(base.name, trust_remote_code=False)
    except Exception:  # tokenizers raise what they like: then there is none
        return None
    if not _has_words(base.name, tokenizer):
        return None
    before = len(tokenizer)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens], special_tokens=True)
    if len(tokenizer) != before + len(tokens):
        raise SoftbridgeError(
            "a tokenizer that has some of these tokens already", "new tokens", "choose other names for the prompts"
        )
    return tokenizer


def _has_words(name: str, tokenizer: Any) -> bool:
    """Whether a tokenizer was read from files: transformers 5 makes one without words where there are none."""
    from transformers.utils import cached_file

    files = {"tokenizer.json", *tokenizer.vocab_files_names.values()}
    missing = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    return any(cached_file(name, file, **missing) is not None for file in sorted(files))


def _numbers(tokens: Mapping[str, Sequence[str]], tokenizer: Any, rows: int) -> dict[str, tuple[int, ...]]:
    """The numbers that a tokenizer gives the tokens; without one, those behind the last row."""
    if tokenizer is not None:
        return {name: tuple(map(int, tokenizer.convert_tokens_to_ids(list(own)))) for name, own in tokens.items()}
    numbers: dict[str, tuple[int, ...]] = {}
    for name, own in tokens.items():
        numbers[name] = tuple(range(rows, rows + len(own)))
        rows += len(own)
    return numbers


def _add_rows(model: Any, rows: Mapping[int, Array]) -> None:
    """Give the model's embedding these rows, and its head such that none of them is ever the best guess."""
    import torch
    from torch import nn

    words = model.get_input_embeddings()
    factor, size, known = _factor(words), max(*rows, len(words.weight) - 1) + 1, len(words.weight)
    head = model.get_output_embeddings()
    if head is not None and head.weight is words.weight:
        model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False
        head.weight = nn.Parameter(words.weight.detach().clone(), requires_grad=words.weight.requires_grad)
    if size > known:
        model.resize_token_embeddings(size, mean_resizing=False)
    words, head = model.get_input_embeddings(), model.get_output_embeddings()
    numbers = torch.tensor(list(rows))
    vectors = to_torch(np.stack(list(rows.values())), torch.float64) / factor
    stacks = (model.get_encoder(), model.get_decoder()) if model.config.is_encoder_decoder else ()
    for each in (words, *(stack.get_input_embeddings() for stack in stacks)):  # one and the same, in most models
        each.weight[numbers] = vectors.to(each.weight)
    if head is not None:
        head.weight[numbers] = head.weight[:known].double().mean(0).to(head.weight)
        if getattr(head, "bias", None) is not None:
            head.bias[numbers] = NEVER
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.suppress_tokens = sorted({*(generation.suppress_tokens or ()), *rows})


def _factor(words: Any) -> float:
    """By what the embedding multiplies a row to make a word of it.

    Raises:
        BaseModelError: it does something else to it.
    """
    import torch

    ids = torch.arange(min(64, len(words.weight)), device=words.weight.device)
    made, rows = words(ids).detach().double(), words.weight[ids].detach().double()
    factor = float((made * rows).sum() / (rows * rows).sum())
    if not torch.allclose(made, rows * factor, rtol=1e-2, atol=1e-6):
        raise BaseModelError(
            f"{type(words).__name__}, which does more to a row than multiply it",
            "an embedding that looks rows up",
            "run the prompt with an engine",
        )
    return round(factor, 6) if abs(factor - 1) < 1e-6 else factor


def _put_in_front(tokenizer: Any, name: str, tokens: Sequence[str], ids: Sequence[int], placement: str) -> None:
    """Make the tokenizer begin every text, and every conversation, with these tokens."""
    from tokenizers import processors

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or placement != "before-sequence":
        where = "no fast tokenizer is there" if backend is None else f"its tokens belong {placement}"
        raise SoftbridgeError(
            f"'{name}' in front of every text: {where}", "tokens in front", "write them into the texts"
        )
    front = " ".join(tokens)
    template = processors.TemplateProcessing(
        single=f"{front} $A", pair=f"{front} $A $B:1", special_tokens=list(zip(tokens, ids, strict=True))
    )
    before = backend.post_processor
    backend.post_processor = template if before is None else processors.Sequence([before, template])
    if isinstance(tokenizer.chat_template, str):
        tokenizer.chat_template = "{{- '" + "".join(tokens) + "' -}}" + tokenizer.chat_template


def _verified(folder: Path, made: Baked, prompts: Mapping[str, SoftPrompt], base: BaseModel) -> Baked:
    """The same with what a comparison of the written checkpoint with the native engine says.

    Raises:
        SoftbridgeError: they differ, or the prompt has no effect.
    """
    import torch

    from softbridge.base.build import auto_class

    running = auto_class(base.task, base.config).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
    )
    bare, apart, effect = base.weights(torch.float32), 0.0, float("inf")
    rows = len(bare.get_input_embeddings().weight)
    # Where the tokens took rows that the vocabulary had to spare, their own logits are not the model's.
    new = [number for own in made.ids.values() for number in own]
    others, lowest = np.setdiff1d(np.arange(rows), new), min(rows, *new)
    for name, prompt in prompts.items():
        ids = torch.randint(0, lowest, (1, 12), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            plain = _logits(bare, ids, ids)
            attached = attach(bare, prompt, self_check=False)
            wanted = _logits(attached, ids, ids)
            own = torch.tensor([made.ids[name]])
            cut = {"before-sequence": 0, "after-first-token": 1}.get(made.placement[name])
            if cut is None:
                raise SoftbridgeError(f"'{name}' has a template", "a prompt in front", "leave verify out")
            text = torch.cat([ids[:, :cut], own, ids[:, cut:]], 1)
            found = _logits(running, text, ids)
        bare = detach(attached)
        if found.shape[1] == text.shape[1] and wanted.shape[1] == ids.shape[1]:
            kept = [n for n in range(text.shape[1]) if not cut <= n < cut + own.shape[1]]
            found = found[:, kept]
        scored = others if wanted.shape[-1] == rows else slice(None)
        scale = np.abs(wanted).max()
        apart = max(apart, float(np.abs(found[..., scored] - wanted[..., scored]).max() / scale))
        effect = min(effect, float(np.abs(plain - wanted).max() / scale))
    if not apart <= BOUND < effect:
        raise DifferentError(
            f"a checkpoint that differs from its prompts by {apart:.1e} of the largest logit (effect {effect:.1e})",
            f"at most {BOUND:.0e}, and an effect",
            "report this, with the base model's family",
        )
    return Baked(**{**vars(made), "apart": apart, "effect": effect})


def _logits(model: Any, ids: Any, answers: Any) -> Array:
    more = {"decoder_input_ids": answers} if model.config.is_encoder_decoder else {}
    return from_torch(model(input_ids=ids, **more).logits)
