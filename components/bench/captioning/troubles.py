"""What befalls requests for captions, and what a client without fault sends then, which no client can say of itself."""

import random
from collections.abc import Sequence

# The same request has to come again:
LOST = ("429", "429 date", "500", "hang", "half json", "broken off", "reset", "trickle", "no choices")
# Another request has to come, with a complaint:
BAD = (
    *("empty", "too long", "too short", "refusal", "repeats prompt", "wrong field", "cut off", "loop", "only thought"),
    *("tool calls", "no ending", "two texts"),
)
# Good, in an unusual shape:
ODD = (
    *("parts", "thought", "legacy field", "half a thought", "json", "fence", "preface", "template tokens"),
    "other usage",
)
BLOCKED = ("blocked", "policy")
LASTING = ("500", "no choices")  # of those that are lost: twice in a row, they are the prompt's


def draw_troubles(seed: int, prompt: str) -> tuple[str, ...]:
    """What befalls the requests for a prompt, in order: nothing for most, something for three in ten."""
    rng = random.Random(f"{seed} {prompt}")
    chance = rng.random()
    if chance < 0.70:
        return ()
    if chance < 0.72:
        return (rng.choice(BLOCKED),)
    if chance < 0.73:
        return ("refusal",) * 3
    if chance < 0.735:
        return ("500",) * 99
    if chance < 0.77:
        return (rng.choice(ODD),)
    troubles = rng.sample([*LOST[2:], *BAD], rng.choice((1, 1, 2)))
    return (*troubles, rng.choice(LOST[:2])) if rng.random() < 0.05 else tuple(troubles)


def least_requests(troubles: Sequence[str], tries: int, attempts: int) -> tuple[int, str]:
    """How many requests a client without fault sends for a clip with these troubles, and the status that it ends with.

    It tries a request `tries` times, not counting refusals by a rate limit, or twice where it gets the same words; and
    judges `attempts` answers.
    """
    lost = judged = 0
    for sent, (before, trouble) in enumerate(zip(("", *troubles), troubles, strict=False), start=1):
        if trouble in BLOCKED:
            return sent, "blocked"
        if trouble in ODD:
            return sent, "success"
        if trouble in BAD:
            lost, judged = 0, judged + 1
            if judged == attempts:
                return sent, {"refusal": "blocked", "cut off": "truncated"}.get(trouble, "error")
        elif not trouble.startswith("429"):
            lost += 1
            if lost == tries or (lost == 2 and trouble == before and trouble in LASTING):
                return sent, "error"
    return len(troubles) + 1, "success"
