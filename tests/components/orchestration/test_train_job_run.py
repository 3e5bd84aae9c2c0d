"""A launcher follows its TrainJob, through the real Kubernetes client and the fake server of conftest.py."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from components.orchestration.train_job import Settings, build
from components.orchestration.train_job_run import follow
from components.pipeline.notes import QueueNote
from components.pipeline.stages import find_stage
from univigu.errors import (
    BadInputError,
    ConfigError,
    MissingInputError,
    PreemptedError,
    TransientError,
    UniViGUError,
)

QUICK = {"namespace": "team", "poll": 0.01, "api_timeout": 20.0, "grace": 5, "start_timeout": 30.0}
MANIFEST = {"rows_in": 6, "rows_out": 6}


def make_job(**settings):
    return build(find_stage("train-stage-1"), "0123456789abcdef", "tiny", Path("/work/run"), Settings(**settings))


def launch(output=lambda: MANIFEST, **settings):
    settings = QUICK | settings
    return follow(make_job(**settings), Settings(**settings), output)


# --- following -------------------------------------------------------------------------------------------------------


def test_a_job_is_followed_to_its_end_and_its_first_pods_log_is_forwarded_once(cluster, capsys):
    def start():
        cluster.pod(0)
        cluster.pod(1)
        cluster.say("step 1/2 loss 2.0")
        cluster.say("not for the reader", index=1)

    cluster.looks = [
        lambda: None,
        start,
        lambda: cluster.say("step 2/2 loss 1.0\x1b[31m"),
        lambda: cluster.condition("Complete"),
    ]
    assert launch(nodes=2) == MANIFEST
    said = capsys.readouterr()
    assert said.out == "step 1/2 loss 2.0\nstep 2/2 loss 1.0 [31m\n"
    assert f"TrainJob team/{cluster.job_name}: submitted, nodes: 2\n" in said.err
    assert "2 of 2 pods have started" in said.err
    assert cluster.submissions == 1
    assert cluster.job_name in cluster.jobs  # stays to be looked at


def test_a_running_job_is_followed_and_not_submitted_again(cluster, capsys):
    cluster.jobs[cluster.job_name] = make_job()
    cluster.looks = [lambda: cluster.pod(), lambda: cluster.condition("Complete")]
    assert launch() == MANIFEST
    assert "already submitted; following it" in capsys.readouterr().err
    assert len(cluster.jobs) == 1


def test_monitoring_is_told_how_long_a_job_waits_for_all_of_its_nodes(cluster, tmp_path):
    seen, path = [], tmp_path / "note.json"

    def look():
        seen.append(json.loads(path.read_text())["until"])

    cluster.looks = [
        lambda: None,
        lambda: (look(), cluster.pod(0)),
        lambda: (look(), cluster.pod(1)),
        lambda: None,
        lambda: (look(), cluster.condition("Complete")),
    ]
    settings = QUICK | {"nodes": 2}
    wait = QueueNote(path, cluster.job_name, "train-stage-1")
    follow(make_job(**settings), Settings(**settings), lambda: MANIFEST, wait)
    note = json.loads(path.read_text())
    assert seen == [None, None, note["until"]]
    assert note["since"] < note["until"]
    assert (note["job"], note["step"]) == (cluster.job_name, "train-stage-1")


def test_a_lost_response_to_the_submission_submits_nothing_twice(cluster):
    cluster.failures = [(504, "Timeout: request did not complete within the allotted duration")]
    cluster.jobs[cluster.job_name] = make_job()  # the server had taken it before it fell silent
    cluster.looks = [lambda: cluster.condition("Complete")]
    assert launch() == MANIFEST
    assert [method for method, path in cluster.requests if "trainjobs" in path][:2] == ["POST", "POST"]


@pytest.mark.slow
def test_a_finished_job_is_not_run_again_unless_its_output_is_gone(cluster):
    cluster.jobs[cluster.job_name] = make_job()
    cluster.condition("Complete")
    assert launch() == MANIFEST
    assert not [method for method, _ in cluster.requests if method == "DELETE"]

    there = []
    cluster.created = lambda job: (there.append(MANIFEST), cluster.condition("Complete"))
    assert launch(lambda: there[0] if there else None) == MANIFEST
    assert [method for method, _ in cluster.requests if method == "DELETE"] == ["DELETE"]


def test_a_completed_job_without_an_output_here_is_an_error(cluster):
    cluster.looks = [lambda: cluster.condition("Complete")]
    with pytest.raises(MissingInputError, match="--claim"):
        launch(lambda: None)


@pytest.mark.slow
def test_a_preempted_job_is_submitted_again_and_resumes(cluster, capsys):
    ends = [
        {"exit_code": 81},  # SIGTERM: saved, left
        {"exit_code": 137, "disrupted": True},  # the node went away under it
    ]

    def run_once(job):
        if not ends:
            return cluster.condition("Complete")
        cluster.pod(0, "Failed", **ends.pop(0))
        return cluster.condition("Failed", "jobset failed due to one or more job failures")

    cluster.created = run_once
    assert launch() == MANIFEST
    said = capsys.readouterr().err
    assert "preempted; submitting it again (1 of 20)" in said
    assert "preempted; submitting it again (2 of 20)" in said


@pytest.mark.parametrize("codes", [(81, 74), (74, 81), (137, 74)], ids=str)
def test_a_failed_pod_takes_precedence_over_preempted_pods(cluster, codes):
    def fail(job):
        for index, code in enumerate(codes):
            cluster.pod(index, "Failed", exit_code=code, disrupted=code == 137)
        cluster.condition("Failed")

    cluster.created = fail
    with pytest.raises(UniViGUError, match="ended with exit code 74") as failed:
        launch(nodes=2)
    assert failed.value.exit_code == 74
    assert cluster.submissions == 1


@pytest.mark.slow
def test_a_job_preempted_too_often_is_given_up_and_can_be_resumed(cluster):
    def preempt(job):
        cluster.pod(0, "Failed", exit_code=81)
        cluster.condition("Failed")

    cluster.created = preempt
    with pytest.raises(PreemptedError, match=r"preempted 3 times.*run the same command") as stopped:
        launch(resumes=2)
    assert stopped.value.exit_code == 81


def test_a_failed_job_ends_with_the_pods_exit_code_and_last_message(cluster, capsys):
    def fail():
        cluster.pod(0, "Failed", exit_code=1)
        cluster.pod(1, "Failed", exit_code=74)
        cluster.say("Traceback: Connection closed by peer")
        cluster.say("step 3/9\nunivigu: The loss is nan at step 4; lower the learning rate.", index=1)
        cluster.condition("Failed")

    cluster.looks = [fail]
    with pytest.raises(UniViGUError, match=r"pod .*-0-1 ended with exit code 74: The loss is nan") as failed:
        launch(nodes=2)
    assert failed.value.exit_code == 74
    assert f"{cluster.job_name}-node-0-1: step 3/9" in capsys.readouterr().err
    assert cluster.job_name in cluster.jobs


@pytest.mark.slow
def test_a_failed_job_is_replaced_by_the_next_run(cluster):
    cluster.jobs[cluster.job_name] = make_job()
    cluster.condition("Failed")
    cluster.created = lambda job: cluster.condition("Complete")
    assert launch() == MANIFEST
    assert cluster.submissions == 2  # the first was told that there is one already, until that was gone
    assert "Failed" not in {c["type"] for c in cluster.jobs[cluster.job_name]["status"]["conditions"]}


def test_a_pod_out_of_memory_is_reported_as_such(cluster):
    def fail():
        cluster.pod(0, "Failed", exit_code=137, reason="OOMKilled")
        cluster.condition("Failed")

    cluster.looks = [fail]
    with pytest.raises(UniViGUError, match=r"memory limit of 256Gi.*--memory"):
        launch()


def test_a_failure_without_pods_has_the_controllers_message(cluster):
    cluster.looks = [lambda: cluster.condition("Failed", "TrainingRuntime univigu-torchrun not found")]
    with pytest.raises(UniViGUError, match="TrainingRuntime univigu-torchrun not found"):
        launch()


@pytest.mark.parametrize(
    ("pod", "said"),
    [
        ({"unscheduled": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."}, "3 Insufficient nvidia.com/gpu"),
        ({"waiting": ("ImagePullBackOff", 'Back-off pulling image "nowhere"')}, "ImagePullBackOff: Back-off pulling"),
        (None, "FailedCreate: pods is forbidden: violates PodSecurity"),
    ],
    ids=["no room", "no image", "no pod"],
)
def test_a_job_that_never_starts_is_deleted_with_kubernetes_reason(cluster, pod, said):
    def stay_pending(job):
        if pod:
            cluster.pod(0, "Pending", **pod)
        else:
            cluster.events = [
                {
                    "metadata": {"name": "e"},
                    "involvedObject": {"kind": "Job", "name": f"{cluster.job_name}-node-0"},
                    "type": "Warning",
                    "reason": "FailedCreate",
                    "message": "pods is forbidden: violates PodSecurity",
                }
            ]

    cluster.created = stay_pending
    with pytest.raises(TransientError, match=re.escape(said)) as failed:
        launch(start_timeout=0.2)
    assert failed.value.exit_code == 75
    assert "deletionTimestamp" in cluster.jobs[cluster.job_name]["metadata"]


def test_a_job_with_only_some_nodes_started_is_deleted(cluster):
    def start_one(job):
        cluster.pod(0)
        cluster.pod(1, "Pending", unscheduled="0/3 nodes are available: 3 Insufficient nvidia.com/gpu.")

    cluster.created = start_one
    with pytest.raises(TransientError, match=r"had 1 of 2 pods running for 0\.2 s .*Insufficient nvidia.com/gpu"):
        launch(start_timeout=0.2, nodes=2)
    assert "deletionTimestamp" in cluster.jobs[cluster.job_name]["metadata"]


def test_an_evicted_pod_does_not_count_as_its_pending_replacement(cluster, capsys):
    def evict(job):
        evicted = cluster.pods[cluster.pod(0, "Failed", exit_code=137, disrupted=True)]
        evicted["metadata"]["name"] = "evicted"
        cluster.pods["evicted"] = evicted
        cluster.pod(0, "Pending", unscheduled="0/3 nodes are available: 3 Insufficient nvidia.com/gpu.")

    cluster.created = evict
    with pytest.raises(TransientError, match=r"had 0 of 1 pods running for 0\.2 s .*Insufficient nvidia.com/gpu"):
        launch(start_timeout=0.2)
    assert "pods have started" not in capsys.readouterr().err


def test_waiting_in_a_queue_does_not_count_towards_the_start_timeout(cluster, capsys):
    def suspend(job):
        job["spec"]["suspend"] = True
        cluster.condition("Suspended")

    def admit():
        cluster.jobs[cluster.job_name]["spec"]["suspend"] = False
        cluster.jobs[cluster.job_name]["status"]["conditions"] = []
        cluster.pod()

    cluster.created = suspend
    cluster.looks = [*[lambda: time.sleep(0.05)] * 10, admit, lambda: cluster.condition("Complete")]
    assert launch(start_timeout=0.3, queue="gpus") == MANIFEST
    assert "waiting in its queue" in capsys.readouterr().err


# --- stopping --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGTERM, PreemptedError), (signal.SIGINT, KeyboardInterrupt)], ids=["SIGTERM", "^C"]
)
def test_a_launcher_that_receives_a_signal_deletes_its_job(cluster, number, error):
    cluster.created = lambda job: cluster.pod()
    cluster.looks = [lambda: None, lambda: os.kill(os.getpid(), number)]
    before = signal.getsignal(number)
    with pytest.raises(error):
        launch()
    assert "deletionTimestamp" in cluster.jobs[cluster.job_name]["metadata"]
    assert signal.getsignal(number) == before


def test_a_job_deleted_by_someone_else_is_distinguished_from_a_failure(cluster):
    cluster.created = lambda job: cluster.pod()
    cluster.looks = [lambda: None, lambda: cluster.jobs.pop(cluster.job_name)]
    with pytest.raises(PreemptedError, match=r"deleted by someone else.*Run the same command to resume"):
        launch()
    assert cluster.submissions == 1


# --- the API server --------------------------------------------------------------------------------------------------


def test_a_temporary_outage_of_the_api_server_is_retried(cluster, capsys):
    cluster.created = lambda job: cluster.pod()
    cluster.looks = [
        lambda: cluster.failures.extend([(503, "the server is currently unable to handle the request")] * 2),
        lambda: cluster.condition("Complete"),
    ]
    assert launch() == MANIFEST
    assert "currently unable to handle" in capsys.readouterr().err
    assert cluster.submissions == 1


def test_an_unreachable_api_server_is_a_transient_error(cluster):
    cluster.shutdown()
    cluster.server_close()
    with pytest.raises(TransientError, match=r"http://127\.0\.0\.1:\d+ does not answer.*same command"):
        launch(api_timeout=0.6)


@pytest.mark.parametrize(
    ("failure", "error", "said"),
    [
        ((403, 'trainjobs is forbidden: User "u" cannot create resource'), ConfigError, "cannot create resource"),
        ((422, "spec.trainer.numNodes: Invalid value"), BadInputError, "numNodes: Invalid value"),
    ],
)
def test_a_rejection_has_the_servers_message(cluster, failure, error, said):
    cluster.failures = [failure]
    with pytest.raises(error, match=said):
        launch()


def test_a_cluster_without_kubeflow_trainer_is_reported_as_such(cluster):
    cluster.installed = False
    with pytest.raises(ConfigError, match="install Kubeflow Trainer"):
        launch()


def test_a_missing_cluster_configuration_is_reported(monkeypatch, tmp_path):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ConfigError, match="No cluster"):
        launch()
