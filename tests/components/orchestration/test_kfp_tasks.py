"""Tasks of the pipeline fail early with a clear message, are skipped only if finished, and report how a run ended."""

import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from components.orchestration import kfp_tasks, prerequisites
from components.orchestration.kfp_server import typed_arguments
from components.orchestration.notifications import NOTIFY_URL
from components.pipeline.manifests import read_manifest, write_manifest
from components.pipeline.runner import run_stage
from components.pipeline.stages import STAGES

REPO = Path(__file__).parents[3]


@pytest.fixture
def profile_file(profile, tmp_path):
    path = tmp_path / "profile.yaml"
    path.write_text(yaml.safe_dump(profile))
    return str(path)


@pytest.fixture
def root(new_root, tmp_path, profile, monkeypatch):
    """A work root with every source, and validated prompts."""
    monkeypatch.setenv(kfp_tasks.RUN_ID, "run-1")
    folder = tmp_path / "root"
    shutil.copytree(new_root("kfp"), folder)
    for key in ("raw_prompts", "heldout"):
        (folder / profile[key]).parent.mkdir(parents=True, exist_ok=True)
        (folder / profile[key]).write_text("[]")
    return folder


RESOURCES = {"gpus": "1", "gpu_cpu": "8", "gpu_memory": "64Gi", "training_gpus": "0", "training_memory": "1Ti"}


def check(root, profile, **changes):
    arguments = {
        "parts": 3,
        "train_backend": "pod",
        "required_env": [],
        "free_gib": 0.001,
        "resources": RESOURCES,
    } | changes
    return kfp_tasks.check_prerequisites(profile, str(root), **arguments)


def step(name, root, profile, **changes):
    arguments = {"cache_key": "key", "declared": kfp_tasks.declaration(name)} | changes
    return kfp_tasks.run_step(name, profile, str(root), **arguments)


def test_with_all_prerequisites_the_parts_are_returned(root, profile_file, monkeypatch):
    monkeypatch.setenv("A_SECRET", "value")
    assert check(root, profile_file, required_env=["A_SECRET"]) == ["1/3", "2/3", "3/3"]
    assert kfp_tasks.last_failure(str(root)) == {}


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"parts": 0}, 78, "'parts' is 0; set it to"),
        ({"parts": 10**6}, 78, "from 1 to 1000"),
        ({"train_backend": "moon"}, 78, "no train_backend 'moon'; choose one of pod, trainjob"),
        ({"required_env": ["NOT_THERE_1", "NOT_THERE_2"]}, 66, "variables NOT_THERE_1, NOT_THERE_2 are not set"),
        ({"free_gib": 1e9}, 73, "GiB are free"),
        ({"profile": "huge"}, 78, "no profile 'huge'"),
        (
            {"resources": RESOURCES | {"training_gpus": "eight"}},
            78,
            "'training_gpus' is 'eight'; set it to a whole",
        ),
        ({"resources": RESOURCES | {"gpus": "-1"}}, 78, "'gpus' is '-1'; set it to a whole number"),
        (
            {"resources": RESOURCES | {"gpu_memory": "lots"}},
            78,
            "'gpu_memory' is 'lots'; set it to a Kubernetes",
        ),
        ({"resources": RESOURCES | {"gpu_cpu": "0"}}, 78, "'gpu_cpu' is '0'"),
        ({"resources": RESOURCES | {"training_gpus": "7"}}, 65, "can't be split evenly over 7 processes"),
    ],
)
def test_missing_or_invalid_prerequisites_are_reported_before_anything_runs(
    root, profile_file, capsys, changes, code, message
):
    with pytest.raises(SystemExit) as stop:
        check(root, changes.pop("profile", profile_file), **changes)
    assert stop.value.code == code
    assert message in capsys.readouterr().out
    failure = kfp_tasks.last_failure(str(root))
    assert (failure["step"], failure["exit_code"]) == ("check-prerequisites", code)
    assert message in failure["message"]


