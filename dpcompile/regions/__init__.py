"""A model in several graphs."""
