"""Prometheus metrics: base units, few label values, every series there from the start."""

from itertools import product

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from defense import NeuronImportance

ENDPOINTS = ("classify", "model", "importance", "health", "metrics", "other")
STAGES = ("trunk", "tail")
OUTCOMES = ("ok", "client_error", "rejected", "error")
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class Metrics:
    """All of one server's metrics, in a registry of their own."""

    def __init__(self) -> None:
        disable_created_metrics()  # they double the series and tell nothing that rate() needs
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self.requests = Counter("igd_requests", "Requests answered.", ["endpoint", "outcome"], registry=self.registry)
        self.request_seconds = Histogram(
            "igd_request_duration_seconds",
            "Seconds from a request's first byte to its answer.",
            ["endpoint"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        stages = Histogram(
            "igd_stage_duration_seconds",
            "Seconds of a stage: trunk and tail, of both passes of a batch.",
            ["stage"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.stage_seconds = {stage: stages.labels(stage) for stage in STAGES}
        self.batch_size = Histogram(
            "igd_batch_size",
            "Images in a batch.",
            buckets=[2**i for i in range(10)],
            registry=self.registry,
        )
        self.queue_depth = Gauge("igd_queue_depth", "Images that wait for the device.", registry=self.registry)
        self.in_flight = Gauge("igd_in_flight", "Images admitted and not yet answered.", registry=self.registry)
        self.store_up = Gauge("igd_store_up", "1 while the importance store answers.", registry=self.registry)
        self.importance_info = Gauge(
            "igd_importance_info",
            "1 for the importance version being served.",
            ["version", "method", "layer", "top_k"],
            registry=self.registry,
        )
        self.agreement = Gauge(
            "igd_precision_agreement",
            "Share of probe images with the same defended prediction in float32; NaN if not compared.",
            registry=self.registry,
        )
        # Every series is there from the start; and to look one up costs as much as to count.
        self._seconds_of = {endpoint: self.request_seconds.labels(endpoint) for endpoint in ENDPOINTS}
        self._requests_of = {pair: self.requests.labels(*pair) for pair in product(ENDPOINTS, OUTCOMES)}

    def show_importance(self, version: str, importance: NeuronImportance, top_k: int) -> None:
        """Name the version being served, and no other."""
        self.importance_info.clear()
        self.importance_info.labels(version, importance.method, importance.layer, top_k).set(1)

    def observe_request(self, endpoint: str, status: int, seconds: float) -> None:
        """Count an answer."""
        endpoint = endpoint if endpoint in ENDPOINTS else "other"
        self._requests_of[endpoint, _outcome(status)].inc()
        self._seconds_of[endpoint].observe(seconds)


def _outcome(status: int) -> str:
    if status < 400:
        return "ok"
    if status in (429, 503):
        return "rejected"
    return "client_error" if status < 500 else "error"
