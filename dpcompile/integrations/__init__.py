"""Where people already work: other libraries' training loops, made private. Each is imported by its own name."""
