"""What only this service can tell: which classes it predicts, and how the two passes and the defense differ.

The device thread only puts a batch's probabilities aside. They are counted by another thread, many batches at once:
numpy gives Python's lock away, and the device thread would wait for it behind the event loop.
"""

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from service.histograms import HotHistogram

FOLD_BYTES = 1_000_000
MARGINS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


class DefenseMetrics(Collector):
    """Counters of the predictions made.

    Args:
        thread: counts what has been put aside, when it is much; what is left is counted at the next scrape.
    """

    def __init__(self, registry: CollectorRegistry, thread: Executor) -> None:
        self._thread = thread
        self._aside: deque[NDArray[np.float32]] = deque()
        self._bytes_aside = 0
        self._folding = threading.Lock()
        self._labels: Sequence[str] = ()
        self._predictions = np.zeros(0, np.int64)
        self._changed = self._disagreements = 0
        registry.register(self)  # before the histogram, so that a scrape finds its newest margins
        self._margins = HotHistogram(
            "igd_defended_margin",
            "Probability of the defended prediction minus that of the second most probable class.",
            MARGINS,
            registry=registry,
        ).series()

    def name_classes(self, labels: Sequence[str]) -> None:
        """Begin to count, with a series for each class."""
        self._labels, self._predictions = labels, np.zeros(len(labels), np.int64)

    def observe(self, rows: NDArray[np.float32]) -> None:
        """Take note of a batch's probabilities; called on the device thread.

        Args:
            rows: [B, 5, C], see ``passes.ROWS``. Not to be changed afterwards.
        """
        self._aside.append(rows)
        self._bytes_aside += rows.nbytes
        if self._bytes_aside >= FOLD_BYTES:
            self._bytes_aside = 0
            self._thread.submit(self.fold)

    def fold(self) -> None:
        """Count what was put aside."""
        with self._folding:
            batches = [self._aside.popleft() for _ in range(len(self._aside))]
            if batches:
                self._count(np.concatenate(batches))

    def _count(self, rows: NDArray[np.float32]) -> None:
        defended, undefended, pseudo_label = rows[:, :3].argmax(2).T
        self._predictions += np.bincount(defended, minlength=len(self._predictions))
        self._changed += int(np.count_nonzero(defended != undefended))
        self._disagreements += int(np.count_nonzero(pseudo_label != undefended))
        if rows.shape[2] > 1:
            second, first = np.partition(rows[:, 0], -2)[:, -2:].T
            self._margins.observe_all(first - second)

    def collect(self) -> Iterable[Metric]:
        """What prometheus-client asks for at a scrape."""
        self.fold()
        predictions = CounterMetricFamily("igd_predictions", "Images classified, by defended class.", labels=["class"])
        for label, count in self._by_label().items():
            predictions.add_metric([label], count)
        return [
            predictions,
            CounterMetricFamily(
                "igd_defense_changed",
                "Images whose defended class differs from the undefended one.",
                value=self._changed,
            ),
            CounterMetricFamily(
                "igd_pseudo_label_disagreement",
                "Images whose noisy first pass says another class than the clean one.",
                value=self._disagreements,
            ),
        ]

    def _by_label(self) -> dict[str, int]:
        """Two classes may have one label, as ImageNet's cranes do; two series may not."""
        totals = dict.fromkeys(self._labels, 0)
        for label, count in zip(self._labels, self._predictions.tolist(), strict=True):
            totals[label] += count
        return totals
