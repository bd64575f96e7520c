"""The worker: one process that runs ranking jobs, each in a process that it forks. And its supervisor."""

import logging
import os
import subprocess
import sys
import threading
import time

from rq import Queue, Worker
from rq.serializers import JSONSerializer

from defense import read_config
from service.jobs import RankingJobs
from service.settings import Settings
from service.stores import store_of

logger = logging.getLogger(__name__)

NICENESS = 10
MAX_RESTART_DELAY_S = 30.0
STOP_S = 3.0


class RankingWorker(Worker):
    """An RQ worker that notices dead jobs within seconds and queues them again."""

    jobs: RankingJobs

    def run_maintenance_tasks(self) -> None:
        """RQ's, and ours."""
        super().run_maintenance_tasks()  # type: ignore[no-untyped-call]
        for job_id in self.jobs.recover_interrupted():
            logger.warning("job %s was interrupted; it is queued again and goes on from its checkpoint", job_id)


def work(settings: Settings, *, parent: int | None = None) -> None:
    """Run jobs until told to stop.

    Args:
        parent: process id; the worker ends when that is no longer its parent.
    """
    _step_back()
    if parent is not None:
        threading.Thread(target=_end_without, args=(parent,), name="parent watch", daemon=True).start()
    model = read_config(settings.model).name
    with store_of(settings) as store, store.new_client() as client:
        # Not a default of RQ's: a client that tries again, so that a Redis that restarts does not end the worker.
        jobs = RankingJobs(client, model)
        queue = Queue(jobs.queue.name, connection=client, serializer=JSONSerializer)
        worker = RankingWorker(
            [queue],
            connection=client,
            serializer=JSONSerializer,
            worker_ttl=30,
            job_monitoring_interval=5,
            maintenance_interval=3,
        )
        worker.jobs = jobs
        worker.work(logging_level="WARNING")


def _step_back() -> None:
    """Leave the processors to the server: a ranking may wait, a request may not."""
    os.nice(NICENESS)
    if sys.platform == "linux":
        # Nice alone still lets a ranking hold a core for milliseconds when a request comes.
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


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
        """End the worker; a job that it runs is interrupted, and goes on when a worker is back."""
        self._stopping.set()
        if self._process and self._process.poll() is None:
            self._process.kill()  # not SIGTERM: RQ would wait for the job, which may take hours
        self._thread.join(STOP_S)

    def _supervise(self) -> None:
        delay_s = 1.0
        while not self._stopping.is_set():
            started = time.monotonic()
            command = [sys.executable, "-m", "igd", "worker", "--parent", str(os.getpid())]
            self._process = subprocess.Popen(command, env=self._environment, stdin=subprocess.DEVNULL)  # noqa: S603
            code = self._process.wait()
            if self._stopping.is_set():
                return
            delay_s = 1.0 if time.monotonic() - started > 60 else min(2 * delay_s, MAX_RESTART_DELAY_S)
            logger.error("the ranking worker ended with code %d; starting it again in %g s", code, delay_s)
            self._stopping.wait(delay_s)
