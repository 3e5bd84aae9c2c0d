"""Before you rent GPUs: `univigu plan` computes what a profile costs, `univigu rehearse` checks it end to end."""

import json
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from components.cli.options import Profile, Settings, profile_in_use
from univigu.errors import ConfigError

PANEL = "Plan the real thing"


USUAL_GPUS = (16, 8, 4, 2, 1)
COUNTING = "Counting the memory and operations of the model, for half a minute"


class Task(StrEnum):
    """What the trained model makes."""

    caption = "caption"
    generate = "generate"
    joint = "joint"


Root = Annotated[Path, typer.Option(help="The work root, which may contain the base.")]
Gpus = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Number of GPUs that train together. (default: 16, or fewer for a profile whose batches 16 can't share)",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print everything as JSON, in bytes, seconds and FLOPs.")]


def plan(
    profile: Profile = None,
    settings: Settings = None,
    gpus: Gpus = None,
    gpu: Annotated[str, typer.Option(help="The GPU's name, such as h100; an unknown one lists all names.")] = "h800",
    mfu: Annotated[
        float | None, typer.Option(help="Model FLOPs utilisation, 0 to 1. (default: a range that others have measured)")
    ] = None,
    zero: Annotated[int | None, typer.Option(min=0, max=3, help="ZeRO stage. (default: the profile's)")] = None,
    price: Annotated[float, typer.Option(min=0, help="Price of one GPU-hour, in any currency.")] = 0.0,
    task: Annotated[
        Task | None,
        typer.Option(help="Compute what one sample of the trained model needs on one GPU, instead of the training."),
    ] = None,
    image: Annotated[
        bool,
        typer.Option("--image", help="With --task generate or joint: count a first image, where the base takes one."),
    ] = False,
    root: Root = Path("."),
    as_json: AsJson = False,
) -> None:
    """Compute what a profile needs on given GPUs: memory, operations, days, storage, requests, cost.

    The same question is computed once: a later call prints the answer from `.univigu/plans`.
    """
    from components.pipeline.profiles import load_profile, with_settings
    from components.pipeline.progress import activity
    from components.planning.answers import remembered

    profile = with_settings(profile_in_use(profile, root), settings or [])
    values = load_profile(profile)
    if image and not task:
        raise ConfigError("Training gives no first image; add --task generate or --task joint, or leave --image out.")
    if task:
        with activity(COUNTING):
            found = remembered("inference", values, root, task=task.value, gpu=gpu, mfu=mfu, image=image)
        print(json.dumps(found, indent=1) if as_json else inference_as_text(profile, found))
        return
    gpus = gpus or usual_gpus(values)
    with activity(COUNTING):
        found = remembered("training", values, root, gpus=gpus, gpu=gpu, mfu=mfu, zero=zero, price=price)
    print(json.dumps(found, indent=1) if as_json else as_text(profile, found))


def rehearse(
    profile: Profile = None,
    settings: Settings = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="The base's folder, whose file headers are checked. (default: the profile's)"
        ),
    ] = None,
    gpus: Gpus = None,
    gpu: Annotated[str, typer.Option(help="The GPU's name; an unknown one lists all names.")] = "h800",
    root: Root = Path("."),
    as_json: AsJson = False,
) -> None:
    """Check a profile end to end without weights, GPUs or a cluster; the exit code is the first failure's, or 0.

    `to do` marks what only you can provide: weights, environment variables, disk space.
    """
    from components.pipeline.profiles import load_profile, with_settings
    from components.pipeline.progress import activity
    from components.planning import rehearsal

    profile = with_settings(profile_in_use(profile, root), settings or [])
    values = load_profile(profile)
    scene = rehearsal.Scene(profile, values, root, weights, gpus or usual_gpus(values), gpu)
    if as_json:
        with activity("Checking the profile, for half a minute"):
            lines = rehearsal.rehearse(scene, lambda line: None)
        print(rehearsal.as_json(scene, lines))
    else:
        lines = rehearsal.rehearse(scene, _show)
    raise typer.Exit(rehearsal.exit_code(lines))


