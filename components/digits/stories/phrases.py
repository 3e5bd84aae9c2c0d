"""The grammar of stories: the phrases for each fact, and the sentences that are made of them.

The writer fills these phrases in, and the reader compiles the same ones into patterns. A slot in braces is a colour
{c}, digit {d}, noun {n}, place {p}, background {b} or side {s}; in a sentence also a mention of a digit {X}, a start
{at} and what the digit does {does}.
"""

from collections.abc import Mapping
from itertools import product

from components.digits import world
from components.digits.stories.scenes import COLOURS, EDGES

NOUNS = ("digit", "number", "figure", "numeral")
INTRODUCTIONS = (
    *("a {c} {d}", "a handwritten {c} {d}", "a {c} {n} {d}", "a {d} in {c}", "a {d} written in {c}"),
    *("a {n} {d} painted {c}", "the {n} {d} in {c}"),
)
REFERENCES = ("the {c} {d}", "the {c} one", "the {c} {n}")
BY_DIGIT = "the {d}"  # where the two digits differ
IT = "it"
OTHERS = ("the other one", "the other {n}")
INTRODUCED_AT = " at the {p}"  # behind an introduction

SIDES = {
    "above": ("above", "over"),
    "below": ("below", "under"),
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
}
STARTS = ("starts at the {p}", "begins at the {p}", "is at the {p}", "can be seen at the {p}")
FIRST = ("first", "at first", "to begin with", "in the first half")
THEN = ("then", "after that", "next", "finally", "in the second half")

WAITS = ("stands still", "does not move", "stays where it is", "waits", "keeps still")
NEVER_MOVES = (
    *("stands still the whole time", "never moves", "stays in its place from the first frame to the last"),
    "does not move at all",
)
AGAIN = ("does the same again", "goes on in the same way")
ARRIVES = (" and reaches the {p}", " and gets to the {p}", " and comes to the {p}")
PASSES = (", passing {s} {X}", " and passes {s} {X}")
PASSES_FIRST = ("passes {s} {X} as it ", "crosses {s} {X} as it ", "crosses {s} {X} while it ")
PASSES_ALONE = ("passes {s} {X}", "crosses {s} {X}")  # where a prompt doesn't say what else it does
THAT = (" that ", " which ")

_HEADINGS = {
    "left": ("left", "to the left"),
    "right": ("right", "to the right"),
    "up": ("up", "upwards"),
    "down": ("down", "downwards"),
}
_PACES = {"slow": ("slowly", "at a slow pace", "in no hurry"), "fast": ("quickly", "fast", "at high speed")}
_ADVERBS = {"slow": "slowly", "fast": "quickly"}
_GOES = ("moves", "slides", "travels", "glides", "goes")
_LEAVES = ("leaves the frame", "goes out", "disappears", "exits")
_ENTERS = ("comes in", "enters the frame", "appears", "slides in")


def _edges(edge: str) -> tuple[str, ...]:
    return (f"{'on' if edge in ('left', 'right') else 'at'} the {edge}", f"through the {edge} side")


def _origins(edge: str) -> tuple[str, ...]:
    return (f"from the {edge}", f"from the {edge} side")


# Every action and its phrases.
ACTIONS: Mapping[str, tuple[str, ...]] = {
    "stands": WAITS,
    **{
        f"goes {direction} {speed}": (
            *(f"{verb} {heading} {pace}" for verb, heading, pace in product(_GOES, headings, _PACES[speed])),
            *(f"{_ADVERBS[speed]} {verb} {heading}" for verb, heading in product(_GOES, headings)),
        )
        for direction, headings in _HEADINGS.items()
        for speed in world.CELLS
    },
    **{
        f"leaves {edge}": (*map(" ".join, product(_LEAVES, _edges(edge))), f"leaves {_HEADINGS[direction][-1]}")
        for direction, edge in EDGES.items()
    },
    **{f"enters {edge}": tuple(map(" ".join, product(_ENTERS, _origins(edge)))) for edge in EDGES.values()},
}

ON_BACKGROUND = ("on a {b} background", "on a plain {b} background", "in front of a {b} background")
BACKGROUND_IS = (
    *("the background is {b}", "everything happens on a plain {b} background", "the whole background stays {b}"),
    "the scene has a {b} background",
)
SETTINGS = {  # by the number of digits that they introduce
    (1, True): ("{on} there is {X}", "this clip shows {X} {on}", "{on} we see {X}", "the video shows {X} {on}"),
    (2, True): (
        *("{on} there are {X} and {X}", "there are two {n}s {on}, {X} and {X}", "this clip shows {X} and {X} {on}"),
        *("{on} we see two {n}s, {X} and {X}", "{X} and {X} share the frame {on}"),
    ),
    (1, False): ("this clip shows {X}", "there is {X}", "the video shows {X}"),
    (2, False): (
        *("there are two {n}s, {X} and {X}", "this clip shows {X} and {X}", "{X} and {X} share the frame"),
        "the video shows two {n}s, {X} and {X}",
    ),
}
ASKING = {  # how a prompt begins
    (1, True): ("{X} {on}", "a video of {X} {on}", "show {X} {on}"),
    (2, True): ("{X} and {X} {on}", "a video of {X} and {X} {on}", "show {X} and {X} {on}"),
    (1, False): ("{X}", "a video of {X}", "show {X}"),
    (2, False): ("{X} and {X}", "a video of {X} and {X}", "show {X} and {X}"),
}
PLACED = ("{X} {at}",)
BOTH_PLACED = ("{X} {at} and {X} {at}", "{X} {at} while {X} {at}")
BESIDE = ("{X} is {s} {X}", "{first} {X} is {s} {X}", "{X} starts {s} {X}")
DOES_BOTH = (
    *("{X} {does}, then {does}", "{X} {does}, and after that it {does}", "{first} {X} {does}, then it {does}"),
    "{X} {does} and then {does}",
)
STARTS_AND_DOES_BOTH = ("{X} {at}, {does}, then {does}", "{X} {at}, {does}, and after that it {does}")
DOES = ("{X} {does}", "{first} {X} {does}")
STARTS_AND_DOES = ("{X} {at} and {does}",)
THEN_DOES = ("{then} {X} {does}",)
TOGETHER = ("{first} {X} {does} while {X} {does}", "{first} {X} {does}, and {X} {does}")
THEN_TOGETHER = ("{then} {X} {does} while {X} {does}", "{then} {X} {does}, and {X} {does}")
CLOSINGS = (
    *("nothing else is in the frame", "the camera stays where it was", "there is no other {n} in the picture"),
    *("the colours are the same in every frame", "both were written by hand", "no sound can be heard"),
    "the light is the same from the first frame to the last",
)
SENTENCES = (
    *BACKGROUND_IS,
    *(text for table in (SETTINGS, ASKING) for texts in table.values() for text in texts),
    *(*PLACED, *BOTH_PLACED, *BESIDE, *DOES_BOTH, *STARTS_AND_DOES_BOTH, *DOES, *STARTS_AND_DOES, *THEN_DOES),
    *(*TOGETHER, *THEN_TOGETHER, *CLOSINGS),
)
WORDS = {  # what fills a slot of one word or phrase
    "c": COLOURS,
    "d": world.DIGITS,
    "n": NOUNS,
    "p": world.PLACES,
    "b": tuple(world.BACKGROUNDS),
    "s": tuple(text for texts in SIDES.values() for text in texts),
    "on": ON_BACKGROUND,
    "first": FIRST,
    "then": THEN,
    "at": STARTS,
}
