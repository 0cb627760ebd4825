"""The callbacks that a Trainer is given."""
