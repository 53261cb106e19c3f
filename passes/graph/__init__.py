"""Views of a graph and small changes to it that know nothing of layers."""
