"""Curate prompts: raw and messy rows in, clean prompts with source and licence out, a reason for every other row.

What transport did to a text is repaired (mojibake, entities, stray control characters, odd blanks); what a text says is
never changed, only accepted or rejected. Rows are read as a stream, screened in batches by as many processes as there
are cores, and compared with each other in their order, so the output doesn't depend on how many processes there were.
What stays in memory is the index that duplicates are looked up in.
"""

import json
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any

from components.pipeline.manifests import inside
from components.pipeline.step import Step
from components.prompts.duplicates import ExactTexts, NearDuplicates
from components.prompts.embeddings import Neighbours
from components.prompts.funnel import Funnel
from components.prompts.records import parse, printable
from components.prompts.screening import ENFORCE, Accepted, Finding, Rejected, Screen, quotable_row
from components.prompts.sources import RawBatch, raw_files, read_batches
from components.prompts.workers import map_in_order, worker_count
from univigu.errors import GateFailedError
from univigu.files import file_sha256

INLINE = 16  # batches; fewer are screened in this process, as it takes seconds to start others
EMBEDDED = 256  # prompts that are embedded together

Reading = tuple[RawBatch, int, Accepted]  # a row that is still in the running: its batch, its place there, what it is


def curate_prompts(step: Step) -> None:
    """Write the table `prompts` and the funnel, and quarantine every raw row that is not kept with its reason."""
    settings = step["curate_prompts"]
    screen = Screen(settings, tuple(step["text"]["prompt_tokens"]), step.inputs["base"])
    curation = Curation(step, screen)
    rows = curation.screened(read_batches(step.inputs["raw"], settings["sources"]))
    rows = curation.without_duplicates(rows)
    if screen.on("semantic_duplicates") or screen.on("diversity"):
        rows = curation.without_neighbours(rows)
    step.write("prompts", map(curation.keep, rows))
    if not step.rows_out:
        raise GateFailedError(
            f"None of the {step.rows_in} raw prompts in {step.inputs['raw']} is usable; add prompts, or widen the "
            "profile's 'curate_prompts'."
        )
    step.facts |= {
        "repaired": curation.repaired,
        "not_in_near_duplicate_index": curation.near.left_out if curation.near else 0,
        "sources": {printable(file.name): file_sha256(file) for file in raw_files(step.inputs["raw"])},
    }
    curation.funnel.write(step.out)
    curation.funnel.show()


class Curation:
    """One run: the indexes, and the counts."""

    def __init__(self, step: Step, screen: Screen) -> None:
        self.step, self.screen = step, screen
        self.modes = screen.modes
        self.funnel = Funnel(self.modes)
        self.repaired = 0
        self.exact = ExactTexts()
        self.near = None
        if screen.on("near_duplicates"):
            self.near = NearDuplicates(screen.settings["near_duplicate_jaccard"])

    def screened(self, batches: Iterator[RawBatch]) -> Iterator[Reading]:
        """The rows that pass the tests of a row alone; counts all rows as the step's `rows_in`."""
        for batch, place, result in self.step.progress(_screen(self.screen, batches)):
            self.step.rows_in += 1
            self.funnel.read += 1
            if isinstance(result, Rejected):
                self._reject(batch, place, result)
            else:
                yield batch, place, result

    def without_duplicates(self, rows: Iterable[Reading]) -> Iterator[Reading]:
        """The rows that are no exact or near duplicate of an earlier one."""
        for batch, place, row in rows:
            if not any(self._refuse(batch, place, row, found) for found in self._duplicates(row)):
                yield batch, place, row

    def _duplicates(self, row: Accepted) -> Iterator[Finding]:
        prompt = row.prompt
        if before := self.exact.add(row.fingerprint):
            if self.screen.on("exact_duplicates"):
                yield Finding("exact_duplicates", "exact_duplicate", f"same text as {prompt['id']}", before)
            prompt["id"] = f"{prompt['id']}-{before + 1}"  # it stays, and an id is one row's
        if self.near and (alike := self.near.find(row.fingerprint)):
            yield Finding("near_duplicates", "near_duplicate", alike.detail, round(alike.jaccard, 4))

    def without_neighbours(self, rows: Iterator[Reading]) -> Iterator[Reading]:
        """The rows that don't mean the same as an earlier one, and don't lie in a crowd."""
        settings = self.screen.settings
        neighbours = Neighbours(inside(self.step.root, settings["embedding_model"]), settings["diversity"]["cosine"])
        self.step.facts["embedding_model"] = neighbours.digest
        while batch := list(islice(rows, EMBEDDED)):
            neighbours.start([row.prompt["text"] for _, _, row in batch])
            for number, (raw, place, row) in enumerate(batch):
                look = neighbours.look(number)
                if any(self._refuse(raw, place, row, found) for found in self._closeness(row, look)):
                    continue
                if "semantic_duplicate" not in row.prompt["scores"]:
                    neighbours.keep(number, row.prompt["id"])
                yield raw, place, row

    def _closeness(self, row: Accepted, look: Any) -> Iterator[Finding]:
        settings, scores = self.screen.settings, row.prompt["scores"]
        if self.screen.on("semantic_duplicates"):
            alike = look.cosine >= settings["semantic_duplicate_cosine"]
            detail = f"means the same as {look.id}, cosine {look.cosine:.3f}" if alike else ""
            yield Finding("semantic_duplicates", "semantic_duplicate", detail, look.cosine)
        if self.screen.on("diversity"):
            scores["neighbours"] = look.count
            most, cosine = settings["diversity"]["neighbours"], settings["diversity"]["cosine"]
            detail = f"{look.count} earlier prompts within cosine {cosine}, at most {most}" if look.count > most else ""
            yield Finding("diversity", "crowded", detail, look.count)

    def keep(self, reading: Reading) -> dict[str, Any]:
        """A row of the table `prompts`."""
        _, _, row = reading
        self.repaired += row.repaired
        self.funnel.keep(row.prompt["scores"])
        return row.prompt | {"scores": json.dumps(row.prompt["scores"], sort_keys=True)}

    def _refuse(self, batch: RawBatch, place: int, row: Accepted, found: Finding) -> bool:
        """Whether a finding costs a row its place; where its filter only scores, it is noted."""
        if not found.detail:
            return False
        if self.modes[found.filter] != ENFORCE:
            row.prompt["scores"][found.reason] = found.figure
            return False
        raw = quotable_row(parse(batch.rows[place][1]))
        self._reject(batch, place, Rejected(found.reason, found.detail, raw))
        return True

    def _reject(self, batch: RawBatch, place: int, rejected: Rejected) -> None:
        row_id, text = batch.row_id(place), rejected.row
        self.step.reject(row_id, rejected.reason, rejected.detail, rejected.row)
        if isinstance(text, dict):
            text = text.get(batch.layout.column(text, "text"))
        self.funnel.reject(rejected.reason, row_id, rejected.detail, text)


def _screen(screen: Screen, batches: Iterator[RawBatch]) -> Iterator[tuple[RawBatch, int, Rejected | Accepted]]:
    """What becomes of each row, in the order of the rows."""
    first = list(islice(batches, INLINE))
    workers = worker_count() if len(first) == INLINE else 1
    for batch, results in map_in_order(screen.screen, chain(first, batches), workers):
        for place, result in enumerate(results):
            yield batch, place, result
