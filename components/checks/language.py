"""Captions in another language than the profile allows."""

from collections.abc import Sequence

from components.prompts.filters import UNDECIDED, identify_language

REASON = "language"


def check_caption(prompt: str, caption: str, allowed: Sequence[str]) -> str | None:
    """What is wrong with the language of a caption, or None. allowed: ISO 639-1 codes."""
    language, probability = identify_language(caption, tuple(allowed))
    if language in allowed or language == UNDECIDED:
        return None
    return f"it is in the language '{language}' ({probability:.2f}) and should be in {' or '.join(allowed)}"
