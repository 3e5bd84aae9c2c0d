"""What the output of the text side can express: nats per word on real English text, for several forms of the head.

The text is Python's own documentation, which every installation has: the language reference in `pydoc_data.topics` and
the docstrings of the standard library, its tests left out. The `VOCABULARY` most common words have a row each, all
others share one. A small network sees the three words on both sides of a gap, which is text at tau = 1, and predicts
the word in the gap, which is at tau = 0, where k(tau) = 0 and the network alone decides. Only the head differs:

=====================  ================================================================================================
``tied 64``            h E^T: h has the d = 64 numbers of the flow's space, and E its rows (the head of old models)
``tied 64 + bias``     the same and a bias per word, which starts from the words' frequencies
``tied 128 + bias``    d = 128
``wide 256 + bias``    h E^T at d = 64, and from the full width 256 numbers into an output table of their own
``full + bias``        an output table as wide as the network
=====================  ================================================================================================

``heldout_nats`` is measured on whole modules that training didn't see, ``training_nats`` on training text. `ratio` is
the held-out nats of `CHOSEN` over those of ``tied 64``.
"""

import ast
import re
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

VOCABULARY = 4000  # words with a row of their own
SIDES = 3  # words on both sides of the gap
WIDTH = 512  # of the network, and of the words at its input 64
STEPS, BATCH, LEARNING_RATE = 1200, 256, 2e-3
HELD_OUT = 10  # every so many modules
HEADS = {  # d, numbers of the output table of its own, bias
    "tied 64": (64, 0, False),
    "tied 64 + bias": (64, 0, True),
    "tied 128 + bias": (128, 0, True),
    "wide 256 + bias": (64, 256, True),
    "full + bias": (64, WIDTH, True),
}
CHOSEN = "wide 256 + bias"


def measure() -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    training, heldout, words = read_text()
    heads = {}
    for name, head in HEADS.items():
        heads[name] = train_head(*head, training, heldout)
        print(name, heads[name], file=sys.stderr, flush=True)
    return {
        "ratio": round(heads[CHOSEN]["heldout_nats"] / heads["tied 64"]["heldout_nats"], 4),
        "chosen": CHOSEN,
        "heads": heads,
        "text": f"pydoc_data.topics and docstrings of the standard library of Python {sys.version.split()[0]}",
        "words": {"training": len(training), "heldout": len(heldout), "different": words, "rows": VOCABULARY + 1},
        "unigram_nats": round(unigram_nats(training, heldout), 4),
        "steps": STEPS,
        "batch_size": BATCH,
    }


def read_text() -> tuple["Tensor", "Tensor", int]:
    """Training and held-out words as ids (number of words,), and how many different words there are."""
    import torch

    modules = [re.findall(r"[a-z]+|[.,;:()]", text.lower()) for text in documentation()]
    counts = Counter(word for module in modules for word in module)
    known = {word: row for row, (word, _) in enumerate(counts.most_common(VOCABULARY))}
    parts: tuple[list[int], list[int]] = [], []
    for number, module in enumerate(modules):
        parts[number % HELD_OUT == 0].extend(known.get(word, VOCABULARY) for word in module)
    training, heldout = (torch.tensor(part) for part in parts)
    return training, heldout, len(counts)


def documentation() -> Iterator[str]:
    """The text of each module of Python's library, in a fixed order: its docstrings, and the topics one by one."""
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        if {"test", "tests", "site-packages", "idlelib", "pydoc_data"} & set(path.relative_to(library).parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
        yield "\n".join(found)


def unigram_nats(training: "Tensor", heldout: "Tensor") -> float:
    """Nats per held-out word of the words' frequencies alone."""
    return -float(log_frequencies(training)[heldout].mean())


def log_frequencies(ids: "Tensor") -> "Tensor":
    """log p of each row (VOCABULARY + 1,), with one more count for each."""
    counts = ids.bincount(minlength=VOCABULARY + 1).float() + 1
    return (counts / counts.sum()).log()


def train_head(dim: int, wide: int, bias: bool, training: "Tensor", heldout: "Tensor") -> dict[str, float]:
    """Train the network with one head; returns its nats per word and its size."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    from univigu.text_space import TextSpace, row_norm_for

    torch.manual_seed(0)
    rows = VOCABULARY + 1
    parts = nn.ModuleDict({
        "network": nn.Sequential(
            nn.Embedding(rows, 64), nn.Flatten(), nn.Linear(64 * 2 * SIDES, WIDTH), nn.GELU(),
            nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.LayerNorm(WIDTH),
        ),
        "space": TextSpace(rows, dim, row_norm_for(rows)),
    })  # fmt: skip
    parts["tied"] = tied = nn.Linear(WIDTH, dim)
    nn.init.zeros_(tied.weight)
    if wide:
        parts["wide"] = nn.Linear(WIDTH, wide, bias=False)
        parts["table"] = nn.Linear(wide, rows, bias=False)
    offset = nn.Parameter(log_frequencies(training)) if bias else None
    learned = [*parts.parameters(), *([] if offset is None else [offset])]
    optimizer = torch.optim.AdamW(learned, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    around = [side for side in range(-SIDES, SIDES + 1) if side]

    def nats(ids: "Tensor", at: "Tensor") -> "Tensor":
        hidden = parts["network"](torch.stack([ids[at + side] for side in around], 1))
        logits = parts["tied"](hidden) @ parts["space"]().T
        if wide:
            logits = logits + parts["table"](parts["wide"](hidden))
        return F.cross_entropy(logits if offset is None else logits + offset, ids[at])

    started = time.process_time()
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / 50) * (1 - step / STEPS)
        at = torch.randint(SIDES, len(training) - SIDES, (BATCH,), generator=generator)
        optimizer.zero_grad(set_to_none=True)
        nats(training, at).backward()
        optimizer.step()
    seconds = time.process_time() - started
    with torch.no_grad():
        places = [torch.randint(SIDES, len(ids) - SIDES, (8, 1024), generator=generator) for ids in (training, heldout)]
        scores = [
            float(torch.stack([nats(ids, at) for at in some]).mean())
            for ids, some in zip((training, heldout), places, strict=True)
        ]
    return {
        "heldout_nats": round(scores[1], 4),
        "training_nats": round(scores[0], 4),
        "output_parameters": rows * (dim + wide + bias),
        "processor_seconds": round(seconds, 1),
    }
