"""Passes that treat one layer at a time."""
