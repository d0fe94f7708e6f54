"""What is known of the privacy that was spent, on dp-accounting."""
