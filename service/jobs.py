"""Ranking jobs: submit, look at, cancel. They wait in an RQ queue on the store's Redis; a worker process runs them.

RQ keeps a job's life; two things are ours, because RQ is slow to notice a death: a key that the running process renews
(``alive``), and from it the state ``interrupted``. What a job raises by itself is its result, so that a failure in RQ's
sense is always a death, and RQ's retries are only for deaths.
"""

import hashlib
import json
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, cast

import redis
from rq import Queue, Retry
from rq.command import send_stop_job_command
from rq.exceptions import InvalidJobOperation, NoSuchJobError
from rq.job import Job, JobStatus
from rq.serializers import JSONSerializer
from ulid import ULID

from importance_store.errors import translated_errors
from importance_store.store import server_name
from service.errors import Conflict, NotFound, Unprocessable
from service.job_keys import JobKeys
from service.schemas import JobProgress, JobState, RankingJob, RankRequest

FUNCTION = "service.ranking_job.run"
ALIVE_S = 8
KEEP_S = 7 * 86400
KEEP_JOBS = 200
MAX_DEATHS = 3
CANCEL_TIMEOUT_S = 5.0

_STATES = {
    JobStatus.FINISHED: JobState.SUCCEEDED,
    JobStatus.FAILED: JobState.FAILED,
    JobStatus.STOPPED: JobState.CANCELLED,
    JobStatus.CANCELED: JobState.CANCELLED,
}
UNFINISHED = (JobState.QUEUED, JobState.RUNNING, JobState.INTERRUPTED)


