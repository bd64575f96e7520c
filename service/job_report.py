"""How a running job tells of itself: alive, progress, log. One thread writes, so that the ranking never waits."""

import json
import logging
import os
import threading
import time
from collections import deque
from types import TracebackType
from typing import Self

import redis
from redis.exceptions import RedisError

from service.job_keys import JobKeys
from service.jobs import ALIVE_S, KEEP_S

logger = logging.getLogger(__name__)

REPORT_S = 0.5
LOG_LINES = 40


class JobReport(logging.Handler):
    """Reports twice a second while its block runs, and ends the process when the worker that started it is gone.

    A worker that was killed leaves the processes it forked behind; nobody could cancel such a job any more, and another
    worker takes it up again.

    Attributes:
        log: the last lines logged in this process.
    """

    def __init__(self, client: redis.Redis, keys: JobKeys, job_id: str) -> None:
        super().__init__(logging.INFO)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self.log: deque[str] = deque(maxlen=LOG_LINES)
        self._client, self._keys, self._job_id = client, keys, job_id
        self._done, self._total = 0, 0
        self._began_at, self._began_with = time.monotonic(), 0
        self._parent, self._stopping = os.getppid(), threading.Event()
        self._thread = threading.Thread(target=self._report_until_stopped, name="job report", daemon=True)

    def __enter__(self) -> Self:
        root = logging.getLogger()
        root.addHandler(self)
        root.setLevel(min(root.level, logging.INFO))
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stopping.set()
        self._thread.join()
        logging.getLogger().removeHandler(self)
        self._report()

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
            if os.getppid() != self._parent:
                os._exit(os.EX_TEMPFAIL)
            self._report()

    def _report(self) -> None:
        try:
            pipeline = self._client.pipeline(transaction=False)
            pipeline.set(self._keys.alive(self._job_id), os.getpid(), ex=ALIVE_S)
            pipeline.set(self._keys.progress(self._job_id), json.dumps(self._state()), ex=KEEP_S)
            pipeline.execute()
        except RedisError as error:
            logger.debug("no progress report: %s", error)  # the next one tells the same, and the ranking goes on

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
