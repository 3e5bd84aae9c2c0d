"""A registry that version 0.1 has left: commands and comparisons work, or say what to do."""

import sqlite3
from contextlib import closing

import pytest

from components.registry import ledger, promotion
from components.registry.evaluations import read_evaluation
from components.registry.export import pull_version
from components.tracking import tracking_uri
from univigu import registry
from univigu.errors import BadInputError, MissingInputError

NEWER_TAGS = ("univigu.files_digest", "univigu.least_scores")
NEWER_PARAMETERS = ("files", "number", "previous", "when", "digest")  # of a line of the ledger


def make_old(root):
    """Give what is registered the form that version 0.1 gave it."""
    with closing(sqlite3.connect(root / "mlflow.db")) as database, database:
        for table in ("model_version_tags", "tags"):
            database.executemany(f"DELETE FROM {table} WHERE key = ?", [(name,) for name in NEWER_TAGS])
        database.executemany(
            "DELETE FROM params WHERE key = ? AND run_uuid IN (SELECT run_uuid FROM runs JOIN experiments USING "
            "(experiment_id) WHERE experiments.name LIKE '%/promotions')",
            [(name,) for name in NEWER_PARAMETERS],
        )
        for table in ("experiment_tags", "registered_model_tags"):  # the kind of experiment, the head of the ledger
            database.execute(f"DELETE FROM {table}")
    for folder in (root / "mlruns/models").glob("*/artifacts/artifacts"):
        (folder / "evaluation/scores.json").rename(folder / "evaluation/metrics.json")
        (folder / "lineage/lineage.json").unlink()


@pytest.mark.slow
def test_a_registry_of_version_0_1_is_listed_compared_promoted_and_rolled_back(world, tmp_path):
    name = "of-0.1"
    world.register(name)
    make_old(world.root)
    root, store = world.root, tracking_uri(world.root)

    assert [one.aliases for one in registry.versions(name, store)] == [["candidate", "champion"]]
    assert [line.outcome for line in promotion.history(name, root=root)] == ["promoted"]
    found = ledger.verify_ledger(name, root)
    assert (found.lines, found.older, found.faults) == (0, 1, [])
    with pytest.raises(BadInputError, match=r"by an earlier release, which recorded no digest .* give --unverified"):
        pull_version(name, "champion", tmp_path / "pulled", root)
    assert read_evaluation(registry.artifact(f"models:/{name}/1", "evaluation", store)).scores
    assert registry.pipeline_folder(name, store).is_dir()

    world.train("second")
    world.evaluate(20)
    assert "better by" in world.register(name)["decision"]
    assert world.version(name, "champion") == 2
    promotion.rollback(name, "it was good", root=root)
    assert (world.version(name, "champion"), world.version(name, "previous")) == (1, 2)
    assert not ledger.verify_ledger(name, root).faults

    # an evaluation that version 0.1 made, without scores.json
    world.train("third")
    (root / "reports/scores.json").rename(root / "reports/metrics.json")
    world.commit_evaluation()
    with pytest.raises(MissingInputError, match="Run `univigu run evaluate-model` again, and then"):
        world.register(name)
