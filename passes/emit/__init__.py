"""Writers of quantized layers, one form a file, and the reader that proves what was written."""
