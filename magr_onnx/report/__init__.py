"""The report of a run: its data, its text and its pages."""
