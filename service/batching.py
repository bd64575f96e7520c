"""Dynamic batching by late binding: when the device is free, it takes whatever waits, up to a batch.

By default there is no timer: a lone request never waits for others, and under load batches fill by themselves while the
device is busy. It is the policy of text-embeddings-inference. The device thread takes the next batch by itself: were it
handed over by the event loop, the device would stand still whenever the loop has other things to do.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import CancelledError, Executor, Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import ceil, inf
from threading import Lock
from typing import Any, Generic, TypeVar

from service.device import Device
from service.errors import Draining, NotReady, QueueFull
from service.returning_clients import ReturningClients, requests_of

logger = logging.getLogger(__name__)

IN_PLACE_S = 0.005  # for so long the event loop may stand still

Group = TypeVar("Group", bound=Hashable)
Item = TypeVar("Item")
Result = TypeVar("Result")
HandOut = Callable[[], None]


def _nothing() -> None:
    """Nobody waits."""


@dataclass(slots=True)
class _Request:
    """What the items of a submission share."""

    queued_s: float  # on perf_counter's: uvloop's clock counts milliseconds, and stands still while the loop is busy
    failed: bool = False  # then nobody reads the results of the others


@dataclass(eq=False, slots=True)
class _Waiting(Generic[Group, Item, Result]):
    group: Group
    item: Item
    answer: "asyncio.Future[Result]"
    since: float  # on the loop's clock
    request: _Request

    @property
    def wanted(self) -> bool:
        return not (self.answer.done() or self.request.failed)


class Batcher(Generic[Group, Item, Result]):
    """One queue, one dispatcher, one device thread.

    Under load the results of a batch are handed out when the next one has been prepared: they make the event loop busy,
    and what is prepared in Python meanwhile would wait for Python's lock, again and again.

    Only where items take long and few are under way are the results handed out first, and the next batch waits for
    those who got them: see ``service.returning_clients``.

    Args:
        run_batch: called on the device thread with a group and what ``prepare`` made of up to ``max_batch_size`` items
            of it; returns a result for each item, in order. If it raises, the items are tried one by one: only the
            culprit gets the error.
        device: an executor with one thread; with ``in_place``, a ``service.device.Device``.
        max_batch_size: items in a batch. max_queue: items admitted and not yet answered.
        max_wait_s: how long the oldest item may wait for a batch to fill although the device is free. It pays only
            where a batch costs much the same whatever its size.
        in_place: whether items of a group may be run on the event loop's thread. They are while nothing else is in
            progress and a lone item takes less than ``IN_PLACE_S``: the way to the device thread and back is longer
            than the wait that the loop is spared.
        on_death: called if the dispatcher dies of a bug; by then nobody is left waiting.
        on_taken: called on the device thread with the seconds that each item of a batch has waited for it.
        prepare: the part of a batch that needs Python's lock and is short; by default the items are left as they are.
        clock: tells what a batch takes; see ``ReturningClients``.
    """

    def __init__(
        self,
        run_batch: Callable[[Group, Any], Sequence[Result]],
        device: Executor,
        *,
        max_batch_size: int,
        max_queue: int,
        max_wait_s: float = 0.0,
        in_place: Callable[[Group], bool] = lambda group: False,
        on_death: Callable[[BaseException], None] = lambda error: None,
        on_taken: Callable[[list[float]], None] = lambda waits_s: None,
        prepare: Callable[[Group, list[Item]], Any] = lambda group, items: items,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._run_batch, self._device, self._on_death, self._on_taken = run_batch, device, on_death, on_taken
        self._in_place, self._prepare = in_place, prepare
        self.max_batch_size, self.max_queue, self.max_wait_s = max_batch_size, max_queue, max_wait_s
        self._queue: deque[_Waiting[Group, Item, Result]] = deque()
        self._taken: deque[list[_Waiting[Group, Item, Result]]] = deque()  # batches not settled yet, oldest first
        self._taking = Lock()  # or the end would miss what goes from the one to the other
        self._loop: asyncio.AbstractEventLoop | None = None
        self._busy = False  # the device has a batch, or is about to take one
        self._due = False  # it is going to be looked whether the device has something to do
        self._timer: asyncio.TimerHandle | None = None
        self._ended = self._draining = False
        self._work_since = 0.0  # when the last results were handed out, or the first of those in progress admitted
        self._recent_items = self._recent_s = 0.0  # of the last ten turns or so
        self._lone_s = inf  # what the last item that was alone in its batch took
        self._returning = ReturningClients(max_batch_size, clock)
        self.in_flight = 0

    @property
    def alive(self) -> bool:
        """Whether submitted items will be answered."""
        return self._loop is not None and not self._ended

    @property
    def accepting(self) -> bool:
        """Whether new items are admitted."""
        return self.alive and not self._draining

    @property
    def depth(self) -> int:
        """Items that wait for the device."""
        return len(self._queue)

    @property
    def _s_per_item(self) -> float:
        return self._recent_s / self._recent_items if self._recent_items else 0.0

    def start(self) -> None:
        """Begin to take items; to be called on the event loop."""
        self._loop = asyncio.get_running_loop()

    async def drain(self, timeout_s: float) -> None:
        """Admit nothing more, answer what was admitted (for ``timeout_s`` at most), stop."""
        loop = asyncio.get_running_loop()
        self._draining = True
        if self.alive:
            self._begin_if_due(loop)  # a batch that waits to fill need not any more
        give_up = loop.time() + timeout_s
        while self.in_flight and self.alive and loop.time() < give_up:  # noqa: ASYNC110 - once in a life
            await asyncio.sleep(0.01)
        self._end(Draining("the server is shutting down; send the request again"))

    def check_room(self, count: int = 1) -> None:
        """Refuse what would not be admitted now.

        Raises:
            QueueFull: with the seconds after which there should be room, from the current rate.
            NotReady: draining, or the dispatcher is dead.
        """
        if not self.accepting:
            raise Draining("the server is shutting down; send the request to another replica, or again in a moment")
        # A request larger than the whole queue is let in when it is alone: refusing it would be for ever.
        if self.in_flight and self.in_flight + count > self.max_queue:
            retry_after_s = min(30, max(1, ceil(self.in_flight * self._s_per_item)))
            raise QueueFull(
                f"{self.in_flight} images are in progress and the queue holds {self.max_queue}; "
                f"try again in {retry_after_s} s",
                retry_after_s,
            )

    @contextmanager
    def admit(self, count: int) -> Iterator[None]:
        """Hold places for ``count`` items; to be taken before any work is spent on them.

        Raises:
            QueueFull, NotReady: see ``check_room``.
        """
        self.take_places(count)
        try:
            yield
        finally:
            self.in_flight -= count

    def take_places(self, count: int) -> None:
        """``admit``, for as long as the caller likes: what it took is to be subtracted from ``in_flight``."""
        self.check_room(count)
        if not self.in_flight and self._loop:
            self._work_since = self._loop.time()
        self.in_flight += count

    async def submit(self, group: Group, items: Sequence[Item]) -> list[Result]:
        """The results of ``items``, in order. If the caller is cancelled, the device never sees what still waits."""
        answers = self.enqueue(group, items)
        try:
            if len(answers) == 1:  # gather costs as much as all the rest of this method
                return [await answers[0]]
            return await asyncio.gather(*answers)
        finally:
            for answer in answers:  # where one failed, nobody will read the others
                answer.cancel()

    def enqueue(self, group: Group, items: Sequence[Item]) -> "list[asyncio.Future[Result]]":
        """``submit``, for a caller that is no task; the device never sees an item whose future is cancelled in time."""
        if self._loop is None or not self.alive:
            raise NotReady("the batch dispatcher is not running; restart the server")
        loop, now = self._loop, self._loop.time()
        request = _Request(time.perf_counter())
        waiting = [_Waiting[Group, Item, Result](group, item, loop.create_future(), now, request) for item in items]
        self._queue.extend(waiting)
        if not (self._busy or self._due):  # not at once: those that are ready to submit, too, go into the same batch
            self._due = True
            loop.call_soon(self._begin_if_due, loop)
        return [w.answer for w in waiting]

    # On the event loop:

    def _begin_if_due(self, loop: asyncio.AbstractEventLoop) -> None:
        """Give the device something to do, unless it has, or the batch may still fill."""
        self._due = False
        if self._timer:
            self._timer.cancel()
            self._timer = None
        if self._busy or not self._queue:
            return
        left_s = self._left_to_wait_s(loop)
        if left_s > 0:
            self._timer = loop.call_later(left_s, self._begin_if_due, loop)
        else:
            self._busy = True
            self._returning.learn(self._queue)
            if not (self._is_for_here() and self._ran_here(loop)):
                self._give_device_a_turn(loop)

    def _is_for_here(self) -> bool:
        """Whether a lone, quick item waits and nothing else is in progress."""
        alone = self.in_flight == len(self._queue) == 1
        return alone and self._lone_s < IN_PLACE_S and self._in_place(self._queue[0].group)

    def _ran_here(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Run a batch on this thread, if the device does nothing else (it may be preparing another importance)."""
        turn = self._device.run_here(self._turn) if isinstance(self._device, Device) else None
        if turn is not None:
            self._settle(loop, turn, goes_on=False)
        return turn is not None

    def _left_to_wait_s(self, loop: asyncio.AbstractEventLoop) -> float:
        if self._draining or len(self._queue) >= self.max_batch_size:
            return 0
        if not self.max_wait_s:
            return self._returning.left_s(self._queue, loop.time())
        since = next((w.since for w in self._queue if w.wanted), -self.max_wait_s)
        return since + self.max_wait_s - loop.time()

    def _settle(
        self,
        loop: asyncio.AbstractEventLoop,
        turn: "Future[Sequence[Result | Exception]]",
        goes_on: bool,
        return_s: float = 0.0,
    ) -> None:
        """Hand out the results of a batch.

        Args:
            goes_on: the device has the next one. return_s: how long it may wait for those who are answered now.
        """
        if not self.alive:
            return
        try:
            outcomes = turn.result()
            batch = self._taken[0]  # it stays there until it is answered, for where this fails
            answered = requests_of(batch) if return_s else 0
            for w, outcome in zip(batch, outcomes, strict=True):
                if w.answer.done():
                    continue
                if isinstance(outcome, Exception):
                    w.answer.set_exception(outcome)
                else:
                    w.answer.set_result(outcome)
            self._taken.popleft()
            self._recent_items = 0.9 * self._recent_items + len(batch)
            self._recent_s = 0.9 * self._recent_s + loop.time() - self._work_since
            self._work_since = loop.time()
            if not goes_on:
                self._busy = False
                self._returning.await_them(answered, self._queue, loop.time(), return_s)
                self._begin_if_due(loop)
        except BaseException as error:  # noqa: BLE001 - whatever it is, nobody may be left waiting
            self._die(error)

    def _die(self, error: BaseException) -> None:
        logger.critical("the batch dispatcher died", exc_info=error)
        self._end(
            NotReady(f"the batch dispatcher died ({error!r}); send the request again when the server has restarted")
        )
        self._on_death(error)

    def _end(self, reason: NotReady) -> None:
        with self._taking:
            self._ended = True
            waiting = [*(w for batch in self._taken for w in batch), *self._queue]
            self._taken.clear()
            self._queue.clear()
        for w in waiting:
            if not w.answer.done():
                w.answer.set_exception(reason)

    # On the device thread, but for the first turn:

    def _give_device_a_turn(self, loop: asyncio.AbstractEventLoop, hand_out: HandOut = _nothing) -> None:
        # One batch a turn: whatever else was given to the executor meanwhile comes before the next.
        try:
            turn = self._device.submit(self._turn, hand_out)
        except RuntimeError as error:  # it was shut down, or there are no more threads to be had
            if not self._ended:
                loop.call_soon_threadsafe(self._die, error)
            return
        turn.add_done_callback(lambda turn: self._after_turn(loop, turn))

    def _after_turn(self, loop: asyncio.AbstractEventLoop, turn: "Future[Sequence[Result | Exception]]") -> None:
        if self._ended:  # by then the loop may be closed
            return
        return_s = 0.0 if self.max_wait_s else self._returning.end(len(self._queue))
        goes_on = bool(self._queue) and not self.max_wait_s and not return_s and turn.exception() is None

        def hand_out() -> None:
            if not self._ended:
                loop.call_soon_threadsafe(self._settle, loop, turn, goes_on, return_s)

        next_is_at_once = isinstance(self._device, Device) and not self._device.waiting
        if goes_on and next_is_at_once:
            self._give_device_a_turn(loop, hand_out)
            return
        hand_out()  # before the next turn is given: it may be over at once, and batches are settled in their order
        if goes_on:
            self._give_device_a_turn(loop)

    def _turn(self, hand_out: HandOut = _nothing) -> Sequence[Result | Exception]:
        """Take a batch and run it.

        Args:
            hand_out: gives the results of the batch before to those who wait for them.
        """
        with ExitStack() as before:
            before.callback(hand_out)
            batch, began_s = self._take(), time.perf_counter()
            self._returning.begin(batch)
            self._on_taken([began_s - w.request.queued_s for w in batch])
            outcomes = self._outcomes(batch, before.close)  # or, if it does not come so far, in the end
            if len(batch) == 1:
                self._lone_s = time.perf_counter() - began_s
            return outcomes

    def _take(self) -> list[_Waiting[Group, Item, Result]]:
        """Take the oldest items that are still wanted, all of one group."""
        batch: list[_Waiting[Group, Item, Result]] = []
        with self._taking:
            if self._ended:
                return batch
            self._taken.append(batch)
            while self._queue and len(batch) < self.max_batch_size:
                if not self._queue[0].wanted:
                    self._queue.popleft()
                elif batch and self._queue[0].group != batch[0].group:
                    break
                else:
                    batch.append(self._queue.popleft())
        return batch

    def _outcomes(
        self, batch: list[_Waiting[Group, Item, Result]], prepared: HandOut = _nothing
    ) -> Sequence[Result | Exception]:
        """A result or an error for each item."""
        if not batch:
            return []
        try:
            return self._results(batch, prepared)
        except Exception as error:
            if len(batch) == 1:
                batch[0].request.failed = True
                return [error]
            logger.exception("a batch of %d failed; trying its images one by one", len(batch))
            self._returning.forget()
            return [self._outcomes([w])[0] if w.wanted else error for w in batch]

    def _results(self, batch: list[_Waiting[Group, Item, Result]], prepared: HandOut) -> Sequence[Result]:
        group = batch[0].group
        try:
            inputs = self._prepare(group, [w.item for w in batch])
            prepared()
            results = self._run_batch(group, inputs)
        except (StopIteration, asyncio.CancelledError, CancelledError) as error:
            # asyncio takes these for its own: no future can have the first, and the others would look like a caller
            # who left.
            raise RuntimeError(repr(error)) from error
        if len(results) != len(batch):
            raise RuntimeError(f"expected {len(batch)} results of a batch, got {len(results)}")
        return results
