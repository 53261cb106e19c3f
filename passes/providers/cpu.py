"""The processor: what every onnxruntime has, and what it falls back to."""

from magr_onnx.passes.providers.provider import Provider

PROVIDER = Provider("cpu", "CPUExecutionProvider", host_memory=True)
