"""The registry of execution providers: where onnxruntime runs a model, and which kernels it has there.

To add one: write its file in this folder, with a `Provider` object, and add that to `PROVIDERS`.
"""

from __future__ import annotations

from magr_onnx.passes.providers import cpu, cuda
from magr_onnx.passes.providers.provider import Provider

PROVIDERS: dict[str, Provider] = {provider.name: provider for provider in (cpu.PROVIDER, cuda.PROVIDER)}


def find_provider(name: str) -> Provider:
    """Look a provider up by its name here or in onnxruntime; one that is not registered takes whatever a plan writes."""
    lower = name.lower()
    known = (provider for provider in PROVIDERS.values() if lower in (provider.name, provider.onnxruntime.lower()))
    return next(known, Provider(name, name))


__all__ = ["PROVIDERS", "Provider", "find_provider"]
