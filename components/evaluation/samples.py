"""Samples of the model and its base for the held-out items, in batches that are kept and reused.

Of a generated clip, only the benchmark's reading and, for the first few, a small preview are kept, so clips may have
any size. Each finished batch is kept under the work root: a killed run resumes with the next one, and if only scores or
the page change, nothing is sampled again.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from components.clips.generator import Sampling, for_a_thread, generate, load_generator
from components.evaluation import scorers as scorer_modules
from components.evaluation.report import Preview, preview
from components.pipeline.digests import tree_digest
from components.pipeline.manifests import inside
from components.pipeline.shard_records import read_record, write_record
from univigu.attention import set_attention_backend
from univigu.compiling import compile_blocks
from univigu.errors import ConfigError
from univigu.files import file_sha256, sync
from univigu.threads import in_parts, map_on_cores

if TYPE_CHECKING:
    import numpy as np

    from components.pipeline.step import Step
    from univigu.pipeline import UniViGUPipeline

PAGE_SAMPLES = {"captions": 12, "generation": 9, "joint": 9}
BASE_TASK = "generation_base"
SCORED_BY_MODELS = ("generation", BASE_TASK)
TASKS = {"captions": "captions", "generation": "generations", BASE_TASK: "generations", "joint": "joint"}
CALIBRATION = 128  # clips, with their captions, that tell how sure of itself the model is on held-out ones
UNREAD = "drawn-"  # prefix of the folders with the base's clips, which are kept until they are read

Item = Mapping[str, Any]
Size = tuple[int, int, int]  # frames, height, width
Batch = dict[str, list[Any]]  # the samples of some items: `texts`, `seen`, `previews` ...


def sample_everything(
    step: "Step", benchmark: ModuleType, chosen: Mapping[str, Sequence[Item]]
) -> tuple[dict[str, Batch], Mapping[str, Any]]:
    """The samples of the model and the base for the held-out items, by task, and the model's sampling settings.

    For each task: ``texts``; ``seen``, the benchmark's reading of the clips; ``previews`` of the first clips. The model
    samples with its own defaults. The base runs first, because each of the two models may fill a GPU.
    """
    from univigu import wan

    size = step.settings.evaluate_model.batch_size
    batches = {
        kind: [items[start : start + size] for start in range(0, len(items), size)] for kind, items in chosen.items()
    }
    sampler = Sampler(step, benchmark)
    sampler.sample_base(batches[TASKS[BASE_TASK]])
    work = [(task, number, items) for task, kind in TASKS.items() for number, items in enumerate(batches[kind])]
    made: dict[str, Batch] = {}
    for task, number, items in step.progress(work, unit="batches"):
        whole = made.setdefault(task, {})
        wanted = PAGE_SAMPLES.get(task, PAGE_SAMPLES["generation"]) - len(whole.get("previews", ()))
        for name, values in sampler.batch(task, number, items, max(wanted, 0)).items():
            whole.setdefault(name, []).extend(values)
    for other in sampler.kept.parent.iterdir():  # of other settings or code; this one's is complete now
        if other != sampler.kept:
            shutil.rmtree(other)
    for name, scorer in sampler.scorers.items():
        prompts = [item["prompt"] for item in chosen["generations"]]
        for task in SCORED_BY_MODELS:
            videos = made[task].pop(f"scored by {name}")
            made[task][f"nearest by {name}"] = scorer.nearest(videos, prompts)
    return made, wan.read_json(step.inputs["stage2"] / "model" / "model_index.json")


class Sampler:
    """Samples batches, or loads the ones that are kept. Each model is loaded when the first batch needs it."""

    def __init__(self, step: "Step", benchmark: ModuleType) -> None:
        self.step, self.benchmark, self.settings = step, benchmark, step.settings.evaluate_model
        self.scorers = load_scorers(self.settings.scorers, step)
        entry = f"{__name__}:{sample_everything.__name__}"
        self.kept = step.kept_folder(entry, step.facts.get("scorers", {}))

    @cached_property
    def pipeline(self) -> "UniViGUPipeline":
        import torch

        from univigu.pipeline import UniViGUPipeline

        precision = _precision(self.settings.precision)
        pipeline = UniViGUPipeline.from_pretrained(self.step.inputs["stage2"] / "model", **precision)
        pipeline.set_progress_bar_config(disable=True)
        set_attention_backend(pipeline.transformer, self.settings.attention_backend)
        if self.settings.compile == "blocks":
            compile_blocks(pipeline.transformer)
        return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")

    def sample_base(self, batches: Sequence[Sequence[Item]]) -> None:
        """Generate the base's clips, except for batches that are kept, read or not."""
        base = None
        for number, items in enumerate(self.step.progress(batches, unit="batches of the base")):
            if load_batch(self.kept / f"{UNREAD}{number}") or load_batch(self.kept / f"{BASE_TASK}-{number}"):
                continue
            base = base or load_generator(
                self.step.inputs["base"],
                self.settings.precision,
                attention_backend=self.settings.attention_backend,
                compiled=self.settings.compile == "blocks",
            )
            frames = generate_with_base(base, items, self.step)["frames"]
            save_batch(self.kept / f"{UNREAD}{number}", {"frames": list(frames)})

    def batch(self, task: str, number: int, items: Sequence[Item], previews: int) -> Batch:
        """A batch, kept or sampled now. previews: the number of clips to keep a preview of."""
        place = self.kept / f"{task}-{number}"
        part = load_batch(place)
        if part is None:
            part = self.sample(task, number, items, previews)
            save_batch(place, part)
        if task == BASE_TASK:  # also the clips of a run that ended between these two
            shutil.rmtree(self.kept / f"{UNREAD}{number}", ignore_errors=True)
        return part

    def sample(self, task: str, number: int, items: Sequence[Item], previews: int) -> Batch:
        import numpy as np

        video = self.step.settings.video
        size = (video.frames, video.height, video.width)
        compared, clips = self.settings.compared_caption_steps, self.step.inputs["clips"]
        measured = number * self.settings.batch_size < CALIBRATION
        ways = {
            "captions": lambda pipe, part: caption_clips(
                pipe, self.benchmark.render(part, clips), part, compared, measured
            ),
            "generation": lambda pipe, part: generate_clips(pipe, part, size),
            "joint": lambda pipe, part: sample_jointly(pipe, part, size),
        }
        if task in ways:
            made = sample_in_parts(self.pipeline, ways[task], items)
        else:
            made = load_batch(self.kept / f"{UNREAD}{number}") or {}
        frames = np.stack(made.pop("frames"))
        made["seen"] = self.benchmark.reader(self.pipeline)(frames, made["texts"] if task == "captions" else None)
        made["previews"] = [preview(clip, video.fps) for clip in frames[:previews]]
        if task in SCORED_BY_MODELS:
            made |= {f"scored by {name}": list(scorer.videos(frames)) for name, scorer in self.scorers.items()}
        return made


