"""Places for results: what stands against a path, known before the work whose result would go there."""

from __future__ import annotations

import os
import stat
from pathlib import Path

_SPECIAL = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_LONGEST = 255  # bytes of a name on almost all file systems


def why_not_writable(what: str, path: Path) -> list[str]:
    """Why nothing can be renamed to ``path``, links followed.

    Its name is too long, its folder or what is there is not writable, or that is neither a file nor a folder, or a mount.

    Args:
        what: What would be there, and the path, for the message.
        path: A path; whether its folder is there is not looked at.
    """
    place = path.resolve()
    if found := too_long(what, place):
        return found
    if os.path.isdir(place.parent) and not os.access(place.parent, os.W_OK):
        return [f"{what}: folder {place.parent} is not writable"]
    try:
        kind = _SPECIAL.get(stat.S_IFMT(place.stat().st_mode))
    except OSError:  # nothing is there
        return []
    if kind is not None:
        return [f"{what} is {kind}, in whose place a result would be put; choose another name"]
    if os.path.ismount(place):
        other = f"give a folder in it, such as {path / 'optimized'}" if place.is_dir() else "choose another name"
        return [f"{what} is a mount point, to which nothing can be renamed; {other}"]
    if not os.access(place, os.W_OK):
        return [f"{what} exists and is not writable"]
    return []


def too_long(what: str, path: Path) -> list[str]:
    """Whether the file system of ``path`` has no names of that length."""
    try:
        most = os.pathconf(path.parent, "PC_NAME_MAX")
    except (AttributeError, OSError):  # Windows; no such folder
        most = _LONGEST
    size = len(os.fsencode(path.name))
    return [f"{what}: the name {path.name} has {size} bytes, and may have {most} bytes; give a shorter name"] * (size > most)
