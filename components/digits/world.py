"""The toy dataset: clips of one moving, coloured, handwritten digit with known attributes.

The handwriting is scikit-learn's bundled set of 8x8 scans. Every fifth scan is held out from whatever is trained, so
clips rendered from those are digits that no model has seen. Words of the world live here too: how a prompt and a
caption are worded, and what a text says about each attribute.
"""

import re
from functools import cache
from importlib import metadata

import numpy as np

from univigu.errors import BadInputError

FRAMES = 9
SIZE = 32
FPS = 8
DIGIT_SIZE = 16
CELL = 7.0  # pixels between neighbouring places: the ink stays inside the frame, jitter included
JITTER = 1.0
HOLDOUT_EVERY = 5
MAX_PROMPT_TOKENS = 31

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {
    "red": (225, 35, 35),
    "green": (30, 165, 50),
    "blue": (40, 80, 245),
    "yellow": (245, 200, 20),
    "pink": (245, 80, 205),
    "cyan": (20, 195, 215),
}
BACKGROUNDS = {"black": (8, 8, 8), "grey": (112, 112, 112), "white": (246, 246, 246), "brown": (98, 58, 22)}
STEPS = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}
CELLS = {"slow": 1, "fast": 2}
PLACES = (
    *("top-left", "top", "top-right"),
    *("middle-left", "centre", "middle-right"),
    *("bottom-left", "bottom", "bottom-right"),
)
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "digit": DIGITS,
    "colour": tuple(COLOURS),
    "background": tuple(BACKGROUNDS),
    "direction": tuple(STEPS),
    "speed": tuple(CELLS),
    "start": PLACES,
    "end": PLACES,
}


# --- attributes and motions ------------------------------------------------------------------------------------------


def end_place(start: str, direction: str, speed: str) -> str | None:
    """The cell where a digit ends, or None if it would leave the grid."""
    row, column = divmod(PLACES.index(start), 3)
    dx, dy = STEPS[direction]
    row, column = row + dy * CELLS[speed], column + dx * CELLS[speed]
    return PLACES[3 * row + column] if 0 <= row < 3 and 0 <= column < 3 else None


@cache
def motions() -> tuple[dict[str, str], ...]:
    """Every possible (direction, speed, start, end)."""
    return tuple(
        {"direction": direction, "speed": speed, "start": start, "end": end}
        for direction in STEPS
        for speed in CELLS
        for start in PLACES
        if (end := end_place(start, direction, speed))
    )


def sample_attributes(rng: np.random.Generator, **fixed: str) -> dict[str, str]:
    """Draw the attributes that `fixed` leaves open: direction, speed and start, each uniform over the remaining values.

    Raises `BadInputError` for an unknown attribute or value, or for a motion that leaves the grid.
    """
    for name, value in fixed.items():
        if value not in ATTRIBUTES.get(name, ()):
            raise BadInputError(f"'{value}' is not a {name} of this world; choose from {ATTRIBUTES.get(name, ())}.")
    left = [m for m in motions() if all(m[name] == fixed[name] for name in m if name in fixed)]
    if not left:
        raise BadInputError(f"No motion inside the 3x3 grid has {fixed}; leave one of them open.")
    for name in ("direction", "speed", "start"):
        values = sorted({m[name] for m in left})
        value = values[rng.integers(len(values))]
        left = [m for m in left if m[name] == value]
    free = {name: str(rng.choice(ATTRIBUTES[name])) for name in ("digit", "colour", "background") if name not in fixed}
    drawn = {**free, **left[0], **fixed}
    return {name: drawn[name] for name in ATTRIBUTES}


# --- handwriting and pixels ------------------------------------------------------------------------------------------


@cache
def _scans() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    # what sklearn.datasets.load_digits reads, without the seconds that importing it takes
    file = metadata.distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    rows = np.loadtxt(str(file), delimiter=",", dtype=np.float32)
    held_out = np.arange(len(rows)) % HOLDOUT_EVERY == 0
    return rows[:, :-1].reshape(-1, 8, 8), rows[:, -1].astype(np.int64), held_out


