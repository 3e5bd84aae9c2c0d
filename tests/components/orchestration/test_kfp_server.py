"""Runs on a Kubeflow Pipelines server: submitted once, followed to their end, with documented exit codes.

The server here (`kfp`, in conftest.py) speaks the v2beta1 API over HTTP as the real one does, without a cluster.
"""

import os
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from components.orchestration.kfp_server import (
    EXPERIMENT,
    KfpServer,
    RunState,
    default_run_name,
    read_package,
    typed_arguments,
)
from univigu.errors import BadInputError, ConfigError, MissingInputError, TransientError

ROOT = Path(__file__).parents[3]
PACKAGE = ROOT / "infra/pipeline.yaml"


@pytest.fixture
def client(kfp):
    return KfpServer(kfp.url, delay_s=0.01, timeout_s=5, settle_s=0.01)


def test_a_run_is_submitted_with_the_pipeline_and_its_typed_arguments(kfp, client):
    arguments = {"profile": "smoke", "parts": "4", "gpu_node_selector": '{"a": "b"}'}
    run = kfp.runs[client.submit(PACKAGE, "first", arguments, service_account="univigu-steps")]
    assert run["service_account"] == "univigu-steps"
    assert run["display_name"] == "first"
    assert run["runtime_config"]["parameters"] == {"profile": "smoke", "parts": 4, "gpu_node_selector": {"a": "b"}}
    pipeline, platform = read_package(PACKAGE)
    assert run["pipeline_spec"] == {"pipeline_spec": pipeline, "platform_spec": platform}
    assert kfp.experiments[run["experiment_id"]]["display_name"] == EXPERIMENT


def test_a_name_is_submitted_once_while_its_run_lives_or_succeeded(kfp, client):
    kfp.states = ["RUNNING"]
    first = client.submit(PACKAGE, "same", {"profile": "smoke"})
    assert client.submit(PACKAGE, "same", {"profile": "smoke"}) == first
    kfp.runs[first]["state"] = "SUCCEEDED"
    assert client.submit(PACKAGE, "same", {"profile": "smoke"}) == first
    assert client.submit(PACKAGE, "other", {"profile": "smoke"}) != first
    assert client.submit(PACKAGE, "same", {"profile": "smoke"}, experiment="another") != first


def test_a_run_is_found_in_its_namespace_and_beyond_the_first_page(kfp):
    ours, theirs = (KfpServer(kfp.url, team, delay_s=0.01, timeout_s=5, settle_s=0.01) for team in ("ours", "theirs"))
    first = ours.submit(PACKAGE, "same", {})
    assert theirs.submit(PACKAGE, "same", {}) != first
    for _ in range(2 * kfp.page_size):
        kfp.runs[f"later-{len(kfp.runs)}"] = kfp.runs[first] | {"run_id": f"later-{len(kfp.runs)}", "state": "FAILED"}
    assert ours.submit(PACKAGE, "same", {}) == first


def test_other_runs_of_a_name_are_left_alone(kfp, client):
    kfp.states = ["RUNNING"]
    first = client.submit(PACKAGE, "weekly", {"profile": "smoke"})
    # as kfp's own command submits: whatever there is
    kfp.runs["theirs"] = kfp.runs[first] | {"run_id": "theirs", "runtime_config": {"parameters": {"profile": "tiny"}}}
    assert client.submit(PACKAGE, "weekly", {"profile": "tiny"}) == "theirs"
    assert client.submit(PACKAGE, "weekly", {"profile": "smoke"}) == first
    with pytest.raises(BadInputError, match="other arguments"):
        client.submit(PACKAGE, "weekly", {"profile": "wan-14b"})
    kfp.runs[first]["state"] = "SUCCEEDED"
    assert client.submit(PACKAGE, "weekly", {"profile": "smoke"}) == first
    assert [run["state"] for run in kfp.runs.values()] == ["SUCCEEDED", "RUNNING"]


@pytest.mark.parametrize("state", ["FAILED", "CANCELED"])
def test_a_run_that_did_not_succeed_can_be_submitted_again(kfp, client, state):
    first = client.submit(PACKAGE, "same", {})
    kfp.runs[first]["state"] = state
    assert client.submit(PACKAGE, "same", {}) != first


def test_a_run_being_cancelled_is_neither_reused_nor_submitted_again(kfp, client):
    kfp.states = ["CANCELING"]
    first = client.submit(PACKAGE, "same", {})
    with pytest.raises(TransientError, match=f"{first} of this name is being cancelled"):
        client.submit(PACKAGE, "same", {})
    assert client.state(first) == RunState("CANCELED", "")
    assert client.submit(PACKAGE, "same", {}) != first
    assert len(kfp.runs) == 2


