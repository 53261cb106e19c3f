"""Toolchains that the package plugs into."""