class RankingJobs:
    """The jobs of one model. Every method may raise ``StoreUnavailable``.

    Args:
        client: answers bytes.
    """

    def __init__(self, client: redis.Redis, model: str) -> None:
        self._client, self.keys, self._server = client, JobKeys(model), server_name(client)
        self.queue = Queue(self.keys.queue, connection=client, serializer=JSONSerializer)

    def submit(
        self,
        request: RankRequest,
        *,
        model_digest: str,
        expected_active: str | None,
        idempotency_key: str | None = None,
    ) -> tuple[RankingJob, bool]:
        """Queue a ranking, unless the same one is in flight: then that job is the answer.

        Args:
            model_digest: weights to be ranked; a worker that finds others fails the job.
            expected_active: the active version now; if another is active when the job ends, that one stays.
            idempotency_key: a repeated key gives the job of its first use, finished or not.

        Returns:
            The job, and whether it is new.

        Raises:
            Unprocessable: the idempotency key came with another request.
        """
        fingerprint = _fingerprint(request, model_digest)
        with translated_errors(self._server), self._client.lock(self.keys.submitting, timeout=10):
            known = self._known(fingerprint, idempotency_key)
            if known:
                return known, False
            return self._enqueue(request, model_digest, expected_active, fingerprint, idempotency_key), True

    def get(self, job_id: str) -> RankingJob:
        """One job.

        Raises:
            NotFound: no such job, or it ended more than a week ago.
        """
        jobs = self._read([job_id])
        if not jobs:
            raise NotFound(f"no ranking job '{job_id}'; GET /rank-neurons lists them, those that ended for a week")
        return jobs[0]

    def all(self) -> list[RankingJob]:
        """The jobs, newest first."""
        with translated_errors(self._server):
            ids = cast(Iterable[bytes], self._client.zrevrange(self.keys.jobs, 0, KEEP_JOBS - 1))
        return self._read([job_id.decode() for job_id in ids])

    def cancel(self, job_id: str) -> RankingJob:
        """Take a job from the queue, or stop it.

        Raises:
            NotFound: no such job. Conflict: it has ended already.
        """
        job = self.get(job_id)
        if job.state not in UNFINISHED:
            raise Conflict(f"job {job_id} has ended already ({job.state}); there is nothing to cancel")
        try:
            with translated_errors(self._server):
                self._stop(job)
        except NoSuchJobError as error:
            raise NotFound(f"job {job_id} is gone") from error
        return self._when_ended(job_id)

    def recover_interrupted(self) -> list[str]:
        """Queue the jobs again whose process died; they go on from their checkpoint. Called by workers.

        Returns:
            Ids of the jobs that were queued again.
        """
        recovered = []
        for job in self.all():
            if job.state is JobState.INTERRUPTED:
                self._recover(self._fetch(job.id))
                recovered.append(job.id)
        return recovered

    def _known(self, fingerprint: str, idempotency_key: str | None) -> RankingJob | None:
        if idempotency_key and (value := self._client.get(self.keys.idempotency(idempotency_key))):
            first = json.loads(cast(bytes, value))
            if first["fingerprint"] != fingerprint:
                raise Unprocessable(f"Idempotency-Key '{idempotency_key}' came with another request; use a new key")
            return next(iter(self._read([first["id"]])), None)
        in_flight = cast(bytes | None, self._client.get(self.keys.in_flight(fingerprint)))
        jobs = self._read([in_flight.decode()]) if in_flight else []
        return jobs[0] if jobs and jobs[0].state in UNFINISHED else None

    def _enqueue(
        self,
        request: RankRequest,
        model_digest: str,
        expected_active: str | None,
        fingerprint: str,
        idempotency_key: str | None,
    ) -> RankingJob:
        job_id = str(ULID())
        arguments = {
            "request": request.model_dump(mode="json"),
            "model_digest": model_digest,
            "expected_active": expected_active,
        }
        pipeline = self._client.pipeline(transaction=True)
        job = self.queue.enqueue_call(
            FUNCTION,
            kwargs=arguments,
            job_id=job_id,
            timeout=-1,
            result_ttl=KEEP_S,
            failure_ttl=KEEP_S,
            retry=Retry(max=MAX_DEATHS - 1),
            pipeline=pipeline,
        )
        pipeline.set(self.keys.in_flight(fingerprint), job_id, ex=KEEP_S)
        if idempotency_key:
            value = json.dumps({"fingerprint": fingerprint, "id": job_id})
            pipeline.set(self.keys.idempotency(idempotency_key), value, ex=KEEP_S)
        pipeline.zadd(self.keys.jobs, {job_id: time.time()})
        pipeline.zremrangebyrank(self.keys.jobs, 0, -KEEP_JOBS - 1)
        pipeline.execute()
        return self._describe(job, None, None)

    def _read(self, ids: list[str]) -> list[RankingJob]:
        with translated_errors(self._server):
            jobs = Job.fetch_many(ids, connection=self._client, serializer=JSONSerializer)
            pipeline = self._client.pipeline(transaction=False)
            for job_id in ids:
                pipeline.mget(self.keys.progress(job_id), self.keys.alive(job_id))
            reports = pipeline.execute()
            return [self._describe(job, *report) for job, report in zip(jobs, reports, strict=True) if job]

    def _describe(self, job: Job, report: bytes | None, alive: bytes | None) -> RankingJob:
        told = json.loads(report) if report else {}
        result: dict[str, Any] = (job.return_value() or {}) if job.is_finished else {}
        state = _state(job, alive is not None)
        if result.get("error"):
            state = JobState.FAILED
        error = result.get("error")
        if state is JobState.FAILED and not error:
            error = f"the process that ran it died {MAX_DEATHS} times, perhaps for want of memory; see the worker's log"
        return RankingJob(
            id=job.id,
            state=state,
            progress=JobProgress.model_validate(told.get("progress", {})),
            error=error,
            version=result.get("version"),
            activated=result.get("activated"),
            notes=result.get("notes", told.get("notes", [])),
            log=result.get("log", told.get("log", [])),
            request=RankRequest.model_validate((job.kwargs or {})["request"]),
            created_at=_utc(job.created_at) or datetime.now(UTC),
            started_at=_utc(job.started_at),
            ended_at=_utc(job.ended_at),
        )

    def _fetch(self, job_id: str) -> Job:
        return Job.fetch(job_id, connection=self._client, serializer=JSONSerializer)

    def _stop(self, described: RankingJob) -> None:
        job = self._fetch(described.id)
        if described.state is JobState.RUNNING:
            try:
                send_stop_job_command(self._client, job.id, serializer=JSONSerializer)
            except InvalidJobOperation:  # it ended, or began, in between
                job.refresh()
        if job.get_status() == JobStatus.QUEUED or described.state is JobState.INTERRUPTED:
            job.cancel()

    def _when_ended(self, job_id: str) -> RankingJob:
        give_up = time.monotonic() + CANCEL_TIMEOUT_S
        while (job := self.get(job_id)).state in UNFINISHED and time.monotonic() < give_up:
            time.sleep(0.02)
        return job

    def _recover(self, job: Job) -> None:
        if job.retries_left:
            with self._client.pipeline() as pipeline:
                self.queue.started_job_registry.remove_executions(job, pipeline=pipeline)
                job.retry(self.queue, pipeline)
                pipeline.execute()
        else:
            job.set_status(JobStatus.FAILED)


def _state(job: Job, alive: bool) -> JobState:
    status = job.get_status(refresh=False)
    if status in _STATES:
        return _STATES[status]
    if status != JobStatus.STARTED:
        return JobState.QUEUED
    since = _utc(job.started_at) or datetime.now(UTC)
    # A process that has just begun has not yet said that it lives.
    return JobState.RUNNING if alive or (datetime.now(UTC) - since).total_seconds() < ALIVE_S else JobState.INTERRUPTED


def _fingerprint(request: RankRequest, model_digest: str) -> str:
    return hashlib.sha256(f"{model_digest} {request.model_dump_json()}".encode()).hexdigest()[:32]


def _utc(moment: datetime | None) -> datetime | None:
    return moment.replace(tzinfo=UTC) if moment and moment.tzinfo is None else moment
