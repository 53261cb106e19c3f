"""Sessions of onnxruntime: the only place that makes them."""
