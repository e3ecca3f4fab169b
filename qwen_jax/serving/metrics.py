"""What the server tells Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The metrics of one server, in a registry of its own.

    Args:
        rows: number of rows of the engine.
        rows_in_use, waiting: give the numbers of requests that are generated, and that wait for a row.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, rows: int, rows_in_use: Callable[[], int], waiting: Callable[[], int]):
        self.registry = CollectorRegistry()
        self.requests = self._made(Counter, "requests", "requests answered, by path and status", ("path", "status"))
        self.disconnects = self._made(Counter, "disconnects", "clients that left before the end of their answer")
        self.prompt_tokens = self._made(Counter, "prompt_tokens", "tokens of prompts that were taken")
        self.generated_tokens = self._made(Counter, "generated_tokens", "tokens generated")
        self.first_token = self._made(
            Histogram, "time_to_first_token_seconds", "from the request to the first token", buckets=_SECONDS
        )
        self.between_tokens = self._made(
            Histogram,
            "time_between_tokens_seconds",
            "from one delivery of tokens to the next, divided by their number; one observation a delivery",
            buckets=_SECONDS,
        )
        self._made(Gauge, "rows", "rows of the engine").set(rows)
        self._made(Gauge, "rows_in_use", "requests that are generated").set_function(rows_in_use)
        self._made(Gauge, "waiting_requests", "requests that wait for a row").set_function(waiting)

    def _made(self, kind: type, name: str, text: str, labels: tuple[str, ...] = (), **options):
        return kind(f"qwen_jax_{name}", text, labels, registry=self.registry, **options)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)
