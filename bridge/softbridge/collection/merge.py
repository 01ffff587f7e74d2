"""The manifests of shards as one, where they are parts of one whole; or what speaks against it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from softbridge import untrusted
from softbridge.collection.record import STEM, SUFFIX, Manifest, Record, Shard, exit_status, listing, unpack
from softbridge.errors import CheckpointError, SoftbridgeError, few


@dataclass(frozen=True)
class Merged:
    """Manifests of shards as one.

    Attributes:
        manifest: their records together.
        missing: what is not there yet, in words: shards, and checkpoints that a shard did not reach.
        double: paths of which two manifests say the same.
    """

    manifest: Manifest
    missing: tuple[str, ...]
    double: tuple[str, ...]

    @property
    def exit_status(self) -> int:
        """That of the records; 2 if something is missing and nothing is worse."""
        return exit_status([record.verdict for record in self.manifest.records]) or 2 * bool(self.missing)


def merge_manifests(paths: Sequence[str | Path], output: str | Path, *, overwrite: bool = False) -> Merged:
    """Join the manifests of shards, and write them as one.

    Args:
        paths: manifests, or folders with those of shards.
        output: the file to write.
        overwrite: replace it, if it is there.

    Raises:
        CheckpointError: a file is not a manifest, or there is none.
        SoftbridgeError: they contradict each other; nothing is written. What is missing is no contradiction.
        OutputError: the output is there already, or cannot be written.
    """
    files = [file for path in map(Path, paths) for file in _files_of(path)]
    given = {file: unpack(file) for file in dict.fromkeys(files)}
    wrong = [*_unlike(given), *_disagreeing(given)]
    if wrong:
        raise SoftbridgeError(
            f"manifests that are not parts of one whole: {'; '.join(wrong)}",
            "one run on one folder, with one set of options, whose list of checkpoints is shared out once",
            "run the shards that are another way again, and merge what they write",
        )
    first = next(iter(given.values()))
    seen = Counter(record.path for manifest in given.values() for record in manifest.records)
    records = {record.path: record for manifest in given.values() for record in manifest.records}
    there = {manifest.shard.number for manifest in given.values()}
    absent = [f"shard {n}/{first.shard.of}" for n in range(1, first.shard.of + 1) if n not in there]
    pending = [path for path, record in sorted(records.items()) if record.verdict == "pending"]
    paths_of_all = {"missing": absent} if absent else {}
    whole = Manifest(
        first.source,
        first.options,
        Shard(),
        {**first.paths, **paths_of_all},
        [records[path] for path in sorted(records)],
    )
    if not absent and listing(list(records)) != first.paths:
        raise SoftbridgeError(
            f"{len(records)} checkpoints in all shards together, and other ones than the {first.paths.get('count')} of "
            "which each is a part",
            "each of the list in one shard",
            "run the shards again: a manifest was changed after it was written",
        )
    untrusted.write_file(Path(output), whole.pack(), overwrite=overwrite)
    return Merged(whole, (*absent, *pending), tuple(path for path, count in sorted(seen.items()) if count > 1))


def _files_of(path: Path) -> list[Path]:
    """A manifest, or those of shards in a folder."""
    if not path.is_dir():
        return [path]
    found = sorted(path.glob(f"{STEM}.*-of-*{SUFFIX}"))
    if not found:
        raise CheckpointError(f"'{path}', without a manifest of a shard", f"{STEM}.I-of-N{SUFFIX}", "check the path")
    return found


def _unlike(given: dict[Path, Manifest]) -> Iterator[str]:
    """What the manifests say of the whole, where they differ."""
    (first, one), *others = given.items()
    for path, other in others:
        said = {
            "the source": (one.source, other.source),
            "the number of shards": (one.shard.of, other.shard.of),
            "the list of checkpoints": (one.paths, other.paths),
            **{
                f"the option {name}": (one.options.get(name), other.options.get(name))
                for name in sorted({*one.options, *other.options})
            },
        }
        for what, (ours, theirs) in said.items():
            if ours != theirs:
                yield f"{what} is {ours!r:.100} in {first}, and {theirs!r:.100} in {path}"


def _disagreeing(given: dict[Path, Manifest]) -> Iterator[str]:
    """Checkpoints that stand where they do not belong, or of which two manifests say two things."""
    seen: dict[str, tuple[Path, Record]] = {}
    for path, manifest in given.items():
        strange = [record.path for record in manifest.records if not manifest.shard.holds(record.path)]
        if strange:
            yield f"{path} has {few(strange)} of another shard"
        changed = [record.path for record in manifest.records if record.options != manifest.options]
        if changed:
            yield f"{path} has {few(changed)} with other options than it says of all"
        for record in manifest.records:
            other, before = seen.setdefault(record.path, (path, record))
            if before != record:
                yield f"{other} and {path} differ in {record.path}"