def test_a_name_that_is_taken_by_other_arguments_is_refused(client):
    client.submit(PACKAGE, "same", {"profile": "smoke"})
    with pytest.raises(BadInputError, match=r"other arguments \(parts, profile\): run-1"):
        client.submit(PACKAGE, "same", {"profile": "tiny", "parts": 2})


def test_a_lost_response_submits_nothing_twice(kfp, client):
    kfp.lose_answers = 1
    assert client.submit(PACKAGE, "lost", {}) == "run-1"
    assert len(kfp.runs) == 1


@pytest.mark.parametrize("path", ["runs", "experiments"])
def test_of_two_concurrent_submissions_one_uses_the_run_of_the_other(kfp, path):
    kfp.states = ["RUNNING"]
    kfp.meet[f"/apis/v2beta1/{path}"] = threading.Barrier(2)

    def submit(_):
        return KfpServer(kfp.url, delay_s=0.01, timeout_s=20, settle_s=0.5).submit(PACKAGE, "same", {})

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(submit, range(2))
    assert first == second
    assert [run_id for run_id, run in kfp.runs.items() if run["state"] == "RUNNING"] == [first]
    assert len(kfp.experiments) == 1


def test_an_integer_is_accepted_for_a_float():
    typed = typed_arguments(PACKAGE, {"free_gib": "2"})
    assert (typed, type(typed["free_gib"])) == ({"free_gib": 2.0}, float)


def test_a_run_that_fails_at_once_is_not_submitted_a_second_time(kfp, client):
    kfp.states = ["FAILED"]
    assert client.submit(PACKAGE, "same", {}) == "run-1"
    assert len(kfp.runs) == 1


@pytest.mark.slow
def test_a_temporary_server_failure_is_retried(kfp, client):
    run_id = client.submit(PACKAGE, "a", {})
    kfp.failures = [503, 502, 429]
    assert client.state(run_id).state in ("PENDING", "RUNNING")
    kfp.failures = [500] * 4
    with pytest.raises(TransientError, match="status 500"):
        client.state(run_id)


def test_an_unreachable_server_is_reported_in_one_sentence():
    server = KfpServer("http://127.0.0.1:9", delay_s=0.01)
    with pytest.raises(TransientError, match=r"http://127.0.0.1:9 does not answer"):
        server.submit(PACKAGE, "a", {})


def test_a_state_says_what_failed(kfp, client):
    run_id = client.submit(PACKAGE, "a", {})
    kfp.runs[run_id]["state"] = "FAILED"
    kfp.task_details = [
        {"display_name": "caption-videos", "state": "FAILED", "error": {"message": "exit\nstatus 80"}},
        {"display_name": "curate-prompts", "state": "SUCCEEDED"},
    ]
    state = client.state(run_id)
    assert state == RunState("FAILED", "main: Error (exit code 80); caption-videos exit status 80")
    assert state.is_terminal


def test_an_unknown_run_and_a_denied_request_are_different_errors(kfp, client):
    with pytest.raises(MissingInputError, match="Run nowhere not found"):
        client.state("nowhere")
    for status in (401, 403, 302):
        kfp.failures = [status]
        with pytest.raises(ConfigError, match=f"denies access \\(status {status}\\); set KFP_TOKEN"):
            client.state("nowhere")
    kfp.failures = [400]
    with pytest.raises(BadInputError, match="rejects the request: upstream connect error"):
        client.state("nowhere")


def test_a_login_page_is_not_taken_for_an_empty_answer(kfp, client):
    kfp.page = b"<html>Sign in</html>"
    with pytest.raises(ConfigError, match="is not a Kubeflow Pipelines server"):
        client.submit(PACKAGE, "a", {})
    assert kfp.runs == {}


def test_tokens_are_read_for_each_call_and_never_printed(kfp, client, tmp_path, monkeypatch):
    run_id = client.submit(PACKAGE, "a", {})
    kfp.tokens.clear()
    monkeypatch.setenv("KFP_TOKEN", "from-the-environment")
    client.state(run_id)
    (tmp_path / "token").write_text("first\n")
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(tmp_path / "token"))
    client.state(run_id)
    (tmp_path / "token").write_text("second\n")
    client.state(run_id)
    assert kfp.tokens == ["Bearer from-the-environment", "Bearer first", "Bearer second"]
    kfp.failures = [401]
    with pytest.raises(ConfigError) as refused:
        client.state(run_id)
    assert "second" not in str(refused.value)
    (tmp_path / "token").unlink()
    with pytest.raises(ConfigError, match="KF_PIPELINES_SA_TOKEN_PATH names can't be read"):
        client.state(run_id)


@pytest.mark.parametrize("host", ["http://kfp.example.com", "http://10.0.0.1:8888", "http://127.0.0.1.example.com"])
def test_a_token_is_sent_over_plain_http_to_this_machine_only(host, monkeypatch):
    monkeypatch.setenv("KFP_TOKEN", "secret-token")
    with pytest.raises(ConfigError, match="A token would be readable on its way") as refused:
        KfpServer(host).state("run-1")
    assert "secret-token" not in str(refused.value)


