"""TrainJobs through the real Kubernetes client, against a fake API server."""

import inspect
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import typing
from pathlib import Path

import mlflow
import pytest
import yaml

from components.cli import train_job
from components.orchestration import kfp_tasks
from components.orchestration.train_job import Settings, build, work_key
from components.orchestration.train_job_run import dry_run_train_job, run_train_job
from components.pipeline.manifests import verify
from components.pipeline.stages import find_stage
from components.pipeline.state import STATE
from univigu.errors import (
    BadInputError,
    ConfigError,
    MissingInputError,
)

KEY = "0123456789abcdef"


def make_job(**settings):
    return build(find_stage("train-stage-1"), KEY, "tiny", Path("/work/run"), Settings(**settings))


# --- the whole way ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_preempted_training_on_two_processes_ends_with_the_bits_of_an_undisturbed_one(
    cluster, latents_root, profile, tmp_path, monkeypatch, capfd
):
    """A pipeline's task, and a fake cluster that runs its TrainJob: two processes, which SIGTERM stops."""
    profile["train_stage_1"].update(steps=30, batch_size=4, checkpoint_every=1000, heldout_every=30)
    for root in (latents_root, shutil.copytree(latents_root, tmp_path / "undisturbed")):
        (root / "profile.yaml").write_text(yaml.safe_dump(profile))
    torchrun = [sys.executable, "-m", "univigu.training.launch", "--standalone", "-m", "components.cli.main"]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment["MLFLOW_TRACKING_URI"] = f"sqlite:///{latents_root / 'mlflow.db'}"
    curves, codes = latents_root / STATE / "scratch/train-stage-1/curves.csv", []

    def run_pod(job):
        trainer = job["spec"]["trainer"]
        asked = {
            **environment,
            **{variable["name"]: variable["value"] for variable in trainer["env"]},
            "PET_NPROC_PER_NODE": str(2 * trainer["numProcPerNode"]),  # gloo has room for two on this node
        }
        with (latents_root / "pod.log").open("ab") as log:
            process = subprocess.Popen([*torchrun, *trainer["args"]], env=asked, stdout=log, stderr=log)
        cluster.pod(name=job["metadata"]["name"])
        threading.Thread(target=watch, args=(job["metadata"]["name"], process, not codes), daemon=True).start()

    def watch(name, process, preempt):
        while preempt and process.poll() is None:
            if curves.is_file() and len(curves.read_text().splitlines()) > 3:
                process.terminate()  # as a kubelet does with a pod
                break
            time.sleep(0.01)
        codes.append(process.wait())
        cluster.pods.clear()
        cluster.pod(phase="Failed" if codes[-1] else "Succeeded", exit_code=codes[-1], name=name)
        cluster.condition("Failed" if codes[-1] else "Complete", name=name)

    cluster.created = run_pod
    monkeypatch.setenv("MLFLOW_TRACKING_URI", environment["MLFLOW_TRACKING_URI"])
    monkeypatch.setenv("UNIVIGU_API_TIMEOUT", "60")
    task = ("train-stage-1", str(latents_root / "profile.yaml"), str(latents_root), "key")
    options = {"claim": "work", "mount-path": str(tmp_path), "gpus": "0", "nodes": "1", "queue": ""}
    digest = kfp_tasks.run_step(*task, kfp_tasks.declaration("train-stage-1"), trainjob=options)
    said = capfd.readouterr().out
    assert "preempted; submitting it again (1 of 20)" in said
    assert "train-stage-1 | train-stage-1: 6 rows in, 6 out, by a TrainJob\n" in said
    assert mounted_at(cluster) == str(tmp_path)  # the volume lies where it lies for the pipeline, above the root
    assert codes == [81, 0], (latents_root / "pod.log").read_text()[-4000:]
    assert cluster.submissions >= 2
    log = (latents_root / "pod.log").read_text()
    assert len(re.findall(r"univigu: Training received SIGTERM and saved step \d+ of 30", log)) == 1
    assert re.search(r"Resuming after step \d+ of 30", log)
    assert log.count("train-stage-1: 6 rows in") == 1
    mlflow.set_tracking_uri(environment["MLFLOW_TRACKING_URI"])
    (run,) = mlflow.search_runs(experiment_names=["uni-vigu"], output_format="list")
    assert run.info.status == "FINISHED"

    root = tmp_path / "undisturbed"
    command = [*torchrun, "run", "train-stage-1", "--profile", str(root / "profile.yaml"), "--root", str(root)]
    undisturbed = {**environment, "PET_NPROC_PER_NODE": "2", "MLFLOW_TRACKING_URI": f"sqlite:///{root / 'mlflow.db'}"}
    subprocess.run(command, env=undisturbed, check=True, capture_output=True)
    assert verify(root / "data/stage1", "train-stage-1")["digest"] == digest


def mounted_at(cluster):
    """Where the only job has its volume."""
    (job,) = cluster.jobs.values()
    ((node,),) = [
        patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"] for patch in job["spec"]["runtimePatches"]
    ]
    (mount,) = node["template"]["spec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    return mount["mountPath"]


# --- what is asked for -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gpus": 0, "cpu": "2", "memory": "4Gi"},
        {
            "image": "registry.example/univigu@sha256:0",
            "claim": "work",
            "mount_path": Path("/work"),
            "nodes": 4,
            "queue": "gpus",
            "priority": "univigu-urgent",
            "env": {"NCCL_DEBUG": "INFO"},
        },
    ],
)
def test_the_api_knows_every_field_of_a_train_job(settings):
    from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

    job = make_job(**settings)
    assert TrainerV1alpha1TrainJob.from_dict(job).to_dict() == job  # the models drop what they don't know


