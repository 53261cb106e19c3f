"""Float-to-float rewrites that make layers easier to quantize."""
