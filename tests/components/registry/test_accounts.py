"""MLflow's accounts, on a real server with its own app for them: what a job's account may do, and what it may not."""

import io
import os
import runpy
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from components.orchestration import kfp_tasks
from components.orchestration.prerequisites import check_tracking
from components.registry import chain, promotion
from components.tracking import EXPERIMENT
from univigu import registry
from univigu.errors import BadInputError

pytestmark = pytest.mark.filterwarnings("ignore:starlette.middleware.wsgi")  # imported by MLflow

SCRIPT = Path(__file__).parents[3] / "infra/kustomize/accounts/accounts.py"
LEDGER = f"{registry.NAME}/promotions"  # the experiment of its decisions
ACCOUNTS = {
    "runs.steps": "first step of many",
    "registry.promotion": "promotes a champion",
    "read.viewer": "only looks at it",
}


def set_accounts(server, folder, accounts=ACCOUNTS):
    """Run the job's script on a folder with these accounts; returns the lines that it prints."""
    folder.mkdir()
    for name, password in accounts.items():
        (folder / name).write_text(f"{password}\n")
    with account(server, "admin", server.password), redirect_stdout(io.StringIO()) as said:
        runpy.run_path(str(SCRIPT))["main"](folder)
    return said.getvalue().splitlines()


