"""The dataset, sampled by Poisson and brought to the device in micro-batches."""
