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
#: How a zip archive's last record begins, within how many bytes of its end that stands, and how many bytes a member
#: takes in the directory: 46, and its name.
_END, _TAIL, _ENTRY = b"PK\x05\x06", 2**16 + 22, 46 + 128
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


def opened_zip(stream: BinaryIO, what: str) -> zipfile.ZipFile:
    """A zip archive of not too many members, which are counted before zipfile makes an object of each.

    Raises:
        CheckpointError: it has too many.
        zipfile.BadZipFile: it is none; and other kinds of exception, with which zipfile meets malformed archives.
    """
    end = stream.seek(0, io.SEEK_END)
    stream.seek(max(0, end - _TAIL))
    tail = stream.read()
    where = tail.rfind(_END)
    # 12 bytes before it ends, how many bytes the directory has; 2**32 - 1: it is said elsewhere, and far too many.
    directory = int.from_bytes(tail[where + 12 : where + 16], "little") if where >= 0 else 0
    if directory > MEMBERS * _ENTRY:
        raise refusal(f"{what}: a zip archive whose directory has {directory} bytes", f"at most {MEMBERS} members")
    stream.seek(0)
    archive = zipfile.ZipFile(stream)
    if len(archive.infolist()) > MEMBERS:
        raise refusal(f"{what}: a zip archive of {len(archive.infolist())} members", f"at most {MEMBERS}")
    return archive


def _zipped(stream: BinaryIO, path: Path) -> Iterator[tuple[str, int, Callable[[int], bytes]]]:
    with opened_zip(stream, str(path)) as archive:

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
