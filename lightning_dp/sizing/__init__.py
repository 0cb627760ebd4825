"""How many examples are worked on at once."""
