"""Prompt curation at scale, on synthetic prompts: the cost of a million, and near duplicates against datatrove.

`ratio` is the time of our near-duplicate search over that of datatrove's MinHash, with the same files and number of
processes, from the files to the rows to remove. Every prompt goes through our MinHash here, as in datatrove's, which
splits words at spaces, faster than with its own tokenizer. UNIVIGU_BENCH_ROWS sets the number of prompts.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from components.bench.curation.prompts import raw_prompts, write_raw_prompts
from components.pipeline.profiles import load_profile
from components.prompts.duplicates import ExactTexts, Fingerprint, NearDuplicates, fingerprints
from components.prompts.records import parse
from components.prompts.sources import RawBatch, read_batches
from components.prompts.workers import map_in_order, worker_count
from univigu.errors import ConfigError, MissingInputError, UniViGUError

ROWS = "UNIVIGU_BENCH_ROWS"
PROFILE = "wan-1.3b"
SEED = 0
JACCARD = 0.9  # as in the profiles
SAMPLE = 10_000  # texts that are compared pairwise
TOKENS = 256_300  # pieces of the tokenizer, as many as umT5 has
SAMPLED_EVERY_S = 0.25


def measure() -> dict[str, Any]:
    """Both sides' seconds and their ratio, the cost per prompt at three sizes, peak memory, recall and precision.

    Raises `MissingInputError` if datatrove is not installed, before anything is measured.
    """
    _require_datatrove()
    rows = _rows()
    with tempfile.TemporaryDirectory(prefix="univigu-bench-") as name:
        folder = Path(name)
        write_raw_prompts(folder / "prompts", rows, SEED)
        ours = _in_process("search", folder)
        theirs = _in_process("datatrove", folder)
        steps, raw = {}, load_profile(PROFILE)["raw_prompts"]
        for count in sorted({max(rows // 100, 1), max(rows // 10, 1), rows}):
            write_raw_prompts(folder / f"root-{count}" / raw, count, SEED)
            steps[str(count)] = _in_process("step", folder / f"root-{count}")
    return {
        "rows": rows,
        "seconds": ours["seconds"],
        "their_seconds": theirs["seconds"],
        "ratio": round(ours["seconds"] / theirs["seconds"], 3),
        "search": {"ours": ours, "datatrove": theirs},
        "whole_step": steps,
        "near_duplicates": {
            "all prompts": agreement(min(rows, SAMPLE), 1),
            "as in the profiles": agreement(min(rows, SAMPLE), 48),
        },
    }


def _rows() -> int:
    given = os.environ.get(ROWS, "1000000")
    if not given.isdigit() or int(given) < 1:
        raise ConfigError(f"{ROWS} is '{given}'; set it to a number of prompts, at least 1.")
    return int(given)


def _require_datatrove() -> None:
    try:
        import datatrove  # noqa: F401
        import orjson  # noqa: F401
        import xxhash  # noqa: F401
    except ImportError as error:
        raise MissingInputError(
            f"The benchmark compares with datatrove, and {error.name} is not installed; run "
            "`pip install -c constraints.txt -e '.[bench]'`."
        ) from error


# --- processes -------------------------------------------------------------------------------------------------------


def _in_process(what: str, folder: Path) -> dict[str, Any]:
    """Run one of `SIDES` in a separate process; returns its result and its peak memory."""
    found, peak = run_apart([sys.executable, "-m", "components.bench.curation", what, str(folder)])
    return {**found, "peak_memory_gib": round(peak / 2**30, 2)}


def run_apart(command: Sequence[str]) -> tuple[dict[str, Any], int]:
    """The JSON object in the last line that a command prints, and its peak memory in bytes, sampled.

    Raises `UniViGUError` with what the command said if it fails.
    """
    peak = 0
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as trouble:
        process = subprocess.Popen(command, stdout=said, stderr=trouble)
        while process.poll() is None:
            peak = max(peak, memory_of(process.pid))
            time.sleep(SAMPLED_EVERY_S)
        said.seek(0)
        trouble.seek(0)
        if process.returncode:
            reason = trouble.read().decode(errors="replace").strip()[-2000:]
            raise UniViGUError(f"A part of the benchmark ended with exit code {process.returncode}: {reason}")
        return json.loads(said.read().splitlines()[-1]), peak


def memory_of(pid: int) -> int:
    """Memory of a process and its descendants in bytes; shared memory counts once."""
    import psutil

    total = 0
    try:
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            total += one.memory_full_info().pss
    except (psutil.NoSuchProcess, psutil.AccessDenied):  # ended in between
        pass
    return total


# --- the sides -------------------------------------------------------------------------------------------------------


def search(folder: Path) -> dict[str, Any]:
    """Our search for exact and near duplicates in the raw files."""
    started = time.perf_counter()
    exact, near = ExactTexts(), NearDuplicates(JACCARD)
    removed = 0
    for _, prints in map_in_order(_fingerprints, read_batches(folder / "prompts", {}), worker_count()):
        for fingerprint in prints:
            removed += bool(exact.add(fingerprint) or near.find(fingerprint))
    return {"seconds": round(time.perf_counter() - started, 2), "removed": removed, "left_out": near.left_out}


def _fingerprints(batch: RawBatch) -> list[Fingerprint]:
    rows = [parse(raw) for _, raw in batch.rows]
    return fingerprints([row["text"] for row in rows if isinstance(row, dict) and row["text"]], min_features=1)


def datatrove(folder: Path) -> dict[str, Any]:
    """datatrove's MinHash on the same files: signatures, buckets, clusters."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Blanks(WordTokenizer):
        def word_tokenize(self, text: str) -> list[str]:
            return text.split()

        sent_tokenize = span_tokenize = word_tokenize

    files = len(list((folder / "prompts").iterdir()))
    config, workers = MinhashConfig(), worker_count()
    signatures, buckets, clusters = (str(folder / name) for name in ("signatures", "buckets", "clusters"))
    stages = (
        ([JsonlReader(str(folder / "prompts")), MinhashDedupSignature(signatures, config, language=Blanks())], files),
        ([MinhashDedupBuckets(signatures, buckets, config=config, lines_to_buffer=-1)], config.num_buckets),
        ([MinhashDedupCluster(buckets, clusters, config=config, lines_to_buffer=-1)], 1),
    )
    started = time.perf_counter()
    for number, (pipeline, tasks) in enumerate(stages):
        logs = str(folder / f"logs-{number}")
        LocalPipelineExecutor(pipeline, tasks=tasks, workers=min(workers, tasks), logging_dir=logs).run()
    seconds = round(time.perf_counter() - started, 2)
    removed = sum(path.stat().st_size // 4 for path in Path(clusters).glob("*.remove"))
    return {"seconds": seconds, "removed": removed}


def step(root: Path) -> dict[str, Any]:
    """The whole step `curate-prompts`, with all filters except the two that need a sentence model."""
    from components.digits.tokenizer import build_tokenizer
    from components.pipeline.runner import run_stage

    profile = load_profile(PROFILE)
    profile["curate_prompts"]["max_rejected_share"] = 1.0
    texts = [*raw_prompts(2000, SEED), *(f"{number:x}" for number in range(TOKENS))]
    tokenizer, warm = build_tokenizer(texts, 512), root / "warm"
    for home in (root, warm):
        tokenizer.save_pretrained(home / profile["base"] / "tokenizer")
    del tokenizer, texts
    write_raw_prompts(warm / profile["raw_prompts"], 100, SEED)
    run_stage("curate-prompts", profile, warm)  # excludes one-time imports and loading
    started = time.perf_counter()
    manifest = run_stage("curate-prompts", profile, root)
    seconds = time.perf_counter() - started
    return {
        "seconds": round(seconds, 2),
        "us_per_prompt": round(1e6 * seconds / manifest["rows_in"], 1),
        "kept": manifest["rows_out"],
        "rejected": manifest["reasons"],
    }


SIDES: dict[str, Callable[[Path], dict[str, Any]]] = {"search": search, "datatrove": datatrove, "step": step}


# --- recall and precision --------------------------------------------------------------------------------------------


def agreement(count: int, min_features: int) -> dict[str, Any]:
    """Compare the search on `count` distinct texts with the exact Jaccard similarity of every pair.

    recall: the share that was found of the texts with an earlier kept one at `JACCARD` or above. precision: the share
    of the found texts whose exact Jaccard similarity with the named text is at `JACCARD` or above.
    """
    texts = [text for text in dict.fromkeys(raw_prompts(count, SEED)) if text]
    prints = fingerprints(texts, min_features)
    near, number_of = NearDuplicates(JACCARD), {f"{p.text:016x}": number for number, p in enumerate(prints)}
    found = {number: alike for number, p in enumerate(prints) if (alike := near.find(p))}
    features = [each.features for each in fingerprints(texts, 1)]
    wanted = _exact_duplicates(features, min_features)
    right = [number for number, alike in found.items() if _jaccard(features, number, number_of[alike.id]) >= JACCARD]
    return {
        "texts": len(texts),
        "by exact jaccard": len(wanted),
        "found": len(found),
        "recall": round(len(wanted & found.keys()) / max(len(wanted), 1), 4),
        "precision": round(len(right) / max(len(found), 1), 4),
    }


def _jaccard(features: Sequence[Sequence[int]], left: int, right: int) -> float:
    one, other = set(features[left]), set(features[right])
    return len(one & other) / len(one | other)


def _exact_duplicates(features: Sequence[Sequence[int]], min_features: int) -> set[int]:
    """The texts that a comparison of all pairs removes, in order; shorter texts are kept and not compared."""
    import numpy as np
    from scipy.sparse import csr_array

    columns: dict[int, int] = {}
    places = [columns.setdefault(feature, len(columns)) for each in features for feature in each]
    sizes = np.array([len(each) for each in features])
    ends = np.concatenate([[0], np.cumsum(sizes)])
    shape = (len(features), len(columns))
    held = csr_array((np.ones(len(places), np.int32), np.array(places), ends), shape=shape)
    by_feature, out = held.T.tocsr(), set()
    for start in range(0, len(features), 256):
        shared = (held[start : start + 256] @ by_feature).tocoo()
        rows, others = shared.coords[0] + start, shared.coords[1]
        alike = shared.data >= JACCARD * (sizes[rows] + sizes[others] - shared.data)
        alike &= (others < rows) & (np.minimum(sizes[rows], sizes[others]) >= min_features)
        for row, other in sorted(zip(rows[alike].tolist(), others[alike].tolist(), strict=True)):
            if other not in out:
                out.add(row)
    return out
