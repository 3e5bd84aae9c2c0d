"""Write the raw prompts of the toy dataset, one JSON object per line:

python -m components.digits.prompts --count 2400 --seed 0 --without data/heldout.json > data/prompts/digits.jsonl

With `--world stories`, those of the other world.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from components.digits.worlds import DIGITS, WORLDS, World

LICENCE = "CC0-1.0"


def write_prompts(count: int, seed: int, without: Iterable[str] = (), kind: World = DIGITS) -> Iterator[dict[str, str]]:
    """Yield `count` raw rows whose prompts differ from each other, and from those in `without`, in their words.

    Case and punctuation don't count as a difference. Equal arguments give equal rows.
    """
    rng = np.random.default_rng(seed)
    seen = {words(text) for text in without}
    left = count
    while left:
        text = kind.write_prompt(kind.sample(rng), rng)
        if words(text) not in seen:
            seen.add(words(text))
            left -= 1
            yield {"text": text, "source": f"{kind.name} world", "licence": LICENCE}


def words(text: str) -> str:
    """The words of a text, for comparison."""
    return " ".join(re.findall(r"\w+", text.lower()))


def heldout_prompts(path: Path) -> list[str]:
    """The evaluation's prompts in ``data/heldout.json``, which must not be trained on."""
    heldout = json.loads(path.read_text(encoding="utf-8"))
    return [
        item["prompt"] for items in heldout.values() if isinstance(items, list) for item in items if "prompt" in item
    ]


def main() -> None:
    """Write rows to standard output."""
    parser = argparse.ArgumentParser(prog="python -m components.digits.prompts", description=__doc__.splitlines()[0])
    parser.add_argument("--world", choices=sorted(WORLDS), default=DIGITS.name)
    parser.add_argument("--count", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--without", type=Path, help="a file of held-out items, whose prompts are left out")
    options = parser.parse_args()
    without = heldout_prompts(options.without) if options.without else []
    for row in write_prompts(options.count, options.seed, without, WORLDS[options.world]):
        sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
