"""Norms, weights and clipped sums written into the joint graph."""
