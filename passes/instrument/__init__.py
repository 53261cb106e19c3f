"""Copies of a graph that compute more: taps, patches, gradients, segments."""
