"""An event loop whose time is simulated: it never sleeps, and jumps to the next timer when there is nothing to do."""

import asyncio
import heapq
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor, Future
from typing import Any


class SimulatedTime(asyncio.SelectorEventLoop):
    """``time()`` is in seconds from 0 and the same in every run."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0

    def time(self) -> float:
        return self._now

    def _run_once(self) -> None:
        while self._scheduled and self._scheduled[0]._cancelled:
            heapq.heappop(self._scheduled)._scheduled = False
        if not self._ready and self._scheduled:
            self._now = max(self._now, self._scheduled[0].when())
        super()._run_once()


class SimulatedDevice(Executor):
    """A device on which a batch takes ``cost_s(items)`` of simulated time; it refuses two batches at once."""

    def __init__(self, loop: SimulatedTime, cost_s: Callable[[int], float]) -> None:
        self._loop, self._cost_s, self._busy = loop, cost_s, False
        self.batches: list[tuple[float, list[Any]]] = []  # when each began, and its items

    def run_batch(self, group: object, items: list[Any]) -> list[Any]:
        """What the batcher is to call: each item is its own result."""
        self.batches.append((self._loop.time(), items))
        return items

    def submit(self, run: Callable[..., Any], /, *arguments: Any, **options: Any) -> "Future[Any]":
        assert not self._busy, "the device was given a batch before it was free"
        self._busy, before = True, len(self.batches)
        future: Future[Any] = Future()
        result = run(*arguments, **options)
        cost_s = sum(self._cost_s(len(items)) for _, items in self.batches[before:])
        self._loop.call_later(cost_s, self._finish, future, result)
        return future

    def _finish(self, future: "Future[Any]", result: Any) -> None:
        self._busy = False
        future.set_result(result)


def simulate(scenario: Callable[[SimulatedTime], Coroutine[Any, Any, Any]]) -> Any:
    """Run ``scenario(loop)`` in simulated time; its result."""
    loop = SimulatedTime()
    try:
        return loop.run_until_complete(scenario(loop))
    finally:
        loop.close()
