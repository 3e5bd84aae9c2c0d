"""`make airflow`: all of Airflow on one machine, until Ctrl-C; no process is left behind.

Starts the processes of `airflow standalone`, except the two log servers, which listen on all interfaces and are not
needed on the machine that has the log files. Tasks have their own process groups, so each Airflow process gets its own
session, and all processes of these sessions are stopped. All state (SQLite, logs, the password) is in one folder, so
the next start continues where this one ended.
"""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from components.orchestration.approval import OWN
from univigu.errors import BusyError, ConfigError, UniViGUError

REPO = Path(__file__).resolve().parents[2]
DAGS = ("new_data", "retrain")
PROCESSES = (
    ("api-server",),
    ("scheduler", "--skip-serve-logs"),
    ("dag-processor",),
    ("triggerer", "--skip-serve-logs"),
)
START_S = 600.0  # for a busy machine; usually it takes about a minute
GRACE_S = 15.0
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PASSWORDS = "passwords.json"


def main(
    root: Annotated[Path, typer.Option(help="The work root: the folder that the steps read and write.")] = REPO,
    home: Annotated[Path, typer.Option(help="Airflow's folder for its database, logs and password.")] = REPO
    / ".univigu/airflow",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port of the web UI and the REST API.")] = 8080,
) -> None:
    """Start Airflow on this machine, print its address and login, and stop everything on Ctrl-C."""

    def stop(*_: object) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # stopping takes some seconds; ignore further signals
        raise KeyboardInterrupt

    for number in STOP_SIGNALS:
        signal.signal(number, stop)
    try:
        with AirflowServer(home, root, port) as server:
            print(f"Airflow is starting, which takes about a minute; its logs are in {server.home}", flush=True)
            server.wait_until_ready()
            print(f"Airflow:  {server.url}\nLogin:    {server.user}, password {server.password()}", flush=True)
            print("The DAGs are paused until you enable them; stop Airflow with Ctrl-C.", flush=True)
            server.wait()
    except UniViGUError as error:
        print(f"airflow: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("airflow: stopped; the next `make airflow` continues from here.", file=sys.stderr)


class AirflowServer:
    """Airflow's processes, from `__enter__` to `__exit__`; they listen only on 127.0.0.1.

    home: Airflow's folder. root: the steps' work root. Raises `BusyError` if the port is taken, or if another server
    uses `home`.
    """

    user = "admin"

    def __init__(self, home: Path, root: Path, port: int, settings: Mapping[str, str] | None = None) -> None:
        self.home, self.root, self.port = home.resolve(), root.resolve(), port
        self.url = f"http://localhost:{port}"
        self.environment = {**os.environ, **environment(self.home, self.root, port), **(settings or {})}
        self._processes: dict[str, subprocess.Popen] = {}
        self._lock: Any = None
        self._token = ""

    def __enter__(self) -> "AirflowServer":
        if not self.root.is_dir():
            raise ConfigError(f"There is no work root {self.root}; create it, or give another --root.")
        self.home.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = (self.home / "lock").open("a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.seek(0)
            processes = self._lock.read()
            command = f" (`kill {processes}`)" if processes else ""
            raise BusyError(
                f"Airflow is already running in {self.home}; stop it{command}, or give another --home."
            ) from error
        self._lock.truncate(0)
        try:
            self._require_port()
            if self._start("db", "migrate").wait() != 0:
                raise UniViGUError(f"Airflow's database could not be created; see {self._log('db')}.")
            for command in PROCESSES:
                self._start(*command)
            self._lock.write(" ".join(str(self._processes[name].pid) for name, *_ in PROCESSES))
            self._lock.flush()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_until_ready(self, timeout_s: float = START_S) -> None:
        """Return when all processes are healthy and the DAGs are loaded; raises if one ends, or after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while not self._is_ready():
            self._require_alive()
            if time.monotonic() > deadline:
                raise UniViGUError(f"Airflow was not ready after {timeout_s:.0f} s; see its logs in {self.home}.")
            time.sleep(1)

    def wait(self) -> None:
        """Never return; raises if one of Airflow's processes ends."""
        while True:
            self._require_alive()
            time.sleep(1)

    def stop(self, signals: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGKILL)) -> None:
        """Stop all processes: steps save their state, and processes that don't end in time are killed.

        The API server is stopped last, so that tasks can still report how they ended.
        """
        for names in ({*self._processes} - {PROCESSES[0][0]}, {*self._processes}):
            for number in signals:
                signalled: set[int] = set()
                deadline = time.monotonic() + GRACE_S
                while (alive := {*self.alive(names)}) and time.monotonic() < deadline:
                    for pid in alive - signalled:
                        with suppress(ProcessLookupError):
                            os.kill(pid, number)
                    signalled |= alive
                    time.sleep(0.2)
        for process in self._processes.values():
            process.wait()
        self._processes.clear()
        if self._lock is not None:
            self._lock.close()

    def kill(self) -> None:
        """Kill all processes at once, as in a power failure."""
        self.stop((signal.SIGKILL,))

    def password(self) -> str:
        """The password that Airflow generated for `user`; only the owner of `home` can read it."""
        return json.loads((self.home / PASSWORDS).read_text(encoding="utf-8"))[self.user]

    def call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Call the REST API, e.g. ``call("GET", "/api/v2/dags")``; returns the parsed JSON, or raises `HTTPError`."""
        if not self._token and path != "/auth/token":
            login = {"username": self.user, "password": self.password()}
            self._token = self.call("POST", "/auth/token", login)["access_token"]
        request = urllib.request.Request(
            self.url + path,
            json.dumps(body).encode() if body is not None else None,
            {"Content-Type": "application/json", **({"Authorization": f"Bearer {self._token}"} if self._token else {})},
            method=method,
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
            return json.loads(text) if text else None

    def _is_ready(self) -> bool:
        try:
            health = self.call("GET", "/api/v2/monitor/health")
            parts = ("metadatabase", "scheduler", "triggerer", "dag_processor")
            known = {one["dag_id"] for one in self.call("GET", "/api/v2/dags?limit=100")["dags"]}
            return all(health[part]["status"] == "healthy" for part in parts) and known.issuperset(DAGS)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def alive(self, names: Collection[str] = ()) -> Iterator[int]:
        """The ids of living processes that Airflow, or only the processes of these names, started."""
        for process in self._processes.values():
            process.poll()
        sessions = {process.pid for name, process in self._processes.items() if name in names or not names}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):
                    state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                    if int(session) in sessions and state != "Z":
                        yield int(entry.name)

    def _require_port(self) -> None:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", self.port))
            except OSError as error:
                raise BusyError(
                    f"The port {self.port} is taken ({error.strerror}); stop the process that listens there, or choose "
                    f"another port: `make airflow PORT=8081`."
                ) from error

    def _start(self, *command: str) -> subprocess.Popen:
        with self._log(command[0]).open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "airflow", *command],
                cwd=REPO,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(self._lock.fileno(),),  # `home` stays locked while any of the processes lives
            )
        self._processes[command[0]] = process
        return process

    def _log(self, name: str) -> Path:
        return self.home / f"{name}.log"

    def _require_alive(self) -> None:
        for command in PROCESSES:
            if self._processes[command[0]].poll() is not None:
                raise UniViGUError(f"Airflow's {command[0]} ended unexpectedly; see {self._log(command[0])}.")


def free_port() -> int:
    """A free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(home: Path, root: Path, port: int) -> dict[str, str]:
    """Airflow's settings, as its documented environment variables instead of a configuration file."""
    return {
        "AIRFLOW_HOME": str(home),
        "AIRFLOW_VAR_UNIVIGU_ROOT": str(root),
        OWN: "yes",  # there is one user
        "AIRFLOW__CORE__DAGS_FOLDER": str(REPO / "dags"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
        "AIRFLOW__CORE__PARALLELISM": "3",
        "AIRFLOW__CORE__AUTH_MANAGER": "airflow.api_fastapi.auth.managers.simple.simple_auth_manager.SimpleAuthManager",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": f"{AirflowServer.user}:admin",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(home / PASSWORDS),
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"http://localhost:{port}/execution/",
        # s; after SQLite's own 5, a busy machine answers 500
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home / 'airflow.db'}?timeout=60",
        "AIRFLOW__API__HOST": "127.0.0.1",
        "AIRFLOW__API__PORT": str(port),
        "AIRFLOW__API__BASE_URL": f"http://localhost:{port}",
        "AIRFLOW__API__WORKERS": "1",
        "AIRFLOW__WORKERS__EXECUTION_API_TIMEOUT": "60",  # s; on a busy machine the first response takes over 5 s
        "AIRFLOW__LOGGING__BASE_LOG_FOLDER": str(home / "logs"),
        "AIRFLOW__SCHEDULER__SCHEDULER_HEARTBEAT_SEC": "1",
        "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "60",  # s; a crashed task is retried in two minutes
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
        "DVC_NO_ANALYTICS": "1",
        "GX_ANALYTICS_ENABLED": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }


if __name__ == "__main__":
    typer.run(main)