# --- kept batches ----------------------------------------------------------------------------------------------------


def save_batch(folder: Path, part: Batch) -> None:
    """Save a batch: arrays as safetensors, the rest in a record with a digest of both."""
    import numpy as np
    from safetensors.numpy import save_file

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    arrays, texts = {}, {}
    for name, values in part.items():
        if name == "previews":
            texts[name] = [shown.fps for shown in values]
            values = [shown.frames for shown in values]
        if name == "previews" or (values and isinstance(values[0], np.ndarray)):
            arrays |= {f"{name}/{index:05d}": np.ascontiguousarray(value) for index, value in enumerate(values)}
        else:
            texts[name] = values
    save_file(arrays, folder / "arrays.safetensors")
    sync(folder / "arrays.safetensors")
    digest = file_sha256(folder / "arrays.safetensors")
    names = {name.partition("/")[0]: None for name in arrays}
    write_record(folder / "part.json", {"texts": texts, "arrays": list(names), "sha256": digest})


def load_batch(folder: Path) -> Batch | None:
    """A kept batch; None if it is missing or damaged."""
    from safetensors.numpy import load_file

    record, path = read_record(folder / "part.json"), folder / "arrays.safetensors"
    if not record or not path.is_file() or file_sha256(path) != record["sha256"]:
        return None
    arrays, part = load_file(path), dict(record["texts"])
    for name in record["arrays"]:
        part[name] = [arrays[key] for key in sorted(arrays) if key.startswith(f"{name}/")]
    if "previews" in part:
        rates = record["texts"]["previews"]
        part["previews"] = [Preview(*shown) for shown in zip(part["previews"], rates, strict=True)]
    return part


# --- models and sampling ---------------------------------------------------------------------------------------------


