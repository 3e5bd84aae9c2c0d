"""The table of steps as a Kubeflow pipeline, compiled to `infra/pipeline.yaml`.

Each step is one task. A sharded step runs as several parallel tasks and is committed by one more task, which needs no
GPU. The first task checks the prerequisites; a last task reports how the run ended, also after failures. The component
functions of this file run in pods (or under `kfp.local`) and only call `kfp_tasks.py`, which is in the image. kfp
copies their source text, so each function has its own imports.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from kfp import compiler, dsl, kubernetes
from kfp.dsl.pipeline_channel import PipelineChannel

from components.orchestration.kfp_tasks import RUN_ID, declaration
from components.orchestration.notifications import NOTIFY_URL
from components.orchestration.train_job import Settings
from components.pipeline.stages import STAGES, Stage, find_stage

NAME = "uni-vigu"
IMAGE = "ghcr.io/uni-vigu/uni-vigu:0.2.0"
GPU_IMAGE = "ghcr.io/uni-vigu/uni-vigu-training:0.2.0"  # the same image with a CUDA build of torch
PACKAGE = Path("infra/pipeline.yaml")  # relative to the repository
HEADER = (
    "# Compiled by `univigu pipeline compile` from components/orchestration/kfp_pipeline.py; see docs/kubeflow.md.\n"
)
MOUNT = "/mnt/univigu"  # mount path of the volume in pods
USER = 1000  # the image's user
RETRIES = 2
BACKOFF_S = 60  # wait before the first retry; doubles with each further one
PENDING_HOURS = 24 * 30  # that each attempt of a task may wait for a node
CONTROL_HOURS = 1  # timeout of tasks that run no step
TRACKING_SECRET = "univigu-tracking"
TRACKING_KEYS = ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
NOTIFY_SECRET = "univigu-notify"


def check_prerequisites(
    profile: str,
    root: str,
    parts: int,
    train_backend: str,
    required_env: list,
    free_gib: float,
    image: str,
    claim: str,
    mount_path: str,
    gpu_resource: str,
    gpus: str,
    cpu: str,
    memory: str,
    nodes: int,
    runtime: str,
    queue: str,
    priority: str,
    pool_gpus: str,
    pool_cpu: str,
    pool_memory: str,
) -> list:
    from components.orchestration import kfp_tasks

    resources = {"gpus": pool_gpus, "gpu_cpu": pool_cpu, "gpu_memory": pool_memory}
    resources |= {"training_gpus": gpus, "training_cpu": cpu, "training_memory": memory}
    options = {"image": image, "claim": claim, "mount-path": mount_path, "gpu-resource": gpu_resource, "gpus": gpus}
    options |= {"cpu": cpu, "memory": memory, "nodes": str(nodes), "runtime": runtime, "queue": queue}
    options |= {"priority": priority}
    trainjob = options if train_backend == "trainjob" else None
    return kfp_tasks.check_prerequisites(
        profile, root, parts, train_backend, required_env, free_gib, resources, trainjob
    )


# KFP copies this function into the compiled file without its module's imports, so the annotation finds its own way.
def cache_keys(profile: str, root: str, checked: list) -> __import__(
    "components.orchestration.kfp_tasks", fromlist=["CacheKeys"]
).CacheKeys:
    from components.orchestration import kfp_tasks

    return kfp_tasks.cache_keys(profile, root)


def run_step(
    step: str,
    profile: str,
    root: str,
    cache_key: str,
    declared: dict,
    inputs: str,
    train_stage_1: str = "",
    train_stage_2: str = "",
    gpus: str = "1",
    promotion: str = "",
) -> str:
    from components.orchestration import kfp_tasks

    inputs += f" train-stage-1={train_stage_1} train-stage-2={train_stage_2}"
    return kfp_tasks.run_step(step, profile, root, cache_key, declared, inputs, gpus=int(gpus), promotion=promotion)


def run_trainjob(
    step: str,
    profile: str,
    root: str,
    cache_key: str,
    declared: dict,
    inputs: str,
    image: str,
    claim: str,
    mount_path: str,
    gpu_resource: str,
    gpus: str,
    cpu: str,
    memory: str,
    nodes: int,
    runtime: str,
    queue: str,
    priority: str,
    train_stage_1: str = "",
) -> str:
    from components.orchestration import kfp_tasks

    options = {"image": image, "claim": claim, "mount-path": mount_path, "gpu-resource": gpu_resource, "gpus": gpus}
    options |= {"cpu": cpu, "memory": memory, "nodes": str(nodes), "runtime": runtime, "queue": queue}
    options |= {"priority": priority}
    inputs += f" train-stage-1={train_stage_1}"
    return kfp_tasks.run_step(step, profile, root, cache_key, declared, inputs, trainjob=options)


def run_part(step: str, profile: str, root: str, cache_key: str, declared: dict, inputs: str, part: str) -> str:
    from components.orchestration import kfp_tasks

    # the committing task checks `inputs`: in a loop, kfp's local runner replaces them with the loop's item
    return kfp_tasks.run_step(step, profile, root, cache_key, declared, part=part)


def commit_parts(step: str, profile: str, root: str, cache_key: str, declared: dict, inputs: str, made: list) -> str:
    from components.orchestration import kfp_tasks

    return kfp_tasks.run_step(step, profile, root, cache_key, declared, inputs)


def notify(pipeline: str, root: str, status: dsl.PipelineTaskFinalStatus):
    from components.orchestration import kfp_tasks

    kfp_tasks.notify(pipeline, root, status.state, status.error_message)


def _make_components() -> dict[str, Callable[..., dsl.PipelineTask]]:
    functions = (check_prerequisites, cache_keys, run_step, run_trainjob, run_part, commit_parts, notify)
    return {
        function.__name__: dsl.component(function, base_image=IMAGE, install_kfp_package=False)
        for function in functions
    }


def make_pipeline(retries: int = RETRIES) -> Any:
    """The pipeline as a kfp function; a failed task is retried `retries` times."""
    default = {stage.resources.pool: stage.resources for stage in STAGES}

    @dsl.pipeline(name=NAME, description="From raw prompts to a registered model that generates and captions videos.")
    def uni_vigu(
        profile: str = "tiny",
        root: str = MOUNT,
        parts: int = 1,
        train_backend: str = "trainjob",
        promotion: str = "",
        required_env: list = [],  # noqa: B006 (kfp reads the defaults; nothing changes them)
        free_gib: float = 1.0,
        work_pvc: str = "univigu-work",
        image: str = IMAGE,
        gpu_image: str = GPU_IMAGE,
        accelerator: str = "nvidia.com/gpu",
        tolerations: list = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],  # noqa: B006
        gpus: str = str(default["gpu"].gpus),
        gpu_cpu: str = default["gpu"].cpu,
        gpu_memory: str = default["gpu"].memory,
        gpu_node_selector: dict = {},  # noqa: B006
        training_gpus: str = str(default["training"].gpus),
        training_cpu: str = default["training"].cpu,
        training_memory: str = default["training"].memory,
        training_node_selector: dict = {},  # noqa: B006
        training_nodes: int = 1,
        training_runtime: str = Settings.runtime,
        training_queue: str = "",
        training_priority: str = "",
    ):
        def gpu_pool(cpu: Any, memory: Any, gpus: Any, node_selector: Any) -> Pool:
            return Pool(gpu_image, cpu, memory, accelerator, gpus, node_selector, tolerations)

        pools = {
            "cpu": Pool(image, default["cpu"].cpu, default["cpu"].memory),
            "gpu": gpu_pool(gpu_cpu, gpu_memory, gpus, gpu_node_selector),
            "training": gpu_pool(training_cpu, training_memory, training_gpus, training_node_selector),
        }
        trainjob = pools["training"].trainjob_options(
            work_pvc, training_nodes, training_runtime, training_queue, training_priority
        )
        graph = _Graph(_make_components(), pools, work_pvc, retries, profile, root, train_backend, trainjob, promotion)
        with dsl.ExitHandler(graph.add_notification(), name=NAME):
            checked = graph.add_check(parts, required_env, free_gib)
            keys = graph.add_cache_keys(checked)
            digests: dict[str, Any] = {}
            for stage in STAGES:
                key = keys.outputs[stage.name.replace("-", "_")]
                digests[stage.name] = graph.add_step(stage, digests, key, checked)

    return uni_vigu


class Pool(NamedTuple):
    """The image and the resources of a kind of task; values may be parameters of the pipeline."""

    image: Any
    cpu: Any
    memory: Any
    accelerator: Any = None
    gpus: Any = None
    node_selector: Any = None
    tolerations: Any = None

    def trainjob_options(self, claim: Any, nodes: Any, runtime: Any, queue: Any, priority: Any) -> dict[str, Any]:
        """The arguments of `run_trainjob` for training on this pool."""
        return {
            "image": self.image,
            "claim": claim,
            "mount_path": MOUNT,
            "gpu_resource": self.accelerator,
            "gpus": self.gpus,
            "cpu": self.cpu,
            "memory": self.memory,
            "nodes": nodes,
            "runtime": runtime,
            "queue": queue,
            "priority": priority,
        }

    def place(self, task: dsl.PipelineTask) -> None:
        """Set the task's image and resources, and what all tasks have in common: user, run id and secrets."""
        kubernetes.set_security_context(task, run_as_user=USER, run_as_group=USER, run_as_non_root=True)
        kubernetes.use_field_path_as_env(task, env_name=RUN_ID, field_path="metadata.labels['pipeline/runid']")
        kubernetes.use_secret_as_env(
            task, secret_name=TRACKING_SECRET, secret_key_to_env={key: key for key in TRACKING_KEYS}, optional=True
        )
        task.set_container_image(self.image)
        # kfp registers a task's parameters with the groups around it, except for those in its resources
        task.register_pipeline_channels([value for value in self if isinstance(value, PipelineChannel)])
        task.set_cpu_request(self.cpu).set_memory_request(self.memory).set_memory_limit(self.memory)
        if self.accelerator is None:
            return
        task.set_accelerator_type(self.accelerator).set_accelerator_limit(self.gpus)
        kubernetes.add_node_selector_json(task, self.node_selector)
        kubernetes.add_toleration_json(task, self.tolerations)
        kubernetes.empty_dir_mount(task, "shm", "/dev/shm", medium="Memory", size_limit="16Gi")


