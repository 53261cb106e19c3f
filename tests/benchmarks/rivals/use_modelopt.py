"""NVIDIA ModelOpt: symmetric 4-bit QDQ by default, unsigned with zero points where asked; AWQ by scales of inputs and by clipping.

``lm_head`` is left out by default; it is quantized here, as by every other tool. Without a GPU its AWQ stops at a call that only GPU
arrays have, ``array.get()``; that call is given to its NumPy arrays here.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from adapter import Rewindable, Task, at_opset, only, save, serve


class Array(np.ndarray[Any, Any]):
    def get(self) -> np.ndarray[Any, Any]:
        return np.asarray(self)


class Arrays:
    """NumPy, with arrays that have ``get``."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def asarray(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        return np.asarray(value, *args, **kwargs).view(Array)


def quantize(task: Task, method: str, zero_point: bool = False) -> None:
    only(4, task)
    from modelopt.onnx.quantization import int4

    int4.np = Arrays()
    model = int4.quantize(
        at_opset(task.model, 21),
        calibration_method=method,
        calibration_data_reader=Rewindable(task.calibration),
        calibration_eps=["cpu"],
        use_external_data_format=False,
        use_zero_point=zero_point,
        block_size=task.block,
        nodes_to_exclude=[],
    )
    save(model, task)


METHODS = {
    "int4_rtn_dq": partial(quantize, method="rtn_dq"),
    "int4_awq_clip": partial(quantize, method="awq_clip"),
    "awq_lite": partial(quantize, method="awq_lite"),
    "awq_lite, zero points": partial(quantize, method="awq_lite", zero_point=True),
    "awq_full": partial(quantize, method="awq_full"),
    "awq_full, zero points": partial(quantize, method="awq_full", zero_point=True),
}

if __name__ == "__main__":
    serve("nvidia-modelopt", METHODS)
