"""Where runs and registered models are kept: MLflow's store below the work root, unless MLFLOW_TRACKING_URI names one."""

import logging
import os
from pathlib import Path

EXPERIMENT = "uni-vigu"


def tracking_uri(root: Path) -> str:
    """MLFLOW_TRACKING_URI if it is set, else ``mlflow.db`` in the work root, which `mlflow ui` finds there too."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root.resolve() / 'mlflow.db'}"


def open_tracking(root: Path, experiment: str = EXPERIMENT) -> str:
    """Point MLflow at the store of the work root, and return the id of `experiment`, which is made if need be.

    MLflow calls nobody and unpickles nothing from here on. In a store below the root, artifacts lie in ``mlruns``.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    import mlflow

    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    uri = tracking_uri(root)
    mlflow.set_tracking_uri(uri)
    client = mlflow.MlflowClient()
    found = client.get_experiment_by_name(experiment)
    if found is not None:
        return found.experiment_id
    local = uri.startswith("sqlite:")
    return client.create_experiment(
        experiment, artifact_location=(root.resolve() / "mlruns").as_uri() if local else None
    )
