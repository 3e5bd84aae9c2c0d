"""Training: what a batch is, the loop, and the checkpoints that let a killed run go on."""
