"""What ``--json`` prints: one type for each command, and the table of them in bridge/README.md.

The types are the documentation: each key has its type and what it is. `markdown` makes the table of them, and
tests/bridge/test_json.py holds what the commands print to them. Certificates have a specification of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType
from typing import Annotated, Any, Literal, NewType, TypedDict, get_args, get_origin, get_type_hints, is_typeddict

#: See "The certificate" in bridge/README.md.
Certificate = NewType("Certificate", dict[str, Any])
Digests = dict[str, str]


class Step(TypedDict):
    """One thing that a conversion does."""

    name: Annotated[str, "of the pass, or of an accepted condition"]
    exactness: Annotated[Literal["exact", "rounding", "conditional"], "what it means for the result"]
    note: Annotated[str, "the same for a person"]


class Obstacle(TypedDict):
    """One reason why a conversion is refused."""

    name: Annotated[str, "a short identifier, such as `positions`"]
    reason: Annotated[str, "the same for a person"]
    remedy: Annotated[str, "the way out"]
    acceptable: Annotated[bool, "whether `--accept NAME` is a way out"]
    accidental: Annotated[bool, "whether another prompt of the same kind need not meet it"]


class Refusal(TypedDict):
    """Why a command was refused."""

    kind: Annotated[str, "class of the error in `softbridge.errors`"]
    found: Annotated[str, "what was met"]
    expected: Annotated[str, "what would have been right"]
    remedy: Annotated[str, "what to do"]
    obstacles: Annotated[list[Obstacle], "of a conversion that cannot be exact"]


class Refused(TypedDict):
    """What every command prints with exit status 2."""

    refused: Annotated[Refusal, "the same as on standard error"]


class Digest(TypedDict):
    """What is known of a file that was read."""

    sha256: Annotated[str, "hexadecimal"]


class Numbers(TypedDict):
    """The numbers of a part."""

    length: Annotated[int, "virtual tokens P"]
    shape: Annotated[list[int], "of one tensor: [P, H] of vectors, [K, P, D] of keys"]
    dtype: Annotated[str, "as NumPy names it"]
    std: Annotated[float, "standard deviation"]
    largest: Annotated[float, "largest magnitude"]


class Part(Numbers, total=False):
    """A part of a prompt. Which keys there are depends on its kind."""

    kind: Annotated[Literal["input", "prefix", "adaption"], "always there"]
    stack: Annotated[str, "`encoder` or `decoder`, of an input prompt"]
    entry: Annotated[str, "`before` or `after` the embedding block, of an input prompt"]
    placement: Annotated[str, "where it stands in a sequence, of an input prompt"]
    scale: Annotated[float, "by what its model multiplies the vectors, of an input prompt; where releases differ"]
    site: Annotated[str, "`self`, `encoder` or `cross`, of the others"]
    layers: Annotated[list[int], "that have it, of the others"]
    joins: Annotated[str, "what it is added to, of an adaption prompt"]


class Standing(TypedDict):
    """How a prompt counts positions."""

    start: Annotated[dict[str, int], "where the first real token of each stack stands"]
    relative_bias: Annotated[Literal["plain", "skewed"], "of self-attention"]
    window: Annotated[Literal["slides", "pinned"], "whether the prompt leaves a sliding window"]


class Positions(Standing, total=False):
    """How a prompt counts positions, and from where on it has no relative bias."""

    unbiased_from: Annotated[
        dict[str, int],
        "the layer of each stack from which on self-attention has no relative bias; only where there is one",
    ]


class Task(TypedDict):
    """Whose task a multitask prompt is."""

    number: Annotated[int, "from 0"]
    of: Annotated[int, "how many there are"]


class Recognised(TypedDict):
    """`inspect`: what the files are."""

    path: Annotated[str, "as given"]
    format: Annotated[str, "name of the format"]
    files: Annotated[dict[str, Digest], "those that were read"]
    others: Annotated[list[str], "those that were not"]
    needs_base: Annotated[str | None, "why more can be said with `--base` only; then the keys below are not there"]


class Inspected(Recognised, total=False):
    """`inspect`: what the files are, and what the prompt in them is."""

    conditions: Annotated[list[str], "under which it was written"]
    base: Annotated[str | None, "name of the base model, where it is recorded"]
    parts: Annotated[list[Part], "of the prompt"]
    positions: Positions
    head: Annotated[list[str], "names of the head's tensors"]
    training: Annotated[str | None, "kind of the parameterisation with which training can go on"]
    task: Task | None
    notes: Annotated[list[str], "what the reader had to say"]
    digest: Annotated[str, "of the prompt"]


class Source(TypedDict):
    """What was read."""

    path: str
    format: str


class Written(TypedDict):
    """What was written."""

    path: str
    format: str
    files: Annotated[dict[str, int], "sizes in bytes, without the manifest"]


class PullRequest(TypedDict):
    """What `convert --push-to-hub` opened."""

    url: Annotated[str | None, "null where the repository has all of it already"]
    replaces: Annotated[list[str], "files that the main branch has, too"]


class Converted(TypedDict):
    """`convert`."""

    source: Source
    target: Written
    written: Annotated[bool, "false with `--dry-run`"]
    steps: list[Step]
    advice: Annotated[list[str], "what to set in the target's own toolkit"]
    certificate: Annotated[Certificate | None, "with `--verify`"]
    served: Annotated[dict[str, Any] | None, "what the target's server answered (`softbridge/serving/1`)"]
    unserved: Annotated[str, "why the target's server did not answer, or empty"]
    replaced: Annotated[bool, "whether the source has a model card, which the new one replaces"]
    pull_request: Annotated[PullRequest | None, "with `--push-to-hub`"]


class Again(TypedDict):
    """`verify` of a certificate."""

    holds: Annotated[bool, "whether nothing changed, and the two are the same"]
    recorded: Annotated[str, "the verdict in the file"]
    changes: Annotated[list[str], "what is not as it was"]
    certificate: Annotated[Certificate, "the new one"]


class Probed(TypedDict):
    """`probe`."""

    path: Annotated[str, "what was run"]
    output: Annotated[str, "the recording that was written"]
    engine: Annotated[str, "that ran it"]
    instead_of: Annotated[str, "why not its own toolkit, or empty"]
    loaded: Annotated[bool, "whether the toolkit's own loader read the files"]
    digest: Annotated[str, "of the prompt"]
    files: Annotated[Digests, "sha256 of each"]
    base: Annotated[str | None, "name of the base model"]
    weights: Annotated[str, "with which it was run"]


class Explained(TypedDict):
    """`explain` and `matrix`: one conversion of one method for one base model."""

    base: Annotated[str, "name of the base model, or of a family"]
    source: Annotated[str, "format that is read"]
    target: Annotated[str, "format that is written"]
    method: str
    outcome: Literal["exact", "rounding", "conditional", "impossible"]
    steps: list[Step]
    obstacles: list[Obstacle]
    held: Annotated[bool, "whether the source's format can hold a prompt of the method"]


class FormatRow(TypedDict):
    """`formats`: one of them."""

    name: str
    summary: str
    encodings: Annotated[list[str], "for `--encoding`; none: the format is read only"]
    inputs: Annotated[list[str], "stack and place of the input prompts that it can hold"]
    prefixes: Annotated[list[str], "sites of the prefixes that it can hold"]
    adaption: Annotated[list[str], "what the adaption prompts that it can hold are added to"]


class EngineRow(TypedDict):
    """`engines`: one of them."""

    name: str
    summary: str
    runs: Annotated[str, "`transformers`, or `its own model`"]
    unavailable: Annotated[str | None, "why it cannot be used here"]


class PluginRow(TypedDict):
    """`plugins`: what one of them brings through one hook."""

    plugin: str
    hook: str
    brings: list[str]


class Untested(TypedDict):
    """A library that is newer than the tests."""

    distribution: str
    installed: str
    newest: Annotated[str, "that the tests ran with"]


class Defect(TypedDict):
    """A known defect of a toolkit."""

    id: str
    toolkit: str
    summary: str


class Diagnosed(TypedDict):
    """`doctor`."""

    platform: str
    versions: Annotated[dict[str, str], "of what can change a result"]
    untested: list[Untested]
    engines: Annotated[dict[str, str | None], "why each cannot be used here"]
    defects: Annotated[list[Defect], "that are met here, or concern the prompt"]
    prompt: Annotated[str | None, "what was asked about, in a line"]
    self_checks: Annotated[list[dict[str, Any]], "verdicts of the engines on themselves (`softbridge.selfcheck`)"]


class NamedWords(TypedDict):
    """`words`: one virtual token."""

    virtual_token: Annotated[int, "from 0"]
    ids: Annotated[list[int], "of the nearest words, nearest first"]
    cosines: list[float]


class Words(NamedWords, total=False):
    """`words`: one virtual token, with the words themselves if the base model has a tokenizer."""

    words: list[str]


class Reason(TypedDict):
    """Why a checkpoint of many was not converted."""

    kind: Annotated[str, "class of the error in `softbridge.errors`, or of a kind of its own"]
    found: str
    expected: str
    remedy: str


class Failure(TypedDict):
    """A checkpoint of many that somebody has to look at."""

    path: Annotated[str, "from the source folder"]
    verdict: Annotated[str, "`refused`, `differs`, `defect` or `pending`"]
    reason: Reason | None


class Summary(TypedDict):
    """What became of many checkpoints."""

    schema: Annotated[str, "`softbridge/collection-summary/1`"]
    manifest: Annotated[str | None, "the file that says it of each, or null in a dry run"]
    counts: Annotated[dict[str, int], "by verdict"]
    failures: list[Failure]
    exit_status: int


class Collected(Summary):
    """`convert --recursive`."""

    taken_over: Annotated[int, "how many an earlier run had done"]


class Merged(Summary):
    """`merge-manifests`."""

    missing: Annotated[list[str], "in no manifest, or not reached"]
    double: Annotated[list[str], "in two manifests, alike"]


class Similar(TypedDict):
    """`similar`."""

    measure: str
    prompts: Annotated[list[str], "as given"]
    similarity: Annotated[list[list[float]], "a row for each prompt"]


class Baked(TypedDict):
    """`bake`."""

    path: str
    tokens: Annotated[dict[str, list[str]], "the words of each prompt"]
    ids: Annotated[dict[str, list[int]], "their numbers"]
    placement: Annotated[dict[str, str], "where they belong in a text"]
    tokenizer: Annotated[bool, "whether the checkpoint has a tokenizer that knows them"]
    in_front: Annotated[str | None, "which of them the tokenizer puts in front of every text"]
    apart: Annotated[float | None, "with `--verify`: how far the checkpoint is from the prompts"]
    effect: Annotated[float | None, "with `--verify`: how far the prompts move the outputs"]


#: Command -> what it prints; with exit status 2, each prints `Refused`.
SCHEMAS: Mapping[str, Any] = {
    "inspect": Inspected,
    "convert": Converted | Collected,
    "verify": Certificate | Again,
    "probe": Probed,
    "compare": Certificate,
    "explain": list[Explained],
    "matrix": list[Explained],
    "doctor": Diagnosed,
    "formats": list[FormatRow],
    "engines": list[EngineRow],
    "plugins": list[PluginRow],
    "demo": Certificate,
    "words": list[Words],
    "similar": Similar,
    "bake": Baked,
    "merge-manifests": Merged,
}


def markdown() -> str:
    """A table of the commands, and one of the types that they name."""
    lines = ["| command | prints |", "|---|---|"]
    lines += [f"| `{command}` | {_named(made)} |" for command, made in SCHEMAS.items()]
    lines += ["", "| type | keys |", "|---|---|"]
    for kind in _kinds():
        keys = (_key(name, value) for name, value in get_type_hints(kind, include_extras=True).items())
        lines.append(f"| {kind.__name__} | {'<br>'.join(keys)} |")
    return "\n".join(lines) + "\n"


def _key(name: str, value: Any) -> str:
    plain, said = get_args(value)[:2] if get_origin(value) is Annotated else (value, "")
    return f"`{name}`: {_named(plain)}" + (f" ({said})" if said else "")


def _kinds() -> list[Any]:
    """The types of objects, each before those that it names."""
    found: dict[str, Any] = {}

    def walk(value: Any) -> None:
        if is_typeddict(value):
            if value.__name__ not in found:
                found[value.__name__] = value
                for one in get_type_hints(value).values():
                    walk(one)
        else:
            for one in get_args(value):
                walk(one)

    walk(Refused)
    for value in SCHEMAS.values():
        walk(value)
    return list(found.values())


def _named(value: Any) -> str:
    """A type in words."""
    if value is Certificate:
        return "certificate"
    if is_typeddict(value):
        return str(value.__name__)
    inner = get_args(value)
    if get_origin(value) is list:
        return f"list of {_named(inner[0])}"
    if get_origin(value) is dict:
        return "object" if inner[1] is Any else f"names -> {_named(inner[1])}"
    if get_origin(value) is Literal:
        return " or ".join(f"`{one}`" for one in inner)
    if inner:
        return " or ".join(map(_named, inner))
    return {str: "text", int: "whole number", float: "number", bool: "true or false", NoneType: "null"}[value]
