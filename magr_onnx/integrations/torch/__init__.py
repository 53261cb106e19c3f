"""From torch modules to quantized ONNX models, and MagR for the modules themselves."""
