"""Read, lower, write: the main job, and the manifest that travels beside written files.

What a file form has no place for (where real tokens stand, which conditions were accepted) goes into the manifest
``softbridge.json`` beside the files. Toolkits ignore it; softbridge reads it back and its engines act on it. It holds a
digest of every file, so that a manifest left beside other files is noticed and not believed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from softbridge import parts, untrusted
from softbridge.arrays import same_array
from softbridge.base.model import BaseModel
from softbridge.checkpoint.card import BEGINS, model_card
from softbridge.checkpoint.choice import DROPPED, Choice
from softbridge.checkpoint.manifest import CARD, CERTIFICATE, Loaded
from softbridge.checkpoint.publish import PullRequest, check_publishable, publish
from softbridge.checkpoint.read import read
from softbridge.checkpoint.write import advice_for, check_target, is_file_of, prepare, write_files
from softbridge.errors import ArgumentError, BaseModelError, DifferentError, OutputError
from softbridge.lowering.planner import Lowering
from softbridge.lowering.steps import Step, Target
from softbridge.plugin.hookspecs import Format
from softbridge.plugin.registry import format_named
from softbridge.progress import stage
from softbridge.prompt.soft_prompt import Origin, SoftPrompt
from softbridge.untested import warn_of_untested
from softbridge.untrusted import Content
from softbridge.verification import proof, serving
from softbridge.verification.certificate import Certificate
from softbridge.verification.naive_copy import copied
from softbridge.verification.serving import Serving
from softbridge.verification.sides import Pair, claim_of, subjects


@dataclass(frozen=True)
class Report:
    """What a conversion did.

    Attributes:
        source: what was read.
        target: name of the format that was written.
        path: the directory or file that was written.
        lowering: the prompt as it was written, and the steps that led to it.
        advice: what users of the files in the toolkit itself must do.
        certificate: what verification found, if it was asked for.
        files: name -> size in bytes of what was written beside the manifest or, in a dry run, would have been.
        replaced: whether the source has a model card of its own, which was not carried over.
        served: what the server that reads the target's files answered with them, if verification was asked for, and
            such a server can be used here.
        unserved: why it did not answer, if there is such a server.
        pull_request: what was proposed to a repository on the hub.
    """

    source: Loaded
    target: str
    path: Path
    lowering: Lowering
    advice: tuple[str, ...] = ()
    certificate: Certificate | None = None
    files: Mapping[str, int] = field(default_factory=dict)
    replaced: bool = False
    served: Serving | None = None
    unserved: str = ""
    pull_request: PullRequest | None = None

    @property
    def steps(self) -> tuple[Step, ...]:
        return self.lowering.steps


def convert(
    source: str | Path,
    target: str | Path,
    to: str,
    *,
    base: Any = None,
    format: str | None = None,
    accept: Collection[str] = (),
    encoding: str | None = None,
    dtype: str | None = None,
    task: int | None = None,
    part: str | None = None,
    drop: Collection[str] = (),
    trained_on: str | None = None,
    verify: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    push_to_hub: str | None = None,
    create_repo: bool = False,
) -> Report:
    """Convert a checkpoint to another format, and prove on request that it computes the same function.

    Args:
        source: what to read: a file, a directory or an id on the hub; see `read`.
        target: where to write: a directory, or a file for formats of one file.
        to: name of the format to write.
        base: the base model; see `read`. Needed for `verify`.
        format: name of the source's format, recognised by content if None.
        accept: names of accepted conditions.
        encoding: one of the target format's `encodings`, or None for the toolkit's own default.
        dtype: name of the dtype to store the numbers in, None: as they are. The report says what that rounds.
        task: which task of a multitask prompt to convert, alone; the matrices of all tasks stay behind.
        part: which part of a prompt to convert, by its name (`softbridge.parts.name_of`); the others stay behind.
        drop: what of the source is left out; see `read`.
        trained_on: the release of transformers that trained the source, where that matters; see `read`.
        verify: run both through their own toolkits where installed, write the certificate beside the files, and write
            nothing if they differ. Where a server reads the target's files, and is installed, it answers with them,
            and is held to what transformers answers.
        overwrite: replace an existing target.
        dry_run: do all of it, verification too where it is asked for, and write nothing.
        push_to_hub: id of a repository on the hub, ``owner/name``: what is written becomes a pull request there. Its
            main branch is not touched.
        create_repo: make that repository, private, if it does not exist.

    Raises:
        PublishError: the files were written, and the hub did not take them. Before that: it cannot be asked.
        SoftbridgeError: see `read`, `save` and `softbridge.verify`. Nothing is written.
    """
    warn_of_untested()
    if push_to_hub is not None:
        check_publishable(push_to_hub)
    elif create_repo:
        raise ArgumentError(
            "--create-repo, and nothing to push", "a repository to push to", "name it with --push-to-hub, too"
        )
    form = format_named(to)
    if untrusted.hub_id(source) is None:
        _apart(Path(source), Path(target))
    check_target(Path(target), overwrite)  # before the work, and again when it is written
    resolved = None if base is None else BaseModel.resolve(base)
    loaded = read(source, base=resolved, format=format, drop=drop, trained_on=trained_on)
    choice = Choice(format, tuple(drop), trained_on, task, part)
    chosen = choice.of(loaded.prompt)
    with stage("lowering"):
        goal = Target(form.name, form.capabilities, resolved, dtype)
        lowering, content = prepare(chosen, form, goal, accept, encoding)
    lowering = replace(lowering, steps=(*_notes(loaded.prompt), *_said(choice), *lowering.steps))
    single = is_file_of(Path(target), content)
    if single and push_to_hub is not None:
        raise OutputError(f"one file, {target}, to push", "a folder, which has a model card", "name a folder")
    certificate, served, unserved = None, None, ""
    if verify:
        if resolved is None:
            raise BaseModelError(
                "verification was asked for without a base model",
                "the base model's configuration, directory or hub id",
                "give it with --base (base=... in Python)",
            )
        made = Loaded(lowering.prompt, form, Path(target), lowering.steps, dtype, choice, loaded.digests)
        naive = copied(chosen, Target(form.name, form.capabilities, resolved))
        certificate = _certify(loaded, made, content, resolved, naive)
        served, unserved = _served(form, lowering.prompt, resolved, certificate, encoding)
        if not single:
            answered = {} if served is None else {"served": served.to_json()}
            content = {**content, CERTIFICATE: untrusted.json_bytes({**certificate.to_json(), **answered})}
    advice = advice_for(lowering, form, resolved)
    replaced = _digest_of_card(loaded)
    card = None
    if not single:
        card = model_card(
            lowering.prompt,
            form,
            steps=lowering.steps,
            advice=advice,
            encoding=encoding,
            origin=loaded.prompt.origin,
            replaced=replaced,
            verified=_verified(certificate, served),
            repository=push_to_hub,
        )
    pull_request = None
    beside = {} if card is None else {CARD: card}
    if dry_run:
        sizes = {name: len(data) for name, data in {**content, **beside}.items()}
    else:
        with stage(f"writing {target}"):
            written = write_files(
                Path(target), content, lowering, form, resolved, overwrite, loaded, dtype, choice, card
            )
        sizes = {name: written[name].size for name in (*content, *beside)}
        if push_to_hub is not None:
            title = f"Add a soft prompt for {form.name}"
            pull_request = publish(push_to_hub, Path(target), tuple(written), title=title, create=create_repo)
    was = replaced is not None
    return Report(loaded, to, Path(target), lowering, advice, certificate, sizes, was, served, unserved, pull_request)


def _digest_of_card(source: Loaded) -> str | None:
    """sha256 of the model card of somebody else that lies with the source."""
    files = untrusted.Files(source.path)
    theirs = CARD in files and not files.begins(CARD, BEGINS)
    return files.digest(CARD) if theirs else None


def _verified(certificate: Certificate | None, served: Serving | None) -> list[str]:
    """What verification found, a sentence each."""
    found = []
    if certificate is not None:
        sides = {"the source": certificate.source, "the files here": certificate.target}
        ran = (
            f"{name} by {side.engine}" + f" ({side.instead_of})" * bool(side.instead_of) for name, side in sides.items()
        )
        found = [
            certificate.summary(),
            f"run {' and '.join(ran)}, on texts of up to {certificate.longest} tokens; weights: {certificate.weights}",
        ]
    return found if served is None else [*found, served.summary()]


def _said(choice: Choice) -> list[Step]:
    chosen = {"task": choice.task, "part": choice.part}
    return [
        *(
            Step(name, "exact", f"{name} {value}, as asked; others are left out")
            for name, value in chosen.items()
            if value is not None
        ),
        *(Step("drop", "exact", f"left out, as asked: {DROPPED[name]}") for name in choice.drop),
    ]


def _certify(
    source: Loaded, made: Loaded, content: Mapping[str, Content], base: BaseModel, naive: SoftPrompt | None
) -> Certificate:
    """Compare a source with what is about to be written.

    Args:
        source: as it was read.
        made: what was made of it, as it will be read.
        content: its files.
        base: both are run on it.
        naive: the source's numbers, copied.

    Raises:
        DifferentError: source and target are not the same function.
        OutputError: that cannot be judged.
    """
    with tempfile.TemporaryDirectory() as scratch:
        staged = Path(scratch) / "staged"
        written = untrusted.write(staged, content)
        origin = Origin(made.format.name, digests={name: one.sha256 for name, one in written.items()})
        sides: Pair = {
            "source": source,
            "target": replace(made, prompt=replace(made.prompt, origin=origin), path=staged),
        }
        claim, first, second = subjects(claim_of(sides), sides, base)
        certificate = proof.verify_prompts(
            first,
            replace(second, path=str(made.path)),
            base,
            naive=None if naive is None or _same_function(naive, made.prompt) else naive,
            claim=claim,
        )
    if not certificate.same:
        kind = DifferentError if certificate.verdict != "insensitive" else OutputError
        raise kind(
            f"verification found the converted prompt {certificate.verdict}: {certificate.summary()}",
            "the same outputs from source and target",
            "report this as a defect of softbridge, with the two files; nothing was written",
        )
    return certificate


def _served(
    form: Format, prompt: SoftPrompt, base: BaseModel, certificate: Certificate, encoding: str | None
) -> tuple[Serving | None, str]:
    """What the format's server made of the prompt, or why it does not answer; neither, if the format has none.

    Raises:
        DifferentError: the server answers otherwise than transformers.
        OutputError: that cannot be judged.
    """
    server = serving.server_of(form)
    if server is None:
        return None, ""
    reason = server.unavailable() or "; ".join(obstacle.reason for obstacle in server.obstacles(base.config))
    if reason:
        return None, reason
    with stage(f"asking {server.name}"):
        found = serving.judge(form, prompt, base, weights=certificate.claim.weights, encoding=encoding)
    if found.verdict != "served":
        remedies = {
            "different": "report this as a defect of softbridge, with the source and the versions above",
            "insensitive": f"choose a --dtype or --encoding in which {server.name} rounds less, or leave --verify out",
        }
        kind = DifferentError if found.verdict == "different" else OutputError
        raise kind(
            f"verification found the converted prompt {found.summary()}",
            f"the answers of transformers from {server.name}, within {serving.FACTOR:g} times its own noise",
            f"{remedies[found.verdict]}; nothing was written",
        )
    return found, ""


def _same_function(naive: SoftPrompt, right: SoftPrompt) -> bool:
    """Whether copying the numbers would have done."""
    ours, theirs = (parts.named_arrays(replace(prompt, head={}, training=None)) for prompt in (naive, right))
    same = ours.keys() == theirs.keys() and all(same_array(ours[n].astype(theirs[n].dtype), theirs[n]) for n in ours)
    return same and naive.positions == right.positions


def _apart(source: Path, target: Path) -> None:
    """Refuse a target that would replace its own source, or stand inside it."""
    untrusted.check_name(target)
    here, there = source.resolve(), target.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise OutputError(f"{target} is, holds or lies in the source {source}", "a target outside it", "choose another")


def _notes(prompt: SoftPrompt) -> list[Step]:
    """What the reader of the source had to say: parts of the files that no model ever sees, or that were not read."""
    notes = () if prompt.origin is None else prompt.origin.notes or ()
    return [Step("read", "exact", note) for note in notes]
