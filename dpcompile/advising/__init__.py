"""Advice on what to train with: batch, noise, length, C and learning rate, and what looks at the data cost."""
