"""Faults of caption requests, and the minimum of requests that a perfect client sends for them."""

import random
from collections.abc import Sequence

# The client must repeat the request:
LOST = ("429", "429 date", "500", "hang", "half json", "broken off", "reset", "trickle", "no choices")
# The client must send another request that states the problem:
BAD = (
    *("empty", "too long", "too short", "refusal", "repeats prompt", "wrong field", "cut off", "loop", "only thought"),
    *("tool calls", "no ending", "two texts"),
)
# Good answers in an unusual format:
ODD = (
    *("parts", "thought", "legacy field", "half a thought", "json", "fence", "preface", "template tokens"),
    "other usage",
)
BLOCKED = ("blocked", "policy")
LASTING = ("500", "no choices")  # of LOST: twice in a row, the prompt is the cause


def draw_troubles(seed: int, prompt: str) -> tuple[str, ...]:
    """The faults of a prompt's requests, in order: none for seven prompts in ten."""
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
    """The number of requests that a perfect client sends for a clip with these faults, and the clip's final status.

    It tries a request `tries` times, not counting refusals by a rate limit, or twice if the error is the same; and it
    checks `attempts` answers.
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
