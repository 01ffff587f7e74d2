"""A prompt as one HTML page: how long its vectors are, beside the model's own, how alike, and next to which words."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from softbridge.arrays import Array
from softbridge.base.model import BaseModel
from softbridge.checkpoint.read import load
from softbridge.cli.html import Row, decades, document, figure, heatmap, plot, table_of, text_of
from softbridge.cli.tables import prompt_table, rows_table
from softbridge.errors import BaseModelError
from softbridge.tools.nearest import Neighbours
from softbridge.tools.portrait import SHARES, WORDS, Picture, portrait
from softbridge.verification.texts import tokenizer_of

#: Beyond so many times the length of the model's own keys, attention is likely to see little else.
LOUD = 3.0


def drawn(found: Mapping[str, Any], base: str | None) -> str:
    """The page of what `softbridge.inspect` found, with what the base model shows of itself, if it has weights.

    Raises:
        SoftbridgeError: the prompt cannot be read without its base model.
    """
    prompt = load(found["path"], base=base, format=found["format"])
    model, tokenizer, note = None, None, ""
    if base is not None:
        import torch

        try:
            model = BaseModel.resolve(base).weights(torch.float32)
            tokenizer = tokenizer_of(base)
        except BaseModelError as error:  # without weights there is less to see, without a tokenizer words are ids
            note = error.found
    return portrait_page(found, portrait(prompt, model, tokenizer), note)


def portrait_page(found: Mapping[str, Any], pictures: Sequence[Picture], note: str = "") -> str:
    """The page.

    Args:
        found: what `softbridge.inspect` returns.
        pictures: of each part.
        note: what could not be shown, and why; or nothing.
    """
    content = json.dumps(found, indent=2, sort_keys=True)
    return document(
        f"softbridge: {found['path']}",
        (
            "<h1>softbridge inspect</h1>",
            f"<p>{text_of(found['path'])}</p>",
            *map(table_of, prompt_table(dict(found)).renderables),
            *([f"<p>{text_of(note)}</p>"] if note else []),
            *(line for picture in pictures for line in _drawn(picture)),
            f"<details><summary>JSON</summary><pre>{escape(content)}</pre></details>",
        ),
    )


def _drawn(picture: Picture) -> Iterator[str]:
    length = len(picture.cosines)
    tokens = range(length)
    yield f"<h2>{text_of(picture.name)}: {length} virtual tokens</h2>"
    yield _verdict(picture)
    for what, norms in picture.norms.items():
        yield f"<h3>Length of {what}</h3>"
        yield _lengths(what, norms, picture)
    yield '<div class="pair">'
    if picture.layers:
        for what, norms in picture.norms.items():
            caption = f"length of {what}: a row for each layer, a column for each token; full is {norms.max():.3g}"
            yield figure(heatmap(norms, picture.layers, tokens, float(norms.max())), caption)
    caption = "cosine of two virtual tokens; full is 1, the other colour is below 0"
    yield figure(heatmap(picture.cosines, tokens, tokens, 1.0), caption)
    yield "</div><h3>Singular values</h3>"
    most = max(map(len, picture.spectrum.values()))
    whole = [[*map(float, values), *[None] * (most - len(values))] for values in picture.spectrum.values()]
    rows: list[Row] = [(str(number + 1), tuple(values[number] for values in whole)) for number in range(most)]
    yield _plot(rows, tuple(picture.spectrum), "of the virtual tokens as rows: few large ones mean few directions")
    if picture.words is not None:
        yield "<h3>Nearest words</h3>"
        yield table_of(rows_table(("virtual token", "nearest, and its cosine"), _nearest(picture.words)))


def _lengths(what: str, norms: Array, picture: Picture) -> str:
    """The lengths of one kind of vector, beside those of the model's own."""
    own = None if what not in picture.own else [_three(shares) for shares in picture.own[what]]
    rows: list[Row] = []
    if picture.layers:
        said = "by layer, from the shortest virtual token to the longest, with a dot at the median"
        for place, layer in enumerate(picture.layers):
            ours = _three((norms[place].min(), np.median(norms[place]), norms[place].max()))
            rows.append((str(layer), (ours, None if own is None else own[place])))
    else:
        said = "by virtual token"
        rows += [(str(token), (float(norm), None)) for token, norm in enumerate(norms[0])]
        rows += [] if own is None else [("own", (None, own[0]))]
    if own is None:
        return _plot([(label, values[:1]) for label, values in rows], (f"the prompt's {what}",), said)
    said += f"; the model's own, of {WORDS} random words, from the {SHARES[0]}th to the {SHARES[-1]}th percentile"
    return _plot(rows, (f"the prompt's {what}", f"the model's own {what}"), said)


def _three(values: Iterable[Any]) -> tuple[float, float, float]:
    least, middle, largest = map(float, values)
    return least, middle, largest


def _plot(rows: Sequence[Row], series: Sequence[str], caption: str) -> str:
    return figure(plot(rows, series, (), decades(value for _, values in rows for value in values)), caption)


def _verdict(picture: Picture) -> str:
    if picture.louder is None:
        return f"<p>not compared with the model's own: {text_of(picture.unknown)}</p>"
    what = "key" if "keys" in picture.own else "vector"
    said = f"a median {what} is {picture.louder:.2g} times as long as the model's own"
    said += ", in the layer where this is the most" if picture.layers else ""
    loud = picture.louder > LOUD
    said += ": it may drown the text" if loud else ""
    return f'<p class="verdict {"not" if loud else "same"}">{text_of(said)}</p>'


def _nearest(words: Neighbours) -> list[list[object]]:
    names = words.ids.tolist() if words.words is None else [[repr(one) for one in row] for row in words.words]
    return [
        [token, ", ".join(f"{name} {cosine:.2f}" for name, cosine in zip(row, cosines, strict=True))]
        for token, (row, cosines) in enumerate(zip(names, words.similarities.tolist(), strict=True))
    ]
