"""The user's own ``training_step``, run on one example at a time."""
