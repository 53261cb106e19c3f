"""What a quantized model loses, and whether its accumulators hold."""
