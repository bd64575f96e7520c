"""Ranking jobs: submit, look at, cancel. They wait in an RQ queue on the store's Redis; a worker process runs them.

RQ keeps a job's life; three things are ours. RQ is slow to notice a death: the process that runs a job and its worker
renew a key (``alive``), and a started job without it is ``interrupted``. RQ's worker may be about to fork, or deaf
while it reconnects: that process looks for a key that says ``cancelled``. What a job raises by itself is its result, so
that a failure in RQ's sense is always a death, and RQ's retries are only for deaths.
"""

import hashlib
import json
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, TypeAlias, cast

import redis
from redis.client import Pipeline
from redis.exceptions import WatchError
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
_Row: TypeAlias = tuple[Job, bytes | None, bytes | None, bytes | None]
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
        asked_by: Mapping[str, str] = MappingProxyType({}),
    ) -> tuple[RankingJob, bool]:
        """Queue a ranking, unless the same one is in flight: then that job is the answer.

        Args:
            model_digest: weights to be ranked; a worker that finds others fails the job.
            expected_active: the active version now; if another is active when the job ends, that one stays.
            idempotency_key: a repeated key gives the job of its first use, finished or not.
            asked_by: what the request is known by, for the lines that the job logs.

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
            arguments = {
                "request": request.model_dump(mode="json"),
                "model_digest": model_digest,
                "expected_active": expected_active,
            }
            return self._enqueue(arguments, fingerprint, idempotency_key, asked_by), True

    def get(self, job_id: str) -> RankingJob:
        """One job.

        Raises:
            NotFound: no such job, or it ended more than a week ago.
        """
        jobs = self.read([job_id])
        if not jobs:
            raise NotFound(f"no ranking job '{job_id}'; GET /rank-neurons lists them, those that ended for a week")
        return jobs[0]

    def all(self) -> list[RankingJob]:
        """The jobs, newest first."""
        return self.read(self.ids())

    def ids(self) -> list[str]:
        """Of the jobs, newest first."""
        with translated_errors(self._server):
            ids = cast(Iterable[bytes], self._client.zrevrange(self.keys.jobs, 0, KEEP_JOBS - 1))
        return [job_id.decode() for job_id in ids]

    def read(self, ids: list[str]) -> list[RankingJob]:
        """The jobs of these ids, without those that are gone."""
        with translated_errors(self._server):
            return [self._describe(*row) for row in self._rows(ids)]

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

    def interrupted(self) -> set[str]:
        """Ids of the jobs whose process died; or seems to have, until it can report again after Redis was away."""
        with translated_errors(self._server):
            rows = list(self._rows(self.ids()))
        return {job.id for job, _, alive, cancelled in rows if _state(job, alive, cancelled) is JobState.INTERRUPTED}

    def keep_alive(self, job_id: str, process: int) -> None:
        """Say that a process of this host runs the job."""
        with translated_errors(self._server):
            self._client.set(self.keys.alive(job_id), process_name(process), ex=ALIVE_S)

    def resume(self, job_id: str) -> bool:
        """Queue an interrupted job again; it goes on from its checkpoint. Called by workers.

        Returns:
            Whether it was interrupted still; several workers may try, and it may have reported.
        """
        with translated_errors(self._server), self._client.pipeline() as pipeline, suppress(WatchError):
            pipeline.watch(Job.key_for(job_id), self.keys.alive(job_id))  # type: ignore[no-untyped-call]
            job = self._fetch(job_id)
            if pipeline.exists(self.keys.alive(job_id)) or job.get_status(refresh=False) != JobStatus.STARTED:
                return False
            pipeline.multi()
            self._queue_again(job, pipeline)
            pipeline.execute()
            return True
        return False

    def _known(self, fingerprint: str, idempotency_key: str | None) -> RankingJob | None:
        if idempotency_key and (value := self._client.get(self.keys.idempotency(idempotency_key))):
            first = json.loads(cast(bytes, value))
            if first["fingerprint"] != fingerprint:
                raise Unprocessable(f"Idempotency-Key '{idempotency_key}' came with another request; use a new key")
            return next(iter(self.read([first["id"]])), None)
        in_flight = cast(bytes | None, self._client.get(self.keys.in_flight(fingerprint)))
        jobs = self.read([in_flight.decode()]) if in_flight else []
        return jobs[0] if jobs and jobs[0].state in UNFINISHED else None

    def _enqueue(
        self,
        arguments: dict[str, Any],
        fingerprint: str,
        idempotency_key: str | None,
        asked_by: Mapping[str, str],
    ) -> RankingJob:
        job_id = str(ULID())
        pipeline = self._client.pipeline(transaction=True)
        job = self.queue.enqueue_call(
            FUNCTION,
            kwargs=arguments,
            job_id=job_id,
            timeout=-1,
            result_ttl=KEEP_S,
            failure_ttl=KEEP_S,
            retry=Retry(max=MAX_DEATHS - 1),
            meta={"asked_by": dict(asked_by)},
            pipeline=pipeline,
        )
        pipeline.set(self.keys.in_flight(fingerprint), job_id, ex=KEEP_S)
        if idempotency_key:
            value = json.dumps({"fingerprint": fingerprint, "id": job_id})
            pipeline.set(self.keys.idempotency(idempotency_key), value, ex=KEEP_S)
        pipeline.zadd(self.keys.jobs, {job_id: time.time()})
        pipeline.zremrangebyrank(self.keys.jobs, 0, -KEEP_JOBS - 1)
        pipeline.execute()
        return self._describe(job)

    def _rows(self, ids: list[str]) -> Iterator[_Row]:
        """Each job with its keys' values: the report, the process that is alive, when it was cancelled."""
        keys, pipeline = self.keys, self._client.pipeline(transaction=False)
        jobs = Job.fetch_many(ids, connection=self._client, serializer=JSONSerializer)
        for job_id in ids:
            pipeline.mget(keys.progress(job_id), keys.alive(job_id), keys.cancelled(job_id))
        return ((job, *values) for job, values in zip(jobs, pipeline.execute(), strict=True) if job)

    def _describe(
        self, job: Job, report: bytes | None = None, alive: bytes | None = None, cancelled: bytes | None = None
    ) -> RankingJob:
        told = json.loads(report) if report else {}
        result: dict[str, Any] = (job.return_value() or {}) if job.is_finished else {}
        state = _state(job, alive, cancelled)
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
            ended_at=_ended_at(job, state, cancelled),
        )

    def _fetch(self, job_id: str) -> Job:
        return Job.fetch(job_id, connection=self._client, serializer=JSONSerializer)

    def _stop(self, described: RankingJob) -> None:
        self._client.set(self.keys.cancelled(described.id), datetime.now(UTC).isoformat(), ex=KEEP_S)
        job = self._fetch(described.id)
        status = job.get_status(refresh=False)
        with suppress(InvalidJobOperation):  # it has just ended
            if status == JobStatus.QUEUED:
                job.cancel()
                job.cleanup(KEEP_S)
            elif status == JobStatus.STARTED and described.state is JobState.INTERRUPTED:
                job.set_status(JobStatus.CANCELED)
                job.cleanup(KEEP_S)
            elif status == JobStatus.STARTED:
                send_stop_job_command(self._client, job.id, serializer=JSONSerializer)

    def _when_ended(self, job_id: str) -> RankingJob:
        give_up = time.monotonic() + CANCEL_TIMEOUT_S
        while (job := self.get(job_id)).state in UNFINISHED and time.monotonic() < give_up:
            time.sleep(0.02)
        return job

    def _queue_again(self, job: Job, pipeline: Pipeline) -> None:
        """Or fail it, if its processes died too often."""
        registry = self.queue.started_job_registry
        # Not RQ's remove_executions: that raises once an execution's own key has expired.
        executions = registry.get_job_and_execution_ids(cleanup=False)
        for execution in (":".join(ids) for ids in executions if ids[0] == job.id):
            pipeline.zrem(registry.key, execution)
        if job.retries_left:
            job.retry(self.queue, pipeline)
        else:
            job.set_status(JobStatus.FAILED, pipeline=pipeline)
            job.cleanup(KEEP_S, pipeline=pipeline)


