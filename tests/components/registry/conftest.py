import pytest

from trained_root import TrainedRoot


@pytest.fixture(scope="module")
def world(tmp_path_factory, speaking_model):
    """A work root in which every step before register-model is finished."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield TrainedRoot(tmp_path_factory.mktemp("root"), speaking_model)