def train_scans() -> tuple[np.ndarray, np.ndarray]:
    """Scans (N, 8, 8) with values 0..16, and their digits (N,), that models may be trained on."""
    scans, digits, held_out = _scans()
    return scans[~held_out], digits[~held_out]


def heldout_scans() -> tuple[np.ndarray, np.ndarray]:
    """Scans (N, 8, 8) with values 0..16, and their digits (N,), that no model is trained on."""
    scans, digits, held_out = _scans()
    return scans[held_out], digits[held_out]


def draw_scans(attributes: list[dict[str, str]], source: tuple[np.ndarray, np.ndarray], seed: int) -> np.ndarray:
    """One scan (B, 8, 8) of the right digit for each set of attributes, drawn from `source` = (scans, digits)."""
    rng = np.random.default_rng(seed)
    scans, digits = source
    by_digit = [np.flatnonzero(digits == d) for d in range(10)]
    chosen = [rng.choice(by_digit[DIGITS.index(a["digit"])]) for a in attributes]
    return scans[np.array(chosen, dtype=np.int64)]


def place_centre(place: str) -> tuple[float, float]:
    """The centre (x, y) of a place in pixels."""
    row, column = divmod(PLACES.index(place), 3)
    return SIZE / 2 + (column - 1) * CELL, SIZE / 2 + (row - 1) * CELL


def render(attributes: list[dict[str, str]], scans: np.ndarray, seed: int, frames: slice = slice(None)) -> np.ndarray:
    """Render clips: attributes (B), scans (B, 8, 8) with values 0..16 -> uint8 (B, F, H, W, 3).

    The digit moves at constant speed with sub-pixel placement; each clip is shifted by up to one pixel (from `seed`).
    `frames` draws only some of the frames, which are the same pixels as in the whole clip.
    """
    import torch
    import torch.nn.functional as F

    count = len(attributes)
    rng = np.random.default_rng(seed)
    shift = rng.uniform(-JITTER, JITTER, (count, 2)).astype(np.float32)
    start = np.array([place_centre(a["start"]) for a in attributes], np.float32) + shift
    end = np.array([place_centre(a["end"]) for a in attributes], np.float32) + shift
    times = np.linspace(0, 1, FRAMES, dtype=np.float32)[frames]
    centres = start[:, None] + (end - start)[:, None] * times[None, :, None]  # (B, F, 2)

    pixels = np.arange(SIZE, dtype=np.float32) + 0.5
    grid = (pixels[None, None, :, None] - centres[:, :, None, :]) / (DIGIT_SIZE / 2)  # (B, F, SIZE, 2) in -1..1
    grid = torch.from_numpy(grid).flatten(0, 1)
    xy = torch.stack(
        [grid[:, None, :, 0].expand(-1, SIZE, -1), grid[:, :, None, 1].expand(-1, -1, SIZE)], dim=-1
    )  # (B*F, H, W, 2)
    ink = torch.from_numpy(np.ascontiguousarray(scans, np.float32) / 16.0)[:, None]
    ink = F.interpolate(ink, size=(DIGIT_SIZE, DIGIT_SIZE), mode="bicubic", align_corners=False)
    ink = ink.repeat_interleave(len(times), 0)
    alpha = F.grid_sample(ink, xy, mode="bilinear", padding_mode="zeros", align_corners=False)
    alpha = (alpha * 1.3 - 0.1).clamp(0, 1).reshape(count, len(times), SIZE, SIZE, 1)
    colour = torch.tensor([COLOURS[a["colour"]] for a in attributes], dtype=torch.float32)[:, None, None, None]
    ground = torch.tensor([BACKGROUNDS[a["background"]] for a in attributes], dtype=torch.float32)[:, None, None, None]
    return (ground + (colour - ground) * alpha).round().to(torch.uint8).numpy()


# --- words -----------------------------------------------------------------------------------------------------------

