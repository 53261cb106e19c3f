"""The kinds of layers that hold weights, and how they are found."""