def test_a_train_job_sets_command_resources_and_volume():
    asked = {"nodes": 2, "gpus": 4, "queue": "gpus", "priority": "high", "image": "i", "grace": 120, "run_id": "run-1"}
    job = make_job(claim="work", mount_path=Path("/work"), **asked)
    trainer, (patch,) = job["spec"]["trainer"], job["spec"]["runtimePatches"]
    assert job["metadata"]["name"] == "train-stage-1-0123456789"
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert job["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "high"
    assert job["metadata"]["labels"]["univigu/run-id"] == "run-1"
    assert job["spec"]["runtimeRef"] == {
        "apiGroup": "trainer.kubeflow.org",
        "kind": "TrainingRuntime",
        "name": "univigu-torchrun",
    }
    assert trainer["args"] == ["run", "train-stage-1", "--profile", "tiny", "--root", "/work/run"]
    assert (trainer["numNodes"], trainer["numProcPerNode"], trainer["image"]) == (2, 4, "i")
    assert trainer["resourcesPerNode"]["limits"] == {"cpu": "32", "memory": "256Gi", "nvidia.com/gpu": "4"}
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 120
    assert pod["volumes"] == [{"name": "work", "persistentVolumeClaim": {"claimName": "work"}}]
    assert pod["containers"] == [{"name": "node", "volumeMounts": [{"name": "work", "mountPath": "/work"}]}]


def test_without_gpus_a_node_has_one_process():
    trainer = make_job(gpus=0)["spec"]["trainer"]
    assert trainer["numProcPerNode"] == 1
    assert "nvidia.com/gpu" not in trainer["resourcesPerNode"]["limits"]


def test_on_a_cluster_without_kueue_a_trainjob_names_no_queue_and_starts_at_once():
    job = make_job()
    assert not [label for label in job["metadata"]["labels"] if "kueue" in label]
    assert "suspend" not in make_job(queue="gpus")["spec"]  # which Kueue sets, where it is installed


def test_different_work_has_a_different_name():
    assert (
        build(find_stage("train-stage-1"), "f" * 64, "tiny", Path("/work"), Settings())["metadata"]["name"]
        == "train-stage-1-ffffffffff"
    )
    places = [("/work/a", "one"), ("/work/b", "one"), ("/work/a", "two")]  # which may hold the same inputs
    keys = [work_key("f" * 64, Path(root), Settings(claim=claim)) for root, claim in places]
    assert len(set(keys)) == len(keys)


def test_the_run_that_a_train_job_is_part_of_comes_from_the_variable_that_a_task_has():
    option = inspect.signature(train_job.train_job).parameters["run_id"].annotation
    assert typing.get_args(option)[1].envvar == kfp_tasks.RUN_ID


def test_invalid_settings_are_refused_before_any_request(tmp_path):
    with pytest.raises(ConfigError, match="not a training step"):
        run_train_job("encode-latents", "tiny", tmp_path, Settings())
    with pytest.raises(BadInputError, match="not on the volume"):
        run_train_job("train-stage-1", "tiny", tmp_path, Settings(mount_path=tmp_path / "elsewhere"))
    (tmp_path / "mine.yaml").write_text("seed: 0")
    with pytest.raises(BadInputError, match=r"mine.yaml is not on the volume"):
        run_train_job("train-stage-1", str(tmp_path / "mine.yaml"), tmp_path / "root", Settings())
    with pytest.raises(BadInputError, match="split evenly over 56 processes"):
        run_train_job("train-stage-1", "tiny", tmp_path, Settings(nodes=7))
    with pytest.raises(MissingInputError, match="univigu run encode-latents"):
        run_train_job("train-stage-1", "tiny", tmp_path, Settings())


def test_a_dry_run_validates_the_job_and_creates_nothing(cluster, tmp_path, capfd):
    settings = Settings(namespace="team", poll=0.01, api_timeout=20.0, grace=5, start_timeout=30.0)
    dry_run_train_job("train-stage-1", "tiny", tmp_path, settings)
    assert (cluster.submissions, cluster.jobs) == (1, {})
    cluster.failures = [(403, "admission webhook denied the request: TrainingRuntime univigu-torchrun not found")]
    with pytest.raises(ConfigError, match="TrainingRuntime univigu-torchrun not found"):
        dry_run_train_job("train-stage-1", "tiny", tmp_path, settings)


def test_a_priority_without_a_queue_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"'high' has no effect without a queue; add --queue"):
        dry_run_train_job("train-stage-1", "tiny", tmp_path, Settings(priority="high"))


@pytest.mark.slow
def test_a_pipelines_first_task_asks_the_cluster_for_both_stages(cluster, capfd, tmp_path):
    options = {"image": "i", "claim": "work", "mount-path": "/", "gpus": "8", "nodes": "1", "queue": ""}
    with pytest.raises(SystemExit) as stop:
        kfp_tasks._check_train_jobs("tiny", str(tmp_path), {**options, "nodes": "7"})
    assert stop.value.code == 65
    assert "split evenly over 56 processes" in kfp_tasks.last_failure(str(tmp_path))["message"]
    kfp_tasks._check_train_jobs("tiny", str(tmp_path), options)
    said = capfd.readouterr().out
    for stage in ("train-stage-1", "train-stage-2"):
        assert f"check-prerequisites | {stage}: the cluster accepts this TrainJob" in said
    assert cluster.jobs == {}
