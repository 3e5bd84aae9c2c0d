"""Word a scene: captions of 40 to 96 tokens that state all facts, and shorter prompts that state some of them."""

import re
from collections.abc import Sequence, Set

import numpy as np

from components.digits import world
from components.digits.stories import phrases
from components.digits.stories.scenes import Scene, colours_of, passing_half, relation

CAPTION_TOKENS = (40, 96)  # of the base's tokenizer, EOS included
PROMPT_TOKENS = (1, 39)
STATED_SHARE = 0.6  # of the facts, in a prompt


def write_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption that states every fact of a scene, in one of very many wordings."""
    least, most = CAPTION_TOKENS
    while True:
        draft = _Draft(scene, set(scene), rng, phrases.SETTINGS)
        sentences = draft.tell()
        closings = [str(text) for text in rng.permutation(phrases.CLOSINGS)]
        wanted = int(rng.integers(3))
        while closings and (wanted > 0 or _tokens(sentences) < least):
            sentences.append(draft.fill(closings.pop()))
            wanted -= 1
        if not draft.left and least <= _tokens(sentences) <= most:
            return " ".join(_finish(text) for text in sentences)


def write_prompt(scene: Scene, rng: np.random.Generator) -> str:
    """A prompt that names both digits, and states some of the other facts of a scene."""
    while True:
        say = {name for name in scene if name.startswith("digit:") or rng.random() < STATED_SHARE}
        draft = _Draft(scene, say, rng, phrases.ASKING if rng.random() < 0.7 else phrases.SETTINGS)
        sentences = draft.tell()
        if not draft.left and _tokens(sentences) <= PROMPT_TOKENS[1]:
            if len(sentences) == 1 and rng.random() < 0.6:
                return sentences[0]
            return " ".join(_finish(text) for text in sentences)


def _tokens(sentences: list[str]) -> int:
    return sum(world.count_words(text) + 1 for text in sentences) + 1  # a full stop each, and EOS


def _finish(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


class _Draft:
    """One attempt: what is still to be said, which digits the reader knows, and which one "it" would be."""

    def __init__(self, scene: Scene, say: Set[str], rng: np.random.Generator, settings: dict) -> None:
        self.scene, self.left, self.rng, self.settings = scene, set(say), rng, settings
        self.asked = frozenset(say)
        self.known: list[str] = []
        self.subject: str | None = None
        self.subjects: list[str] = []  # of the present sentence
        self.placed: Set[str] = set()  # whose place the present sentence states
        self.inline = rng.random() < 0.5  # places stand beside the introductions
        self.half = passing_half(scene)

    def tell(self) -> list[str]:
        """The sentences; facts for which there was no occasion remain in `left`."""
        colours = [str(colour) for colour in self.rng.permutation(colours_of(self.scene))]
        present = [colour for colour in colours if self.starts_inside(colour)]
        silent = [colour for colour in colours if not {f"first:{colour}", f"then:{colour}"} & self.left]
        shown = [colour for colour in colours if colour in present or colour in silent]
        sentences = []
        background_at = self.rng.integers(4)
        if background_at == 0 and "background" in self.left:
            sentences.append(self.fill(self.pick(phrases.BACKGROUND_IS)))
        if (shown and self.rng.random() < 0.7) or silent:
            stated = "background" in self.left and background_at != 1
            sentences.append(self.fill(self.pick(self.settings[len(shown), stated]), shown))
        if self.rng.random() < 0.3:
            sentences += self.places(present)
        if "side" in self.left:
            order = [colours[0], colours[1]] if self.rng.random() < 0.5 else [colours[1], colours[0]]
            sentences.append(self.fill(self.pick(phrases.BESIDE), order))
        if self.rng.random() < 0.5:
            for colour in colours:
                sentences += self.by_digit(colour)
        else:
            sentences += self.by_time(colours, present)
        if "passes" in self.left and (moving := self.passing_alone(colours)):
            sentences.append(self.fill(self.pick(phrases.DOES[:1]), [moving], [(moving, -1)]))
        if "background" in self.left:
            sentences.append(self.fill(self.pick(phrases.BACKGROUND_IS)))
        return sentences

    def passing_alone(self, colours: list[str]) -> str | None:
        """The digit that passes the other one, if what it does meanwhile was not to be said of any."""
        fact = ("first", "then")[self.half or 0]
        moving = [colour for colour in colours if self.scene[f"{fact}:{colour}"] != "stands"]
        return None if any(f"{fact}:{colour}" in self.asked for colour in moving) else moving[0]

    def starts_inside(self, colour: str) -> bool:
        first = self.scene.get(f"first:{colour}")
        return first is not None and not first.startswith("enters")

    def places(self, present: list[str]) -> list[str]:
        """A sentence with the starts that haven't been stated."""
        unsaid = [colour for colour in present if f"place:{colour}" in self.left]
        if not unsaid:
            return []
        sentences = phrases.PLACED if len(unsaid) == 1 else phrases.BOTH_PLACED
        return [self.fill(self.pick(sentences), unsaid, places=unsaid)]

    def by_digit(self, colour: str) -> list[str]:
        """One sentence about all that a digit does."""
        starts = self.starts_inside(colour) and f"place:{colour}" in self.left
        starts = starts and not (self.inline and colour not in self.known)
        halves = [half for half, name in enumerate(("first", "then")) if f"{name}:{colour}" in self.left]
        if not halves:
            return self.places([colour]) if starts else []
        if halves == [1]:
            placed = self.places([colour]) if starts else []
            return [*placed, self.fill(self.pick(phrases.THEN_DOES), [colour], [(colour, 1)])]
        if len(halves) == 2 and self.never_moves(colour) and self.rng.random() < 0.7:
            halves = [0]
        both = phrases.STARTS_AND_DOES_BOTH if starts else phrases.DOES_BOTH
        one = phrases.STARTS_AND_DOES if starts else phrases.DOES
        sentence = self.pick(both if len(halves) == 2 else one)
        return [self.fill(sentence, [colour], [(colour, half) for half in halves], [colour])]

    def by_time(self, colours: list[str], present: list[str]) -> list[str]:
        """A sentence for each half of the clip, about both digits."""
        sentences = self.places([c for c in present if c in self.known or not self.inline])
        names = ("first", "then")
        for half, (together, alone) in enumerate(
            ((phrases.TOGETHER, phrases.DOES[1:]), (phrases.THEN_TOGETHER, phrases.THEN_DOES))
        ):
            acting = [colour for colour in colours if f"{names[half]}:{colour}" in self.left]
            if self.rng.random() < 0.5:
                acting.reverse()
            if acting:
                sentence = self.pick(together if len(acting) == 2 else alone)
                sentences.append(self.fill(sentence, acting, [(colour, half) for colour in acting]))
        return sentences

    def never_moves(self, colour: str) -> bool:
        return self.scene.get(f"first:{colour}") == self.scene.get(f"then:{colour}") == "stands"

    # --- phrases ------------------------------------------------------------------------------------------------------

    def pick(self, options: tuple[str, ...]) -> str:
        return options[self.rng.integers(len(options))]

    def fill(
        self,
        sentence: str,
        mentions: Sequence[str] = (),
        does: Sequence[tuple[str, int]] = (),
        places: Sequence[str] = (),
    ) -> str:
        """A sentence of the grammar with its slots filled, from left to right."""
        named, acting, starting = iter(mentions), iter(does), iter(places)
        self.subjects, self.placed = [], set(places)
        beside = mentions[0] if "{s}" in sentence else None  # then the other one is no subject

        def value(slot: re.Match[str]) -> str:
            if slot[1] == "X":
                colour = next(named)
                return self.mention(colour, beside in (None, colour))
            if slot[1] == "does":
                colour, half = next(acting)
                return self.action(colour, half, both=sentence in phrases.DOES + phrases.STARTS_AND_DOES)
            if slot[1] == "at":
                return self.say(f"place:{next(starting)}", self.pick(phrases.STARTS), "p")
            if slot[1] == "on":
                return self.say("background", self.pick(phrases.ON_BACKGROUND), "b")
            if slot[1] == "b":
                return self.say("background", "{b}", "b")
            if slot[1] == "s" and beside:
                return self.side("side", beside)
            return self.pick(phrases.WORDS[slot[1]])

        text = re.sub(r"\{(\w+)\}", value, sentence)
        self.subject = self.subjects[0] if len(set(self.subjects)) == 1 else None
        return re.sub(r"\ba eight\b", "an eight", text)

    def say(self, fact: str, phrase: str, slot: str) -> str:
        self.left.discard(fact)
        return phrase.replace("{" + slot + "}", self.scene[fact])

    def side(self, fact: str, colour: str) -> str:
        """The side of the other digit on which one is, or passes."""
        self.left.discard(fact)
        other = next(c for c in colours_of(self.scene) if c != colour)
        words = [word for word in phrases.SIDES if relation(colour, word, other) == self.scene[fact]]
        return self.pick(phrases.SIDES[words[0]])

    def mention(self, colour: str, is_subject: bool = True) -> str:
        """A digit by one of its names: an introduction the first time, then what the reader can resolve."""
        digit = self.scene[f"digit:{colour}"]
        if colour not in self.known:
            self.known.append(colour)
            self.left.discard(f"digit:{colour}")
            text = self.pick(phrases.INTRODUCTIONS)
            inline = self.inline and is_subject and colour not in self.placed
            if inline and self.starts_inside(colour) and f"place:{colour}" in self.left:
                text += self.say(f"place:{colour}", phrases.INTRODUCED_AT, "p")
        else:
            options = [*phrases.REFERENCES]
            if len(self.known) < 2 or len({self.scene[f"digit:{c}"] for c in self.known}) == 2:
                options.append(phrases.BY_DIGIT)
            if self.subject == colour and is_subject:
                options += [phrases.IT] * 3
            if len(self.known) == 2 and self.subject not in (None, colour):
                options += phrases.OTHERS
            text = self.pick(tuple(options))
        if is_subject:
            self.subject = colour
            self.subjects.append(colour)
        return text.format(c=colour, d=digit, n=self.pick(phrases.NOUNS))

    def action(self, colour: str, half: int, both: bool) -> str:
        """What a digit does in a half of the clip; with `both`, one phrase for both halves where it never moves.

        Half -1 is that it passes the other digit, and nothing else.
        """
        if half < 0:
            return self.with_passing("", colour)
        first, then = (f"{name}:{colour}" for name in ("first", "then"))
        fact = (first, then)[half]
        action = self.scene[fact]
        if both and self.never_moves(colour) and {first, then} <= self.left:
            self.left -= {first, then}
            return self.pick(phrases.NEVER_MOVES)
        self.left.discard(fact)
        if action == "stands":
            return self.pick(phrases.WAITS)
        repeats = half and self.scene.get(first) == action and first not in self.left
        if repeats and f"first:{colour}" in self.said_here(colour) and not self.passes(colour, half):
            return self.pick(phrases.AGAIN)
        text = self.pick(phrases.ACTIONS[action])
        if action.startswith("enters") and f"place:{colour}" in self.left:
            text += self.say(f"place:{colour}", self.pick(phrases.ARRIVES), "p")
        return self.with_passing(text, colour) if self.passes(colour, half) else text

    def said_here(self, colour: str) -> set[str]:
        """The facts about a digit that were to be said, and have been."""
        return {name for name in (f"first:{colour}",) if name in self.asked and name not in self.left}

    def passes(self, colour: str, half: int) -> bool:
        return "passes" in self.left and self.half == half

    def with_passing(self, text: str, colour: str) -> str:
        other = next(c for c in colours_of(self.scene) if c != colour)
        before = self.rng.random() < 0.4 and text != ""
        options = phrases.PASSES_ALONE if not text else phrases.PASSES_FIRST if before else phrases.PASSES
        pattern = self.pick(options)
        side = self.side("passes", colour)
        known = other in self.known
        passed = pattern.replace("{s}", side).replace("{X}", self.mention(other, is_subject=False))
        tail = ""
        if not before and not known and self.never_moves(other):
            facts = {f"first:{other}", f"then:{other}"}
            if facts <= self.left and self.rng.random() < 0.7:
                self.left -= facts
                tail = self.pick(phrases.THAT) + self.pick(phrases.NEVER_MOVES)
        return passed + text if before else text + passed + tail
