"""Captions that speak of the camera or of the video instead of what is seen, for English.

A model that learns from them writes "the camera pans" about videos without a moving camera. A caption may say what its
prompt asks for.
"""

import re
from collections.abc import Sequence

from univigu.errors import ConfigError

REASON = "camera_words"
_MOVES = (
    r"pans?|panning|tilts?|tilting|zooms?|zooming|dollies|tracks?|tracking|follows?|following|moves?|moving|stays?|"
    r"remains?|holds?|circles?|orbits?|rises?|pulls?|pushes?|captures?|focuses|shifts?|is|was|does|then|slowly|gradually"
)
_SHOTS = (
    r"tracking|panning|dolly|crane|aerial|drone|hand-?held|static|establishing|wide|wide-angle|medium|close-?up|long|"
    r"full|overhead|low-angle|high-angle|point-of-view|pov|slow-motion|opening|final"
)
_MEDIA = r"video|clip|footage|scene|shot|frame|image|sequence"
KINDS = {
    "movement": rf"\bcamera (?:{_MOVES})\b|\bcamera ?(?:movement|work|angle)s?\b|\bzoom(?:s|ing)? (?:in|out)\b",
    "shot": rf"\b(?:{_SHOTS}) shots?\b|\bclose-?ups?\b",
    "medium": rf"\b(?:this|the) (?:{_MEDIA}) (?:shows?|depicts?|captures?|features?|begins?|starts?|opens?|ends?|is)\b|"
    rf"\bin (?:this|the) (?:{_MEDIA})\b",
}


def check_caption(prompt: str, caption: str, kinds: Sequence[str] = tuple(KINDS), most: int = 0) -> str | None:
    """The camera words of a caption, if there are more than `most`; otherwise None.

    kinds: names in `KINDS`. Those that the prompt has as well don't count. Raises `ConfigError` for another name.
    """
    if unknown := sorted(set(kinds) - set(KINDS)):
        raise ConfigError(f"The check 'camera_words' has no kind '{unknown[0]}'; its kinds: {', '.join(KINDS)}.")
    asked = [kind for kind in kinds if not re.search(KINDS[kind], prompt.casefold())]
    found = [match[0] for kind in asked for match in re.finditer(KINDS[kind], caption.casefold())]
    if len(found) <= most:
        return None
    return f"it speaks of the camera or the video: {', '.join(dict.fromkeys(found[:4]))}; say only what is seen"
