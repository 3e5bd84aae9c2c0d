"""The server's own metrics, for Prometheus; `univigu metrics` has those of the work root."""

from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from components.cli.serve.models import Served
    from components.cli.studio.guard import Receive, Scope, Send

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_KIND = ("kind",)  # caption or video


class Metrics:
    """One object per metric; all names begin with ``univigu_serve_``."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        place: dict[str, Any] = {"namespace": "univigu_serve", "registry": self.registry}
        self.responses = Counter("responses", "Answers by endpoint and HTTP status.", ("endpoint", "status"), **place)
        self.results = Counter("results", "Results: ok, failed, or abandoned.", ("kind", "outcome"), **place)
        self.seconds = Histogram("seconds", "Time from a request to its result.", _KIND, buckets=_SECONDS, **place)
        self.batches = Histogram("batch_size", "Requests of a batch.", _KIND, buckets=_SIZES, **place)
        self.batch_seconds = Histogram("batch_seconds", "Time of a batch.", _KIND, buckets=_SECONDS, **place)
        self.waiting = Gauge("waiting", "Requests that wait for the model.", **place)
        self.held_bytes = Gauge("held_bytes", "Memory of unfinished requests: bodies and decoded frames.", **place)
        self.model = Gauge("model_info", "1 for the model that new requests get.", ("model",), **place)
        self.changes = Counter("model_changes", "Changes of champion that were followed.", **place)
        self.failures = Counter("model_failures", "Failures to read the champion, or to load it.", **place)

    def use(self, model: "Served") -> None:
        """Name the model in use."""
        self.model.clear()
        self.model.labels(model.label).set(1)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class Metered:
    """ASGI middleware that counts answers."""

    def __init__(self, app: Any, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        async def send_counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                endpoint = getattr(scope.get("endpoint"), "__name__", "none")
                self.metrics.responses.labels(endpoint, str(message["status"])).inc()
            await send(message)

        await self.app(scope, receive, send_counted)
