"""What is in a folder beside the models that are optimized: in the source, and in a result that is replaced."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from magr_onnx.errors import ModelError, OutputError, raise_all
from magr_onnx.model_io.atomic import mode_of
from magr_onnx.model_io.writing import data_files, os_error_hint


def all_files(folder: Path) -> list[Path]:
    """All files in a folder, and in those that links in it lead to; sorted paths in the folder.

    Raises:
        ModelError: Something in it cannot be copied: a link that leads nowhere or to a folder it is in, a folder that cannot be read.
    """
    paths: list[Path] = []
    problems: list[str] = []

    def walk(place: Path, above: Collection[Path]) -> None:
        try:
            for path in place.iterdir():
                if not path.is_dir():
                    (paths if path.is_file() else odd).append(path)
                elif (real := path.resolve()) in above:
                    problems.append(f"{path} is a link to a folder it is in, {real}; remove it")
                else:
                    walk(path, {*above, real})
        except OSError as error:
            problems.append(f"{place} cannot be read: {os_error_hint(error)}")

    odd: list[Path] = []
    walk(folder, {folder.resolve()})
    for path in odd:
        leads = f"a link to {os.readlink(path)}, where there is no file" if path.is_symlink() else "neither a file nor a folder"
        problems.append(f"{path} is {leads}; restore or remove it")
    raise_all(ModelError, sorted(problems))
    return sorted(path.relative_to(folder) for path in paths)


def carried_files(folder: Path, files: Iterable[Path], names: Collection[str], external: Iterable[Path]) -> list[Path]:
    """Those of the files that are neither the models of these names nor ``external`` data that only those read; paths in the folder."""

    def inside(paths: Iterable[Path]) -> set[Path]:
        return {Path(os.path.relpath(path, folder)) for path in paths}

    files, gone = list(files), {*map(Path, names), *inside(external)}
    gone -= {file for path in files if path.suffix == ".onnx" and path not in gone for file in inside(data_files(folder / path))}
    return [path for path in files if path not in gone]


Seen = tuple[int, ...]
"""Tells a file, a link or a folder from another in its place, or from itself when it is changed; begins with its kind."""


def preserved(folder: Path, names: Collection[str]) -> dict[Path, Seen]:
    """What stays of a folder that is replaced: all but the models of these names and the data that only those read.

    Links are not followed, and a folder is there by itself if it is empty. Sorted paths in the folder; none if it does not exist.

    Raises:
        OutputError: Something in it can be no part of a copy.
        OSError: A folder in it cannot be read.
    """
    seen: dict[Path, Seen] = {}

    def unread(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # removed while we look
            raise error

    for top, inner, files in os.walk(folder, onerror=unread):
        here = [Path(top, name) for name in (*inner, *files)]
        for path in [path for path in here if path.is_symlink() or not path.is_dir()] if here else [Path(top)]:
            with contextlib.suppress(FileNotFoundError):
                now = path.lstat()
                seen[path.relative_to(folder)] = (stat.S_IFMT(now.st_mode), now.st_mode, now.st_ino, now.st_size, now.st_mtime_ns)
    kinds = {stat.S_IFREG, stat.S_IFLNK, stat.S_IFDIR}
    raise_all(
        OutputError,
        [f"{folder / path} is neither a file nor a folder, and cannot be kept; remove it" for path in seen if seen[path][0] not in kinds],
    )
    data = {file for name in names for file in data_files(folder / name)}
    return {path: seen[path] for path in sorted(carried_files(folder, seen, names, data))}


def is_folder(seen: Seen) -> bool:
    return seen[0] == stat.S_IFDIR


def conflicts(old: Mapping[Path, Seen], new: Iterable[Path]) -> list[str]:
    """What cannot be kept beside ``new`` files: one would be the folder of the other."""
    files = set(new)
    above = {folder: file for file in files for folder in file.parents}
    pairs = [(path, above[path]) for path, seen in old.items() if path in above and not is_folder(seen)]
    pairs += [(path, folder) for path in old for folder in path.parents if folder in files]
    return [f"{a} is in the way of {b}; rename or remove it" for a, b in pairs]


def update(source: Path, target: Path, before: Mapping[Path, Seen], now: Mapping[Path, Seen]) -> None:
    """Have in ``target`` what is ``now`` in ``source``, links as links, where it has what was there ``before``."""
    changed = [path for path in {**before, **now} if before.get(path) != now.get(path)]
    for place in [target / path for path in changed if path in before]:
        if place.is_dir() and not place.is_symlink():
            with contextlib.suppress(OSError):  # the result has files in it
                place.rmdir()
        else:
            place.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # other files are there
            os.removedirs(place.parent)
    for path in changed:
        if path in now and is_folder(now[path]):
            (target / path).mkdir(parents=True, exist_ok=True)
        elif path in now:
            with contextlib.suppress(FileNotFoundError):  # removed since it was listed
                copy(source / path, target / path, follow_symlinks=False)


def copy(source: Path, target: Path, follow_symlinks: bool = True) -> None:
    """A file, with its times and permissions."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target, follow_symlinks=follow_symlinks)  # which, unlike copy2, refuses a folder
    shutil.copystat(source, target, follow_symlinks=follow_symlinks)


def keep_permissions(new: Path, old: Path, names: Collection[str]) -> None:
    """Give all in a folder the permissions of what it replaces in another, and new data those of its model among ``names``."""
    data = {file: old / name for name in names for file in data_files(new / name)}
    for path in (*new.rglob("*"), new):
        like = old / path.relative_to(new)
        like = like if like.exists() else data.get(path, like)
        if like.exists() and not path.is_symlink():
            path.chmod(mode_of(like))
