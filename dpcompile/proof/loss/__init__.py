"""The loss outside the model: whether what autograd recorded of it mixes examples."""
