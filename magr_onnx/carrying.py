"""What is in a folder beside the models that are optimized."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from pathlib import Path

from magr_onnx.errors import ModelError, raise_all
from magr_onnx.writing import data_files
from magr_onnx.writing import explained as advice


def every(folder: Path) -> list[Path]:
    """All files in a folder, and in those that links in it lead to; sorted paths in the folder.

    Raises:
        ModelError: Something in it cannot be copied: a link that leads nowhere or to a folder it is in, a folder that cannot be read.
    """
    found: list[Path] = []
    problems: list[str] = []

    def walk(place: Path, above: Collection[Path]) -> None:
        try:
            for path in place.iterdir():
                if not path.is_dir():
                    (found if path.is_file() else odd).append(path)
                elif (real := path.resolve()) in above:
                    problems.append(f"{path} is a link to a folder it is in, {real}; remove it")
                else:
                    walk(path, {*above, real})
        except OSError as error:
            problems.append(f"{place} cannot be read: {advice(error)}")

    odd: list[Path] = []
    walk(folder, {folder.resolve()})
    for path in odd:
        leads = f"a link to {os.readlink(path)}, where there is no file" if path.is_symlink() else "neither a file nor a folder"
        problems.append(f"{path} is {leads}; restore or remove it")
    raise_all(ModelError, sorted(problems))
    return sorted(path.relative_to(folder) for path in found)


def besides(folder: Path, names: Collection[str], external: Iterable[Path]) -> list[Path]:
    """Files that are neither the models of these names nor ``external`` data that only those read; paths in the folder."""

    def inside(paths: Iterable[Path]) -> set[Path]:
        return {Path(os.path.relpath(path, folder)) for path in paths}

    files, gone = every(folder), {*map(Path, names), *inside(external)}
    gone -= {file for path in files if path.suffix == ".onnx" and path not in gone for file in inside(data_files(folder / path))}
    return [path for path in files if path not in gone]
