"""That examples do not mix, and where each parameter's gradient is summed over them."""
