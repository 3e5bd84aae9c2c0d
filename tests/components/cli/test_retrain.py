"""`univigu data withdraw --retrain` runs the affected steps again, in their order."""

import json
import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

from components.cli.main import app
from components.cli.retrain import check_retraining, steps_after
from components.clips.archive import read_clips
from components.clips.import_videos import import_folder
from components.digits.prompts import write_prompts
from components.pipeline.manifests import describe_files, files_digest, write_manifest
from components.pipeline.profiles import load_profile
from components.pipeline.runner import run_stage
from components.pipeline.stages import STAGES
from components.pipeline.tables import read_table, write_table
from components.pipeline.withdrawn import read_withdrawn
from small_videos import write_video
from univigu.errors import ConfigError, CorruptDataError, UniViGUError

OPTIONS = {"licence": "CC0-1.0", "source": "a test", "texts": "prompts"}


def read_all(root):
    return read_clips(root / "data/clips", read_table(root / "data/clips", "clips").to_pylist())


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


def test_a_retraining_is_refused_for_a_dry_run_and_for_a_damaged_import(tmp_path):
    with pytest.raises(ConfigError, match="can't be combined with --retrain"):
        check_retraining(tmp_path, [], dry_run=True)
    home = tmp_path / "data/clips"
    home.mkdir(parents=True)
    write_table(home, "clips", [])
    files = describe_files(home)
    write_manifest(home, {"step": "import-videos", "digest": files_digest(files), "inputs": {}, "files": files})
    check_retraining(tmp_path, ["synthesize-videos"], dry_run=False)
    (home / "clips.parquet").write_bytes(b"damaged")
    with pytest.raises(CorruptDataError):
        check_retraining(tmp_path, ["synthesize-videos"], dry_run=False)


@pytest.mark.slow
def test_what_is_left_of_an_import_goes_on_without_its_folder(tmp_path, tiny_wan_folder, profile):
    root, videos = tmp_path / "root", tmp_path / "videos"
    shutil.copytree(tiny_wan_folder, root / "model/tiny-wan")
    for number in (0, 1, 2, 3, 3):
        name = f"v{number}" if not (videos / f"v{number}.mp4").exists() else "again"
        write_video(videos / f"{name}.mp4", np.arange(9) / 8, dark=40 + 20 * number)
        (videos / f"{name}.txt").write_text(f"video {number}")
    profile["import_videos"].update(max_rejected_share=1.0, shard_size=2)
    profile["synthesize_videos"]["checks"] = {"near_duplicate": {"mode": "score"}}
    import_folder(videos, None, OPTIONS, profile, root)
    before = {row["id"]: content for row, content in read_all(root)}
    gone = videos / "v3.mp4"
    (tmp_path / "v3.mp4").write_bytes(gone.read_bytes())
    shutil.rmtree(videos)
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: tiny\nvalidate_data: {min_rows: 9}\n")
    call = ["data", "withdraw", "--video", str(tmp_path / "v3.mp4"), "--retrain", "--profile", str(mine)]
    stopped = CliRunner().invoke(app, [*call, "--root", str(root)]).exception
    assert str(stopped).startswith("The retraining stopped: 'validate-prompts' ended with")
    after = {row["id"]: content for row, content in read_all(root)}
    assert (len(before), len(after)) == (4, 3)
    assert after.items() <= before.items()
    manifest = json.loads((root / "data/clips/manifest.json").read_text())
    assert (manifest["step"], manifest["reasons"], manifest["rows_in"]) == ("import-videos", {"withdrawn": 1}, 4)
    assert manifest["parameters"]["import_options"] == OPTIONS
    assert len(read_table(root / "data/curated", "prompts")) == 3
    assert b"video 3" not in b"".join(file.read_bytes() for file in (root / "data").rglob("*") if file.is_file())
