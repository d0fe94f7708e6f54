"""Which rule takes the norm of which parameter's gradients."""
