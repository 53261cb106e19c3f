"""Statistics of activations, gathered by running the model."""
