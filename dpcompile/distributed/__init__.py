"""What lies on which rank."""
