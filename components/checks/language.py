"""Captions in a language that the profile doesn't allow."""

from collections.abc import Sequence

from components.prompts.filters import UNDECIDED, identify_language

REASON = "language"


def check_caption(prompt: str, caption: str, allowed: Sequence[str]) -> str | None:
    """The fault of a caption in another language than those allowed (ISO 639-1 codes), or None."""
    language, probability = identify_language(caption, tuple(allowed))
    if language in allowed or language == UNDECIDED:
        return None
    return f"it is in the language '{language}' ({probability:.2f}) and should be in {' or '.join(allowed)}"
