"""Scores of captions, of videos, and of both together: what was claimed, what is true, and how sure we are."""
