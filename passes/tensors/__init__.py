"""Activations between quantized operators: which values become integers, which of them share a grid, and the nodes that round them."""
