"""The step synthesize-videos, and the import of existing videos and texts."""
