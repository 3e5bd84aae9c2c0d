"""A client for runs on a Kubeflow Pipelines server: submit once, get the state, cancel, read logs.

Uses the v2beta1 API. `kfp.Client` is not used: its calls have no timeout, it prints to standard output, and its wait
for a run never returns if the run is cancelled. The token is read again for each call, from the file in
KF_PIPELINES_SA_TOKEN_PATH or from the variable KFP_TOKEN; no message and no command line contains it, and over plain
http it is sent to this machine only.
"""

import ipaddress
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from components.orchestration.kfp_releases import check_release
from components.pipeline.digests import json_digest
from univigu.errors import BadInputError, ConfigError, MissingInputError, TransientError, UniViGUError
from univigu.files import file_sha256, read_yaml_documents

if TYPE_CHECKING:
    from kfp_server_api import V2beta1Run

ENDPOINTS = ("KFP_ENDPOINT", "KF_PIPELINES_ENDPOINT")  # variables that the kfp command and kfp.Client read
TOKEN_FILE, TOKEN = "KF_PIPELINES_SA_TOKEN_PATH", "KFP_TOKEN"
MOUNTED_TOKEN = Path("/var/run/secrets/kubeflow/pipelines/token")
EXPERIMENT = "uni-vigu"
POD_LOG = "/apis/v1alpha1/runs/{run_id}/nodes/{node_id}/log"
DELAY_S = 1.0
SETTLE_S = 1.5  # longer than the resolution of the server's clock
TERMINAL = frozenset({"SUCCEEDED", "FAILED", "CANCELED", "SKIPPED"})
CANCELING = "CANCELING"  # cancelled, but not ended yet
ATTEMPTS = 4
_TYPES = {"NUMBER_INTEGER": int, "NUMBER_DOUBLE": (int, float), "BOOLEAN": bool, "LIST": list, "STRUCT": dict}


class RunFailedError(UniViGUError):
    """A run on the server failed."""

    exit_code = 83


class RunCanceledError(UniViGUError):
    """A run on the server was cancelled."""

    exit_code = 84


class RunState(NamedTuple):
    """A run's state, in KFP's terms, and the server's message about it."""

    state: str
    message: str

    @property
    def is_terminal(self) -> bool:
        return self.state in TERMINAL