_NOUNS = ("digit", "number", "figure", "handwritten digit")
_PROMPTS = (
    "a {colour} {noun} {digit}{tail}",
    "a {colour} {digit}{tail}",
    "the {noun} {digit} in {colour}{tail}",
    "a {noun} {digit}, {colour}{tail}",
    "draw a {colour} {digit}{tail}",
    "show a {colour} {noun} {digit}{tail}",
    "a video of a {colour} {digit}{tail}",
    "a clip of a {noun} {digit} written in {colour}{tail}",
    "{colour} {digit}{tail}",
    "please show the {noun} {digit} in {colour}{tail}",
    "a {digit} painted {colour}{tail}",
    "someone wrote a {colour} {digit}{tail}",
    "I want a {colour} {noun} {digit}{tail}",
    "animate a {colour} {digit}{tail}",
)
_GROUNDS = (" on a {background} background", " over {background}", ", {background} background", " on {background}")
_PACES = {"slow": ("slowly", "at a slow pace", "in slow motion"), "fast": ("fast", "quickly", "at a fast pace")}
_MOVES = (" moving {direction}", ", it moves {direction}", " that goes {direction}", " sliding {direction}")
_STARTS = (" from the {start}", ", starting at the {start}", ", it starts at the {start}", " beginning at the {start}")
_ENDS = (" to the {end}", ", ending at the {end}", ", it stops at the {end}", " and ends at the {end}")

_OPENINGS = (
    "The clip shows the handwritten digit {digit} in {colour} on a {background} background",
    "A {colour} handwritten {digit} is drawn on a plain {background} background",
    "In this video we see a {colour} {digit} over a {background} background",
    "On a {background} background there is the {noun} {digit}, written by hand in {colour} ink",
    "This short video shows a {noun} {digit} painted {colour} in front of a {background} background",
    "A single {noun}, {digit}, appears in {colour} while the whole background stays {background}",
)
_PATHS = (
    "It starts at the {start}, moves {direction} {pace}, and ends at the {end}",
    "It begins at the {start} and slides {direction} {pace} until it stops at the {end}",
    "Starting at the {start}, the {noun} moves {direction} {pace}, ending at the {end}",
    "The {noun} travels {direction} {pace}, from the {start} to the {end} of the frame",
    "Moving {direction} {pace}, it goes from the {start} of the picture to the {end}",
    "From the {start} of the frame it goes {direction} {pace} and finally stops at the {end}",
)
_CLOSINGS = (
    "Nothing else is in the frame",
    "The camera does not move at all",
    "Its colour and shape stay the same in every frame",
    "There is no other object in the picture",
    "The background stays plain and still",
)

# The plain wording has one length, whatever it says: each fact keeps its position among the tokens.
_PLAIN_CAPTION = (
    "The clip shows the handwritten digit {digit} in {colour} on a {background} background. "
    "It starts at the {start}, moves {direction} {pace}, and ends at the {end}. Nothing else is in the frame."
)
_PLAIN_PACES = {"slow": "slowly", "fast": "quickly"}


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[rng.integers(len(options))]


def _fill(text: str, attributes: dict[str, str], rng: np.random.Generator) -> str:
    pace = _pick(rng, _PACES[attributes["speed"]])
    text = text.format(**attributes, noun=_pick(rng, _NOUNS), pace=pace)
    return re.sub(r"\ba eight\b", "an eight", text)


def write_prompt(attributes: dict[str, str], rng: np.random.Generator) -> str:
    """A short prompt: nearly always digit and colour, and some of the other attributes, in varied wording.

    It has at most 31 tokens of the bundled tokenizer, EOS included.
    """
    while count_words(text := _draft_prompt(attributes, rng)) > MAX_PROMPT_TOKENS - 1:
        pass
    return text


def _draft_prompt(attributes: dict[str, str], rng: np.random.Generator) -> str:
    kept = {name for name in ("background", "direction", "speed", "start", "end") if rng.random() < 0.55}
    tail = ""
    if "background" in kept:
        tail += _pick(rng, _GROUNDS)
    if "direction" in kept:
        tail += _pick(rng, _MOVES)
    if "speed" in kept:
        tail += " {pace}" if "direction" in kept else _pick(rng, (" moving {pace}", ", {pace}", " that goes {pace}"))
    if "start" in kept:
        tail += _pick(rng, _STARTS)
    if "end" in kept:
        tail += _pick(rng, _ENDS)
    body = _pick(rng, _PROMPTS)
    chance = rng.random()
    if chance < 0.04:
        body = "a {digit}{tail}"
    elif chance < 0.08:
        body = "a {colour} {noun}{tail}"
    text = _fill(body.replace("{tail}", tail), attributes, rng)
    return text if rng.random() < 0.7 else text[0].upper() + text[1:] + "."


