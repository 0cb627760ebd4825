"""What a step is, as numbers: never torch."""
