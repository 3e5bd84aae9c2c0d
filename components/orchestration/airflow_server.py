"""`make airflow`: all of Airflow on one machine, until Ctrl-C, with nothing left behind.

What `airflow standalone` starts, except the two servers of log files, which listen on every network and which nobody
needs where the files are. Tasks have process groups of their own, so each process gets a session, and whatever is in
these sessions is stopped. All state (SQLite, logs, the password) lies in one folder, so that the next start goes on
where this one ended.
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

from univigu.errors import BusyError, ConfigError, UniViGUError

REPO = Path(__file__).resolve().parents[2]
DAGS = ("new_data", "retrain")
PROCESSES = (
    ("api-server",),
    ("scheduler", "--skip-serve-logs"),
    ("dag-processor",),
    ("triggerer", "--skip-serve-logs"),
)
START_S = 600.0  # for a busy machine; about a minute is usual
GRACE_S = 15.0
ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PASSWORDS = "passwords.json"


def main(
    root: Annotated[Path, typer.Option(help="The work root: what the steps read and write lies below it.")] = REPO,
    home: Annotated[Path, typer.Option(help="Airflow's own folder.")] = REPO / ".univigu/airflow",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port of the page and of the REST API.")] = 8080,
) -> None:
    """Start Airflow on this machine, print its address and login, and stop it all on Ctrl-C."""

    def stop(*_: object) -> None:
        for name in ENDS:
            signal.signal(name, signal.SIG_IGN)  # stopping takes some seconds, and is asked for only once
        raise KeyboardInterrupt

    for name in ENDS:
        signal.signal(name, stop)
    try:
        with AirflowServer(home, root, port) as server:
            print(f"Airflow is starting, which takes about a minute; its logs are in {server.home}", flush=True)
            server.wait_until_ready()
            print(f"Airflow:  {server.url}\nLogin:    {server.user}, password {server.password()}", flush=True)
            print("Stop it with Ctrl-C.", flush=True)
            server.wait()
    except UniViGUError as error:
        print(f"airflow: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("airflow: stopped; the next `make airflow` goes on where it was.", file=sys.stderr)


class AirflowServer:
    """Airflow's processes, between `__enter__` and `__exit__`; only 127.0.0.1 is listened on.

    home: Airflow's folder. root: the steps' work root. Raises `BusyError` where the port is taken, or where another
    server uses `home`.
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
            raise ConfigError(f"There is no work root {self.root}; give another --root.")
        self.home.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = (self.home / "lock").open("a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.seek(0)
            processes = self._lock.read()
            how = f" (`kill {processes}`)" if processes else ""
            raise BusyError(
                f"Airflow is running in {self.home} already; stop it{how}, or give another --home."
            ) from error
        self._lock.truncate(0)
        try:
            self._require_port()
            if self._start("db", "migrate").wait() != 0:
                raise UniViGUError(f"Airflow's database could not be made; {self._log('db')} says why.")
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

    def wait_until_ready(self, patience_s: float = START_S) -> None:
        """Return when every part is up and the DAGs are known; raises where one of them ends, or takes too long."""
        give_up = time.monotonic() + patience_s
        while not self._is_ready():
            self._require_alive()
            if time.monotonic() > give_up:
                raise UniViGUError(
                    f"Airflow was not up after {patience_s:.0f} s; its logs, in {self.home}, may say why."
                )
            time.sleep(1)

    def wait(self) -> None:
        """Return never; raises where a part of Airflow ends by itself."""
        while True:
            self._require_alive()
            time.sleep(1)

    def stop(self, signals: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGKILL)) -> None:
        """Stop everything; steps save their state, and whoever doesn't end in time is killed.

        The API server goes last, so that tasks can still tell it how they ended.
        """
        for names in ({*self._processes} - {PROCESSES[0][0]}, {*self._processes}):
            for how in signals:
                told: set[int] = set()
                give_up = time.monotonic() + GRACE_S
                while (alive := {*self.alive(names)}) and time.monotonic() < give_up:
                    for pid in alive - told:
                        with suppress(ProcessLookupError):
                            os.kill(pid, how)
                    told |= alive
                    time.sleep(0.2)
        for process in self._processes.values():
            process.wait()
        self._processes.clear()
        if self._lock is not None:
            self._lock.close()

    def kill(self) -> None:
        """Kill every process of the session at once, as a machine that loses its power would."""
        self.stop((signal.SIGKILL,))

    def password(self) -> str:
        """The password that Airflow made for `user`, which only the owner of `home` can read."""
        return json.loads((self.home / PASSWORDS).read_text(encoding="utf-8"))[self.user]

    def call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The answer to a call of the REST API, such as ``call("GET", "/api/v2/dags")``; raises `HTTPError`."""
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
        """Airflow's processes that have not ended, with all that they started; all, or those of these names."""
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
                    f"The port {self.port} is taken ({error.strerror}); stop what listens there, or choose another: "
                    f"`make airflow PORT=8081`."
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
                pass_fds=(self._lock.fileno(),),  # who holds `home` as long as one of them lives
            )
        self._processes[command[0]] = process
        return process

    def _log(self, name: str) -> Path:
        return self.home / f"{name}.log"

    def _require_alive(self) -> None:
        for command in PROCESSES:
            if self._processes[command[0]].poll() is not None:
                raise UniViGUError(f"Airflow's {command[0]} has ended by itself; {self._log(command[0])} says why.")


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(home: Path, root: Path, port: int) -> dict[str, str]:
    """What makes an Airflow this one: settings by its documented variables, in place of a file."""
    return {
        "AIRFLOW_HOME": str(home),
        "AIRFLOW_VAR_UNIVIGU_ROOT": str(root),
        "AIRFLOW__CORE__DAGS_FOLDER": str(REPO / "dags"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
        "AIRFLOW__CORE__PARALLELISM": "3",
        "AIRFLOW__CORE__AUTH_MANAGER": "airflow.api_fastapi.auth.managers.simple.simple_auth_manager.SimpleAuthManager",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": f"{AirflowServer.user}:admin",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(home / PASSWORDS),
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"http://localhost:{port}/execution/",
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home / 'airflow.db'}",
        "AIRFLOW__API__HOST": "127.0.0.1",
        "AIRFLOW__API__PORT": str(port),
        "AIRFLOW__API__BASE_URL": f"http://localhost:{port}",
        "AIRFLOW__API__WORKERS": "1",
        "AIRFLOW__WORKERS__EXECUTION_API_TIMEOUT": "60",  # seconds; a busy machine's first answer takes longer than 5
        "AIRFLOW__LOGGING__BASE_LOG_FOLDER": str(home / "logs"),
        "AIRFLOW__SCHEDULER__SCHEDULER_HEARTBEAT_SEC": "1",
        "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "60",  # after a crash tasks go on within two minutes
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
        "DVC_NO_ANALYTICS": "1",
        "GX_ANALYTICS_ENABLED": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }


if __name__ == "__main__":
    typer.run(main)
