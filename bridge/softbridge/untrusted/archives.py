"""Files within a file: zip, tar, and tar in gzip. Members are read into memory, within a bound, and never extracted."""

from __future__ import annotations

import io
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Literal

from softbridge.errors import CheckpointError
from softbridge.untrusted.claims import MEMBERS, is_safe_name, refusal, short

Archive = Literal["zip", "tar", "gzip"]

GZIP = b"\x1f\x8b\x08"
#: Where a tar file says that it is one.
USTAR = slice(257, 262)
#: To how many times its size, and how many bytes beyond that, an archive may be unpacked. Numbers hardly shrink.
EXPANSION, ALLOWANCE = 32, 2**24


def members_of(path: Path, kind: Archive, what: str) -> dict[str, Callable[[], bytes]]:
    """Name -> what reads the member, of the regular files in an archive.

    Raises:
        CheckpointError: the archive is malformed, or would be unpacked to more than it may be.
    """
    size = path.stat().st_size
    limit = EXPANSION * size + ALLOWANCE
    try:
        with path.open("rb") as stream:
            if kind == "zip":
                found = list(_zipped(stream, path))
            elif kind == "gzip":
                content = inflated(stream, limit, what)
                found = list(_tarred(io.BytesIO(content), len(content), lambda: io.BytesIO(content)))
            else:
                found = list(_tarred(stream, size, lambda: path.open("rb")))
    except CheckpointError:
        raise
    except Exception as error:  # zipfile and tarfile raise many kinds of exception on malformed archives
        raise refusal(f"{what}: not readable as an archive: {repr(error)[:200]}", "a whole archive") from error
    if len({name for name, _, _ in found}) != len(found) or not all(is_safe_name(name) for name, _, _ in found):
        raise refusal(f"{what}: members {short([name for name, _, _ in found])}", "relative names, each once")
    if sum(length for _, length, _ in found) > limit:
        raise refusal(f"{what}: members that would be more than {limit} bytes", f"at most {EXPANSION} times its size")
    return {name: _guarded(read, length, f"{what}: {short(name)}") for name, length, read in found}


def _guarded(read: Callable[[int], bytes], length: int, what: str) -> Callable[[], bytes]:
    kept: list[bytes] = []

    def guarded() -> bytes:
        if not kept:
            try:
                content = read(length)
            except Exception as error:  # as above, and what decompressors raise
                raise refusal(f"{what}: not readable: {repr(error)[:200]}", "a whole archive") from error
            if len(content) != length:
                raise refusal(f"{what}: {len(content)} bytes, where {length} were announced", "a whole archive")
            kept.append(content)
        return kept[0]

    return guarded


def _zipped(stream: BinaryIO, path: Path) -> Iterator[tuple[str, int, Callable[[int], bytes]]]:
    with zipfile.ZipFile(stream) as archive:
        if len(archive.infolist()) > MEMBERS:
            raise ValueError(f"{len(archive.infolist())} members")

        def reader(member: zipfile.ZipInfo) -> Callable[[int], bytes]:
            def read(length: int) -> bytes:
                with zipfile.ZipFile(path) as again, again.open(member) as content:
                    return content.read(length + 1)

            return read

        for member in archive.infolist():
            if not member.is_dir():
                yield member.filename, member.file_size, reader(member)


def _tarred(
    stream: BinaryIO, size: int, reopen: Callable[[], BinaryIO]
) -> Iterator[tuple[str, int, Callable[[int], bytes]]]:
    def reader(offset: int) -> Callable[[int], bytes]:
        def read(length: int) -> bytes:
            with reopen() as again:
                again.seek(offset)
                return again.read(length)

        return read

    with tarfile.open(fileobj=stream, mode="r:") as archive:
        for number, member in enumerate(archive):
            if number >= MEMBERS:
                raise ValueError(f"more than {MEMBERS} members")
            if member.isreg() and not member.issparse():
                if member.offset_data + member.size > size:
                    raise ValueError(f"{short(member.name)} reaches beyond the file")
                yield member.name.removeprefix("./"), member.size, reader(member.offset_data)


def inflated(stream: BinaryIO, limit: int, what: str) -> bytes:
    """What a gzip stream holds.

    Raises:
        CheckpointError: it would be more than `limit` bytes, is damaged or is cut off.
    """
    machine = zlib.decompressobj(wbits=31)
    try:
        content = machine.decompress(stream.read(), limit + 1)
    except zlib.error as error:
        raise refusal(f"{what}: not readable as gzip: {error}", "a whole gzip stream") from error
    if len(content) > limit:
        raise refusal(f"{what}: would be more than {limit} bytes unpacked", f"at most {EXPANSION} times its size")
    if not machine.eof:
        raise refusal(f"{what}: a gzip stream that is cut off", "a whole gzip stream")
    return content
