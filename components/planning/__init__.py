"""The cost of a profile, and a check of all its steps without data, weights or GPUs."""
