"""How a running job tells of itself: alive, progress, log. One thread does, so that the ranking never waits."""

import json
import logging
import os
import threading
import time
from collections import deque
from types import TracebackType
from typing import Self

from redis.exceptions import RedisError
from rq.job import Job, JobStatus

from service.job_keys import JobKeys
from service.jobs import ALIVE_S, KEEP_S, process_name

logger = logging.getLogger(__name__)

REPORT_S = 0.5
LOG_LINES = 40
PATIENCE_S = 120.0


class JobReport(logging.Handler):
    """Reports twice a second while its block runs, and ends the process when nobody wants the job from it any more.

    That is when the job is cancelled; when the worker is gone that forked this process, because another one takes the
    job up again; and when that has happened already, because Redis was away for so long that this one seemed dead.

    Attributes:
        log: the last lines logged in this process.
    """

    def __init__(self, job: Job, keys: JobKeys) -> None:
        super().__init__(logging.INFO)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self.log: deque[str] = deque(maxlen=LOG_LINES)
        self._job, self._client, self._keys = job, job.connection, keys
        self._name = process_name(os.getpid())
        self._done, self._total = 0, 0
        self._began_at, self._began_with = time.monotonic(), 0
        self._parent, self._stopping = os.getppid(), threading.Event()
        self._thread = threading.Thread(target=self._report_until_stopped, name="job report", daemon=True)

    def __enter__(self) -> Self:
        root = logging.getLogger()
        root.addHandler(self)
        root.setLevel(min(root.level, logging.INFO))
        self._report(first=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stopping.set()
        self._thread.join()
        logging.getLogger().removeHandler(self)
        give_up = time.monotonic() + PATIENCE_S
        # RQ writes down the result next, and would lose it while Redis is away.
        while not self._report(last=True) and time.monotonic() < give_up:
            time.sleep(REPORT_S)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a log line."""
        self.log.append(self.format(record))

    def progress(self, done: int, total: int) -> None:
        """Take note of the progress, in images; what a checkpoint saved does not count for the rate."""
        if not self._total:
            self._began_at, self._began_with = time.monotonic(), done
        self._done, self._total = done, total

    def _report_until_stopped(self) -> None:
        while not self._stopping.wait(REPORT_S):
            self._report()

    def _report(self, *, first: bool = False, last: bool = False) -> bool:
        """Whether it was heard; if not, the next one tells the same."""
        if os.getppid() != self._parent:
            os._exit(os.EX_TEMPFAIL)
        try:
            if not last:  # it has been published by then
                self._end_unless_wanted(first)
            pipeline = self._client.pipeline(transaction=False)
            pipeline.set(self._keys.alive(self._job.id), self._name, ex=ALIVE_S)
            pipeline.set(self._keys.progress(self._job.id), json.dumps(self._state()), ex=KEEP_S)
            pipeline.execute()
        except RedisError as error:
            logger.debug("no progress report: %s", error)
            return False
        return True

    def _end_unless_wanted(self, first: bool) -> None:
        cancelled, alive = self._client.mget(self._keys.cancelled(self._job.id), self._keys.alive(self._job.id))
        if cancelled:
            self._job.set_status(JobStatus.CANCELED)
            self._job.cleanup(KEEP_S)
            os._exit(os.EX_OK)  # the worker then leaves the job as it is
        if not first and alive not in (None, self._name.encode()):
            os._exit(os.EX_OK)  # another process runs it

    def _state(self) -> dict[str, object]:
        elapsed_s = time.monotonic() - self._began_at
        rate = (self._done - self._began_with) / elapsed_s if elapsed_s > 0 else 0.0
        progress = {
            "done": self._done,
            "total": self._total or None,
            "rate": round(rate, 3),
            "eta_s": round((self._total - self._done) / rate, 3) if rate else None,
        }
        return {"progress": progress, "log": list(self.log)}