def usual_gpus(profile: Mapping[str, Any]) -> int:
    """The most of `USUAL_GPUS` over which the batches of both stages can be split evenly."""
    stages = [profile[f"train_stage_{number}"] for number in (1, 2)]
    batches = [stage["batch_size"] * stage["sequence_parallel"] for stage in stages]
    return next(gpus for gpus in USUAL_GPUS if not any(batch % gpus for batch in batches))


def _show(line: Any) -> None:
    print(f"{line.state:<7} {line.subject:<26} {line.detail}", flush=True)


def add_to(app: typer.Typer) -> None:
    """Make these functions commands of `app`."""
    for command in (plan, rehearse):
        app.command(rich_help_panel=PANEL)(command)


def as_text(profile: str, plan: Mapping[str, Any]) -> str:
    """Format a plan for people."""
    gpu, model, training = plan["gpu"], plan["model"], plan["training"]
    lines = [
        f"{profile} on {gpu['count']} {gpu['name']} ({gpu['tflops']:g} TFLOP/s, {gpu['memory_gib']:g} GiB each)",
        f"  model       {_billions(model['parameters'])} parameters, {_billions(model['text_side'])} of them new; "
        f"{model['tokens']['video']:,} video tokens, {model['tokens']['text']} of text, {model['tokens']['context']} "
        "of condition",
    ]
    memory, other = plan["memory"].values()
    tables = {"both stages": memory} if memory == other else {"stage 1": memory, "stage 2": other}
    for stages, table in tables.items():
        lines += ["", f"Memory per GPU in {stages} (GiB; {_gib(table['usable'])} usable)", *memory_lines(table)]
    lines += [
        f"  Host memory per machine: {_gib(memory['host_bytes_per_machine'])} GiB, for all weights on the first one and"
        " for offloaded state.",
        "",
        "Operations per sample (PFLOP)    share  forward  backward  recomputed  first guess",
    ]
    for task, cost in training["stage_1"]["tasks"].items():
        figures = (cost[key] / 1e15 for key in ("forward", "backward", "recomputation", "first_guess"))
        lines.append(f"  {task:<30} {cost['share']:>5.2f}" + "".join(f"{figure:>10.3f}" for figure in figures))
    lines += ["", f"Time, at an MFU of {_range(gpu['mfu'], 'g')}"]
    for name, stage in training.items():
        draw = stage["task_draw"]
        saved = f"a task per step {'saves' if draw['draw'] == 'step' else 'would save'} {draw['saved_by_step']:.1%}"
        step = f"{_range(stage['step_seconds'])} s per step ({saved})"
        lines.append(f"  {name.replace('_', ' ')}     {step}, {stage['steps']:,} steps: {_range(stage['days'])} days")
        if (draws := stage["text_draws"]["draws"]) > 1:
            more = f"{stage['text_draws']['more_flops']:.1%} more operations than 1"
            lines.append(f"              text_draws {draws}: {more}, {draws} times the text in understand")
    synthesis, captioning, storage = plan["synthesis"], plan["captioning"], plan["storage"]
    lines += [
        f"  training    {_range(plan['days'])} days",
        f"  synthesis   {synthesis['clips']:,} clips at {_range(synthesis['gpu_seconds_per_clip'])} GPU-seconds each: "
        f"{_range(synthesis['gpu_days'])} GPU-days; encoding {_range(synthesis['encoding_gpu_days'])}",
        f"  captions    {captioning['requests_at_least']:,} to {captioning['requests_at_most']:,} requests to "
        f"'{captioning['captioner']}', {captioning['answer_tokens']:,} answer tokens",
        "",
        f"Storage (GB)  total {storage['total'] / 1e9:.4g}: "
        + ", ".join(f"{name.replace('_', ' ')} {size / 1e9:.3g}" for name, size in _storage_parts(storage)),
        "GPU-hours     "
        + ", ".join(f"{name.replace('_', ' ')} {_range(hours, ',.0f')}" for name, hours in plan["gpu_hours"].items()),
    ]
    if plan["cost"]["per_gpu_hour"]:
        lines.append(
            f"Cost          {_range(plan['cost']['total'], ',.0f')}, at {plan['cost']['per_gpu_hour']:g} per GPU-hour"
        )
    lines += ["", "Compared with published figures (1.3B at 81 frames of 480x832)"]
    for check in plan["checks"]:
        verdict = "agrees" if check["agrees"] else "DISAGREES"
        lines.append(
            f"  {verdict:<9} {check['figure']}: known {check['known']:.3g}, here {check['ours']:.3g} ({check['note']})"
        )
    return "\n".join([*lines, "", "Assumptions", *(f"  - {each}" for each in plan["assumptions"])])


