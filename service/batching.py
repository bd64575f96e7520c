"""Dynamic batching by late binding: when the device is free, it takes whatever waits, up to a batch.

By default there is no timer: a lone request never waits for others, and under load batches fill by themselves while the
device is busy. It is the policy of text-embeddings-inference.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import CancelledError, Executor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import ceil
from typing import Generic, TypeVar

from service.errors import NotReady, QueueFull

logger = logging.getLogger(__name__)

Group = TypeVar("Group", bound=Hashable)
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(eq=False, slots=True)
class _Waiting(Generic[Group, Item, Result]):
    group: Group
    item: Item
    answer: "asyncio.Future[Result]"
    since: float  # on the loop's clock


class Batcher(Generic[Group, Item, Result]):
    """One queue, one dispatcher, one device thread.

    Args:
        run_batch: called on the device thread with a group and up to ``max_batch_size`` items of it; returns a result
            for each item, in order. If it raises, the items are tried one by one: only the culprit gets the error.
        device: an executor with one thread.
        max_batch_size: items in a batch. max_queue: items admitted and not yet answered.
        max_wait_s: how long the oldest item may wait for a batch to fill although the device is free. It pays only
            where a batch costs much the same whatever its size.
        on_death: called if the dispatcher dies of a bug; by then nobody is left waiting.
    """

    def __init__(
        self,
        run_batch: Callable[[Group, list[Item]], Sequence[Result]],
        device: Executor,
        *,
        max_batch_size: int,
        max_queue: int,
        max_wait_s: float = 0.0,
        on_death: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        self._run_batch, self._device, self._on_death = run_batch, device, on_death
        self.max_batch_size, self.max_queue, self.max_wait_s = max_batch_size, max_queue, max_wait_s
        self._queue: deque[_Waiting[Group, Item, Result]] = deque()
        self._taken: list[_Waiting[Group, Item, Result]] = []
        self._wake = asyncio.Event()
        self._dispatcher: asyncio.Task[None] | None = None
        self._draining = False
        self._items_per_s = 0.0
        self.in_flight = 0

    @property
    def alive(self) -> bool:
        """Whether submitted items will be answered."""
        return self._dispatcher is not None and not self._dispatcher.done()

    @property
    def accepting(self) -> bool:
        """Whether new items are admitted."""
        return self.alive and not self._draining

    @property
    def depth(self) -> int:
        """Items that wait for the device."""
        return len(self._queue)

    def start(self) -> None:
        """Start the dispatcher on the running event loop."""
        self._dispatcher = asyncio.get_running_loop().create_task(self._dispatch(), name="batch dispatcher")
        self._dispatcher.add_done_callback(self._dispatcher_ended)

    async def drain(self, timeout_s: float) -> None:
        """Admit nothing more, answer what was admitted (for ``timeout_s`` at most), stop."""
        self._draining = True
        self._wake.set()  # a batch that waits to fill need not any more
        loop = asyncio.get_running_loop()
        give_up = loop.time() + timeout_s
        while self.in_flight and self.alive and loop.time() < give_up:  # noqa: ASYNC110 - once in a life
            await asyncio.sleep(0.01)
        if self._dispatcher:
            self._dispatcher.cancel()
            await asyncio.wait([self._dispatcher])

    @contextmanager
    def admit(self, count: int) -> Iterator[None]:
        """Hold places for ``count`` items; to be taken before any work is spent on them.

        Raises:
            QueueFull: with the seconds after which there should be room, from the current rate.
            NotReady: draining, or the dispatcher is dead.
        """
        if not self.accepting:
            raise NotReady("the server is shutting down; send the request to another replica, or again in a moment")
        # A request larger than the whole queue is let in when it is alone: refusing it would be for ever.
        if self.in_flight and self.in_flight + count > self.max_queue:
            retry_after_s = min(30, max(1, ceil(self.in_flight / self._items_per_s))) if self._items_per_s else 1
            raise QueueFull(
                f"{self.in_flight} images are in progress and the queue holds {self.max_queue}; "
                f"try again in {retry_after_s} s",
                retry_after_s,
            )
        self.in_flight += count
        try:
            yield
        finally:
            self.in_flight -= count

    async def submit(self, group: Group, items: Sequence[Item]) -> list[Result]:
        """The results of ``items``, in order. If the caller is cancelled, the device never sees what still waits."""
        loop = asyncio.get_running_loop()
        if not self.alive:
            raise NotReady("the batch dispatcher is not running; restart the server")
        now = loop.time()
        waiting = [_Waiting[Group, Item, Result](group, item, loop.create_future(), now) for item in items]
        self._queue.extend(waiting)
        self._wake.set()
        try:
            if len(waiting) == 1:  # gather costs as much as all the rest of this method
                return [await waiting[0].answer]
            return await asyncio.gather(*(w.answer for w in waiting))
        finally:
            for w in waiting:  # where one failed, nobody will read the others
                w.answer.cancel()

    async def _dispatch(self) -> None:
        while True:
            await self._wake.wait()
            if self.max_wait_s:
                await self._linger()
            self._take()
            if self._taken:
                await self._run(self._taken)
            else:
                self._wake.clear()

    async def _linger(self) -> None:
        """Wait while the batch may fill: until it is full, or its oldest item has waited long enough."""
        loop = asyncio.get_running_loop()
        while self._queue and len(self._queue) < self.max_batch_size and not self._draining:
            left_s = self._queue[0].since + self.max_wait_s - loop.time()
            if left_s <= 0:
                break
            self._wake.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._wake.wait()
        self._wake.set()

    def _take(self) -> None:
        """Take the oldest items that are still wanted, all of one group."""
        batch = self._taken = []
        while self._queue and len(batch) < self.max_batch_size:
            if self._queue[0].answer.done():  # its caller left
                self._queue.popleft()
            elif batch and self._queue[0].group != batch[0].group:
                break
            else:
                batch.append(self._queue.popleft())

    async def _run(self, batch: list[_Waiting[Group, Item, Result]]) -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            results = await self._on_device(batch)
        except Exception as error:
            if len(batch) == 1:
                _fail(batch, error)
                return
            logger.exception("a batch of %d failed; trying its images one by one", len(batch))
            for one in batch:
                if not one.answer.done():
                    await self._run([one])
            return
        for w, result in zip(batch, results, strict=True):
            if not w.answer.done():
                w.answer.set_result(result)
        rate = len(batch) / max(loop.time() - started, 1e-9)
        self._items_per_s = 0.9 * self._items_per_s + 0.1 * rate if self._items_per_s else rate

    async def _on_device(self, batch: list[_Waiting[Group, Item, Result]]) -> Sequence[Result]:
        items = [w.item for w in batch]
        results = await asyncio.get_running_loop().run_in_executor(self._device, self._call, batch[0].group, items)
        if len(results) != len(items):
            raise RuntimeError(f"expected {len(items)} results of a batch, got {len(results)}")
        return results

    def _call(self, group: Group, items: list[Item]) -> Sequence[Result]:
        try:
            return self._run_batch(group, items)
        except (StopIteration, asyncio.CancelledError, CancelledError) as error:
            # asyncio takes these for its own: the dispatcher would wait for ever, or end as if it had been told to.
            raise RuntimeError(repr(error)) from error

    def _dispatcher_ended(self, task: "asyncio.Task[None]") -> None:
        error = None if task.cancelled() else task.exception()
        reason = NotReady(
            "the server is shutting down; send the request again"
            if error is None
            else f"the batch dispatcher died ({error!r}); send the request again when the server has restarted"
        )
        _fail([*self._taken, *self._queue], reason)
        self._queue.clear()
        if error is not None:
            logger.critical("the batch dispatcher died", exc_info=error)
            self._on_death(error)


def _fail(batch: Sequence[_Waiting[Group, Item, Result]], error: Exception) -> None:
    for w in batch:
        if not w.answer.done():
            w.answer.set_exception(error)
