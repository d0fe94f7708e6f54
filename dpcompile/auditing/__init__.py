"""Audits: a lower bound on epsilon from what a training run gives away, beside the proved upper bound."""
