"""Uni-ViGU: one diffusion transformer for video generation, video understanding, and both jointly."""