@contextmanager
def account(server, name, password=""):
    """Within the block, this process is a client of the server with this account."""
    password = password or next(ACCOUNTS[key] for key in ACCOUNTS if key.endswith(f".{name}"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", server.url)
        patch.setenv("MLFLOW_TRACKING_USERNAME", name)
        patch.setenv("MLFLOW_TRACKING_PASSWORD", password)
        before = mlflow.get_tracking_uri()
        mlflow.set_tracking_uri(server.url)
        yield MlflowClient()
        mlflow.set_tracking_uri(before)


@pytest.fixture(scope="module")
def server(mlflow_server_with_accounts, tmp_path_factory):
    said = set_accounts(mlflow_server_with_accounts, tmp_path_factory.mktemp("accounts") / "first")
    assert said == ["viewer: read", "promotion: registry", "steps: runs"]
    return mlflow_server_with_accounts


@pytest.fixture(scope="module")
def registered(server, world):
    """The server with a champion: version 1, registered and promoted by the task of a Kubeflow pipeline."""
    world.evaluate(16)
    with account(server, "steps"), pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNIVIGU_REGISTRY_USERNAME", "promotion")
        patch.setenv("UNIVIGU_REGISTRY_PASSWORD", ACCOUNTS["registry.promotion"])
        step = "register-model"
        kfp_tasks.run_step(step, "tiny", str(world.root), "key", kfp_tasks.declaration(step))
    return server


def denied(call, *arguments, **options):
    with pytest.raises(MlflowException) as raised:
        call(*arguments, **options)
    assert raised.value.error_code == "PERMISSION_DENIED", raised.value


@pytest.mark.slow
def test_steps_write_runs_and_neither_versions_nor_aliases_nor_the_ledger(registered, world, tmp_path):
    (tmp_path / "sample.txt").write_text("a red seven")
    with account(registered, "steps") as client:
        run = world.track(1)
        client.log_artifact(run, str(tmp_path / "sample.txt"))
        assert client.get_run(run).info.status == "FINISHED"
        decisions = client.get_experiment_by_name(LEDGER).experiment_id
        (line,) = client.search_runs([decisions])
        for call, arguments in (
            (client.create_model_version, (registry.NAME, "mlflow-artifacts:/any", run)),
            (client.set_registered_model_alias, (registry.NAME, registry.CHAMPION, "1")),
            (client.delete_registered_model_alias, (registry.NAME, registry.CHAMPION)),
            (client.set_registered_model_tag, (registry.NAME, chain.HEAD_TAG, "0")),
            (client.set_model_version_tag, (registry.NAME, "1", "files", "0")),
            (client.delete_model_version, (registry.NAME, "1")),
            (client.delete_registered_model, (registry.NAME,)),
            (client.create_run, (decisions,)),
            (client.set_tag, (line.info.run_id, "why", "because")),
            (client.delete_run, (line.info.run_id,)),
            (client.delete_experiment, (decisions,)),
        ):
            denied(call, *arguments)
        with pytest.raises(BadInputError, match="doesn't allow this to the account"):
            promotion.promote(registry.NAME, 1, "by a step", force=True, root=world.root)


@pytest.mark.slow
def test_the_registrys_account_registers_promotes_and_rolls_back(registered, world):
    with account(registered, "promotion"):
        world.train("second")
        world.evaluate(20)
        assert world.register(registry.NAME)["version"] == 2
        assert world.version(registry.NAME, registry.CHAMPION) == 2
        promotion.rollback(registry.NAME, "it repeats itself", root=world.root)
        assert world.version(registry.NAME, registry.CHAMPION) == 1
        actions = [line.action for line in promotion.history(registry.NAME, root=world.root)]
        assert actions == ["rollback", "promote", "promote"]


@pytest.mark.slow
def test_without_a_login_nothing_is_answered_and_readers_change_nothing(registered, world, tmp_path):
    with account(registered, "viewer") as client:
        version = client.get_model_version_by_alias(registry.NAME, registry.CHAMPION)
        registry.download(f"models:/{registry.NAME}/{version.version}", tmp_path, registered.url)
        assert (tmp_path / "MLmodel").is_file()
        runs = client.get_experiment_by_name(EXPERIMENT).experiment_id
        denied(client.create_run, runs)
        denied(client.set_registered_model_alias, registry.NAME, registry.PREVIOUS, version.version)
    for name, password in (("viewer", "not the password"), ("nobody", "any password")):
        with account(registered, name, password), pytest.raises(BadInputError, match="refused the login"):
            registry.find_version(registry.NAME, registry.CHAMPION, registered.url)


@pytest.mark.slow
def test_a_wrong_password_of_the_registrys_account_is_found_by_a_pipelines_first_task(server, world):
    with account(server, "steps"), pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNIVIGU_REGISTRY_USERNAME", "promotion")
        patch.setenv("UNIVIGU_REGISTRY_PASSWORD", ACCOUNTS["registry.promotion"])
        check_tracking(world.root)
        patch.setenv("UNIVIGU_REGISTRY_PASSWORD", "not the password")
        with pytest.raises(BadInputError, match="refused the login"):
            check_tracking(world.root)
        assert os.environ["MLFLOW_TRACKING_USERNAME"] == "steps"


@pytest.mark.slow
def test_accounts_follow_their_folder(server, tmp_path):
    changed = {**ACCOUNTS, "registry.ada": "the first of all"}
    said = set_accounts(server, tmp_path / "more", changed)
    assert said == ["viewer: read", "ada: registry", "promotion: registry", "steps: runs"]
    del changed["registry.ada"]
    changed["read.ada"] = "another password"
    set_accounts(server, tmp_path / "less", changed)
    with account(server, "ada", "another password") as client:
        runs = client.get_experiment_by_name(EXPERIMENT).experiment_id
        denied(client.create_run, runs)
    with account(server, "ada", "the first of all") as client, pytest.raises(MlflowException):
        client.get_experiment(runs)
    said = set_accounts(server, tmp_path / "as-before")
    assert said == ["viewer: read", "promotion: registry", "steps: runs", "ada: removed"]
    with account(server, "ada", "another password") as client, pytest.raises(MlflowException):
        client.get_experiment(runs)


@pytest.mark.parametrize(
    ("accounts", "words"),
    [
        ({}, "has no file"),
        ({"king.ada": "the first of all"}, "king.ada must be called ROLE.NAME; the roles are read, runs, registry."),
        ({"read.ada": ""}, "read.ada is empty"),
        ({"read.ada": "the first of all", "runs.ada": "the first of all"}, "ada is there twice"),
        ({"runs.admin": "the first of all"}, "admin is there twice"),
    ],
)
@pytest.mark.slow
def test_a_wrong_folder_changes_nothing_and_is_one_sentence(server, tmp_path, accounts, words):
    with pytest.raises(SystemExit) as raised:
        set_accounts(server, tmp_path / "wrong", accounts)
    assert raised.value.code.startswith("accounts: ")
    assert words in raised.value.code