class KfpServer:
    """The server at `host`, by default at the address in KFP_ENDPOINT or KF_PIPELINES_ENDPOINT.

    namespace: for multi-user servers. A call that fails temporarily is retried after `delay_s` seconds (`DELAY_S`),
    with doubled delays, and finally raises `TransientError`; retries never submit a run twice. `settle_s` seconds
    (`SETTLE_S`) after a submission, `submit` checks whether another process was first.
    """

    def __init__(
        self,
        host: str = "",
        namespace: str = "",
        timeout_s: int = 30,
        delay_s: float | None = None,
        settle_s: float | None = None,
    ) -> None:
        import kfp_server_api as api

        host = host or next((os.environ[name] for name in ENDPOINTS if os.environ.get(name)), "")
        if not host:
            raise ConfigError(f"No Kubeflow Pipelines server is given; use --host, or set {ENDPOINTS[0]}.")
        self.host = (host if "://" in host else f"https://{host}").rstrip("/")
        if "@" in urlsplit(self.host).netloc:
            raise ConfigError(
                f"The address of the Kubeflow Pipelines server contains a user name or password; remove them, and set "
                f"{TOKEN} or {TOKEN_FILE}."
            )
        if urlsplit(self.host).scheme not in ("http", "https") or not urlsplit(self.host).hostname:
            raise ConfigError(f"'{host}' is not a server address; use the form https://kfp.example.com.")
        self.namespace, self.timeout_s = namespace, timeout_s
        self.delay_s = DELAY_S if delay_s is None else delay_s
        self.settle_s = SETTLE_S if settle_s is None else settle_s
        self._config = api.Configuration(host=self.host)
        self._config.retries = False
        self._client = api.ApiClient(self._config)
        self._runs, self._experiments = api.RunServiceApi(self._client), api.ExperimentServiceApi(self._client)

    def submit(
        self,
        package: Path,
        run_name: str,
        arguments: Mapping[str, Any],
        experiment: str = EXPERIMENT,
        service_account: str = "",
    ) -> str:
        """Start a run of a compiled pipeline, unless a run of this name is active or succeeded; returns the run's id.

        Raises `ConfigError` for arguments that the pipeline doesn't have and for a server that is too old,
        `BadInputError` if the existing run has other arguments, and `TransientError` while it is being cancelled.
        """
        import kfp_server_api as api

        pipeline, platform = read_package(package)
        parameters = typed_arguments(package, arguments)
        check_release(self.version(), self.host)
        experiment_id = self._experiment_id(experiment) or self._create_experiment(experiment)
        body = api.V2beta1Run(
            display_name=run_name,
            experiment_id=experiment_id,
            pipeline_spec={"pipeline_spec": pipeline, "platform_spec": platform} if platform else pipeline,
            runtime_config=api.V2beta1RuntimeConfig(parameters=parameters),
            service_account=service_account or None,
        )
        # Not by tenacity: only the create call is retried, and only if no run of this name is there yet
        for attempt in range(ATTEMPTS):
            # Before each attempt: the server may have created the run, and only its response was lost.
            if live := self._live_runs(run_name, experiment_id):
                same = [run for run in live if _parameters(run) == parameters]
                return _reuse((same or live)[0], parameters)
            try:
                own = self._call(self._runs.run_service_create_run, body, attempts=1).run_id
            except TransientError:
                if attempt == ATTEMPTS - 1:
                    raise
                time.sleep(self.delay_s * 2**attempt)
                continue
            time.sleep(self.settle_s)
            live = self._live_runs(run_name, experiment_id)
            if not live or live[0].run_id == own:
                return own
            self._call(self._runs.run_service_terminate_run, own)  # another process was first
            return _reuse(live[0], parameters)
        raise AssertionError("unreachable")

    def state(self, run_id: str) -> RunState:
        """The state of a run; raises `MissingInputError` if the server has no run with this id.

        KFP records a cancelled run as failed when it has ended; only its history says that it was being cancelled
        (Kubeflow Pipelines 2.17.0, backend/src/apiserver/resource/resource_manager.go).
        """
        run = self._run(run_id)
        if run.state == "FAILED" and any(past.state == CANCELING for past in run.state_history or []):
            return RunState("CANCELED", "")
        details = run.run_details.task_details or [] if run.run_details else []
        failed = [f"{task.display_name} {_message(task.error)}".strip() for task in details if task.state == "FAILED"]
        # pyrefly: ignore[no-matching-overload]
        return RunState(run.state or "PENDING", "; ".join(filter(None, [_message(run.error), *failed])))

    def cancel(self, run_id: str) -> RunState:
        """Cancel a run, unless it has ended; returns its state afterwards."""
        if not self.state(run_id).is_terminal:
            self._call(self._runs.run_service_terminate_run, run_id)
        return self.state(run_id)

    def arguments(self, run_id: str) -> dict[str, Any]:
        """The parameters that a run was submitted with."""
        return _parameters(self._run(run_id))

    def logs(self, run_id: str, task: str = "") -> Iterator[tuple[str, str]]:
        """(task, log) for each pod of a run, or of one of its tasks; logs that are gone are skipped."""
        details = self._run(run_id).run_details
        for detail in (details.task_details or []) if details else []:
            if task and detail.display_name != task:
                continue
            for pod in filter(None, [detail.pod_name, *(child.pod_name for child in detail.child_tasks or [])]):
                with suppress(MissingInputError):
                    yield detail.display_name, self._call(self._text, POD_LOG, {"run_id": run_id, "node_id": pod})

    def version(self) -> str:
        """The server's release, such as 2.17.0; "" if it names none (2.17.0, backend/src/apiserver/main.go)."""
        with suppress(BadInputError, ValueError, AttributeError):
            return str(json.loads(self._call(self._text, "/apis/v2beta1/healthz", {})).get("tag_name", ""))
        return ""

    def _text(self, path: str, path_params: Mapping[str, str], _request_timeout: int) -> str:
        response = self._client.call_api(
            path,
            "GET",
            path_params=path_params,
            auth_settings=["Bearer"],
            _preload_content=False,  # text, which the client would parse
            _return_http_data_only=True,
            _request_timeout=_request_timeout,
        )
        # pyrefly: ignore[missing-attribute]
        return response.data.decode(errors="replace")

    def _run(self, run_id: str) -> "V2beta1Run":
        return self._call(self._runs.run_service_get_run, run_id)

    def _experiment_id(self, name: str) -> str | None:
        answer = self._call(
            self._experiments.experiment_service_list_experiments, filter=_name_filter(name), namespace=self.namespace
        )
        return answer.experiments[0].experiment_id if answer.experiments else None

    def _create_experiment(self, name: str) -> str:
        import kfp_server_api as api

        body = api.V2beta1Experiment(display_name=name, namespace=self.namespace or None)
        try:
            return self._call(self._experiments.experiment_service_create_experiment, body).experiment_id
        except BadInputError:  # it may exist: another process created it, or a response was lost
            if found := self._experiment_id(name):
                return found
            raise

    def _live_runs(self, run_name: str, experiment_id: str) -> list["V2beta1Run"]:
        """The active and the succeeded runs of this name, oldest first; runs that are being cancelled come last."""
        found, page = [], ""
        while True:
            answer = self._call(
                self._runs.run_service_list_runs,
                experiment_id=experiment_id,
                namespace=self.namespace,
                filter=_name_filter(run_name),
                sort_by="created_at desc",
                page_size=100,
                page_token=page,
            )
            found += [
                run
                for run in answer.runs or []
                if run.display_name == run_name and run.state not in TERMINAL - {"SUCCEEDED"}
            ]
            page = answer.next_page_token
            if not page:
                return sorted(found, key=lambda run: (run.state == CANCELING, run.created_at, run.run_id))

    def _call(self, method: Callable, *arguments: Any, attempts: int = ATTEMPTS, **options: Any) -> Any:
        """Call a method of the API; retries transient failures, and raises errors of `univigu.errors`."""
        retrying = Retrying(
            retry=retry_if_exception_type(TransientError),
            wait=wait_exponential(self.delay_s),
            stop=stop_after_attempt(attempts),
            reraise=True,
        )
        return retrying(self._call_once, method, *arguments, **options)

    def _call_once(self, method: Callable, *arguments: Any, **options: Any) -> Any:
        from kfp_server_api import ApiException
        from urllib3.exceptions import HTTPError

        self._set_token()
        try:
            answer = method(*arguments, **options, _request_timeout=self.timeout_s)
            # pyrefly: ignore[not-iterable]
            if not isinstance(answer, str) and "json" not in self._client.last_response.getheader("Content-Type", ""):
                raise ValueError("no JSON")  # a login page, which the client would return as an empty answer
            return answer
        except ApiException as error:
            raise self._explain(error) from error
        except HTTPError as error:  # connection failed or lost
            raise TransientError(
                f"The Kubeflow Pipelines server at {self.host} does not answer ({type(error).__name__}); check the "
                "address and the network, and run the same command again."
            ) from error
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"{self.host} is not a Kubeflow Pipelines server; check --host.") from error

    def _set_token(self) -> None:
        path = Path(os.environ.get(TOKEN_FILE) or MOUNTED_TOKEN)
        try:
            token = path.read_text(encoding="utf-8").strip()
        except OSError as error:
            if os.environ.get(TOKEN_FILE):
                raise ConfigError(f"The file that {TOKEN_FILE} names can't be read ({error.strerror}).") from error
            token = os.environ.get(TOKEN, "")
        if token and urlsplit(self.host).scheme == "http" and not _is_this_machine(urlsplit(self.host).hostname or ""):
            raise ConfigError(
                f"A token would be readable on its way to {self.host}; give an address with https, or reach the server "
                "by `kubectl port-forward`."
            )
        if token:
            self._config.api_key["authorization"] = token
            self._config.api_key_prefix["authorization"] = "Bearer"

    def _explain(self, error: Any) -> UniViGUError:
        """The error of `univigu.errors` for a response that reports a failure."""
        reason = _error_reason(error)
        if error.status == 404:
            return MissingInputError(f"The server at {self.host} does not have what was requested ({reason}).")
        if error.status in (401, 403) or 300 <= (error.status or 0) < 400:
            return ConfigError(
                f"The server at {self.host} denies access (status {error.status}); set {TOKEN} or {TOKEN_FILE}, and "
                f"check --namespace."
            )
        if error.status in (408, 425, 429) or not error.status or error.status >= 500:
            return TransientError(
                f"The server at {self.host} failed (status {error.status}: {reason}); run the same command again later."
            )
        return BadInputError(f"The server at {self.host} rejects the request: {reason}.")


