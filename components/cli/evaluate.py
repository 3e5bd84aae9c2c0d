"""`univigu evaluate`: figures of any model on any clips, captions or prompts, as a table and as JSON."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from components.cli.chosen_model import NAME, find_model, load
from components.cli.generate import PANEL, Model, Name, Root, Seed
from components.cli.known_words import find_unknown_words
from components.cli.messages import say
from univigu.errors import BadInputError
from univigu.files import write_json

if TYPE_CHECKING:
    from components.evaluation.suite.data import Dataset
    from univigu.pipeline import UniViGUPipeline

COUNT = 100  # samples of each task, where none is given
MOST_UNKNOWN = 0.5  # share of the words of the texts, beyond which a model is of another world
EXAMPLES = (
    "Examples: `univigu evaluate --data data/heldout.json --count 50`; "
    "`univigu evaluate --model my-model --data my-clips --task caption`"
)


def _folder(what: str) -> typer.models.OptionInfo:
    return typer.Option(metavar="FOLDER", help=what, show_default=False)


Data = Annotated[
    Path,
    typer.Option(
        help="A folder of videos with captions, a table (.jsonl, .csv, .parquet), data/heldout.json, or the folder of "
        "VBench, DREAM-1K or VDC.",
    ),
]
Tasks = Annotated[
    list[str] | None,
    typer.Option(help="caption, generate or joint; may be repeated. (default: all that the data allows)"),
]
Count = Annotated[
    int | None,
    typer.Option(
        min=2,
        help=f"The most samples of each task. (default: {COUNT}; all of a published benchmark)",
        show_default=False,
    ),
]
Retrieval = Annotated[
    int, typer.Option(min=0, help="The most clips among which each has to be found; 0: don't measure it.")
]
Embedder = Annotated[Path | None, _folder("A sentence-transformers or model2vec model, for similarity.")]
Features = Annotated[Path | None, _folder("A video network such as VideoMAE, for the Fréchet distance.")]
Clip = Annotated[Path | None, _folder("A CLIP model, which judges whether clips fit their prompts.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="The JSON file to write.")]


def evaluate(
    data: Data,
    model: Model = "",
    task: Tasks = None,
    count: Count = None,
    retrieval: Retrieval = 100,
    embedder: Embedder = None,
    features: Features = None,
    clip: Clip = None,
    output: Output = Path("reports/evaluation.json"),
    seed: Seed = 0,
    name: Name = NAME,
    root: Root = Path("."),
) -> None:
    """Evaluate a model: captions against references, generated clips, and both jointly.

    Prints each figure with its 95 % interval and number of samples, and which figures were left out and why. A sample
    that fails counts as wrong. For VBench, DREAM-1K and VDC, the captions or clips are also written as their own
    scripts read them, beside the JSON file.
    """
    from components.evaluation.suite.data import open_dataset
    from components.evaluation.suite.run import Choice, choose_tasks, evaluate

    if output.is_dir() or output.suffix != ".json":
        raise BadInputError(f"'{output}' is not the name of a JSON file; give one that ends with .json to --output.")
    dataset = open_dataset(data)
    tasks = choose_tasks(dataset, task or [])
    samples = output.with_suffix("") if dataset.benchmark else None
    if samples and samples.exists():
        raise BadInputError(
            f"'{samples}' exists, and samples of two evaluations must not mix; remove it, or give another --output."
        )
    output.parent.mkdir(parents=True, exist_ok=True)  # which may fail, so before the samples
    folder = find_model(model, name, root)
    pipeline = load(folder)
    pipeline.progress_bar = iter  # the progress over samples is enough
    count = choose_count(dataset, count)
    check_world(pipeline, folder, dataset.first(count))
    report = evaluate(pipeline, dataset, Choice(tasks, count, seed, retrieval, embedder, features, clip, samples))
    report = describe(pipeline, folder, dataset) | {"count": count, "seed": seed} | report
    write_json(output, report)
    show(report)
    for path in report["written"]:
        say(f"{path}: for {dataset.name}'s own scripts: `{dataset.benchmark.scored_by}`")
    say(f"{output}: the figures, and all samples")


def choose_count(dataset: "Dataset", asked: int | None) -> int:
    """The most samples of each task; says so where a benchmark's scores can't be compared with published ones."""
    most = max(len(dataset.clips), len(dataset.prompts), len(dataset.joint))
    if dataset.benchmark and asked is not None and asked < most:
        say(f"This is a part of {dataset.name}, {asked} of {most} samples: don't compare it with published scores.")
    return asked or (most if dataset.benchmark else COUNT)


def describe(pipeline: "UniViGUPipeline", folder: Path, dataset: "Dataset") -> dict[str, Any]:
    """What was evaluated on what: the model, its sampling defaults, and the data."""
    sampling = {key: value for key, value in pipeline.config.items() if isinstance(value, int | float)}
    return {"model": str(folder), "sampling": sampling, "data": dataset.name, "data_sha256": dataset.sha256}


def check_world(pipeline: "UniViGUPipeline", folder: Path, dataset: "Dataset") -> None:
    """Raise `BadInputError` for a model of another world: it makes clips of another shape, or lacks most words."""
    config = pipeline.config
    shape = (config.num_frames, config.height, config.width)
    if dataset.world and shape != dataset.world.SHAPE:
        raise BadInputError(
            f"The clips of '{dataset.name}' have {_size(dataset.world.SHAPE)} and those of the model '{folder}' "
            f"{_size(shape)}; evaluate it on clips of its own world."
        )
    texts = [one.references[0] for one in dataset.clips] + [one.text for one in dataset.prompts]
    said = {word for text in texts for word in text.split()}
    unknown = [word for word in sorted(said) if find_unknown_words(word, pipeline.tokenizer)]
    if len(unknown) > MOST_UNKNOWN * len(said):
        raise BadInputError(
            f"The model '{folder}' doesn't know {len(unknown)} of the {len(said)} words of '{dataset.name}' "
            f"('{unknown[0]}' for one); evaluate it on clips of its own world."
        )


def show(report: Mapping[str, Any]) -> None:
    """Print the figures of each task as a table, then what was left out and what failed."""
    from components.cli.models import printable, show_table

    for task, scores in report["scores"].items():
        rows = [
            (f"{task}: {name}", f"{one['value']:.4g}", f"{one['low']:.4g} to {one['high']:.4g}", str(one["n"]))
            for name, one in scores.items()
        ]
        show_table(("figure", "value", "95 % interval", "n"), rows)
    for task, reasons in report["left_out"].items():
        by_reason: dict[str, list[str]] = {}
        for name, why in reasons.items():
            by_reason.setdefault(why, []).append(name)
        for why, names in by_reason.items():
            print(f"left out of {task}: {', '.join(names)} ({why})")
    if failed := report["failed"]:
        line = f"{len(failed)} samples failed and count as wrong, the first ({failed[0]['id']}): {failed[0]['why']}"
        print(printable(line))


def _size(shape: tuple[int, int, int]) -> str:
    frames, height, width = shape
    return f"{frames} frames of {width}x{height}"


def add_to(app: typer.Typer) -> None:
    """Make `evaluate` a command of `app`."""
    app.command(rich_help_panel=PANEL, epilog=EXAMPLES)(evaluate)