def process_name(process: int) -> str:
    """A process id that tells hosts apart."""
    return f"{socket.gethostname()}:{process}"


def _state(job: Job, alive: bytes | None, cancelled: bytes | None) -> JobState:
    status = job.get_status(refresh=False)
    if status in _STATES:
        return _STATES[status]
    if cancelled and not alive:  # a process that is about to begin it will see that first
        return JobState.CANCELLED
    if status != JobStatus.STARTED:
        return JobState.QUEUED
    since = _utc(job.started_at) or datetime.now(UTC)
    # A process that has just begun has not yet said that it lives.
    return JobState.RUNNING if alive or (datetime.now(UTC) - since).total_seconds() < ALIVE_S else JobState.INTERRUPTED


def _fingerprint(request: RankRequest, model_digest: str) -> str:
    return hashlib.sha256(f"{model_digest} {request.model_dump_json()}".encode()).hexdigest()[:32]


def _ended_at(job: Job, state: JobState, cancelled: bytes | None) -> datetime | None:
    if state in UNFINISHED:
        return None  # RQ remembers the end of an attempt that failed
    if state is JobState.CANCELLED and cancelled:
        return datetime.fromisoformat(cancelled.decode())
    return _utc(job.ended_at)


def _utc(moment: datetime | None) -> datetime | None:
    return moment.replace(tzinfo=UTC) if moment and moment.tzinfo is None else moment
