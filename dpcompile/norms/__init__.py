"""Per-example squared gradient norms: one file per way to compute them."""
