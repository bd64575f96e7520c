"""A thread that looks at the store and its jobs, so that /metrics need not, and answers while the store is away."""

import logging
import threading

from importance_store import ConnectedStore, StoreError
from service.job_metrics import JobMetrics
from service.jobs import RankingJobs
from service.store_metrics import StoreMetrics

logger = logging.getLogger(__name__)

PERIOD_S = 5.0
STOP_TIMEOUT_S = 0.9


class StoreMonitor:
    """Looks at once and then every few seconds.

    Args:
        store: asked whether it answers. jobs: its jobs.
        store_metrics, job_metrics: where what is seen is shown; what was seen last stays while the store is away.
    """

    def __init__(
        self,
        store: ConnectedStore,
        jobs: RankingJobs,
        store_metrics: StoreMetrics,
        job_metrics: JobMetrics,
        *,
        period_s: float = PERIOD_S,
    ) -> None:
        self._store, self._jobs, self._period_s = store, jobs, period_s
        self._store_metrics, self._job_metrics = store_metrics, job_metrics
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="store monitor", daemon=True)

    def start(self) -> None:
        """Start looking."""
        self._thread.start()

    def stop(self) -> None:
        """Stop within a second; a look that takes longer is left to end by itself."""
        self._stopping.set()
        self._thread.join(STOP_TIMEOUT_S)

    def look(self) -> None:
        """Look once.

        Raises:
            StoreError: the store does not answer; it is counted.
        """
        with self._store_metrics.timed("ping"):
            self._store.ping()
        with self._store_metrics.timed("jobs"):
            ids = self._jobs.ids()
            jobs = self._jobs.read(self._job_metrics.unknown(ids))
        self._job_metrics.show(ids, jobs)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self.look()
            except StoreError as error:
                logger.debug("the store was not seen: %s", error)  # the watcher warns
            except Exception:
                logger.exception("looking at the jobs failed; trying again")
            self._stopping.wait(self._period_s)