def test_cancelling_ends_a_run_and_leaves_an_ended_one_alone(kfp, client):
    kfp.states = ["RUNNING"]
    run_id = client.submit(PACKAGE, "a", {})
    assert client.cancel(run_id).state == "CANCELED"
    kfp.runs[run_id]["state"] = "SUCCEEDED"
    assert client.cancel(run_id).state == "SUCCEEDED"


def test_a_run_that_failed_because_it_was_cancelled_is_cancelled(kfp, client):
    """As Kubeflow Pipelines 2.17 records it when the pods have ended."""
    run_id = client.submit(PACKAGE, "a", {})
    kfp.runs[run_id] |= {"state": "FAILED", "state_history": [{"state": "RUNNING"}, {"state": "FAILED"}]}
    assert client.state(run_id).state == "FAILED"
    kfp.runs[run_id]["state_history"].insert(1, {"state": "CANCELING"})
    assert client.state(run_id) == RunState("CANCELED", "")


def test_logs_are_those_of_the_pods_that_the_server_still_has(kfp, client):
    run_id = client.submit(PACKAGE, "a", {})
    kfp.task_details = [
        {"display_name": "curate-prompts", "pod_name": "pod-1", "child_tasks": [{"pod_name": "pod-2"}]},
        {"display_name": "caption-videos", "pod_name": "pod-3"},
    ]
    kfp.logs = {"pod-2": "curated\n", "pod-3": "captioned\n"}
    assert list(client.logs(run_id)) == [("curate-prompts", "curated\n"), ("caption-videos", "captioned\n")]
    assert list(client.logs(run_id, "caption-videos")) == [("caption-videos", "captioned\n")]


def test_an_address_with_a_password_is_refused_and_not_printed():
    with pytest.raises(ConfigError, match="contains a user name or password") as refusal:
        KfpServer("https://me:s3cret@kfp.example.com")
    assert "s3cret" not in str(refusal.value)


def test_the_address_comes_from_the_environment_and_is_validated(kfp, monkeypatch):
    with pytest.raises(ConfigError, match="use --host, or set KFP_ENDPOINT"):
        KfpServer()
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", kfp.url)
    assert KfpServer().host == kfp.url
    monkeypatch.setenv("KFP_ENDPOINT", "kfp.example.com/")
    assert KfpServer().host == "https://kfp.example.com"
    with pytest.raises(ConfigError, match="is not a server address"):
        KfpServer("file:///etc/passwd")


def test_arguments_are_checked_against_the_pipeline():
    assert typed_arguments(PACKAGE, {"profile": "001", "parts": "2", "free_gib": 3}) == {
        "profile": "001",
        "parts": 2,
        "free_gib": 3,
    }
    for name, value, message in (
        ("prats", "2", "no parameter 'prats'; it has accelerator, "),
        ("parts", "two", "must be JSON of type NUMBER_INTEGER, not 'two'"),
        ("parts", "true", "NUMBER_INTEGER"),
        ("parts", "1.5", "NUMBER_INTEGER"),
        ("gpu_node_selector", "[]", "STRUCT"),
    ):
        with pytest.raises(ConfigError, match=message):
            typed_arguments(PACKAGE, {name: value})


def test_a_default_name_is_the_same_for_the_same_run_only(tmp_path):
    name = default_run_name(PACKAGE, {"parts": "2"})
    assert name == default_run_name(PACKAGE, {"parts": 2})
    assert name.startswith("uni-vigu-")
    assert name != default_run_name(PACKAGE, {"parts": 3})
    other = tmp_path / "pipeline.yaml"
    other.write_text(PACKAGE.read_text() + "\n# changed\n")
    assert name != default_run_name(other, {"parts": 2})


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (None, MissingInputError, "run `univigu pipeline compile` first"),
        ("a: [", BadInputError, "is not valid YAML"),
        ("a: 1", BadInputError, "is not a compiled pipeline"),
        ("", BadInputError, "is not a compiled pipeline"),
    ],
)
def test_a_file_that_is_not_a_compiled_pipeline_is_refused(tmp_path, text, error, message):
    path = tmp_path / "pipeline.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(error, match=message):
        read_package(path)


# --- the commands ----------------------------------------------------------------------------------------------------


def call(*command, env=None):
    program = Path(sys.executable).parent / command[0]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}/model:{ROOT}", **(env or {})}
    return subprocess.run(
        [program, *map(str, command[1:])], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )


def univigu(*command, **options):
    return call("python", "-m", "components.cli.main", "pipeline", *command, **options)


