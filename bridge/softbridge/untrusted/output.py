"""Where output is written: a folder or a file appears whole or not at all, and nothing is replaced unasked."""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import platform
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import NoReturn, TypeAlias

from softbridge.errors import OutputError
from softbridge.untrusted.claims import is_safe_name, short
from softbridge.untrusted.files import Files
from softbridge.untrusted.streamed import Content, Written, written

#: A file's content; or what makes it once those before it were written, of what is known of them.
Making: TypeAlias = Content | Callable[[Mapping[str, Written]], Content]
Check: TypeAlias = Callable[[Files], None]


def write(
    target: Path, files: Mapping[str, Making], *, overwrite: bool = False, check: Check | None = None
) -> Mapping[str, Written]:
    """Write a folder, whole or not at all.

    The files are written beside the target, brought to the disk, and checked there; then the folder takes the target's
    place in one step. With `overwrite` the target is exchanged as a whole: no file of the old one stays, because an
    old and a new file of weights side by side is what readers get wrong. (On systems that cannot exchange two folders
    in one step there is an instant without a target, and the old one is put back if the second step fails.)

    Args:
        target: the folder; made if it is missing, as are its parents.
        files: name -> content, written in this order; a name may have one sub-folder.
        check: called with the files before they take the target's place; what it raises, `write` raises.

    Returns: what is known of each file.

    Raises:
        OutputError: the target holds something and `overwrite` is off, or it cannot be written.
    """
    target = Path(os.path.realpath(target))
    if target.is_dir():
        _keep_away_from(target)
    if not overwrite:
        check_vacant(target)
    if target.exists() and not target.is_dir():
        raise OutputError(f"'{target}' is a file", "a folder, or nothing yet", "name another target, or move the file")
    with _staged(target, files, check) as (staged, done):
        if not target.exists() or not any(target.iterdir()):
            _rename_to_empty(staged, target)
        elif not overwrite:
            _occupied(target)
        elif not _exchange(staged, target):
            _replace_in_two_steps(staged, target)
    return done


def write_file(target: Path, content: Content, *, overwrite: bool = False, check: Check | None = None) -> Written:
    """Write one file, whole or not at all; see `write`. `check` is called with a file of the same name elsewhere."""
    target = Path(os.path.realpath(target))
    if target.is_dir():
        raise OutputError(f"'{target}' is a folder", "a file, or nothing yet", "name a file in it")
    if target.exists() and not overwrite:
        _occupied(target)
    with _staged(target, {target.name: content}, check, alone=True) as (staged, done):
        if overwrite:
            os.replace(staged / target.name, target)
            return done[target.name]
        try:
            os.link(staged / target.name, target)  # unlike a rename, a link never replaces what came in between
        except FileExistsError:
            _occupied(target)
        except OSError:  # no hard links on this file system
            os.replace(staged / target.name, target)
    return done[target.name]


class Log:
    """A file that one process adds lines to. Each is on the disk before the next; a kill leaves whole lines.

    Raises:
        OutputError: another process has it open, or it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise _unwritable(path, error) from error
        if not _locked(self._file):
            os.close(self._file)
            raise OutputError(
                f"'{path}', which another process is writing", "one process for each", "wait until that one has ended"
            )
        os.ftruncate(self._file, path.read_bytes().rfind(b"\n") + 1)  # what was cut off in a line

    def add(self, line: bytes) -> None:
        """Add a line, with its end."""
        try:
            if os.write(self._file, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file)
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def close(self) -> None:
        """Leave the file to others."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def remove(self) -> None:
        """Remove the file: all that it says stands elsewhere."""
        self.path.unlink(missing_ok=True)
        self.close()


def _locked(descriptor: int) -> bool:
    """Whether the file is this process's alone, now. (Some file systems cannot tell.)"""
    if sys.platform != "win32":
        import fcntl

        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return True
    return True


def write_into(folder: Path, files: Mapping[str, Making], *, check: Check | None = None) -> None:
    """Write files into a folder that may hold others, which stay. Those of the same names are replaced.

    All are on the disk, and checked, before the first one takes its place. A process that is killed in between leaves
    each file old or new, whole, in the order in which they are given.

    Args:
        folder: made if it is missing, as are its parents.
        files: plain name -> content, at least one; the last is the one that the others are for.
        check: called with these files, in a folder that holds no others; what it raises, `write_into` raises.

    Raises:
        OutputError: a file cannot be written.
    """
    folder = Path(os.path.realpath(folder))
    # In the folder, not beside it, which may be another file system or not be writable.
    with _staged(folder / list(files)[-1], files, check) as (staged, _):
        for name in files:
            os.replace(staged / name, folder / name)
        _sync_folder(folder)


