"""Spilling of finished layers' constants to disk: the graph holds memory-mapped tensors of files that grow layer by layer."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from magr_onnx.model_io.external_data import external_tensor, model_values
from magr_onnx.model_io.writing import output_errors, release_mmap

SMALL = 1 << 12  # bytes up to which a tensor stays in memory
FILE_BYTES = 1 << 30  # a tensor maps its whole file, so several files are better than one


class Spool:
    """Files in a temporary folder that tensors of a model are moved to."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = 0
        self._used = 0

    def spill(self, model: ir.Model) -> None:
        """Move every tensor in memory, except small ones, to disk.

        Raises:
            OutputError: The disk is full.
        """
        with output_errors(f"cannot write temporary files to {self._folder.parent}"):
            for value in model_values(model):
                tensor = value.const_value
                if isinstance(tensor, ir.ExternalTensor):
                    release_mmap(tensor)
                elif isinstance(tensor, ir.Tensor) and tensor.nbytes > SMALL:
                    value.const_value = self._move(tensor, str(value.name))

    def _move(self, tensor: ir.Tensor, name: str) -> ir.ExternalTensor:  # type: ignore[type-arg]
        if self._used > FILE_BYTES:
            self._number, self._used = self._number + 1, 0
        path = self._folder / f"spool-{self._number}.data"
        with path.open("ab") as file:
            offset = file.tell()
            file.write(tensor.tobytes())  # not tofile, in which NumPy ignores a full disk
            self._used = file.tell()
        return external_tensor(tensor, name, path.name, offset, self._folder)