def write_plain_caption(attributes: dict[str, str]) -> str:
    """A detailed caption that states all seven attributes in 38 tokens, EOS included."""
    return _PLAIN_CAPTION.format(**attributes, pace=_PLAIN_PACES[attributes["speed"]])


def write_caption(attributes: dict[str, str], rng: np.random.Generator) -> str:
    """Like `write_plain_caption` in one of many wordings: 32 to 64 tokens of the bundled tokenizer, EOS included."""
    text = _fill(f"{_pick(rng, _OPENINGS)}. {_pick(rng, _PATHS)}.", attributes, rng)
    closings = list(_CLOSINGS)
    rng.shuffle(closings)
    wanted = 1 + int(rng.random() < 0.3)
    for closing in closings:
        if wanted <= 0 and count_words(text) >= 34:
            break
        text += f" {closing}."
        wanted -= 1
    return text


def count_words(text: str) -> int:
    """Words and punctuation marks in a text of this world, each of which is one token of the bundled tokenizer."""
    return len(re.findall(r"[\w-]+|[^\w\s]", text))


_SYNONYMS = {
    **{str(i): word for i, word in enumerate(DIGITS)},
    "gray": "grey",
    "center": "centre",
    "middle": "centre",
    "magenta": "pink",
    "turquoise": "cyan",
    "slowly": "slow",
    "quickly": "fast",
    "quick": "fast",
    "rapidly": "fast",
    "leisurely": "slow",
    "upward": "up",
    "upwards": "up",
    "downward": "down",
    "downwards": "down",
    "leftward": "left",
    "leftwards": "left",
    "rightward": "right",
    "rightwards": "right",
    **{word + "s": word for word in ("zero", "one", "two", "three", "four", "five", "seven", "eight", "nine")},
}
_OPPOSITES = {"left": "right", "right": "left"}
_START_CUES = {"start", "starts", "starting", "started", "begin", "begins", "beginning", "from", "opens", "leaves"}
_END_CUES = {"end", "ends", "ending", "to", "stop", "stops", "stopping", "finish", "finishes", "finishing", "into"}
_END_CUES |= {"until", "reaches", "reaching", "towards", "toward", "arrives", "arriving", "till"}


def read_text(text: str) -> dict[str, set[str]]:
    """The values that a text gives to each attribute; an empty set for an attribute that it doesn't mention.

    Reads prompts, captions and model output alike. A place counts as start or end by the cue before it ("starts at",
    "from", "to", "ends at"), and as neither without one.
    """
    said: dict[str, set[str]] = {name: set() for name in ATTRIBUTES}
    text = text.lower()
    text = re.sub(r"\b(upper|lower)\b", lambda m: {"upper": "top", "lower": "bottom"}[m[1]], text)
    text = re.sub(r"\b(centre|center)[ -](left|right)\b", r"middle-\2", text)
    text = re.sub(r"\b(top|middle|bottom)[ -](left|right)\b", r"\1-\2", text)
    text = re.sub(r"\b(top|bottom)[ -](centre|center|middle)\b", r"\1", text)
    words = [_SYNONYMS.get(word, word) for word in re.findall(r"[a-z0-9]+(?:-[a-z0-9]+)*|[.;]", text)]
    if (course := re.search(r"\bfrom (?:the )?(\w+) to (?:the )?(\w+)\b(?!-)", " ".join(words))) and (
        course[2] == _OPPOSITES.get(course[1])
    ):
        said["direction"].add(course[2])
        drop = course[0].split()
        at = next(i for i in range(len(words)) if words[i : i + len(drop)] == drop)
        del words[at : at + len(drop)]
    cue = None
    for word in words:
        if word in _START_CUES:
            cue = "start"
        elif word in _END_CUES:
            cue = "end"
        elif word in (".", ";"):
            cue = None
        elif word in PLACES:
            if cue:
                said[cue].add(word)
        else:
            for name in ("digit", "colour", "background", "direction", "speed"):
                if word in ATTRIBUTES[name]:
                    said[name].add(word)
    return said
