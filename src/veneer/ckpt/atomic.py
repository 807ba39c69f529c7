"""Files and folders that are either the old ones or the new ones, whatever kills the process in between.

    with atomic_folder("runs/a/adapter") as tmp:      # an empty hidden folder beside the real one
        (tmp / "adapter_config.json").write_text(...)
    # here everything is on the disk and bears its name; on an exception nothing has changed

What is written goes to a hidden sibling, is flushed to the disk, and then takes the name in one step. A file does so
with `rename`. A folder cannot: `rename` refuses to replace a folder that is not empty, and moving the old one away
first leaves a moment without either. So two folders *exchange* names (`renameat2(RENAME_EXCHANGE)` on Linux,
`renamex_np` on macOS) and the old one is deleted under its hidden name. Where the file system cannot do that the old
folder does step aside, and `recover` (which every later write and every load calls) puts it back if the process died
in that moment.

Hidden siblings of a killed process are removed by the next write to the same name. To tell them from those of a process
that still writes, a writer holds a `flock` on its sibling: the kernel lets go of it when the process dies, which holds
across process-id reuse and between containers that share a disk.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from veneer.errors import CheckpointError

__all__ = ["atomic_file", "atomic_folder", "atomic_write", "recover"]

UNFINISHED, REPLACED = ".tmp", ".old"  # endings of the hidden siblings: being written; stepped aside for a new folder


def atomic_write(path: str | os.PathLike[str], data: bytes | str, *, fsync: bool = True) -> None:
    """Replace the file `path` by `data` at once. `fsync=False` survives a kill but not a power cut: for heartbeats."""
    with atomic_file(path, fsync=fsync) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextmanager
def atomic_file(path: str | os.PathLike[str], *, fsync: bool = True) -> Iterator[BinaryIO]:
    """A file to write to that becomes `path` when the block ends well, and vanishes when it does not."""
    path = Path(path)
    with _disk_errors(path):
        _clean(path)
        temp, lock = _claim(path, is_folder=False)
        try:
            with os.fdopen(os.dup(lock), "wb") as file:
                yield file
                file.flush()
                if fsync:
                    os.fsync(lock)
            os.replace(temp, path)
            if fsync:
                _fsync(path.parent)
        finally:
            _remove(temp)
            os.close(lock)


@contextmanager
def atomic_folder(path: str | os.PathLike[str], *, keep: bool = False) -> Iterator[Path]:
    """An empty folder to fill that becomes `path` when the block ends well, and vanishes when it does not.

    What was at `path` is gone afterwards, unless `keep`: then what the block did not write itself is carried over (as
    hard links where the disk has them, so it costs nothing).
    """
    path = Path(path)
    with _disk_errors(path):
        if path.exists() and not path.is_dir():
            raise CheckpointError("A file stands where a folder is to be written.", str(path), "choose another name")
        recover(path)
        _clean(path)
        temp, lock = _claim(path, is_folder=True)
        try:
            yield temp
            if keep and path.is_dir():
                _carry_over(path, temp)
            _fsync_tree(temp)
            _take_name(temp, path)
            _fsync(path.parent)
        finally:
            _remove(temp)
            os.close(lock)


def recover(path: str | os.PathLike[str]) -> None:
    """Put the old folder back if a process died between moving it aside and moving the new one in."""
    path = Path(path)
    if not os.path.lexists(path):
        for old in _siblings(path, REPLACED):
            os.rename(old, path)
            return


# ---------------------------------------------------------------- the one step


def _take_name(temp: Path, path: Path) -> None:
    """`temp` becomes `path`; what was `path`, if anything, ends under the name of `temp`."""
    if not os.path.lexists(path):
        os.rename(temp, path)
    elif not _exchange(temp, path):
        old = _hidden(path, REPLACED)
        os.rename(path, old)
        os.rename(temp, path)  # dying just before this line is what `recover` is for
        _remove(old)


def _exchange(a: Path, b: Path) -> bool:
    """Swap the names of two existing things in one step; False where the system has no such step."""
    if sys.platform == "darwin":
        swap, arguments = "renamex_np", (os.fsencode(a), os.fsencode(b), 2)  # 2: RENAME_SWAP
    else:  # -100: AT_FDCWD, paths are relative to the working directory; 2: RENAME_EXCHANGE
        swap, arguments = "renameat2", (-100, os.fsencode(a), -100, os.fsencode(b), 2)
    call = getattr(ctypes.CDLL(None, use_errno=True), swap, None)
    if call is None:
        return False
    if call(*arguments) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM):  # not on this file system
        return False
    raise OSError(code, os.strerror(code), str(b))


# ---------------------------------------------------------------- hidden siblings


def _hidden(path: Path, ending: str) -> Path:
    return path.parent / f".{path.name}.{secrets.token_hex(4)}{ending}"


def _siblings(path: Path, ending: str) -> list[Path]:
    """The hidden siblings of `path`, newest first."""
    if not path.parent.is_dir():
        return []
    name = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}{re.escape(ending)}")
    found = [entry for entry in path.parent.iterdir() if name.fullmatch(entry.name)]
    return sorted(found, key=lambda entry: entry.lstat().st_mtime, reverse=True)


def _claim(path: Path, *, is_folder: bool) -> tuple[Path, int]:
    """A new hidden sibling and the descriptor whose lock says that somebody is writing to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        temp = _hidden(path, UNFINISHED)
        if is_folder:
            temp.mkdir()
            lock = os.open(temp, os.O_RDONLY)
        else:
            lock = os.open(temp, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        with suppress(OSError):  # no locks here: then nobody can tell our sibling from a dead one, and none is removed
            fcntl.flock(lock, fcntl.LOCK_EX)
        if temp.exists():  # a cleaner may have taken it for a leftover in the moment before the lock
            return temp, lock
        os.close(lock)


def _clean(path: Path) -> None:
    """Remove what killed processes left beside `path`."""
    for left in _siblings(path, UNFINISHED) + _siblings(path, REPLACED):
        with suppress(OSError):
            lock = os.open(left, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises while its writer lives
                _remove(left)
            finally:
                os.close(lock)


def _remove(path: Path) -> None:
    """Delete whatever bears the name, if anything does."""
    with suppress(FileNotFoundError):
        if stat.S_ISDIR(path.lstat().st_mode):
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _carry_over(old: Path, new: Path) -> None:
    """Give `new` what `old` has and it lacks."""
    for entry in old.iterdir():
        target = new / entry.name
        if entry.is_dir() and not entry.is_symlink():
            target.mkdir(exist_ok=True)
            _carry_over(entry, target)
        elif not os.path.lexists(target):
            _link(entry, target)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:  # a disk without hard links; a full one has nothing to fall back to
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        shutil.copy2(source, target, follow_symlinks=False)


# ---------------------------------------------------------------- the disk


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some file systems cannot flush a folder; none of them could do better
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _fsync_tree(folder: Path) -> None:
    for here, _, files in os.walk(folder):
        for name in files:
            if not os.path.islink(os.path.join(here, name)):
                _fsync(Path(here, name))
        _fsync(Path(here))


WAYS_OUT = {
    errno.ENOSPC: ("The disk is full", "free some space or choose another disk; what was there is untouched"),
    errno.EDQUOT: ("The disk quota is used up", "free some space or choose another disk; what was there is untouched"),
    errno.EROFS: ("The disk is read-only", "choose a folder that can be written"),
    errno.EACCES: ("No permission to write here", "choose a folder that you own, or change its permissions"),
}


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Say in our own words what the disk refuses; other errors of the block pass unchanged."""
    try:
        yield
    except OSError as error:
        if error.errno not in WAYS_OUT or not _is_beside(path, error.filename):
            raise
        what, fix = WAYS_OUT[error.errno]
        raise CheckpointError(f"{what}, so nothing was saved.", str(path), fix) from error


def _is_beside(path: Path, filename: object) -> bool:
    """Whether an error is about what is written here, not about a file that the block reads elsewhere."""
    return not isinstance(filename, str) or Path(filename).absolute().is_relative_to(path.parent.absolute())
