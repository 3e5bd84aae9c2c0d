"""Training: the data of a batch, the loop on DeepSpeed, and checkpoints from which a killed run resumes."""
