"""Each step fits on the nodes that the documentation names for it, beside what a node runs anyway."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from components.orchestration import kfp_pipeline

ROOT = Path(__file__).parents[2]
UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


@pytest.fixture(scope="session")
def table():
    return yaml.safe_load((ROOT / "infra/node-shapes.yaml").read_text(encoding="utf-8"))


def reserved(capacity, brackets):
    ends = [one["above"] for one in brackets[1:]] + [float("inf")]
    return sum(
        max(min(capacity, end) - one["above"], 0) * one["share"] for one, end in zip(brackets, ends, strict=True)
    )


def free(shape, table):
    """(cores, MiB, GiB of disk, GPUs) of a node that pods can request, less the share of daemonsets and images."""
    kernel, whole = table["kernel"], shape["memory_gib"] * 1024
    memory = whole - whole * kernel["share"] - kernel["mib"] - table["eviction_mib"]
    memory -= reserved(whole, table["reservations"]["memory"])
    cpu = shape["vcpu"] - reserved(shape["vcpu"], table["reservations"]["cpu"])
    disk, whole = table["disk"], shape["disk_gib"]
    taken = min(one["gib"] + one["share"] * whole for one in disk["reserved"]) + disk["eviction_share"] * whole
    return (
        cpu - table["daemonsets"]["cpu"],
        memory - table["daemonsets"]["memory_mib"],
        whole - taken - disk["images_gib"],
        shape["gpus"],
    )


CONTAINERS = 2  # of a task's pod: the task, and Argo's `wait`; its init containers end before these start


@pytest.fixture(scope="session")
def disk(render):
    """(request, limit) in GiB of the node's disk, for each container."""
    (limits,) = [one for one in render("gke") if one["kind"] == "LimitRange"]
    (limit,) = limits["spec"]["limits"]
    assert limit["type"] == "Container"
    return tuple(int(limit[name]["ephemeral-storage"].removesuffix("Gi")) for name in ("defaultRequest", "default"))


@pytest.fixture(scope="session")
def requests(disk):
    """(cores, MiB, GiB of disk, GPUs) that each compiled task requests by default, by pool: cpu, gpu, training."""
    pipeline, _ = yaml.safe_load_all((ROOT / kfp_pipeline.PACKAGE).read_text(encoding="utf-8"))
    defaults = {k: v.get("defaultValue") for k, v in pipeline["root"]["inputDefinitions"]["parameters"].items()}

    def value(text):
        name = re.fullmatch(r"\{\{\$\.inputs\.parameters\['(?:pipelinechannel--)?(\w+)'\]\}\}", str(text))
        return str(defaults[name[1]] if name else text)

    found = {}
    for executor in pipeline["deploymentSpec"]["executors"].values():
        asked = executor["container"]["resources"]
        gpus = asked.get("accelerator", {}).get("resourceCount", "0")
        pool = "cpu" if gpus == "0" else "training" if "training" in gpus else "gpu"
        memory = value(asked["resourceMemoryRequest"])
        assert memory == value(asked["resourceMemoryLimit"])
        mib = int(memory[:-2]) * UNITS[memory[-2:]] / 2**20
        found.setdefault(pool, set()).add(
            (float(value(asked["resourceCpuRequest"])), mib, CONTAINERS * disk[0], int(value(gpus)))
        )
    return found


def fits(requests, pool, shape, table):
    room = free(shape, table)
    return all(all(asked <= left for asked, left in zip(request, room, strict=True)) for request in requests[pool])


def documented_pools():
    """(machine type, accelerator, GPUs, GiB of disk) of the node pools of the operator's page, by name."""
    page = (ROOT / "docs/operate.md").read_text(encoding="utf-8").replace("\\\n", " ")
    node, accelerator = r"create (\w+) .*?--machine-type=([\w-]+)", r"--accelerator=type=([\w-]+),count=(\d)"
    pattern = rf"node-pools {node}.*?{accelerator}.*?--disk-size=(\d+)"
    return {
        name: (machine, accelerator, int(gpus), int(disk))
        for name, machine, accelerator, gpus, disk in re.findall(pattern, page)
    }


def test_each_step_fits_on_the_node_pool_that_the_operators_page_creates_for_it(requests, table):
    assert set(requests) == {"cpu", "gpu", "training"}
    pools = documented_pools()
    assert set(pools) == {"gpu", "training"}
    for pool, (machine, accelerator, gpus, disk) in pools.items():
        shape = table["shapes"][machine]
        assert (shape["accelerator"], shape["gpus"], shape["disk_gib"]) == (accelerator, gpus, disk)
        assert fits(requests, pool, shape, table), (pool, machine)
        assert fits(requests, "cpu", shape, table)


def test_a_64_gib_step_does_not_fit_on_a_machine_of_48_or_64_gb(requests, table):
    assert not fits(requests, "gpu", table["shapes"]["g2-standard-12"], table)
    assert not fits(requests, "gpu", table["shapes"]["g2-standard-16"], table)


def test_the_page_lists_for_each_shape_what_is_free_and_which_steps_fit(requests, table):
    page = (ROOT / "docs/operate.md").read_text(encoding="utf-8")
    for name, shape in table["shapes"].items():
        cpu, mib, disk, gpus = free(shape, table)
        pools = [pool for pool in ("gpu", "training") if fits(requests, pool, shape, table)]
        room = f"{cpu:.1f} | {mib / 1024:.1f} GiB | {disk:.0f} GiB | {gpus}"
        row = f"| `{name}` | {room} | {', '.join(pools) or 'neither'} |"
        assert row in page, row


def test_a_step_that_fills_its_share_of_the_disk_leaves_the_node_and_its_images_alone(disk, table):
    for name, shape in table["shapes"].items():
        assert disk[1] * CONTAINERS <= free(shape, table)[2], name
    small = {**table["shapes"]["g2-standard-32"], "disk_gib": 100}  # GKE's default
    assert disk[1] * CONTAINERS > free(small, table)[2]


def test_the_accelerator_of_the_overlay_is_that_of_the_training_pool(render):
    (runtime,) = [one for one in render("gke") if one["kind"] == "TrainingRuntime"]
    (job,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    selector = job["template"]["spec"]["template"]["spec"]["nodeSelector"]
    assert selector == {"cloud.google.com/gke-accelerator": documented_pools()["training"][1]}


def test_a_larger_node_never_has_less_room(table):
    for kind in ("cpu", "memory"):
        brackets = table["reservations"][kind]
        assert all(one["above"] < other["above"] for one, other in pairwise(brackets))
        left = [size - reserved(size, brackets) for size in range(1, 300_000, 997)]
        assert all(one < other for one, other in pairwise(left))
