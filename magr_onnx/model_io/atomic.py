"""Locks that die with their process, and temporary folders that the next run clears when theirs did.

A lock is held by the operating system for as long as its file is open (flock), so a killed process holds none: whoever gets the lock of a
folder knows that its owner is dead. Where there is no flock (Windows), nothing is refused and nothing of others is cleared.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from magr_onnx.errors import OutputError, raise_all
from magr_onnx.model_io.writable import why_not_writable

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

_OWNER = "owner.lock"
_MARK = b"onnx-magr temporary folder; cleared by the next run on the same output once its process is dead\n"
_MIDDLE = ".magr-"


def lock(path: Path) -> IO[bytes] | None:
    """An open, locked file, created if there is none; None where another process holds it."""
    file = path.open("a+b")
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            return None
    return file


@contextlib.contextmanager
def staging_directory(output: Path) -> Iterator[Path]:
    """A temporary folder beside ``output``, on its file system, so that files in it can be renamed into place; removed at the end.

    Folders of the same output whose runs were killed are removed first.

    Raises:
        OSError: The folder cannot be made.
    """
    remove_stale(output)
    folder = Path(tempfile.mkdtemp(prefix=_beginning(output), dir=output.parent))
    owner: IO[bytes] | None = None
    try:
        owner = lock(folder / _OWNER)
        if owner is not None:
            owner.write(_MARK)
            owner.flush()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if owner is not None:
            owner.close()


def remove_stale(output: Path) -> None:
    """Remove temporary folders of ``output`` that are surely ours and dead: nobody holds the lock that has our mark.

    A process that was killed between its first two steps leaves an empty folder, or an empty lock in it; those go too.
    """
    if fcntl is None:
        return
    for folder in output.parent.glob(f"{_escaped(_beginning(output))}*"):
        try:
            names = [] if folder.is_symlink() else [p.name for p in folder.iterdir()]
            if not names:
                folder.rmdir()
                continue
            mark = (folder / _OWNER).read_bytes()
            if mark != _MARK and (mark or len(names) > 1):
                continue
            held = lock(folder / _OWNER)
        except OSError:
            continue
        if held is not None:
            shutil.rmtree(folder, ignore_errors=True)
            held.close()


def _beginning(output: Path) -> str:
    """What the names of temporary folders of ``output`` begin with: its name, or the hash of one that leaves no room for more."""
    name = os.fsencode(output.name)
    return f".{output.name if len(name) <= 200 else hashlib.sha256(name).hexdigest()}{_MIDDLE}"


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def sync(path: Path) -> None:
    """Have the operating system write a file or a folder's entries to the disk, where it can."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # folders on Windows
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if not path.is_dir():  # some file systems cannot sync folders; a file that cannot be synced may be lost
            raise error
    finally:
        os.close(handle)


def replace(source: Path, target: Path) -> None:
    """Rename a file over another, after its bytes and before the renaming reach the disk."""
    sync(source)
    os.replace(source, target)
    sync(target.parent)


def mode_of(path: Path) -> int:
    """Permissions that what replaces ``path`` shall have: those of what is there, and of a new file where there is nothing."""
    try:
        return stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError:
        mask = os.umask(0)
        os.umask(mask)
        return 0o666 & ~mask


def write_text(text: str, path: Path, what: str, errors: str = "strict") -> None:
    """Write a text file in UTF-8: all of it, or nothing, and then a file that was there is as it was.

    A file that is replaced leaves its permissions.

    Args:
        text: What to write.
        path: Where; a link is followed.
        what: What the file is, for the message.
        errors: What becomes of characters that UTF-8 cannot hold (undecodable bytes of file names), as in `str.encode`.

    Raises:
        OutputError: It cannot be written.
    """
    raise_all(OutputError, why_not_writable(f"{what} {path}", path))
    try:
        data = text.encode("utf-8", errors)
        target = path.resolve()
        with staging_directory(target) as folder:
            part = folder / target.name
            part.write_bytes(data)
            part.chmod(mode_of(target))
            replace(part, target)
    except UnicodeEncodeError as error:
        where = text[max(0, error.start - 30) : error.end].splitlines()[-1]
        raise OutputError(f"{what} {path}: cannot be written: {where!r} ends in bytes that are no text; rename what has them") from error
    except OSError as error:
        raise OutputError(f"{what} {path}: cannot be written: {error.strerror or error}") from error
