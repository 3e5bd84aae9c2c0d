"""What a pipeline checks before it computes anything, so that it doesn't fail later on a node with GPUs."""

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from components.captions.caption_videos import open_captioner
from components.pipeline.manifests import inside
from components.pipeline.processes import without_cuda
from components.pipeline.profiles import load_profile
from components.pipeline.stages import STAGES
from components.tracking import open_tracking, tracking_uri
from univigu.errors import BadInputError, ConfigError, DiskFullError, MissingInputError
from univigu.mlflow_store import first_contact

ONE_NODE = frozenset({"btrfs", "ext2", "ext3", "ext4", "overlay", "tmpfs", "xfs", "zfs"})  # never shared by nodes
REGISTRY_LOGIN = {  # of the account that may change the registry, and what MLflow reads
    "UNIVIGU_REGISTRY_USERNAME": "MLFLOW_TRACKING_USERNAME",
    "UNIVIGU_REGISTRY_PASSWORD": "MLFLOW_TRACKING_PASSWORD",
}


def check_sources(profile: str, root: Path) -> None:
    if not root.is_dir():
        raise MissingInputError(f"There is no work root {root}; mount the volume there, or set another 'root'.")
    if not os.access(root, os.W_OK | os.X_OK):
        raise BadInputError(f"The work root {root} is not writable; correct its owner, or set another 'root'.")
    values = load_profile(profile)
    for key in sorted({key for stage in STAGES for key in stage.sources.values()}):
        if not inside(root, values[key]).exists():
            raise MissingInputError(
                f"The work root {root} has no {values[key]}, which the profile names as '{key}'; copy it there."
            )


def disk_of_one_node(root: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str:
    """The kind of file system of the work root, such as ``ext4``, if nodes can't share it; otherwise ""."""
    found, kind = -1, ""
    for line in mounts.read_text(encoding="utf-8", errors="replace").splitlines():
        place, _, about = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), place.split(" ")[4])
        if root.resolve().is_relative_to(point) and len(point) >= found:  # a later mount covers an earlier one
            found, kind = len(point), about.split(" ")[0]
    return kind if kind in ONE_NODE else ""


_QUANTITY = re.compile(r"(?=.*[1-9])\d+(\.\d+)?(m|[kMGTPE]|[KMGTPE]i)?")  # a Kubernetes quantity above 0, no exponent


def check_quantities(resources: Mapping[str, str]) -> None:
    for name, text in resources.items():
        gpus = name.endswith("gpus")
        if not (text.isdecimal() if gpus else _QUANTITY.fullmatch(text)):
            example = "a whole number of GPUs, such as 8" if gpus else "a Kubernetes quantity, such as 500m or 64Gi"
            raise ConfigError(f"'{name}' is '{text}'; set it to {example}.")


def check_batches(profile: str, gpus: int) -> None:
    from univigu.training.engine import TrainingConfig, micro_batches

    values = load_profile(profile)
    for stage in STAGES:
        if stage.resources.pool == "training":
            section = values[stage.parameters[-1]]
            micro_batches(TrainingConfig.from_section(section, values["seed"]), gpus)


def check_disk(root: Path, free_gib: float) -> None:
    import shutil

    free = shutil.disk_usage(root).free / 2**30
    if free < free_gib:
        raise DiskFullError(
            f"Only {free:.1f} GiB are free at {root}, but 'free_gib' requires {free_gib:g}; free disk space, or lower "
            "'free_gib'."
        )


def check_tracking(root: Path) -> None:
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        return

    open_tracking(root)
    import mlflow

    own_login = {name: os.environ.pop(name) for name in REGISTRY_LOGIN.values() if name in os.environ}
    try:
        for login in (own_login, registry_login()):
            os.environ.update(login)
            with first_contact(tracking_uri(root)):
                mlflow.MlflowClient().search_registered_models(max_results=1)
    finally:
        for name in REGISTRY_LOGIN.values():
            os.environ.pop(name, None)
        os.environ.update(own_login)


def check_captioner(profile: str, root: Path) -> None:
    from components.pipeline.freshness import finished

    values = load_profile(profile)
    with suppress(BadInputError):  # the step's inputs may not exist yet
        if finished("caption-videos", values, root):
            return
    open_captioner(values, root).check()


def check_gpu_driver() -> None:
    """Refuse a GPU node whose driver is too old for the image, on which the step would run on the CPU."""
    if without_cuda():
        return
    import torch

    from univigu.training.driver import check_driver

    check_driver(torch.version.cuda)


def registry_login() -> dict[str, str]:
    """MLflow's variables for the account that may change the registry; empty in a task that has no such account."""
    return {name: os.environ[ours] for ours, name in REGISTRY_LOGIN.items() if os.environ.get(ours)}
