"""Scorers of generated videos: models that had no part in the training, each from a folder that the profile names.

One module a scorer, with ``load(folder)``; what that gives has ``videos(frames)``, an embedding for each clip of frames
uint8 (B, F, H, W, 3), and ``nearest(embeddings, prompts)``, the prompt that each clip fits best. Named in the profile
as ``evaluate_model.scorers: {NAME: FOLDER}``; a clip is right where its own prompt is the nearest of all.
"""
