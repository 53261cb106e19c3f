"""Integer dot products in a graph, as the overflow proof sees them."""