def _precision(name: str) -> dict[str, Any]:
    """Arguments for diffusers' loader; with ``bf16``, the autoencoder stays in fp32, as in training."""
    import torch

    if name not in ("fp32", "bf16"):
        raise ConfigError(f"There is no precision '{name}'; choose fp32 or bf16.")
    kinds = {"transformer": torch.bfloat16, "text_encoder": torch.bfloat16, "default": torch.float32}
    return {} if name == "fp32" else {"dtype": kinds}


def load_scorers(folders: Mapping[str, str], step: "Step") -> dict[str, Any]:
    """The profile's scorers, each from its model's folder; the folders' digests become facts of the step."""
    from pkgutil import iter_modules

    known = {module.name for module in iter_modules(scorer_modules.__path__)}
    scorers = {}
    for name, folder in folders.items():
        if name not in known:
            raise ConfigError(f"There is no scorer '{name}'; choose one of {', '.join(sorted(known))}.")
        path = inside(step.root, folder)
        scorers[name] = import_module(f"{scorer_modules.__name__}.{name}").load(path)
        step.facts.setdefault("scorers", {})[name] = tree_digest([path], relative_to=path)
    return scorers


def sample_in_parts(
    pipeline: "UniViGUPipeline", sample: Callable[["UniViGUPipeline", Sequence[Item]], Batch], items: Sequence[Item]
) -> Batch:
    """The samples of some items; on a CPU, of several parts of them at a time."""
    made: Batch = {}
    for part in map_on_cores(lambda part: sample(for_a_thread(pipeline), part), in_parts(items)):
        for name, values in part.items():
            made.setdefault(name, []).extend(values)
    return made


def caption_clips(
    pipeline: "UniViGUPipeline",
    frames: "np.ndarray",
    items: Sequence[Item],
    compared_steps: Sequence[int],
    measured: bool,
) -> dict[str, Any]:
    """Captions of clips, also with other numbers of steps, and captions without the video (noise in its place).

    With `measured`, also how sure the model is of the captions, and how well it reproduces the clips.
    """
    import torch

    from univigu import wan
    from univigu.confidence import measure

    latents = wan.encode_frames(pipeline.vae, torch.from_numpy(frames))
    seeds = [item["seed"] for item in items]
    texts = pipeline.caption_latents(latents, seed=seeds)
    return {
        "frames": frames,
        "texts": texts,
        "measures": measure(pipeline, list(frames), texts, seeds) if measured else [],
        "texts_without_video": pipeline.caption_latents(latents, seed=seeds, video_tau=0.0),
        **{
            f"texts_in_{n}_steps": texts
            if n == pipeline.config.caption_steps
            else pipeline.caption_latents(latents, n, seed=seeds)
            for n in compared_steps
        },
    }


def generate_clips(pipeline: "UniViGUPipeline", items: Sequence[Item], size: Size) -> dict[str, Any]:
    """The model's clips for the items' prompts."""
    prompts = [item["prompt"] for item in items]
    return {"frames": pipeline.generate(prompts, **_video_arguments(items, size))}


def sample_jointly(pipeline: "UniViGUPipeline", items: Sequence[Item], size: Size) -> dict[str, Any]:
    """Clips and captions generated jointly from the items' prompts."""
    prompts = [item["prompt"] for item in items]
    arguments = _video_arguments(items, size)
    frames, texts = pipeline.joint(prompts, **arguments, output_type="uint8", return_dict=False)
    return {"frames": frames, "texts": texts}


def _video_arguments(items: Sequence[Item], size: Size) -> dict[str, Any]:
    frames, height, width = size
    return {
        "num_frames": frames,
        "height": height,
        "width": width,
        "seed": [item["seed"] for item in items],
        "batch_size": len(items),
    }


def generate_with_base(base: Any, items: Sequence[Item], step: "Step") -> dict[str, Any]:
    """The base generator's clips for the same prompts and seeds, as it makes them best, by diffusers' own pipeline."""
    import numpy as np

    settings = step.settings.evaluate_model
    arguments = {"max_sequence_length": step.settings.text.prompt_length}
    sampling = Sampling(settings.base_steps, settings.base_guidance, arguments=arguments)
    videos = generate(base, items, step.settings.video, sampling)
    return {"frames": (np.nan_to_num(videos) * 255).round().clip(0, 255).astype(np.uint8)}
