"""What the server tells of itself: Prometheus' metrics, and the last seconds for the page."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from surgeon.server.gathering import Job

RECENT = 2000
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Measures:
    """Counters and histograms of one server, in a registry of its own. Tasks have no series: they may be too many."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter("surgeon_requests", "Requests answered", ("route", "status"), registry=self.registry)
        self._seconds = Histogram(
            "surgeon_request_seconds",
            "From a request to its answer",
            ("route",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self._waited = Histogram("surgeon_queue_seconds", "In the queue", buckets=SECONDS, registry=self.registry)
        self._rows = Histogram("surgeon_batch_rows", "Rows of a batch", buckets=SIZES, registry=self.registry)
        self._tasks = Histogram("surgeon_batch_tasks", "Tasks of a batch", buckets=SIZES, registry=self.registry)
        self._tokens = Counter("surgeon_tokens_written", "Tokens written", registry=self.registry)
        self._recent: deque[tuple[float, float]] = deque(maxlen=RECENT)
        self._begun = time.monotonic()

    def gauge(self, name: str, what: str, value: Callable[[], float]) -> None:
        """A number that is read when somebody asks."""
        Gauge(name, what, registry=self.registry).set_function(value)

    def answered(self, route: str, status: int, seconds: float) -> None:
        """A request was answered."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)
        if route in {"infer", "completions", "chat"} and status == 200:
            self._recent.append((time.monotonic(), seconds))

    def ran(self, jobs: Sequence[Job], now: float) -> None:
        """A batch goes on."""
        self._rows.observe(sum(job.rows for job in jobs))
        self._tasks.observe(len({job.task for job in jobs}))
        for job in jobs:
            self._waited.observe(now - job.since)

    def wrote(self, tokens: int) -> None:
        """Tokens were written."""
        self._tokens.inc(tokens)

    def recent(self, seconds: float = 60.0) -> dict[str, Any]:
        """Rate and latency of the last seconds."""
        now = time.monotonic()
        times = sorted(took for at, took in tuple(self._recent) if now - at <= seconds)
        span = min(seconds, now - self._begun)
        return {
            "per_second": round(len(times) / max(span, 1.0), 2),
            "p50_ms": _at(times, 0.5),
            "p99_ms": _at(times, 0.99),
        }

    def text(self) -> bytes:
        """In Prometheus' form."""
        return generate_latest(self.registry)


def _at(times: Sequence[float], share: float) -> float | None:
    return round(1000 * times[min(int(share * len(times)), len(times) - 1)], 2) if times else None
