"""What the compiler is given."""
