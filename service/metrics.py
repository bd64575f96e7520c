"""Prometheus metrics: base units, few label values, every series there from the start. docs/metrics.md has them all."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from math import nan

import numpy as np
import torch
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Gauge, disable_created_metrics
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from defense import NeuronImportance
from service.defense_metrics import DefenseMetrics
from service.histograms import HotHistogram, Series
from service.job_metrics import JobMetrics
from service.store_metrics import StoreMetrics

ENDPOINTS = ("classify", "infer", "model", "importance", "rank-neurons", "health", "metrics", "other")
STAGES = ("decode", "queue", "trunk", "tail", "encode")
OUTCOMES = ("ok", "client_error", "rejected", "error")
REASONS = ("queue_full", "bodies_full", "not_ready", "draining", "deadline", "store")
GPU_MEMORY = ("allocated", "reserved")
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_STAGE_SECONDS = (0.00005, 0.0001, 0.00025, 0.0005, *_SECONDS)


class Metrics:
    """All of one server's metrics, in a registry of their own.

    Attributes:
        thread: for what takes longer than an event loop or a device may wait, such as a scrape.
    """

    def __init__(self) -> None:
        disable_created_metrics()  # they double the series and tell nothing that rate() needs
        self.registry = registry = CollectorRegistry()
        self.thread = ThreadPoolExecutor(1, "metrics")
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=registry)
        self._add_requests(registry)
        self._add_batches(registry)
        self._add_served(registry)
        self.defense = DefenseMetrics(registry, self.thread)
        self.store, self.jobs = StoreMetrics(registry), JobMetrics(registry)

    def _add_requests(self, registry: CollectorRegistry) -> None:
        requests = Counter("igd_requests", "Requests answered.", ["endpoint", "outcome"], registry=registry)
        rejected = Counter(
            "igd_rejected",
            "Requests that were not at fault and got no answer, health checks left out.",
            ["reason"],
            registry=registry,
        )
        seconds = HotHistogram(
            "igd_request_duration_seconds",
            "Seconds from a request's first byte to its answer.",
            _SECONDS,
            label="endpoint",
            values=ENDPOINTS,
            registry=registry,
        )
        # To look a series up costs as much as to count.
        self._seconds_of = {endpoint: seconds.series(endpoint) for endpoint in ENDPOINTS}
        self._requests_of = {pair: requests.labels(*pair) for pair in product(ENDPOINTS, OUTCOMES)}
        self._rejected_for = {reason: rejected.labels(reason) for reason in REASONS}

    def _add_batches(self, registry: CollectorRegistry) -> None:
        stages = HotHistogram(
            "igd_stage_duration_seconds",
            "Seconds of a stage: decode and encode of a request, queue of an image, trunk and tail of a batch.",
            _STAGE_SECONDS,
            label="stage",
            values=STAGES,
            registry=registry,
        )
        self.stage_seconds = {stage: stages.series(stage) for stage in STAGES}
        sizes = [2**i for i in range(10)]
        self.batch_size = HotHistogram("igd_batch_size", "Images in a batch.", sizes, registry=registry).series()
        self.last_batch = Gauge(
            "igd_last_batch_timestamp_seconds", "When the last batch was done, Unix time; 0 before.", registry=registry
        )
        self._queue_depth = Gauge("igd_queue_depth", "Images that wait for the device.", registry=registry)
        self._in_flight = Gauge("igd_in_flight", "Images admitted and not yet answered.", registry=registry)
        memory = Gauge(
            "igd_gpu_memory_bytes",
            "GPU memory of this process's tensors; 0 without a GPU.",
            ["kind"],
            registry=registry,
        )
        self._gpu_memory = {kind: memory.labels(kind) for kind in GPU_MEMORY}

    def _add_served(self, registry: CollectorRegistry) -> None:
        self._model_info = Gauge(
            "igd_model_info",
            "1 for the model as it is being served.",
            ["model", "digest", "device", "dtype", "compiler", "first_pass"],
            registry=registry,
        )
        self._importance_info = Gauge(
            "igd_importance_info",
            "1 for the importance version being served.",
            ["version", "method", "layer", "top_k"],
            registry=registry,
        )
        self._shown: dict[Gauge, tuple[str, ...]] = {}
        self.importance_age = Gauge(
            "igd_importance_age_seconds",
            "Seconds since the importance being served was ranked; NaN if there is none.",
            registry=registry,
        )
        self.importance_age.set(nan)
        self.agreement = Gauge(
            "igd_precision_agreement",
            "Share of probe images with the same defended prediction in float32; NaN if not compared.",
            registry=registry,
        )
        self.agreement.set(nan)

    def stage(self, name: str) -> "StageTimer":
        """Times a block as a stage of a request; for the event loop."""
        return StageTimer(self.stage_seconds[name])

    def show_model(self, *, model: str, digest: str, device: str, dtype: str, compiler: str, first_pass: str) -> None:
        """Name what is being served, and nothing else."""
        self._show_only(self._model_info, model, digest, device, dtype, compiler, first_pass)

    def show_importance(self, version: str, importance: NeuronImportance, top_k: int) -> None:
        """Name the version being served, and no other."""
        self._show_only(self._importance_info, version, importance.method, importance.layer, str(top_k))
        ranked_at = importance.created_at.timestamp()
        self.importance_age.set_function(lambda: time.time() - ranked_at)

    def watch_queue(self, depth: Callable[[], int], in_flight: Callable[[], int]) -> None:
        """Ask these at every scrape from now on."""
        self._queue_depth.set_function(depth)
        self._in_flight.set_function(in_flight)

    def watch_model(self, labels: Sequence[str], device: torch.device) -> None:
        """Show its classes from now on, and its device's memory if that is a GPU."""
        self.defense.name_classes(labels)
        if device.type == "cuda":
            self._gpu_memory["allocated"].set_function(lambda: torch.cuda.memory_allocated(device))
            self._gpu_memory["reserved"].set_function(lambda: torch.cuda.memory_reserved(device))

    def observe_request(self, endpoint: str, status: int, seconds: float, reason: str | None = None) -> None:
        """Count an answer.

        Args:
            reason: of a rejection, one of ``REASONS``.
        """
        endpoint = endpoint if endpoint in ENDPOINTS else "other"
        self._requests_of[endpoint, _outcome(status)].inc()
        self._seconds_of[endpoint].observe(seconds)
        if reason and endpoint != "health":  # to be told "not ready" is what a probe asks for
            self._rejected_for[reason].inc()

    def observe_waits(self, waits_s: Iterable[float]) -> None:
        """Note how long each image of a batch has waited; called on the device thread."""
        series = self.stage_seconds["queue"]
        for wait_s in waits_s:
            series.observe(wait_s)

    def observe_batch(self, rows: NDArray[np.float32], stage_seconds: Mapping[str, float]) -> None:
        """Note what a batch gave and took; called on the device thread.

        Args:
            rows: [B, 5, C], see ``passes.ROWS``. stage_seconds: by stage.
        """
        self.batch_size.observe(len(rows))
        self.last_batch.set_to_current_time()
        for stage, seconds in stage_seconds.items():
            self.stage_seconds[stage].observe(seconds)
        self.defense.observe(rows)

    def _show_only(self, info: Gauge, *labels: str) -> None:
        info.labels(*labels).set(1)
        before, self._shown[info] = self._shown.get(info), labels
        if before not in (None, labels):
            info.remove(*before)


class StageTimer:
    """Observes how long its block takes, if nothing is raised; a generator would take as long as what it times."""

    def __init__(self, series: Series) -> None:
        self._series = series

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self._series.observe(time.perf_counter() - self._started)


def _outcome(status: int) -> str:
    if status < 400:
        return "ok"
    if status in (429, 503):
        return "rejected"
    return "client_error" if status < 500 else "error"
