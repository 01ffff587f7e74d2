"""Requests that name a prompt, for vLLM in this process (`Prompts.request`) and for ``vllm serve`` (`Prompts.openai`).

It needs the directory of prompts that the server has, or a copy, and no vLLM. An input prompt needs torch, too.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softbridge.arrays import to_torch
from softbridge.errors import EngineError, few
from softbridge_vllm.shelf import Named, read_shelf, vectors_of

if TYPE_CHECKING:
    import torch


class Prompts:
    """The prompts of a server, by name.

    Args:
        directory: of the prompts, as the server has it.
        marker: as the server's ``kv_connector_extra_config`` has it.
        dtype: in which the server computes, as in ``bfloat16``. An input prompt is then sent in it. None: as it is
            stored, and vLLM rounds it.
        rounded: whether an input prompt's numbers may be rounded to `dtype`.

    Raises:
        What `read_shelf` raises; and `EngineError`, if they would be rounded and may not.
    """

    def __init__(
        self, directory: str | Path, *, marker: int | None = None, dtype: str | None = None, rounded: bool = False
    ) -> None:
        self._shelf = read_shelf(directory, marker=marker)
        self._rounded = rounded
        self._vectors = {
            name: one.prompt.inputs[0].vectors if dtype is None else vectors_of(one, dtype, rounded=rounded)
            for name, one in self._shelf.items()
            if not one.is_prefix
        }

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._shelf)

    def placeholders(self, name: str) -> tuple[int, ...]:
        """The token ids [P] that stand for a prefix, in front of a text.

        Raises:
            EngineError: there is no such prompt, or it is no prefix.
        """
        named = self._named(name)
        if not named.is_prefix:
            raise EngineError(f"'{name}' is vectors in front of the text", "a prefix", "ask for its request")
        return named.tokens

    def request(self, name: str | None, tokens: Sequence[int]) -> dict[str, Any]:
        """What ``LLM.generate`` takes: a text [T] with a prompt, or bare.

        Args:
            name: of the prompt; None: the base model alone.
            tokens: the text, one token at least.

        Raises:
            EngineError: there is no such prompt, or no text, or a bare text would be taken for a prompt.
        """
        tokens = self._text(tokens, bare=name is None)
        if name is None:
            return {"prompt_token_ids": tokens}
        named = self._named(name)
        if named.is_prefix:
            return {"prompt_token_ids": [*named.tokens, *tokens]}
        import torch

        vectors = to_torch(self._vectors[name])
        # vLLM embeds the text itself, where its ids are said to be real; see `EmbedsPrompt` in `vllm/inputs/llm.py`.
        return {
            "prompt_embeds": torch.cat([vectors, vectors.new_zeros(len(tokens), vectors.shape[1])]),
            "prompt_token_ids": [*[0] * named.length, *tokens],
            "prompt_is_token_ids": [*[False] * named.length, *[True] * len(tokens)],
        }

    def openai(self, name: str | None, tokens: Sequence[int], words: torch.Tensor | None = None) -> dict[str, Any]:
        """What ``client.completions.create`` of the OpenAI package takes, beside the model's name and the sampling.

        Args:
            words: for an input prompt, the base model's word embeddings [V, H], as they enter its first layer: this API
                takes vectors for a whole text. The prompt is sent in their dtype.

        Raises:
            EngineError: as `request`; or vectors without `words`, or such that their dtype does not hold.
        """
        tokens = self._text(tokens, bare=name is None)
        if name is None:
            return {"prompt": tokens}
        named = self._named(name)
        if named.is_prefix:
            return {"prompt": [*named.tokens, *tokens]}
        if words is None:
            raise EngineError(
                f"'{name}' is vectors in front of the text, and this API takes vectors alone",
                "the base model's word embeddings",
                "pass words=model.get_input_embeddings().weight, as the text's vectors enter the first layer",
            )
        import torch

        dtype = str(words.dtype).removeprefix("torch.")
        vectors = to_torch(vectors_of(named, dtype, rounded=self._rounded))
        stream = io.BytesIO()
        torch.save(torch.cat([vectors, words.detach().cpu()[tokens]]), stream)
        return {"prompt": None, "extra_body": {"prompt_embeds": base64.b64encode(stream.getvalue()).decode()}}

    def _named(self, name: str) -> Named:
        if name not in self._shelf:
            raise EngineError(
                f"no prompt is called '{name}'", f"one of {few(self._shelf)}", "put it into the server's directory"
            )
        return self._shelf[name]

    def _text(self, tokens: Sequence[int], *, bare: bool) -> list[int]:
        text = [int(token) for token in tokens]
        if not text:
            raise EngineError("no text", "one token at least", "send a text")
        if bare and text[0] in {one.tokens[0] for one in self._shelf.values()}:
            raise EngineError(
                f"a text that begins with {text[0]}, which is how prompts begin",
                "a text that does not",
                "serve with another marker",
            )
        return text
