"""A Kubeflow Pipelines server, as far as a run needs it: submit it once, see how it is, cancel it, read its logs.

Over the v2beta1 API. `kfp.Client` isn't used: its calls have no time limit, it prints, and waiting with it never ends
on a cancelled run. Tokens are read anew for each call, from the file in KF_PIPELINES_SA_TOKEN_PATH or the variable
KFP_TOKEN; no message and no command line holds one.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from components.pipeline.digests import json_digest
from univigu.errors import BadInputError, ConfigError, MissingInputError, TransientError, UniViGUError
from univigu.files import file_sha256, read_yaml_documents

if TYPE_CHECKING:
    from kfp_server_api import V2beta1Run

ENDPOINTS = ("KFP_ENDPOINT", "KF_PIPELINES_ENDPOINT")  # as the kfp command reads it, and as kfp.Client does
TOKEN_FILE, TOKEN = "KF_PIPELINES_SA_TOKEN_PATH", "KFP_TOKEN"
MOUNTED_TOKEN = Path("/var/run/secrets/kubeflow/pipelines/token")
EXPERIMENT = "uni-vigu"
TERMINAL = frozenset({"SUCCEEDED", "FAILED", "CANCELED", "SKIPPED"})
CANCELING = "CANCELING"  # asked to stop, and not ended yet
ATTEMPTS = 4
_TYPES = {"NUMBER_INTEGER": int, "NUMBER_DOUBLE": (int, float), "BOOLEAN": bool, "LIST": list, "STRUCT": dict}


class RunFailedError(UniViGUError):
    """A run on the server failed."""

    exit_code = 83


class RunCanceledError(UniViGUError):
    """A run on the server was cancelled."""

    exit_code = 84


class RunState(NamedTuple):
    """KFP's own word for a run's state, and what the server says of it."""

    state: str
    message: str

    @property
    def is_terminal(self) -> bool:
        return self.state in TERMINAL


class KfpServer:
    """The server at `host`; without one, at the address in KFP_ENDPOINT or KF_PIPELINES_ENDPOINT.

    `namespace` is for servers with several users. A call that fails for a passing reason is made again, after `delay_s`
    and then twice as long each time; after that it raises `TransientError`. Nothing is submitted twice for it. Who has
    submitted looks once more after `settle_s`, longer than the server's clock ticks, whether somebody else was first.
    """

    def __init__(
        self, host: str = "", namespace: str = "", timeout_s: int = 30, delay_s: float = 1.0, settle_s: float = 1.5
    ) -> None:
        import kfp_server_api as api

        host = host or next((os.environ[name] for name in ENDPOINTS if os.environ.get(name)), "")
        if not host:
            raise ConfigError(f"No Kubeflow Pipelines server is named; give --host, or set {ENDPOINTS[0]}.")
        self.host = (host if "://" in host else f"https://{host}").rstrip("/")
        if "@" in urlsplit(self.host).netloc:
            raise ConfigError(
                f"The address of the Kubeflow Pipelines server holds a user or a password; leave them out, and set "
                f"{TOKEN} or {TOKEN_FILE}."
            )
        if urlsplit(self.host).scheme not in ("http", "https") or not urlsplit(self.host).hostname:
            raise ConfigError(f"'{host}' is no address of a server; give one such as https://kfp.example.com.")
        self.namespace, self.timeout_s, self.delay_s, self.settle_s = namespace, timeout_s, delay_s, settle_s
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
        """Start a run of a compiled pipeline and return its id; a run of this name that lives or succeeded is that run.

        Raises `ConfigError` for arguments that the pipeline doesn't take, `BadInputError` where the run of this name
        has other arguments, and `TransientError` while it is being cancelled.
        """
        import kfp_server_api as api

        pipeline, platform = read_package(package)
        parameters = typed_arguments(package, arguments)
        experiment_id = self._experiment_id(experiment) or self._create_experiment(experiment)
        body = api.V2beta1Run(
            display_name=run_name,
            experiment_id=experiment_id,
            pipeline_spec={"pipeline_spec": pipeline, "platform_spec": platform} if platform else pipeline,
            runtime_config=api.V2beta1RuntimeConfig(parameters=parameters),
            service_account=service_account or None,
        )
        for attempt in range(ATTEMPTS):
            # Also before another attempt: the server may have taken the last one, and only its answer been lost.
            if live := self._live_runs(run_name, experiment_id):
                same = [run for run in live if _parameters(run) == parameters]
                return _followed((same or live)[0], parameters)
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
            self._call(self._runs.run_service_terminate_run, own)  # somebody else was first
            return _followed(live[0], parameters)
        raise AssertionError("unreachable")

    def state(self, run_id: str) -> RunState:
        """How a run is; raises `MissingInputError` where the server has none of this id."""
        run = self._run(run_id)
        details = run.run_details.task_details or [] if run.run_details else []
        failed = [f"{task.display_name} {_said(task.error)}".strip() for task in details if task.state == "FAILED"]
        # pyrefly: ignore[no-matching-overload]
        return RunState(run.state or "PENDING", "; ".join(filter(None, [_said(run.error), *failed])))

    def cancel(self, run_id: str) -> RunState:
        """Ask the server to stop a run; one that has ended stays as it is. Returns its state afterwards."""
        if not self.state(run_id).is_terminal:
            self._call(self._runs.run_service_terminate_run, run_id)
        return self.state(run_id)

    def arguments(self, run_id: str) -> dict[str, Any]:
        """The pipeline's parameters that a run was submitted with."""
        return _parameters(self._run(run_id))

    def logs(self, run_id: str, task: str = "") -> Iterator[tuple[str, str]]:
        """(task, log) for each pod of a run that the server knows, or of one task; a log that is gone is left out."""
        details = self._run(run_id).run_details
        for detail in (details.task_details or []) if details else []:
            if task and detail.display_name != task:
                continue
            for pod in [detail.pod_name, *(child.pod_name for child in detail.child_tasks or [])]:
                if pod:
                    try:
                        yield detail.display_name, self._call(self._log, run_id, pod)
                    except MissingInputError:
                        continue

    def _log(self, run_id: str, pod: str, _request_timeout: int) -> str:
        response = self._client.call_api(
            "/apis/v1alpha1/runs/{run_id}/nodes/{node_id}/log",
            "GET",
            path_params={"run_id": run_id, "node_id": pod},
            auth_settings=["Bearer"],
            _preload_content=False,
            _return_http_data_only=True,
            _request_timeout=_request_timeout,
        )
        # pyrefly: ignore[missing-attribute]
        return response.data.decode(errors="replace")

    def _run(self, run_id: str) -> "V2beta1Run":
        return self._call(self._runs.run_service_get_run, run_id)

    def _experiment_id(self, name: str) -> str | None:
        answer = self._call(
            self._experiments.experiment_service_list_experiments, filter=_named(name), namespace=self.namespace
        )
        return answer.experiments[0].experiment_id if answer.experiments else None

    def _create_experiment(self, name: str) -> str:
        import kfp_server_api as api

        body = api.V2beta1Experiment(display_name=name, namespace=self.namespace or None)
        try:
            return self._call(self._experiments.experiment_service_create_experiment, body).experiment_id
        except BadInputError:  # perhaps since it is there: somebody else's, or an answer was lost
            if found := self._experiment_id(name):
                return found
            raise

    def _live_runs(self, run_name: str, experiment_id: str) -> list["V2beta1Run"]:
        """The runs of this name that are under way or succeeded: first what isn't being cancelled, the oldest first."""
        found, page = [], ""
        while True:
            answer = self._call(
                self._runs.run_service_list_runs,
                experiment_id=experiment_id,
                namespace=self.namespace,
                filter=_named(run_name),
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
        from kfp_server_api import ApiException
        from urllib3.exceptions import HTTPError

        for attempt in range(attempts):
            self._set_token()
            try:
                answer = method(*arguments, **options, _request_timeout=self.timeout_s)
                # pyrefly: ignore[not-iterable]
                if not isinstance(answer, str) and "json" not in self._client.last_response.getheader(
                    "Content-Type", ""
                ):
                    raise ValueError("no JSON")  # a login page, which the client would take for an empty answer
                return answer
            except ApiException as error:
                failure: UniViGUError = self._explain(error)
                cause: Exception = error
            except HTTPError as error:  # no connection, or none that lasted
                failure = TransientError(
                    f"The Kubeflow Pipelines server at {self.host} does not answer ({type(error).__name__}); "
                    "check the address and the network, and run the same command again."
                )
                cause = error
            except (ValueError, TypeError, AttributeError) as error:
                raise ConfigError(
                    f"What answers at {self.host} is no Kubeflow Pipelines server; check --host."
                ) from error
            if not isinstance(failure, TransientError) or attempt == attempts - 1:
                raise failure from cause
            time.sleep(self.delay_s * 2**attempt)
        raise AssertionError("unreachable")

    def _set_token(self) -> None:
        path = Path(os.environ.get(TOKEN_FILE) or MOUNTED_TOKEN)
        try:
            token = path.read_text(encoding="utf-8").strip()
        except OSError as error:
            if os.environ.get(TOKEN_FILE):
                raise ConfigError(f"The file that {TOKEN_FILE} names can't be read ({error.strerror}).") from error
            token = os.environ.get(TOKEN, "")
        if token:
            self._config.api_key["authorization"] = token
            self._config.api_key_prefix["authorization"] = "Bearer"

    def _explain(self, error: Any) -> UniViGUError:
        """What a person should know of an answer that isn't a success."""
        said = _body(error)
        if error.status == 404:
            return MissingInputError(f"The server at {self.host} doesn't know what was asked for ({said}).")
        if error.status in (401, 403) or 300 <= (error.status or 0) < 400:
            return ConfigError(
                f"The server at {self.host} refuses the request (status {error.status}); "
                f"set {TOKEN} or {TOKEN_FILE}, and give the right --namespace."
            )
        if error.status in (408, 425, 429) or not error.status or error.status >= 500:
            return TransientError(
                f"The server at {self.host} failed (status {error.status}: {said}); run the same command again later."
            )
        return BadInputError(f"The server at {self.host} does not take the request: {said}.")


def read_package(package: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two documents of a compiled pipeline: its tasks, and what is asked of Kubernetes."""
    try:
        documents = read_yaml_documents(package)
    except FileNotFoundError as error:
        raise MissingInputError(
            f"There is no compiled pipeline {package}; run `univigu pipeline compile` first."
        ) from error
    except (OSError, ValueError) as error:
        raise BadInputError(f"{package} can't be read as YAML; run `univigu pipeline compile` again.") from error
    if not documents or not isinstance(documents[0], dict) or "pipelineInfo" not in documents[0]:
        raise BadInputError(f"{package} is no compiled pipeline; give one that `univigu pipeline compile` has written.")
    return documents[0], documents[1] if len(documents) > 1 else {}


def typed_arguments(package: Path, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with the types that the pipeline declares; text is read as JSON where it isn't to be text.

    Raises `ConfigError` for a name or a value that the pipeline doesn't take.
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
            raise ConfigError(f"'{name}' takes JSON of type {kind}, which '{value}' is not.") from error
        if not isinstance(typed[name], _TYPES[kind]) or (kind != "BOOLEAN" and isinstance(typed[name], bool)):
            raise ConfigError(f"'{name}' takes a value of type {kind}, which {json.dumps(typed[name])} is not.")
        if kind == "NUMBER_DOUBLE":
            typed[name] = float(typed[name])  # kfp's local runner takes no other for one
    return typed


def default_run_name(package: Path, arguments: Mapping[str, Any]) -> str:
    """A name that says what is run: the same pipeline with the same arguments has the same name."""
    pipeline, _ = read_package(package)
    digest = json_digest([file_sha256(package), typed_arguments(package, arguments)])
    return f"{pipeline['pipelineInfo']['name']}-{digest[:10]}"


def _parameters(run: "V2beta1Run") -> dict[str, Any]:
    return dict((run.runtime_config.parameters if run.runtime_config else None) or {})


def _followed(run: "V2beta1Run", parameters: Mapping[str, Any]) -> str:
    """The id of a run that was there before, if it does what is asked for."""
    there = _parameters(run)
    if there != parameters:
        differing = sorted(key for key in {*there, *parameters} if there.get(key) != parameters.get(key))
        raise BadInputError(
            f"There is a run '{run.display_name}' with other arguments ({', '.join(differing)}): {run.run_id}; give "
            "another name."
        )
    if run.state == CANCELING:
        raise TransientError(
            f"The run {run.run_id} of this name is being cancelled; run the same command again when that is done."
        )
    # pyrefly: ignore[bad-return]
    return run.run_id


def _named(name: str) -> str:
    return json.dumps({"predicates": [{"operation": "EQUALS", "key": "display_name", "stringValue": name}]})


def _said(status: Any) -> str:
    return " ".join((status.message or "").split()) if status else ""


def _body(error: Any) -> str:
    """What the server gave as its reason, in one line of bounded length."""
    try:
        body = json.loads(error.body)
        text = str(body.get("error") or body.get("message") or error.reason)
    except (ValueError, TypeError, AttributeError):
        text = str(error.reason)
    return " ".join(text.split())[:300].rstrip(".")
