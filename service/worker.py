"""The worker: one process that runs ranking jobs, each in a process that it forks. And its supervisor."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import Any

from redis.exceptions import RedisError
from rq import Queue, Worker
from rq.executions import Execution
from rq.job import Job
from rq.serializers import JSONSerializer

from importance_store import StoreError, StoreUnavailable
from importance_store.errors import translated_errors
from importance_store.store import server_name
from service.jobs import UNFINISHED, RankingJobs
from service.ranking_job import checkpoint_of
from service.settings import Settings
from service.stores import store_of

logger = logging.getLogger(__name__)

NICENESS = 10
MAX_RESTART_DELAY_S = 30.0
STOP_S = 5.0
RETRY_S = 1.0
MAINTENANCE_S = 2
HEARTBEAT_S = 2


class RankingWorker(Worker):
    """An RQ worker that notices dead jobs within seconds, bears a Redis that goes away, and ends without delay.

    Attributes:
        told_to_stop: by a signal.
    """

    max_connection_wait_time = 2.0

    def __init__(self, settings: Settings, jobs: RankingJobs, client: Any) -> None:
        queue = Queue(jobs.queue.name, connection=client, serializer=JSONSerializer)
        super().__init__(
            [queue],
            connection=client,
            serializer=JSONSerializer,
            worker_ttl=30,
            job_monitoring_interval=HEARTBEAT_S,
            maintenance_interval=MAINTENANCE_S,
        )
        self._settings, self._jobs, self._suspects, self.told_to_stop = settings, jobs, set[str](), False

    @property
    def dequeue_timeout(self) -> int:
        """Seconds to wait for a job; between two waits there is maintenance."""
        return MAINTENANCE_S

    def run_maintenance_tasks(self) -> None:
        """RQ's, and ours."""
        try:
            super().run_maintenance_tasks()  # type: ignore[no-untyped-call]
            self._resume_interrupted()
        except (RedisError, StoreError) as error:
            logger.warning("no maintenance this time: %s", error)

    def _resume_interrupted(self) -> None:
        interrupted = self._jobs.interrupted()
        # Seen twice: after a Redis that was away, a job that lives needs a moment to say so.
        for job_id in interrupted & self._suspects:
            if self._jobs.resume(job_id):
                logger.warning("job %s was interrupted; it is queued again and goes on from its checkpoint", job_id)
        self._suspects = interrupted

    def execute_job(self, job: Job, queue: Queue) -> None:
        """RQ's; the checkpoint goes when the job has ended, however that was."""
        super().execute_job(job, queue)
        if self._jobs.get(job.id).state not in UNFINISHED:
            checkpoint_of(self._settings, job.id).unlink(missing_ok=True)

    def maintain_heartbeats(self, job: Job, execution: Execution) -> None:
        """RQ's, and ours: on a busy machine the job's own process may be late. A job goes on while Redis is away."""
        with suppress(RedisError, StoreError):
            self._jobs.keep_alive(job.id, self.horse_pid)
            super().maintain_heartbeats(job, execution)

    def teardown(self) -> None:
        """RQ's, which cannot say good-bye while Redis is away."""
        with suppress(RedisError):
            super().teardown()  # type: ignore[no-untyped-call]
        if self.pubsub_thread:
            self.pubsub_thread.stop()

    def kill_horse(self, sig: signal.Signals = signal.SIGKILL) -> None:
        """Kill the job's process. RQ's kills a process group: our own, and the server's, when it is not forked yet."""
        if self.horse_pid:
            with suppress(ProcessLookupError):
                os.kill(self.horse_pid, sig)

    def handle_warm_shutdown_request(self) -> None:
        """On a signal: not wait for the job, which may take hours; it goes on when a worker is back."""
        self.told_to_stop = True
        self.kill_horse()

    def handle_work_horse_killed(self, job: Job, retpid: Any, ret_val: Any, rusage: Any) -> None:
        """Called before RQ counts a job's death, which an orderly end is not."""
        if self.told_to_stop and job.retries_left is not None:
            job.retries_left += 1


def work(settings: Settings, *, parent: int | None = None) -> None:
    """Run jobs until told to stop; wait for a store that is away.

    Args:
        parent: process id; the worker ends when that is no longer its parent.
    """
    os.nice(NICENESS)
    settings.export()  # the processes that run the jobs read their settings anew
    if parent is not None:
        threading.Thread(target=_end_without, args=(parent,), name="parent watch", daemon=True).start()
    while True:
        try:
            if _work_until_disturbed(settings):
                return
        except StoreUnavailable as error:
            logger.warning("the worker waits for the store: %s", error)
        time.sleep(RETRY_S)


def _work_until_disturbed(settings: Settings) -> bool:
    """Whether that was a signal; else RQ's worker gave up, as it does when Redis goes away between two jobs."""
    with store_of(settings) as store, store.new_client() as client, translated_errors(server_name(client)):
        worker = RankingWorker(settings, RankingJobs(client, store.model), client)
        try:
            worker.work(logging_level="WARNING")
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)  # were that worker's, which has ended
        return worker.told_to_stop


def _end_without(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(os.EX_TEMPFAIL)


class WorkerSupervisor:
    """Keeps one worker process running beside the server, and starts it again when it ends.

    Args:
        environment: the worker's; the settings are in it.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._supervise, name="worker supervisor", daemon=True)

    def start(self) -> None:
        """Start the worker."""
        self._thread.start()

    def stop(self) -> None:
        """End the worker; a job that it runs is queued again, and goes on when a worker is back."""
        self._stopping.set()
        if self._process and self._process.poll() is None:
            self._process.terminate()
        self._thread.join(STOP_S)
        if self._process and self._process.poll() is None:
            self._process.kill()

    def _supervise(self) -> None:
        delay_s = 1.0
        while not self._stopping.is_set():
            started = time.monotonic()
            command = [sys.executable, "-m", "igd", "worker", "--parent", str(os.getpid())]
            # In a session of its own: a Ctrl-C is for the server, which then ends it.
            self._process = subprocess.Popen(  # noqa: S603
                command, env=self._environment, stdin=subprocess.DEVNULL, start_new_session=True
            )
            code = self._process.wait()
            if self._stopping.is_set():
                return
            delay_s = 1.0 if time.monotonic() - started > 60 else min(2 * delay_s, MAX_RESTART_DELAY_S)
            logger.error("the ranking worker ended with code %d; starting it again in %g s", code, delay_s)
            self._stopping.wait(delay_s)
