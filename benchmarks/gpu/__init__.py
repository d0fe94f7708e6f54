"""One command for a GPU that is lent for minutes."""
