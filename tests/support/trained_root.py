"""A work root in which every step before register-model is finished, for the tests of the registry."""

import json
import shutil

from components.evaluation.evaluate_model import summarise_rows
from components.pipeline.manifests import describe_files, files_digest, write_manifest
from components.pipeline.runner import run_stage
from components.pipeline.stages import find_stage
from components.pipeline.tables import write_table
from components.tracking import tracking_uri
from components.training.tracked_run import start_run
from components.training.train_stage import model_digest
from univigu import registry

TASKS = ("captions", "captions_without_video", "majority", "generation", "generation_base", "recogniser")
HELDOUT = range(20)


def commit(root, step, inputs):
    """Write the manifest of a step's folder, made from the digests of earlier steps or sources."""
    home = root / find_stage(step).home
    files = describe_files(home)
    manifest = {
        "step": step,
        "digest": files_digest(files),
        "inputs": inputs,
        "parameters": {"seed": 0, step.replace("-", "_"): {"size": 4, "tasks": {"joint": 0.5}}},
        "files": files,
    }
    return write_manifest(home, manifest)["digest"]


class TrainedRoot:
    """The work root, with methods to change it."""

    def __init__(self, root, model):
        self.root = root
        self.digests = {"base": "b" * 64, "pairs": "c" * 64}
        shutil.copytree(model, root / "data/stage2/model")
        prompts, latents = root / "data/curated", root / "data/latents"
        prompts.mkdir(parents=True)
        latents.mkdir(parents=True)
        row = {"id": "p0", "text": "a red seven", "source": "hand|written", "licence": "CC0-1.0", "language": "en"}
        write_table(prompts, "prompts", [row, {**row, "id": "p1"}])
        row = {"id": "c0", "stage": 2, "split": "train", "frames": 9, "height": 32, "width": 32}
        write_table(latents, "latents", [row])
        self.digests["prompts"] = commit(root, "curate-prompts", {"raw": "a" * 64, "base": self.digests["base"]})
        inputs = {"clips": "d" * 64, "pairs": self.digests["pairs"], "base": self.digests["base"]}
        self.digests["latents"] = commit(root, "encode-latents", inputs)
        self.train("first")

    def train(self, weights):
        """Another model: `weights` is a word that its bytes depend on."""
        (self.root / "data/stage1/model").mkdir(parents=True, exist_ok=True)
        (self.root / "data/stage1/model/trained.txt").write_text(f"stage 1 of {weights}")
        inputs = {"latents": self.digests["latents"], "base": self.digests["base"]}
        self.digests["stage1"] = commit(self.root, "train-stage-1", inputs)
        (self.root / "data/stage2/model/tokenizer/trained.txt").write_text(weights)
        inputs = {"latents": self.digests["latents"], "model": self.digests["stage1"]}
        self.digests["stage2"] = commit(self.root, "train-stage-2", inputs)
        self.evaluate(10)

    def evaluate(self, right, items=HELDOUT, compared_steps=()):
        """An evaluation in which the first `right` of the items are captioned rightly, on each attribute."""
        compared = [f"captions_in_{steps}_steps" for steps in compared_steps]
        home = self.root / "reports"
        home.mkdir(exist_ok=True)
        rows = [
            {
                "task": task,
                "clip_id": f"heldout-{item:03d}",
                "truth": "{}",
                "correct": json.dumps({"colour": item < right, "digit": item < right // 2}),
                "open_attributes": ["colour"] if task.startswith("joint") else [],
            }
            for task in (*TASKS, *compared, "joint", "joint_shuffled")
            for item in items
        ]
        write_table(home, "items", rows)
        (home / "scores.json").write_text(json.dumps(summarise_rows(rows, seed=0)))
        self.commit_evaluation()

    def commit_evaluation(self):
        """Write the manifest of what is in the evaluation's folder."""
        names = ("prompts", "pairs", "stage2", "base")
        commit(self.root, "evaluate-model", {name: self.digests[name] for name in names})

    def register(self, name, metric="captions.mean", promotion="automatic", least=None):
        settings = {"name": name, "champion_metric": metric, "least_scores": least or {}, "promotion": promotion}
        run_stage("register-model", {"register_model": settings}, self.root)
        return json.loads((self.root / "data/registered/registration.json").read_text())

    def track(self, number, digest=None):
        """A finished training run on this dataset; returns its id."""
        stage = f"train-stage-{number}"
        tags = {"univigu.stage": stage, "univigu.dataset_digest": self.digests["latents"]}
        with start_run(self.root, stage, parameters={}, tags=tags, datasets={}) as run:
            run.set_tags({"univigu.model_digest": digest or model_digest(self.root / f"data/stage{number}")})
        return run.run_id

    def version(self, name, alias):
        found = registry.version_at(name, alias, tracking_uri(self.root))
        return found and int(found.version)
