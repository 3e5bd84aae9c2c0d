"""An older Kubeflow Pipelines server: what it lacks is said, and a run that it would place wrongly is not submitted."""

from pathlib import Path

import pytest

from components.orchestration.kfp_server import KfpServer
from univigu.errors import ConfigError

PACKAGE = Path(__file__).parents[3] / "infra/pipeline.yaml"


@pytest.fixture
def client(kfp):
    return KfpServer(kfp.url, timeout_s=5)


@pytest.mark.parametrize(
    ("version", "lacks"),
    [
        ("2.14.3", "retries no failed task and starts steps without a user, which Pod Security restricted refuses"),
        ("2.15.0", "starts steps without a user, which Pod Security restricted refuses"),
        ("2.16.1", ""),
        ("2.17.0", ""),
        ("3.0.0", ""),
        ("unknown", ""),  # a build of one's own
    ],
)
def test_an_older_kfp_gets_the_run_with_a_sentence_about_what_it_lacks(kfp, client, capsys, version, lacks):
    kfp.version = version
    assert client.submit(PACKAGE, "old", {}) == "run-1"
    about = f"The server at {kfp.url} has Kubeflow Pipelines {version}, which {lacks}; upgrade it to 2.17"
    assert capsys.readouterr().err == (f"{about} (docs/operate.md).\n" if lacks else "")


def test_a_kfp_that_would_ignore_the_node_pools_gets_no_run(kfp, client):
    kfp.version = "2.4.1"
    with pytest.raises(ConfigError, match=r"2\.4\.1, which would ignore the node pools and tolerations of the steps"):
        client.submit(PACKAGE, "old", {})
    assert (kfp.runs, kfp.experiments) == ({}, {})
