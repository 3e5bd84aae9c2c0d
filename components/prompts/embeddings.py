"""Semantic duplicates and diversity of prompts, by the cosine of sentence embeddings.

The model is a local folder in transformers' layout (a sentence-transformers folder is one); nothing is downloaded. Each
prompt is compared exactly with every earlier prompt that was kept, so the cost per prompt grows with their number: a
million prompts take 1.5 GB and need a GPU, which is used if there is one. An index of approximate neighbours would be
faster, but its results depend on threads and versions, and the same prompts must give the same dataset.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from components.pipeline.digests import tree_digest
from univigu.errors import BadInputError, ConfigError, MissingInputError, first_line
from univigu.local_models import LOCAL, WEIGHTS, require_safetensors

if TYPE_CHECKING:
    import torch

BLOCK = 65_536  # earlier prompts per comparison


class Closeness(NamedTuple):
    """How close a prompt is to the earlier ones."""

    cosine: float  # to the closest; -1 if there are none
    id: str  # of the closest
    count: int  # earlier prompts that are neighbours


class Neighbours:
    """Embeddings of the prompts kept so far.

    Call `start` with a batch of texts, then for each text in order `measure`, and `keep` if the prompt stays.

    cosine: prompts at least this similar are neighbours.
    """

    def __init__(self, folder: Path, cosine: float) -> None:
        import torch

        if not -1 <= cosine <= 1:
            raise ConfigError(f"The profile's 'diversity.cosine' is {cosine}; set it between -1 and 1.")
        self.cosine = cosine
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer, self.model = _load(folder, self.device)
        self.pooling = _pooling(folder)
        self.digest = tree_digest([folder], folder)
        self.ids: list[str] = []
        self.store: torch.Tensor | None = None  # (capacity, width), of which len(self.ids) rows are used

    def start(self, texts: Sequence[str]) -> None:
        """Embed a batch of prompts, and compare them with those of earlier batches."""
        import torch

        self.vectors = self.embed(texts)
        self.closest = torch.full((len(texts),), -1.0)
        self.like = torch.zeros(len(texts), dtype=torch.long)
        self.counts = torch.zeros(len(texts), dtype=torch.long)
        for start in range(0, len(self.ids), BLOCK):
            # pyrefly: ignore[unsupported-operation]
            cosines = self.vectors @ self.store[start : min(start + BLOCK, len(self.ids))].T
            best, index = (found.cpu() for found in cosines.max(dim=1))
            closer = best > self.closest
            self.closest[closer], self.like[closer] = best[closer], index[closer] + start
            self.counts += (cosines >= self.cosine).sum(dim=1).cpu()
        self.within = (self.vectors @ self.vectors.T).cpu()
        self.kept: list[int] = []

    def measure(self, number: int) -> Closeness:
        """How close prompt `number` of the batch is to the earlier ones, including those of this batch."""
        closest, like, count = float(self.closest[number]), int(self.like[number]), int(self.counts[number])
        if self.kept:
            cosines = self.within[number, self.kept]
            count += int((cosines >= self.cosine).sum())
            if (best := float(cosines.max())) > closest:
                closest, like = best, len(self.ids) - len(self.kept) + int(cosines.argmax())
        return Closeness(round(closest, 4), self.ids[like] if self.ids else "", count)

    def keep(self, number: int, prompt_id: str) -> None:
        """Compare later prompts with prompt `number` of the batch as well."""
        import torch

        if self.store is None:
            self.store = torch.empty(BLOCK, self.vectors.shape[1], dtype=self.vectors.dtype, device=self.device)
        if len(self.ids) == len(self.store):
            self.store = torch.cat([self.store, torch.empty_like(self.store)])
        self.store[len(self.ids)] = self.vectors[number]
        self.ids.append(prompt_id)
        self.kept.append(number)

    def embed(self, texts: Sequence[str]) -> "torch.Tensor":
        """Embeddings of texts, (B, width), normalised to length 1."""
        import torch

        longest = min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings)
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt", verbose=False
        ).to(self.device)
        with torch.inference_mode():
            states = self.model(**tokens).last_hidden_state
        if self.pooling == "cls":
            pooled = states[:, 0]
        else:
            mask = tokens["attention_mask"].unsqueeze(-1).to(states.dtype)
            pooled = (states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        return torch.nn.functional.normalize(pooled.float(), dim=-1)


def _load(folder: Path, device: str) -> tuple[Any, Any]:
    if not (folder / "config.json").is_file():
        raise MissingInputError(
            f"There is no sentence-embedding model at {folder} (the profile's 'embedding_model'); put one there, or "
            "set the filters semantic_duplicates and diversity to off."
        )
    from transformers import AutoModel, AutoTokenizer

    require_safetensors(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **LOCAL)
        model = AutoModel.from_pretrained(folder, **WEIGHTS)
    except Exception as error:  # on a damaged file, transformers raises any kind of exception
        raise BadInputError(
            f"The embedding model at {folder} can't be read ({first_line(error)}); fix or replace it."
        ) from error
    return tokenizer, model.eval().to(device)


def _pooling(folder: Path) -> str:
    """How token states are pooled, as sentence-transformers saves it beside a model: ``mean`` or ``cls``."""
    note = folder / "1_Pooling" / "config.json"
    try:
        settings = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
        return "cls" if settings.get("pooling_mode_cls_token") else "mean"
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise BadInputError(f"{note} can't be read ({first_line(error)}); fix that file.") from error
