"""What `univigu.registry` fetches from a server, whose files aren't on this machine."""

import mlflow
import pytest

from univigu import registry
from univigu.confidence_reference import read_reference, write_reference


@pytest.mark.slow
def test_a_fetched_model_comes_with_the_measures_of_its_evaluation_where_its_version_has_them(mlflow_server, tmp_path):
    (tmp_path / "artifacts/pipeline").mkdir(parents=True)
    (tmp_path / "artifacts/pipeline/model_index.json").write_text("{}")
    (tmp_path / "artifacts/evaluation").mkdir()
    (tmp_path / "artifacts/evaluation/scores.json").write_text("{}")
    with registry.opened(mlflow_server.url):
        client = mlflow.MlflowClient()
        client.create_registered_model("fetched")
        experiment = client.create_experiment("fetched")
        for version in (1, 2):
            run = client.create_run(experiment)
            if version == 2:
                written = write_reference(tmp_path / "artifacts/evaluation", [{"fidelity": 30.0}, {"fidelity": 31.0}])
            client.log_artifacts(run.info.run_id, str(tmp_path))
            client.create_model_version("fetched", run.info.artifact_uri, run.info.run_id)
    older, newer = (registry.pipeline_folder(f"models:/fetched/{number}", mlflow_server.url) for number in (1, 2))
    for folder in (older, newer):
        assert not folder.is_relative_to(tmp_path)
        assert [file.name for file in folder.iterdir()] == ["model_index.json"]
    assert read_reference(older) is None
    assert read_reference(newer) == written
    assert {file.name for file in newer.with_name("evaluation").iterdir()} == {"confidence.json"}
