"""What a profile costs, and a check of all its steps without data, weights or GPUs."""
