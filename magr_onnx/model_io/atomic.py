"""Atomic output: checks of paths, locks that end with their process, and staging directories of killed runs, which later ones remove.

The operating system holds a lock while its file is open (flock), so a killed process holds none: whoever gets the lock of a directory knows
that its owner is dead. Without flock (Windows), nothing is refused and no stale directory is removed.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from magr_onnx.errors import OutputError, raise_all

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

_OWNER = "owner.lock"
_MARK = b"onnx-magr temporary folder; cleared by the next run on the same output once its process is dead\n"
_MIDDLE = ".magr-"
_SPECIAL = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
_LONGEST = 255  # bytes of a name on almost all file systems


def lock(path: Path) -> IO[bytes] | None:
    """Open and lock a file, created if absent; return None where another process holds the lock."""
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
    """Make a temporary directory next to ``output``, on the same file system, so that files can be renamed into place.

    It is removed at the end; stale ones of killed runs on the same output are removed first.

    Raises:
        OSError: The directory cannot be made.
    """
    remove_stale(output)
    folder = Path(tempfile.mkdtemp(prefix=_prefix(output), dir=output.parent))
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
    """Remove staging directories of ``output`` whose lock has our mark and is free.

    A process killed at its very start leaves an empty directory, or one with an empty lock; those are removed too.
    """
    if fcntl is None:
        return
    for folder in output.parent.glob(f"{glob.escape(_prefix(output))}*"):
        try:
            names = [] if folder.is_symlink() else [p.name for p in folder.iterdir()]
            if not names:
                folder.rmdir()
                continue
            content = (folder / _OWNER).read_bytes()
            if content != _MARK and (content or len(names) > 1):
                continue
            owner = lock(folder / _OWNER)
        except OSError:
            continue
        if owner is not None:
            shutil.rmtree(folder, ignore_errors=True)
            owner.close()


def _prefix(output: Path) -> str:
    """Return the prefix of staging directories of ``output``: its name, or its hash if it is too long."""
    name = os.fsencode(output.name)
    return f".{output.name if len(name) <= 200 else hashlib.sha256(name).hexdigest()}{_MIDDLE}"


def sync(path: Path) -> None:
    """Flush a file or a directory's entries to disk, where supported."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # directories on Windows
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if not path.is_dir():  # some file systems cannot sync directories; a file that cannot be synced may be lost
            raise error
    finally:
        os.close(handle)


def replace(source: Path, target: Path) -> None:
    """Replace a file by another, with its bytes and the rename flushed to disk."""
    sync(source)
    os.replace(source, target)
    sync(target.parent)


def mode_of(path: Path) -> int:
    """Return the permissions for a replacement of ``path``: those of the existing file, or of a new one."""
    try:
        return stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError:
        mask = os.umask(0)
        os.umask(mask)
        return 0o666 & ~mask


def why_not_writable(label: str, path: Path) -> list[str]:
    """Return the reasons why no file can be renamed to ``path``, following links.

    Its name is too long, its folder or the existing file is not writable, or that is a special file or a mount point.

    Args:
        label: Description of the output with its path, for messages.
        path: The path; its folder need not exist.
    """
    target = path.resolve()
    if reasons := too_long(label, target):
        return reasons
    if os.path.isdir(target.parent) and not os.access(target.parent, os.W_OK):
        return [f"{label}: folder {target.parent} is not writable"]
    try:
        kind = _SPECIAL.get(stat.S_IFMT(target.stat().st_mode))
    except OSError:  # no such file
        return []
    if kind is not None:
        return [f"{label} is {kind}, in whose place a result would be put; choose another name"]
    if os.path.ismount(target):
        remedy = f"give a folder in it, such as {path / 'optimized'}" if target.is_dir() else "choose another name"
        return [f"{label} is a mount point, to which nothing can be renamed; {remedy}"]
    if not os.access(target, os.W_OK):
        return [f"{label} exists and is not writable"]
    return []


def too_long(label: str, path: Path) -> list[str]:
    """Return a problem if the name of ``path`` is too long for its file system."""
    try:
        most = os.pathconf(path.parent, "PC_NAME_MAX")
    except (AttributeError, OSError):  # Windows; no such folder
        most = _LONGEST
    size = len(os.fsencode(path.name))
    return [f"{label}: the name {path.name} has {size} bytes, and may have {most} bytes; give a shorter name"] * (size > most)


def write_text(text: str, path: Path, what: str, errors: str = "strict") -> None:
    """Write a text file in UTF-8 atomically: on failure an existing file is unchanged.

    A replaced file keeps its permissions.

    Args:
        text: The text.
        path: Path of the file; a link is followed.
        what: Description of the file for messages.
        errors: Handling of characters that UTF-8 lacks (undecodable bytes of file names), as in `str.encode`.

    Raises:
        OutputError: It cannot be written.
    """
    raise_all(OutputError, why_not_writable(f"{what} {path}", path))
    try:
        data = text.encode("utf-8", errors)
        target = path.resolve()
        with staging_directory(target) as folder:
            temporary = folder / target.name
            temporary.write_bytes(data)
            temporary.chmod(mode_of(target))
            replace(temporary, target)
    except UnicodeEncodeError as error:
        where = text[max(0, error.start - 30) : error.end].splitlines()[-1]
        raise OutputError(f"{what} {path}: cannot be written: {where!r} ends in bytes that are no text; rename what has them") from error
    except OSError as error:
        raise OutputError(f"{what} {path}: cannot be written: {error.strerror or error}") from error