def check_name(target: Path) -> None:
    """Refuse a path that this machine can have nothing at: a name that is too long, a NUL in it."""
    try:
        os.lstat(target)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise OutputError(
            f"'{target}' cannot be written: {error}", "a path of this machine", "choose another"
        ) from error


def check_vacant(target: Path) -> None:
    """Refuse a target that is there already; an empty folder may be filled."""
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        _occupied(target)


def _occupied(target: Path) -> NoReturn:
    raise OutputError(
        f"'{target}' is there already",
        "a target that does not exist yet",
        "name another, or say --overwrite (in Python overwrite=True)",
    )


def _keep_away_from(target: Path) -> None:
    """Refuse to exchange a folder that the user lives in: all that it holds would be gone."""
    for place in (Path.cwd(), Path(os.path.expanduser("~"))):
        if place.resolve().is_relative_to(target):
            raise OutputError(f"'{target}' holds '{place}'", "a folder of its own", f"write to '{target / 'prompt'}'")


@contextmanager
def _staged(
    target: Path, files: Mapping[str, Making], check: Check | None, *, alone: bool = False
) -> Iterator[tuple[Path, Mapping[str, Written]]]:
    """A folder beside the target with the files in it, on the disk and checked; what is left of it is removed.

    Args:
        alone: whether there is one file, and it is checked as such.
    """
    for name in files:
        parts = PurePosixPath(name).parts
        plain = is_safe_name(name) and "\\" not in name and ":" not in name and name == "/".join(parts) != ""
        if not plain or len(parts) > 2:
            raise OutputError(f"a file named {short(name)}", "a plain name, in at most one sub-folder", "rename it")
    begin = f".{target.name}.{_MACHINE}-"
    staged = target.parent / f"{begin}{os.getpid()}-{secrets.token_hex(8)}.tmp"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target.parent, begin)
        staged.mkdir()  # with the permissions that the user's umask gives, unlike tempfile's
        done: dict[str, Written] = {}
        for name, content in files.items():
            path = staged / name
            path.parent.mkdir(exist_ok=True)
            done[name] = written(content(done) if callable(content) else content, path)
        for folder in {(staged / name).parent for name in files} | {staged}:
            _sync_folder(folder)
        if check is not None:
            check(Files(staged / target.name if alone else staged, written=done))
        yield staged, done
        _sync_folder(target.parent)
    except OSError as error:
        raise _unwritable(target, error) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"'{path}' cannot be written: {error}", "a place that can be written to", "check free space and permissions"
    )


#: Processes are numbered anew on every machine, and a folder may be shared by several.
_MACHINE = sha256(platform.node().encode()).hexdigest()[:8]


def _sweep(folder: Path, begin: str) -> None:
    """Remove what killed processes of this machine left when they wrote the same target."""
    for path in folder.glob(f"{glob.escape(begin)}*.tmp"):
        number = path.name.removeprefix(begin).partition("-")[0]
        if number.isdigit() and not _runs(int(number)):
            shutil.rmtree(path, ignore_errors=True)


def _runs(number: int) -> bool:
    """Whether a process of this number runs, whoever's it is. One that ended, and that nobody waits for, does not."""
    if os.name != "posix":  # where os.kill would end it
        return True
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    try:  # in a container whose first process waits for none, what was killed keeps its number
        return Path(f"/proc/{number}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except OSError:
        return True


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _rename_to_empty(staged: Path, target: Path) -> None:
    try:
        if os.name != "posix" and target.exists():
            target.rmdir()
        os.rename(staged, target)  # takes the place of an empty folder, and fails on any other
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            _occupied(target)
        raise


def _exchange(staged: Path, target: Path) -> bool:
    """Exchange two folders in one step, where the system can: whether it did."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(staged), here, os.fsencode(target), exchange) == 0)


def _replace_in_two_steps(staged: Path, target: Path) -> None:
    old = staged.with_suffix(".old")
    os.rename(target, old)
    try:
        os.rename(staged, target)
    except OSError:
        os.rename(old, target)
        raise
    with suppress(OSError):
        shutil.rmtree(old)
