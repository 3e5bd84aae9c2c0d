import json
import subprocess
import sys

import pytest

from components.bench import curation
from components.bench.curation import prompts as synthetic_prompts
from components.pipeline.profiles import load_profile
from components.prompts.records import parse
from components.prompts.sources import read_batches
from univigu.errors import ConfigError, MissingInputError, UniViGUError


def test_without_datatrove_a_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datatrove", None)
    with pytest.raises(MissingInputError, match=r"datatrove is not installed; run .*\[bench\]"):
        curation.measure()


@pytest.mark.parametrize("rows", ["0", "many", "-1", ""])
def test_a_number_of_rows_that_is_none_is_told(monkeypatch, rows):
    monkeypatch.setattr(curation, "_require_datatrove", lambda: None)
    monkeypatch.setenv(curation.ROWS, rows)
    with pytest.raises(ConfigError, match="set it to a number of prompts"):
        curation.measure()


@pytest.mark.slow
def test_the_search_finds_what_the_comparison_of_all_pairs_finds():
    for min_features in (1, 48):
        figures = curation.agreement(1500, min_features)
        assert figures["by exact jaccard"] > 20
        assert figures["recall"] >= 0.95
        assert figures["precision"] >= 0.95


def test_a_side_runs_in_a_process_of_its_own_and_its_memory_is_measured(tmp_path):
    synthetic_prompts.write_raw_prompts(tmp_path / "prompts", 500, seed=0)
    figures = curation._in_process("search", tmp_path)
    assert 50 < figures["removed"] < 250
    assert figures["peak_memory_gib"] > 0.02


def test_a_side_that_fails_is_reported_with_its_last_words():
    with pytest.raises(UniViGUError, match="ended with exit code 1: no prompts"):
        curation.run_apart([sys.executable, "-c", "raise SystemExit('no prompts')"])


@pytest.mark.slow
def test_the_whole_step_is_measured_where_its_profile_has_the_prompts(tmp_path):
    synthetic_prompts.write_raw_prompts(tmp_path / load_profile(curation.PROFILE)["raw_prompts"], 500, seed=0)
    figures = curation._in_process("step", tmp_path)
    assert figures["kept"] > 100
    assert figures["kept"] + sum(figures["rejected"].values()) == 500


def test_datatrove_sees_the_same_files(tmp_path):
    pytest.importorskip("datatrove")
    synthetic_prompts.write_raw_prompts(tmp_path / "prompts", 500, seed=0)
    assert 50 < curation._in_process("datatrove", tmp_path)["removed"] < 250


def test_made_up_prompts_depend_on_the_seed_alone_and_have_everything_in_them(tmp_path):
    texts = list(synthetic_prompts.raw_prompts(3000, seed=1))
    code = (
        "import json; from components.bench.curation.prompts import raw_prompts; "
        "print(json.dumps([*raw_prompts(3000, 1)]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == texts
    assert texts != list(synthetic_prompts.raw_prompts(3000, seed=2))
    assert len(set(texts)) < 0.95 * len(texts)
    for sign in ("\x00", "@example.com", "黑狗", "كلب", "-ar 16:9", "🔥"):
        assert any(sign in text for text in texts)
    synthetic_prompts.write_raw_prompts(tmp_path, 3000, seed=1)
    rows = [parse(raw) for batch in read_batches(tmp_path, {}) for _, raw in batch.rows]
    assert len(rows) == 3000
    assert 0 < sum(not isinstance(row, dict) for row in rows) < 30
