"""Scorers of generated videos: models that took no part in the training, each from a folder that the profile names.

One module per scorer, with ``load(folder)``. The scorer has ``videos(frames)``, which returns an embedding per clip for
frames uint8 (B, F, H, W, 3), and ``nearest(embeddings, prompts)``, which returns the prompt that fits each clip best. A
profile names them as ``evaluate_model.scorers: {NAME: FOLDER}``. A clip is right if its own prompt is the nearest.
"""