def _is_this_machine(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_package(package: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two documents of a compiled pipeline: its tasks, and their Kubernetes settings."""
    try:
        documents = read_yaml_documents(package)
    except FileNotFoundError as error:
        raise MissingInputError(
            f"There is no compiled pipeline at {package}; run `univigu pipeline compile` first."
        ) from error
    except (OSError, ValueError) as error:
        raise BadInputError(f"{package} is not valid YAML; run `univigu pipeline compile` again.") from error
    if not documents or not isinstance(documents[0], dict) or "pipelineInfo" not in documents[0]:
        raise BadInputError(f"{package} is not a compiled pipeline; use a file from `univigu pipeline compile`.")
    return documents[0], documents[1] if len(documents) > 1 else {}


def typed_arguments(package: Path, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Convert arguments to the types that the pipeline declares; strings are parsed as JSON for all other types.

    Raises `ConfigError` for an unknown parameter and for a value of the wrong type.
    """
    pipeline, _ = read_package(package)
    declared = pipeline["root"].get("inputDefinitions", {}).get("parameters", {})
    typed: dict[str, Any] = {}
    for name, value in arguments.items():
        if name not in declared:
            raise ConfigError(f"The pipeline has no parameter '{name}'; it has {', '.join(sorted(declared))}.")
        kind = declared[name]["parameterType"]
        if kind == "STRING":
            typed[name] = str(value)
            continue
        try:
            typed[name] = json.loads(value) if isinstance(value, str) else value
        except ValueError as error:
            raise ConfigError(f"'{name}' must be JSON of type {kind}, not '{value}'.") from error
        if not isinstance(typed[name], _TYPES[kind]) or (kind != "BOOLEAN" and isinstance(typed[name], bool)):
            raise ConfigError(f"'{name}' must be of type {kind}, not {json.dumps(typed[name])}.")
        if kind == "NUMBER_DOUBLE":
            typed[name] = float(typed[name])  # kfp's local runner does not accept an integer
    return typed


def default_run_name(package: Path, arguments: Mapping[str, Any]) -> str:
    """A run name from the pipeline and its arguments: the same pipeline with the same arguments has the same name."""
    pipeline, _ = read_package(package)
    digest = json_digest([file_sha256(package), typed_arguments(package, arguments)])
    return f"{pipeline['pipelineInfo']['name']}-{digest[:10]}"


def _parameters(run: "V2beta1Run") -> dict[str, Any]:
    return dict((run.runtime_config.parameters if run.runtime_config else None) or {})


def _reuse(run: "V2beta1Run", parameters: Mapping[str, Any]) -> str:
    """The id of an existing run, if it has these parameters and is not being cancelled."""
    existing = _parameters(run)
    if existing != parameters:
        differing = sorted(key for key in {*existing, *parameters} if existing.get(key) != parameters.get(key))
        raise BadInputError(
            f"There is a run '{run.display_name}' with other arguments ({', '.join(differing)}): {run.run_id}; use "
            "another name."
        )
    if run.state == CANCELING:
        raise TransientError(
            f"The run {run.run_id} of this name is being cancelled; run the same command again when it has ended."
        )
    # pyrefly: ignore[bad-return]
    return run.run_id


def _name_filter(name: str) -> str:
    return json.dumps({"predicates": [{"operation": "EQUALS", "key": "display_name", "stringValue": name}]})


def _message(status: Any) -> str:
    return " ".join((status.message or "").split()) if status else ""


def _error_reason(error: Any) -> str:
    """The reason in the server's response, in one line of at most 300 characters."""
    try:
        body = json.loads(error.body)
        text = str(body.get("error") or body.get("message") or error.reason)
    except (ValueError, TypeError, AttributeError):
        text = str(error.reason)
    return " ".join(text.split())[:300].rstrip(".")
