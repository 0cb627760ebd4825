"""Private steps under manual optimization, where ``training_step`` itself steps its optimizers."""
