import json
import shutil

import pytest

from components.pipeline.runner import run_stage
from components.pipeline.tables import read_table


@pytest.fixture
def curate(tmp_path, tiny_wan_folder, profile):
    """Curate raw lines (or rows) in a fresh work root; returns the manifest, the prompts and the rejected rows."""
    profile["curate_prompts"]["max_rejected_share"] = 1.0

    def run(lines, name="raw.jsonl"):
        root = tmp_path / "root"
        raw = root / profile["raw_prompts"]
        shutil.rmtree(raw, ignore_errors=True)
        raw.mkdir(parents=True)
        if not (root / profile["base"]).exists():
            shutil.copytree(tiny_wan_folder / "tokenizer", root / profile["base"] / "tokenizer")
        lines = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        (raw / name).write_bytes(b"\n".join(lines) + b"\n")
        manifest = run_stage("curate-prompts", profile, root)
        home = root / "data" / "curated"
        return manifest, read_table(home, "prompts").to_pylist(), read_table(home, "rejected").to_pylist()

    return run
