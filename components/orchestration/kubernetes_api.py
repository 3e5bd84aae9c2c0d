"""What is asked of a Kubernetes API server about TrainJobs, again and again where it doesn't answer."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from univigu.errors import BadInputError, ConfigError, TransientError, UniViGUError

GROUP, VERSION, PLURAL = "trainer.kubeflow.org", "v1alpha1", "trainjobs"
NODE = "node"  # what Kubeflow Trainer calls the job, and the container, in which training runs
JOB_LABEL = "jobset.sigs.k8s.io/jobset-name"
_WORTH_ANOTHER_TRY = {0, 408, 429, 500, 502, 503, 504}
_NOT_YET = {"ContainerCreating", "PodInitializing"}


class Cluster:
    """A connection to the API server, for one namespace."""

    def __init__(self, client: Any, namespace: str, patience: float) -> None:
        kubernetes = import_extra("kubernetes.client")
        self.client, self.namespace, self.patience = client, namespace, patience
        self.custom, self.core = kubernetes.CustomObjectsApi(client), kubernetes.CoreV1Api(client)

    @classmethod
    @contextmanager
    def connect(cls, namespace: str | None, patience: float) -> Iterator["Cluster"]:
        """With the pod's service account inside a cluster, and with the kubeconfig outside."""
        client, config = import_extra("kubernetes.client"), import_extra("kubernetes.config")
        configuration, present = client.Configuration(), "default"
        try:
            if os.environ.get("KUBERNETES_SERVICE_HOST"):
                config.load_incluster_config(configuration)
                own = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
                present = own.read_text().strip() if own.is_file() else present
            else:
                where = os.environ.get("KUBECONFIG")  # the client looks at it when it is imported, and not again
                config.load_kube_config(where, client_configuration=configuration)
                _, context = config.list_kube_config_contexts(where)
                present = context["context"].get("namespace", present)
        except config.ConfigException as error:
            raise ConfigError(
                f"There is no cluster to be found ({one_line(str(error))}); set KUBECONFIG, and see whether "
                "`kubectl get trainjobs` works."
            ) from error
        configuration.retries = False  # `_ask` does, and says so
        with client.ApiClient(configuration) as connected:
            yield cls(connected, namespace or present, patience)

    def create(self, job: Mapping[str, Any], dry_run: bool = False) -> bool:
        """Create a TrainJob; False where there is one of that name. A dry run has it checked, and not created."""
        where = (GROUP, VERSION, self.namespace, PLURAL)
        how = {"dry_run": "All"} if dry_run else {}
        request = self.custom.create_namespaced_custom_object
        created = self._ask(request, *where, dict(job), expected=(404, 409), **how)
        if created == 404:
            raise ConfigError(
                f"The cluster has no TrainJobs ({GROUP}/{VERSION}), or no namespace '{self.namespace}'; install "
                "Kubeflow Trainer, or give another --namespace."
            )
        return created != 409

    def get(self, name: str) -> dict[str, Any] | None:
        where = (GROUP, VERSION, self.namespace, PLURAL, name)
        found = self._ask(self.custom.get_namespaced_custom_object, *where, expected=(404,))
        return None if found == 404 else found

    def delete(self, name: str, wait: float) -> None:
        """Delete a TrainJob and its pods, and wait up to `wait` seconds for them to be gone; raises where they stay."""
        where = (GROUP, VERSION, self.namespace, PLURAL, name)
        deadline = time.monotonic() + wait
        request = self.custom.delete_namespaced_custom_object
        self._ask(request, *where, propagation_policy="Foreground", expected=(404, 409))
        while wait and self.get(name) is not None:
            if time.monotonic() > deadline:
                raise TransientError(
                    f"The TrainJob {self.namespace}/{name} is still being deleted after {wait:g} s; run the same "
                    "command once it is gone."
                )
            time.sleep(min(1.0, wait))

    def pods(self, name: str) -> list[Any]:
        selector = f"{JOB_LABEL}={name}"
        return self._ask(self.core.list_namespaced_pod, self.namespace, label_selector=selector).items

    def log(self, pod: str, **options: Any) -> str | None:
        """A pod's log, or None where there is none yet, or none any more."""
        request = self.core.read_namespaced_pod_log
        options = {"container": NODE, "_preload_content": False, **options}
        answer = self._ask(request, pod, self.namespace, expected=(400, 404), **options)
        return None if isinstance(answer, int) else answer.data.decode(errors="replace")

    def why_not_started(self, name: str, pods: Sequence[Any]) -> str:
        """What Kubernetes says about pods that don't start: conditions and containers, and else events."""
        said = []
        for pod in pods:
            for condition in pod.status.conditions or []:
                if condition.type == "PodScheduled" and condition.status == "False":
                    said.append(f"{condition.reason}: {condition.message}")
            for status in [*(pod.status.init_container_statuses or []), *(pod.status.container_statuses or [])]:
                waiting = status.state.waiting
                if waiting and waiting.reason not in _NOT_YET:
                    said.append(f"{waiting.reason}: {waiting.message}")
        if not said:
            events = self._ask(self.core.list_namespaced_event, self.namespace, field_selector="type=Warning").items
            said = [f"{e.reason}: {e.message}" for e in events if (e.involved_object.name or "").startswith(name)]
        unique = list(dict.fromkeys(one_line(one)[:300] for one in said))
        return "; ".join(unique[-3:]) or "Kubernetes gives no reason"

    def _ask(self, request: Callable[..., Any], *args: Any, expected: Sequence[int] = (), **kwargs: Any) -> Any:
        """The answer, or the status if it is one of `expected`; raises an error of `univigu.errors` for another."""
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        deadline, pause = time.monotonic() + self.patience, 0.5
        while True:
            try:
                return request(*args, _request_timeout=(10, 60), **kwargs)
            except ApiException as error:
                if error.status in expected:
                    return error.status
                said = _message(error)
                if error.status not in _WORTH_ANOTHER_TRY:
                    # pyrefly: ignore[bad-argument-type]
                    raise _refusal(error.status, said, self.namespace) from error
            except (HTTPError, OSError) as error:
                said = type(error).__name__
            host = self.client.configuration.host
            if time.monotonic() + pause > deadline:
                raise TransientError(
                    f"The Kubernetes API server at {host} doesn't answer ({said}); a TrainJob that was submitted goes "
                    "on. Run the same command to follow it."
                )
            print(f"The API server at {host} doesn't answer ({said}); trying again", file=sys.stderr, flush=True)
            time.sleep(pause)
            pause = min(2 * pause, 30.0)


def _message(error: Any) -> str:
    """What the API server says in the Status of an error."""
    try:
        return one_line(json.loads(error.body)["message"])[:500]
    except (ValueError, KeyError, TypeError):
        return one_line(str(error.reason))[:500]


def _refusal(status: int, said: str, namespace: str) -> UniViGUError:
    if status in (401, 403):
        return ConfigError(
            f"The API server refuses ({said}); give the account the rights to create, get and delete trainjobs and to "
            f"read pods, their logs and events in '{namespace}'."
        )
    return BadInputError(f"The API server doesn't take the request ({status}: {said}); mend the option it names.")


def import_extra(module: str) -> Any:
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"The package '{module.partition('.')[0]}' is missing; install the cluster's extras: "
            "`pip install 'uni-vigu[cluster]'`."
        ) from error


def one_line(text: str) -> str:
    """What a server says, on one line and without control characters."""
    return "".join(c if c.isprintable() else " " for c in text).strip()
