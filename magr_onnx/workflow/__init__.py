"""The steps of a run: prepare, calibrate, solve, write, report."""
