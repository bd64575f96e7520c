"""How a replica learns that another version was activated."""

import logging
import random
import threading
import time
from collections.abc import Callable
from enum import Enum
from typing import Any, Self

from importance_store.errors import StoreError
from importance_store.store import ImportanceStore

logger = logging.getLogger(__name__)

# An event ends the wait at once; this is only how often the thread sees that it shall stop.
BLOCK_S = 0.5
STOP_TIMEOUT_S = 0.9
MAX_RECONNECT_DELAY_S = 0.5
MAX_CALLBACK_DELAY_S = 30.0


class _Never(Enum):
    REPORTED = "nothing yet"


class ChangeWatcher:
    """A thread that reports the active version: once at the start, then whenever it changes.

    It follows the event stream and reads the pointer again at every wake-up and after every
    reconnect, so that a change made while the connection was lost is seen too. A callback that
    raises is logged and called again with growing delay; the thread goes on.

    Args:
        store: on a client of its own that does not retry and whose socket timeout is above
            ``BLOCK_S`` (``ConnectedStore.watch`` makes one); closed by the thread when it ends.
        on_change: gets the active version, None if there is none. Runs in the thread.
        on_store_up: gets True or False at the start and whenever the store comes back or goes away.
    """

    def __init__(
        self,
        store: ImportanceStore,
        *,
        on_change: Callable[[str | None], object],
        on_store_up: Callable[[bool], object] = lambda up: None,
    ) -> None:
        self._store = store
        self._on_change = _Reporter(on_change)
        self._on_store_up = _Reporter(on_store_up)
        self._reconnects = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"importance-changes-{store.model}", daemon=True)

    def start(self) -> Self:
        """Start watching; at most once."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """Stop within a second. A callback that takes longer is left to finish in its thread."""
        self._stopping.set()
        self._thread.join(STOP_TIMEOUT_S)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._follow()
            except StoreError as error:
                self._store_is_down(error)
            except Exception:
                logger.exception("watching the importance of %s failed; trying again", self._store.model)
            self._stopping.wait(self._reconnect_delay_s())
        self._store.close()

    def _follow(self) -> None:
        last_event = self._store.last_event()  # before the pointer: a change in between is then an event
        while not self._stopping.is_set():
            active = self._store.active_version()
            self._reconnects = 0
            self._on_store_up.report(True)
            self._on_change.report(active)
            last_event = self._store.wait_for_event(after=last_event, timeout_s=BLOCK_S)

    def _store_is_down(self, error: StoreError) -> None:
        if self._reconnects == 0:
            logger.warning("lost the store of model %s: %s", self._store.model, error)
        self._reconnects += 1
        self._on_store_up.report(False)

    def _reconnect_delay_s(self) -> float:
        # The jitter keeps many replicas from coming back at the same moment.
        delay_s = min(MAX_RECONNECT_DELAY_S, 0.05 * 2.0 ** min(self._reconnects, 10))
        return delay_s * random.uniform(0.5, 1)  # noqa: S311 - no secret


class _Reporter:
    """Calls back with each new value; a value whose callback raised is reported again, later."""

    def __init__(self, callback: Callable[[Any], object]) -> None:
        self._callback = callback
        self._reported: object = _Never.REPORTED
        self._failed: object = _Never.REPORTED
        self._delay_s = 0.0
        self._retry_at = 0.0

    def report(self, value: object) -> None:
        if value == self._reported or (value == self._failed and time.monotonic() < self._retry_at):
            return
        try:
            self._callback(value)
        except Exception:
            delay_s = self._postpone(value)
            logger.exception("the callback for %r failed; calling it again in %.1f s", value, delay_s)
        else:
            self._reported, self._failed = value, _Never.REPORTED

    def _postpone(self, value: object) -> float:
        self._delay_s = min(2 * self._delay_s, MAX_CALLBACK_DELAY_S) if value == self._failed else BLOCK_S
        self._failed, self._retry_at = value, time.monotonic() + self._delay_s
        return self._delay_s
