"""Odd forms of ONNX files: builders of one file a form, and what onnxruntime and every command make of it."""
