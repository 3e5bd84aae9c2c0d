"""What develops the project itself: `univigu pretrain` makes the bundled bases, and `univigu bench` measures claims."""

from pathlib import Path
from typing import Annotated

import typer

from components.cli.messages import say
from components.cli.options import Root


def pretrain(
    out: Annotated[Path, typer.Option(help="The folder to write the base to; it is replaced as a whole.")],
    work: Annotated[Path, typer.Option(help="Where checkpoints are kept; run again to resume from them.")] = Path(
        ".univigu/pretrain"
    ),
    world: Annotated[
        str, typer.Option(help="The world of the clips, without --settings: digits, or stories.")
    ] = "digits",
    settings: Annotated[
        Path | None,
        typer.Option(help="A YAML file of the world, sizes and steps. (default: those of the world's bundled base)"),
    ] = None,
    phase: Annotated[list[str] | None, typer.Option(help="Run only this phase; may be repeated.")] = None,
    recogniser: Annotated[Path | None, typer.Option(help="The recogniser's folder. (default: the bundled one)")] = None,
    heldout: Annotated[
        Path | None,
        typer.Option(help="Held-out items; their prompts are excluded from training. (default: the world's)"),
    ] = None,
) -> None:
    """Train a world's base from scratch: hours on one core (`--out model/tiny-wan` replaces the bundled one)."""
    from components.digits import pretrain as pretraining
    from components.digits.worlds import find_world

    config = pretraining.load_config(settings or pretraining.CONFIGS[find_world(world).name])
    scores = pretraining.pretrain(
        out,
        work,
        config,
        tuple(phase or pretraining.PHASES),
        recogniser,
        heldout or pretraining.HELDOUT[config.world],
    )
    for name, value in scores.items():
        print(f"{name:<22} {value:.3f}")


def bench(
    name: Annotated[str, typer.Argument(help="The benchmark to run; without a name, list all names.")] = "",
    videos: Annotated[
        int | None, typer.Option(min=1, help="Of `import`: how many videos. (default: 1000)", show_default=False)
    ] = None,
    video: Annotated[
        Path | None,
        typer.Option(help="Of `import`: copies of this mp4, in place of videos that it makes.", show_default=False),
    ] = None,
    root: Root = Path("."),
) -> None:
    """Measure speed or cost against an alternative, and write reports/bench-NAME.json."""
    import json

    from components import bench

    if not name:
        print("\n".join(bench.benchmarks()))
        return
    say(f"Measuring {name}; this takes seconds to minutes.")
    given = {"videos": videos, "video": video}
    options = {option: value for option, value in given.items() if value is not None}
    print(json.dumps(bench.run(name, root, **options), indent=1, ensure_ascii=False))


def add_to(app: typer.Typer) -> None:
    """Make these commands of `app`."""
    for command in (pretrain, bench):
        app.command()(command)
