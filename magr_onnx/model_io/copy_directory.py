"""Copies of the other files in a directory of models: from the source, and from a previous result that is replaced."""

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
    """List all files of a folder, following links; sorted paths relative to the folder.

    Raises:
        ModelError: Something cannot be copied: a broken link, a link to a parent folder, an unreadable folder.
    """
    paths: list[Path] = []
    problems: list[str] = []

    def walk(place: Path, above: Collection[Path]) -> None:
        try:
            for path in place.iterdir():
                if not path.is_dir():
                    (paths if path.is_file() else special).append(path)
                elif (real := path.resolve()) in above:
                    problems.append(f"{path} is a link to a folder it is in, {real}; remove it")
                else:
                    walk(path, {*above, real})
        except OSError as error:
            problems.append(f"{place} cannot be read: {os_error_hint(error)}")

    special: list[Path] = []
    walk(folder, {folder.resolve()})
    for path in special:
        leads = f"a link to {os.readlink(path)}, where there is no file" if path.is_symlink() else "neither a file nor a folder"
        problems.append(f"{path} is {leads}; restore or remove it")
    raise_all(ModelError, sorted(problems))
    return sorted(path.relative_to(folder) for path in paths)


def carried_files(folder: Path, files: Iterable[Path], names: Collection[str], external: Iterable[Path]) -> list[Path]:
    """Select the files that are neither the named models nor ``external`` data that only those read; paths relative to the folder."""

    def inside(paths: Iterable[Path]) -> set[Path]:
        return {Path(os.path.relpath(path, folder)) for path in paths}

    files, excluded = list(files), {*map(Path, names), *inside(external)}
    excluded -= {file for path in files if path.suffix == ".onnx" and path not in excluded for file in inside(data_files(folder / path))}
    return [path for path in files if path not in excluded]


FileState = tuple[int, ...]
"""Kind and status of a file, link or folder, to detect changes."""


def preserved(folder: Path, names: Collection[str]) -> dict[Path, FileState]:
    """List what is kept of a folder that is replaced: all but the named models and the data that only those read.

    Links are not followed, and only empty folders are listed. Sorted relative paths; empty if the folder does not exist.

    Raises:
        OutputError: Something in it cannot be copied.
        OSError: A folder in it cannot be read.
    """
    states: dict[Path, FileState] = {}

    def unread(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # removed meanwhile
            raise error

    for top, inner, files in os.walk(folder, onerror=unread):
        paths = [Path(top, name) for name in (*inner, *files)]
        for path in [path for path in paths if path.is_symlink() or not path.is_dir()] if paths else [Path(top)]:
            with contextlib.suppress(FileNotFoundError):
                info = path.lstat()
                states[path.relative_to(folder)] = (stat.S_IFMT(info.st_mode), info.st_mode, info.st_ino, info.st_size, info.st_mtime_ns)
    kinds = {stat.S_IFREG, stat.S_IFLNK, stat.S_IFDIR}
    special = [path for path, state in states.items() if state[0] not in kinds]
    raise_all(OutputError, [f"{folder / path} is neither a file nor a folder, and cannot be kept; remove it" for path in special])
    data = {file for name in names for file in data_files(folder / name)}
    return {path: states[path] for path in sorted(carried_files(folder, states, names, data))}


def is_folder(state: FileState) -> bool:
    return state[0] == stat.S_IFDIR


def conflicts(preserved: Mapping[Path, FileState], written: Iterable[Path]) -> list[str]:
    """Describe preserved files that conflict with ``written`` ones: one would be the folder of the other."""
    files = set(written)
    above = {folder: file for file in files for folder in file.parents}
    pairs = [(path, above[path]) for path, state in preserved.items() if path in above and not is_folder(state)]
    pairs += [(path, folder) for path in preserved for folder in path.parents if folder in files]
    return [f"{a} is in the way of {b}; rename or remove it" for a, b in pairs]


def update(source: Path, target: Path, before: Mapping[Path, FileState], after: Mapping[Path, FileState]) -> None:
    """Update ``target`` from the state ``before`` to the state ``after`` of ``source``; links are copied as links."""
    changed = [path for path in {**before, **after} if before.get(path) != after.get(path)]
    for outdated in [target / path for path in changed if path in before]:
        if outdated.is_dir() and not outdated.is_symlink():
            with contextlib.suppress(OSError):  # not empty: it has files of the result
                outdated.rmdir()
        else:
            outdated.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty
            os.removedirs(outdated.parent)
    for path in changed:
        if path in after and is_folder(after[path]):
            (target / path).mkdir(parents=True, exist_ok=True)
        elif path in after:
            with contextlib.suppress(FileNotFoundError):  # removed since it was listed
                copy(source / path, target / path, follow_symlinks=False)


def copy(source: Path, target: Path, follow_symlinks: bool = True) -> None:
    """Copy a file with its times and permissions."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target, follow_symlinks=follow_symlinks)  # unlike copy2, refuses a folder
    shutil.copystat(source, target, follow_symlinks=follow_symlinks)


def keep_permissions(source: Path, replaced: Path, names: Collection[str]) -> None:
    """Copy permissions from the files a folder replaces; new data files get those of their model among ``names``."""
    data = {file: replaced / name for name in names for file in data_files(source / name)}
    for path in (*source.rglob("*"), source):
        template = replaced / path.relative_to(source)
        template = template if template.exists() else data.get(path, template)
        if template.exists() and not path.is_symlink():
            path.chmod(mode_of(template))