def test_a_missing_source_or_volume_is_named(root, profile, profile_file, tmp_path, capsys):
    shutil.rmtree(root / profile["base"])
    with pytest.raises(SystemExit):
        check(root, profile_file)
    assert f"has no {profile['base']}, which" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        check(tmp_path / "no-volume", profile_file)
    assert stop.value.code == 66
    assert "mount the volume" in capsys.readouterr().out


def test_a_tracking_server_that_does_not_answer_is_detected_at_once(root, profile_file, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(SystemExit) as stop:
        check(root, profile_file)
    assert stop.value.code == 75
    assert "does not answer" in capsys.readouterr().out


def test_a_captioner_that_does_not_answer_is_detected_at_once(root, profile, tmp_path, monkeypatch, capsys):
    profile["caption_videos"].update(captioner="openai", options={"model": "m", "tries": 1, "backoff_s": 0.01})
    path = tmp_path / "profile.yaml"
    path.write_text(yaml.safe_dump(profile))
    for address, code, said in (("", 78, "CAPTION_BASE_URL"), ("http://127.0.0.1:9/v1", 75, "doesn't answer")):
        monkeypatch.setenv("CAPTION_BASE_URL", address)
        with pytest.raises(SystemExit) as stop:
            check(root, str(path))
        assert stop.value.code == code
        assert said in capsys.readouterr().out


MOUNTS = """\
21 1 8:1 / / rw - ext4 /dev/root rw
30 21 0:50 / /mnt rw shared:1 - {of_all} server:/export rw
31 30 8:2 / /mnt/work\\040root rw - {kind} /dev/sdb rw
32 21 8:3 / /mnt/work rw - xfs /dev/sdc rw
"""


@pytest.mark.parametrize("kind", ["ext4", "nfs4"])
def test_a_cluster_without_a_shared_volume_is_told_of_by_the_first_task(
    root, profile_file, tmp_path, monkeypatch, capsys, kind
):
    (tmp_path / "mountinfo").write_text(MOUNTS.format(kind=kind, of_all="nfs4"))
    found = prerequisites.disk_of_one_node(Path("/mnt/work root/run"), tmp_path / "mountinfo")
    assert found == ("ext4" if kind == "ext4" else "")
    assert prerequisites.disk_of_one_node(Path("/mnt/other"), tmp_path / "mountinfo") == ""
    assert prerequisites.disk_of_one_node(root) in prerequisites.ONE_NODE  # of this machine
    monkeypatch.setattr(kfp_tasks, "disk_of_one_node", lambda _: found)
    for in_a_pod in (False, True):
        if in_a_pod:
            monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
        check(root, profile_file)
        told = "the work root is on ext4, a disk of one node" in capsys.readouterr().out
        assert told is (in_a_pod and kind == "ext4")


def test_the_pages_arguments_for_a_cluster_without_gpus_are_accepted_by_the_first_task(root, profile_file):
    (text,) = re.findall(r"To use no GPU, set `([^`]+)`", (REPO / "docs/kubeflow.md").read_text(encoding="utf-8"))
    arguments = typed_arguments(REPO / "infra/pipeline.yaml", dict(one.split("=") for one in text.split()))
    assert (arguments["gpus"], arguments["training_gpus"]) == ("0", "0")
    assert check(root, profile_file, resources=arguments) == ["1/3", "2/3", "3/3"]


@pytest.mark.slow
def test_a_step_in_parts_is_committed_by_a_task_that_computes_nothing(
    root, profile_file, profile, finished_clips, capfd
):
    for part in ("1/2", "2/2"):
        assert step("synthesize-videos", root, profile_file, part=part) == ""
    assert not (root / "data/clips").exists()
    digest = step("synthesize-videos", root, profile_file)
    said = capfd.readouterr().out
    assert said.count("shards made") == 2
    assert "synthesize-videos 2/2 | " in said
    assert json.loads((root / "data/clips/manifest.json").read_text())["digest"] == digest
    assert digest == run_stage("synthesize-videos", profile, root)["digest"]


@pytest.mark.slow
def test_the_only_part_does_the_whole_step_and_the_commit_finds_it_finished(root, profile_file, capfd):
    digest = step("synthesize-videos", root, profile_file, part="1/1")
    assert (root / "data/clips/manifest.json").is_file()
    assert step("synthesize-videos", root, profile_file) == digest
    assert "finished before" in capfd.readouterr().out


@pytest.mark.parametrize("part", ["", "1/2"])
def test_an_input_replaced_by_another_run_is_refused(root, profile_file, capfd, part):
    with pytest.raises(SystemExit) as stop:
        step("synthesize-videos", root, profile_file, inputs=f"validate-prompts={'ab' * 32} train-stage-1=", part=part)
    assert stop.value.code == 65
    assert "validate-prompts was replaced by another run before 'synthesize-videos'" in capfd.readouterr().out
    assert not (root / "data/clips").exists()


@pytest.mark.slow
def test_a_step_fails_if_its_input_is_replaced_while_it_runs(root, profile_file, monkeypatch, capfd):
    prompts = root / "data/validated/prompts"
    ours, run = read_manifest(prompts, "validate-prompts"), kfp_tasks._run_command

    def after_another_run(*arguments):
        write_manifest(prompts, {**ours, "digest": "ab" * 32})
        run(*arguments)

    monkeypatch.setattr(kfp_tasks, "_run_command", after_another_run)
    with pytest.raises(SystemExit) as stop:
        step("synthesize-videos", root, profile_file, inputs=f"validate-prompts={ours['digest']}")
    assert stop.value.code == 65
    assert (root / "data/clips/manifest.json").is_file()
    assert "was replaced by another run" in capfd.readouterr().out


@pytest.mark.slow
def test_a_failure_that_a_retry_fixes_is_not_reported(root, profile_file, capfd):
    with pytest.raises(SystemExit):
        step("synthesize-videos", root, profile_file, inputs=f"validate-prompts={'ab' * 32}")
    kfp_tasks.notify("uni-vigu", str(root), "SUCCEEDED", "")
    assert '"failed_step": null, "exit_code": null' in capfd.readouterr().out
    assert kfp_tasks.last_failure(str(root))["step"] == "synthesize-videos"
    step("synthesize-videos", root, profile_file)
    assert kfp_tasks.last_failure(str(root)) == {}


def test_a_prerequisite_that_was_met_later_is_not_reported_for_a_later_failure(root, profile_file, capsys):
    with pytest.raises(SystemExit):
        check(root, profile_file, required_env=["NOT_THERE"])
    check(root, profile_file)
    kfp_tasks.notify("uni-vigu", str(root), "FAILED", "main: OOMKilled")
    assert '"failed_step": null, "exit_code": null, "message": "main: OOMKilled"' in capsys.readouterr().out


@pytest.mark.slow
def test_a_failed_step_ends_its_task_with_the_steps_exit_code_and_message(root, profile_file, profile, capfd):
    (root / "data/validated/prompts/prompts.parquet").write_bytes(b"damaged")
    with pytest.raises(SystemExit) as stop:
        step("synthesize-videos", root, profile_file)
    assert stop.value.code == 74
    failure = kfp_tasks.last_failure(str(root))
    assert failure["message"].startswith(str(root / "data/validated/prompts/prompts.parquet"))
    assert f"synthesize-videos | univigu: {failure['message']}" in capfd.readouterr().out


def test_the_failure_of_another_run_is_not_reported(root, profile_file, monkeypatch):
    with pytest.raises(SystemExit):
        check(root, profile_file, parts=0)
    monkeypatch.setenv(kfp_tasks.RUN_ID, "run-2")
    assert kfp_tasks.last_failure(str(root)) == {}


def test_an_image_with_other_stages_than_the_pipeline_is_refused(root, profile_file, capsys):
    declared = kfp_tasks.declaration("synthesize-videos")
    with pytest.raises(SystemExit) as stop:
        step("synthesize-videos", root, profile_file, declared={**declared, "parameters": ["seed"]})
    assert stop.value.code == 78
    assert "compiled for another version" in capsys.readouterr().out


@pytest.mark.slow
def test_a_cache_key_is_valid_as_long_as_its_output_exists(root, profile_file, profile):
    def keys(path=profile_file):
        found = kfp_tasks.cache_keys(path, str(root))
        return {stage.name: key for stage, key in zip(STAGES, found, strict=True)}

    first = keys()
    name = "synthesize-videos"
    step(name, root, profile_file, cache_key=first[name])
    second = keys()
    assert second[name] == first[name]
    assert all(second[other] != first[other] for other in first if other != name)  # which never ran
    # another profile's output takes its place: neither profile's key holds then
    profile["synthesize_videos"]["steps"] = 3
    other_file = str(root / "other.yaml")
    (root / "other.yaml").write_text(yaml.safe_dump(profile))
    third = keys(other_file)
    assert third[name] != first[name]
    step(name, root, other_file, cache_key=third[name])
    assert keys(other_file)[name] == third[name]
    assert keys()[name] not in (first[name], third[name])
    # and so it is when the output is wiped
    shutil.rmtree(root / "data/clips")
    assert keys(other_file)[name] != third[name]


def test_a_step_runs_by_the_users_command(root):
    def command(**options):
        return " ".join(kfp_tasks.command("train-stage-1", "tiny", "/r", **options)[1:])

    assert command() == "-m components.cli.main run train-stage-1 --profile tiny --root /r"
    assert command(part="2/4").endswith("--part 2/4")
    assert command(gpus=8).startswith("-m univigu.training.launch --standalone --nproc-per-node=8 -m components")
    sent = command(trainjob={"gpus": "8", "claim": "univigu-work"})
    assert sent.endswith("train-job train-stage-1 --profile tiny --root /r --gpus 8 --claim univigu-work")


@pytest.fixture
def receiver():
    """A web server that records the reports it receives, and answers with `status`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            server.received.append((self.path, self.headers["Content-Type"], json.loads(body)))
            self.send_response(server.status)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.received, server.status = [], 200
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}/hook/s3cret"
    yield server
    server.shutdown()


def test_a_notification_names_the_step_that_failed(root, profile_file, receiver, monkeypatch, capsys):
    monkeypatch.setenv(NOTIFY_URL, receiver.url)
    with pytest.raises(SystemExit):
        check(root, profile_file, parts=0)
    kfp_tasks.notify("uni-vigu", str(root), "FAILED", "something else")
    kfp_tasks.notify("uni-vigu", str(root.parent), "SUCCEEDED", "")
    (path, kind, failed), (_, _, succeeded) = receiver.received
    assert (path, kind) == ("/hook/s3cret", "application/json")
    assert failed["message"].startswith("'parts' is 0")
    assert {**failed, "message": None} == {
        "pipeline": "uni-vigu",
        "run_id": "run-1",
        "state": "FAILED",
        "failed_step": "check-prerequisites",
        "exit_code": 78,
        "message": None,
    }
    assert (succeeded["state"], succeeded["failed_step"], succeeded["message"]) == ("SUCCEEDED", None, None)
    assert "s3cret" not in capsys.readouterr().out


def test_a_run_that_was_cancelled_is_reported_as_such(root, receiver, monkeypatch):
    monkeypatch.setenv(NOTIFY_URL, receiver.url)
    kfp_tasks.notify("uni-vigu", str(root), "RUNNING", "")  # the last state that its tasks have reported
    ((_, _, report),) = receiver.received
    assert report["message"] == "The run was cancelled, or a pod was lost before it could report its end."


def test_a_failed_task_leaves_its_exit_code_where_argo_looks_for_it(root, profile_file, tmp_path, monkeypatch):
    log = tmp_path / "termination-log"
    monkeypatch.setattr(kfp_tasks, "TERMINATION_LOG", log)
    with pytest.raises(SystemExit):
        check(root, profile_file, parts=0)
    assert not log.exists()  # not in a container
    log.touch()
    with pytest.raises(SystemExit):
        check(root, profile_file, parts=0)
    assert log.read_text().startswith("univigu exit code 78: 'parts' is 0")
