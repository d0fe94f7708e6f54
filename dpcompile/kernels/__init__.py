"""Operators that graphs hold whole, and what runs them on each device."""
