"""Everything that runs a model: the only place where an onnxruntime session is made."""