@dataclass(frozen=True)
class _Graph:
    """Adds the tasks to one pipeline; holds the parameters that they share.

    Most values are parameters of the pipeline, whose values are known only when it runs.
    """

    tasks: Mapping[str, Callable[..., dsl.PipelineTask]]  # by the name of the component's function
    pools: Mapping[str, Pool]
    work_pvc: Any
    retries: int
    profile: Any
    root: Any
    train_backend: Any
    trainjob: Mapping[str, Any]  # the options of `run_trainjob`
    promotion: Any

    def add_notification(self) -> dsl.PipelineTask:
        """Add the task that runs after all others, also if they failed."""
        last = self._place(self.tasks["notify"](pipeline=NAME, root=self.root)).set_caching_options(False)
        kubernetes.use_secret_as_env(
            last, secret_name=NOTIFY_SECRET, secret_key_to_env={NOTIFY_URL: NOTIFY_URL}, optional=True
        )
        return last

    def add_check(self, parts: Any, required_env: Any, free_gib: Any) -> dsl.PipelineTask:
        """Add the first task, which checks the prerequisites."""
        checked = self.tasks["check_prerequisites"](
            profile=self.profile,
            root=self.root,
            parts=parts,
            train_backend=self.train_backend,
            required_env=required_env,
            free_gib=free_gib,
            pool_gpus=self.pools["gpu"].gpus,
            pool_cpu=self.pools["gpu"].cpu,
            pool_memory=self.pools["gpu"].memory,
            **self.trainjob,
        )
        self._place(checked)
        for stage in STAGES:
            _add_secrets(checked, stage)
        return checked.set_caching_options(False)

    def add_cache_keys(self, checked: dsl.PipelineTask) -> dsl.PipelineTask:
        """Add the task whose outputs are the steps' cache keys."""
        keys = self.tasks["cache_keys"](profile=self.profile, root=self.root, checked=checked.output)
        return self._place(keys).set_caching_options(False)

    def add_step(self, stage: Stage, digests: Mapping[str, Any], cache_key: Any, checked: dsl.PipelineTask) -> Any:
        """Add the tasks of a step; returns the channel with the digest of its output."""
        inputs = {name: digests[name] for name in declaration(stage.name)["inputs"]}
        trained = {name: digest for name, digest in inputs.items() if find_stage(name).resources.pool == "training"}
        arguments = {
            "step": stage.name,
            "profile": self.profile,
            "root": self.root,
            "cache_key": cache_key,
            "declared": declaration(stage.name),
            "inputs": " ".join(f"{name}={inputs[name]}" for name in inputs if name not in trained),
            **{name.replace("-", "_"): digest for name, digest in trained.items()},  # kfp can't format these as text
        }
        if stage.sharded:
            return self._add_parts(stage, arguments, checked)
        if stage.resources.pool == "training":
            return self._add_training(stage, arguments)
        if "register_model" in stage.parameters:
            arguments["promotion"] = self.promotion
        task = self._place(self.tasks["run_step"](**arguments), stage, stage.resources.pool)
        if stage.external:
            task.set_caching_options(False)
        return task.set_display_name(stage.name).output

    def _add_parts(self, stage: Stage, arguments: Mapping[str, Any], checked: dsl.PipelineTask) -> Any:
        with dsl.ParallelFor(checked.output, name=f"{stage.name}-parts") as part:
            made = self._place(self.tasks["run_part"](**arguments, part=part), stage, stage.resources.pool)
            made.set_display_name(f"{stage.name}-part")
        task = self._place(self.tasks["commit_parts"](**arguments, made=dsl.Collected(made.output)), stage)
        return task.set_display_name(stage.name).output

    def _add_training(self, stage: Stage, arguments: Mapping[str, Any]) -> Any:
        with dsl.If(self.train_backend == "trainjob", name=f"{stage.name}-as-trainjob"):
            as_trainjob = self._place(self.tasks["run_trainjob"](**arguments, **self.trainjob), stage)
            as_trainjob.set_display_name(stage.name)
        with dsl.Else(name=f"{stage.name}-in-pod"):
            in_pod = self._place(self.tasks["run_step"](**arguments, gpus=self.trainjob["gpus"]), stage, "training")
            in_pod.set_display_name(stage.name)
        return dsl.OneOf(as_trainjob.output, in_pod.output)

    def _place(self, task: dsl.PipelineTask, stage: Stage | None = None, pool: str = "cpu") -> dsl.PipelineTask:
        kubernetes.mount_pvc(task, pvc_name=self.work_pvc, mount_path=MOUNT)
        self.pools[pool].place(task)
        hours = stage.resources.hours if stage else CONTROL_HOURS
        kubernetes.set_timeout(task, hours * 3600)
        if self.retries:
            task.set_retry(
                self.retries,
                backoff_duration=f"{BACKOFF_S}s",
                backoff_factor=2.0,
                backoff_max_duration=f"{retry_window(self.retries, hours)}s",
            )
        if stage is not None:
            _add_secrets(task, stage)
        return task


def retry_window(retries: int, hours: int) -> int:
    """Seconds in which a task must have ended: all its attempts, each pending and then running for `hours`.

    KFP passes this value to Argo as `backoff.maxDuration`. Argo counts it from when the first attempt was created,
    starts no retry after it, and kills one that still runs (Argo Workflows 4.0.5, workflow/controller: operator.go,
    processNodeRetries, and workflowpod.go, getDeadline).
    """
    waits = sum(BACKOFF_S * 2**number for number in range(retries))
    return (retries + 1) * (PENDING_HOURS + hours) * 3600 + waits


def _add_secrets(task: dsl.PipelineTask, stage: Stage) -> None:
    for secret, names in stage.secrets.items():
        kubernetes.use_secret_as_env(task, secret, secret_key_to_env={name: name for name in names}, optional=True)


def compile_to(path: Path) -> None:
    """Write the compiled pipeline: two YAML documents, the tasks and their Kubernetes settings."""
    compiler.Compiler().compile(make_pipeline(), str(path))
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    # kfp's own header lists the parameters' defaults in an order that changes from run to run
    path.write_text(HEADER + "".join(line for line in lines if not line.startswith("#")), encoding="utf-8")
