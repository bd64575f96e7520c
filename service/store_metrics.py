"""How the store does: whether it is up, how long it takes, what fails."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from importance_store import StoreError, VersionNotFound

OPERATIONS = ("open", "ping", "load", "jobs")
_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class StoreMetrics:
    """Gauge, histogram and counter of the store."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.up = Gauge("igd_store_up", "1 while the importance store answers.", registry=registry)
        seconds = Histogram(
            "igd_store_duration_seconds",
            "Seconds of what was asked of the store: to open it, a ping, an importance, the jobs.",
            ["operation"],
            buckets=_SECONDS,
            registry=registry,
        )
        errors = Counter("igd_store_errors", "What the store could not answer.", ["operation"], registry=registry)
        self._seconds = {operation: seconds.labels(operation) for operation in OPERATIONS}
        self._errors = {operation: errors.labels(operation) for operation in OPERATIONS}

    @contextmanager
    def timed(self, operation: str) -> Iterator[None]:
        """Time the block, also if it fails; count a failure that is the store's."""
        started = time.perf_counter()
        try:
            yield
        except VersionNotFound:  # an answer
            raise
        except StoreError:
            self._errors[operation].inc()
            raise
        finally:
            self._seconds[operation].observe(time.perf_counter() - started)
