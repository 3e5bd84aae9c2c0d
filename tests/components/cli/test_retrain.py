"""`univigu data withdraw --retrain` runs the affected steps again, in their order."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from components.cli.main import app
from components.cli.retrain import check_retraining, steps_after
from components.digits.prompts import write_prompts
from components.pipeline.manifests import describe_files, files_digest, write_manifest
from components.pipeline.profiles import load_profile
from components.pipeline.runner import run_stage
from components.pipeline.stages import STAGES
from components.pipeline.tables import read_table, write_table
from components.pipeline.withdrawn import read_withdrawn
from univigu.errors import ConfigError, UniViGUError


def test_a_step_runs_again_with_all_that_depend_on_it_and_no_other():
    names = [stage.name for stage in STAGES]
    assert steps_after({"curate-prompts"}) == names
    assert steps_after({"encode-latents"}) == names[names.index("encode-latents") :]
    assert steps_after(()) == []


@pytest.mark.slow
def test_a_retraining_runs_without_what_was_withdrawn_and_says_where_it_stopped(tmp_path, tiny_wan_folder):
    root = tmp_path / "root"
    shutil.copytree(tiny_wan_folder, root / "model/tiny-wan")
    (root / "data/prompts").mkdir(parents=True)
    lines = "\n".join(json.dumps(row) for row in write_prompts(40, 0))
    (root / "data/prompts/digits.jsonl").write_text(lines)
    profile = tmp_path / "mine.yaml"
    profile.write_text("extends: tiny\ngenerator: model/nowhere\nvalidate_data: {min_rows: 1}\n")
    for step in ("curate-prompts", "validate-prompts"):
        run_stage(step, load_profile(str(profile)), root)
    first = read_table(root / "data/curated", "prompts")["id"][0].as_py()
    call = ["data", "withdraw", "--id", first, "--retrain", "--profile", str(profile), "--root", str(root)]
    stopped = CliRunner().invoke(app, call).exception
    assert isinstance(stopped, UniViGUError)
    assert str(stopped).startswith("The retraining stopped: 'synthesize-videos' ended with")
    assert first in read_withdrawn(root).prompts
    for home, count in (("curated", 39), ("validated/prompts", 39)):
        left = read_table(root / "data" / home, "prompts")["id"].to_pylist()
        assert (len(left), first in left) == (count, False)


def test_a_retraining_is_refused_for_a_dry_run_and_for_an_import(tmp_path):
    with pytest.raises(ConfigError, match="can't be combined with --retrain"):
        check_retraining(tmp_path, [], dry_run=True)
    home = tmp_path / "data/clips"
    home.mkdir(parents=True)
    write_table(home, "clips", [])
    files = describe_files(home)
    write_manifest(home, {"step": "import-videos", "digest": files_digest(files), "inputs": {}, "files": files})
    with pytest.raises(ConfigError, match="The output of synthesize-videos was imported"):
        check_retraining(tmp_path, ["synthesize-videos"], dry_run=False)
