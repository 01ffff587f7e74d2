"""A user's own texts for verification, as token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from softbridge.errors import BaseModelError, CheckpointError
from softbridge.untrusted import LIMIT, parse_json

#: No more is run: the comparison is of functions, and a few texts show a difference that many would.
MOST_TEXTS = 16
MOST_TOKENS = 512


def read_texts(path: Path, base: str) -> list[list[int]]:
    """Token ids of a file's texts: one on each line, for the base model's tokenizer, or JSON ``{"ids": [[...], ...]}``.

    Raises:
        CheckpointError: the file cannot be read, or holds no texts.
        BaseModelError: the base model has no tokenizer.
    """
    try:
        with path.open("rb") as stream:
            content = stream.read(LIMIT + 1)
        if len(content) > LIMIT:
            raise ValueError(f"more than {LIMIT} bytes")
        lines = [line for line in content.decode("utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a NUL in the path
        raise CheckpointError(
            f"{path} cannot be read: {error}", "one text on each line, in UTF-8", "check the path"
        ) from error
    if lines and lines[0].lstrip().startswith("{"):
        found = parse_json(content, str(path)).get("ids")
        texts = found if isinstance(found, list) else []
        if not all(isinstance(text, list) and all(type(t) is int and t >= 0 for t in text) for text in texts):
            texts = []
    else:
        texts = _tokenized(lines, base)
    texts = [text[:MOST_TOKENS] for text in texts if text][:MOST_TEXTS]
    if not texts:
        raise CheckpointError(f"{path} holds no texts", "at least one", "write one text on each line")
    return texts


def tokenizer_of(base: str) -> Any:
    """The base model's tokenizer.

    Raises:
        BaseModelError: it has none.
    """
    from transformers import AutoTokenizer

    try:
        folder = str(Path(base).parent) if base.endswith(".json") else base
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)  # else it asks on the terminal
    except Exception as error:  # tokenizers raise what they like
        reason = str(error).strip().partition("\n")[0]
        raise BaseModelError(
            f"the base model '{base}' has no tokenizer: {reason:.200}",
            "a directory or a hub id with the model's tokenizer",
            'give the texts as token ids: a JSON file {"ids": [[...], ...]}',
        ) from error


def _tokenized(lines: list[str], base: str) -> list[list[int]]:
    tokenizer = tokenizer_of(base)
    return [list(tokenizer(line)["input_ids"]) for line in lines]
