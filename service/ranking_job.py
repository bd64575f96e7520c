"""What a worker does for a ranking job: load, rank, publish. Runs in a process of its own, at low priority."""

import logging
import os
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rq import get_current_job

from defense import (
    DefenseError,
    ImportanceMismatch,
    NeuronImportance,
    check_servable,
    load_classifier,
    model_digest,
    open_probe_set,
    rank_neurons,
)
from importance_store import ConnectedStore, StoreError, StoreUnavailable, VersionConflict
from service.engine import resolve_device
from service.job_keys import JobKeys
from service.job_report import JobReport
from service.logs import log_context
from service.schemas import RankRequest
from service.settings import Settings
from service.stores import store_of

logger = logging.getLogger(__name__)

PUBLISH_PATIENCE_S = 120.0
MAX_SKIPS_TOLD = 20


def run(request: dict[str, Any], model_digest: str, expected_active: str | None) -> dict[str, Any]:
    """Rank, publish, activate; the function that RQ calls.

    Returns:
        ``version``, ``activated`` and ``notes``; or ``error``, a sentence. In both cases ``log``, its last lines.
        Nothing is raised: for RQ, a job fails only when its process dies, and is then taken up again.
    """
    job, settings = get_current_job(), Settings()
    if job is None:
        raise RuntimeError("service.ranking_job.run is to be called by an RQ worker")
    torch.set_num_threads(settings.worker_threads)
    asked_by = job.meta.get("asked_by", {})
    log_context.set({"job_id": job.id, **asked_by})
    with JobReport(job, JobKeys(JobKeys.model_of(job.origin))) as report:
        _step_back()
        logger.info("job %s%s", job.id, "".join(f", {name} {value}" for name, value in asked_by.items()))
        try:
            task = RankingTask(settings, RankRequest.model_validate(request), job.id, model_digest, expected_active)
            result = task.rank_and_publish(report)
        except (DefenseError, StoreError) as error:
            logger.error("failed: %s", error)
            result = {"error": str(error)}
        except Exception as error:
            logger.exception("failed unexpectedly")
            result = {"error": f"an unexpected {type(error).__name__}: {error}; the log has the traceback"}
    return result | {"log": list(report.log)}


def checkpoint_of(settings: Settings, job_id: str) -> Path:
    """Where a job that is interrupted goes on from."""
    return settings.data_dir / "checkpoints" / f"{job_id}.safetensors"


def _step_back() -> None:
    """Leave the processors to the server: a ranking may wait, a request may not, and neither may the report's thread.

    For this thread, and those of torch that it will start.
    """
    if sys.platform == "linux":
        # Nice alone still lets a ranking hold a core for milliseconds when a request comes. A sandbox may refuse it.
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


@dataclass(frozen=True)
class RankingTask:
    """One job's ranking.

    Attributes:
        model_digest: the weights that were to be ranked. expected_active: the version that was active at submission.
    """

    settings: Settings
    request: RankRequest
    job_id: str
    model_digest: str
    expected_active: str | None

    def rank_and_publish(self, report: JobReport) -> dict[str, Any]:
        """The whole job.

        Raises:
            DefenseError: the ranking failed. StoreError: it could not be published.
        """
        self._check_weights()
        settings, request = self.settings, self.request
        probe = open_probe_set(
            request.dataset, settings.model, datasets_file=settings.datasets, images_per_class=request.images_per_class
        )
        importance = rank_neurons(
            settings.model,
            probe,
            method=request.method,
            layer=request.layer,
            checkpoint=checkpoint_of(settings, self.job_id),
            cache_dir=settings.data_dir / "clip-features",
            device=str(resolve_device(settings.device)),
            progress=report.progress,
        )
        notes = [*importance.warnings, *(f"skipped {skip}" for skip in probe.skipped[:MAX_SKIPS_TOLD])]
        activate = self._may_activate(importance, notes)
        version, activated = self._publish_patiently(importance, activate, notes)
        return {"version": version, "activated": activated, "notes": notes}

    def _check_weights(self) -> None:
        found = model_digest(load_classifier(self.settings.model))
        if found != self.model_digest:
            raise ImportanceMismatch(
                f"the weights in {self.settings.model} changed since the job was submitted: expected "
                f"{self.model_digest}, found {found}; submit it again"
            )

    def _may_activate(self, importance: NeuronImportance, notes: list[str]) -> bool:
        """Whether it was asked for and nothing is against it; what is goes to the notes."""
        if not self.request.activate:
            return False
        try:
            check_servable(self.settings.model, importance)
        except DefenseError as error:
            notes.append(f"not activated, it cannot be served: {error}")
            return False
        if importance.degenerate and not self.request.force:
            notes.append(f"not activated, the ranking is degenerate: {importance.degenerate}; 'force' activates it")
            return False
        return True

    def _publish_patiently(self, importance: NeuronImportance, activate: bool, notes: list[str]) -> tuple[str, bool]:
        """Wait for a store that is away: the ranking is not thrown away."""
        give_up = time.monotonic() + PUBLISH_PATIENCE_S
        while True:
            try:
                with store_of(self.settings) as store:
                    return self._publish(store, importance, activate, notes)
            except StoreUnavailable:
                if time.monotonic() > give_up:
                    raise
                logger.warning("the store is away; the ranking is published as soon as it is back")
                time.sleep(1)

    def _publish(
        self, store: ConnectedStore, importance: NeuronImportance, activate: bool, notes: list[str]
    ) -> tuple[str, bool]:
        try:
            return store.publish(importance, activate=activate, expected_active=self.expected_active), activate
        except VersionConflict as conflict:
            notes.append(f"published, but not activated, because another version was activated meanwhile: {conflict}")
            return store.publish(importance, activate=False), False
