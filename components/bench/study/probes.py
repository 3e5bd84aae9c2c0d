"""Probes of one finished arm, in a process of their own: captions of other clips, and what captions and videos cost.

``python -m components.bench.study.probes FOLDER`` runs those that ``probes/declared.json`` of an arm's work root lists,
and writes ``probes/NAME.json`` for each: whether each caption's claims are right, and the seconds and operations of
samples that are made one at a time. A result that is there is kept, unless the model, the probe or the code is another.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.bench.study.arms import STEPS, Probe
from components.bench.study.clips import draw_items, render_clips
from components.bench.study.gallery import make_gallery, read_gallery
from components.evaluation.evaluate_model import load_benchmark
from components.evaluation.samples import generate_clips, sample_in_parts
from components.pipeline.digests import json_digest
from components.pipeline.fingerprint import code_digest, fingerprint
from components.pipeline.manifests import read_manifest
from components.pipeline.profiles import load_profile
from components.pipeline.runner import make_step
from components.pipeline.stages import find_stage
from univigu.errors import UniViGUError, first_line
from univigu.evaluation.claims import score_item
from univigu.files import read_json_object, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from components.pipeline.step import Step
    from univigu.pipeline import UniViGUPipeline

HOME, DECLARED = Path("probes"), "declared.json"  # in the work root of an arm
EVALUATION = STEPS[-1]
TIMED, COUNTED = 16, 4  # captions whose seconds are measured, and those of them whose operations are counted
UNTIL_SURE = 64  # clips that are captioned one at a time, until the model is sure

Result = dict[str, Any]


def declare(folder: Path, probes: Sequence[Probe], shown: bool) -> None:
    """Note in an arm's work root which probes are to be run there; `shown`: also the gallery of the study's page."""
    (folder / HOME).mkdir(exist_ok=True)
    write_json(folder / HOME / DECLARED, {"probes": [probe.model_dump() for probe in probes], "gallery": shown})


def read_probe(folder: Path, probe: Probe, code: str = "") -> Result | None:
    """A probe's result of the model and the held-out items that are in an arm's work root now; None without one.

    code: if given, a result of other code doesn't count either.
    """
    try:
        found = read_json_object(folder / HOME / f"{probe.name}.json")
        right = found["key"] == probe_key(folder, probe)
    except (OSError, ValueError, KeyError, UniViGUError):
        return None
    return found if right and code in ("", found["code"]) else None


def probe_key(folder: Path, probe: Probe) -> str:
    """A digest of the probe and of what its arm's evaluation was made from; raises `BadInputError` without one."""
    manifest = read_manifest(folder / find_stage(EVALUATION).home, EVALUATION)
    changes = {name: value for name, value in probe.changes().items() if name not in ("of", "against")}
    return json_digest([changes, manifest["inputs"], manifest["parameters"]])


def current_code() -> str:
    """A digest of the code that makes results."""
    return code_digest(fingerprint(["components.bench.study.probes:measure_probe"]))


def run_probes(folder: Path) -> None:
    """Run the declared probes of an arm's work root, and make its gallery; finished ones are kept."""
    declared = read_json_object(folder / HOME / DECLARED)
    probes, code = [Probe.model_validate(one) for one in declared["probes"]], current_code()
    waiting = [probe for probe in probes if read_probe(folder, probe, code) is None]
    with_gallery = declared["gallery"] and not read_gallery(folder)
    if not waiting and not with_gallery:
        return
    values = load_profile(str(folder / "profile.yaml"))
    step = make_step(find_stage(EVALUATION), values, folder.resolve())
    pipeline = load_pipeline(step)
    for probe in waiting:
        print(f"{probe.name}: captions of {step.settings.evaluate_model.captions} clips", flush=True)
        result = measure_probe(pipeline, step, probe)
        write_json(folder / HOME / f"{probe.name}.json", {"key": probe_key(folder, probe), "code": code, **result})
    if with_gallery:
        make_gallery(pipeline, step)


