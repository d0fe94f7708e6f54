"""From a call of a model to its joint graph with names."""
