"""Files within a file: zip, tar, and tar in gzip. Members are read into memory, within a bound, and never extracted."""

from __future__ import annotations

import bz2
import io
import lzma
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
#: How many bytes of an archive belong to none of its members: in all, and for each (headers; torch aligns the data).
_SLACK, _SLACK_EACH = 2**20, 2**12
_PIECE = 2**16
LOCAL = b"PK\x03\x04"


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
                found = list(_zipped(stream, path, what))
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
    members = archive.infolist()
    if len(members) > MEMBERS:
        raise refusal(f"{what}: a zip archive of {len(members)} members", f"at most {MEMBERS}")
    held = sum(member.compress_size for member in members)
    if not held <= end <= held + _SLACK + _SLACK_EACH * len(members):
        raise refusal(
            f"{what}: a zip archive of {end} bytes with members of {held}", "members side by side, and nothing else"
        )
    return archive


def data_of(stream: BinaryIO, member: zipfile.ZipInfo) -> int:
    """At which byte of a zip archive a member's data begins: after its own header, the length of which that says."""
    stream.seek(member.header_offset)
    header = stream.read(30)
    if not header.startswith(LOCAL) or len(header) < 30:
        raise ValueError(f"no header of {short(member.filename)}")
    name, extra = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    return member.header_offset + 30 + name + extra


def _zipped(stream: BinaryIO, path: Path, what: str) -> Iterator[tuple[str, int, Callable[[int], bytes]]]:
    def reader(member: zipfile.ZipInfo) -> Callable[[int], bytes]:
        def read(length: int) -> bytes:
            with path.open("rb") as again:
                again.seek(data_of(again, member))
                content = _unpacked(member, again.read(member.compress_size), length + 1)
            if zlib.crc32(content) != member.CRC:
                raise ValueError("not the bytes that were written")
            return content

        return read

    with opened_zip(stream, what) as archive:
        for member in archive.infolist():
            if not member.is_dir():
                yield member.filename, member.file_size, reader(member)


def _unpacked(member: zipfile.ZipInfo, content: bytes, most: int) -> bytes:
    """The first bytes of what a member holds. zipfile itself unpacks LZMA and bzip2 without a bound."""
    if member.flag_bits & 1:
        raise ValueError("encrypted")
    if member.compress_type == zipfile.ZIP_STORED:
        return content[:most]
    if member.compress_type == zipfile.ZIP_DEFLATED:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, most)
    if member.compress_type == zipfile.ZIP_BZIP2:
        return bz2.BZ2Decompressor().decompress(content, most)
    if member.compress_type != zipfile.ZIP_LZMA or len(content) < 9 or content[2:4] != b"\5\0":
        raise ValueError(f"packed in a way that is not known: {member.compress_type}")
    # APPNOTE of PKWARE, 5.8.8: a version, the length of the properties (5), and LZMA's own: lc, lp and pb in a byte,
    # and how far back it may reach. That is allocated, so it is believed as far as what is read can be.
    settings, reach = content[4], int.from_bytes(content[5:9], "little")
    filters = {
        "lc": settings % 9,
        "lp": settings // 9 % 5,
        "pb": settings // 45,
        "dict_size": max(4096, min(reach, most)),
    }
    machine = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA1, **filters}])
    return machine.decompress(content[9:], most)


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
        if size - archive.offset > _SLACK:
            raise ValueError(f"{size - archive.offset} bytes behind its last member")


def inflated(stream: BinaryIO, limit: int, what: str) -> bytes:
    """What a gzip stream holds.

    Raises:
        CheckpointError: it would be more than `limit` bytes, is damaged or is cut off.
    """
    machine, pieces, length = zlib.decompressobj(wbits=31), [], 0
    try:
        while not machine.eof and (piece := machine.unconsumed_tail or stream.read(_PIECE)):
            pieces.append(machine.decompress(piece, limit + 1 - length))
            length += len(pieces[-1])
            if length > limit:
                raise refusal(
                    f"{what}: would be more than {limit} bytes unpacked", f"at most {EXPANSION} times its size"
                )
    except zlib.error as error:
        raise refusal(f"{what}: not readable as gzip: {error}", "a whole gzip stream") from error
    if not machine.eof:
        raise refusal(f"{what}: a gzip stream that is cut off", "a whole gzip stream")
    if machine.unused_data or stream.read(1):
        raise refusal(f"{what}: more behind the end of its gzip stream", "one gzip stream")
    return b"".join(pieces)
