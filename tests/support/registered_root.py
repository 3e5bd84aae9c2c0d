"""A work root whose registry holds one version of a model."""

import pytest

from components.tracking import open_tracking
from univigu import registration


def register(root, model, name, card="# A card\n"):
    """Register the model's folder in the work root's own registry; returns the version."""
    nothing = {"evidence": {}, "tags": {}, "parameters": {}, "metrics": {}}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        experiment = open_tracking(root)
        with registration.uploaded(model, name, experiment_id=experiment, card=card, **nothing) as upload:
            return registration.create_version(upload, name, card, {})
