"""Calibration and validation data."""