def load_pipeline(step: "Step") -> "UniViGUPipeline":
    """The model of an arm, in fp32."""
    import diffusers
    import torch
    import transformers

    from univigu.pipeline import UniViGUPipeline

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    pipeline = UniViGUPipeline.from_pretrained(step.inputs["stage2"] / "model")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def measure_probe(pipeline: "UniViGUPipeline", step: "Step", probe: Probe) -> Result:
    """``claims`` of captions by task, and ``seconds``, ``operations`` and ``steps`` by what was measured.

    A multiplication with an addition is two operations; only those of matrix products and convolutions count.
    """
    benchmark = load_benchmark(step.settings.evaluate_model.benchmark)
    heldout = benchmark.open_heldout(step)
    items = draw_items(probe, heldout["captions"])
    frames = render_clips(probe, items, benchmark, step.inputs["clips"])
    shown = list(zip(items, frames, strict=True))
    ways = {"": None} | {f"_in_{count}_steps": count for count in probe.steps}

    def claims(shown_items: Sequence[Any], texts: Sequence[str]) -> list[Mapping[str, bool]]:
        pairs = zip(shown_items, texts, strict=True)
        return [score_item(benchmark.truth(item), benchmark.read_text(text)) for (item, _), text in pairs]

    found: Result = {"claims": {}, "seconds": {}, "operations": {}, "steps": {}}
    for name, texts in write_captions(pipeline, shown, ways, step.settings.evaluate_model.batch_size).items():
        found["claims"][f"captions{name}"] = claims(shown, texts)
    for name, count in ways.items():
        calls = [lambda one=one, count=count: caption_one(pipeline, *one, count) for one in shown[:TIMED]]
        found["seconds"][f"caption{name}"], found["operations"][f"caption{name}"] = cost(calls)
    if probe.entropy is not None:
        sure, most = shown[:UNTIL_SURE], max(probe.steps, default=None)
        made = [caption_until_sure(pipeline, *one, most, probe.entropy) for one in sure]
        found["claims"]["captions_until_sure"] = claims(sure, [text for text, _ in made])
        found["steps"]["caption_until_sure"] = [taken for _, taken in made]
        calls = [lambda one=one: caption_until_sure(pipeline, *one, most, probe.entropy) for one in sure[:TIMED]]
        found["seconds"]["caption_until_sure"], found["operations"]["caption_until_sure"] = cost(calls)
    if probe.videos:
        video = step.settings.video
        size = (video.frames, video.height, video.width)
        prompts = heldout["generations"][: probe.videos]
        calls = [lambda item=item: generate_clips(pipeline, [item], size) for item in prompts]
        found["seconds"]["video"], found["operations"]["video"] = cost(calls)
    return found


def write_captions(
    pipeline: "UniViGUPipeline", shown: Sequence[Any], ways: Mapping[str, int | None], size: int
) -> dict[str, list[str]]:
    """The captions of (item, frames), in batches of `size`, with each number of steps of `ways`, by its name."""
    made: dict[str, list[str]] = {name: [] for name in ways}

    def sample(pipe: "UniViGUPipeline", part: Sequence[Any]) -> dict[str, list[str]]:
        latents, seeds = encode(pipe, [frames for _, frames in part]), [item["seed"] for item, _ in part]
        return {name: pipe.caption_latents(latents, count, seed=seeds) for name, count in ways.items()}

    for start in range(0, len(shown), size):
        for name, texts in sample_in_parts(pipeline, sample, shown[start : start + size]).items():
            made[name] += texts
    return made


def encode(pipeline: "UniViGUPipeline", clips: Sequence[Any]) -> "Tensor":
    """Normalised latents of clips, each uint8 (F, H, W, 3)."""
    import numpy as np
    import torch

    from univigu import wan

    return wan.encode_frames(pipeline.vae, torch.from_numpy(np.stack(clips)))


def caption_one(pipeline: "UniViGUPipeline", item: Mapping[str, Any], frames: Any, count: int | None) -> str:
    """The caption of one clip, from its pixels."""
    (text,) = pipeline.caption_latents(encode(pipeline, [frames]), count, seed=[item["seed"]])
    return text


def caption_until_sure(
    pipeline: "UniViGUPipeline", item: Mapping[str, Any], frames: Any, count: int | None, entropy: float
) -> tuple[str, int]:
    """The caption of one clip, which ends where the mean entropy of a predicted token is at most `entropy`, in nats.

    Returns it, with the number of steps that were taken, of `count` at most. The text is then the one that is
    predicted at that point. Predictions other than categorical have no entropy, and take all steps.
    """
    seen: list[Any] = []
    read = pipeline.transformer.read_text

    def watch(*arguments: Any, **settings: Any) -> Any:
        seen.append(read(*arguments, **settings))
        return seen[-1]

    def stop(pipe: Any, number: int, timestep: Any, tensors: Mapping[str, Any]) -> Mapping[str, Any]:
        logits = seen[-1].logits
        if logits is None:
            return {}
        shares = logits.float().log_softmax(-1)
        if -(shares.exp() * shares).sum(-1).mean() > entropy:
            return {}
        pipe._interrupt = True
        return {"text_latents": seen[-1].data}

    latents, seeds = encode(pipeline, [frames]), [item["seed"]]
    pipeline.transformer.read_text = watch
    try:
        (text,) = pipeline.caption_latents(latents, count, seed=seeds, callback_on_step_end=stop)
    finally:
        del pipeline.transformer.read_text
    return text, len(seen)


def cost(calls: Sequence[Callable[[], object]]) -> tuple[list[float], list[int]]:
    """The seconds of each call, after one that isn't timed, and the operations of the first `COUNTED`."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    calls[0]()
    seconds, operations = [], []
    for call in calls:
        started = time.perf_counter()
        call()
        seconds.append(round(time.perf_counter() - started, 6))
    for call in calls[:COUNTED]:
        # attention as plain products, which alone are counted on every device
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            call()
        operations.append(int(counter.get_total_flops()))
    return seconds, operations


def main() -> None:
    """Run the probes of the work root that the command line names; a failure is one sentence on stderr."""
    try:
        run_probes(Path(sys.argv[1]))
    except UniViGUError as error:
        print(f"univigu: {first_line(error)}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
