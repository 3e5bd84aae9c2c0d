"""The steps train-stage-1 and train-stage-2."""