@pytest.mark.slow
def test_waiting_ends_with_the_exit_code_of_the_runs_end(kfp):
    arguments = ("submit", "profile=smoke", "--host", kfp.url, "--wait", "--poll", 0.05)
    done = univigu(*arguments)
    assert (done.returncode, done.stdout.split()) == (0, ["run-1", "PENDING", "RUNNING", "SUCCEEDED"]), done.stderr
    assert univigu(*arguments).stdout.split() == ["run-1", "SUCCEEDED"]  # not submitted twice
    for state, code, message in (("FAILED", 83, "exit code 80"), ("CANCELED", 84, "was cancelled")):
        kfp.states = ["RUNNING", state]
        done = univigu(*arguments, "--name", state)
        assert (done.returncode, done.stdout.split()[1:]) == (code, ["RUNNING", state])
        assert re.fullmatch(r"univigu: [^\n]+[.]\n", done.stderr)
        assert message in done.stderr


@pytest.mark.slow
def test_interrupting_a_wait_prints_how_to_continue(kfp):
    kfp.states = ["RUNNING"]
    command = [sys.executable, "-m", "components.cli.main", "pipeline", "submit", "--wait", "--host", kfp.url]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as waiting:
        assert [waiting.stdout.readline() for _ in range(2)] == ["run-1\n", "RUNNING\n"]
        waiting.send_signal(signal.SIGINT)
        assert waiting.stderr.read() == "univigu: stopped; run the same command again to resume.\n"
    assert waiting.returncode == 130


@pytest.mark.slow
def test_status_cancel_and_logs_are_about_the_run_that_was_submitted(kfp):
    kfp.states, at = ["RUNNING"], ("--host", kfp.url)
    assert univigu("submit", "train_backend=pod", *at).stdout == "run-1\n"
    done = univigu("status", "run-1", env={"KFP_ENDPOINT": kfp.url})
    assert (done.returncode, done.stdout) == (0, "RUNNING\n")
    done = univigu("logs", "run-1", *at)
    assert done.returncode == 70
    assert "kubectl logs -l pipeline/runid=run-1" in done.stderr
    kfp.task_details, kfp.logs = [{"display_name": "notify", "pod_name": "pod"}], {"pod": "one\ntwo\n"}
    assert univigu("logs", "run-1", *at).stdout == "notify | one\nnotify | two\n"
    done = univigu("cancel", "run-1", *at)
    assert (done.stdout, done.stderr) == ("CANCELED\n", "")
    assert univigu("status", "run-1", *at).returncode == 84


@pytest.mark.slow
def test_cancelling_a_run_with_a_trainjob_prints_how_to_check_that_it_ended(kfp):
    kfp.states = ["RUNNING"]
    univigu("submit", "--host", kfp.url)  # trains as a TrainJob
    done = univigu("cancel", "run-1", "--host", kfp.url, "--namespace", "team")
    assert done.stdout == "CANCELED\n"
    assert "kubectl delete trainjob --namespace team --selector univigu/run-id=run-1\n" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        (("submit", "--host", "http://127.0.0.1:9", "prats=2"), 78, "no parameter 'prats'"),
        (("submit", "--host", "http://127.0.0.1:9", "parts"), 78, "write KEY=VALUE"),
        (("submit", "--package", "none.yaml"), 66, "no compiled pipeline at none.yaml"),
        (("status", "run-9"), 78, "No Kubeflow Pipelines server is given"),
        (("run",), 78, "univigu pipeline run --local"),
        (("run", "--local", "image=x"), 78, "does not support the parameter image"),
        (("run", "--local", "prats=2"), 78, "no parameter 'prats'"),
        (("compile", "-o", "none/pipeline.yaml"), 65, "can't be written"),
    ],
)
def test_wrong_commands_are_refused_in_one_sentence_and_submit_nothing(kfp, command, code, message):
    done = univigu(*command)
    assert (done.returncode, done.stdout) == (code, "")
    assert re.fullmatch(r"univigu: [^\n]+[.]\n", done.stderr), done.stderr
    assert message in done.stderr


def test_kfps_own_command_accepts_the_committed_file(kfp, tmp_path):
    done = call(
        *("kfp", "--endpoint", kfp.url, "run", "create", "-e", "uni-vigu", "-r", "by-hand"),
        *("-f", PACKAGE, "profile=smoke", "parts=2", 'gpus="1"'),
        env={"HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    (run,) = kfp.runs.values()
    assert run["runtime_config"]["parameters"] == {"profile": "smoke", "parts": 2, "gpus": "1"}
    assert run["pipeline_spec"]["pipeline_spec"]["pipelineInfo"]["name"] == "uni-vigu"
    assert "kubernetes" in run["pipeline_spec"]["platform_spec"]["platforms"]
    committed = yaml.safe_load_all(PACKAGE.read_text())
    assert run["pipeline_spec"]["pipeline_spec"]["deploymentSpec"] == next(committed)["deploymentSpec"]
