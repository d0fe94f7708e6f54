"""What privacy costs, measured."""
