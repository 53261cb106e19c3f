"""The numeric core: arrays in, arrays out. It knows no model files and no onnxruntime."""
