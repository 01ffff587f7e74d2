"""The model card beside written files: what the prompt is, where it is from, how it was verified, how it is loaded.

Names and notes in it come from files that nobody trusts. In the front matter stands nothing of them but the id of a
base model; in the text each is a code span, or has every character escaped that Markdown or HTML acts on.

A card is there to be edited, so that no digest covers it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from softbridge import untrusted
from softbridge.checkpoint.manifest import CARD, CERTIFICATE, MANIFEST, names_of
from softbridge.lowering.steps import Step
from softbridge.plugin.hookspecs import Format, Introducing
from softbridge.plugin.optional import able
from softbridge.plugin.snippet import own_program
from softbridge.prompt.part import AdaptionPrompt, InputPrompt, Part
from softbridge.prompt.soft_prompt import Origin, SoftPrompt
from softbridge_compat import versions

#: What a card of ours begins with: a reader that looks for its toolkit's own card lets it be.
BEGINS = b"---\n# softbridge/card/1\n"
#: What stands for a base model that nobody named.
UNNAMED = "path/to/base"
#: What Markdown, its usual extensions (links of bare addresses, emoji, formulas) or HTML may act on within a line, and
#: what makes a list or a heading of one.
_ACTS = re.compile(r"[\\`*_\[\]<>#|&~@$]|:(?=[\w/+-])|(?<=www)\.|(?<=WWW)\.|^[-+=]")
_NUMBERED = re.compile(r"^(\d+)(?=[.)])")
#: A repository on the hub, as the hub lets them be named.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def model_card(
    prompt: SoftPrompt,
    form: Format,
    *,
    steps: Sequence[Step] = (),
    advice: Sequence[str] = (),
    encoding: str | None = None,
    origin: Origin | None = None,
    replaced: str | None = None,
    verified: Sequence[str] = (),
    repository: str | None = None,
) -> bytes:
    """The card of a prompt, as a README.md; the same prompt has always the same.

    Args:
        prompt: as it is written.
        form: in which.
        steps: that led to it.
        advice: what a caller of the toolkit must do.
        encoding: how the format stores it.
        origin: what it was converted from.
        replaced: sha256 of the source's own card, which this one does not continue.
        verified: what was found when it was compared with its source, a sentence each.
        repository: id of the one on the hub that it is written for.
    """
    from huggingface_hub import ModelCardData

    introducing = able(form, Introducing)
    base = hub_base(prompt)
    data = ModelCardData(
        library_name="softbridge" if introducing is None else introducing.library,
        base_model=base,
        base_model_relation=None if base is None else "adapter",
        tags=["soft-prompt", *sorted({_method(part)[0] for part in prompt.parts}), "softbridge"],
    )
    geometry, path, named = prompt.base.geometry, repository or ".", prompt.base.name or UNNAMED
    if introducing is None:
        code = own_program(prompt, geometry, path, named)
    else:
        code = introducing.snippet(prompt, geometry, path=path, base=named, encoding=encoding)
    what = " and ".join(dict.fromkeys(_method(part)[1] for part in prompt.parts))
    name = prompt.base.name
    lines = [
        f"# A soft prompt: {what}",
        "",
        *_listed(
            *(_described(part) for part in prompt.parts),
            f"base model: {'not recorded' if name is None else code_span(name)}"
            + ("" if geometry is None else f", of type {code_span(geometry.model_type)}"),
            f"format: {code_span(form.name)}",
            *([f"head, for the task at hand: {', '.join(map(code_span, prompt.head))}"] if prompt.head else ()),
            *([] if prompt.training is None else [f"training can go on: {code_span(prompt.training.kind)}"]),
        ),
        "## Where it is from",
        "",
        *_listed(*_provenance(origin, steps, replaced)),
        "## How it was verified",
        "",
        *_listed(*(map(prose, verified) if verified else ("not verified",))),
        "## How to load it",
        "",
        f"From {'this folder' if repository is None else 'the hub'}"
        + (":" if base is not None else "; `base` is where the base model, with its tokenizer, lies on your machine:"),
        "",
        "```python",
        code,
        "```",
        "",
        *(["It is this prompt only if you", "", *_listed(*map(prose, advice))] if advice else []),
    ]
    front = BEGINS + data.to_yaml(line_break="\n").encode() + b"\n---\n\n"
    return front + "\n".join(lines).rstrip("\n").encode() + b"\n"


def hub_base(prompt: SoftPrompt) -> str | None:
    """The base model's id on the hub, if that is what its name can be."""
    name = prompt.base.name
    known = name is not None and _HUB_ID.fullmatch(name) is not None and untrusted.hub_id(name) is not None
    return name if known else None


def code_span(text: str) -> str:
    """Any text as code in Markdown: nothing in it acts, and what cannot be seen is named."""
    visible = _visible(text) or " "
    longest = max((len(run) for run in re.findall("`+", visible)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence}{' ' if longest else ''}{visible}{' ' if longest else ''}{fence}"


def prose(text: str) -> str:
    """Any text as one paragraph of Markdown: nothing in it acts, and what cannot be seen is named."""
    return _NUMBERED.sub(r"\1\\", _ACTS.sub(r"\\\g<0>", _visible(text).strip()))


def _visible(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _listed(*items: str) -> Iterator[str]:
    yield from (f"- {item}" for item in items)
    yield ""


def _method(part: Part) -> tuple[str, str]:
    """A tag, and in words."""
    if isinstance(part, InputPrompt):
        return "prompt-tuning", "vectors in the input (prompt tuning)"
    if isinstance(part, AdaptionPrompt):
        return "llama-adapter", "vectors beside attention (LLaMA-Adapter)"
    return "prefix-tuning", "keys and values in attention (prefix tuning)"


def _described(part: Part) -> str:
    (_, first), *_ = part.arrays()
    dtype = code_span(str(first.dtype))
    if isinstance(part, InputPrompt):
        width = part.vectors.shape[1]
        return f"{part.length} virtual tokens in the {part.stack}'s input, {part.placement}; {width} wide, in {dtype}"
    layers = list(part.layers)
    first_layers = layers == list(range(len(layers)))
    which = f"layers 0 to {layers[-1]}" if first_layers else f"layers {', '.join(map(str, layers))}"
    return f"{part.length} virtual tokens in attention ({part.site}), in {which}, in {dtype}"


def _provenance(origin: Origin | None, steps: Sequence[Step], replaced: str | None) -> Iterator[str]:
    if origin is not None:
        files = "".join(f"\n  - {code_span(name)}, sha256 `{digest}`" for name, digest in origin.digests.items())
        yield f"read from files in the format {code_span(origin.format)}{':' if files else ''}{files}"
    yield f"written by softbridge {versions().get('softbridge', 'of an unknown version')}"
    yield from (f"{step.name}, {step.exactness}: {prose(step.note)}" for step in steps)
    conditions = names_of(steps, "conditional")
    yield f"conditions that were accepted: {', '.join(conditions) or 'none'}"
    if replaced is not None:
        yield f"the source has a model card of its own ({CARD}, sha256 `{replaced}`), which this one does not continue"
    yield f"`{MANIFEST}` has the same for a program, and, if it was verified, `{CERTIFICATE}` all that was compared"
