"""Checks of output paths before the work."""

from __future__ import annotations

import os
import stat
from pathlib import Path

_SPECIAL = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
_LONGEST = 255  # bytes of a name on almost all file systems


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
