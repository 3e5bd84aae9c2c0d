"""Step curate-prompts: select clean prompts with source and licence from raw rows, and give a reason for every other.

Transport damage is repaired (mojibake, entities, stray control characters, odd white space); the content of a text is
never changed, only accepted or rejected. Rows are read as a stream and screened in batches, with one process per core.
They are then compared with each other in their original order, so the output doesn't depend on the number of processes.
Only the index of duplicates stays in memory.
"""

import json
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any

from components.pipeline.manifests import inside
from components.pipeline.step import Step
from components.prompts.duplicates import ExactTexts, NearDuplicates
from components.prompts.embeddings import Closeness, Neighbours
from components.prompts.funnel import Funnel
from components.prompts.records import parse, printable
from components.prompts.screening import ENFORCE, Accepted, Finding, Rejected, Screen, quotable_row
from components.prompts.sources import RawBatch, raw_files, read_batches
from components.prompts.workers import map_in_order, worker_count
from univigu.errors import GateFailedError
from univigu.files import file_sha256

INLINE = 16  # batches; fewer are screened in this process, because starting others takes seconds
EMBEDDED = 256  # prompts that are embedded together

Candidate = tuple[RawBatch, int, Accepted]  # a row that is not rejected so far: its batch, its index there, its data


def curate_prompts(step: Step) -> None:
    """Write the table `prompts` and the funnel, and quarantine every other raw row with its reason."""
    settings = step.settings.curate_prompts
    screen = Screen(settings, step.settings.text.prompt_tokens, step.inputs["base"])
    curation = Curation(step, screen)
    rows = curation.screen_rows(read_batches(step.inputs["raw"], step.parameters["curate_prompts"]["sources"]))
    rows = curation.drop_duplicates(rows)
    if screen.is_on("semantic_duplicates") or screen.is_on("diversity"):
        rows = curation.drop_neighbours(rows)
    step.write("prompts", map(curation.keep, rows))
    if not step.rows_out:
        raise GateFailedError(
            f"None of the {step.rows_in} raw prompts in {step.inputs['raw']} was accepted; add prompts, or relax "
            "'curate_prompts' in the profile."
        )
    step.facts |= {
        "repaired": curation.repaired,
        "not_in_near_duplicate_index": curation.near.left_out if curation.near else 0,
        "sources": {printable(file.name): file_sha256(file) for file in raw_files(step.inputs["raw"])},
    }
    curation.funnel.write(step.out)
    curation.funnel.show()


class Curation:
    """The indexes and counts of one run."""

    def __init__(self, step: Step, screen: Screen) -> None:
        self.step, self.screen = step, screen
        self.modes = screen.modes
        self.funnel = Funnel(self.modes)
        self.repaired = 0
        self.exact = ExactTexts()
        self.near = None
        if screen.is_on("near_duplicates"):
            self.near = NearDuplicates(screen.settings.near_duplicate_jaccard)

    def screen_rows(self, batches: Iterator[RawBatch]) -> Iterator[Candidate]:
        """The rows that pass the filters of single rows; counts all rows as the step's `rows_in`."""
        for batch, index, result in self.step.progress(_screen(self.screen, batches)):
            self.step.rows_in += 1
            self.funnel.read += 1
            if isinstance(result, Rejected):
                self._reject(batch, index, result)
            else:
                yield batch, index, result

    def drop_duplicates(self, rows: Iterable[Candidate]) -> Iterator[Candidate]:
        """The rows that are not an exact or near duplicate of an earlier one."""
        for batch, index, row in rows:
            if not any(self._apply(batch, index, row, finding) for finding in self._find_duplicates(row)):
                yield batch, index, row

    def _find_duplicates(self, row: Accepted) -> Iterator[Finding]:
        prompt = row.prompt
        if before := self.exact.add(row.fingerprint):
            if self.screen.is_on("exact_duplicates"):
                yield Finding("exact_duplicates", "exact_duplicate", f"same text as {prompt['id']}", before)
            prompt["id"] = f"{prompt['id']}-{before + 1}"  # the row is kept, and ids must be unique
        if self.near and (alike := self.near.find(row.fingerprint)):
            yield Finding("near_duplicates", "near_duplicate", alike.detail, round(alike.jaccard, 4))

    def drop_neighbours(self, rows: Iterator[Candidate]) -> Iterator[Candidate]:
        """The rows that are not a semantic duplicate of an earlier one, and don't have too many close neighbours."""
        settings = self.screen.settings
        neighbours = Neighbours(inside(self.step.root, settings.embedding_model), settings.diversity.cosine)
        self.step.facts["embedding_model"] = neighbours.digest
        while batch := list(islice(rows, EMBEDDED)):
            neighbours.start([row.prompt["text"] for _, _, row in batch])
            for number, (raw, index, row) in enumerate(batch):
                closeness = neighbours.measure(number)
                if any(self._apply(raw, index, row, finding) for finding in self._find_neighbours(row, closeness)):
                    continue
                if "semantic_duplicate" not in row.prompt["scores"]:
                    neighbours.keep(number, row.prompt["id"])
                yield raw, index, row

    def _find_neighbours(self, row: Accepted, closeness: Closeness) -> Iterator[Finding]:
        settings, scores = self.screen.settings, row.prompt["scores"]
        if self.screen.is_on("semantic_duplicates"):
            alike = closeness.cosine >= settings.semantic_duplicate_cosine
            detail = f"means the same as {closeness.id}, cosine {closeness.cosine:.3f}" if alike else ""
            yield Finding("semantic_duplicates", "semantic_duplicate", detail, closeness.cosine)
        if self.screen.is_on("diversity"):
            count, most, cosine = closeness.count, settings.diversity.neighbours, settings.diversity.cosine
            scores["neighbours"] = count
            detail = f"{count} earlier prompts within cosine {cosine}, at most {most}" if count > most else ""
            yield Finding("diversity", "crowded", detail, count)

    def keep(self, candidate: Candidate) -> dict[str, Any]:
        """Count a row that is kept; returns its row of the table `prompts`."""
        _, _, row = candidate
        self.repaired += row.repaired
        self.funnel.keep(row.prompt["scores"])
        return row.prompt | {"scores": json.dumps(row.prompt["scores"], sort_keys=True)}

    def _apply(self, batch: RawBatch, index: int, row: Accepted, finding: Finding) -> bool:
        """Reject the row if the finding's filter is enforced, otherwise note it in the scores; returns if rejected."""
        if not finding.detail:
            return False
        if self.modes[finding.filter] != ENFORCE:
            row.prompt["scores"][finding.reason] = finding.figure
            return False
        raw = quotable_row(parse(batch.rows[index][1]))
        self._reject(batch, index, Rejected(finding.reason, finding.detail, raw))
        return True

    def _reject(self, batch: RawBatch, index: int, rejected: Rejected) -> None:
        row_id, text = batch.row_id(index), rejected.row
        self.step.reject(row_id, rejected.reason, rejected.detail, rejected.row)
        if isinstance(text, dict):
            text = text.get(batch.layout.column(text, "text"))
        self.funnel.reject(rejected.reason, row_id, rejected.detail, text)


def _screen(screen: Screen, batches: Iterator[RawBatch]) -> Iterator[tuple[RawBatch, int, Rejected | Accepted]]:
    """Screen each row; yields its batch, its index there and the result, in the order of the rows."""
    first = list(islice(batches, INLINE))
    workers = worker_count() if len(first) == INLINE else 1
    for batch, results in map_in_order(screen.screen, chain(first, batches), workers):
        for index, result in enumerate(results):
            yield batch, index, result
