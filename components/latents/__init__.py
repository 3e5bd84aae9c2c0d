"""The step encode-latents."""
