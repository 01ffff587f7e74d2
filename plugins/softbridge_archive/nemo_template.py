"""Where the templates of NeMo's tasks have their virtual tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from softbridge.arrays import Array
from softbridge.errors import CheckpointError
from softbridge.prompt import Positions, SoftPrompt
from softbridge.template import Field, Piece, Template, Virtual

#: In a template: the n-th group of vectors, or a text by name.
PLACES = re.compile(r"<\|VIRTUAL_PROMPT_(\d+)\|>|\{(\w+)\}")


def templates_of(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What model_config.yaml says of each task, by its name."""
    told = config.get("task_templates")
    return {str(one.get("taskname")): one for one in (told if isinstance(told, list) else []) if isinstance(one, dict)}


def placed(prompt: SoftPrompt, tasks: Mapping[str, Array], config: Mapping[str, Any]) -> SoftPrompt:
    """The prompt where the templates of its tasks have it: in front of the text, or in places among words.

    Fixed words, which only the tokenizer can encode, are fields then, ``words_0``, ``words_1``, ..., and ``bos``.

    Raises:
        CheckpointError: a task has no template, or one of other vectors; or they differ and are not all in front.
    """
    assert prompt.origin is not None
    known, data = templates_of(config), config.get("data")
    begun = isinstance(data, dict) and data.get("add_bos") is True
    (part,) = prompt.inputs
    try:
        texts = {task: str(known[task]["prompt_template"]) for task in tasks}
        templates = [Template(tuple(_pieces(texts[task], known[task].get("virtual_token_splits")))) for task in tasks]
        if [template.length for template in templates] != [len(rows) for rows in tasks.values()]:
            raise ValueError(f"of {', '.join(str(template.length) for template in templates)} virtual tokens")
        if all(isinstance(t.pieces[0], Virtual) and t.pieces[0].count == t.length for t in templates):
            moved = replace(part, placement="after-first-token" if begun else part.placement)
            positions = prompt.positions
        elif any(template != templates[0] for template in templates):
            raise ValueError("they differ, and are not all in front")
        else:
            template = Template((*([Field("bos")] if begun else []), *templates[0].pieces))
            moved, positions = replace(part, placement="template", template=template), Positions({part.stack: 0})
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"templates that do not fit the vectors of {', '.join(tasks)}: {error!r:.200}",
            "for each task a template with as many virtual tokens as it has vectors; all in front, or all the same",
            "correct task_templates, or leave one task in the file",
        ) from error
    notes = [f"task {task}: its template is {text!r:.200}, which the caller writes" for task, text in texts.items()]
    origin = replace(prompt.origin, notes=(*(prompt.origin.notes or ()), *notes))
    return replace(prompt, parts=(moved,), positions=positions, origin=origin)


def _pieces(text: str, splits: Any) -> list[Piece]:
    pieces: list[Piece] = []
    at = words = 0
    for match in (*PLACES.finditer(text), None):
        between = text[at : match.start() if match else None]
        if between.strip():
            pieces.append(Field(f"words_{words}"))
            words += 1
        if match:
            at = match.end()
            name = f"{match[2]}_text" if match[2] in ("label", "mask") else match[2]  # these mean something in a batch
            pieces.append(Virtual(splits[int(match[1])]) if match[1] else Field(name))
    return pieces
