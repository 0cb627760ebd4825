"""How many examples at once."""
