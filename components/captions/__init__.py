"""The step caption-videos, and the captioners that it can use."""
