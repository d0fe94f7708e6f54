"""From norms to weights."""
