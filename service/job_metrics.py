"""The ranking jobs as metrics. They are the store's: every replica shows the same ones."""

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime
from math import nan

from prometheus_client import CollectorRegistry, Gauge, Histogram

from service.jobs import UNFINISHED
from service.schemas import JobState, RankingJob

ENDED = tuple(state for state in JobState if state not in UNFINISHED)
_SECONDS = (1, 5, 15, 60, 300, 900, 1800, 3600, 2 * 3600, 4 * 3600, 8 * 3600, 24 * 3600)


class JobMetrics:
    """Gauges of the jobs in the store, and a histogram of those that end while this server looks on."""

    def __init__(self, registry: CollectorRegistry) -> None:
        counts = Gauge("igd_jobs", "Ranking jobs in the store, by state.", ["state"], registry=registry)
        self._counts = {state: counts.labels(str(state)) for state in JobState}
        seconds = Histogram(
            "igd_job_duration_seconds",
            "Seconds from a job's last start to its end.",
            ["state"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._seconds = {state: seconds.labels(str(state)) for state in ENDED}
        self._progress = Gauge(
            "igd_job_progress_ratio",
            "Share of the images that a running job has done, of the one least advanced; NaN if none runs.",
            registry=registry,
        )
        self._eta = Gauge(
            "igd_job_eta_seconds",
            "Seconds that a running job still takes at its rate, of the longest; NaN if none runs.",
            registry=registry,
        )
        self._waiting = Gauge(
            "igd_job_oldest_queued_seconds",
            "Seconds that a job has waited for a worker, the longest; 0 if none does.",
            registry=registry,
        )
        self._progress.set(nan)
        self._eta.set(nan)
        self._ended: dict[str, JobState] | None = None

    def unknown(self, ids: Sequence[str]) -> list[str]:
        """Those to look at: a job that has ended stays as it is."""
        return [job_id for job_id in ids if job_id not in (self._ended or {})]

    def show(self, ids: Sequence[str], jobs: Sequence[RankingJob]) -> None:
        """Show all jobs.

        Args:
            ids: of all. jobs: those of them that were unknown.
        """
        just_ended = [job for job in jobs if job.state in ENDED]
        if self._ended is not None:  # what had ended before the first look is not news
            for job in just_ended:
                self._seconds[job.state].observe(_duration_s(job))
        ended = (self._ended or {}) | {job.id: job.state for job in just_ended}
        self._ended = {job_id: ended[job_id] for job_id in ids if job_id in ended}
        live = [job for job in jobs if job.state in UNFINISHED]
        counts = Counter([*self._ended.values(), *(job.state for job in live)])
        for state, gauge in self._counts.items():
            gauge.set(counts[state])
        self._show_live(live)

    def _show_live(self, jobs: Sequence[RankingJob]) -> None:
        running = [job.progress for job in jobs if job.state is JobState.RUNNING]
        self._progress.set(min((p.done / p.total if p.total else 0.0 for p in running), default=nan))
        self._eta.set(max((p.eta_s for p in running if p.eta_s is not None), default=nan))
        queued = (job.created_at for job in jobs if job.state is JobState.QUEUED)
        self._waiting.set(max(0.0, time.time() - _earliest(queued)))


def _duration_s(job: RankingJob) -> float:
    if job.started_at is None or job.ended_at is None:  # cancelled before a worker took it
        return 0.0
    return max(0.0, (job.ended_at - job.started_at).total_seconds())


def _earliest(moments: Iterable[datetime]) -> float:
    return min((moment.timestamp() for moment in moments), default=time.time())
