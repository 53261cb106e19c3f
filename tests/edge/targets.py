"""The targets by name. `.ci/edge` installs what they need; see docs/edge.md.

from tests.edge.targets import CORTEX_A53, require

require(CORTEX_A53)
outputs = CORTEX_A53.run_one(path, feeds)
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from tests.edge.jobs import Target
from tests.edge.process import Process
from tests.edge.web import Web

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("ONNX_MAGR_EDGE", ROOT / ".edge")).resolve()
ARM64 = FOLDER / "arm64"


def require(target: Target) -> None:
    """Skip the test where the target cannot run, or fail it where ONNX_MAGR_REQUIRE_EDGE=1 says that every target must."""
    reason = target.missing()
    if reason is not None:
        refuse(target.name, reason)


def refuse(name: str, reason: str) -> NoReturn:
    """Skip the test, or fail it; see `require`."""
    if os.environ.get("ONNX_MAGR_REQUIRE_EDGE") == "1":
        pytest.fail(f"{name}: {reason}")
    pytest.skip(f"{name}: {reason}")


def _host_saturates() -> bool | None:
    if platform.machine() != "x86_64":
        return False
    try:
        return "vnni" not in Path("/proc/cpuinfo").read_text()
    except OSError:
        return None


def _absent(*parts: str | Path) -> str | None:
    """The first of the commands and files that is not there."""
    for part in parts:
        if not (part.exists() if isinstance(part, Path) else shutil.which(part)):
            return f"{part} is not installed (.ci/edge does it)"
    return None


def _haswell_missing() -> str | None:
    if platform.machine() != "x86_64":
        return f"runs this environment's own Python, which is for {platform.machine()}"
    return _absent("qemu-x86_64")


def _arm_missing(cpu: str) -> Callable[[], str | None]:
    return lambda: _absent("qemu-aarch64", ARM64 / cpu / "usr/bin/python3.11", ARM64 / "site/onnxruntime", ARM64 / cpu / "proc/cpuinfo")


def _arm(cpu: str) -> Process:
    """The arm64 Python with arm64 wheels. ``-S`` keeps it from the packages of this machine's Python of the same version."""
    command = ("qemu-aarch64", "-cpu", cpu, "-L", str(ARM64 / cpu), str(ARM64 / cpu / "usr/bin/python3.11"), "-s", "-S")
    return Process(cpu, command, False, _arm_missing(cpu), {"PYTHONPATH": str(ARM64 / "site")})


HOST = Process("host", (sys.executable,), _host_saturates(), lambda: None)
"""This machine, without an emulator: what the others are compared with."""
HASWELL = Process("haswell", ("qemu-x86_64", "-cpu", "Haswell", sys.executable), True, _haswell_missing)
"""x86 with AVX2 and without VNNI."""
CORTEX_A76 = _arm("cortex-a76")
"""ARM64 with the dot product instructions."""
CORTEX_A53 = _arm("cortex-a53")
"""ARM64 without them."""
WEB = Web("web", FOLDER / "web" / "node_modules" / "onnxruntime-web" / "dist")
"""onnxruntime-web in headless Chromium."""

TARGETS: dict[str, Target] = {target.name: target for target in (HOST, HASWELL, CORTEX_A76, CORTEX_A53, WEB)}
