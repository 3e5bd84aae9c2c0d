"""A client for TrainJobs on the Kubernetes API server, which retries while the server does not answer."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from univigu.errors import BadInputError, ConfigError, TransientError, UniViGUError
from univigu.extras import import_extra

GROUP, VERSION, PLURAL = "trainer.kubeflow.org", "v1alpha1", "trainjobs"
NODE = "node"  # Kubeflow Trainer's name of the job and of the container in which training runs
JOB_LABEL = "jobset.sigs.k8s.io/jobset-name"
_RETRYABLE = {0, 408, 429, 500, 502, 503, 504}
_STARTING = {"ContainerCreating", "PodInitializing"}


class Cluster:
    """A connection to the API server, for one namespace; `retry_s` limits the time of retries, in seconds."""

    def __init__(self, client: Any, namespace: str, retry_s: float) -> None:
        kubernetes = import_extra("kubernetes.client")
        self.client, self.namespace, self.retry_s = client, namespace, retry_s
        self.custom, self.core = kubernetes.CustomObjectsApi(client), kubernetes.CoreV1Api(client)

    @classmethod
    @contextmanager
    def connect(cls, namespace: str | None, retry_s: float) -> Iterator["Cluster"]:
        """Connect with the pod's service account inside a cluster, and with the kubeconfig outside.

        namespace: by default that of the pod, or of the kubeconfig's current context.
        """
        client, config = import_extra("kubernetes.client"), import_extra("kubernetes.config")
        configuration, default = client.Configuration(), "default"
        try:
            if os.environ.get("KUBERNETES_SERVICE_HOST"):
                config.load_incluster_config(configuration)
                pod_namespace = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
                default = pod_namespace.read_text().strip() if pod_namespace.is_file() else default
            else:
                path = os.environ.get("KUBECONFIG")  # the client itself reads this variable only when it is imported
                config.load_kube_config(path, client_configuration=configuration)
                _, context = config.list_kube_config_contexts(path)
                default = context["context"].get("namespace", default)
        except config.ConfigException as error:
            raise ConfigError(
                f"No cluster is configured ({one_line(str(error))}); set KUBECONFIG, and check that "
                "`kubectl get trainjobs` works."
            ) from error
        configuration.retries = False  # `_request` retries, with a message
        with client.ApiClient(configuration) as connected:
            yield cls(connected, namespace or default, retry_s)

    def create(self, job: Mapping[str, Any], dry_run: bool = False) -> bool:
        """Create a TrainJob; False if the name is taken. With `dry_run` the server only validates it."""
        where = (GROUP, VERSION, self.namespace, PLURAL)
        options = {"dry_run": "All"} if dry_run else {}
        request = self.custom.create_namespaced_custom_object
        created = self._request(request, *where, dict(job), expected=(404, 409), **options)
        if created == 404:
            raise ConfigError(
                f"The cluster has no resource TrainJob ({GROUP}/{VERSION}), or no namespace '{self.namespace}'; "
                "install Kubeflow Trainer, or give another --namespace."
            )
        return created != 409

    def get(self, name: str) -> dict[str, Any] | None:
        where = (GROUP, VERSION, self.namespace, PLURAL, name)
        found = self._request(self.custom.get_namespaced_custom_object, *where, expected=(404,))
        return None if found == 404 else found

    def delete(self, name: str, wait: float) -> None:
        """Delete a TrainJob and its pods, and wait up to `wait` seconds until they are gone.

        Raises `TransientError` if they are still there after that.
        """
        where = (GROUP, VERSION, self.namespace, PLURAL, name)
        deadline = time.monotonic() + wait
        request = self.custom.delete_namespaced_custom_object
        self._request(request, *where, propagation_policy="Foreground", expected=(404, 409))
        while wait and self.get(name) is not None:
            if time.monotonic() > deadline:
                raise TransientError(
                    f"The TrainJob {self.namespace}/{name} is still being deleted after {wait:g} s; run the same "
                    "command once it is gone."
                )
            time.sleep(min(1.0, wait))

    def pods(self, name: str) -> list[Any]:
        selector = f"{JOB_LABEL}={name}"
        return self._request(self.core.list_namespaced_pod, self.namespace, label_selector=selector).items

    def log(self, pod: str, **options: Any) -> str | None:
        """A pod's log; None if the pod has not started, or is gone."""
        request = self.core.read_namespaced_pod_log
        options = {"container": NODE, "_preload_content": False, **options}
        answer = self._request(request, pod, self.namespace, expected=(400, 404), **options)
        return None if isinstance(answer, int) else answer.data.decode(errors="replace")

    def pending_reason(self, name: str, pods: Sequence[Any]) -> str:
        """Why pods have not started: from their conditions and containers, otherwise from events."""
        found = []
        for pod in pods:
            for condition in pod.status.conditions or []:
                if condition.type == "PodScheduled" and condition.status == "False":
                    found.append(f"{condition.reason}: {condition.message}")
            for status in [*(pod.status.init_container_statuses or []), *(pod.status.container_statuses or [])]:
                waiting = status.state.waiting
                if waiting and waiting.reason not in _STARTING:
                    found.append(f"{waiting.reason}: {waiting.message}")
        if not found:
            events = self._request(self.core.list_namespaced_event, self.namespace, field_selector="type=Warning").items
            found = [f"{e.reason}: {e.message}" for e in events if (e.involved_object.name or "").startswith(name)]
        unique = list(dict.fromkeys(one_line(reason)[:300] for reason in found))
        return "; ".join(unique[-3:]) or "Kubernetes gives no reason"

    def _request(self, call: Callable[..., Any], *args: Any, expected: Sequence[int] = (), **kwargs: Any) -> Any:
        """The response, or the HTTP status if it is in `expected`; raises an error of `univigu.errors` otherwise.

        Retries for up to `retry_s` seconds. Not by tenacity: with its predicate and its callback, this gets longer.
        """
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        deadline, delay = time.monotonic() + self.retry_s, 0.5
        while True:
            try:
                return call(*args, _request_timeout=(10, 60), **kwargs)
            except ApiException as error:
                if error.status in expected:
                    return error.status
                reason = _reason(error)
                if error.status not in _RETRYABLE:
                    # pyrefly: ignore[bad-argument-type]
                    raise _rejection(error.status, reason, self.namespace) from error
            except (HTTPError, OSError) as error:
                reason = type(error).__name__
            host = self.client.configuration.host
            if time.monotonic() + delay > deadline:
                raise TransientError(
                    f"The Kubernetes API server at {host} does not answer ({reason}); a TrainJob that was submitted "
                    "keeps running. Run the same command to follow it."
                )
            print(f"The API server at {host} does not answer ({reason}); trying again", file=sys.stderr, flush=True)
            time.sleep(delay)
            delay = min(2 * delay, 30.0)


def _reason(error: Any) -> str:
    """The message in the API server's response."""
    try:
        return one_line(json.loads(error.body)["message"])[:500]
    except (ValueError, KeyError, TypeError):
        return one_line(str(error.reason))[:500]


def _rejection(status: int, reason: str, namespace: str) -> UniViGUError:
    if status in (401, 403):
        return ConfigError(
            f"The API server denies access ({reason}); allow the account to create, get and delete trainjobs, and to "
            f"read pods, their logs and events, in the namespace '{namespace}'."
        )
    return BadInputError(f"The API server rejects the request ({status}: {reason}); correct the option it names.")


def one_line(text: str) -> str:
    """Text on one line, without control characters."""
    return "".join(c if c.isprintable() else " " for c in text).strip()
