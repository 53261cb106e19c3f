"""From a torch module to a quantized ONNX model in one call, and MagR for the module itself. Needs the extra ``torch``."""

from magr_onnx.errors import DependencyError, install

try:
    import torch as _torch  # noqa: F401
except ImportError as _error:
    raise DependencyError(f"magr_onnx.torch needs torch, which is not installed; {install('torch')}") from _error

from magr_onnx.integrations.torch.export import export
from magr_onnx.integrations.torch.interface import optimize
from magr_onnx.integrations.torch.weights import Change, Reduced, magr, magr_

__all__ = ["Change", "Reduced", "export", "magr", "magr_", "optimize"]