def memory_lines(memory: Mapping[str, Any]) -> list[str]:
    """One row per ZeRO stage, with and without recomputation; an arrow marks the profile's choice."""
    parts = ("parameters", "gradients", "optimizer", "activations", "workspace", "total")
    lines = ["    " + " " * 20 + "".join(f"{part:>12}" for part in parts)]
    for name, row in memory["by_stage"].items():
        zero, activations = name.removeprefix("zero_").split("_")
        mark = "->" if name == memory["chosen"] else "  "
        figures = "".join(f"{row[part] / 2**30:>12.1f}" for part in parts)
        verdict = "fits" if row["fits"] else "doesn't fit"
        lines.append(f"  {mark} ZeRO {zero}, {activations:<12}{figures}   {verdict}")
    if not memory["fits"]:
        others = [name for name, row in memory["by_stage"].items() if row["fits"]]
        remedy = f"{others[0].replace('_', ' ')} would" if others else "more GPUs, a smaller clip or adapters might"
        lines.append(f"  The profile's choice doesn't fit; {remedy}.")
    else:
        lines.append("  The encoders use no GPU memory here: latents and text states are precomputed.")
    tasks = ", ".join(f"{task} {size / 2**30:.1f}" for task, size in memory["by_task"].items())
    lines.append(f"  By task: {tasks}. The totals are of the task that needs the most.")
    return lines


def inference_as_text(profile: str, plan: Mapping[str, Any]) -> str:
    """Format what one sample needs, for people."""
    gpu, memory = plan["gpu"], plan["memory"]
    lines = [
        f"One sample of {plan['task']} with {profile} on one {gpu['name']}: {plan['description']}",
        "",
        "Memory (GiB)",
    ]
    lines += [f"  {name:<40}{size / 2**30:>8.1f}" for name, size in memory["weights"].items()]
    lines += [f"  while {name:<34}{size / 2**30:>8.1f}" for name, size in memory["phases"].items()]
    for way, total in memory["totals"].items():
        verdict = "fits" if total <= memory["usable"] else "doesn't fit"
        lines.append(f"  {way:<40}{total / 2**30:>8.1f}   {verdict} ({_gib(memory['usable'])} usable)")
    lines += ["", f"Time (seconds), at an MFU of {_range(gpu['mfu'], 'g')}"]
    lines += [f"  {name:<40}{_range(span):>18}" for name, span in plan["seconds"].items()]
    return "\n".join([*lines, "", "Assumptions", *(f"  - {each}" for each in plan["assumptions"])])


def _range(span: Sequence[float], form: str = ".3g") -> str:
    """A range in words: ``4.2 to 5.4``, or one number where both ends read the same."""
    first, last = (format(end, form) for end in span)
    return first if first == last else f"{first} to {last}"


def _storage_parts(storage: Mapping[str, int]) -> list[tuple[str, int]]:
    return [(name, size) for name, size in storage.items() if name not in ("total", "latents_per_clip")]


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g}"


def _billions(count: int) -> str:
    return f"{count / 1e9:.3f} B" if count >= 1e7 else f"{count / 1e6:.2f} M"
