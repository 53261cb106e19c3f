"""Calibration: statistics of activations, measured by running the model."""
