"""A withdrawal finds everything that comes from it, and names the models that learned from it."""

import json
import shutil
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from components.cli.main import app
from components.pipeline.manifests import describe_files, files_digest, write_manifest
from components.pipeline.stages import find_stage
from components.pipeline.tables import SCHEMAS, write_table
from components.pipeline.withdrawn import FILE, read_withdrawn
from components.registry.withdrawal import Found, Request, examine_snapshots, withdraw
from components.tracking import tracking_uri
from univigu.errors import BadInputError, ConfigError, MissingInputError
from univigu.files import file_sha256


def write(root, step, table, rows, inputs=None):
    """A step's output with these rows; their other columns are empty. Returns its digest."""
    home = root / find_stage(step).home
    home.mkdir(parents=True, exist_ok=True)
    write_table(home, table, [dict.fromkeys(SCHEMAS[table].names) | row for row in rows])
    files = describe_files(home)
    manifest = {"step": step, "digest": files_digest(files), "inputs": inputs or {}, "files": files}
    return write_manifest(home, manifest)["digest"]


@pytest.fixture
def root(tmp_path):
    """Two prompts with a generated clip each, and two imported videos: one of two clips, one that shares its prompt."""
    root, film = tmp_path / "root", tmp_path / "film.mp4"
    film.write_bytes(b"film")
    digest = file_sha256(film)
    write(root, "curate-prompts", "prompts", [{"id": f"p{n}", "source": "hand" if n < 2 else "web"} for n in range(4)])
    clips = [
        {"id": "c0", "prompt_id": "p0", "generator": "wan", "generator_digest": "w"},
        {"id": "c1", "prompt_id": "p1", "generator": "wan", "generator_digest": "w"},
        {"id": "film-1", "prompt_id": "p2", "generator": "import", "generator_digest": digest},
        {"id": "film-2", "prompt_id": "p2", "generator": "import", "generator_digest": digest},
        {"id": "other", "prompt_id": "p3", "generator": "import", "generator_digest": "o"},
    ]
    write(root, "synthesize-videos", "clips", [clip | {"sha256": f"of {clip['id']}"} for clip in clips])
    pairs = [{"id": f"{1 + n % 2}-{clip['id']}", "clip_id": clip["id"]} for n, clip in enumerate(clips)]
    write(root, "validate-pairs", "pairs", pairs)
    write(root, "encode-latents", "latents", [{"id": pair["id"]} for pair in pairs])
    return root


def find(root, **request):
    return withdraw(Request(**request), root, all_of_it=False, dry_run=True)


@pytest.mark.parametrize(
    ("request_of", "prompts", "clips", "videos"),
    [
        ({"source": "hand"}, ["p0", "p1"], ["c0", "c1"], 0),
        ({"id": "p1"}, ["p1"], ["c1"], 0),
        ({"id": "c0"}, [], ["c0"], 0),
        ({"id": "2-c1"}, [], ["c1"], 0),
        ({"id": "film-2"}, ["p2"], ["film-1", "film-2"], 1),
        ({"video": "film.mp4"}, ["p2"], ["film-1", "film-2"], 1),
    ],
)
def test_everything_that_comes_from_it_is_found(root, request_of, prompts, clips, videos):
    if "video" in request_of:
        request_of = {"video": root.parent / request_of["video"]}
    found = find(root, **request_of)
    assert (found["prompts"], found["clips"], len(found["videos"])) == (prompts, clips, videos)
    rows = {"curate-prompts": len(prompts), "synthesize-videos": len(clips)}
    rows |= {"validate-pairs": len(clips), "encode-latents": len(clips)}
    assert found["rows"] == {step: count for step, count in rows.items() if count}
    assert found["outputs"].keys() == found["rows"].keys()


def test_a_dry_run_changes_nothing_and_a_withdrawal_leaves_no_text_and_no_name(root):
    find(root, id="p0")
    assert not (root / FILE).exists()
    report = withdraw(Request(video=root.parent / "film.mp4"), root, all_of_it=False, dry_run=False)
    assert (report["number"], report["withdrawn"]) == (1, {"video": "a file"})
    assert "film.mp4" not in (root / FILE).read_text()
    withdrawn = read_withdrawn(root)
    assert withdrawn.videos == {file_sha256(root.parent / "film.mp4")}
    assert withdrawn.outputs == set(report["outputs"].values())


def test_a_withdrawal_of_nothing_or_of_everything_is_refused(root):
    with pytest.raises(BadInputError, match="comes from the source 'nobody', so there is nothing to withdraw"):
        find(root, source="nobody")
    with pytest.raises(ConfigError, match="exactly one of --source, --id and --video"):
        find(root, source="hand", id="p0")
    with pytest.raises(MissingInputError, match=r"no file .*none.mp4"):
        find(root, video=root / "none.mp4")
    write(root, "curate-prompts", "prompts", [{"id": "p0", "source": "hand"}])
    with pytest.raises(ConfigError, match=r"All data under .* come from the source 'hand'.*add --all"):
        find(root, source="hand")
    assert withdraw(Request(source="hand"), root, all_of_it=True, dry_run=True)["prompts"] == ["p0"]


@pytest.mark.slow
def test_tagged_datasets_are_searched_where_dvc_has_their_pairs(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    write(tmp_path, "validate-pairs", "pairs", [{"id": "1-p0-05eed", "clip_id": "p0-05eed"}])
    dvc = [sys.executable, "-m", "dvc"]
    name = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org"]
    tag = [*name, "tag", "-a", "dataset@v1.0.0", "-m", "pairs\n\nDataset-Digest: old\n"]
    commands = [["git", "init", "-q"], [*dvc, "init", "-q"], [*dvc, "add", "-q", "data/pairs"], ["git", "add", "-A"]]
    for command in (*commands, [*name, "commit", "-qm", "data"], tag):
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    shutil.rmtree(tmp_path / "data/pairs")

    def held(**found):
        (snapshot,) = examine_snapshots(tmp_path, Found(**found))
        return snapshot["held"]

    assert held(clips={"p0-05eed"})
    assert held(prompts={"p0"})
    assert held(prompts={"p"}) is False
    assert held(outputs={"x": "old"})
    shutil.rmtree(tmp_path / ".dvc/cache")
    assert held(prompts={"p0"}) is None


@pytest.mark.slow
def test_models_that_learned_from_it_are_tagged_and_those_of_unknown_data_named(root, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    latents = json.loads((root / "data/latents/manifest.json").read_text())["digest"]
    client = MlflowClient(tracking_uri(root))
    client.create_registered_model("m")
    for dataset in (latents, "another"):
        client.create_model_version("m", str(tmp_path), tags={"univigu.dataset_digest": dataset})
    report = tmp_path / "report.md"
    call = ["data", "withdraw", "--id", "p0", "--root", str(root), "--report", str(report)]
    done = CliRunner().invoke(app, call)
    assert done.exception is None
    text = report.read_text()
    assert text.startswith("# Withdrawal 1: id p0\n")
    assert "- registered models that held or learned from it: m version 1\n" in text
    assert "- registered models that may have: their data are not here: m version 2\n" in text
    assert [client.get_model_version("m", n).tags.get("univigu.withdrawn") for n in ("1", "2")] == ["1", None]
    assert CliRunner().invoke(app, [*call[:3], "p1", *call[4:6]]).exception is None
    assert client.get_model_version("m", "1").tags["univigu.withdrawn"] == "1 2"
